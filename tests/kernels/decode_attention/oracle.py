"""Attention over a cache in float64 NumPy, all queries at once."""

from typing import Any, NamedTuple

import numpy as np


class Attention(NamedTuple):
  """What attention should give.

  Attributes:
    out: In the layout of the operands.
    lse: `[b, heads, t]`.
    size: No logit is made of larger terms: errors grow with it.
    largest: Largest magnitude of a value that is seen.
  """

  out: np.ndarray
  lse: np.ndarray
  size: float
  largest: float


def _rows(cache, layout, layer, table):
  """Returns each sequence's slots `[b, capacity, n, h]`, and which are held."""
  cache = np.asarray(cache).astype(np.float64)
  if layer is not None:
    held = 0 <= layer < cache.shape[0]
    cache = cache[layer if held else 0]
    table = np.where(held, table, -1)
  if layout == "bnsh":
    cache = cache.swapaxes(1, 2)
  held = (table >= 0) & (table < cache.shape[0])
  rows = cache[np.where(held, table, 0)]
  b, m, s = rows.shape[:3]
  return rows.reshape(b, m * s, *rows.shape[3:]), np.repeat(held, s, axis=1)


def rotate(x: Any, cos: Any, sin: Any, interleaved: bool = False) -> np.ndarray:
  """Rotates the pairs of `[..., h]`; cosines and sines are `[..., pairs]`."""
  x = np.array(x, np.float64)
  pairs = cos.shape[-1]
  if interleaved:
    first, second = np.s_[..., 0 : 2 * pairs : 2], np.s_[..., 1 : 2 * pairs : 2]
  else:
    first, second = np.s_[..., :pairs], np.s_[..., pairs : 2 * pairs]
  a, b = x[first].copy(), x[second].copy()
  x[first], x[second] = a * cos - b * sin, b * cos + a * sin
  return x


def rotate_tokens(x: Any, positions: Any, **kwargs: Any) -> np.ndarray:
  """Rotates `[b, t, n, h]` (or "bnsh") rows of tokens at `positions[b, t]`."""
  axis = 2 if kwargs.get("layout", "bsnh") == "bsnh" else 1
  cos, sin = (
    np.expand_dims(np.float64(kwargs[name])[np.asarray(positions)], axis)
    for name in ("rope_cos", "rope_sin")
  )
  return rotate(x, cos, sin, kwargs.get("rope_interleaved", False))


def _length(x, axis):
  """Returns the length of the longest vector along an axis."""
  return float(np.sqrt(np.square(x).sum(axis).max(initial=0)))


def attend(
  cache_k: Any,
  cache_v: Any,
  q: Any,
  first: Any,
  counts: Any,
  *,
  layer: int | None = None,
  layout: str = "bsnh",
  ring: bool = False,
  k_scale: Any = None,
  v_scale: Any = None,
  block_table: Any = None,
  cache_batch_index: Any = None,
  left_padding: Any = 0,
  scale: float | None = None,
  causal: bool = True,
  window: Any = None,
  chunk: int | None = None,
  softcap: float | None = None,
  alibi_slopes: Any = None,
  bias: Any = None,
  mask: Any = None,
  sinks: Any = None,
  qv: Any = None,
  rope_cos: Any = None,
  rope_sin: Any = None,
  rope_positions: Any = None,
  rope_interleaved: bool = False,
  rope_cached_keys: bool = False,
) -> Attention:
  """Attends over caches that hold everything already.

  `cache_k` and `cache_v` are as after the update, `first` is the position `[b]`
  of query token 0 and `counts` the number `[b]` of those that are not padding;
  everything else is as for `decode_attention`.
  """

  def by_head(x):
    """Returns `[b, heads, t, h]`."""
    x = np.asarray(x).astype(np.float64)
    return x if layout == "bnsh" else x.swapaxes(1, 2)

  q = by_head(q)
  batch, heads, tokens, dim = q.shape
  table = np.arange(batch)[:, None]
  if block_table is not None:
    table = np.asarray(block_table)
  elif cache_batch_index is not None:
    table = np.asarray(cache_batch_index)[:, None]
  keys, held = _rows(cache_k, layout, layer, table)
  values, _ = _rows(cache_v, layout, layer, table)
  capacity, kv_heads = keys.shape[1:3]
  first = np.asarray(first, np.int64)[:, None]
  counts = np.asarray(counts, np.int64)[:, None]
  p = (first + np.arange(tokens))[:, :, None]
  slot = np.arange(capacity)
  j = np.broadcast_to(slot, (batch, capacity))
  total = first + counts
  if ring:
    j = total - 1 - (total - 1 - slot) % capacity
  held = held & (j >= 0) & (j < total)
  held &= j >= np.broadcast_to(left_padding, (batch,))[:, None]
  where, j = j, j[:, None, :]
  seen = held[:, None] & (np.arange(tokens) < counts)[..., None]
  if causal:
    seen &= j <= p
  if isinstance(window, int):
    before, after = window - 1, -1 if causal else 0
  else:
    before, after = (-1, -1) if window is None else window
  if before >= 0:
    seen &= p - j <= before
  if after >= 0:
    seen &= j - p <= after
  if chunk:
    seen &= j >= p - p % chunk
  used = seen.any(1)[..., None, None]
  keys, values = np.where(used, keys, 0.0), np.where(used, values, 0.0)
  scales = [
    np.broadcast_to(1.0 if s is None else np.float64(s), (batch, kv_heads))
    for s in (k_scale, v_scale)
  ]
  keys = keys * scales[0][:, None, :, None]
  values = values * scales[1][:, None, :, None]
  if rope_cos is not None:
    cos, sin = np.float64(rope_cos), np.float64(rope_sin)
    at = p[..., 0] if rope_positions is None else np.asarray(rope_positions)
    at = np.clip(at, 0, len(cos) - 1)
    q = rotate(q, cos[at][:, None], sin[at][:, None], rope_interleaved)
    if rope_cached_keys:
      at = np.clip(where, 0, len(cos) - 1)
      keys = rotate(
        keys, cos[at][:, :, None], sin[at][:, :, None], rope_interleaved
      )
  keys, values = keys.transpose(0, 2, 3, 1), values.swapaxes(1, 2)
  full = (batch, heads, tokens, capacity)

  def times(x, y):
    """Multiplies `[b, heads, t, i]` by `[b, n, i, k]`."""
    together = x.reshape(batch, kv_heads, -1, x.shape[-1]) @ y
    return together.reshape(batch, heads, tokens, -1)

  factor = dim**-0.5 if scale is None else scale
  logits = times(q, keys)
  size = _length(q, 3) * _length(keys, 2)
  if qv is not None:
    qv = by_head(qv)
    logits = logits + times(qv, values.swapaxes(2, 3))
    size += _length(qv, 3) * _length(values, 3)
  logits, size = logits * factor, size * abs(factor)
  if softcap:
    logits = softcap * np.tanh(logits / softcap)
  if alibi_slopes is not None:
    slopes = np.broadcast_to(alibi_slopes, (batch, heads))[..., None, None]
    logits = logits - slopes * np.abs(p - j)[:, None]
    size += float((slopes * np.abs(p - j)[:, None]).max(initial=0))
  seen = np.broadcast_to(seen[:, None], full)
  if mask is not None:
    seen = seen & np.asarray(mask)
  if bias is not None:
    bias = np.float64(bias)
    logits = logits + bias
    size += float(np.abs(bias[np.isfinite(bias)]).max(initial=0))
  logits = np.where(seen, logits, -np.inf)
  if sinks is not None:
    sink = np.float64(sinks)[:, None, None]
    sink = np.broadcast_to(sink, (batch, heads, tokens, 1))
    live = (np.arange(tokens) < counts)[:, None, :, None]
    logits = np.concatenate([logits, np.where(live, sink, -np.inf)], axis=-1)
  top = logits.max(axis=-1, keepdims=True, initial=-np.inf)
  none = np.isneginf(top)
  weights = np.exp(logits - np.where(none, 0.0, top))
  sums = weights.sum(axis=-1, keepdims=True)
  with np.errstate(divide="ignore"):
    lse = np.where(none, -np.inf, top + np.log(np.where(none, 1, sums)))
  out = times(weights[..., :capacity], values) / np.where(none, 1, sums)
  return Attention(
    out if layout == "bnsh" else out.swapaxes(1, 2),
    lse[..., 0],
    size,
    float(np.abs(values).max(initial=0)),
  )
