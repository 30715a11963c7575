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


@pytest.mark.parametrize("scaling", [None, nnx.YarnScaling(4.0, 32)])
def test_rotated_texts_may_have_any_length(scaling):
  layer = nnx.MultiHeadAttention(
    2, 8, rope_base=1e4, rope_scaling=scaling, decode=False, rngs=nnx.Rngs(0)
  )
  graphdef, state = nnx.split(layer)

  @jax.jit
  def attend(state, queries, keys):
    return nnx.merge(graphdef, state)(queries, keys)

  b, t, s = export.symbolic_shape("b, t, s")
  queries = jax.ShapeDtypeStruct((b, t, 8), jnp.float32)
  keys = jax.ShapeDtypeStruct((b, s, 8), jnp.float32)
  read = export.deserialize(
    export.export(attend)(state, queries, keys).serialize()
  )
  for batch, tokens, others in ((1, 3, 5), (2, 300, 7)):
    x, y = (
      np.random.default_rng(0).normal(size=(batch, n, 8)).astype(np.float32)
      for n in (tokens, others)
    )
    np.testing.assert_allclose(
      read.call(state, x, y), layer(x, y), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("per_sequence", [False, True])
def test_a_step_of_decoding_may_have_any_batch(per_sequence):
  layer = nnx.MultiHeadAttention(
    2, 8, num_kv_heads=1, rope_base=1e4, decode=True, rngs=nnx.Rngs(0)
  )
  nnx.init_cache(layer, 2, 16, per_sequence=per_sequence)
  graphdef, state = nnx.split(layer)

  @jax.jit
  def step(state, x):
    layer = nnx.merge(graphdef, state)
    return layer(x), nnx.state(layer)

  b, t = export.symbolic_shape("b, t")

  def of_any_batch(cache):
    shape = (b, *cache.shape[1:]) if cache.shape else ()
    return jax.ShapeDtypeStruct(shape, cache.dtype)

  caches, rest = nnx.split_state(state, nnx.Cache, ...)
  caches = jax.tree.map(of_any_batch, caches)
  x = jax.ShapeDtypeStruct((b, t, 8), jnp.float32)
  exported = export.export(step)(nnx.merge_state(caches, rest), x)
  read = export.deserialize(exported.serialize())
  for batch in (1, 3):
    nnx.init_cache(layer, batch, 16, per_sequence=per_sequence)
    state = jax.tree.map(jnp.copy, nnx.state(layer))
    x = np.random.default_rng(0).normal(size=(batch, 6, 8)).astype(np.float32)
    first, state = read.call(state, x[:, :5])
    last, _ = read.call(state, x[:, 5:])
    np.testing.assert_allclose(
      np.concatenate([first, last], 1), layer(x), rtol=1e-4, atol=1e-5
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
