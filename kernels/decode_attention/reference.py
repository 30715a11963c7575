"""Decode attention in plain JAX: for every platform; reads the whole buffer."""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from ..cache import addressing, layouts
from ..cache import rows as cache_rows


@dataclasses.dataclass(frozen=True)
class Options(addressing.Addressing):
  """What the primitives know statically, in addition to the addressing.

  Attributes:
    fields: Names of the operands, in order.
    scale: Factor of the logits.
    causal: Whether a query sees no key after its own position.
    window_left: Keys seen before the query's own position, or -1 for all.
    window_right: Keys seen after it, or -1 for all.
    chunk: Length of the chunks of chunked attention, or 0.
    softcap: Logits are capped to this size, or 0.
    interleaved: Whether rotary pairs are neighbours.
    rotate_keys: Whether cached keys are rotated when they are read.
    out_dtype: Name of the dtype of the result.
  """

  fields: tuple[str, ...]
  scale: float
  causal: bool
  window_left: int
  window_right: int
  chunk: int
  softcap: float
  interleaved: bool
  rotate_keys: bool
  out_dtype: str

  def named(self, operands: Any) -> dict[str, Any]:
    """Returns the operands by name."""
    return dict(zip(self.fields, operands, strict=True))

  @property
  def appends(self) -> bool:
    """Returns whether there are new keys and values."""
    return "new_k" in self.fields


class Sizes(NamedTuple):
  """Sizes of the queries.

  Attributes:
    b: Of the batch.
    n: Key-value heads.
    g: Query heads that share one of them.
    t: Query tokens.
  """

  b: Any
  n: Any
  g: Any
  t: Any

  @classmethod
  def of(cls, q: Any, layout: layouts.Layout) -> "Sizes":
    """Reads them off q `[b, t, n, g, h]` or `[b, n, g, t, h]`."""
    b, *middle, _ = q.shape
    if layout.heads_first:
      n, g, t = middle
    else:
      t, n, g = middle
    return cls(b, n, g, t)


def results(
  operands: Sequence[Any], options: Options
) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Returns the types of what the primitives return.

  Args:
    operands: Arrays or abstract values.
    options: Everything static.
  """
  x = options.named(operands)
  q, caches = x["q"], (x["cache_k"], x["cache_v"])
  out = (
    jax.ShapeDtypeStruct(
      (*q.shape[:-1], caches[1].shape[-1]), options.out_dtype
    ),
    jax.ShapeDtypeStruct(tuple(Sizes.of(q, options.layout)), jnp.float32),
  )
  if not options.appends:
    return out
  return (*(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in caches), *out)


def rotate(
  x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool
) -> jax.Array:
  """Turns pairs of elements by the angles of their positions, in float32.

  Args:
    x: `[..., h]`.
    cos: Broadcasts against `[..., pairs]`, with `2 * pairs <= h`; elements
      after the first `2 * pairs` stay as they are.
    sin: Like `cos`.
    interleaved: Whether pairs are neighbours (2i, 2i + 1), else i and
      `i + pairs`.

  Returns:
    `[..., h]` float32.
  """
  x = x.astype(jnp.float32)
  pairs = cos.shape[-1]
  turned, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
  if interleaved:
    a, b = turned[..., 0::2], turned[..., 1::2]
  else:
    a, b = turned[..., :pairs], turned[..., pairs:]
  a, b = a * cos - b * sin, b * cos + a * sin
  if interleaved:
    turned = jnp.stack([a, b], axis=-1).reshape(turned.shape)
  else:
    turned = jnp.concatenate([a, b], axis=-1)
  return jnp.concatenate([turned, rest], axis=-1)


def angles(
  x: dict[str, jax.Array], positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns the cosines and sines of positions `[...]`, `[..., pairs]`.

  Args:
    x: Operands by name.
    positions: Rows of the tables; the first or last one stands for others.
  """
  where = jnp.clip(positions, 0, x["rope_cos"].shape[0] - 1)
  return x["rope_cos"][where], x["rope_sin"][where]


def rotated_new_keys(x: dict[str, jax.Array], options: Options) -> jax.Array:
  """Returns the new keys as they are stored.

  Args:
    x: Operands by name.
    options: Everything static.
  """
  new_k = x["new_k"]
  if "rope_cos" in x and not options.rotate_keys:
    cos, sin = (
      jnp.expand_dims(a, options.layout.heads_axis)
      for a in angles(x, x["rope_positions"])
    )
    new_k = rotate(new_k, cos, sin, options.interleaved)
  return new_k if "k_scale" in x else new_k.astype(x["cache_k"].dtype)


def first_query(x: dict[str, Any], options: Options, count: Any) -> Any:
  """Returns the position `[b]` of query token 0; `count` is `[b]`.

  Not below minus the number of tokens, where nothing is seen either.
  """
  tokens = Sizes.of(x["q"], options.layout).t
  if options.appends:
    return jnp.maximum(x["index"], -tokens)
  return jnp.maximum(x["index"], count - tokens) - count


def _rows(cache, x, options, geometry):
  """Returns each sequence's slots `[b, m * s, n, h]`, and which are held."""
  layer, table = x["layer"], x["table"]
  lead = cache.shape[:-4]
  held = (
    (table >= 0)
    & (table < geometry.blocks)
    & ((layer >= 0) & (layer < geometry.layers))[:, None]
  )
  layer = jnp.clip(layer, 0, geometry.layers - 1)
  if options.aligned:
    # No gather, which XLA would not split over devices where the cache is: the
    # rows are those of the cache, and in a stack, all of one layer.
    if lead:
      layer = jnp.max(layer, initial=0)
      cache = lax.dynamic_index_in_dim(cache, layer, keepdims=False)
    rows = cache[:, None]
  else:
    at = (jnp.where(held, table, 0),)
    if lead:
      at = (*jnp.unravel_index(layer[:, None], lead), *at)
    rows = cache[at]
  if options.layout.heads_first:
    rows = rows.swapaxes(2, 3)
  b, m, s = rows.shape[:3]
  held = jnp.broadcast_to(held[..., None], (b, m, s)).reshape(b, m * s)
  return rows.reshape(b, m * s, *rows.shape[3:]), held


def _in_chunk(first, token, chunk):
  """Returns `(first + token) % chunk`, which does not leave int32."""
  start = (first % chunk)[:, None, None]
  token_in_chunk = token % chunk
  room = chunk - start
  return jnp.where(
    token_in_chunk < room, start + token_in_chunk, token_in_chunk - room
  )


def _visible(x, options, held, first, count):
  """Returns which keys `[b, t, s]` queries see, and how far those are.

  Positions of keys and queries count from query token 0 on: in a ring, where
  that is may be near the end of int32, and what is added to it beyond.

  Args:
    x: Operands by name.
    options: Everything static.
    held: `[b, s]`, the slots that the cache has.
    first: `[b]`, position of query token 0.
    count: `[b]`, query tokens that are not padding.

  Returns:
    `[b, t, s]` bool, and the keys' positions less `first`, `[b, s]`.
  """
  tokens = Sizes.of(x["q"], options.layout).t
  slot = x["first_slot"] + jnp.arange(held.shape[1], dtype=jnp.int32)
  ahead = count[:, None] - 1  # of the last key
  if options.ring:
    start = first[:, None] % options.ring
    offset = ahead - (start + ahead - slot) % options.ring
  else:
    offset = slot - first[:, None]
  held &= (offset >= -first[:, None]) & (offset <= ahead)
  most = jnp.iinfo(jnp.int32).max - tokens
  if "left_padding" in x:
    held &= offset >= (jnp.minimum(x["left_padding"], most) - first)[:, None]
  j = offset[:, None, :]
  p = jnp.arange(tokens, dtype=jnp.int32)[:, None]
  visible = held[:, None] & (p[:, 0] < count[:, None])[..., None]
  if options.causal:
    visible &= j <= p
  if options.window_left >= 0:
    visible &= j >= p - options.window_left
  if options.window_right >= 0:
    visible &= j <= p + min(options.window_right, most)
  if options.chunk:
    visible &= j >= p - _in_chunk(first, p, options.chunk)
  return visible, offset


def _dot(spec, a, b):
  return jnp.einsum(
    spec, a, b, precision=lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )  # fmt: skip


def _logits(x, options, q, keys, values, offset):
  """Returns the logits `[b, n, g, t, s]` before masking."""
  logits = _dot("bngth,bsnh->bngts", q, keys)
  if "qv" in x:
    qv = options.layout.to_heads_first(x["qv"].astype(jnp.float32))
    logits += _dot("bngth,bsnh->bngts", qv, values)
  logits *= options.scale
  if options.softcap:
    logits = options.softcap * jnp.tanh(logits / options.softcap)
  if "alibi_slopes" in x:
    p = jnp.arange(q.shape[3], dtype=jnp.int32)[:, None]
    distance = jnp.abs(p - offset[:, None, :]).astype(jnp.float32)
    logits -= x["alibi_slopes"][..., None, None] * distance[:, None, None]
  if "bias" in x:
    logits += x["bias"]
  return logits


def _softmax(logits, visible, values, sinks):
  """Returns the weighted values and the logarithms of the sums of weights.

  Args:
    logits: `[b, n, g, t, s]`.
    visible: The same; what is not visible counts as -inf.
    values: `[b, s, n, h]`.
    sinks: `[b, n, g, t]`, one more logit without a value; or None.
  """
  logits = jnp.where(visible, logits, -jnp.inf)
  largest = jnp.max(logits, axis=-1, initial=-jnp.inf)
  if sinks is not None:
    largest = jnp.maximum(largest, sinks)
  base = lax.stop_gradient(jnp.where(jnp.isneginf(largest), 0.0, largest))
  weights = jnp.where(
    visible, jnp.exp(jnp.where(visible, logits, 0.0) - base[..., None]), 0.0
  )
  total = jnp.sum(weights, axis=-1)
  if sinks is not None:
    total += jnp.exp(sinks - base)
  none = total == 0.0
  safe = jnp.where(none, 1.0, total)
  out = _dot("bngts,bsnh->bngth", weights, values) / safe[..., None]
  out = jnp.where(none[..., None], 0.0, out)
  return out, jnp.where(none, -jnp.inf, base + jnp.log(safe))


def attend(*operands: jax.Array, options: Options) -> tuple[jax.Array, ...]:
  """Attends over the valid keys of a cache; the primitive's operands.

  Args:
    *operands: Named by `options.fields`: cache_k, cache_v as in
      `cache.rows.write`; q `[b, t, n, g, h]` or `[b, n, g, t, h]`;
      index, count, layer, table, first_slot; and any of k_scale, v_scale
      `[b, n]`, rope_cos, rope_sin `[positions, pairs]`, rope_positions
      `[b, t]`, left_padding `[b]`, alibi_slopes `[b or 1, n, g]`, sinks
      `[n, g]`, bias and mask `[b, n, g, t, s]` with any axis 1, qv like q.
    options: Everything static.

  Returns:
    The result, like q with the values' h, and the logarithm of the sums of
    exponentials `[b, n, g, t]` float32.
  """
  x = options.named(operands)
  layout = options.layout
  geometry = addressing.Geometry.of(x["cache_k"], x["cache_v"], layout)
  q = layout.to_heads_first(x["q"].astype(jnp.float32))
  tokens = q.shape[3]
  count = jnp.clip(x["count"], 0, tokens)
  first = first_query(x, options, count)
  keys, held = _rows(x["cache_k"], x, options, geometry)
  values, _ = _rows(x["cache_v"], x, options, geometry)
  keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
  if "k_scale" in x:
    keys *= x["k_scale"][:, None, :, None]
    values *= x["v_scale"][:, None, :, None]
  visible, offset = _visible(x, options, held, first, count)
  # What no query sees may be anything, even NaN.
  seen = jnp.any(visible, axis=1)[..., None, None]
  keys, values = jnp.where(seen, keys, 0.0), jnp.where(seen, values, 0.0)
  if "rope_cos" in x:
    cos, sin = (a[:, None, None] for a in angles(x, x["rope_positions"]))
    q = rotate(q, cos, sin, options.interleaved)
    if options.rotate_keys:
      # Beyond the last row it is the last one.
      rows = x["rope_cos"].shape[0]
      where = jnp.minimum(offset, rows - first[:, None]) + first[:, None]
      cos, sin = (a[:, :, None] for a in angles(x, where))
      keys = rotate(keys, cos, sin, options.interleaved)
  logits = _logits(x, options, q, keys, values, offset)
  visible = visible[:, None, None]
  if "mask" in x:
    visible = visible & x["mask"]
  sinks = None
  if "sinks" in x:
    real = (jnp.arange(tokens) < count[:, None])[:, None, None]
    sinks = jnp.where(real, x["sinks"][..., None], -jnp.inf)
  out, lse = _softmax(logits, visible, values, sinks)
  return layout.from_heads_first(out).astype(options.out_dtype), lse


def append_and_attend(
  *operands: jax.Array, options: Options
) -> tuple[jax.Array, ...]:
  """Writes the new rows, then attends; the primitive's operands.

  Args:
    *operands: Those of `attend`, and new_k, new_v.
    options: Everything static.

  Returns:
    The updated caches, and what `attend` returns.
  """
  x = options.named(operands)
  rows = x | {"new_k": rotated_new_keys(x, options)}
  x["cache_k"], x["cache_v"] = cache_rows.write(rows, options)
  out, lse = attend(*x.values(), options=options)
  return x["cache_k"], x["cache_v"], out, lse
