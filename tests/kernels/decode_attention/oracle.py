"""Attention over a cache in float64 NumPy, one query at a time."""

from typing import Any

import numpy as np

from tests.kernels.kv_cache import oracle as cache_oracle


def rotate(
  row: Any, cos: Any, sin: Any, interleaved: bool = False
) -> np.ndarray:
  """Rotates the pairs of one row by complex multiplication."""
  row = np.array(row, np.float64)
  pairs = len(cos)
  turn = np.asarray(cos, np.float64) + 1j * np.asarray(sin, np.float64)
  if interleaved:
    z = (row[0 : 2 * pairs : 2] + 1j * row[1 : 2 * pairs : 2]) * turn
    row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2] = z.real, z.imag
  else:
    z = (row[:pairs] + 1j * row[pairs : 2 * pairs]) * turn
    row[:pairs], row[pairs : 2 * pairs] = z.real, z.imag
  return row


def rotate_tokens(x: Any, positions: Any, **kwargs: Any) -> np.ndarray:
  """Rotates `[b, t, n, h]` (or "bnsh") rows of tokens at `positions[b, t]`."""
  layout = kwargs.get("layout", "bsnh")
  x = np.array(x, np.float64)
  rows = x if layout == "bsnh" else x.swapaxes(1, 2)
  for b, t, n in np.ndindex(*rows.shape[:3]):
    p = positions[b][t]
    rows[b, t, n] = rotate(
      rows[b, t, n],
      kwargs["rope_cos"][p],
      kwargs["rope_sin"][p],
      kwargs.get("rope_interleaved", False),
    )
  return x


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
) -> tuple[np.ndarray, np.ndarray]:
  """Attends over caches that hold everything already.

  `cache_k` and `cache_v` are as after the update, `first` is the position `[b]`
  of query token 0 and `counts` the number `[b]` of those that are not padding;
  everything else is as for `decode_attention`.

  Returns:
    The result and the logarithms, in the layout of `decode_attention`.
  """

  def by_token(x):
    x = np.asarray(x, np.float64)
    return x.swapaxes(1, 2) if layout == "bnsh" else x

  if layer is not None:
    cache_k, cache_v = np.asarray(cache_k)[layer], np.asarray(cache_v)[layer]
  keys, values, q = by_token(cache_k), by_token(cache_v), by_token(q)
  qv = None if qv is None else by_token(qv)
  batch, tokens, heads, dim = q.shape
  size, kv_heads = keys.shape[1:3]
  width = 1 if block_table is None else np.shape(block_table)[1]
  capacity = size * width
  out = np.zeros((batch, tokens, heads, values.shape[-1]))
  lse = np.full((batch, heads, tokens), -np.inf)
  full = (batch, heads, tokens, capacity)
  bias = np.broadcast_to(0.0 if bias is None else np.float64(bias), full)
  mask = np.broadcast_to(True if mask is None else np.asarray(mask), full)
  left_padding = np.broadcast_to(left_padding, (batch,))
  slopes = np.broadcast_to(
    0.0 if alibi_slopes is None else np.float64(alibi_slopes), (batch, heads)
  )
  scales = [
    np.broadcast_to(1.0 if s is None else np.float64(s), (batch, kv_heads))
    for s in (k_scale, v_scale)
  ]
  if isinstance(window, int):
    before, after = window - 1, -1 if causal else 0
  else:
    before, after = (-1, -1) if window is None else window
  for b, i, head in np.ndindex(batch, tokens, heads):
    if i >= counts[b]:
      continue
    n = head // (heads // kv_heads)
    p = int(first[b]) + i
    total = int(first[b]) + int(counts[b])
    query = q[b, i, head]
    if rope_cos is not None:
      where = p if rope_positions is None else rope_positions[b][i]
      query = rotate(query, rope_cos[where], rope_sin[where], rope_interleaved)
    logits, rows = [], []
    oldest = max(total - capacity, 0) if ring else 0
    for j in range(oldest, min(total, capacity) if not ring else total):
      slot = j % capacity
      row, place = cache_oracle.row_of(
        b, slot, size, block_table, cache_batch_index
      )
      if not 0 <= row < keys.shape[0] or j < left_padding[b]:
        continue
      if (causal and j > p) or (0 <= before < p - j) or (0 <= after < j - p):
        continue
      if chunk and j < p - p % chunk:
        continue
      if not mask[b, head, i, slot]:
        continue
      key = keys[row, place, n] * scales[0][b, n]
      value = values[row, place, n] * scales[1][b, n]
      if rope_cached_keys:
        key = rotate(key, rope_cos[j], rope_sin[j], rope_interleaved)
      logit = query @ key
      if qv is not None:
        logit += qv[b, i, head] @ value
      logit *= dim**-0.5 if scale is None else scale
      if softcap:
        logit = softcap * np.tanh(logit / softcap)
      logit += bias[b, head, i, slot] - slopes[b, head] * abs(p - j)
      if np.isneginf(logit):
        continue
      logits.append(logit)
      rows.append(value)
    if sinks is not None:
      logits.append(float(sinks[head]))
      rows.append(np.zeros(values.shape[-1]))
    if not logits:
      continue
    top = max(logits)
    weights = np.exp(np.array(logits) - top)
    out[b, i, head] = weights @ np.array(rows) / weights.sum()
    lse[b, head, i] = top + np.log(weights.sum())
  return (out if layout == "bsnh" else out.swapaxes(1, 2)), lse
