"""Checkpoints: pure dicts, orbax, int keys, and States of flax.nnx 0.12."""

import os
import pickle
import tempfile

from absl.testing import absltest
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import nnx


def define(lib):
  """A model with lists, random state and Variables of several kinds."""

  class Layer(lib.Module):
    def __init__(self, rngs):
      self.w = lib.Param(rngs.params.normal((2, 3)), axis="embed")
      self.mean = lib.BatchStat(jnp.zeros(3, jnp.bfloat16))

  class Model(lib.Module):
    def __init__(self, seed):
      rngs = lib.Rngs(seed, params=seed + 1)
      self.layers = lib.List([Layer(rngs) for _ in range(11)])
      self.rngs = rngs
      self.step = lib.Variable(jnp.int32(seed))

  return Model


Model, FlaxModel = define(nnx), define(flax_nnx)


def arrays(tree):
  """A tree with typed keys turned into their data, comparable by numpy."""
  return jax.tree.map(
    lambda x: (
      jax.random.key_data(x)
      if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
    ),
    tree,
  )


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, arrays(a), arrays(b))


class CheckpointTest(absltest.TestCase):
  def directory(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    return os.path.join(folder, "checkpoint")

  def test_pure_dict(self):
    model, other = Model(0), Model(5)
    pure = nnx.to_pure_dict(nnx.state(model))
    self.assertEqual(list(pure["layers"]), list(range(11)))
    state = nnx.state(other)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(other, state)
    assert_same(nnx.to_pure_dict(nnx.state(other)), pure)
    self.assertEqual(other.layers[3].w.axis, "embed")
    self.assertEqual(
      jax.random.key_data(other.rngs()).tolist(),
      jax.random.key_data(model.rngs()).tolist(),
    )

  def test_pure_dict_of_flax(self):
    pure = flax_nnx.to_pure_dict(flax_nnx.state(FlaxModel(3)))
    model = Model(0)
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, pure)
    nnx.update(model, state)
    assert_same(nnx.to_pure_dict(nnx.state(model)), pure)
    # And the other way round: the layouts are the same.
    theirs = flax_nnx.state(FlaxModel(0))
    flax_nnx.replace_by_pure_dict(theirs, nnx.to_pure_dict(nnx.state(Model(4))))
    assert_same(
      flax_nnx.to_pure_dict(theirs), nnx.to_pure_dict(nnx.state(Model(4)))
    )

  def test_orbax_pure_dict(self):
    model = Model(0)
    pure = arrays(nnx.to_pure_dict(nnx.state(model)))
    path = self.directory()
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, pure)
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(path)
    self.assertIn("10", restored["layers"])  # orbax makes strings of ints
    fixed = nnx.restore_int_paths(restored)
    self.assertEqual(sorted(fixed["layers"]), list(range(11)))
    assert_same(fixed, pure)
    state = nnx.state(Model(5), nnx.Not(nnx.RngKey))
    nnx.replace_by_pure_dict(
      state, nnx.to_pure_dict(nnx.State(restored).filter(_no_key))
    )
    assert_same(
      nnx.to_pure_dict(state),
      nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))),
    )

  def test_orbax_state(self):
    """A State goes through orbax as the pytree that it is."""
    model = Model(0)
    state = nnx.state(model, nnx.Not(nnx.RngKey))
    target = jax.tree.map(
      jnp.zeros_like, nnx.state(Model(5), nnx.Not(nnx.RngKey))
    )
    path = self.directory()
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, state)
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(path, target)
    self.assertIsInstance(restored, nnx.State)
    self.assertIsInstance(restored.layers[10].w, nnx.Param)
    self.assertEqual(restored.layers[10].w.axis, "embed")
    assert_same(restored, state)

  def test_orbax_state_into_abstract_model(self):
    model = Model(0)
    state = nnx.state(model, nnx.Not(nnx.RngKey))
    abstract = jax.eval_shape(lambda s: s, state)
    path = self.directory()
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, state)
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(path, abstract)
    other = Model(5)
    nnx.update(other, restored)
    assert_same(nnx.state(other, nnx.Not(nnx.RngKey)), state)

  def test_training_goes_on_while_orbax_writes(self):
    """Large enough that steps update the state in place."""
    model = nnx.Linear(512, 1024, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model):
      model.kernel[...] += 1

    step(model)
    step(model)
    saved = np.array(model.kernel)
    path = self.directory()
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, nnx.state(model))
      for _ in range(10):
        step(model)
      checkpointer.wait_until_finished()
      target = jax.eval_shape(lambda s: s, nnx.state(model))
      restored = checkpointer.restore(path, target)
    np.testing.assert_array_equal(restored.kernel, saved)
    np.testing.assert_allclose(model.kernel, saved + 10, rtol=1e-6)

  def test_state_saved_by_flax(self):
    theirs = flax_nnx.state(FlaxModel(3), flax_nnx.Not(flax_nnx.RngKey))
    model = Model(0)
    ours = nnx.state(model, nnx.Not(nnx.RngKey))
    path = self.directory()
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, theirs)
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(path, ours)
    self.assertIsInstance(restored, nnx.State)
    nnx.update(model, restored)
    assert_same(
      nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))),
      flax_nnx.to_pure_dict(theirs),
    )

  def test_orbax_random_state(self):
    rngs, other = nnx.Rngs(0, params=1), nnx.Rngs(5, params=6)
    rngs.params()
    path = self.directory()
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, nnx.state(rngs))
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(path, nnx.state(other))
    nnx.update(other, restored)
    assert_same(nnx.state(other), nnx.state(rngs))
    self.assertEqual(
      jax.random.key_data(other.params()).tolist(),
      jax.random.key_data(rngs.params()).tolist(),
    )

  def test_pickle(self):
    model = Model(0)
    params = pickle.loads(pickle.dumps(nnx.state(model, nnx.Param)))
    assert_same(params, nnx.state(model, nnx.Param))

  def test_shape_of_random_state_is_restored(self):
    model = Model(0)
    saved = nnx.to_pure_dict(nnx.state(model))
    nnx.split_rngs(model, splits=4)
    state = nnx.state(model)
    nnx.replace_by_pure_dict(state, saved)
    nnx.update(model, state)
    self.assertEqual(model.rngs.params.key.shape, ())


def _no_key(path, value):
  del value
  return path[-1] != "key"


if __name__ == "__main__":
  absltest.main()
