"""What Variables list as their metadata, however they are made, as Flax."""

import copy
import pickle
import warnings

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import optax

import nnx

NAMES = ("hijax", "ref", "eager_sharding", "mutable", "note")


def _under(context, make, *args):
  with context:
    return make(*args)


def _changed(variable, change):
  change(variable)
  return variable


# Each makes Variables of one of the two libraries of an array.
WAYS = {
  "plain": lambda lib, x: lib.Param(x),
  "annotated": lambda lib, x: lib.BatchStat(x, note="a"),
  **{
    f"{name}_{value}": lambda lib, x, kw={name: value}: lib.Param(
      x, note="a", **kw
    )
    for name in ("hijax", "ref", "eager_sharding")
    for value in (True, False, None)
  },
  "not_mutable": lambda lib, x: lib.Param(x, mutable=False),
  "two_switches": lambda lib, x: lib.Param(x, hijax=True, eager_sharding=False),
  "sharded": lambda lib, x: lib.Param(
    x, out_sharding=("a",), eager_sharding=False
  ),
  "initializer": lambda lib, x: lib.Param(
    lib.with_metadata(lambda: x, note="a", eager_sharding=False, ref=True)()
  ),
  "metadata": lambda lib, x: lib.Param(
    lib.VariableMetadata(x, metadata={"hijax": False, "note": "a"}), ref=True
  ),
  "hijax_by_default": lambda lib, x: _under(
    lib.var_defaults(hijax=True), lib.Param, x
  ),
  "ref_by_default": lambda lib, x: _under(
    lib.var_defaults(ref=True), lib.Param, x
  ),
  "not_as_by_default": lambda lib, x: _under(
    lib.var_defaults(ref=True), lambda: lib.Param(x, ref=False)
  ),
  "not_eager": lambda lib, x: _under(
    lib.use_eager_sharding(False), lib.Param, x
  ),
  "eager_all_the_same": lambda lib, x: _under(
    lib.use_eager_sharding(False), lambda: lib.Param(x, eager_sharding=True)
  ),
  "from_metadata": lambda lib, x: lib.Param.from_metadata(
    x, lib.Param(x, note="a", eager_sharding=False).get_metadata()
  ),
  "copy": lambda lib, x: lib.Param(x, eager_sharding=False).copy(note="b"),
  "replace": lambda lib, x: lib.Param(x, note="a").replace(x + 1),
  "to_state": lambda lib, x: lib.Param(x, ref=True).to_state(),
  "copied": lambda lib, x: copy.copy(lib.Param(x, note="a")),
  "pickled": lambda lib, x: pickle.loads(
    pickle.dumps(lib.Param(2, note="a", eager_sharding=False))
  ),
  "mapped": lambda lib, x: jax.tree.map(
    jnp.sin, lib.Param(x, note="a", eager_sharding=False)
  ),
  "with_hijax": lambda lib, x: lib.with_vars(
    lib.Param(x, note="a"), hijax=True
  ),
  "with_ref": lambda lib, x: lib.with_vars(lib.Param(x, note="a"), ref=True),
  "without_ref": lambda lib, x: lib.with_vars(
    lib.Param(x, ref=True), ref=False
  ),
  "set": lambda lib, x: _changed(
    lib.Param(x, note="a", eager_sharding=False),
    lambda p: p.set_metadata({"b": 1}),
  ),
  "set_to_its_own": lambda lib, x: _changed(
    lib.Param(x, ref=True), lambda p: p.set_metadata(p.get_metadata())
  ),
  "one_set": lambda lib, x: _changed(
    lib.Param(x), lambda p: p.set_metadata("eager_sharding", False)
  ),
  "some_set": lambda lib, x: _changed(
    lib.Param(x, eager_sharding=False),
    lambda p: p.set_metadata(eager_sharding=True, hijax=False),
  ),
  "copied_from": lambda lib, x: _changed(
    lib.Param(x, note="a"),
    lambda p: p.copy_from(lib.Param(x, eager_sharding=False)),
  ),
  "updated_from": lambda lib, x: _changed(
    lib.Param(x, note="a", ref=True),
    lambda p: p.update_from_state(lib.Param(x, b=2, eager_sharding=False)),
  ),
  "layers": lambda lib, x: [
    lib.Linear(2, 3, kernel_metadata={"note": "a"}, rngs=lib.Rngs(0)),
    lib.BatchNorm(3, rngs=lib.Rngs(0)),
    lib.Dropout(0.5, rngs=lib.Rngs(0)),
    lib.Rngs(params=1),
  ],
  "optimizer": lambda lib, x: lib.Optimizer(
    lib.Dict(a=lib.Param(x, note="a", eager_sharding=False)),
    optax.adam(0.1),
    wrt=lib.Param,
  ),
}

# What may become of a Dict of one Variable, `a`, in each of the modes.
FATES = {
  "split": lambda lib, d, **mode: lib.split(d, graph=mode["graph"])[1],
  "state": lambda lib, d, **mode: lib.state(d, graph=mode["graph"]),
  "merge": lambda lib, d, **mode: lib.merge(*lib.split(d, **_graph(mode))),
  "clone": lambda lib, d, **mode: lib.clone(d, graph=mode["graph"]),
  "jit": lambda lib, d, **mode: lib.jit(_write, **mode)(d) or d,
  "jit_result": lambda lib, d, **mode: lib.jit(
    lambda d: {"a": lib.Param(d["a"] + 1, note="b")}, **mode
  )(d),
  "grad": lambda lib, d, **mode: lib.grad(lambda d: d["a"].sum(), **mode)(d),
  "vmap": lambda lib, d, **mode: lib.vmap(_write, **mode)(d) or d,
  "eval_shape": lambda lib, d, **mode: lib.eval_shape(
    lambda d: lib.Param(d["a"] + 1, eager_sharding=False), d, **mode
  ),
}


def _graph(mode):
  return {"graph": mode["graph"]}


def _write(d):
  d["a"][...] += 1


def _see(lib, made):
  """Lists what each Variable tells of its metadata, in order."""
  return [
    (
      variable.get_metadata(),
      variable.get_metadata(exclude_required=True),
      [variable.get_metadata(name, None) for name in NAMES],
      # Flax's hijax Variables have no such method.
      variable.hijax or [variable.has_metadata(name) for name in NAMES],
      variable.hijax,
      variable.ref,
      variable.eager_sharding,
    )
    for variable in jax.tree.leaves(
      made, is_leaf=lambda x: isinstance(x, lib.Variable)
    )
  ]


def _see_both(make):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return [_see(lib, make(lib)) for lib in (nnx, flax_nnx)]


class ListedMetadataTest(parameterized.TestCase):
  @parameterized.parameters(*WAYS)
  def test_ways_to_make_one(self, way):
    ours, theirs = _see_both(lambda lib: WAYS[way](lib, jnp.ones(2)))
    self.assertEqual(ours, theirs)
    self.assertTrue(ours)

  @parameterized.parameters(
    (fate, mode, how)
    for fate in FATES
    for mode in ((True, True), (True, False), (False, False))
    for how in ({}, {"eager_sharding": False}, {"hijax": True})
    # Flax has no hijax Variables under most of its own transforms.
    if "hijax" not in how or fate in ("split", "state", "merge", "clone")
  )
  def test_modes(self, fate, mode, how):
    graph, graph_updates = mode
    ours, theirs = _see_both(
      lambda lib: FATES[fate](
        lib,
        lib.Dict(a=lib.Param(jnp.ones(2), note="a", **how)),
        graph=graph,
        graph_updates=graph_updates,
      )
    )
    self.assertEqual(ours, theirs)
    self.assertTrue(ours)

  def test_has_metadata_of_hijax(self):
    self.assertTrue(nnx.Param(1, hijax=True).has_metadata("hijax"))

  def test_what_was_the_default_stays(self):
    with nnx.use_eager_sharding(False):
      late = nnx.Param(1)
      self.assertFalse(late.eager_sharding)
    early = nnx.Param(1)
    with nnx.use_eager_sharding(False):
      self.assertTrue(early.eager_sharding)
    self.assertFalse(late.eager_sharding)


if __name__ == "__main__":
  absltest.main()
