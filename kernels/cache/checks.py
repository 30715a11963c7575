"""Checks of caches and of what addresses them, and the form that ops take."""

import dataclasses
from typing import Any

import jax
from jax import core
import jax.numpy as jnp
import numpy as np

from ..common import options
from . import addressing, layouts

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED_DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")


@dataclasses.dataclass(frozen=True)
class Request:
  """A cache and its addressing as a user gives them; see `kv_cache.update`.

  Nothing of it is checked but the layout.
  """

  cache_k: Any
  cache_v: Any
  index: Any
  lengths: Any
  layer: Any
  layout: layouts.Layout
  ring: Any
  k_scale: Any
  v_scale: Any
  block_table: Any
  cache_batch_index: Any


@dataclasses.dataclass(frozen=True)
class Cache:
  """The caches and their addressing in the form that the primitives take.

  The caches keep the shapes that the user gave them: XLA does not update a
  reshaped parameter in place, but copies it.

  Attributes:
    k: `[..., r, s, n, h]` or `[..., r, n, s, h]`.
    v: Like `k`, with its own h.
    places: Where the sequences and their tokens lie.
    scales: `(k_scale, v_scale)`, both `[b, n]` float32, or ().
    at: The rest of the addressing.
    geometry: Sizes of the caches.
  """

  k: jax.Array
  v: jax.Array
  places: addressing.Places
  scales: tuple[jax.Array, ...]
  at: addressing.Addressing
  geometry: addressing.Geometry

  @property
  def capacity(self) -> Any:
    """Returns how many slots a sequence has."""
    return self.places.table.shape[1] * self.geometry.block_size

  @property
  def addresses(self) -> dict[str, jax.Array]:
    """Returns the operands that say where rows lie, by name."""
    places = self.places
    return {
      "index": places.index,
      "count": places.count,
      "layer": places.layer,
      "table": places.table,
      "first_slot": places.first_slot,
    }


def canonical_layout(layout: Any) -> layouts.Layout:
  """Returns the layout of this name; raises ValueError for any other name."""
  return layouts.Layout(options.one_of("layout", layout, layouts.NAMES))


def is_quantized(dtype: Any) -> bool:
  """Returns whether a cache of `dtype` needs scales."""
  return jnp.dtype(dtype).name in QUANTIZED_DTYPES


def text(array: Any) -> str:
  """Writes an array's type as `float32[2, 3]`."""
  return f"{array.dtype.name}[{', '.join(map(str, array.shape))}]"


# Positions, blocks and layers are int32 in the kernels.
_INT32 = np.iinfo(np.int32)

# A position that is in no cache, and that a number of tokens may be added to or
# taken from without leaving int32.
NOWHERE = -(2**30)


def _int32(name: str, value: Any, beyond: int | None) -> jax.Array:
  """Returns integers as int32; see `integers`."""
  wide = value
  if not isinstance(value, jax.Array):
    # Before JAX sees them: without x64 it would cut them to 32 bits.
    try:
      wide = np.asarray(value)
    except (TypeError, ValueError):
      wide = options.array(name, value)
    if wide.dtype.kind == "O":  # integers beyond 64 bits, or not an array
      whole = all(isinstance(one, int) for one in np.ravel(wide))
      wide = wide if whole and wide.size else options.array(name, value)
    elif wide.size == 0 and not isinstance(value, np.ndarray):
      wide = options.array(name, value)  # of nothing, the dtype is a guess
  kind = wide.dtype
  objects = kind.kind == "O"
  if not objects and not jnp.issubdtype(kind, jnp.integer):
    shown = wide if isinstance(wide, jax.Array) else options.array(name, value)
    raise TypeError(f"`{name}` must hold integers, but got `{text(shown)}`.")
  fits = not objects and (
    np.iinfo(kind).max <= _INT32.max and np.iinfo(kind).min >= _INT32.min
  )
  if fits:
    return jnp.asarray(wide, jnp.int32)
  if is_known(wide):
    known = np.asarray(wide)
    outside = known[(known > _INT32.max) | (known < _INT32.min)]
    if outside.size:
      raise ValueError(
        f"`{name}` must lie in [-2^31, 2^31), but got {outside.flat[0]}."
      )
    return jnp.asarray(known.astype(np.int32))
  if beyond is None:
    least = 0 if np.iinfo(kind).min == 0 else _INT32.min
    return jnp.clip(wide, least, _INT32.max).astype(jnp.int32)
  outside = wide > _INT32.max
  if np.iinfo(kind).min < 0:
    outside |= wide < _INT32.min
  return jnp.where(outside, beyond, wide.astype(jnp.int32)).astype(jnp.int32)


def integers(
  name: str,
  value: Any,
  batch: Any,
  tail: tuple = (),
  beyond: int | None = None,
) -> jax.Array:
  """Returns int32 `[b, *tail]` from an integer scalar or `[b, *tail]` array.

  Args:
    name: Of the argument.
    value: Integers of any width.
    batch: b.
    tail: Sizes after b.
    beyond: What stands for numbers that int32 cannot hold and that are not
      known yet; the nearest that it can hold, if None.

  Returns:
    `[b, *tail]`.

  Raises:
    TypeError: If they are not integers.
    ValueError: If the shape does not fit, or a number that is known lies
      outside of int32.
  """
  array = _int32(name, value, beyond)
  if array.ndim == 0 and not tail:
    return jnp.broadcast_to(array, (batch,))
  if array.shape != (batch, *tail):
    expected = ", ".join(map(str, (batch, *tail)))
    raise ValueError(
      f"`{name}` must be {'' if tail else 'a scalar or '}of shape [{expected}],"
      f" one for each sequence, but got `{text(options.array(name, value))}`."
    )
  return array


def _check_caches(cache_k, cache_v, stacked, layout):
  rank = 5 if stacked else 4
  for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
    if cache.ndim != rank:
      axes = ", ".join((["layers"] if stacked else []) + list(layout.value))
      hint = " Pass `layer` with a stacked cache." if cache.ndim == 5 else ""
      raise ValueError(
        f"`{name}` must have {rank} axes [{axes}], but got"
        f" `{text(cache)}`.{hint}"
      )
    if cache.dtype.name not in FLOAT_DTYPES + QUANTIZED_DTYPES:
      raise TypeError(
        f"`{name}` must be one of"
        f" {', '.join(FLOAT_DTYPES + QUANTIZED_DTYPES)}, but got"
        f" `{text(cache)}`."
      )
  if cache_k.dtype != cache_v.dtype or cache_k.shape[:-1] != cache_v.shape[:-1]:
    raise ValueError(
      "`cache_k` and `cache_v` must have the same dtype and the same shape but"
      f" for the last axis, but got `{text(cache_k)}` and `{text(cache_v)}`."
    )


def check_rank_of_rows(
  new_k: jax.Array, new_v: jax.Array, layout: layouts.Layout
) -> None:
  """Raises ValueError unless the new rows have 4 axes."""
  if new_k.ndim != 4 or new_v.ndim != 4:
    raise ValueError(
      f"`new_k` and `new_v` must have 4 axes [{layout.words('t', 'n')}], but"
      f" got `{text(new_k)}` and `{text(new_v)}`."
    )


def check_rows(
  cache: Cache, new_k: jax.Array, new_v: jax.Array, batch: Any
) -> None:
  """Checks the new rows against the caches.

  Args:
    cache: Canonical caches.
    new_k: `[b, t, n, h]`, in the order of the layout.
    new_v: The same, with the values' h.
    batch: b.

  Raises:
    TypeError: If a dtype does not fit.
    ValueError: If a shape does not fit.
  """
  g = cache.geometry
  layout = cache.at.layout
  tokens = new_k.shape[layout.tokens_axis]
  for name, new, cache_name, dim in (
    ("new_k", new_k, "cache_k", g.k_dim),
    ("new_v", new_v, "cache_v", g.v_dim),
  ):
    expected = (batch, *layout.order(tokens, g.heads), dim)
    if new.shape != expected:
      raise ValueError(
        f"`{name}` must have the shape [{', '.join(map(str, expected))}] that"
        f" goes with `{cache_name}`, but got `{text(new)}`."
      )
    if is_quantized(cache.k.dtype):
      if new.dtype.name not in FLOAT_DTYPES:
        raise TypeError(
          f"`{name}` must be one of {', '.join(FLOAT_DTYPES)}, to be quantised"
          f" to {cache.k.dtype.name}, but got `{text(new)}`."
        )
      if new.dtype != new_k.dtype:
        raise TypeError(
          "`new_k` and `new_v` must have the same dtype, but got"
          f" `{text(new_k)}` and `{text(new_v)}`."
        )
    elif new.dtype != cache.k.dtype:
      raise TypeError(
        f"`{name}` must have the dtype of `{cache_name}`, {cache.k.dtype.name},"
        f" but got `{text(new)}`. Cast it first."
      )


def _scale(name, value, batch, heads):
  scale = options.array(name, value)
  if not jnp.issubdtype(scale.dtype, jnp.floating):
    raise TypeError(f"`{name}` must be floating, but got `{text(scale)}`.")
  if scale.shape not in ((), (heads,), (batch, heads)):
    raise ValueError(
      f"`{name}` must be a scalar, [{heads}] (one for each head) or"
      f" [{batch}, {heads}], but got `{text(scale)}`."
    )
  return jnp.broadcast_to(scale.astype(jnp.float32), (batch, heads))


def _scales(request, dtype, batch, heads):
  """Returns both scales `[b, n]`, or () for a cache without any."""
  if is_quantized(dtype):
    if request.k_scale is None or request.v_scale is None:
      raise ValueError(
        f"`k_scale` and `v_scale` must be given with a cache of {dtype.name}."
      )
    return (
      _scale("k_scale", request.k_scale, batch, heads),
      _scale("v_scale", request.v_scale, batch, heads),
    )
  if request.k_scale is not None or request.v_scale is not None:
    raise ValueError(
      "`k_scale` and `v_scale` must not be given with a cache of"
      f" {dtype.name}: only int8 and float8 caches are quantised."
    )
  return ()


def _layers(layer, batch):
  """Returns the layer of each sequence, `[b]`."""
  if layer is None:
    return jnp.zeros((batch,), jnp.int32)
  kind = layer if hasattr(layer, "dtype") else np.asarray(layer)
  of_integers = (
    jnp.issubdtype(kind.dtype, jnp.integer) or kind.dtype.kind == "O"
  )
  if np.ndim(layer) != 0 or not of_integers:
    raise TypeError(
      "`layer` must be an integer scalar, but got"
      f" `{text(options.array('layer', layer))}`."
    )
  return integers("layer", layer, batch)


def _table(request, cache_k, batch, blocks):
  """Returns the table `[b, m]`, and whether sequence i is row i."""
  table, rows = request.block_table, request.cache_batch_index
  if table is not None and rows is not None:
    raise ValueError(
      "`block_table` and `cache_batch_index` must not be given together: the"
      " table already says where each sequence lies."
    )
  if table is not None:
    shape = np.shape(table)
    if len(shape) != 2:
      table = options.array("block_table", table)
      raise ValueError(
        f"`block_table` must have 2 axes [{batch}, blocks of a sequence], but"
        f" got `{text(table)}`."
      )
    return integers("block_table", table, batch, shape[1:]), False
  if rows is not None:
    if np.ndim(rows) == 0:
      rows = rows[None] if isinstance(rows, jax.Array) else [rows]
    return integers("cache_batch_index", rows, batch)[:, None], False
  if blocks != batch:
    raise ValueError(
      f"`cache_k` must have the batch size of the new tokens, {batch}, but"
      f" got `{text(cache_k)}`. Pass `cache_batch_index` if they are some"
      " rows of it."
    )
  return jnp.arange(batch, dtype=jnp.int32)[:, None], True


def canonicalize(request: Request, batch: Any, tokens: Any) -> Cache:
  """Checks the caches and everything that addresses them.

  Args:
    request: What the user gave.
    batch: b.
    tokens: t.

  Returns:
    The canonical form.

  Raises:
    TypeError: If a dtype does not fit.
    ValueError: If a shape or an option does not fit.
  """
  layout = request.layout
  ring = options.boolean("ring", request.ring)
  k = options.array("cache_k", request.cache_k)
  v = options.array("cache_v", request.cache_v)
  _check_caches(k, v, request.layer is not None, layout)
  layer = _layers(request.layer, batch)
  geometry = addressing.Geometry.of(k, v, layout)
  table, aligned = _table(request, k, batch, geometry.blocks)
  scales = _scales(request, k.dtype, batch, geometry.heads)
  index = integers("index", request.index, batch, beyond=NOWHERE)
  lengths = tokens if request.lengths is None else request.lengths
  count = integers("lengths", lengths, batch)
  uniform = addressing.uniform_axes(1, index=request.index, layer=None)
  if scales:
    uniform += addressing.uniform_axes(
      2, k_scale=request.k_scale, v_scale=request.v_scale
    )
  uniform += addressing.uniform_axes(1, count=request.lengths)
  return Cache(
    k,
    v,
    addressing.Places(index, count, layer, table, jnp.int32(0)),
    scales,
    addressing.Addressing(
      layout,
      table.shape[1] * geometry.block_size if ring else 0,
      aligned,
      uniform,
    ),
    geometry,
  )


def is_known(*arrays: Any) -> bool:
  """Returns whether every value is known now."""
  return not any(isinstance(array, core.Tracer) for array in arrays)
