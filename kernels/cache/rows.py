"""Writing new rows into a cache, in plain JAX: correct on every platform."""

from collections.abc import Mapping

import jax
from jax import lax
import jax.numpy as jnp

from . import addressing, quantization


def quantized(
  x: Mapping[str, jax.Array], at: addressing.Addressing
) -> tuple[jax.Array, jax.Array]:
  """Returns the new rows, quantised if there are scales.

  Args:
    x: Operands by name; see `write`.
    at: How they address the cache.
  """
  new_k, new_v = x["new_k"], x["new_v"]
  if "k_scale" not in x:
    return new_k, new_v
  dtype = x["cache_k"].dtype
  new_k, new_v = (
    quantization.quantize(
      new, jnp.expand_dims(scale, at.layout.tokens_axis)[..., None], dtype
    )
    for new, scale in ((new_k, x["k_scale"]), (new_v, x["v_scale"]))
  )
  return new_k, new_v


def write(
  x: Mapping[str, jax.Array], at: addressing.Addressing
) -> tuple[jax.Array, jax.Array]:
  """Writes new rows with one scatter.

  Args:
    x: Operands by name: cache_k and cache_v, `[..., r, s, n, h]` or
      `[..., r, n, s, h]`; new_k and new_v, `[b, t, n, h]` or `[b, n, t, h]`;
      those of `addressing.Places`; and for a quantised cache k_scale and
      v_scale, `[b, n]` float32. Others may be among them.
    at: How they address the cache.

  Returns:
    The updated caches.
  """
  cache_k, cache_v, layout = x["cache_k"], x["cache_v"], at.layout
  geometry = addressing.Geometry.of(cache_k, cache_v, layout)
  places = addressing.Places.of(x)
  tokens = x["new_k"].shape[layout.tokens_axis]
  position, written = addressing.written(
    places.index, places.count, tokens, at.ring
  )
  block, slot, held = addressing.locate(geometry, position, places, at.ring)
  # Out of bounds on purpose: the scatter drops what must not be written. Each
  # its own slot, because a scatter with repeated indices cannot be transposed.
  nowhere = jnp.arange(position.shape[0] * tokens, dtype=jnp.int32)
  slot = jnp.where(
    written & held, slot, geometry.block_size + nowhere.reshape(position.shape)
  )
  new_k, new_v = quantized(x, at)
  # An index for each axis of the cache that a row is one element of. XLA is
  # told of the axes along which the cache and the new rows go together, and so
  # splits the scatter over devices along them without moving a cache.
  lead = cache_k.shape[:-4]
  rows = len(lead)
  indices = dict(
    enumerate(jnp.unravel_index(places.layer[:, None], lead) if lead else ())
  )
  together = {rows: 0} if at.aligned else {}
  if not at.aligned:
    indices[rows] = block
  indices[rows + layout.tokens_axis] = slot
  if layout.heads_first:
    together[rows + 1] = 1
  starts = jnp.stack(
    [jnp.broadcast_to(index, position.shape) for index in indices.values()],
    axis=-1,
  )
  if layout.heads_first:
    starts = jnp.broadcast_to(
      starts[:, None], (*new_k.shape[:3], starts.shape[-1])
    )
  numbers = lax.ScatterDimensionNumbers(
    update_window_dims=(3,) if layout.heads_first else (2, 3),
    inserted_window_dims=tuple(indices),
    scatter_dims_to_operand_dims=tuple(indices),
    operand_batching_dims=tuple(together),
    scatter_indices_batching_dims=tuple(together.values()),
  )
  k, v = (
    lax.scatter(
      cache, starts, new, numbers, unique_indices=True,
      mode=lax.GatherScatterMode.FILL_OR_DROP,
    )
    for cache, new in ((cache_k, new_k), (cache_v, new_v))
  )  # fmt: skip
  return k, v
