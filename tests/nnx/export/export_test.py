"""`jax.export` and compiled functions of models, from process to process."""

import copy
import os
import pathlib
import pickle
import subprocess
import sys

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nnx
from nnx.engine import _engine

PROGRAM = pathlib.Path(__file__).with_name("programs.py")


def run(mode: str, folder: pathlib.Path) -> str:
  done = subprocess.run(
    [sys.executable, PROGRAM, mode, folder],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return done.stdout


def test_another_process_serves_what_one_has_written(tmp_path):
  run("write", tmp_path)
  served = run("serve", tmp_path)
  for name in ("train", "decode", "graphdef", "module", "compiled sharded"):
    assert f"{name} is right" in served


class Net(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.BatchNorm(8, rngs=rngs)

  def __call__(self, x):
    return self.norm(x)


def training():
  graphdef, state = nnx.split(Net(nnx.Rngs(0)))

  @jax.jit
  def step(state, x):
    model = nnx.merge(graphdef, state)
    y = model(x)
    return y, nnx.state(model)

  return step, state


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_is_lowered_for_platforms_that_are_not_here(platform):
  step, state = training()
  x = jnp.ones((16, 8))
  exported = export.export(step, platforms=[platform])(state, x)
  read = export.deserialize(exported.serialize())
  assert read.platforms == (platform,)
  assert read.out_tree == jax.tree.structure((x, state))


def test_batches_may_have_any_size():
  step, state = training()
  (b,) = export.symbolic_shape("b")
  x = jax.ShapeDtypeStruct((b, 8), jnp.float32)
  read = export.deserialize(export.export(step)(state, x).serialize())
  for size in (3, 16):
    x = np.random.default_rng(0).normal(size=(size, 8)).astype(np.float32)
    y, after = read.call(state, x)
    want = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
      after["norm"]["mean"].value, 0.01 * x.mean(0), rtol=1e-4, atol=1e-6
    )


def test_a_function_of_nnx_jit_says_what_to_export_instead():
  exported = export.export(nnx.jit(lambda model, x: model(x)))(
    Net(nnx.Rngs(0)), jnp.ones((16, 8))
  )
  with pytest.raises(ValueError, match="returns what it changes.*nnx.merge"):
    exported.serialize()


def test_what_has_no_name_says_what_to_export_instead():
  model = Net(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  graphdef, state = nnx.split(optimizer)
  exported = export.export(jax.jit(lambda g, s: s))(graphdef, state)
  with pytest.raises(ValueError, match="must have a name.*nnx.merge"):
    exported.serialize()


def test_a_class_that_is_defined_anew_is_meant():
  def define():
    class Again(nnx.Variable):
      pass

    return Again

  define()
  latest = define()
  exported = export.export(jax.jit(lambda x: x))(latest(jnp.ones(2)))
  read = export.deserialize(exported.serialize())
  assert type(read.call(latest(jnp.ones(2)))) is latest


def test_numbers_and_words_as_keys_of_a_state_are_in_its_order():
  state = nnx.State({"b": {1: 1, 0: 2, "a": 3}, "a": {"c": 4}})
  leaves, tree = jax.tree.flatten(state)
  assert leaves == [4, 2, 1, 3]
  again = jax.tree.unflatten(tree, leaves)
  assert again == state
  assert type(again.raw_mapping["b"]) is dict
  paths, _ = jax.tree_util.tree_flatten_with_path(state)
  assert jax.tree_util.keystr(paths[1][0]) == "['b'][0]"


def test_a_compiled_function_refuses_another_structure_after_a_pickle():
  compiled = nnx.jit(Net.__call__).lower(Net(nnx.Rngs(0)), jnp.ones((4, 8)))
  read = pickle.loads(pickle.dumps(compiled.compile()))
  other = Net(nnx.Rngs(0))
  other.norm.epsilon = 0.1
  with pytest.raises(ValueError, match="of the structure"):
    read(other, jnp.ones((4, 8)))


def test_devices_must_be_there(monkeypatch):
  compiled = nnx.jit(lambda x: x + 1).lower(1.0).compile()
  data = pickle.dumps(compiled)
  monkeypatch.setattr(jax, "local_devices", lambda backend: [])
  with pytest.raises(ValueError, match="cpu 0, but here are"):
    pickle.loads(data)


def plans():
  """Plans of functions that write, add, share and return."""

  def write(model, x):
    model.norm.mean.value += 1
    return x

  def add(model, x):
    model.more = nnx.Param(x)
    return model.more

  def give_back(model, x):
    return model, [x, nnx.Param(x)] * 2

  for fun in (write, add, give_back):
    args = (Net(nnx.Rngs(0)), jnp.ones(()))
    structure, leaves, _ = _engine.flatten(args)
    values, objects = _engine.unflatten(structure, leaves)
    yield _engine.pack(structure, objects, leaves, fun(*values)), args


def test_a_plan_does_the_same_after_a_pickle():
  for packed, args in plans():
    plan = pickle.loads(pickle.dumps(packed.plan))
    again = _engine.packed_unflatten(plan, packed.outputs)
    results = []
    for each in (packed, again):
      given = copy.deepcopy(args)
      _, leaves, objects = _engine.flatten(given)
      results.append((_engine.apply(each, objects, leaves), given))
    one, two = map(jax.tree.leaves, results)
    assert nnx.graphdef(results[0]) == nnx.graphdef(results[1])
    for a, b in zip(one, two, strict=True):
      np.testing.assert_array_equal(a, b)


def test_a_plan_is_not_restored_of_parts_that_do_not_fit():
  for packed, _ in plans():
    restore, parts = packed.plan.__reduce__()
    structure, output_of, matches, writes, origin = parts
    for wrong in (
      (structure, output_of[1:], matches, writes, origin),
      (structure, (*output_of, 0), matches, writes, origin),
      (structure, (-2,) * len(output_of), matches, writes, origin),
      (structure, (-1,) * len(output_of), matches, writes, origin),
      (structure, (2**40,) * len(output_of), matches, writes, origin),
      (structure, output_of, (0,) * 100, writes, origin),
      (structure, output_of, matches, ((99, 0),), origin),
      (structure, output_of, matches, ((0, 99),), origin),
      (structure, output_of, matches, ("a",), origin),
      (structure, output_of, matches, 3, origin),
      (structure, output_of, matches, writes, origin[1:]),
      (structure, output_of, matches, (), (-1,) * len(origin)),
    ):
      with pytest.raises((ValueError, OverflowError, TypeError)):
        restore(*wrong)
