"""The cache update in plain JAX: correct on every platform."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels.kv_cache import layout as layout_lib
from kernels.kv_cache import quantization


def update(
  cache_k: jax.Array,
  cache_v: jax.Array,
  new_k: jax.Array,
  new_v: jax.Array,
  index: jax.Array,
  count: jax.Array,
  layer: jax.Array,
  table: jax.Array,
  first_slot: jax.Array,
  *scales: jax.Array,
  layout: str,
  ring: int,
  aligned: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Writes new rows with one scatter; the primitive's operands.

  Args:
    cache_k: `[..., r, s, n, h]`, or `[..., r, n, s, h]` with layout "bnsh".
    cache_v: The same, with its own h.
    new_k: `[b, t, n, h]`, or `[b, n, t, h]` with layout "bnsh".
    new_v: The same, with its own h.
    index: `[b]` int32, position of token 0.
    count: `[b]` int32, tokens that are not padding.
    layer: `[b]` int32.
    table: `[b, m]` int32.
    first_slot: `[]` int32, slot at which this part of the cache begins.
    *scales: Both `[b, n]` float32, for quantised caches.
    layout: "bsnh" or "bnsh".
    ring: Length of the ring, or 0.
    aligned: Not used here.

  Returns:
    The updated caches.
  """
  del aligned
  geometry = layout_lib.Geometry.of(cache_k, cache_v, layout)
  if layout == "bnsh":
    new_k, new_v = new_k.swapaxes(1, 2), new_v.swapaxes(1, 2)
  tokens = new_k.shape[1]
  position, write = layout_lib.written(index, count, tokens, ring)
  block, slot, held = layout_lib.locate(
    geometry, position, layer, table, first_slot, ring
  )
  # Out of bounds on purpose: the scatter drops what must not be written. Each
  # its own row, because a scatter with repeated indices cannot be transposed.
  nowhere = jnp.arange(position.shape[0] * tokens, dtype=jnp.int32)
  block = jnp.where(
    write & held, block, geometry.blocks + nowhere.reshape(position.shape)
  )
  if scales:
    new_k = quantization.quantize(
      new_k, scales[0][:, None, :, None], cache_k.dtype
    )
    new_v = quantization.quantize(
      new_v, scales[1][:, None, :, None], cache_v.dtype
    )
  at: tuple[Any, ...]
  if layout == "bsnh":
    at = (block, slot)
  else:
    heads = jnp.arange(geometry.heads)[None, None]
    at = (block[..., None], heads, slot[..., None])
  lead = cache_k.shape[:-4]
  if lead:
    layer = layer.reshape(layer.shape + (1,) * (at[0].ndim - 1))
    at = (*jnp.unravel_index(layer, lead), *at)
  return (
    cache_k.at[at].set(new_k, mode="drop", unique_indices=True),
    cache_v.at[at].set(new_v, mode="drop", unique_indices=True),
  )
