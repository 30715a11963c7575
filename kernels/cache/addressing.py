"""Where the rows of sequences lie in a cache."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from . import layouts

# Axes of operands, by name, along which there is one value.
Uniform = tuple[tuple[str, int], ...]


@dataclasses.dataclass(frozen=True)
class Addressing:
  """How positions become slots, as far as it is known statically.

  These are the parameters of the cache update's primitive.

  Attributes:
    layout: Order of the axes.
    ring: Slots of the ring, or 0.
    aligned: Whether sequence i is row i of the cache, whatever `table` says.
    uniform: Axes of operands, by name, along which there is one value.
  """

  layout: layouts.Layout
  ring: int
  aligned: bool
  uniform: Uniform


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
  def of(cls, cache_k: Any, cache_v: Any, layout: layouts.Layout) -> "Geometry":
    """Reads the sizes off two caches."""
    *lead, blocks, a, b, k_dim = cache_k.shape
    s, n = layout.order(a, b)
    layers = 1
    for size in lead:
      layers *= size
    return cls(layers, blocks, s, n, k_dim, cache_v.shape[-1])


@dataclasses.dataclass(frozen=True)
class Places:
  """Which tokens a call is about, and where their sequences lie.

  Attributes:
    index: `[b]` int32, position of token 0.
    count: `[b]` int32, tokens that are not padding.
    layer: `[b]` int32.
    table: `[b, m]` int32, the blocks of each sequence; without paging, m is 1
      and the block is the sequence's row.
    first_slot: `[]` int32, slot at which this part of the cache begins.
  """

  index: Any
  count: Any
  layer: Any
  table: Any
  first_slot: Any = 0

  @classmethod
  def of(cls, x: Mapping[str, Any]) -> "Places":
    """Picks them from an op's operands by name."""
    return cls(x["index"], x["count"], x["layer"], x["table"], x["first_slot"])


def locate(
  geometry: Geometry, position: Any, places: Places, ring: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Finds where positions lie.

  Args:
    geometry: Of the cache.
    position: `[b, t]`.
    places: Of the sequences.
    ring: Length of the ring, or 0.

  Returns:
    `(block, slot, held)`, each `[b, t]`; `held` is False where the cache has
    no such slot, and then the others mean nothing.
  """
  table, layer = places.table, places.layer
  slot = jnp.where(position >= 0, position % ring, -1) if ring else position
  local = slot - places.first_slot
  width = table.shape[1]
  size = geometry.block_size
  inside = (position >= 0) & (local >= 0) & (local < width * size)
  safe = jnp.where(inside, local, 0)
  if width == 1:
    block = jnp.broadcast_to(table, safe.shape)
  else:
    block = jnp.take_along_axis(table, safe // max(size, 1), axis=1)
  held = (
    inside
    & (block >= 0)
    & (block < geometry.blocks)
    & ((layer >= 0) & (layer < geometry.layers))[:, None]
  )
  return block, safe % max(size, 1), held


def written(
  index: jax.Array, count: jax.Array, tokens: Any, ring: int
) -> tuple[jax.Array, jax.Array]:
  """Returns positions of the new tokens and which of them are written.

  Args:
    index: `[b]`.
    count: `[b]`.
    tokens: t.
    ring: Length of the ring, or 0.

  Returns:
    `(position, write)`, both `[b, t]`; positions in a ring less whole turns of
    it.
  """
  token = jnp.arange(tokens, dtype=jnp.int32)
  count = jnp.clip(count, 0, tokens)
  write = token < count[:, None]
  if ring:
    write &= token >= count[:, None] - ring
    # Whole turns less, which is the same slot and does not leave int32.
    index = jnp.where(index >= 0, index % ring, index)
  return index[:, None] + token, write


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


def once(x: dict[str, jax.Array], at: Addressing) -> dict[str, jax.Array]:
  """Keeps each value once, where handlers want no more.

  To repeat it, or to number the sequences, is a program of its own on a GPU,
  which takes about as long as the update of a token.

  Args:
    x: Operands by name, among them `table`.
    at: How they address the cache.

  Returns:
    The operands; size 1 along the axes of `uniform`, and a table without
    elements where sequence i is row i.
  """
  x = dict(x)
  if at.aligned:
    x["table"] = jnp.zeros((0, 0), jnp.int32)
  for name, axis in at.uniform:
    size = x[name].shape[axis]
    if isinstance(size, int):
      x[name] = lax.slice_in_dim(x[name], 0, min(size, 1), axis=axis)
  return x
