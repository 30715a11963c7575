"""The cache update in plain JAX: correct on every platform."""

import jax
from jax import lax
import jax.numpy as jnp

from . import layout as layout_lib
from . import quantization


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
  uniform: layout_lib.Uniform = (),
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
    aligned: Whether sequence i is row i of the cache, whatever `table` says.
    uniform: Axes of operands, by name, along which there is one value.

  Returns:
    The updated caches.
  """
  geometry = layout_lib.Geometry.of(cache_k, cache_v, layout)
  tokens_axis = 1 if layout == "bsnh" else 2
  tokens = new_k.shape[tokens_axis]
  position, write = layout_lib.written(index, count, tokens, ring)
  block, slot, held = layout_lib.locate(
    geometry, position, layer, table, first_slot, ring
  )
  # Out of bounds on purpose: the scatter drops what must not be written. Each
  # its own slot, because a scatter with repeated indices cannot be transposed.
  nowhere = jnp.arange(position.shape[0] * tokens, dtype=jnp.int32)
  slot = jnp.where(
    write & held, slot, geometry.block_size + nowhere.reshape(position.shape)
  )
  if scales:
    new_k, new_v = (
      quantization.quantize(
        new, jnp.expand_dims(scale, tokens_axis)[..., None], cache_k.dtype
      )
      for new, scale in zip((new_k, new_v), scales)
    )
  # An index for each axis of the cache that a row is one element of. XLA is
  # told of the axes along which the cache and the new rows go together, and so
  # splits the scatter over devices along them without moving a cache.
  lead = cache_k.shape[:-4]
  rows = len(lead)
  at = dict(enumerate(jnp.unravel_index(layer[:, None], lead) if lead else ()))
  together = {rows: 0} if aligned else {}
  if not aligned:
    at[rows] = block
  at[rows + tokens_axis] = slot
  if layout == "bnsh":
    together[rows + 1] = 1
  indices = jnp.stack(
    [jnp.broadcast_to(index, position.shape) for index in at.values()], axis=-1
  )
  if layout == "bnsh":
    indices = jnp.broadcast_to(
      indices[:, None], (*new_k.shape[:3], indices.shape[-1])
    )
  numbers = lax.ScatterDimensionNumbers(
    update_window_dims=(2, 3) if layout == "bsnh" else (3,),
    inserted_window_dims=tuple(at),
    scatter_dims_to_operand_dims=tuple(at),
    operand_batching_dims=tuple(together),
    scatter_indices_batching_dims=tuple(together.values()),
  )
  k, v = (
    lax.scatter(
      cache, indices, new, numbers, unique_indices=True,
      mode=lax.GatherScatterMode.FILL_OR_DROP,
    )
    for cache, new in ((cache_k, new_k), (cache_v, new_v))
  )  # fmt: skip
  return k, v
