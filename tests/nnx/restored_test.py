"""States as checkpoints return them that are read without a target."""

import os
import tempfile

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import nnx
from nnx import restored


class Model(nnx.Module):
  """Lists of both kinds, and Variables of arrays, numbers and pytrees."""

  def __init__(self, fill):
    def make(*shape):
      return nnx.Param(jnp.full(shape, fill))

    self.layers = nnx.List([nnx.Dict(w=make(2, i + 1)) for i in range(11)])
    self.plain = [make(3), make(4)]
    self.names = nnx.Dict({"0": make(5)})
    self.tree = nnx.Param({"a": jnp.full(2, fill), "b": (jnp.full(1, fill),)})
    self.pair = nnx.BatchStat((jnp.full(2, fill), jnp.full(3, fill)))
    self.count = nnx.Variable(jnp.int32(fill))


def trained(fill):
  model = Model(fill)
  return {
    "model": model,
    "optimizer": nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param),
  }


def assert_same(a, b):
  a, b = nnx.to_pure_dict(nnx.state(a)), nnx.to_pure_dict(nnx.state(b))
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


def by_update(node, state):
  nnx.update(node, state)
  return node


def by_merge(node, state):
  return nnx.merge(nnx.graphdef(node), state)


def by_pure_dict(node, state):
  own = nnx.state(node)
  nnx.replace_by_pure_dict(own, state)
  nnx.update(node, own)
  return node


def by_state(node, state):
  own = nnx.state(node)
  nnx.update(own, state)
  return node


def by_update_of_a_state(node, state):
  nnx.update(node, nnx.State(state))
  return node


WAYS = (by_update, by_merge, by_pure_dict, by_state, by_update_of_a_state)


def saved(checkpointer, tree):
  """What a checkpointer gives back without a target."""
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, "checkpoint")
    with checkpointer() as open_checkpointer:
      open_checkpointer.save(path, tree)
      getattr(open_checkpointer, "wait_until_finished", lambda: None)()
      return open_checkpointer.restore(path)


def msgpack(tree):
  data = serialization.to_state_dict(nnx.to_pure_dict(tree))
  return serialization.msgpack_restore(serialization.msgpack_serialize(data))


FORMS = {
  "state": lambda s: s,
  "pure": nnx.to_pure_dict,
  "msgpack": msgpack,
  "orbax_state": lambda s: saved(ocp.StandardCheckpointer, s),
  "orbax_pure": lambda s: saved(ocp.StandardCheckpointer, nnx.to_pure_dict(s)),
  "orbax_composite": lambda s: saved(
    ocp.StandardCheckpointer, {"step": 3, "items": s}
  )["items"],
}


class RestoredTest(parameterized.TestCase):
  @parameterized.named_parameters(*((name, name) for name in FORMS))
  def test_every_form_is_restored_in_every_way(self, form):
    source = trained(3.0)
    state = FORMS[form](nnx.state(source))
    for way in WAYS:
      if form == "state" and way is by_pure_dict:
        continue
      target = way(trained(0.0), state)
      assert_same(target, source)
      self.assertEqual(sorted(vars(target["model"].layers)), list(range(11)))
      self.assertIsInstance(target["model"].layers[10].w, nnx.Param)
      self.assertIsInstance(target["model"].pair.raw_value, tuple)
      self.assertEqual(list(target["model"].names), ["0"])

  @parameterized.parameters(*WAYS)
  def test_the_text_of_an_int_and_the_int_are_one_key(self, way):
    model = nnx.Dict(ls=nnx.List([nnx.Param(jnp.zeros(2))]))
    new = jnp.ones(2)
    made = way(model, {"ls": {"0": new}})
    np.testing.assert_array_equal(made.ls[0].value, new)
    self.assertEqual(list(vars(made.ls)), [0])
    with self.assertRaisesRegex(ValueError, r"0.*'0'|\[0\].*'0'"):
      way(model, {"ls": {0: new, "0": new}})

  @parameterized.parameters("7", "-1", "00", "x", 7)
  def test_a_key_that_does_not_fit_is_named_with_those_there(self, key):
    state = {"ls": {key: jnp.ones(2)}}
    for way in WAYS:
      model = nnx.Dict(ls=nnx.List([nnx.Param(jnp.zeros(2))]))
      with self.assertRaisesRegex(
        ValueError, rf"{key!r}.*\[0\]|\[{key!r}\]|\[0\] is missing|ls\[0\]"
      ):
        way(model, state)
      self.assertEqual(list(vars(model.ls)), [0])
      np.testing.assert_array_equal(model.ls[0].value, jnp.zeros(2))

  def test_misspelt_names_are_refused(self):
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    with self.assertRaisesRegex(
      ValueError,
      "The graph must have every node of the state, but `kernal` is not there:"
      " no key 'kernal' in a Linear with the keys .*'kernel'",
    ):
      nnx.update(layer, {"kernal": jnp.ones((2, 3))})
    self.assertFalse(hasattr(layer, "kernal"))

  def test_variables_and_arrays_of_a_state_may_be_new(self):
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    nnx.update(layer, {"seen": nnx.Intermediate(1)})
    nnx.update(layer, nnx.State({"table": jnp.ones(2)}))
    self.assertEqual(layer.seen.value, 1)
    self.assertEqual(layer.table.shape, (2,))

  def test_dicts_of_variables_may_be_new_as_in_flax(self):
    for lib in (nnx, flax_nnx):

      class Bag(lib.Module, pytree=False):  # Flax has plain dicts in no other.
        pass

      model = Bag()
      seen = lib.Intermediate(jnp.ones(2))
      lib.update(model, {"seen": {"first": {"x": seen}}})
      np.testing.assert_array_equal(model.seen["first"]["x"][...], 1)
      self.assertLen(jax.tree.leaves(lib.state(model, lib.Intermediate)), 1)

  def test_dicts_of_anything_else_are_not_new(self):
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    for new in ({}, {"x": jnp.ones(2)}, {"x": nnx.Param(1), "y": {}}):
      for state in (dict, nnx.State):
        with self.assertRaisesRegex(ValueError, "`seen` is not there"):
          nnx.update(layer, state({"seen": new}))
    self.assertFalse(hasattr(layer, "seen"))

  @parameterized.parameters(
    by_update, by_merge, by_pure_dict, by_state, by_update_of_a_state
  )
  def test_a_container_in_place_of_an_array_is_refused(self, way):
    for wrong, said in (
      ({"foo": jnp.ones(2)}, r"a dict with the keys \['foo'\]"),
      ({}, r"a dict with the keys \[\]"),
      ({"value": {"value": jnp.ones(2)}}, r"a dict with the keys \['value'\]"),
      ([1.0, 2.0], "a list"),
      ((1.0, 2.0), "a tuple"),
    ):
      model = nnx.Dict(sub=nnx.Dict(w=nnx.Param(jnp.zeros(2))))
      with self.assertRaisesRegex(
        ValueError,
        f"The state must hold an array at `sub.w`, as the graph does, but got"
        f" {said}",
      ):
        way(model, {"sub": {"w": wrong}})
      np.testing.assert_array_equal(model.sub.w.value, jnp.zeros(2))

  @parameterized.parameters(*WAYS)
  def test_a_variable_of_a_dict_keeps_its_own_key_value(self, way):
    model = nnx.Dict(w=nnx.Param({"value": jnp.zeros(2)}))
    made = way(model, {"w": {"value": jnp.ones(2)}})
    np.testing.assert_array_equal(made.w.raw_value["value"], jnp.ones(2))
    made = way(model, {"w": {"value": {"value": jnp.ones(2)}}})
    np.testing.assert_array_equal(made.w.raw_value["value"], jnp.ones(2))

  @parameterized.parameters(*WAYS)
  def test_lists_and_tuples_in_a_variable_come_back_as_they_were(self, way):
    model = nnx.Dict(w=nnx.Param([jnp.zeros(1), (jnp.zeros(2),)]))
    new = {"value": {"0": jnp.ones(1), "1": [jnp.ones(2)]}}
    made = way(model, {"w": new}).w.raw_value
    self.assertIsInstance(made, list)
    self.assertIsInstance(made[1], tuple)
    with self.assertRaisesRegex(ValueError, "a list at `w`, as the graph does"):
      way(model, {"w": {"1": jnp.ones(1), "x": 1}})

  def test_a_leaf_and_a_subtree_do_not_replace_each_other(self):
    model = nnx.Dict(sub=nnx.Dict(w=nnx.Param(jnp.zeros(2))))
    for way in WAYS:
      with self.assertRaisesRegex(ValueError, "mapping at `.*sub"):
        way(model, {"sub": jnp.ones(2)})

  def test_merge_says_what_is_missing_or_too_much(self):
    graphdef, _ = nnx.split(nnx.List([nnx.Param(1), nnx.Param(2)]))
    with self.assertRaisesRegex(ValueError, r"`\[1\]` is missing"):
      nnx.merge(graphdef, {"0": 1})
    with self.assertRaisesRegex(ValueError, r"keys \['0', '1', '2'\]"):
      nnx.merge(graphdef, {"0": 1, "1": 2, "2": 3})


class ShapesTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("array", lambda x: x),
    ("numpy", np.asarray),
    ("dict", lambda x: {"value": x}),
    ("abstract", lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)),
    ("variable", nnx.Param),
  )
  def test_update_refuses_other_shapes(self, form):
    for state in (dict, nnx.State):
      # What a program made may change shapes, as in Flax.
      is_read = state is dict and form is not nnx.Param
      for check_shapes in (None, True) if is_read else (True,):
        model = nnx.Dict(sub=nnx.Dict(w=nnx.Param(jnp.zeros((2, 3)))))
        for shape in ((3, 2), (6,), (), (1, 2, 3)):
          new = state({"sub": {"w": form(jnp.ones(shape))}})
          with self.assertRaisesRegex(
            ValueError,
            r"an array of shape \(2, 3\) at `sub.w`, but got one of"
            r" \(.*\). Pass `check_shapes=False`",
          ):
            nnx.update(model, new, check_shapes=check_shapes)
          self.assertEqual(model.sub.w.shape, (2, 3))
          nnx.update(model, new, check_shapes=False)
          self.assertEqual(model.sub.w.shape, shape)
          nnx.update(
            model, {"sub": {"w": jnp.ones((2, 3))}}, check_shapes=False
          )

  @parameterized.named_parameters(
    ("mapped", lambda lib, s: jax.tree.map(lambda x: jnp.pad(x, 1), s)),
    ("arrays", lambda lib, s: lib.as_pure(jax.tree.map(jnp.ravel, s))),
    ("one", lambda lib, s: {"embedding": lib.Param(jnp.ones((7, 2)))}),
    (
      "flat",
      lambda lib, s: lib.from_flat_state(
        {("embedding",): jnp.ones((7, 2))}, cls=lib.State
      ),
    ),
  )
  def test_states_grow_tables_as_in_flax(self, grow):
    seen = []
    for lib in (nnx, flax_nnx):
      model = lib.Embed(3, 2, rngs=lib.Rngs(0))
      lib.update(model, grow(lib, lib.state(model)))
      self.assertIsInstance(model.embedding, lib.Param)
      seen.append(np.asarray(model.embedding[...]))
    np.testing.assert_array_equal(*seen)

  def test_a_number_is_no_array_of_a_shape(self):
    model = nnx.Dict(w=nnx.Param(jnp.zeros(2)), n=nnx.Param(jnp.zeros(())))
    with self.assertRaisesRegex(ValueError, r"but got one of \(\)"):
      nnx.update(model, {"w": 0.0})
    nnx.update(model, {"n": 1.0})
    self.assertEqual(model.n.value, 1.0)

  def test_update_is_all_or_nothing(self):
    model = nnx.Dict(a=nnx.Param(jnp.zeros(1)), b=nnx.Param(jnp.zeros(2)))
    with self.assertRaises(ValueError):
      nnx.update(model, {"a": jnp.ones(1), "b": jnp.ones(1)})
    self.assertEqual(model.a.value, 0)

  def test_arrays_outside_of_variables_and_in_pytrees_are_checked(self):
    model = nnx.Dict(table=jnp.zeros(2), w=nnx.Param({"a": jnp.zeros(2)}))
    with self.assertRaisesRegex(ValueError, "at `table`"):
      nnx.update(model, {"table": jnp.zeros(3)})
    with self.assertRaisesRegex(ValueError, r"at `w\['a'\]`"):
      nnx.update(model, {"w": {"a": jnp.zeros(3)}})

  def test_dtypes_are_those_of_the_state_as_in_flax(self):
    model = nnx.Dict(w=nnx.Param(jnp.zeros(2)))
    nnx.update(model, {"w": jnp.ones(2, jnp.bfloat16)})
    self.assertEqual(model.w.dtype, jnp.bfloat16)

  @parameterized.parameters(nnx.Cache, nnx.Intermediate, nnx.Perturbation)
  def test_what_is_of_no_fixed_shape_is_resized(self, kind):
    model = nnx.Dict(c=kind(jnp.zeros((1, 4))))
    nnx.update(model, {"c": jnp.ones((2, 8))})
    nnx.update(model, nnx.State({"c": kind(jnp.ones((3, 8)))}))
    self.assertEqual(model.c.shape, (3, 8))

  def test_keys_of_streams_are_split_and_put_back_by_states(self):
    rngs = nnx.Rngs(0)
    before = nnx.clone(nnx.state(rngs))
    nnx.split_rngs(rngs, splits=3)
    nnx.update(rngs, before)
    self.assertEqual(rngs.default.key.shape, ())

  def test_a_write_to_a_variable_may_have_any_shape(self):
    model = nnx.Dict(w=nnx.Param(jnp.zeros(2)))
    state = nnx.state(model)
    state.w.value = jnp.ones(5)
    nnx.update(model, state)
    model.w.value = jnp.ones(7)
    self.assertEqual(model.w.shape, (7,))

  def test_values_that_are_no_arrays_pass(self):
    model = nnx.Dict(w=nnx.Param(jnp.zeros(2)), n=nnx.Variable(0))
    nnx.update(model, {"w": jax.P("a"), "n": jnp.ones(3)})
    nnx.update(model, {"w": None})
    self.assertIsNone(model.w.raw_value)

  def test_under_a_trace(self):
    @nnx.jit
    def write(model, x):
      nnx.update(model, {"w": x})

    model = nnx.Dict(w=nnx.Param(jnp.zeros(2)))
    write(model, jnp.ones(2))
    np.testing.assert_array_equal(model.w.value, jnp.ones(2))
    with self.assertRaisesRegex(ValueError, r"shape \(2,\) at `w`"):
      write(model, jnp.ones(3))


class KeysTest(absltest.TestCase):
  def test_a_great_many_keys_are_cut(self):
    text = restored.keys_text(range(100))
    self.assertEndsWith(text, "11, ...]")


if __name__ == "__main__":
  absltest.main()
