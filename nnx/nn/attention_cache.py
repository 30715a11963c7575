"""The cache of an attention layer, which decoding appends to."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from nnx.module import Module
from nnx.nn import decoding, dtypes
from nnx.variablelib import Cache


class CachedAttention(Module):
  """Base of attention layers that keep keys and values for later calls.

  Attributes:
    num_kv_heads: The number of key and value heads.
    head_dim: h, the features of a head.
    cached_key: `[*batch, max_length, kv heads, h]`, or None before
      `init_cache`.
    cached_value: The same.
    cache_index: `[]` or `[*batch]` int32, the number of tokens in the cache.
    cached_key_scale: `[*batch, kv heads]` float32, the factors of what an int8
      or float8 cache stores; None for other caches.
    cached_value_scale: The same.
  """

  num_kv_heads: int
  head_dim: int
  cached_key: Cache | None
  cached_value: Cache | None
  cache_index: Cache | None
  cached_key_scale: Cache | None
  cached_value_scale: Cache | None

  def init_cache(
    self,
    input_shape: Sequence[int],
    dtype: dtypes.Dtype = jnp.float32,
    *,
    per_sequence: bool = False,
  ) -> None:
    """Makes an empty cache, which decoding needs.

    Example:

      >>> import jax.numpy as jnp
      >>> import nnx
      >>> layer = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
      >>> layer.init_cache((5, 16, 4))
      >>> y = layer(jnp.ones((5, 3, 4)))
      >>> y = layer(jnp.ones((5, 1, 4)))
      >>> layer.cached_key.shape, int(layer.cache_index.value)
      ((5, 16, 2, 2), 4)

      Prompts of different lengths, in a cache of a quarter of the size:

      >>> layer.init_cache((2, 16, 4), jnp.int8, per_sequence=True)
      >>> y = layer(jnp.ones((2, 3, 4)), lengths=jnp.array([3, 1]))
      >>> layer.cached_key.dtype, layer.cache_index.value.tolist()
      (dtype('int8'), [3, 1])

    Args:
      input_shape: `(*batch, max_length, features)` of the inputs of a whole
        sequence; the last is not used.
      dtype: Dtype of the cache: float32, bfloat16 or float16; or int8,
        float8_e4m3fn or float8_e5m2, with a scale for each sequence and head
        that the first tokens decide.
      per_sequence: Whether each sequence has its own position, `cache_index`
        `[*batch]`: for prompts of different `lengths`, or to restart one by
        setting its index (and its scales) to 0.
    """
    *batch, length, _ = input_shape
    heads = self.num_kv_heads
    shape = (*batch, length, heads, self.head_dim)
    index_shape = tuple(batch) if per_sequence else ()
    self.cached_key = Cache(jnp.zeros(shape, dtype))
    self.cached_value = Cache(jnp.zeros(shape, dtype))
    self.cache_index = Cache(jnp.zeros(index_shape, jnp.int32))
    self.cached_key_scale = None
    self.cached_value_scale = None
    if decoding.is_quantized(dtype):
      self.cached_key_scale = Cache(jnp.zeros((*batch, heads), jnp.float32))
      self.cached_value_scale = Cache(jnp.zeros((*batch, heads), jnp.float32))

  def _buffers(self) -> decoding.Buffers:
    """Returns the arrays of the cache."""
    if (
      self.cached_key is None
      or self.cached_value is None
      or self.cache_index is None
    ):
      raise ValueError(
        "`MultiHeadAttention` must have a cache to decode, but has none. Call"
        " `init_cache((*batch, max_length, in_features))` first."
      )
    scales = ()
    if self.cached_key_scale is not None:
      scales = self.cached_key_scale.value, self.cached_value_scale.value
    return decoding.Buffers(
      self.cache_index.value,
      self.cached_key.value,
      self.cached_value.value,
      *scales,
    )

  def _keep(self, buffers: decoding.Buffers) -> None:
    """Writes what a step made of the cache."""
    self.cache_index.value = buffers.index
    self.cached_key.value = buffers.key
    self.cached_value.value = buffers.value
    if buffers.key_scale is not None:
      self.cached_key_scale.value = buffers.key_scale
      self.cached_value_scale.value = buffers.value_scale
