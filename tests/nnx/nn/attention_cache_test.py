"""Caches of attention layers: in blocks, rewound, stacked, of any dtype."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.nn import attention_formula as formula
from tests.nnx.nn.comparison import array
from tests.testing import hlo


@pytest.mark.parametrize("name", ["head_dim", "everything"])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_cache_of_blocks(name, dtype):
  options = formula.OPTIONS[name]
  layer = formula.make(**options)
  x = array(2, formula.LENGTH, formula.FEATURES)
  want = formula.in_full(layer, options, x)
  for precision in (None, "highest"):
    for prepare in (False, True):
      layer.precision = precision
      nnx.init_cache(layer, 2, 8, jnp.dtype(dtype), block_size=2)
      assert layer.cached_key.shape[:2] == (8, 2)
      got = formula.run(
        layer,
        lambda layer, x, table, prepare=prepare: formula.in_steps(
          layer, x, prepare=prepare, block_table=table
        ),
        x,
        formula.TABLE,
      )
      formula.close(got, want, 5e-6 if dtype == "float32" else 5e-2)
      assert layer.cache_index.value.tolist() == [
        formula.LENGTH,
        formula.LENGTH,
      ]
      if dtype == "int8":
        assert layer.cached_key_scale.shape == (formula.KV_HEADS,)


def test_sequences_of_a_pool_come_and_go():
  """As a server has them: the caller counts, and the batch changes."""
  options = formula.OPTIONS["everything"]
  layer = formula.make(**options)
  nnx.init_cache(layer, 1, 8, block_size=2, blocks=9)
  x = array(3, formula.LENGTH, formula.FEATURES)
  want = formula.in_full(layer, options, x)

  def call(tokens, index, table, lengths=None):
    step = layer.prepare_step(
      tokens, index=index, block_table=table, lengths=lengths
    )
    return layer(tokens, step=step)

  call(x[2:, :5], 0, jnp.array([[8, 5, 3, 0]]))
  formula.close(call(x[:1, :3], 0, jnp.array([[1, 4, 7, 0]])), want[:1, :3])
  # The third goes on; its first block is also that of the second.
  tables = jnp.array([[1, 4, 7, 0], [8, 5, 3, 2]])
  two = jnp.stack([x[0, 3:5], x[2, 5:7]])
  got = call(two, jnp.array([3, 5]), tables, jnp.array([1, 2]))
  formula.close(got[0, :1], want[0, 3:4])
  formula.close(got[1], want[2, 5:7])
  assert layer.cache_index.value.tolist() == [0]
  again = call(x[2:, 2:4], 2, jnp.array([[8, 6, 6, 6]]))
  formula.close(again, want[2:, 2:4])


def test_float64_blocks_need_no_kernels():
  with jax.enable_x64(True):
    layer = formula.make(
      dtype=jnp.float64, param_dtype=jnp.float64, rope_base=100.0
    )
    x = jnp.asarray(
      np.random.default_rng(0).normal(size=(2, 7, formula.FEATURES))
    )
    nnx.init_cache(layer, 2, 8, block_size=2)
    assert layer.cached_key.dtype == jnp.float64
    want = layer(x, decode=False)
    got = formula.in_steps(layer, x, block_table=formula.TABLE)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_step_with_blocks_is_one_kernel_call(dtype):
  layer = formula.make(**formula.OPTIONS["everything"])
  nnx.init_cache(layer, 2, 8, jnp.dtype(dtype), block_size=2)
  graphdef, state = nnx.split(layer)

  def step(state, x):
    model = nnx.merge(graphdef, state)
    return model(x, block_table=formula.TABLE), nnx.state(model)

  text = jax.jit(step).lower(state, array(2, 1, formula.FEATURES)).as_text()
  assert hlo.custom_calls(text, "fused_nnx_decode_attention_append_1") == 1
  assert text.count("custom_call") == 1
  assert "exponential" not in text and "tanh" not in text


@pytest.mark.parametrize(
  ("options", "dtype"),
  [
    ({}, jnp.float32),
    ({"dtype": jnp.bfloat16}, jnp.bfloat16),
    ({"param_dtype": jnp.bfloat16}, jnp.bfloat16),
    ({"dtype": jnp.float16, "param_dtype": jnp.bfloat16}, jnp.float16),
    ({"param_dtype": jnp.float8_e4m3fn}, jnp.float32),
  ],
)
def test_a_cache_has_the_dtype_of_the_layer(options, dtype):
  layer = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0), **options)
  layer.init_cache((2, 3, 4))
  assert layer.cached_key.dtype == layer.cached_value.dtype == dtype
  layer.init_cache((2, 3, 4), jnp.float32)
  assert layer.cached_key.dtype == jnp.float32
  view = nnx.view(
    nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0), **options),
    decode=True,
    batch_size=2,
    max_length=3,
  )
  assert view.cached_key.dtype == dtype


@pytest.mark.parametrize("dtype", [None, jnp.int8])
def test_rewinding_takes_tokens_back(dtype):
  model = formula.Stack(2, rope_base=100.0)
  nnx.init_cache(model, 2, formula.LENGTH, dtype, per_sequence=True)
  x, other = (
    array(2, formula.LENGTH, formula.FEATURES),
    array(2, formula.LENGTH, formula.FEATURES, seed=1),
  )
  want = model(x)
  nnx.rewind_cache(model, jnp.array([0, 2]))
  layer = model.layers[0]
  assert layer.cache_index.value.tolist() == [0, 2]
  if dtype is not None:
    assert not layer.cached_key_scale.value[0].any()
    assert layer.cached_key_scale.value[1].all()
  nnx.rewind_cache(model)
  model(other)
  nnx.rewind_cache(model)
  assert layer.cache_index.value.tolist() == [0, 0]
  again = [model(x[:, :5])]
  model(other[:, :2])
  formula.run(model, lambda model: nnx.rewind_cache(model, jnp.int32(5)))
  again.append(model(x[:, 5:]))
  again = jnp.concatenate(again, 1)
  formula.close(again, np.asarray(want), 1e-5 if dtype is None else 1e-1)


def test_caches_of_stacked_layers():
  @nnx.vmap
  def layers(rngs):
    return nnx.MultiHeadAttention(
      2, 4, rope_base=100.0, decode=True, is_causal=True, rngs=rngs
    )

  @nnx.vmap(in_axes=0)
  def with_cache(layer):
    nnx.init_cache(layer, 2, 5)

  stack = layers(nnx.Rngs(0).fork(split=3))
  with_cache(stack)
  assert stack.cached_key.shape == (3, 2, 5, 2, 2)

  def call(stack, x):
    step = nnx.merge(*nnx.split(stack))
    del step
    return nnx.scan(
      lambda layer, x: x + layer(x),
      in_axes=(0, nnx.Carry),
      out_axes=nnx.Carry,
    )(stack, x)

  x = array(2, 3, 4)
  assert call(stack, x).shape == x.shape
  assert stack.cache_index.value.tolist() == [3, 3, 3]
