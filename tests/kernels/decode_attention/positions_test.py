"""Positions that int32 cannot hold, or can only just."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import decode_attention as da
from tests.kernels.decode_attention import cases

IMPLEMENTATIONS = ("xla", "cpu")
WIDE = 2**32 + 3  # cut to 32 bits, it is 3


class KnownTest(parameterized.TestCase):
  @parameterized.product(
    name=("index", "lengths", "left_padding", "rope_positions"),
    wide=(WIDE, -WIDE, np.int64(WIDE), np.uint32(2**32 - 1)),
  )
  def test_raise(self, name, wide):
    args = cases.arguments()
    cos, sin = da.rope_tables(8, 20)
    options = {"rope_cos": cos, "rope_sin": sin, name: wide}
    index = options.pop("index", 0)
    with pytest.raises(ValueError, match=rf"`{name}` must lie in \[-2\^31"):
      da.decode_attention(*args, index, **options)


class TracedTest(parameterized.TestCase):
  @parameterized.product(
    implementation=IMPLEMENTATIONS,
    wide=(WIDE, -WIDE, 2**31),
    ring=(False, True),
  )
  def test_nothing_is_written_or_seen(self, implementation, wide, ring):
    args = cases.arguments()
    call = functools.partial(
      da.decode_attention, ring=ring, implementation=implementation
    )
    with jax.enable_x64(True):
      k, v, out = jax.jit(call)(*args, jnp.asarray(wide))
    np.testing.assert_array_equal(k, args[0])
    np.testing.assert_array_equal(v, args[1])
    np.testing.assert_array_equal(out, np.zeros_like(out))

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_number_of_keys(self, implementation):
    k, v, q, *_ = cases.arguments()
    call = functools.partial(da.attend, implementation=implementation)
    with jax.enable_x64(True):
      out = jax.jit(call)(k, v, q, jnp.asarray(WIDE))
    np.testing.assert_array_equal(out, np.zeros_like(out))


class RingTest(parameterized.TestCase):
  @parameterized.product(
    implementation=IMPLEMENTATIONS,
    index=(2**31 - 1, 2**31 - 2),
    tokens=(1, 4),
    chunk=(None, 7),
    rotate=(False, True),
  )
  def test_beyond_int32(self, implementation, index, tokens, chunk, rotate):
    """As at a position that is as far from turns of the ring and chunks."""
    args = cases.arguments(t=tokens, s=24)
    options = {"ring": True, "window": 9, "chunk": chunk}
    if rotate:
      cos, sin = da.rope_tables(2, 20)
      options |= {"rope_cos": cos, "rope_sin": sin}
      options["rope_positions"] = jnp.ones((3, tokens), jnp.int32)
    call = functools.partial(
      da.decode_attention, implementation=implementation, **options
    )
    period = 24 * 7
    near = period + index % period
    got = jax.jit(call)(*args, np.int32(index))
    want = jax.jit(call)(*args, np.int32(near))
    for g, w in zip(got, want):
      np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
