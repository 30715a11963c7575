"""Layers with packed kernels, against kernels unpacked by hand in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx import kernels
from tests.nnx.nn.comparison import array


def unpacked(layer):
  """`[rows, columns]` in float64, by what the documentation says of bits."""
  values = np.asarray(layer.values[...])
  scale = np.asarray(layer.scale[...], np.float64)
  if values.dtype == np.uint32:
    values = np.stack([(values >> (4 * i)) & 15 for i in range(8)], 1)
    values = values.reshape(-1, values.shape[-1])
  group = values.shape[0] // scale.shape[0]
  kernel = values * np.repeat(scale, group, 0)
  if layer.minimum is not None:
    minimum = np.asarray(layer.minimum[...], np.float64)
    kernel = kernel + np.repeat(minimum, group, 0)
  return kernel


def expected(layer, x):
  kernel = unpacked(layer)
  x = np.asarray(x, np.float64).reshape(-1, kernel.shape[0])
  y = x @ kernel
  if layer.bias is not None:
    y = y + np.asarray(layer.bias[...], np.float64).reshape(-1)
  return y


LAYERS = {
  "Linear": (lambda **k: nnx.Linear(64, 24, **k), (3, 64)),
  "no bias": (lambda **k: nnx.Linear(64, 24, use_bias=False, **k), (64,)),
  "many rows": (lambda **k: nnx.Linear(64, 24, **k), (40, 64)),
  "LinearGeneral": (
    lambda **k: nnx.LinearGeneral((4, 16), (3, 8), axis=(-2, -1), **k),
    (2, 3, 4, 16),
  ),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, None), (4, 32)])
def test_multiplies_with_what_is_packed(name, bits, group):
  make, shape = LAYERS[name]
  plain = make(rngs=nnx.Rngs(0))
  layer = nnx.quantize(plain, bits=bits, group=group)
  x = array(*shape)
  for y in (layer(x), jax.jit(lambda x: layer(x))(x)):
    assert y.shape == plain(x).shape and y.dtype == plain(x).dtype
    # Activations may be packed on the way, each group of them.
    want = expected(layer, x)
    error = np.abs(np.asarray(y, np.float64).reshape(want.shape) - want)
    assert error.max() < 0.02 * np.abs(want).max()
  assert layer.bias is plain.bias
  flat = np.asarray(plain.kernel.value).reshape(64, 24)
  np.testing.assert_allclose(
    unpacked(layer), flat, atol=0.2 if bits == 4 else 0.01
  )
  assert layer.dequantize().shape == plain.kernel.shape


@pytest.mark.parametrize(
  ("options", "x", "dtype"),
  [
    ({"dtype": jnp.bfloat16}, jnp.float32, jnp.bfloat16),
    ({"param_dtype": jnp.bfloat16}, jnp.bfloat16, jnp.bfloat16),
    ({"param_dtype": jnp.bfloat16}, jnp.float32, jnp.float32),
    ({}, jnp.bfloat16, jnp.float32),
  ],
)
def test_results_have_the_dtype_that_they_had(options, x, dtype):
  plain = nnx.Linear(64, 24, rngs=nnx.Rngs(0), **options)
  x = array(3, 64, dtype=x)
  assert nnx.quantize(plain)(x).dtype == plain(x).dtype == dtype


class Model(nnx.Module):
  def __init__(self, rngs):
    self.attend = nnx.MultiHeadAttention(
      4, 64, rope_base=1e4, is_causal=True, decode=True, rngs=rngs
    )
    self.layers = nnx.List([nnx.Linear(64, 64, rngs=rngs)])
    self.same = self.layers[0]
    self.norm = nnx.RMSNorm(64, rngs=rngs)

  def __call__(self, x):
    return self.same(self.norm(x + self.attend(x)))


def test_a_model_keeps_its_structure():
  model = Model(nnx.Rngs(0))
  small = nnx.quantize(model)
  assert type(model.same) is nnx.Linear and small.norm.scale is model.norm.scale
  assert small.same is small.layers[0]
  assert type(small.attend.query) is type(small.attend.out) is type(small.same)
  nnx.init_cache(small, 2, 8)
  nnx.init_cache(model, 2, 8)
  x = array(2, 3, 64)
  for part in (x[:, :2], x[:, 2:]):
    got = nnx.jit(lambda model, x: model(x))(small, part)
    want = model(part)
    assert jnp.abs(got - want).max() < 0.03 * jnp.abs(want).max()


def test_filters_select_layers():
  model = Model(nnx.Rngs(0))
  for select in (
    nnx.PathContains("attend"),
    nnx.LinearGeneral,
    lambda path, layer: "attend" in path,
  ):
    small = nnx.quantize(model, select, bits=4)
    assert type(small.attend.query) is nnx.QuantizedLinear
    assert type(small.same) is nnx.Linear


def test_half_of_the_bytes():
  model = nnx.Linear(256, 256, use_bias=False, rngs=nnx.Rngs(0))

  def size(model):
    return sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))

  assert size(nnx.quantize(model)) < size(model) * 0.27
  assert size(nnx.quantize(model, bits=4)) < size(model) * 0.15


def test_states_and_shapes():
  make = lambda: nnx.quantize(Model(nnx.Rngs(0)), bits=4)  # noqa: E731
  model, empty = make(), nnx.eval_shape(make)
  nnx.update(empty, nnx.state(model))
  for a, b in zip(
    jax.tree.leaves(nnx.state(empty)), jax.tree.leaves(nnx.state(model))
  ):
    np.testing.assert_array_equal(a, b)
  assert "QuantizedLinear" in repr(model) and "uint32" in repr(model)
  rows = []
  nnx.tabulate(
    model.same,
    array(1, 64),
    row_filter=lambda row: not rows.append(row),
    compute_flops=True,
  )
  assert rows[0].flops >= 2 * 64 * 64


def test_low_rank_adaptation_trains_on_top():
  base = nnx.quantize(nnx.Linear(64, 64, rngs=nnx.Rngs(0)))
  layer = nnx.LoRA(64, 4, 64, base_module=base, rngs=nnx.Rngs(1))
  layer.lora_b.value = array(4, 64)
  x = array(3, 64)
  select = nnx.DiffState(0, nnx.LoRAParam)
  grads = nnx.grad(lambda m, x: jnp.sum(m(x) ** 2), argnums=select)(layer, x)
  a, b = (np.asarray(p.value, np.float64) for p in (layer.lora_a, layer.lora_b))
  want = expected(base, x) + x @ a @ b
  np.testing.assert_allclose(
    grads["lora_b"].value, (x @ a).T @ (2 * want), rtol=2e-2, atol=1.0
  )
  # Of the whole layer: packed arrays are no parameters.
  assert "values" not in nnx.state(layer, nnx.Param).get("base_module", {})


def test_the_kernel_runs():
  layer = nnx.quantize(nnx.Linear(256, 256, rngs=nnx.Rngs(0)))
  (choice,) = kernels.explain(lambda x: layer(x), array(1, 256))
  assert choice.op == "matmul_packed"
  if jax.default_backend() == "cpu":
    assert choice.implementation == "cpu"


def test_layers_that_cannot_be_packed():
  rngs = nnx.Rngs(0)
  for layer, message in (
    (nnx.Linear(40, 3, rngs=rngs), "must have a multiple of 64 rows"),
    (
      nnx.LinearGeneral(64, 3, axis=0, rngs=rngs),
      "must contract the last axes to be quantised, but got `axis=",
    ),
    (
      nnx.Linear(64, 3, dot_general=lambda *a, **k: a[0], rngs=rngs),
      "with a `dot_general` or a",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      nnx.quantize(layer)
  model = nnx.Sequential(nnx.Linear(40, 3, rngs=rngs))
  with pytest.raises(ValueError, match="It is the layer at `layers/0`; let"):
    nnx.quantize(model)
  with pytest.raises(ValueError, match="`filter` must select an `nnx.Linear`"):
    nnx.quantize(model, nnx.PathContains("other"))
  with pytest.raises(ValueError, match="`bits` must be"):
    nnx.quantize(nnx.Linear(64, 3, rngs=rngs), bits=3)
  with pytest.raises(TypeError, match="must be an `nnx.Linear` or `nnx.Linear"):
    nnx.QuantizedLinear(nnx.LayerNorm(3, rngs=rngs))
  layer = nnx.quantize(nnx.Linear(64, 3, rngs=rngs))
  with pytest.raises(
    ValueError, match=r"last axes of `inputs` must be \(64,\)"
  ):
    layer(array(2, 32))
  with pytest.raises(ValueError, match="`out_sharding` must be None for a"):
    layer(array(2, 64), out_sharding=jax.sharding.PartitionSpec())


def table(key, shape, dtype):
  return jax.random.uniform(key, shape, dtype, -1, 1)


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, None), (4, 32)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tables_are_packed_where_they_are_asked_for(bits, group, dtype):
  plain = nnx.Embed(
    37, 64, param_dtype=dtype, embedding_init=table, rngs=nnx.Rngs(0)
  )
  model = nnx.List([plain, nnx.Linear(64, 64, rngs=nnx.Rngs(1))])
  assert type(nnx.quantize(model)[0]) is nnx.Embed
  layer = nnx.quantize(model, ..., bits=bits, group=group)[0]
  assert type(layer) is nnx.QuantizedEmbed
  want = unpacked(layer).T
  assert layer.dequantize("float32").shape == want.shape == (37, 64)
  rounding = 1e-6 if dtype == "float32" else 2**-8
  ids = jnp.array([[0, 36, -1], [5, -37, 5]])
  for found in (layer(ids), jax.jit(lambda ids: layer(ids))(ids)):
    assert found.dtype == plain(ids).dtype and found.shape == (2, 3, 64)
    np.testing.assert_allclose(
      np.asarray(found, np.float64), want[np.asarray(ids)], rounding
    )
  assert jnp.isnan(layer(jnp.array([37, -38]))).all()
  query = array(3, 64).astype(dtype)
  logits = layer.attend(query)
  assert logits.dtype == plain.attend(query).dtype
  expected = np.asarray(query, np.float64) @ want.T
  size = np.abs(np.asarray(query, np.float64)) @ np.abs(want.T)
  error = np.abs(np.asarray(logits, np.float64) - expected)
  assert (error <= 2 * rounding * size).all()
  error = np.abs(want - np.asarray(plain.embedding.value, np.float64))
  assert error.max() < (0.2 if bits == 4 else 0.02)


def test_a_packed_table_refuses_what_the_table_does():
  layer = nnx.QuantizedEmbed(nnx.Embed(5, 64, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="`inputs` must be integers"):
    layer(jnp.ones(2))
  with pytest.raises(ValueError, match="last axis of `query` must be 64"):
    layer.attend(jnp.ones((2, 32)))
  with pytest.raises(ValueError, match="`out_sharding` must be None"):
    layer.attend(jnp.ones((2, 64)), out_sharding=jax.sharding.PartitionSpec())
  with pytest.raises(TypeError, match="must be an `nnx.Embed`"):
    nnx.QuantizedEmbed(nnx.Linear(64, 3, rngs=nnx.Rngs(0)))
  one = nnx.QuantizedEmbed(nnx.Embed(1, 64, rngs=nnx.Rngs(0)))
  np.testing.assert_array_equal(one(jnp.array([7]))[0], one(jnp.array(0)))
