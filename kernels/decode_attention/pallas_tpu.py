"""Decode attention for TPUs in Pallas: reads the valid prefix, once.

One grid step is a sequence, or as many query tokens of a long one as fast
memory holds. It walks over the tiles of the cache that hold keys which one of
its queries sees, two of them in flight, the first of the next step included,
and keeps the running maximum and sum of an online softmax.

The cache comes with its axes in the order in which XLA keeps it, see
`cache.tiles_tpu`. In the orders "bnsh" and "bnhs" each head's keys are a
matrix. In "bsnh" they are taken out of the tile head by head where there are
many queries. A decode step has few, and then the keys of all heads are one
matrix `[slots * n, h]`, which is multiplied in place; products of a query
with other heads' keys are masked away, which costs less than the cache's bytes
do.

Everything that depends on positions is reduced, in plain JAX, to an interval of
key positions for each query row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from ..cache import addressing, rows_tpu, tiles_tpu
from ..common import arrays
from . import flash_tpu, reference

# Of one tile of keys or values; two of each are in flight.
_TILE_BYTES = 1 << 20

# Of the logits of one tile, in float32; some five such arrays live at once.
_LOGIT_BYTES = 1 << 20

# Of what a grid step holds for its query rows, without logits.
_ROW_BYTES = 8 << 20

# Query rows up to which all heads' keys are multiplied at once: a matrix unit
# takes as many while it loads the next keys.
_ROWS_AT_ONCE = 128

# Slots of a tile at most. With many rows multiplying hides the DMAs, and a
# large tile only takes long to compile.
_SLOTS = 1024
_SLOTS_OF_MANY_ROWS = 256

# Rows of a tile of registers, of any dtype that queries have.
_ROW_TILE = 16

# Prefetched scalars lie in a memory of a megabyte.
_MAX_STEPS = 1 << 14

# Operands that the kernel has no place for.
_NOT_SERVED = {
  "bias": "`bias` is given",
  "mask": "`mask` is given",
  "qv": "`qv` is given",
}


def _tiling(cache_k, cache_v, q, options) -> flash_tpu.Tiling | str:
  """Cuts the work, or says why it cannot be cut."""
  geometry = addressing.Geometry.of(cache_k, cache_v, options.layout)
  _, heads, group, tokens = reference.Sizes.of(q, options.layout)
  order = tiles_tpu.order(cache_k, options.layout)
  assert order is not None  # `cache_problem` has refused such caches
  itemsize = jnp.dtype(cache_k.dtype).itemsize
  slot_bytes = heads * max(geometry.k_dim, geometry.v_dim) * itemsize
  parts = 1
  if cache_k.dtype != jnp.float32 and (
    q.dtype != jnp.bfloat16 or "rope_cos" in options.fields
  ):
    parts = 3
  at_once = order is tiles_tpu.Order.BY_TOKENS and (
    heads * group * tokens <= _ROWS_AT_ONCE
    or tiles_tpu.LANES * slot_bytes > 2 * _TILE_BYTES
  )
  groups, width = (1, heads) if at_once else (heads, 1)
  fewest = 1 << (-(-tiles_tpu.LANES // width) - 1).bit_length()
  if fewest * slot_bytes > 2 * _TILE_BYTES:
    return (
      f"a slot has {slot_bytes} bytes, too many for tiles of {fewest} slots"
    )
  most = min(
    _LOGIT_BYTES // (4 * parts * width * fewest),
    _ROW_BYTES // (groups * _row_bytes(geometry, cache_k.dtype, parts)),
  )
  most = most // _ROW_TILE * _ROW_TILE
  of_token = group * width
  if of_token > most:
    return (
      f"there are {of_token} query rows for each key, more than the {most} that"
      " one tile takes"
    )
  steps = -(-tokens // (most // of_token))
  tokens = -(-tokens // steps)
  rows = -(-tokens * of_token // _ROW_TILE) * _ROW_TILE
  slots = min(
    _TILE_BYTES // slot_bytes,
    _LOGIT_BYTES // (4 * rows * parts * width),
    _SLOTS if groups * rows <= _ROWS_AT_ONCE else _SLOTS_OF_MANY_ROWS,
  )
  slots = max(1 << slots.bit_length() - 1 if slots else 0, fewest)
  slots = min(slots, geometry.block_size)
  return flash_tpu.Tiling(
    order=order,
    groups=groups,
    steps=steps,
    tokens=tokens,
    rows=rows,
    slots=slots,
    keys=slots * width,
    per_block=-(-geometry.block_size // slots),
    parts=parts,
  )


def _row_bytes(geometry, dtype, parts):
  """Returns the fast memory that one query row takes, without its logits."""

  def padded(dim, itemsize):
    return -(-dim // tiles_tpu.LANES) * tiles_tpu.LANES * itemsize

  in_flight = 2 * (
    parts * padded(geometry.k_dim, 4 if dtype == jnp.float32 else 2)
    + padded(geometry.v_dim, 4)
    + 64  # numbers and logarithm, in lines of their own
  )
  return in_flight + padded(geometry.v_dim, 4) + 3 * padded(1, 4)


def unsupported(
  avals: Sequence[Any], *, options: reference.Options
) -> str | None:
  """Returns why the kernel cannot handle these operands, or None."""
  x = options.named(avals)
  for name, clause in _NOT_SERVED.items():
    if name in x:
      return clause
  if "rope_cos" in x and options.rotate_keys:
    return "`rope_cached_keys` is set"
  cache_k, cache_v, q = x["cache_k"], x["cache_v"], x["q"]
  if arrays.static_size((*q.shape, *x["table"].shape)) is None:
    return "the queries have symbolic sizes"
  if 0 in q.shape:
    return "there are no queries"
  if options.appends:
    why = rows_tpu.unsupported(cache_k, cache_v, x["new_k"], options.layout)
  else:
    why = tiles_tpu.cache_problem(cache_k, cache_v, options.layout)
  if why is not None:
    return why
  tiling = _tiling(cache_k, cache_v, q, options)
  if isinstance(tiling, str):
    return tiling
  if (steps := q.shape[0] * tiling.steps) > _MAX_STEPS:
    return f"the queries take {steps} steps, more than {_MAX_STEPS}"
  return None


def append_and_attend(
  *operands: jax.Array, options: reference.Options, interpret: Any = False
) -> tuple[jax.Array, ...]:
  """Writes the new rows, then attends; as `reference.append_and_attend`."""
  x = options.named(operands)
  rows = x | {"new_k": reference.rotated_new_keys(x, options)}
  x["cache_k"], x["cache_v"] = rows_tpu.write(rows, options, interpret)
  out, lse = attend(*x.values(), options=options, interpret=interpret)
  return x["cache_k"], x["cache_v"], out, lse


def attend(
  *operands: jax.Array, options: reference.Options, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
  """Attends over the valid keys of a cache; as `reference.attend`."""
  x = options.named(operands)
  cache_k, cache_v, q = x["cache_k"], x["cache_v"], x["q"]
  tiling = _tiling(cache_k, cache_v, q, options)
  assert isinstance(tiling, flash_tpu.Tiling)
  q = options.layout.to_heads_first(q.astype(jnp.float32))
  if "rope_cos" in x:
    cos, sin = (
      a[:, None, None] for a in reference.angles(x, x["rope_positions"])
    )
    q = reference.rotate(q, cos, sin, options.interleaved)
  b, n, g, t, _ = q.shape
  rows = _Rows(b, n, g, t, tiling)
  places, whole, per_row = _places(x, options, tiling, t)
  factor = jnp.full((b, n), options.scale, jnp.float32)
  if "k_scale" in x:
    factor *= x["k_scale"]
  slopes = jnp.zeros((1, 1, 1), jnp.float32)
  if "alibi_slopes" in x:
    slopes = x["alibi_slopes"]
  head = jnp.arange(n, dtype=jnp.int32)[None, :, None, None]
  numbers = rows.numbers(
    *(a[:, None, None] for a in per_row), head, factor[:, :, None, None],
    slopes[..., None],
  )  # fmt: skip

  out, lse = flash_tpu.flash(
    places, whole, numbers, rows.fold(q), (cache_k, cache_v), options, tiling,
    interpret,
  )  # fmt: skip
  out, lse = rows.unfold(out), rows.unfold(lse[:, :, 0])
  if "v_scale" in x:
    out *= x["v_scale"][:, :, None, None, None]
  if "sinks" in x:
    real = jnp.arange(t) < x["count"][:, None, None, None]
    with_sinks = jnp.logaddexp(lse, x["sinks"][..., None])
    with_sinks = jnp.where(real, with_sinks, lse)
    out *= jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(lse - with_sinks))[
      ..., None
    ]
    lse = with_sinks
  out = options.layout.from_heads_first(out)
  return out.astype(options.out_dtype), lse


class _Rows(NamedTuple):
  """Folds `[b, n, g, t, ...]` into the rows that the kernel works on."""

  b: int
  n: int
  g: int
  t: int
  tiling: flash_tpu.Tiling

  def fold(self, a: jax.Array) -> jax.Array:
    """Returns `[b * steps, groups, rows, ...]`."""
    steps, tokens = self.tiling.steps, self.tiling.tokens
    a = _pad_axis(a, 3, steps * tokens)
    a = a.reshape(*a.shape[:3], steps, tokens, *a.shape[4:])
    a = jnp.moveaxis(a, 3, 1)
    a = a.reshape(self.b * steps, self.tiling.groups, -1, *a.shape[5:])
    return _pad_axis(a, 2, self.tiling.rows)

  def unfold(self, a: jax.Array) -> jax.Array:
    """Undoes `fold`."""
    steps, tokens = self.tiling.steps, self.tiling.tokens
    a = a[:, :, : self.n * self.g * tokens // self.tiling.groups]
    a = a.reshape(self.b, steps, self.n, self.g, tokens, *a.shape[3:])
    a = jnp.moveaxis(a, 1, 3)
    a = a.reshape(*a.shape[:3], steps * tokens, *a.shape[5:])
    return a[:, :, :, : self.t]

  def numbers(self, *values: jax.Array) -> jax.Array:
    """Folds numbers of 32 bits: `[b * steps, groups, values, rows]`, integers.

    Not side by side, where each row would take a whole line of memory.
    """
    full = (self.b, self.n, self.g, self.t)
    folded = [self.fold(jnp.broadcast_to(value, full)) for value in values]
    return jnp.stack(
      [lax.bitcast_convert_type(value, jnp.int32) for value in folded], axis=2
    )


def _pad_axis(a, axis, size):
  pad = [(0, 0)] * a.ndim
  pad[axis] = (0, size - a.shape[axis])
  return jnp.pad(a, pad)


def _places(x, options, tiling, tokens):
  """Turns positions into what the kernel needs of each sequence and row.

  Returns:
    Scalars for each step, one after the other: layer, first and last tile,
    what to add to a slot for the position of its key, the last slot before the
    ring's seam, and the interval of positions that some query sees. Then the
    table, flat. Then for each token the interval that it sees, `[b, t]` each,
    and its position.
  """
  geometry = addressing.Geometry.of(x["cache_k"], x["cache_v"], options.layout)
  count = jnp.clip(x["count"], 0, tokens)
  first = reference.first_query(x, options, count)
  batch = len(count)

  def of_steps(a):
    return jnp.repeat(a, tiling.steps)

  step = jnp.tile(jnp.arange(tiling.steps, dtype=jnp.int32), batch)
  token = jnp.arange(tiling.tokens, dtype=jnp.int32)
  token += step[:, None] * tiling.tokens
  first, count = of_steps(first), of_steps(count)
  p = first[:, None] + token
  num_keys = first + count
  low = jnp.zeros_like(p)
  if "left_padding" in x:
    low = jnp.maximum(low, of_steps(x["left_padding"])[:, None])
  if options.window_left >= 0:
    low = jnp.maximum(low, p - options.window_left)
  if options.chunk:
    low = jnp.maximum(low, p - p % options.chunk)
  high = jnp.broadcast_to(num_keys[:, None], p.shape)
  if options.causal:
    high = jnp.minimum(high, p + 1)
  if options.window_right >= 0:
    # A difference: the sum may leave int32.
    high = p + jnp.minimum(high - p, options.window_right + 1)
  layer = of_steps(x["layer"])
  real = (token < count[:, None]) & (
    (layer >= 0) & (layer < geometry.layers) & (num_keys > 0)
  )[:, None]
  none = ~real | (high <= low)
  low, high = jnp.where(none, 0, low), jnp.where(none, 0, high)
  some = jnp.any(~none, axis=1)
  largest = jnp.iinfo(jnp.int32).max
  all_low = jnp.where(some, jnp.min(jnp.where(none, largest, low), 1), 0)
  all_high = jnp.max(high, axis=1)

  first_slot = x["first_slot"]
  capacity = x["table"].shape[1] * geometry.block_size
  if options.ring:
    last = jnp.maximum(num_keys - 1, 0)
    turn = last // options.ring * options.ring
    seam = last - turn - first_slot
    from_slot, to_slot = (
      jnp.zeros_like(last), jnp.minimum(num_keys, options.ring)
    )  # fmt: skip
  else:
    turn = jnp.zeros_like(num_keys)
    seam = jnp.full_like(num_keys, largest)
    from_slot, to_slot = all_low, all_high

  def tile_of(slot):
    slot = jnp.clip(slot - first_slot, 0, capacity - 1)
    inside = slot % geometry.block_size
    block = slot // geometry.block_size
    return block * tiling.per_block + inside // tiling.slots

  first_tile = tile_of(from_slot)
  last_tile = jnp.maximum(tile_of(to_slot - 1), first_tile)
  scalars = flash_tpu.Places(
    jnp.clip(layer, 0, geometry.layers - 1), first_tile, last_tile,
    turn + first_slot, seam, all_low, all_high,
  )  # fmt: skip
  per_row = [a.reshape(batch, -1)[:, :tokens] for a in (low, high, p)]
  return scalars, x["table"].reshape(-1), per_row
