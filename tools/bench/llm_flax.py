"""The decoder of suite `llm` in plain `flax.nnx`, as one would write it.

Attributes have the names that checkpoints give to their tensors.
"""

from typing import Any

from flax import nnx
import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from examples.llm import config as config_lib
from examples.llm import model as model_lib


class _Attention(nnx.Module):
  def __init__(self, config, dtype, shape, rngs):
    queries = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    self.head_dim = config.head_dim
    self.q_proj = _linear(config.features, queries, dtype, rngs)
    self.k_proj = _linear(config.features, keys, dtype, rngs)
    self.v_proj = _linear(config.features, keys, dtype, rngs)
    self.o_proj = _linear(queries, config.features, dtype, rngs)
    self.keys = nnx.Cache(jnp.zeros(shape, dtype))
    self.values = nnx.Cache(jnp.zeros(shape, dtype))

  def __call__(self, x, table, mask, index):
    def heads(y):
      return y.reshape(*y.shape[:2], -1, self.head_dim)

    q = _rotate(heads(self.q_proj(x)), table)
    k = _rotate(heads(self.k_proj(x)), table)
    v = heads(self.v_proj(x))
    start = (0, index, 0, 0)
    self.keys[...] = lax.dynamic_update_slice(self.keys[...], k, start)
    self.values[...] = lax.dynamic_update_slice(self.values[...], v, start)
    y = jax.nn.dot_product_attention(
      q, self.keys[...], self.values[...], mask=mask
    )
    return self.o_proj(y.reshape(*x.shape[:2], -1))


class _MLP(nnx.Module):
  def __init__(self, config, dtype, rngs):
    self.gate_proj = _linear(config.features, config.hidden, dtype, rngs)
    self.up_proj = _linear(config.features, config.hidden, dtype, rngs)
    self.down_proj = _linear(config.hidden, config.features, dtype, rngs)

  def __call__(self, x):
    return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nnx.Module):
  def __init__(self, config, dtype, shape, rngs):
    self.input_layernorm = _norm(config, dtype, rngs)
    self.self_attn = _Attention(config, dtype, shape, rngs)
    self.post_attention_layernorm = _norm(config, dtype, rngs)
    self.mlp = _MLP(config, dtype, rngs)

  def __call__(self, x, *attention):
    x = x + self.self_attn(self.input_layernorm(x), *attention)
    return x + self.mlp(self.post_attention_layernorm(x))


class Model(nnx.Module):
  """Predicts each token from those before it, which its caches have.

  Args:
    config: its sizes; of a Llama with tied embeddings.
    dtype: of weights, caches and what is computed.
    shape: of a layer's keys, `[texts, length, kv_heads, head_dim]`.
  """

  def __init__(
    self, config: config_lib.Config, dtype: str, shape: tuple[int, ...]
  ):
    rngs = nnx.Rngs(0)
    self.table = nnx.Variable(jnp.asarray(config.rope.table(shape[1])))
    self.embed_tokens = nnx.Embed(
      config.vocabulary,
      config.features,
      dtype=dtype,
      param_dtype=dtype,
      rngs=rngs,
    )
    self.layers = nnx.List(
      [_Layer(config, dtype, shape, rngs) for _ in range(config.layers)]
    )
    self.norm = _norm(config, dtype, rngs)

  def __call__(self, tokens: jax.Array, index: jax.Array) -> jax.Array:
    """Appends tokens to the texts.

    Args:
      tokens: `[texts, t]`.
      index: `[]`, how many tokens the caches have.

    Returns:
      Logits after the last token, `[texts, vocabulary]`, float32.
    """
    count = tokens.shape[1]
    length = self.table.shape[1]
    positions = index + jnp.arange(count)
    mask = (jnp.arange(length) <= positions[:, None])[None, None]
    table = self.table[...][:, positions]
    x = self.embed_tokens(tokens)
    for layer in self.layers:
      x = layer(x, table, mask, index)
    x = self.norm(x)[:, -1]
    return self.embed_tokens.attend(x).astype(jnp.float32)


def step(model: Model, tokens: jax.Array, index: jax.Array) -> jax.Array:
  """Calls a model; to be compiled."""
  return model(tokens, index)


def write(
  model: Model, tokens: jax.Array, index: jax.Array, *, count: int
) -> jax.Array:
  """Writes the likeliest tokens; to be compiled.

  Args:
    model: that writes.
    tokens: `[texts, 1]`, the last ones.
    index: as of a model.
    count: how many to write.

  Returns:
    `[texts, count]`.
  """

  def one(i, carry):
    model, last, text = carry
    last = model(last, index + i).argmax(-1, keepdims=True).astype(last.dtype)
    return model, last, lax.dynamic_update_slice(text, last, (0, i))

  text = jnp.zeros((len(tokens), count), tokens.dtype)
  return nnx.fori_loop(0, count, one, (model, tokens, text))[2]


def fill(
  model: Model, arrays: dict[str, np.ndarray], cache: model_lib.KVCache
) -> None:
  """Puts weights, keys and values into a model.

  Args:
    model: to fill.
    arrays: weights by their names in a checkpoint.
    cache: keys and values.
  """
  flat = []
  for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
    array = arrays[".".join(map(str, (*path[:-1], "weight")))]
    if path[-1] == "kernel":
      array = array.T
    flat.append((path, leaf.replace(jnp.array(array, leaf.dtype))))
  nnx.update(model, nnx.from_flat_state(flat))
  for layer, keys, values in zip(
    model.layers, cache.keys, cache.values, strict=True
  ):
    own = layer.self_attn
    own.keys[...] = jnp.array(keys[...], own.keys.dtype)
    own.values[...] = jnp.array(values[...], own.values.dtype)


def _linear(inputs: int, outputs: int, dtype: Any, rngs: Any) -> nnx.Linear:
  return nnx.Linear(
    inputs, outputs, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs
  )


def _norm(config: config_lib.Config, dtype: Any, rngs: Any) -> nnx.RMSNorm:
  return nnx.RMSNorm(
    config.features, epsilon=config.epsilon, dtype=dtype, rngs=rngs
  )


def _rotate(x, table):
  cos, sin = table[:, None, :, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, -1)
  turned = first * cos - second * sin, second * cos + first * sin
  return jnp.concatenate(turned, -1).astype(x.dtype)
