"""Subnormal numbers, on threads where XLA takes them for zero.

Of float16, which are normal numbers of float32, and of bfloat16 and float32,
which are not. Through XLA, at each SIMD level, in whole vectors and in what is
left over of them; the oracle is NumPy in float64.
"""

import contextlib
import importlib
import itertools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import batch_stat, decode_attention, kv_cache

DTYPES = ("float16", "bfloat16", "float32")
LEVELS = ("baseline", "avx2", "avx512")
# The smallest number above zero.
UNITS = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": 2.0**-149}


@contextlib.contextmanager
def simd(op, level):
  """Runs an op's kernels at a SIMD level; skips where the machine has less."""
  module = importlib.import_module(f"kernels.{op}.cpu._{op}_cpu")
  try:
    module.set_simd_level(level)
  except ValueError:
    pytest.skip(f"this machine has no {level}")
  try:
    yield
  finally:
    module.set_simd_level("auto")


def numbers(shape, dtype, seed=0):
  """Multiples of the unit, of both signs: subnormal all of them."""
  count = np.random.default_rng(seed).integers(-60, 61, shape)
  x = (count * UNITS[dtype]).astype(jnp.dtype(dtype))
  assert np.abs(x.astype(np.float64)).max() > 0
  return x


def wide(x):
  return np.asarray(x).astype(np.float64)


def assert_close(got, want, dtype, units=1.0):
  """Compares with float64, to so many units of the result's dtype."""
  np.testing.assert_allclose(
    wide(got), wide(want), rtol=1e-2, atol=units * UNITS[dtype]
  )


# Channels last, in vectors, in folded rows and with a rest; and not last.
SHAPES = (((40, 32), 1), ((33, 7), 1), ((5, 19), 1), ((3, 4, 37), 1))


class BatchStatTest(parameterized.TestCase):
  @parameterized.parameters(*itertools.product(SHAPES, DTYPES, LEVELS))
  def test_sums(self, shape_and_axis, dtype, level):
    shape, axis = shape_and_axis
    x = numbers(shape, dtype)
    axes = tuple(i for i in range(len(shape)) if i != axis)
    old = np.full(shape[axis], 4 * UNITS[dtype], np.float32)
    with simd("batch_stat", level):
      out = jax.jit(
        lambda x, old: batch_stat.update(
          x, old, old, 0.5, feature_axis=axis, implementation="cpu"
        )
      )(x, old)
    want = wide(x).mean(axes)
    np.testing.assert_allclose(
      wide(out.batch_mean), want, rtol=1e-4, atol=0.01 * UNITS[dtype] + 2**-149
    )
    assert_close(out.mean, 0.5 * wide(old) + 0.5 * want, dtype)

  @parameterized.parameters(*itertools.product(SHAPES, DTYPES, LEVELS))
  def test_results(self, shape_and_axis, dtype, level):
    shape, axis = shape_and_axis
    x = numbers(shape, dtype)
    ones = np.ones(shape[axis], np.float32)
    with simd("batch_stat", level):
      out = jax.jit(
        lambda x: batch_stat.batch_norm(
          x,
          ones,
          0 * ones,
          0 * ones,
          3 * ones,
          epsilon=1.0,
          feature_axis=axis,
          use_running_average=True,
          implementation="cpu",
        )  # fmt: skip
      )(x)
    assert_close(out.y, wide(x) / 2, dtype, units=0.5)

  @parameterized.parameters(*itertools.product(SHAPES, DTYPES, LEVELS))
  def test_gradients(self, shape_and_axis, dtype, level):
    shape, axis = shape_and_axis
    x, dy = np.ones(shape, jnp.dtype(dtype)), numbers(shape, dtype)
    ones = np.ones(shape[axis], np.float32)
    axes = tuple(i for i in range(len(shape)) if i != axis)

    def y(x, bias):
      return batch_stat.batch_norm(
        x, ones, bias, 0 * ones, 3 * ones, epsilon=1.0, feature_axis=axis,
        use_running_average=True, implementation="cpu",
      ).y  # fmt: skip

    with simd("batch_stat", level):
      dx, dbias = jax.jit(lambda x, dy: jax.vjp(y, x, 0 * ones)[1](dy))(x, dy)
    assert_close(dx, wide(dy) / 2, dtype, units=0.5)
    np.testing.assert_allclose(
      wide(dbias), wide(dy).sum(axes), rtol=1e-5, atol=2.0**-149
    )


class KvCacheTest(parameterized.TestCase):
  @parameterized.parameters(*itertools.product(DTYPES, LEVELS, (32, 7, 21)))
  def test_rows_are_quantised(self, dtype, level, h):
    new = numbers((2, 1, 3, h), dtype)
    cache = np.zeros((2, 4, 3, h), np.int8)
    scale = np.float32(2 * UNITS[dtype])
    with simd("kv_cache", level):
      k, _ = jax.jit(
        lambda *args: kv_cache.update(
          *args, 1, k_scale=scale, v_scale=scale, implementation="cpu"
        )
      )(cache, cache, new, new)
    want = np.round(wide(new) / wide(scale))
    np.testing.assert_array_equal(np.asarray(k)[:, 1:2], want)


class DecodeAttentionTest(parameterized.TestCase):
  @parameterized.parameters(*itertools.product(DTYPES, LEVELS, (32, 7, 21)))
  def test_values(self, dtype, level, h):
    """One key: its value comes back as it is; with two alike, their mean."""
    value = numbers((1, 2, 2, h), dtype)
    one = np.ones_like(value)
    with simd("decode_attention", level):
      attend = jax.jit(
        lambda v, n: decode_attention.attend(
          one, v, one[:, :1], n, implementation="cpu"
        )
      )
      alone, both = attend(value, 1), attend(value, 2)
    np.testing.assert_array_equal(wide(alone), wide(value[:, :1]))
    assert_close(both, wide(value).mean(1, keepdims=True), dtype, units=0.51)

  @parameterized.parameters(*itertools.product(DTYPES, LEVELS, (32, 7, 21)))
  def test_queries_and_keys(self, dtype, level, h):
    """A factor brings their products back to where they tell keys apart."""
    q = np.abs(numbers((1, 1, 1, h), dtype, seed=1))
    k = numbers((1, 5, 1, h), dtype, seed=2)
    big = 2.0**15 if dtype == "float16" else 2.0**120
    scale = 1e-3 / (UNITS[dtype] * big)
    value = np.eye(5, h, dtype=np.float32).astype(jnp.dtype(dtype))
    cases = [(q, np.sign(k) * big), (np.sign(q) * big, k)]
    if dtype == "float32":
      cases.pop()  # the queries, times the factor, would be infinite
    for queries, keys in cases:
      with simd("decode_attention", level):
        out = jax.jit(
          lambda q, k: decode_attention.attend(
            k,
            value[None, :, None],
            q,
            5,
            scale=scale,
            implementation="cpu",
            out_dtype="float32",
          )  # fmt: skip
        )(queries.astype(jnp.dtype(dtype)), keys.astype(jnp.dtype(dtype)))
      logits = wide(keys)[0, :, 0] @ wide(queries)[0, 0, 0] * scale
      weights = np.exp(logits - logits.max())
      want = weights / weights.sum()
      np.testing.assert_allclose(
        np.asarray(out)[0, 0, 0, :5], want[: min(5, h)], rtol=2e-3, atol=1e-6
      )

  @parameterized.parameters(*itertools.product(DTYPES, LEVELS))
  def test_appended_rows_are_copied(self, dtype, level):
    new = numbers((1, 1, 2, 21), dtype)
    cache, q = np.zeros((1, 4, 2, 21), new.dtype), np.ones_like(new)
    with simd("decode_attention", level):
      k, v, out = jax.jit(
        lambda *args: decode_attention.decode_attention(
          *args, 0, implementation="cpu"
        )
      )(cache, cache, q, new, new)
    for got in (np.asarray(k)[:, :1], np.asarray(v)[:, :1], np.asarray(out)):
      np.testing.assert_array_equal(wide(got), wide(new))
