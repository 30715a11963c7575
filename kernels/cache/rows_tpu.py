"""Writing new rows into a cache on TPUs: rows move by DMA, the cache does not.

The kernels take the cache in the order that it has in memory; see `tiles_tpu`.
In the order "bsnh" one DMA writes a token's rows of all heads. In "bnsh" and
"bnhs" a token is a row or a column of tiles: the kernel fetches those, replaces
it, and writes them back.

Which slot each row goes to is computed in plain JAX from a few integers for
each token, and reaches the kernels as prefetched scalars.
"""

from collections.abc import Callable, Mapping
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from ..common import arrays
from . import addressing, layouts, rows, tiles_tpu

# Rows that one DMA takes of a long run of tokens.
_RUN = 64

# Prefetched scalars lie in a memory of a megabyte.
_MAX_TOKENS = 1 << 15

# For tiles that are being rewritten.
_TILES_BYTES = 4 << 20


def unsupported(
  cache_k: Any, cache_v: Any, new_k: Any, layout: layouts.Layout
) -> str | None:
  """Returns why the kernel cannot write these rows, or None.

  Args:
    cache_k: Abstract value of the keys.
    cache_v: The same of the values.
    new_k: The same of the new keys.
    layout: Order of their axes.
  """
  if arrays.static_size(new_k.shape) is None:
    return "the new tokens have symbolic sizes"
  if 0 in new_k.shape:
    return "there are no new tokens"
  tokens = new_k.shape[0] * new_k.shape[layout.tokens_axis]
  if tokens > _MAX_TOKENS:
    return f"there are {tokens} new tokens, more than {_MAX_TOKENS}"
  return tiles_tpu.cache_problem(cache_k, cache_v, layout)


def write(
  x: Mapping[str, jax.Array],
  at: addressing.Addressing,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Writes new rows in place; as `rows.write`.

  Args:
    x: Operands by name.
    at: How they address the cache. If `aligned`, no two sequences may share a
      row of the cache.
    interpret: Passed on to `pallas_call`.

  Returns:
    The updated caches.
  """
  cache_k, cache_v, layout = x["cache_k"], x["cache_v"], at.layout
  geometry = addressing.Geometry.of(cache_k, cache_v, layout)
  new_k, new_v = rows.quantized(x, at)
  places = addressing.Places.of(x)
  tokens = new_k.shape[layout.tokens_axis]
  position, written = addressing.written(
    places.index, places.count, tokens, at.ring
  )
  block, slot, held = addressing.locate(geometry, position, places, at.ring)
  slot = jnp.where(written & held, slot, -1)
  to = tiles_tpu.order(cache_k, layout)
  assert to is not None  # `cache_problem` has refused such caches
  if not to.is_that_of(layout):  # else it is the operand, written where it is
    cache_k, cache_v = (
      tiles_tpu.stay(tiles_tpu.reorder(cache, layout.value, to), interpret)
      for cache in (cache_k, cache_v)
    )
  where = (places.layer, block, slot)
  if to is tiles_tpu.Order.BY_TOKENS:
    caches = _write_rows(cache_k, cache_v, new_k, new_v, where, interpret)
  else:
    new_k, new_v = map(layout.to_heads_first, (new_k, new_v))
    caches = _rewrite_tiles(
      cache_k, cache_v, new_k, new_v, where, to, at.aligned, interpret
    )
  k, v = (tiles_tpu.reorder(cache, to, layout.value) for cache in caches)
  return k, v


def _call(kernel, name, scalars, arrays, caches, scratch, interpret):
  """Calls a kernel that rewrites `caches`, its last operands, in place."""
  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  first = len(scalars) + len(arrays)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=len(scalars),
      grid=(),
      in_specs=[anywhere] * (len(arrays) + len(caches)),
      out_specs=[anywhere] * len(caches),
      scratch_shapes=scratch,
    ),
    out_shape=[_like(c) for c in caches],
    input_output_aliases={first + i: i for i in range(len(caches))},
    interpret=interpret,
    name=name,
  )(*scalars, *arrays, *caches)


def _like(x):
  """Returns the type of x, its memory included where that is prescribed."""
  space = getattr(jax.typeof(x), "memory_space", None)
  if space == pltpu.HBM:
    return pltpu.HBM(x.shape, x.dtype)
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


# ---- A token's rows are whole tiles.


def _write_rows(cache_k, cache_v, new_k, new_v, places, interpret):
  layer, block, slot = places
  batch, tokens = slot.shape
  run = min(tokens, _RUN)
  chunks = tokens // run
  # Runs of tokens that lie side by side in the cache go in one piece.
  blocks, slots = (
    x[:, : chunks * run].reshape(batch, chunks, run) for x in (block, slot)
  )
  joined = (
    (slots[..., :1] >= 0)
    & (slots == slots[..., :1] + jnp.arange(run, dtype=jnp.int32))
    & (blocks == blocks[..., :1])
  )
  whole = jnp.all(joined, axis=-1).astype(jnp.int32)
  return _call(
    functools.partial(
      _write_rows_kernel,
      batch=batch,
      tokens=tokens,
      run=run,
      lead=cache_k.shape[:-4],
    ),
    "kv_cache_write_rows",
    (layer, block.reshape(-1), slot.reshape(-1), whole.reshape(-1)),
    (new_k, new_v),
    (cache_k, cache_v),
    [pltpu.SemaphoreType.DMA((2,))],
    interpret,
  )


class _RowRefs(NamedTuple):
  """Memory of the kernel that writes rows: scalars, operands, results.

  The caches among the operands are the results' own memory.
  """

  layer: Any
  block: Any
  slot: Any
  whole: Any
  new_k: Any
  new_v: Any
  old_k: Any
  old_v: Any
  out_k: Any
  out_v: Any
  sems: Any


def _write_rows_kernel(
  *refs: Any, batch: int, tokens: int, run: int, lead: tuple[int, ...]
) -> None:
  r = _RowRefs(*refs)
  chunks = tokens // run

  def copies(b, j, length):
    at = b * tokens + j
    to = (
      *tiles_tpu.lead_index(r.layer[b], lead),
      r.block[at],
      pl.ds(r.slot[at], length),
    )
    return [
      pltpu.make_async_copy(
        new.at[b, pl.ds(j, length)], out.at[to], r.sems.at[i]
      )
      for i, (new, out) in enumerate(((r.new_k, r.out_k), (r.new_v, r.out_v)))
    ]

  def each(act: Callable[[Any], None]) -> None:
    def one_by_one(b, first, last):
      @pl.loop(first, last)
      def _(j):
        @pl.when(r.slot[b * tokens + j] >= 0)
        def _():
          for copy in copies(b, j, 1):
            act(copy)

    @pl.loop(0, batch)
    def _(b):
      @pl.loop(0, chunks)
      def _(c):
        in_one_piece = r.whole[b * chunks + c] == 1

        @pl.when(in_one_piece)
        def _():
          for copy in copies(b, c * run, run):
            act(copy)

        if run > 1:

          @pl.when(jnp.logical_not(in_one_piece))
          def _():
            one_by_one(b, c * run, (c + 1) * run)

      if tokens % run:
        one_by_one(b, chunks * run, tokens)

  each(lambda copy: copy.start())
  each(lambda copy: copy.wait())


# ---- A token is a row, or a column, in a tile of each head.


def _rewrite_tiles(
  cache_k, cache_v, new_k, new_v, places, order, aligned, interpret
):
  layer, block, slot = places
  batch, tokens = slot.shape
  columns = order is tiles_tpu.Order.BY_COLUMNS
  span = tiles_tpu.LANES if columns else tiles_tpu.sublanes(cache_k.dtype)
  # A visit is to one tile, by tokens one after the other.
  visits = (tokens + span - 2) // span + 1
  size = cache_k.shape[-1 if columns else -2]
  tile = jnp.where(slot >= 0, block * (size // span) + slot // span, -1)
  before = jnp.pad(tile, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
  visit = jnp.cumsum((slot >= 0) & (tile != before), axis=1) - 1
  visit = jnp.where(slot >= 0, visit, visits)  # dropped
  sequence = jnp.arange(batch)[:, None]
  token = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), slot.shape)
  source = jnp.full((batch, visits, span), -1, jnp.int32)
  source = source.at[sequence, visit, slot % span].set(token, mode="drop")
  where = jnp.full((2, batch, visits), -1, jnp.int32)
  where = where.at[:, sequence, visit].set(
    jnp.stack([block, slot // span * span]), mode="drop"
  )

  def tiles(new):
    picked = jnp.take_along_axis(
      new[:, :, None], jnp.maximum(source, 0)[:, None, :, :, None], axis=3
    )
    picked = picked.swapaxes(1, 2)  # [b, visits, n, span, h]
    return picked.swapaxes(-1, -2) if columns else picked

  new_tiles = [tiles(new) for new in (new_k, new_v)]
  bytes_each = sum(
    2 * math.prod(new.shape[2:]) * new.dtype.itemsize for new in new_tiles
  )
  abreast = min(batch, max(1, _TILES_BYTES // bytes_each)) if aligned else 1
  scratch = [
    pltpu.VMEM((abreast, *new.shape[2:]), new.dtype) for new in new_tiles
  ]
  return _call(
    functools.partial(
      _rewrite_tiles_kernel,
      static=_Visits(batch, visits, span, abreast, cache_k.shape[:-4], columns),
    ),
    "kv_cache_rewrite_tiles",
    (layer, where[0].reshape(-1), where[1].reshape(-1)),
    (_masks(source >= 0, columns), *new_tiles),
    (cache_k, cache_v),
    [
      *scratch,
      *scratch,
      pltpu.VMEM((abreast, 8, tiles_tpu.LANES), jnp.int32),
      pltpu.SemaphoreType.DMA((2,)),
    ],
    interpret,
  )


def _masks(written, columns):
  """Spells which rows or columns of tiles are new as bits of registers.

  Args:
    written: `[b, visits, span]`.
    columns: Whether these are columns.

  Returns:
    `[b, visits, 8, 128]` int32: each word of a register holds one element, or
    several of consecutive rows, the first in the lowest bits.
  """
  *lead, span = written.shape
  shape = (*lead, 8, tiles_tpu.LANES)
  if columns:
    return jnp.broadcast_to(
      jnp.where(written, -1, 0).astype(jnp.int32)[:, :, None], shape
    )
  packed = span // 8
  words = written.reshape(*lead, 8, packed)
  size = 32 // packed
  ones = jnp.uint32((1 << size) - 1)
  shifted = jnp.where(words, ones, 0) << (
    size * jnp.arange(packed, dtype="uint32")
  )
  bits = jnp.sum(shifted, axis=-1, dtype=jnp.uint32)
  bits = lax.bitcast_convert_type(bits, jnp.int32)[..., None]
  return jnp.broadcast_to(bits, shape)


class _TileRefs(NamedTuple):
  """Memory of the kernel that rewrites tiles: as in `_RowRefs`, and buffers."""

  layer: Any
  block: Any
  slot: Any
  mask: Any
  new_k: Any
  new_v: Any
  old_k: Any
  old_v: Any
  out_k: Any
  out_v: Any
  tile_k: Any
  tile_v: Any
  fresh_k: Any
  fresh_v: Any
  kept_mask: Any
  sems: Any


class _Visits(NamedTuple):
  """What the kernel that rewrites tiles is made for.

  Attributes:
    batch: b.
    visits: Tiles that a sequence's tokens may lie in.
    span: Slots of a tile.
    abreast: Sequences whose tiles are in flight at a time.
    lead: Sizes of the caches' leading axes.
    columns: Whether a token is a column of a tile.
  """

  batch: int
  visits: int
  span: int
  abreast: int
  lead: tuple[int, ...]
  columns: bool


def _rewrite_tiles_kernel(*refs: Any, static: _Visits) -> None:
  r = _TileRefs(*refs)
  batch, visits, span, abreast, lead, columns = static

  def bits(x):
    return x if x.dtype == jnp.int32 else pltpu.bitcast(x, jnp.int32)

  def tiles_of(b, g):
    at = b * visits + g
    slots = pl.ds(pl.multiple_of(r.slot[at], span), span)
    rest = (slice(None), slots) if columns else (slots,)
    return (
      *tiles_tpu.lead_index(r.layer[b], lead),
      r.block[at],
      slice(None),
      *rest,
    )

  def fetches(i, b, g):
    at = tiles_of(b, g)
    pairs = (
      (r.out_k.at[at], r.tile_k.at[i]), (r.out_v.at[at], r.tile_v.at[i]),
      (r.new_k.at[b, g], r.fresh_k.at[i]), (r.new_v.at[b, g], r.fresh_v.at[i]),
      (r.mask.at[b, g], r.kept_mask.at[i]),
    )  # fmt: skip
    return [pltpu.make_async_copy(*pair, r.sems.at[0]) for pair in pairs]

  def stores(i, b, g):
    at = tiles_of(b, g)
    pairs = ((r.tile_k.at[i], r.out_k.at[at]), (r.tile_v.at[i], r.out_v.at[at]))
    return [pltpu.make_async_copy(*pair, r.sems.at[1]) for pair in pairs]

  def replace(i):
    # Columns are the same in every row.
    new = r.kept_mask[i, 0:1] if columns else r.kept_mask[i]
    for tile, fresh in ((r.tile_k, r.fresh_k), (r.tile_v, r.fresh_v)):
      for n in range(tile.shape[1]):
        for lane in range(0, tile.shape[3], tiles_tpu.LANES):
          at = (i, n, slice(None), pl.ds(lane, tiles_tpu.LANES))
          merged = (bits(fresh[at]) & new) | (bits(tile[at]) & ~new)
          tile[at] = pltpu.bitcast(merged, tile.dtype)

  @pl.loop(0, visits)
  def _(g):
    @pl.loop(0, (batch + abreast - 1) // abreast)
    def _(chunk):
      def each(act):
        @pl.loop(0, abreast)
        def _(i):
          # Past the last sequence, the last one's scalars are only looked at.
          b = jnp.minimum(chunk * abreast + i, batch - 1)

          @pl.when(
            (chunk * abreast + i < batch) & (r.slot[b * visits + g] >= 0)
          )
          def _():
            act(i, b)

      def all_of(copies, method):
        def act(i, b):
          for copy in copies(i, b, g):
            getattr(copy, method)()

        each(act)

      all_of(fetches, "start")
      all_of(fetches, "wait")
      each(lambda i, b: replace(i))
      all_of(stores, "start")
      all_of(stores, "wait")
