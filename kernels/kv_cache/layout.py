"""What the cache ops share: argument checks, one canonical form, addressing."""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from ..common import options

FLOAT_DTYPES = ("float32", "bfloat16", "float16")
QUANTIZED_DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")
LAYOUTS = ("bsnh", "bnsh")


def is_quantized(dtype: Any) -> bool:
  """Returns whether a cache of `dtype` needs scales."""
  return jnp.dtype(dtype).name in QUANTIZED_DTYPES


@dataclasses.dataclass(frozen=True)
class Geometry:
  """Sizes of a cache, `[..., r, s, n, h]` or `[..., r, n, s, h]`.

  Attributes:
    layers: Product of the leading axes: of the layers, and of `vmap`.
    blocks: r, the rows of the batch or the blocks of a paged cache.
    block_size: s, the slots of a row or of a block.
    heads: n.
    k_dim: h of the keys.
    v_dim: h of the values.
  """

  layers: Any
  blocks: Any
  block_size: Any
  heads: Any
  k_dim: Any
  v_dim: Any

  @classmethod
  def of(cls, cache_k: Any, cache_v: Any, layout: str) -> "Geometry":
    """Reads the sizes off two caches."""
    *lead, blocks, s, n, k_dim = cache_k.shape
    if layout == "bnsh":
      s, n = n, s
    layers = 1
    for size in lead:
      layers *= size
    return cls(layers, blocks, s, n, k_dim, cache_v.shape[-1])


@dataclasses.dataclass(frozen=True)
class Cache:
  """The caches and their addressing in the form that the primitives take.

  The caches keep the shapes that the user gave them: XLA does not update a
  reshaped parameter in place, but copies it.

  Attributes:
    k: `[..., r, s, n, h]`, or with layout "bnsh" `[..., r, n, s, h]`.
    v: Like `k`, with its own h.
    index: `[b]` int32, position of the first new token.
    layer: `[b]` int32.
    table: `[b, m]` int32, the blocks of each sequence; without paging, m is 1
      and the block is the sequence's row.
    scales: `(k_scale, v_scale)`, both `[b, n]` float32, or ().
    layout: "bsnh" or "bnsh".
    ring: Slots of the ring, or 0.
    aligned: Whether sequence i is row i of the cache.
    uniform: Along which axes `index`, `layer`, `k_scale` and `v_scale` repeat
      themselves.
  """

  k: jax.Array
  v: jax.Array
  index: jax.Array
  layer: jax.Array
  table: jax.Array
  scales: tuple[jax.Array, ...]
  layout: str
  ring: int
  aligned: bool
  uniform: "Uniform"

  @property
  def geometry(self) -> Geometry:
    return Geometry.of(self.k, self.v, self.layout)

  @property
  def capacity(self) -> Any:
    """Slots that a sequence has."""
    return self.table.shape[1] * self.geometry.block_size


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
    if wide.dtype.kind == "O":  # integers beyond 64 bits, or no array
      whole = all(isinstance(one, int) for one in wide.flat)
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
  if concrete(wide):
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
    TypeError: If they are no integers.
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
      axes = ", ".join((["layers"] if stacked else []) + list(layout))
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


def check_new(
  cache: Cache, new_k: jax.Array, new_v: jax.Array, batch: Any
) -> None:
  """Checks the new rows against the caches.

  Args:
    cache: Canonical caches.
    new_k: `[b, t, n, h]`, or `[b, n, t, h]` with layout "bnsh".
    new_v: The same, with the values' h.
    batch: b.

  Raises:
    TypeError: If a dtype does not fit.
    ValueError: If a shape does not fit.
  """
  g = cache.geometry
  tokens = new_k.shape[1 if cache.layout == "bsnh" else 2]
  for name, new, cache_name, dim in (
    ("new_k", new_k, "cache_k", g.k_dim),
    ("new_v", new_v, "cache_v", g.v_dim),
  ):
    expected = (
      (batch, tokens, g.heads, dim)
      if cache.layout == "bsnh"
      else (batch, g.heads, tokens, dim)
    )
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


def canonicalize(
  cache_k: Any,
  cache_v: Any,
  index: Any,
  batch: Any,
  *,
  layer: Any = None,
  layout: str = "bsnh",
  ring: bool = False,
  k_scale: Any = None,
  v_scale: Any = None,
  block_table: Any = None,
  cache_batch_index: Any = None,
) -> Cache:
  """Checks the caches and everything that addresses them.

  Args:
    cache_k: `[b, s, n, h]`; see `kv_cache.update` for the other forms.
    cache_v: Like `cache_k`.
    index: Scalar or `[b]`.
    batch: b.
    layer: Scalar, for stacked caches.
    layout: "bsnh" or "bnsh".
    ring: Whether positions wrap around.
    k_scale: Scalar, `[n]` or `[b, n]`, for quantised caches.
    v_scale: Like `k_scale`.
    block_table: `[b, m]`, for paged caches.
    cache_batch_index: `[b]`, which row of the cache each sequence has.

  Returns:
    The canonical form.

  Raises:
    TypeError: If a dtype does not fit.
    ValueError: If a shape or an option does not fit.
  """
  options.one_of("layout", layout, LAYOUTS)
  ring = options.boolean("ring", ring)
  cache_k = options.array("cache_k", cache_k)
  cache_v = options.array("cache_v", cache_v)
  _check_caches(cache_k, cache_v, layer is not None, layout)
  if layer is None:
    layers = jnp.zeros((batch,), jnp.int32)
  else:
    kind = layer if hasattr(layer, "dtype") else np.asarray(layer)
    of_integers = (
      jnp.issubdtype(kind.dtype, jnp.integer) or kind.dtype.kind == "O"
    )
    if np.ndim(layer) != 0 or not of_integers:
      raise TypeError(
        "`layer` must be an integer scalar, but got"
        f" `{text(options.array('layer', layer))}`."
      )
    layers = integers("layer", layer, batch)
  g = Geometry.of(cache_k, cache_v, layout)

  if block_table is not None and cache_batch_index is not None:
    raise ValueError(
      "`block_table` and `cache_batch_index` must not be given together: the"
      " table already says where each sequence lies."
    )
  aligned = False
  if block_table is not None:
    shape = np.shape(block_table)
    if len(shape) != 2:
      table = options.array("block_table", block_table)
      raise ValueError(
        f"`block_table` must have 2 axes [{batch}, blocks of a sequence], but"
        f" got `{text(table)}`."
      )
    table = integers("block_table", block_table, batch, shape[1:])
  elif cache_batch_index is not None:
    if np.ndim(cache_batch_index) == 0:
      cache_batch_index = (
        cache_batch_index[None]
        if isinstance(cache_batch_index, jax.Array)
        else [cache_batch_index]
      )
    table = integers("cache_batch_index", cache_batch_index, batch)[:, None]
  else:
    aligned = True
    if g.blocks != batch:
      raise ValueError(
        f"`cache_k` must have the batch size of the new tokens, {batch}, but"
        f" got `{text(cache_k)}`. Pass `cache_batch_index` if they are some"
        " rows of it."
      )
    table = jnp.arange(batch, dtype=jnp.int32)[:, None]

  scales: tuple[jax.Array, ...] = ()
  given = k_scale is not None or v_scale is not None
  if is_quantized(cache_k.dtype):
    if k_scale is None or v_scale is None:
      raise ValueError(
        "`k_scale` and `v_scale` must be given with a cache of"
        f" {cache_k.dtype.name}."
      )
    scales = (
      _scale("k_scale", k_scale, batch, g.heads),
      _scale("v_scale", v_scale, batch, g.heads),
    )
  elif given:
    raise ValueError(
      "`k_scale` and `v_scale` must not be given with a cache of"
      f" {cache_k.dtype.name}: only int8 and float8 caches are quantised."
    )
  return Cache(
    cache_k,
    cache_v,
    integers("index", index, batch, beyond=NOWHERE),
    layers,
    table,
    scales,
    layout,
    table.shape[1] * g.block_size if ring else 0,
    aligned,
    uniform_axes(1, index=index, layer=None)
    + (uniform_axes(2, k_scale=k_scale, v_scale=v_scale) if scales else ()),
  )


def locate(
  geometry: Geometry,
  position: Any,
  layer: Any,
  table: Any,
  first_slot: Any,
  ring: int,
  xp: Any = jnp,
) -> tuple[Any, Any, Any]:
  """Finds where positions lie.

  Args:
    geometry: Of the cache.
    position: `[b, t]`.
    layer: `[b]`.
    table: `[b, m]`.
    first_slot: Slot of the sequence at which this part of the cache begins.
    ring: Length of the ring, or 0.
    xp: `jax.numpy` or `numpy`.

  Returns:
    `(block, slot, held)`, each `[b, t]`; `held` is False where the cache has
    no such slot, and then the others mean nothing.
  """
  slot = xp.where(position >= 0, position % ring, -1) if ring else position
  local = slot - first_slot
  width = table.shape[1]
  size = geometry.block_size
  inside = (position >= 0) & (local >= 0) & (local < width * size)
  safe = xp.where(inside, local, 0)
  if width == 1:
    block = xp.broadcast_to(table, safe.shape)
  else:
    block = xp.take_along_axis(table, safe // max(size, 1), axis=1)
  held = (
    inside
    & (block >= 0)
    & (block < geometry.blocks)
    & ((layer >= 0) & (layer < geometry.layers))[:, None]
  )
  return block, safe % max(size, 1), held


def written(
  index: Any, count: Any, tokens: Any, ring: int, xp: Any = jnp
) -> tuple[Any, Any]:
  """Returns positions of the new tokens and which of them are written.

  Args:
    index: `[b]`.
    count: `[b]`.
    tokens: t.
    ring: Length of the ring, or 0.
    xp: `jax.numpy` or `numpy`.

  Returns:
    `(position, write)`, both `[b, t]`; positions in a ring less whole turns of
    it.
  """
  token = xp.arange(tokens, dtype=xp.int32)
  count = xp.clip(count, 0, tokens)
  write = token < count[:, None]
  if ring:
    write &= token >= count[:, None] - ring
    # Whole turns less, which is the same slot and does not leave int32.
    index = xp.where(index >= 0, index % ring, index)
  return index[:, None] + token, write


def concrete(*arrays: Any) -> bool:
  """Returns whether every value is known now."""
  return not any(isinstance(array, jax.core.Tracer) for array in arrays)


# Axes of operands, by name, along which there is one value.
Uniform = tuple[tuple[str, int], ...]


def uniform_axes(rank: int, **given: Any) -> Uniform:
  """Returns along which axes what a user gave is broadcast to an operand.

  Args:
    rank: Of the operands.
    **given: None, or an array of that rank or less, by the operand's name.
  """
  return tuple(
    (name, axis)
    for name, value in given.items()
    for axis in range(rank - (0 if value is None else jnp.ndim(value)))
  )


def once(
  x: dict[str, jax.Array], aligned: bool, uniform: Uniform
) -> dict[str, jax.Array]:
  """Has each value once, where handlers want no more.

  To repeat it, or to number the sequences, is a program of its own on a GPU,
  which takes about as long as the update of a token.

  Args:
    x: Operands by name, among them `table`.
    aligned: Whether `table` only says that sequence i is row i.
    uniform: Where operands repeat themselves.

  Returns:
    The operands; size 1 along those axes, and a table without elements.
  """
  x = dict(x)
  if aligned:
    x["table"] = jnp.zeros((0, 0), jnp.int32)
  for name, axis in uniform:
    size = x[name].shape[axis]
    if isinstance(size, int):
      x[name] = lax.slice_in_dim(x[name], 0, min(size, 1), axis=axis)
  return x


def uniform_of_batch(uniform: Uniform, dims: dict[str, Any]) -> Uniform:
  """Returns where operands repeat themselves once `fold_batch` has been.

  Args:
    uniform: Where they did before.
    dims: Of operands, by name, the axis that is mapped over, or None.
  """
  return tuple(
    (name, axis)
    for name, axis in uniform
    if axis > 0 or (name != "layer" and dims.get(name) is None)
  )


def fold_batch(
  values: dict[str, Any], size: Any, layout: str
) -> dict[str, Any]:
  """Folds the axis of `vmap` into the batch; the cache stays as it is.

  The cache's new axis in front becomes one more axis of layers.

  Args:
    values: Operands with a leading axis each: cache_k, cache_v, layer, and any
      others of shape `[size, b, ...]`.
    size: Of the leading axis.
    layout: "bsnh" or "bnsh".

  Returns:
    The operands of one larger call.
  """
  caches = ("cache_k", "cache_v")
  one_k, one_v = (
    jax.ShapeDtypeStruct(values[name].shape[1:], values[name].dtype)
    for name in caches
  )
  g = Geometry.of(one_k, one_v, layout)
  out = {
    name: value
    if name in caches
    else value.reshape((size * value.shape[1], *value.shape[2:]))
    for name, value in values.items()
  }
  copy = jnp.arange(size, dtype=jnp.int32)[:, None]
  layer = values["layer"]
  valid = (layer >= 0) & (layer < g.layers)
  out["layer"] = jnp.where(valid, layer + copy * g.layers, -1).reshape(
    (size * layer.shape[1],)
  )
  return out


def cache_factors(rank: int, row: str, layout: str) -> tuple[str, set[str]]:
  """Writes a cache's axes but the last for a sharding rule.

  Args:
    rank: Of the cache.
    row: Factor of the rows.
    layout: "bsnh" or "bnsh".

  Returns:
    The factors as text, and the set of those of the leading axes.
  """
  lead = [f"l{i}" for i in range(rank - 4)]
  rest = [row, "s", "n"] if layout == "bsnh" else [row, "n", "s"]
  return " ".join(lead + rest), set(lead)


def flat_names(entry: Any) -> tuple[Any, ...]:
  """Returns the mesh axes of one entry of a PartitionSpec."""
  if entry is None:
    return ()
  return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def in_order(rule: str, factors: set[str]) -> tuple[str, ...]:
  """Returns `factors` in the order in which a sharding rule names them."""
  seen = []
  for word in rule.replace("(", " ").replace(")", " ").split():
    name = word.strip(",")
    if name in factors and name not in seen:
      seen.append(name)
  return tuple(seen)


def _offset(names, local_size):
  """Returns where this device's part of a split axis begins."""
  if not names:
    return jnp.int32(0)
  return (lax.axis_index(names) * local_size).astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Split:
  """How a cache and what goes with it are split over a mesh.

  The batch, the heads and the length may be split; of a cache in which the
  sequences are not the rows (paged, or with `cache_batch_index`), the heads and
  the blocks. Each attribute is a mesh axis, a tuple of them, or None.

  Attributes:
    rows: Of the cache's rows or blocks.
    slots: Of its length.
    heads: Of its heads.
    layout: "bsnh" or "bnsh".
    aligned: Whether sequence i is row i.
    leading: Number of the cache's axes before the rows.
  """

  rows: Any
  slots: Any
  heads: Any
  layout: str
  aligned: bool
  leading: int

  @classmethod
  def of(
    cls, cache: Any, table_width: int, layout: str, aligned: bool
  ) -> "Split":
    """Reads the split off the sharding of a cache."""
    rank = len(cache.shape)
    spec = [entry or None for entry in cache.sharding.spec]
    spec += [None] * (rank - len(spec))
    rows, slots, heads, _ = spec[-4:]
    if layout == "bnsh":
      slots, heads = heads, slots
    if table_width != 1:
      slots = None
    return cls(rows, slots, heads, layout, aligned, rank - 4)

  def cache(self) -> P:
    """The spec of `[..., r, s, n, h]`."""
    lead = (None,) * self.leading
    if self.layout == "bsnh":
      return P(*lead, self.rows, self.slots, self.heads, None)
    return P(*lead, self.rows, self.heads, self.slots, None)

  def batch(self, *rest: Any) -> P:
    """The spec of `[b, *rest]`."""
    return P(self.rows if self.aligned else None, *rest)

  def tokens(self) -> P:
    """The spec of `[b, t, n, h]`."""
    if self.layout == "bsnh":
      return self.batch(None, self.heads, None)
    return self.batch(self.heads, None, None)

  def per_head(self) -> P:
    """The spec of `[b, n]`."""
    return self.batch(self.heads)

  def replicated(self) -> P:
    """The spec of a scalar."""
    return P()

  def readdress(
    self, cache: jax.Array, table: jax.Array, first_slot: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Turns global addresses into those of this device's part of the cache.

    Args:
      cache: This device's part.
      table: `[b, m]`.
      first_slot: Of the part before the split.

    Returns:
      The table and the first slot for the part; rows and slots of other parts
      come out as outside of it.
    """
    table = table - _offset(self.rows, cache.shape[-4])
    slots = cache.shape[-3 if self.layout == "bsnh" else -2]
    return table, first_slot + _offset(self.slots, slots)


def numpy(*arrays: Any) -> list[np.ndarray]:
  """Brings arrays to the host."""
  return [np.asarray(array) for array in arrays]
