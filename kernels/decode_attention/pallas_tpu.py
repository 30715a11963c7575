"""Decode attention for TPUs in Pallas: reads the valid prefix, once.

One grid step is a sequence, or as many query tokens of a long one as fast
memory holds. It walks over the tiles of the cache that hold keys which one of
its queries sees, two of them in flight, the first of the next step included,
and keeps the running maximum and sum of an online softmax.

The cache comes with its axes in the order in which XLA keeps it, see
`kv_cache.pallas_tpu`. In the orders "bnsh" and "bnhs" each head's keys are a
matrix. In "bsnh" they are taken out of the tile head by head where there are
many queries. A decode step has few, and then the keys of all heads are one
matrix `[slots * n, h]`, which is multiplied as it lies; products of a query
with other heads' keys are masked away, which costs less than the cache's bytes
do.

Everything that depends on positions is reduced, in plain JAX, to an interval of
key positions for each query row.
"""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from ..common import dispatch
from ..kv_cache import layout as layout_lib
from ..kv_cache import pallas_tpu as cache_tpu
from . import reference

# Of one tile of keys or values; two of each are in flight.
_TILE_BYTES = 1 << 20

# Of the logits of one tile, in float32; some five such arrays live at once.
_LOGIT_BYTES = 1 << 20

# Of what a grid step holds for its query rows, beside logits.
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


class _Tiling(NamedTuple):
  """How the work of one call is cut.

  Attributes:
    order: Of the cache's axes: "bsnh", "bnsh" or "bnhs".
    groups: Matrices of keys that a tile holds: 1 of all heads', or n.
    steps: Among which the query tokens of a sequence are divided.
    tokens: Of one step.
    rows: Query rows of a matrix, padded to whole tiles of registers.
    slots: Of the cache in one tile.
    keys: Columns of logits: slots, or slots * n.
    per_block: Tiles in a row or block of the cache.
    parts: bfloat16 numbers that one query element is split into.
  """

  order: str
  groups: int
  steps: int
  tokens: int
  rows: int
  slots: int
  keys: int
  per_block: int
  parts: int


def _tiling(cache_k, cache_v, q, options) -> _Tiling | str:
  """Cuts the work, or says why it cannot be cut."""
  geometry = layout_lib.Geometry.of(cache_k, cache_v, options.layout)
  heads = geometry.heads
  at = (3, 1) if options.layout == "bsnh" else (2, 3)
  group, tokens = (q.shape[i] for i in at)
  order = cache_tpu.order(cache_k, options.layout)
  itemsize = jnp.dtype(cache_k.dtype).itemsize
  slot_bytes = heads * max(geometry.k_dim, geometry.v_dim) * itemsize
  parts = 1
  if cache_k.dtype != jnp.float32 and (
    q.dtype != jnp.bfloat16 or "rope_cos" in options.fields
  ):
    parts = 3
  at_once = order == "bsnh" and (
    heads * group * tokens <= _ROWS_AT_ONCE
    or cache_tpu.LANES * slot_bytes > 2 * _TILE_BYTES
  )
  groups, width = (1, heads) if at_once else (heads, 1)
  fewest = 1 << (-(-cache_tpu.LANES // width) - 1).bit_length()
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
  return _Tiling(
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
  """Returns what one query row takes of fast memory, beside its logits."""

  def padded(dim, itemsize):
    return -(-dim // cache_tpu.LANES) * cache_tpu.LANES * itemsize

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
  if dispatch.static_size((*q.shape, *x["table"].shape)) is None:
    return "the queries have symbolic sizes"
  if 0 in q.shape:
    return "there are no queries"
  if options.appends:
    update = [
      x[name]
      for name in ("cache_k", "cache_v", "new_k", "new_v", "index", "count")
    ]
    why = cache_tpu.unsupported(
      update, layout=options.layout, ring=options.ring,
      aligned=options.aligned, uniform=options.uniform,
    )  # fmt: skip
  else:
    why = cache_tpu.cache_problem(cache_k, cache_v, options.layout)
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
  new_k, new_v = x["new_k"], x["new_v"]
  if "rope_cos" in x:
    axis = 2 if options.layout == "bsnh" else 1
    cos, sin = (jnp.expand_dims(a, axis) for a in _angles(x))
    new_k = reference.rotate(new_k, cos, sin, options.interleaved)
  scales = (x["k_scale"], x["v_scale"]) if "k_scale" in x else ()
  if not scales:
    new_k = new_k.astype(x["cache_k"].dtype)
  x["cache_k"], x["cache_v"] = cache_tpu.update(
    x["cache_k"], x["cache_v"], new_k, new_v, x["index"], x["count"],
    x["layer"], x["table"], x["first_slot"], *scales,
    layout=options.layout, ring=options.ring, aligned=options.aligned,
    uniform=options.uniform, interpret=interpret,
  )  # fmt: skip
  out, lse = attend(
    *(x[name] for name in options.fields), options=options, interpret=interpret
  )
  return x["cache_k"], x["cache_v"], out, lse


def attend(
  *operands: jax.Array, options: reference.Options, interpret: Any = False
) -> tuple[jax.Array, jax.Array]:
  """Attends over the valid keys of a cache; as `reference.attend`."""
  x = options.named(operands)
  cache_k, cache_v, q = x["cache_k"], x["cache_v"], x["q"]
  tiling = _tiling(cache_k, cache_v, q, options)
  assert isinstance(tiling, _Tiling)
  q = q.astype(jnp.float32)
  if options.layout == "bsnh":
    q = q.transpose(0, 2, 3, 1, 4)
  if "rope_cos" in x:
    cos, sin = (a[:, None, None] for a in _angles(x))
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

  out, lse = _flash(
    places, whole, numbers, rows.fold(q), cache_k, cache_v,
    options=options, tiling=tiling, interpret=interpret,
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
  if options.layout == "bsnh":
    out = out.transpose(0, 3, 1, 2, 4)
  return out.astype(options.out_dtype), lse


class _Rows(NamedTuple):
  """Folds `[b, n, g, t, ...]` into the rows that the kernel works on."""

  b: int
  n: int
  g: int
  t: int
  tiling: _Tiling

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


def _angles(x):
  where = jnp.clip(x["rope_positions"], 0, x["rope_cos"].shape[0] - 1)
  return x["rope_cos"][where], x["rope_sin"][where]


def _places(x, options, tiling, tokens):
  """Turns positions into what the kernel needs of each sequence and row.

  Returns:
    Scalars for each step, one after the other: layer, first and last tile,
    what to add to a slot for the position of its key, the last slot before the
    ring's seam, and the interval of positions that some query sees. Then the
    table, flat. Then for each token the interval that it sees, `[b, t]` each,
    and its position.
  """
  geometry = layout_lib.Geometry.of(x["cache_k"], x["cache_v"], options.layout)
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
  scalars = (
    jnp.clip(layer, 0, geometry.layers - 1), first_tile, last_tile,
    turn + first_slot, seam, all_low, all_high,
  )  # fmt: skip
  per_row = [a.reshape(batch, -1)[:, :tokens] for a in (low, high, p)]
  return scalars, x["table"].reshape(-1), per_row


def _flash(
  places, table, numbers, q, cache_k, cache_v, *, options, tiling, interpret,
):  # fmt: skip
  """Calls the kernel.

  Returns:
    Out `[steps, groups, rows, h]` and lse `[steps, groups, 1, rows]`.
  """
  steps = q.shape[0]
  if cache_k.dtype == jnp.float32:
    terms = [q]
  else:
    terms = []
    for _ in range(tiling.parts):
      # Not by conversions, which XLA may take away as excess precision.
      rounded = lax.reduce_precision(q, exponent_bits=8, mantissa_bits=7)
      terms.append(rounded.astype(jnp.bfloat16))
      q -= rounded
  q = jnp.concatenate(terms, axis=2)
  column = jnp.arange(tiling.keys, dtype=jnp.int32)
  heads = tiling.keys // tiling.slots
  columns = jnp.stack([column // heads, column % heads])
  caches = [
    cache_tpu.stay(
      cache_tpu.reorder(cache, options.layout, tiling.order), interpret
    )
    for cache in (cache_k, cache_v)
  ]

  def each(*shape):
    return pl.BlockSpec((None, *shape), lambda b, *_: (b,) + (0,) * len(shape))

  in_place = pl.BlockSpec(memory_space=pl.ANY)
  groups, rows = tiling.groups, tiling.rows
  v_dim = cache_v.shape[-1]

  def tiles(cache):
    shape = list(cache.shape[-3:])
    shape[tiling.order.index("s") - 1] = tiling.slots
    return pltpu.VMEM((2, *shape), cache.dtype)

  return pl.pallas_call(
    functools.partial(
      _flash_kernel,
      options=options,
      tiling=tiling,
      block_size=caches[0].shape[tiling.order.index("s") - 4],
      width=table.shape[0] * tiling.steps // steps,
      alibi="alibi_slopes" in options.fields,
    ),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(places) + 1,
      grid=(steps,),
      in_specs=[
        each(*numbers.shape[1:]),
        each(*q.shape[1:]),
        pl.BlockSpec(columns.shape, lambda b, *_: (0, 0)),
        in_place,
        in_place,
      ],
      out_specs=[each(groups, rows, v_dim), each(groups, 1, rows)],
      scratch_shapes=[
        *map(tiles, caches),
        pltpu.VMEM((groups, rows, cache_tpu.LANES), jnp.float32),
        pltpu.VMEM((groups, rows, cache_tpu.LANES), jnp.float32),
        pltpu.VMEM((groups, rows, v_dim), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2, 2)),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((steps, groups, rows, v_dim), jnp.float32),
      jax.ShapeDtypeStruct((steps, groups, 1, rows), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",)
    ),
    interpret=interpret,
    name="decode_attention_flash",
  )(*places, table, numbers, q, columns, *caches)  # fmt: skip


def _flash_kernel(
  layer, first, last, turn, seam, all_low, all_high, table,
  numbers, q, columns, cache_k, cache_v, out, lse,
  tile_k, tile_v, largest, total, weighted, steps, sems,
  *, options, tiling, block_size, width, alibi,
):  # fmt: skip
  b = pl.program_id(0)
  *lead, blocks, _, _, _ = cache_k.shape
  slots_axis = tiling.order.index("s") - 1
  # The last tile of a block has slots of the tile before as well.
  overlap = 1 if block_size % tiling.slots else 0

  def locate(b, i):
    """Returns block, whether it is there, slot in it, and slots seen before."""
    page = lax.div(i, jnp.int32(tiling.per_block))
    block = table[lax.div(b, jnp.int32(tiling.steps)) * width + page]
    wanted = (i - page * tiling.per_block) * tiling.slots
    start = jnp.minimum(wanted, block_size - tiling.slots)
    there = (block >= 0) & (block < blocks)
    return jnp.clip(block, 0, blocks - 1), there, page, start, wanted - start

  def copies(b, i, buffer):
    block, _, _, start, _ = locate(b, i)
    if tiling.order != "bsnh":  # slots are an axis of tiles
      unit = (cache_tpu.sublanes(cache_k.dtype), cache_tpu.LANES)
      start = pl.multiple_of(start, unit[tiling.order == "bnhs"])
    at = (
      *cache_tpu.lead_index(layer[b], lead),
      block,
      *[slice(None)] * slots_axis,
      pl.ds(start, tiling.slots),
    )
    return [
      pltpu.make_async_copy(
        cache.at[at], tile.at[buffer], sems.at[kind, buffer]
      )
      for kind, (cache, tile) in enumerate(
        ((cache_k, tile_k), (cache_v, tile_v))
      )
    ]

  @pl.when(b == 0)
  def _():
    steps[0] = 0
    for copy in copies(0, first[0], 0):
      copy.start()

  largest[...] = jnp.full_like(largest, -jnp.inf)
  total[...] = jnp.zeros_like(total)
  weighted[...] = jnp.zeros_like(weighted)

  @pl.loop(first[b], last[b] + 1)
  def _(i):
    buffer = lax.rem(steps[0], jnp.int32(2))
    steps[0] = steps[0] + 1
    ends = i == last[b]

    @pl.when(jnp.logical_not(ends) | (b + 1 < pl.num_programs(0)))
    def _():
      following = jnp.minimum(b + 1, pl.num_programs(0) - 1)
      next_b = jnp.where(ends, following, b)
      next_i = jnp.where(ends, first[following], i + 1)
      for copy in copies(next_b, next_i, 1 - buffer):
        copy.start()

    for copy in copies(b, i, buffer):
      copy.wait()
    _, there, page, start, repeated = locate(b, i)
    slot0 = page * block_size + start

    def position(offset):
      slot = slot0 + offset
      out = slot + turn[b]
      if options.ring:
        out -= jnp.where(slot > seam[b], options.ring, 0)
      return out

    # Nothing that no query sees may reach a product: it may be NaN.
    @pl.when(
      (i <= first[b] + overlap)
      | ends
      | jnp.logical_not(there)
      | bool(options.ring)
    )
    def _():
      shape = tile_v.shape[1:]
      at = position(lax.broadcasted_iota(jnp.int32, shape, slots_axis))
      keep = (at >= all_low[b]) & (at < all_high[b]) & there
      values = tile_v[buffer].astype(jnp.float32)
      tile_v[buffer] = jnp.where(keep, values, 0.0).astype(tile_v.dtype)

    column = columns[0:1, :]
    keys_at = position(column)
    fresh = (column >= repeated) & there
    at_once = tiling.keys > tiling.slots
    for group in range(tiling.groups):
      if at_once:
        keys = tile_k[buffer].reshape(tiling.keys, tile_k.shape[-1])
        values = tile_v[buffer].reshape(tiling.keys, tile_v.shape[-1])
      elif tiling.order == "bsnh":
        keys, values = (
          _factor(tile[buffer])[:, group] for tile in (tile_k, tile_v)
        )
      else:
        keys, values = tile_k[buffer, group], tile_v[buffer, group]
      _step(
        numbers[group], q[group], keys, values, keys_at, fresh,
        columns[1:2, :] if at_once else None,
        largest.at[group], total.at[group], weighted.at[group],
        options=options, tiling=tiling, alibi=alibi,
      )  # fmt: skip

  some = total[:, :, 0:1] > 0
  safe = jnp.where(some, total[:, :, 0:1], 1.0)
  out[...] = weighted[...] / safe
  logarithms = jnp.where(some, largest[:, :, 0:1] + jnp.log(safe), -jnp.inf)
  for group in range(tiling.groups):
    lse[group] = logarithms[group].T


def _step(
  numbers, q, keys, values, keys_at, fresh, key_head, largest, total,
  weighted, *, options, tiling, alibi,
):  # fmt: skip
  """Adds one tile of keys to the running softmax."""
  by_row = numbers.T
  low, high, own, head = (by_row[:, i : i + 1] for i in range(4))
  floats = lax.bitcast_convert_type(by_row[:, 4:6], jnp.float32)
  visible = (keys_at >= low) & (keys_at < high) & fresh
  if key_head is not None:
    visible &= key_head == head
  by_columns = tiling.order == "bnhs"
  logits = _sum_of(_dot(q, keys, 0 if by_columns else 1), tiling.parts)
  logits *= floats[:, 0:1]
  if options.softcap:
    logits = options.softcap * jnp.tanh(logits / options.softcap)
  if alibi:
    distance = jnp.abs(own - keys_at).astype(jnp.float32)
    logits -= floats[:, 1:2] * distance
  logits = jnp.where(visible, logits, -jnp.inf)

  before = largest[:, 0:1]
  now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
  base = jnp.where(now == -jnp.inf, 0.0, now)
  shrink = jnp.exp(before - base)
  weights = jnp.exp(logits - base)
  largest[...] = jnp.broadcast_to(now, largest.shape)
  total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
  axis = 1 if by_columns else 0
  if values.dtype == jnp.float32:
    added = _dot(weights, values, axis)
  else:
    # In several terms, so that bfloat16 products lose nothing that counts.
    terms = []
    for _ in range(3 if options.out_dtype == "float32" else 2):
      terms.append(weights.astype(jnp.bfloat16))
      weights -= terms[-1].astype(jnp.float32)
    added = _sum_of(_dot(jnp.concatenate(terms), values, axis), len(terms))
  weighted[...] = weighted[...] * shrink + added


def _sum_of(terms, count):
  """Adds up `count` matrices that lie one below the other."""
  rows = terms.shape[0] // count
  out = terms[:rows]
  for i in range(1, count):
    out += terms[i * rows : (i + 1) * rows]
  return out


def _factor(a):
  """Returns what is multiplied: float32, or bfloat16 if it is shorter."""
  return a if a.dtype == jnp.float32 else a.astype(jnp.bfloat16)


def _dot(a, b, axis):
  """Contracts the last axis of a with one of b, in products that are exact."""
  b = _factor(b)
  return lax.dot_general(
    a,
    b,
    (((1,), (axis,)), ((), ())),
    precision=lax.Precision.HIGHEST if b.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
