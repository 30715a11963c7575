"""The cache update for TPUs in Pallas: rows move by DMA, the cache does not.

A kernel wants its operands with the last two axes in tiles, and XLA copies
what lies otherwise. How it lies follows from the shape: XLA orders the axes so
that tiles are full. So the kernels take the cache with its axes in that order,
which costs nothing, and `order` tells for which shapes they know it.

"bsnh"  tiles of heads and head_dim: one DMA writes a token's rows of all heads.
"bnsh"  tiles of slots and head_dim: a token is one row in a tile of each head.
        The kernel fetches the tiles, replaces the row, writes the tiles back.
"bnhs"  tiles of head_dim and slots, where head_dim is no multiple of 128: a
        token is one column in tiles of each head, replaced likewise.

Which slot each row goes to is computed in plain JAX from a few integers for
each token, and reaches the kernels as prefetched scalars.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from ..common import dispatch
from . import layout as layout_lib
from . import quantization

LANES = 128

# Rows that one DMA takes of a long run of tokens.
_RUN = 64

# Prefetched scalars lie in a memory of a megabyte.
_MAX_TOKENS = 1 << 15

# For tiles that are being rewritten.
_TILES_BYTES = 4 << 20


def sublanes(dtype: Any) -> int:
  """Returns the rows of a tile: 8 of 32 bits, or as many bytes."""
  return 32 // jnp.dtype(dtype).itemsize


def order(cache: Any, layout: str) -> str:
  """Returns the order of axes in which XLA keeps a cache; "" if not known.

  Args:
    cache: Its abstract value, in `layout`.
    layout: "bsnh" or "bnsh".
  """
  *_, slots, heads, dim = (cache.shape[layout.index(a) - 4] for a in "bsnh")
  packed = 4 // jnp.dtype(cache.dtype).itemsize
  if dim % LANES:
    return (
      "bnhs" if slots % LANES == 0 and dim % sublanes(cache.dtype) == 0 else ""
    )
  if layout == "bsnh" and (heads % 8 == 0 or heads in (1, 2, 4)[packed // 2 :]):
    return "bsnh"
  return "bnsh" if slots % sublanes(cache.dtype) == 0 else ""


def reorder(x: jax.Array, before: str, after: str) -> jax.Array:
  """Transposes the last four axes, given by their letters."""
  lead = x.ndim - 4
  axes = (lead + before.index(letter) for letter in after)
  return x.transpose(*range(lead), *axes)


def stay(cache: jax.Array, interpret: Any) -> Any:
  """Keeps XLA from moving a cache that fits to fast memory, all of it."""
  if interpret:
    return cache
  return pltpu.with_memory_space_constraint(cache, pltpu.HBM)


def cache_problem(cache_k: Any, cache_v: Any, layout: str) -> str | None:
  """Returns why Mosaic cannot work on a cache where it lies, or None.

  Args:
    cache_k: Abstract value of the keys.
    cache_v: The same of the values.
    layout: "bsnh" or "bnsh".
  """
  if dispatch.static_size((*cache_k.shape, *cache_v.shape)) is None:
    return "the cache has symbolic sizes"
  for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
    if 0 in cache.shape:
      return f"`{name}` is empty"
    if cache.dtype == jnp.float16:
      return f"`{name}` is float16, which Mosaic does not take"
    if not order(cache, layout):
      return (
        f"`{name}` is {layout_lib.text(cache)}, which does not fill tiles: a"
        " kernel would have the whole cache laid out anew. One of head_dim"
        f" and slots must be a multiple of {LANES}, and the other one of"
        f" {sublanes(cache.dtype)}"
      )
  if order(cache_k, layout) != order(cache_v, layout):
    return "keys and values do not lie in the same order"
  return None


def unsupported(
  avals: Sequence[Any],
  *,
  layout: str,
  ring: int,
  aligned: bool,
  uniform: layout_lib.Uniform,
) -> str | None:
  """Returns why the kernel cannot handle these operands, or None."""
  del ring, aligned, uniform
  cache_k, cache_v, new_k = avals[:3]
  if dispatch.static_size(new_k.shape) is None:
    return "the new tokens have symbolic sizes"
  if 0 in new_k.shape:
    return "there are no new tokens"
  tokens = new_k.shape[0] * new_k.shape[1 if layout == "bsnh" else 2]
  if tokens > _MAX_TOKENS:
    return f"there are {tokens} new tokens, more than {_MAX_TOKENS}"
  return cache_problem(cache_k, cache_v, layout)


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
  aligned: bool,
  uniform: layout_lib.Uniform,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
  """Writes new rows in place; operands as in `reference.update`.

  Args:
    cache_k: See `reference.update`, as for the others.
    cache_v: The same.
    new_k: The same.
    new_v: The same.
    index: The same.
    count: The same.
    layer: The same.
    table: The same.
    first_slot: The same.
    *scales: The same.
    layout: The same.
    ring: The same.
    aligned: Whether no two sequences share a row of the cache.
    uniform: The same.
    interpret: Passed on to `pallas_call`.

  Returns:
    The updated caches.
  """
  geometry = layout_lib.Geometry.of(cache_k, cache_v, layout)
  tokens_axis = 1 if layout == "bsnh" else 2
  tokens = new_k.shape[tokens_axis]
  if scales:
    new_k, new_v = (
      quantization.quantize(
        new, jnp.expand_dims(scale, tokens_axis)[..., None], cache_k.dtype
      )
      for new, scale in zip((new_k, new_v), scales)
    )
  position, write = layout_lib.written(index, count, tokens, ring)
  block, slot, held = layout_lib.locate(
    geometry, position, layer, table, first_slot, ring
  )
  slot = jnp.where(write & held, slot, -1)
  to = order(cache_k, layout)
  if to != layout:  # else it is the operand, which is written where it is
    cache_k, cache_v = (
      stay(reorder(cache, layout, to), interpret)
      for cache in (cache_k, cache_v)
    )
  places = (layer, block, slot)
  if to == "bsnh":
    caches = _write_rows(cache_k, cache_v, new_k, new_v, places, interpret)
  else:
    new_k, new_v = (reorder(x, layout, "bnsh") for x in (new_k, new_v))
    caches = _rewrite_tiles(
      cache_k, cache_v, new_k, new_v, places, to, aligned, interpret
    )
  k, v = (reorder(cache, to, layout) for cache in caches)
  return k, v


def lead_index(layer: Any, lead: Sequence[int]) -> tuple[Any, ...]:
  """Splits a layer's number into indices of the cache's leading axes."""
  out = []
  for size in reversed(lead[1:]):
    out.append(lax.rem(layer, jnp.int32(size)))
    layer = lax.div(layer, jnp.int32(size))
  return tuple(reversed([*out, layer])) if lead else ()


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


def _write_rows_kernel(
  layer, block, slot, whole, new_k, new_v, old_k, old_v, out_k, out_v, sems,
  *, batch, tokens, run, lead,
):  # fmt: skip
  del old_k, old_v  # the results' own memory
  chunks = tokens // run

  def copies(b, j, length):
    at = b * tokens + j
    to = (*lead_index(layer[b], lead), block[at], pl.ds(slot[at], length))
    return [
      pltpu.make_async_copy(new.at[b, pl.ds(j, length)], out.at[to], sems.at[i])
      for i, (new, out) in enumerate(((new_k, out_k), (new_v, out_v)))
    ]

  def each(act: Callable[[Any], None]) -> None:
    def one_by_one(b, first, last):
      @pl.loop(first, last)
      def _(j):
        @pl.when(slot[b * tokens + j] >= 0)
        def _():
          for copy in copies(b, j, 1):
            act(copy)

    @pl.loop(0, batch)
    def _(b):
      @pl.loop(0, chunks)
      def _(c):
        in_one_piece = whole[b * chunks + c] == 1

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
  columns = order == "bnhs"
  span = LANES if columns else sublanes(cache_k.dtype)
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
      batch=batch,
      visits=visits,
      span=span,
      abreast=abreast,
      lead=cache_k.shape[:-4],
      columns=columns,
    ),
    "kv_cache_rewrite_tiles",
    (layer, where[0].reshape(-1), where[1].reshape(-1)),
    (_masks(source >= 0, columns), *new_tiles),
    (cache_k, cache_v),
    [
      *scratch,
      *scratch,
      pltpu.VMEM((abreast, 8, LANES), jnp.int32),
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
  shape = (*lead, 8, LANES)
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


def _rewrite_tiles_kernel(
  layer, block, slot, mask, new_k, new_v, old_k, old_v, out_k, out_v,
  tile_k, tile_v, fresh_k, fresh_v, kept_mask, sems,
  *, batch, visits, span, abreast, lead, columns,
):  # fmt: skip
  del old_k, old_v  # the results' own memory

  def bits(x):
    return x if x.dtype == jnp.int32 else pltpu.bitcast(x, jnp.int32)

  def tiles_of(b, g):
    at = b * visits + g
    slots = pl.ds(pl.multiple_of(slot[at], span), span)
    rest = (slice(None), slots) if columns else (slots,)
    return (*lead_index(layer[b], lead), block[at], slice(None), *rest)

  def fetches(i, b, g):
    at = tiles_of(b, g)
    pairs = (
      (out_k.at[at], tile_k.at[i]), (out_v.at[at], tile_v.at[i]),
      (new_k.at[b, g], fresh_k.at[i]), (new_v.at[b, g], fresh_v.at[i]),
      (mask.at[b, g], kept_mask.at[i]),
    )  # fmt: skip
    return [pltpu.make_async_copy(*pair, sems.at[0]) for pair in pairs]

  def stores(i, b, g):
    at = tiles_of(b, g)
    pairs = ((tile_k.at[i], out_k.at[at]), (tile_v.at[i], out_v.at[at]))
    return [pltpu.make_async_copy(*pair, sems.at[1]) for pair in pairs]

  def replace(i):
    # Columns are the same in every row.
    new = kept_mask[i, 0:1] if columns else kept_mask[i]
    for tile, fresh in ((tile_k, fresh_k), (tile_v, fresh_v)):
      for n in range(tile.shape[1]):
        for lane in range(0, tile.shape[3], LANES):
          at = (i, n, slice(None), pl.ds(lane, LANES))
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

          @pl.when((chunk * abreast + i < batch) & (slot[b * visits + g] >= 0))
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
