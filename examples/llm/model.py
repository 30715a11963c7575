"""The decoder, as a Module.

Its attributes have the names that checkpoints of transformers give to their
tensors, so that a Param's path is its tensor's name; matrices that multiply one
input are one Param (`weights.JOINED`).

A call without a cache sees whole texts. With one, it appends to the cache and
attends to all that is there, in one kernel a layer. The cache may be a buffer
for each text, or a pool of blocks with a table that says whose they are.
"""

import functools
from typing import Any

import jax
from jax import numpy as jnp

from examples.llm import config as config_lib
from examples.llm import rotary
import nnx
from nnx import kernels


class KVCache(nnx.Module):
  """Keys and values of all layers.

  How many tokens of it are filled is for the caller to count, so that nothing
  need be done to forget some of them.

  Args:
    config: of the model.
    shape: `(texts, length)`, or `(blocks, block_size)` of a pool.
    dtype: of keys and values.

  Attributes:
    keys: for each layer a `Cache`, `[*shape, kv_heads, head_dim]`; `values`
      likewise.
  """

  def __init__(
    self, config: config_lib.Config, shape: tuple[int, int], dtype: Any
  ):
    whole = (*shape, config.kv_heads, config.head_dim)

    def buffers():
      return nnx.List(
        [nnx.Cache(jnp.zeros(whole, dtype)) for _ in range(config.layers)]
      )

    self.keys = buffers()
    self.values = buffers()


class Attention(nnx.Module):
  """Grouped-query attention, rotated, over what the cache has."""

  def __init__(self, config: config_lib.Config, layer: int, dtype: Any, rngs):
    self.layer = layer
    self.heads = config.heads, config.head_dim
    self.kv_heads = config.kv_heads, config.head_dim
    self.scale = config.scale
    self.window = config.windows[layer]
    linear = _linear(dtype, config.attention_bias, rngs)
    queries = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    # In one product: of each head of keys its queries, itself and its values.
    self.qkv_proj = linear(config.features, queries + 2 * keys)
    self.o_proj = linear(queries, config.features)
    self.q_norm = self.k_norm = None
    if config.qk_norm:
      self.q_norm = _norm(config, config.head_dim, dtype, rngs)
      self.k_norm = _norm(config, config.head_dim, dtype, rngs)

  def __call__(self, x, tables, cache, index, lengths, block_table):
    kv_heads, head_dim = self.kv_heads
    y = self.qkv_proj(x).reshape(*x.shape[:2], kv_heads, -1, head_dim)
    q, k, v = jnp.split(y, [y.shape[3] - 2, y.shape[3] - 1], axis=3)
    q = q.reshape(*x.shape[:2], *self.heads)
    k, v = k.squeeze(3), v.squeeze(3)
    if self.q_norm is not None:
      q, k = self.q_norm(q), self.k_norm(k)
    table = tables.full if self.window is None else tables.local
    if cache is None:
      # Its own factor of the logits is 1 / sqrt(head_dim).
      q = rotary.rotate(q, table[...]) * (self.scale * self.heads[1] ** 0.5)
      out = nnx.dot_product_attention(
        q.astype(v.dtype),
        rotary.rotate(k, table[...]),
        v,
        is_causal=True,
        window=self.window,
      )
    else:
      keys, values = cache.keys[self.layer], cache.values[self.layer]
      keys[...], values[...], out = kernels.decode_attention(
        keys[...],
        values[...],
        *(new.astype(keys.dtype) for new in (q, k, v)),
        index,
        lengths=lengths,
        block_table=block_table,
        scale=self.scale,
        window=self.window,
        rope_cos=table[0],
        rope_sin=table[1],
        out_dtype=x.dtype,
      )
    return self.o_proj(out.reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
  """A gated pair of linear maps, then one back."""

  def __init__(self, config: config_lib.Config, dtype: Any, rngs):
    linear = _linear(dtype, config.mlp_bias, rngs)
    self.gelu = config.gelu
    # In one product, a feature of the gate beside each of the other one's.
    self.gate_up_proj = linear(config.features, 2 * config.hidden)
    self.down_proj = linear(config.hidden, config.features)

  def __call__(self, x):
    y = self.gate_up_proj(x).reshape(*x.shape[:2], -1, 2)
    gate, up = y[..., 0], y[..., 1]
    gate = nnx.gelu(gate) if self.gelu else nnx.silu(gate)
    return self.down_proj(gate * up)


class Layer(nnx.Module):
  """Attention and MLP, each added to what goes in."""

  def __init__(self, config: config_lib.Config, layer: int, dtype: Any, rngs):
    norm = functools.partial(_norm, config, config.features, dtype, rngs)
    self.input_layernorm = norm()
    self.self_attn = Attention(config, layer, dtype, rngs)
    self.post_attention_layernorm = norm()
    self.mlp = MLP(config, dtype, rngs)
    self.post_norms = config.post_norms
    if config.post_norms:
      self.pre_feedforward_layernorm = norm()
      self.post_feedforward_layernorm = norm()

  def __call__(self, x, *attention):
    y = self.self_attn(self.input_layernorm(x), *attention)
    if self.post_norms:
      x = x + self.post_attention_layernorm(y)
      y = self.mlp(self.pre_feedforward_layernorm(x))
      return x + self.post_feedforward_layernorm(y)
    x = x + y
    return x + self.mlp(self.post_attention_layernorm(x))


class Model(nnx.Module):
  """Predicts each token from those before it.

  Args:
    config: its sizes.
    positions: the longest text that it will see.
    dtype: of weights and of what is computed; norms keep float32 scales.
    rngs: of the initial weights.
  """

  def __init__(
    self,
    config: config_lib.Config,
    positions: int,
    dtype: Any = jnp.float32,
    *,
    rngs: nnx.Rngs,
  ):
    self.config = config
    self.positions = positions
    self.dtype = jnp.dtype(dtype)
    self.tables = rotary.Tables(config.rope, config.local_rope, positions)
    self.embed_tokens = nnx.Embed(
      config.vocabulary, config.features, param_dtype=dtype, rngs=rngs
    )
    self.layers = nnx.List(
      [Layer(config, i, dtype, rngs) for i in range(config.layers)]
    )
    self.norm = _norm(config, config.features, dtype, rngs)
    self.lm_head = None
    if not config.tied:
      linear = _linear(dtype, False, rngs)
      self.lm_head = linear(config.features, config.vocabulary)

  def __call__(
    self,
    tokens: jax.Array,
    cache: KVCache | None = None,
    index: Any = 0,
    lengths: jax.Array | None = None,
    block_table: jax.Array | None = None,
  ) -> jax.Array:
    """Applies the model.

    Args:
      tokens: `[b, t]` integers.
      cache: what earlier tokens left, and where these go; without one, the
        texts are `tokens`, from their beginnings.
      index: `[]` or `[b]`, how many tokens of each text the cache has.
      lengths: `[b]`, how many of the new ones there are; all, if None.
      block_table: `[b, m]`, the blocks of each text, if the cache is a pool.

    Returns:
      Features, `[b, t, c]`, for `logits`.
    """
    x = self.embed_tokens(tokens)
    if self.config.embed_scale != 1.0:
      # Rounded like the weights, as the model was trained.
      x = x * jnp.asarray(self.config.embed_scale, x.dtype)
    # What layers add up is not rounded to 16 bits each time.
    x = x.astype(jnp.float32)
    for layer in self.layers:
      x = layer(x, self.tables, cache, index, lengths, block_table)
    return self.norm(x)

  def logits(self, x: jax.Array) -> jax.Array:
    """Returns for features `[..., c]` the logits `[..., vocabulary]`, float32.

    Args:
      x: from `__call__`.
    """
    if self.lm_head is None:
      logits = self.embed_tokens.attend(x)
    else:
      logits = self.lm_head(x)
    return logits.astype(jnp.float32)

  def make_cache(self, shape: tuple[int, int], dtype: Any = None) -> KVCache:
    """Makes an empty cache.

    Args:
      shape: `(texts, length)`, or `(blocks, block_size)` of a pool.
      dtype: that of the model, if None.
    """
    return KVCache(self.config, shape, dtype or self.dtype)


def _linear(dtype: Any, use_bias: bool, rngs: nnx.Rngs) -> Any:
  return functools.partial(
    nnx.Linear, use_bias=use_bias, param_dtype=dtype, dtype=dtype, rngs=rngs
  )


def _norm(
  config: config_lib.Config, features: int, dtype: Any, rngs: nnx.Rngs
) -> nnx.RMSNorm:
  return nnx.RMSNorm(features, epsilon=config.epsilon, dtype=dtype, rngs=rngs)
