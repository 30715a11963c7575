"""Positions, blocks and layers that int32 cannot hold."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import kv_cache
from kernels.cache import checks
from tests.kernels.kv_cache import cases, oracle

IMPLEMENTATIONS = ("xla", "cpu")
WIDE = 2**32 + 3  # cut to 32 bits, it is 3


class KnownTest(parameterized.TestCase):
  @parameterized.product(
    name=("index", "lengths", "layer", "block_table", "cache_batch_index"),
    wide=(
      WIDE, -WIDE, 2**31, 2**70, np.int64(WIDE), np.uint64(WIDE),
      np.uint32(2**31),
    ),
  )  # fmt: skip
  def test_raise(self, name, wide):
    k, v, new_k, new_v = cases.arguments()
    options = {}
    if name == "layer":
      k, v = k[None], v[None]
    if name in ("block_table", "cache_batch_index"):
      value = np.full((3, 1) if name == "block_table" else 3, wide)
    else:
      value = wide
    index = value if name == "index" else 0
    if name != "index":
      options[name] = value
    message = rf"`{name}` must lie in \[-2\^31, 2\^31\), but got {wide}"
    with pytest.raises(ValueError, match=message):
      kv_cache.update(k, v, new_k, new_v, index, **options)

  def test_lists_and_arrays_raise_with_the_number_that_does_not_fit(self):
    args = cases.arguments()
    for wide in ([0, WIDE, 1], np.array([0, WIDE, 1])):
      with pytest.raises(ValueError, match=f"but got {WIDE}"):
        kv_cache.update(*args, wide)
    with jax.enable_x64(True), pytest.raises(ValueError, match=f"got {WIDE}"):
      kv_cache.update(*args, jnp.asarray(WIDE))

  @parameterized.parameters(np.int64, np.uint64, np.uint32, np.uint8, int)
  def test_any_integer_that_fits_is_taken(self, kind):
    args = cases.arguments()
    cases.assert_same(
      kv_cache.update(*args, kind(3)), oracle.update(*args, np.full(3, 3))
    )

  @parameterized.parameters(True, 1.0, np.float32(2), None, "3")
  def test_what_is_no_integer_is_refused(self, value):
    with pytest.raises(TypeError, match="`index` must"):
      kv_cache.update(*cases.arguments(), value)


class TracedTest(parameterized.TestCase):
  @parameterized.product(
    implementation=IMPLEMENTATIONS,
    name=("index", "layer", "block_table"),
    wide=(WIDE, -WIDE, 2**31, 2**62),
    ring=(False, True),
  )
  def test_write_nothing(self, implementation, name, wide, ring):
    k, v, new_k, new_v = cases.arguments()
    options = {"ring": ring, "implementation": implementation}
    values = {"index": np.zeros((), np.int64)}
    if name == "layer":
      k, v = k[None], v[None]
    if name == "block_table":
      values[name] = np.arange(3)[:, None]
    values[name] = np.full_like(values.get(name, np.int64(0)), wide)
    with jax.enable_x64(True):
      call = jax.jit(
        lambda *args, **kwargs: kv_cache.update(*args, **kwargs, **options)
      )
      got = call(k, v, new_k, new_v, **values)
    cases.assert_same(got, (k, v))

  @parameterized.product(dtype=("uint32", "uint64", "int64"))
  def test_no_width_wraps(self, dtype):
    with jax.enable_x64(True):
      wide = jnp.asarray(np.iinfo(dtype).max, dtype)
      got = jax.jit(lambda x: checks.integers("x", x, 1))(wide)
    self.assertEqual(got.tolist(), [2**31 - 1])
    self.assertEqual(got.dtype, jnp.int32)

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_lengths_beyond_are_all_tokens(self, implementation):
    args = cases.arguments(t=3)
    with jax.enable_x64(True):
      call = jax.jit(
        lambda count, *args: kv_cache.update(
          *args, 1, lengths=count, implementation=implementation
        )
      )
      got = call(jnp.asarray(2**32), *args)
    cases.assert_same(got, oracle.update(*args, np.full(3, 1)))


class RingTest(parameterized.TestCase):
  @parameterized.product(
    implementation=IMPLEMENTATIONS,
    index=(2**31 - 1, 2**31 - 2, 2**31 - 9),
    tokens=(1, 5, 11),
    known=(False, True),
  )
  def test_tokens_beyond_int32_go_to_their_slots(
    self, implementation, index, tokens, known
  ):
    args = cases.arguments(t=tokens)
    call = functools.partial(
      kv_cache.update, ring=True, implementation=implementation
    )
    got = (call if known else jax.jit(call))(*args, np.int32(index))
    want = oracle.update(*args, np.full(3, index, np.int64), ring=True)
    cases.assert_same(got, want)
