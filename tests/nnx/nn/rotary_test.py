"""RoPE, against its formula, the layer's own rotation and flax.nnx."""

import functools

from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import decode_attention
import nnx
from nnx.nn import rotary
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import array

needs_new_flax = pytest.mark.skipif(
  not hasattr(flax_nnx, "RoPE"), reason="this Flax does not have RoPE yet"
)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_rows_are_those_of_the_kernels(scale):
  rows = rotary.rows(jnp.arange(200), 200, 64, 1e4, scale)
  tables = decode_attention.rope_tables(200, 64, theta=1e4, scale=scale)
  for row, table in zip(rows, tables):
    np.testing.assert_array_equal(row, table)


def turned(x, positions, theta):
  """The definition, on complex numbers in float64."""
  x = np.asarray(x, np.float64)
  features = x.shape[-1]
  rates = theta ** (-np.arange(0, features, 2) / features)
  pairs = x[..., : features // 2] + 1j * x[..., features // 2 :]
  pairs = pairs * np.exp(1j * np.asarray(positions)[..., None] * rates)
  return np.concatenate([pairs.real, pairs.imag], -1)


@pytest.mark.parametrize(
  "tables", [{}, {"embedding_size": 8, "max_seq_len": 9}]
)
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 5, 8)])
def test_turns_pairs_by_their_positions(tables, shape):
  rope = nnx.RoPE(100.0, **tables)
  x = array(*shape)
  np.testing.assert_allclose(
    rope(x), turned(x, np.arange(5), 100.0), rtol=1e-6, atol=1e-6
  )
  for positions in (np.arange(5) + 40, np.array([3, 1, 4, 1, 5])):
    got = jax.jit(lambda x, at: rope(x, at))(x, positions)
    np.testing.assert_allclose(
      got, turned(x, positions, 100.0), rtol=1e-5, atol=1e-5
    )


def test_each_sequence_may_have_positions():
  x = array(2, 3, 5, 8)
  positions = np.random.default_rng(0).integers(0, 50, (2, 1, 5))
  np.testing.assert_allclose(
    nnx.RoPE()(x, positions), turned(x, positions, 1e4), rtol=1e-5, atol=1e-5
  )


def test_computes_in_float32_at_least():
  x = array(5, 8)
  for dtype in (jnp.bfloat16, jnp.float16):
    got = nnx.RoPE()(x.astype(dtype))
    assert got.dtype == jnp.float32
    want = turned(x.astype(dtype), np.arange(5), 1e4)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def attending(rope):
  attend = functools.partial(nnx.dot_product_attention_with_rope, rope=rope)
  return nnx.MultiHeadAttention(
    4, 16, num_kv_heads=2, attention_fn=attend, decode=False, rngs=nnx.Rngs(0)
  )


def test_attention_is_that_of_the_layer():
  layer = attending(nnx.RoPE(100.0))
  own = nnx.MultiHeadAttention(
    4, 16, num_kv_heads=2, rope_base=100.0, decode=False, rngs=nnx.Rngs(0)
  )
  x = array(2, 5, 16)
  want = own(x, is_causal=True)
  np.testing.assert_allclose(layer(x, is_causal=True), want, 1e-5, 1e-5)
  # Distances alone count, and each sequence may start anywhere.
  positions = jnp.array([[0], [20]]) + jnp.arange(5)
  got = nnx.jit(
    lambda layer, x, at: layer(x, is_causal=True, input_positions=at)
  )(layer, x, positions)
  np.testing.assert_allclose(got, want, 1e-5, 1e-5)
  # As two prompts in one row, each from its start on.
  packed = x.reshape(1, 10, 16)
  mask = jnp.kron(jnp.eye(2), jnp.tril(jnp.ones((5, 5)))) > 0
  got = layer(packed, mask=mask, input_positions=jnp.tile(jnp.arange(5), 2))
  np.testing.assert_allclose(got.reshape(x.shape), want, 1e-5, 1e-5)


@needs_new_flax
@pytest.mark.filterwarnings("ignore:'.value' access is now deprecated")
@pytest.mark.parametrize(
  "tables", [{}, {"embedding_size": 8, "max_seq_len": 9}]
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_as_in_flax(tables, dtype):
  ours, theirs = nnx.RoPE(100.0, **tables), flax_nnx.RoPE(100.0, **tables)
  mine, other = nnx.state(ours), flax_nnx.state(theirs)
  assert comparison.layout(mine, nnx) == comparison.layout(other, flax_nnx)
  x = array(3, 5, 8, dtype=dtype)
  for positions in (None, jnp.arange(5) * 3):
    got, want = ours(x, positions), theirs(x, positions)
    assert got.dtype == want.dtype
    np.testing.assert_allclose(got, want, 1e-5, 1e-5)


@needs_new_flax
def test_attention_as_in_flax():
  q, k, v = (array(2, 5, 4, 8, seed=seed) for seed in range(3))
  got = nnx.dot_product_attention_with_rope(
    q, k, v, rope=nnx.RoPE(), is_causal=True
  )
  want = flax_nnx.dot_product_attention_with_rope(
    q, k, v, rope=flax_nnx.RoPE(), is_causal=True
  )
  np.testing.assert_allclose(got, want, 1e-5, 1e-5)


def test_refuses_what_does_not_fit():
  with pytest.raises(
    ValueError, match="must both be given to make tables, but"
  ):
    nnx.RoPE(embedding_size=4)
  for features in (3, 0):
    with pytest.raises(ValueError, match="must be positive and even, but got"):
      nnx.RoPE(embedding_size=features, max_seq_len=4)
  with pytest.raises(ValueError, match="must be positive and even, but got 3"):
    nnx.RoPE()(array(4, 3))
  rope = nnx.RoPE(embedding_size=4, max_seq_len=6)
  for shape in ((7, 4), (5, 2)):
    with pytest.raises(
      ValueError, match="at most `max_seq_len=6` tokens of `em"
    ):
      rope(array(*shape))
  with pytest.raises(
    ValueError, match="must have one for each of the 5 tokens"
  ):
    rope(array(5, 4), jnp.arange(6))


def test_refuses_what_has_no_tokens():
  rope, x = nnx.RoPE(), array(3, 2, 4)
  with pytest.raises(ValueError, match=r"`x` must be .* got the shape \(4,\)"):
    rope(array(4))
  for wrong, name in (((x[0], x, x), "query"), ((x, x[0], x), "key")):
    with pytest.raises(ValueError, match=rf"`{name}` must be .*\(2, 4\)\."):
      nnx.dot_product_attention_with_rope(*wrong, rope=rope)
