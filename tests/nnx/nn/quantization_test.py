"""Quantisation and adaptation by a `dot_general` in the place of jax's.

What is done here is what tools for it do to flax.nnx, which is the oracle.
"""

import inspect

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.testing import interception

_DOT = "jax.lax.dot_general"


def _model(library):
  class Block(library.Module):
    def __init__(self, rngs):
      self.first = library.Linear(4, 8, rngs=rngs)
      self.norm = library.LayerNorm(8, rngs=rngs)
      self.second = library.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
      return self.second(jax.nn.relu(self.norm(self.first(x))))

  return Block(library.Rngs(0))


def _input():
  return jnp.asarray(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)


def _rounded(x, axis):
  """Integers of 8 bits and their scale."""
  scale = jnp.maximum(jnp.abs(x).max(axis, keepdims=True), 1e-6) / 127
  return jnp.clip(jnp.round(x / scale), -127, 127), scale


def _post_training(_, original, lhs, rhs, dims, **kwargs):
  """Products of integers, which the layer does not know."""
  (left, left_scale), (right, right_scale) = _rounded(lhs, -1), _rounded(rhs, 0)
  y = original(
    left.astype(jnp.int8),
    right.astype(jnp.int8),
    dims,
    preferred_element_type=jnp.int32,
  )
  return y.astype(jnp.float32) * left_scale * right_scale


def _aware(_, original, lhs, rhs, dims, **kwargs):
  """Rounded values, with gradients as if they were not."""

  def straight(x, axis):
    whole, scale = _rounded(x, axis)
    return x + jax.lax.stop_gradient(whole * scale - x)

  return original(straight(lhs, -1), straight(rhs, 0), dims, **kwargs)


def _module_that_calls(library):
  frame = inspect.currentframe()
  while frame is not None:
    caller = frame.f_locals.get("self")
    if isinstance(caller, library.Module):
      return caller
    frame = frame.f_back
  return None


def _adapt(library):
  """Adds a product of two thin matrices that are kept in the layer."""

  def handle(_, original, lhs, rhs, dims, **kwargs):
    layer = _module_that_calls(library)
    if layer is None:  # a product of the backward pass
      return original(lhs, rhs, dims, **kwargs)
    if not hasattr(layer, "lora_a"):
      rows, columns = rhs.shape
      layer.lora_a = library.LoRAParam(jnp.full((rows, 2), 0.5))
      layer.lora_b = library.LoRAParam(jnp.full((2, columns), 0.25))
    y = original(lhs, rhs, dims, **kwargs)
    return y + lhs @ layer.lora_a[...] @ layer.lora_b[...]

  return handle


def _loss(model, x):
  return (model(x) ** 2).sum()


def _grads(library, model, wrt, x):
  grads = library.grad(_loss, argnums=library.DiffState(0, wrt))(model, x)
  return library.to_pure_dict(grads)


def _assert_close(got, want):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5),
    got,
    want,
  )


class QuantizationTest(parameterized.TestCase):
  @parameterized.product(
    handle=(_post_training, _aware), by=("code", "attribute")
  )
  def test_result_is_that_of_flax(self, handle, by):
    ours, theirs = _model(nnx), _model(flax_nnx)
    x = _input()
    plain = ours(x)
    # By its code: flax.nnx keeps the function that was imported.
    with interception.replaced([_DOT], handle):
      want = theirs(x)
    with interception.replaced([_DOT], handle, by):
      eager = ours(x)
      traced = nnx.jit(lambda model, x: model(x))(ours, x)
    _assert_close(eager, want)
    # Fused, a number may round the other way: by a step of the scale at most.
    np.testing.assert_allclose(traced, want, atol=0.05)
    self.assertGreater(np.abs(plain - want).max(), 1e-4)
    np.testing.assert_array_equal(ours(x), plain)

  def test_gradients_of_aware_training_are_those_of_flax(self):
    ours, theirs = _model(nnx), _model(flax_nnx)
    x = _input()
    plain = _grads(nnx, ours, nnx.Param, x)
    with interception.replaced([_DOT], _aware):
      got = _grads(nnx, ours, nnx.Param, x)
      want = _grads(flax_nnx, theirs, flax_nnx.Param, x)
    _assert_close(got, want)
    moved = np.abs(got["second"]["kernel"] - plain["second"]["kernel"]).max()
    self.assertGreater(moved, 1e-4)

  def test_adaptation_is_that_of_flax(self):
    results = []
    for library in (nnx, flax_nnx):
      model, x = _model(library), _input()
      with interception.replaced([_DOT], _adapt(library)):
        y = model(x)
        again = library.jit(lambda model, x: model(x))(model, x)
        grads = _grads(library, model, library.LoRAParam, x)
      self.assertEqual(sorted(grads), ["first", "second"])
      _assert_close(again, y)
      results.append((y, grads))
    _assert_close(*results)


if __name__ == "__main__":
  absltest.main()
