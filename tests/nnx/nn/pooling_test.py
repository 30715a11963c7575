"""Pooling, against flax.nnx."""

from flax import nnx as flax_nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.nn.comparison import array

CASES = {
  "plain": ((2, 7, 8, 3), (2, 3), {}),
  "strides": ((2, 7, 8, 3), (2, 3), {"strides": (2, 1)}),
  "same": ((2, 7, 8, 3), (2, 3), {"padding": "SAME"}),
  "pads": ((2, 7, 8, 3), (2, 3), {"padding": ((1, 0), (1, 1))}),
  "no batch": ((7, 8, 3), (2, 3), {}),
  "one axis": ((2, 7, 3), (2,), {"strides": (2,)}),
  "half": ((2, 7, 3), (2,), {}),
}


def assert_same(got, want):
  assert got.dtype == want.dtype and got.shape == want.shape
  np.testing.assert_allclose(
    np.asarray(got, np.float32),
    np.asarray(want, np.float32),
    rtol=1e-2 if got.dtype == jnp.bfloat16 else 1e-6,
  )


@pytest.mark.parametrize(
  ("shape", "window", "kwargs"), CASES.values(), ids=CASES
)
@pytest.mark.parametrize("name", ["avg_pool", "max_pool", "min_pool"])
def test_pools(name, shape, window, kwargs, request):
  half = "half" in request.node.callspec.id
  x = array(*shape, dtype=jnp.bfloat16 if half else jnp.float32)
  results = []
  for library in (nnx, flax_nnx):

    def loss(x, library=library):
      y = getattr(library, name)(x, window, **kwargs)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    grad, y = jax.grad(loss, has_aux=True)(x)
    results.append((y, grad))
  for got, want in zip(*results):
    assert_same(got, want)


@pytest.mark.parametrize("shape", [(2, 7, 8, 3), (7, 8, 3)])
def test_the_mean_without_padding(shape):
  x = array(*shape)
  args = (x, (2, 3), (1, 1), "SAME", False)
  assert_same(nnx.avg_pool(*args), flax_nnx.avg_pool(*args))


def test_more_batch_axes():
  x = array(2, 3, 7, 8, 3)
  got = nnx.avg_pool(x, (2, 3), padding="SAME", count_include_pad=False)
  want = nnx.avg_pool(x[1], (2, 3), padding="SAME", count_include_pad=False)
  np.testing.assert_allclose(got[1], want, rtol=1e-6)


def test_pool_with_any_function():
  x = array(2, 7, 3)
  args = (x, 1.0, lax.mul, (2,), None, "VALID")
  assert_same(nnx.pool(*args), flax_nnx.pool(*args))


def test_refusals():
  x = array(2, 7, 3)
  with pytest.raises(ValueError, match="`inputs` must have an axis for each"):
    nnx.max_pool(x, (2, 2, 2))
  with pytest.raises(ValueError, match="`strides` must have one number for e"):
    nnx.max_pool(x, (2,), (1, 1))
  with pytest.raises(ValueError, match="`padding` must be a string or one pa"):
    nnx.max_pool(x, (2,), padding=((1, 1), (1, 1)))
