"""Pooling, against flax.nnx."""

from flax import nnx as flax_nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import array

CASES = {
  "plain": ((2, 7, 8, 3), (2, 3), {}),
  "strides": ((2, 7, 8, 3), (2, 3), {"strides": (2, 1)}),
  "same": ((2, 7, 8, 3), (2, 3), {"padding": "SAME"}),
  "small letters": ((2, 7, 8, 3), (2, 3), {"padding": "same"}),
  "pads": ((2, 7, 8, 3), (2, 3), {"padding": ((1, 0), (1, 1))}),
  "no batch": ((7, 8, 3), (2, 3), {}),
  "one axis": ((2, 7, 3), (2,), {"strides": (2,)}),
  "half": ((2, 7, 3), (2,), {}),
  "three axes": ((2, 4, 3, 5, 2), (2, 1, 3), {"strides": (2, 2, 1)}),
  "lower": ((2, 7, 8, 3), (2, 4), {"padding": "SAME_LOWER", "strides": (2, 3)}),
  "wide padding": ((2, 5, 3), (3,), {"padding": ((4, 5),)}),
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

  def results_of(library, x):
    def loss(x):
      y = getattr(library, name)(x, window, **kwargs)
      return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

    grad, y = jax.grad(loss, has_aux=True)(x)
    return y, grad

  @comparison.jit
  def results(x):
    return [results_of(library, x) for library in (nnx, flax_nnx)]

  for got, want in zip(*results(x)):
    assert_same(got, want)


@pytest.mark.parametrize("shape", [(2, 7, 8, 3), (7, 8, 3)])
def test_the_mean_without_padding(shape):
  x = array(*shape)
  args = (x, (2, 3), (1, 1), "SAME", False)
  assert_same(nnx.avg_pool(*args), flax_nnx.avg_pool(*args))


@pytest.mark.parametrize("count_include_pad", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_means_in_half_precision_are_rounded_once(dtype, count_include_pad):
  x = 9_000 * jnp.asarray(array(2, 40, 3), dtype)  # some sums overflow
  pads, size = ((3, 5),), 9
  got = nnx.avg_pool(x, (size,), None, pads, count_include_pad)
  exact = np.pad(np.asarray(x, np.float64), [(0, 0), pads[0], (0, 0)])
  inside = np.pad(np.ones(40), pads[0])
  sums = np.stack([exact[:, i : i + size].sum(1) for i in range(40)], 1)
  counts = [inside[i : i + size].sum() for i in range(40)]
  want = sums / (size if count_include_pad else np.array(counts)[:, None])
  assert got.dtype == x.dtype
  np.testing.assert_allclose(
    np.asarray(got, np.float64),
    want,
    rtol=float(jnp.finfo(dtype).eps) / 2 * 1.01,
    atol=1e-3 * 2**4,
  )


def test_more_batch_axes():
  x = array(2, 3, 7, 8, 3)
  got = nnx.avg_pool(x, (2, 3), padding="SAME", count_include_pad=False)
  want = nnx.avg_pool(x[1], (2, 3), padding="SAME", count_include_pad=False)
  np.testing.assert_allclose(got[1], want, rtol=1e-6)


def test_pool_with_any_function():
  x = array(2, 7, 3)
  args = (x, 1.0, lax.mul, (2,), None, "VALID")
  assert_same(nnx.pool(*args), flax_nnx.pool(*args))


def first_extremes(x, dy, find, window, strides, pads):
  """Values and gradients, window by window, in float64."""
  x, dy = (np.asarray(a, np.float64) for a in (x, dy))
  y, dx = np.zeros(dy.shape), np.zeros(x.shape)
  for at in np.ndindex(*dy.shape[1:-1]):
    starts = [i * s - low for i, s, (low, _) in zip(at, strides, pads)]
    part = (slice(None),) + tuple(
      slice(max(start, 0), start + size) for start, size in zip(starts, window)
    )
    seen = x[part]
    flat = seen.reshape(len(x), -1, x.shape[-1])
    index = getattr(np, "arg" + find)(flat, 1)  # the first of equal ones
    y[(slice(None), *at)] = getattr(flat, find)(1)
    for b, c in np.ndindex(*index.shape):
      inside = np.unravel_index(index[b, c], seen.shape[1:-1])
      place = tuple(i + max(s, 0) for i, s in zip(inside, starts))
      dx[(b, *place, c)] += dy[(b, *at, c)]
  return y, dx


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("find", ["max", "min"])
def test_of_equal_elements_the_first_has_the_gradient(find, dtype):
  rng = np.random.default_rng(0)
  x = rng.integers(-1, 2, (2, 7, 8, 3)).astype(np.float32)
  x[0, :3] = -np.inf if find == "max" else np.inf  # as padding is
  options = ((3, 2), (2, 1), ((1, 1), (1, 0)))
  pool = getattr(nnx, find + "_pool")
  y, vjp = jax.vjp(lambda x: pool(x, *options), jnp.asarray(x, dtype))
  dy = jnp.asarray(rng.integers(-4, 5, y.shape), dtype)
  (dx,) = jax.jit(vjp)(dy)
  want = first_extremes(x, dy, find, *options)
  np.testing.assert_array_equal(y.astype(np.float32), want[0])
  np.testing.assert_array_equal(dx.astype(np.float32), want[1])
  assert y.dtype == dx.dtype == dtype


def test_extremes_keep_nan_and_go_through_transforms():
  x = array(2, 7, 8, 3)
  pool = lambda x: nnx.max_pool(x, (3, 3), (2, 2), "SAME")  # noqa: E731
  y, tangent = comparison.jit(lambda x: jax.jvp(pool, (x,), (x,)))(x)
  np.testing.assert_array_equal(tangent, y)
  np.testing.assert_array_equal(comparison.jit(jax.vmap(pool))(x[None])[0], y)
  grad = jax.grad(lambda x: jnp.sum(pool(x) ** 2))
  first, second = comparison.jit(lambda x: jax.jvp(grad, (x,), (x,)))(x)
  np.testing.assert_allclose(second, first, rtol=1e-6)
  lost = pool(x.at[0, 2, 2, 1].set(jnp.nan))
  assert (
    np.isnan(lost).sum()
    == np.isnan(
      flax_nnx.max_pool(x.at[0, 2, 2, 1].set(jnp.nan), (3, 3), (2, 2), "SAME")
    ).sum()
    > 0
  )


def test_windows_that_do_not_fit_make_nothing():
  x = array(2, 3, 1)
  assert nnx.max_pool(x, (5,)).shape == flax_nnx.max_pool(x, (5,)).shape
  assert nnx.max_pool(x.astype(int), (1,)).dtype == x.astype(int).dtype


@pytest.mark.parametrize("pool", [nnx.max_pool, nnx.min_pool, nnx.avg_pool])
def test_a_window_without_axes_changes_nothing(pool):
  x = array(2, 7, 3)
  np.testing.assert_array_equal(pool(x, ()), x)


def test_refusals():
  x = array(2, 7, 3)
  with pytest.raises(ValueError, match="`inputs` must have an axis for each"):
    nnx.max_pool(x, (2, 2, 2))
  with pytest.raises(ValueError, match="`strides` must have one number for e"):
    nnx.max_pool(x, (2,), (1, 1))
  with pytest.raises(ValueError, match="`padding` must be a string or one pa"):
    nnx.max_pool(x, (2,), padding=((1, 1), (1, 1)))
