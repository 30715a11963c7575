"""The kernel of decode attention on TPUs: a running softmax over tiles of keys.

See `pallas_tpu` for what a grid step is and in which order keys lie.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from ..cache import tiles_tpu
from . import reference


class Tiling(NamedTuple):
  """How the work of one call is cut.

  Attributes:
    order: Of the cache's axes.
    groups: Matrices of keys that a tile holds: 1 of all heads', or n.
    steps: Among which the query tokens of a sequence are divided.
    tokens: Of one step.
    rows: Query rows of a matrix, padded to whole tiles of registers.
    slots: Of the cache in one tile.
    keys: Columns of logits: slots, or slots * n.
    per_block: Tiles in a row or block of the cache.
    parts: bfloat16 numbers that one query element is split into.
  """

  order: tiles_tpu.Order
  groups: int
  steps: int
  tokens: int
  rows: int
  slots: int
  keys: int
  per_block: int
  parts: int


class Places(NamedTuple):
  """What the kernel is told of each grid step, as prefetched scalars.

  Attributes:
    layer: Of the cache.
    first: First tile, in the order of the sequence's positions or slots.
    last: Last tile.
    turn: To add to a slot for the position of its key.
    seam: The last slot before the ring's seam.
    all_low: First position that some query sees.
    all_high: First position after those that some query sees.
  """

  layer: Any
  first: Any
  last: Any
  turn: Any
  seam: Any
  all_low: Any
  all_high: Any


class _Refs(NamedTuple):
  """The kernel's memory: operands, results, and what it works in."""

  layer: Any
  first: Any
  last: Any
  turn: Any
  seam: Any
  all_low: Any
  all_high: Any
  table: Any
  numbers: Any
  q: Any
  columns: Any
  cache_k: Any
  cache_v: Any
  out: Any
  lse: Any
  tile_k: Any
  tile_v: Any
  largest: Any
  total: Any
  weighted: Any
  steps: Any
  sems: Any


class _Static(NamedTuple):
  """What the kernel is made for.

  Attributes:
    options: Of the primitive.
    tiling: How the work is cut.
    block_size: Slots of a block.
    width: Blocks of a sequence.
  """

  options: reference.Options
  tiling: Tiling
  block_size: int
  width: int


def flash(
  places: Places,
  table: jax.Array,
  numbers: jax.Array,
  q: jax.Array,
  caches: tuple[jax.Array, jax.Array],
  options: reference.Options,
  tiling: Tiling,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Calls the kernel.

  Args:
    places: Of each step.
    table: Blocks of each sequence, flat.
    numbers: `[steps, groups, 6, rows]` int32, of each query row: the interval
      of positions that it sees, its own position, its head, and the bits of its
      logits' factor and of its slope.
    q: `[steps, groups, rows, h]` float32.
    caches: Keys and values.
    options: Of the primitive.
    tiling: How the work is cut.
    interpret: Passed on to `pallas_call`.

  Returns:
    Out `[steps, groups, rows, h]` and lse `[steps, groups, 1, rows]`.
  """
  steps = q.shape[0]
  if caches[0].dtype != jnp.float32:
    q = _in_terms(q, tiling.parts)
  column = jnp.arange(tiling.keys, dtype=jnp.int32)
  heads = tiling.keys // tiling.slots
  columns = jnp.stack([column // heads, column % heads])
  keys, values = (
    tiles_tpu.stay(
      tiles_tpu.reorder(cache, options.layout.value, tiling.order), interpret
    )
    for cache in caches
  )

  def each(*shape):
    return pl.BlockSpec((None, *shape), lambda b, *_: (b,) + (0,) * len(shape))

  in_place = pl.BlockSpec(memory_space=pl.ANY)
  groups, rows = tiling.groups, tiling.rows
  v_dim = caches[1].shape[-1]

  def tiles(cache):
    shape = list(cache.shape[-3:])
    shape[tiling.order.index("s") - 1] = tiling.slots
    return pltpu.VMEM((2, *shape), cache.dtype)

  return pl.pallas_call(
    functools.partial(
      _flash_kernel,
      static=_Static(
        options,
        tiling,
        block_size=keys.shape[tiling.order.index("s") - 4],
        width=table.shape[0] * tiling.steps // steps,
      ),
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
        tiles(keys),
        tiles(values),
        pltpu.VMEM((groups, rows, tiles_tpu.LANES), jnp.float32),
        pltpu.VMEM((groups, rows, tiles_tpu.LANES), jnp.float32),
        pltpu.VMEM((groups, rows, v_dim), jnp.float32),
        pltpu.SMEM((1,), jnp.int32),
        pltpu.SemaphoreType.DMA((2, 2)),
      ],
    ),
    out_shape=[
      jax.ShapeDtypeStruct((steps, groups, rows, v_dim), jnp.float32),
      jax.ShapeDtypeStruct((steps, groups, 1, rows), jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
    interpret=interpret,
    name="decode_attention_flash",
  )(*places, table, numbers, q, columns, keys, values)


def _in_terms(q, parts):
  """Writes q as a sum of bfloat16 numbers, one below the other."""
  terms = []
  for _ in range(parts):
    # Not by conversions, which XLA may take away as excess precision.
    rounded = lax.reduce_precision(q, exponent_bits=8, mantissa_bits=7)
    terms.append(rounded.astype(jnp.bfloat16))
    q -= rounded
  return jnp.concatenate(terms, axis=2)


class _Slots(NamedTuple):
  """Where a tile lies.

  Attributes:
    block: Of the cache.
    there: Whether the cache has that block.
    page: Number of the block in the sequence.
    start: First slot of the tile in the block.
    repeated: How many of its slots the tile before has as well.
  """

  block: Any
  there: Any
  page: Any
  start: Any
  repeated: Any


def _locate(r: _Refs, static: _Static, b: Any, i: Any) -> _Slots:
  """Finds tile i of step b."""
  tiling, block_size = static.tiling, static.block_size
  blocks = r.cache_k.shape[-4]
  page = lax.div(i, jnp.int32(tiling.per_block))
  sequence = lax.div(b, jnp.int32(tiling.steps))
  block = r.table[sequence * static.width + page]
  wanted = (i - page * tiling.per_block) * tiling.slots
  start = jnp.minimum(wanted, block_size - tiling.slots)
  there = (block >= 0) & (block < blocks)
  return _Slots(
    jnp.clip(block, 0, blocks - 1), there, page, start, wanted - start
  )


def _copies(
  r: _Refs, static: _Static, b: Any, i: Any, buffer: Any
) -> list[Any]:
  """Returns the DMAs that bring tile i of step b into a buffer."""
  tiling = static.tiling
  slots = _locate(r, static, b, i)
  start = slots.start
  # Slots are an axis of tiles.
  if tiling.order is not tiles_tpu.Order.BY_TOKENS:
    unit = (tiles_tpu.sublanes(r.cache_k.dtype), tiles_tpu.LANES)
    by_columns = tiling.order is tiles_tpu.Order.BY_COLUMNS
    start = pl.multiple_of(start, unit[by_columns])
  at = (
    *tiles_tpu.lead_index(r.layer[b], r.cache_k.shape[:-4]),
    slots.block,
    *[slice(None)] * (tiling.order.index("s") - 1),
    pl.ds(start, tiling.slots),
  )
  return [
    pltpu.make_async_copy(
      cache.at[at], tile.at[buffer], r.sems.at[kind, buffer]
    )
    for kind, (cache, tile) in enumerate(
      ((r.cache_k, r.tile_k), (r.cache_v, r.tile_v))
    )
  ]


def _flash_kernel(*refs: Any, static: _Static) -> None:
  r = _Refs(*refs)
  b = pl.program_id(0)

  @pl.when(b == 0)
  def _():
    r.steps[0] = 0
    for copy in _copies(r, static, 0, r.first[0], 0):
      copy.start()

  r.largest[...] = jnp.full_like(r.largest, -jnp.inf)
  r.total[...] = jnp.zeros_like(r.total)
  r.weighted[...] = jnp.zeros_like(r.weighted)

  @pl.loop(r.first[b], r.last[b] + 1)
  def _(i):
    buffer = lax.rem(r.steps[0], jnp.int32(2))
    r.steps[0] = r.steps[0] + 1
    ends = i == r.last[b]

    @pl.when(jnp.logical_not(ends) | (b + 1 < pl.num_programs(0)))
    def _():
      following = jnp.minimum(b + 1, pl.num_programs(0) - 1)
      next_b = jnp.where(ends, following, b)
      next_i = jnp.where(ends, r.first[following], i + 1)
      for copy in _copies(r, static, next_b, next_i, 1 - buffer):
        copy.start()

    for copy in _copies(r, static, b, i, buffer):
      copy.wait()
    _use_tile(r, static, b, i, buffer)

  some = r.total[:, :, 0:1] > 0
  safe = jnp.where(some, r.total[:, :, 0:1], 1.0)
  r.out[...] = r.weighted[...] / safe
  logarithms = jnp.where(some, r.largest[:, :, 0:1] + jnp.log(safe), -jnp.inf)
  for group in range(static.tiling.groups):
    r.lse[group] = logarithms[group].T


def _use_tile(r: _Refs, static: _Static, b: Any, i: Any, buffer: Any) -> None:
  """Adds a tile that has come to the running softmax of every group."""
  options, tiling = static.options, static.tiling
  slots = _locate(r, static, b, i)
  slot0 = slots.page * static.block_size + slots.start

  def position(offset):
    slot = slot0 + offset
    out = slot + r.turn[b]
    if options.ring:
      out -= jnp.where(slot > r.seam[b], options.ring, 0)
    return out

  # The last tile of a block has slots of the tile before as well.
  overlap = 1 if static.block_size % tiling.slots else 0

  # Nothing that no query sees may reach a product: it may be NaN.
  @pl.when(
    (i <= r.first[b] + overlap)
    | (i == r.last[b])
    | jnp.logical_not(slots.there)
    | bool(options.ring)
  )
  def _():
    _clear_unseen(r, static, b, buffer, position, slots.there)

  column = r.columns[0:1, :]
  keys_at = position(column)
  fresh = (column >= slots.repeated) & slots.there
  at_once = tiling.keys > tiling.slots
  for group in range(tiling.groups):
    if at_once:
      keys = r.tile_k[buffer].reshape(tiling.keys, r.tile_k.shape[-1])
      values = r.tile_v[buffer].reshape(tiling.keys, r.tile_v.shape[-1])
    elif tiling.order is tiles_tpu.Order.BY_TOKENS:
      keys, values = (
        _factor(tile[buffer])[:, group] for tile in (r.tile_k, r.tile_v)
      )
    else:
      keys, values = r.tile_k[buffer, group], r.tile_v[buffer, group]
    key_head = r.columns[1:2, :] if at_once else None
    logits = _logits(
      static, r.numbers[group], r.q[group], keys, (keys_at, fresh, key_head)
    )
    running = tuple(x.at[group] for x in (r.largest, r.total, r.weighted))
    _add(static, logits, values, running)


def _clear_unseen(
  r: _Refs,
  static: _Static,
  b: Any,
  buffer: Any,
  position: Callable[[Any], Any],
  there: Any,
) -> None:
  """Puts 0 in place of the values that no query sees."""
  slots_axis = static.tiling.order.index("s") - 1
  shape = r.tile_v.shape[1:]
  at = position(lax.broadcasted_iota(jnp.int32, shape, slots_axis))
  keep = (at >= r.all_low[b]) & (at < r.all_high[b]) & there
  values = r.tile_v[buffer].astype(jnp.float32)
  r.tile_v[buffer] = jnp.where(keep, values, 0.0).astype(r.tile_v.dtype)


def _logits(static, numbers, q, keys, columns):
  """Returns the logits of one tile, -inf where a row does not see a key.

  Args:
    static: What the kernel is made for.
    numbers: Of each query row; see `flash`.
    q: The rows, in terms.
    keys: A matrix of keys, or of keys of all heads.
    columns: Position of each key, whether it counts, and its head or None.
  """
  options, tiling = static.options, static.tiling
  keys_at, fresh, key_head = columns
  by_row = numbers.T
  low, high, own, head = (by_row[:, i : i + 1] for i in range(4))
  floats = lax.bitcast_convert_type(by_row[:, 4:6], jnp.float32)
  visible = (keys_at >= low) & (keys_at < high) & fresh
  if key_head is not None:
    visible &= key_head == head
  by_columns = tiling.order is tiles_tpu.Order.BY_COLUMNS
  logits = _sum_of(_dot(q, keys, 0 if by_columns else 1), tiling.parts)
  logits *= floats[:, 0:1]
  if options.softcap:
    logits = options.softcap * jnp.tanh(logits / options.softcap)
  if "alibi_slopes" in options.fields:
    distance = jnp.abs(own - keys_at).astype(jnp.float32)
    logits -= floats[:, 1:2] * distance
  return jnp.where(visible, logits, -jnp.inf)


def _add(static, logits, values, running):
  """Adds one tile to the running softmax: its maximum, sum and weighted sum."""
  largest, total, weighted = running
  before = largest[:, 0:1]
  now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
  base = jnp.where(now == -jnp.inf, 0.0, now)
  shrink = jnp.exp(before - base)
  weights = jnp.exp(logits - base)
  largest[...] = jnp.broadcast_to(now, largest.shape)
  total[...] = total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
  axis = 1 if static.tiling.order is tiles_tpu.Order.BY_COLUMNS else 0
  if values.dtype == jnp.float32:
    added = _dot(weights, values, axis)
  else:
    # In several terms, so that bfloat16 products lose nothing that counts.
    terms = []
    for _ in range(3 if static.options.out_dtype == "float32" else 2):
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
