"""NumPy results to compare the cache kernels with, one row at a time."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

FLOATS = ("float32", "bfloat16", "float16")
QUANTIZED = ("int8", "float8_e4m3fn", "float8_e5m2")
LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def quantize(x: Any, scale: Any, dtype: str) -> np.ndarray:
  """Returns round(x / scale), clipped to the range of `dtype`."""
  ratio = np.asarray(x, np.float32) / np.float32(scale)
  if dtype == "int8":
    ratio = np.rint(ratio)
  limit = np.float32(LARGEST[dtype])
  return np.clip(ratio, -limit, limit).astype(
    np.int8 if dtype == "int8" else getattr(ml_dtypes, dtype)
  )


def row_of(
  sequence: int,
  slot: int,
  size: int,
  block_table: Any = None,
  cache_batch_index: Any = None,
) -> tuple[int, int]:
  """Returns row or block, and place in it, of a sequence's slot."""
  if block_table is not None:
    return int(block_table[sequence][slot // size]), slot % size
  if cache_batch_index is not None:
    return int(cache_batch_index[sequence]), slot
  return sequence, slot


def update(
  cache_k: Any,
  cache_v: Any,
  new_k: Any,
  new_v: Any,
  index: Any,
  *,
  lengths: Any = None,
  layer: int | None = None,
  layout: str = "bsnh",
  ring: bool = False,
  k_scale: Any = None,
  v_scale: Any = None,
  block_table: Any = None,
  cache_batch_index: Any = None,
) -> list[np.ndarray]:
  """Returns the updated caches; arguments as for `kv_cache.update`."""
  out = []
  for cache, new, scale in (
    (cache_k, new_k, k_scale),
    (cache_v, new_v, v_scale),
  ):
    cache, new = np.array(cache), np.asarray(new)
    part = cache if layer is None else cache[layer]
    if layout == "bnsh":
      part, new = part.swapaxes(1, 2), new.swapaxes(1, 2)
    batch, tokens, heads, _ = new.shape
    size = part.shape[1]
    width = 1 if block_table is None else np.shape(block_table)[1]
    index = np.broadcast_to(index, (batch,))
    counts = np.broadcast_to(tokens if lengths is None else lengths, (batch,))
    for b in range(batch):
      for t in range(counts[b]):
        slot = int(index[b]) + t
        if slot < 0:
          continue
        if ring:
          slot %= size * width
        if not 0 <= slot < size * width:
          continue
        row, place = row_of(b, slot, size, block_table, cache_batch_index)
        if not 0 <= row < part.shape[0]:
          continue
        for n in range(heads):
          value = new[b, t, n]
          if scale is not None:
            factor = np.broadcast_to(scale, (batch, heads))[b, n]
            value = quantize(value, factor, cache.dtype.name)
          part[row, place, n] = value
    out.append(cache)
  return out


def random(rng: np.random.Generator, shape: Any, dtype: str) -> Any:
  """Returns random numbers that `dtype` can hold."""
  x = rng.normal(size=shape).astype(np.float32)
  if dtype == "int8":
    return jnp.asarray(np.rint(x * 40).astype(np.int8))
  return jnp.asarray(x).astype(dtype)
