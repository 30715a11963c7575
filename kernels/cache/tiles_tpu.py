"""How a cache lies in a TPU's memory.

A kernel wants its operands with the last two axes in tiles, and XLA copies
what lies otherwise. How it lies follows from the shape: XLA orders the axes so
that tiles are full. So the kernels take the cache with its axes in that order,
which costs nothing, and `order` tells for which shapes they know it.
"""

from collections.abc import Sequence
import enum
from typing import Any

import jax
from jax import lax
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from ..common import arrays
from . import checks, layouts

LANES = 128


class Order(enum.StrEnum):
  """The axes of a cache as XLA keeps them; a `Layout` is what users give.

  Attributes:
    BY_TOKENS: Tiles of heads and head_dim: a token's rows of all heads are
      tiles.
    BY_ROWS: Tiles of slots and head_dim: a token is one row in a tile of each
      head.
    BY_COLUMNS: Tiles of head_dim and slots, where head_dim is not a multiple of
      128: a token is one column in tiles of each head.
  """

  BY_TOKENS = "bsnh"
  BY_ROWS = "bnsh"
  BY_COLUMNS = "bnhs"

  def is_that_of(self, layout: layouts.Layout) -> bool:
    """Tells whether a cache in `layout` lies as it is given."""
    return self.value == layout.value


def sublanes(dtype: Any) -> int:
  """Returns the rows of a tile: 8 of 32 bits, or as many bytes."""
  return 32 // jnp.dtype(dtype).itemsize


def order(cache: Any, layout: layouts.Layout) -> Order | None:
  """Returns the order of axes in which XLA keeps a cache, if it is known.

  Args:
    cache: Its abstract value, in `layout`.
    layout: Order of its axes.
  """
  *_, a, b, dim = cache.shape
  slots, heads = layout.order(a, b)
  packed = 4 // jnp.dtype(cache.dtype).itemsize
  if dim % LANES:
    full = slots % LANES == 0 and dim % sublanes(cache.dtype) == 0
    return Order.BY_COLUMNS if full else None
  if not layout.heads_first and (
    heads % 8 == 0 or heads in (1, 2, 4)[packed // 2 :]
  ):
    return Order.BY_TOKENS
  return Order.BY_ROWS if slots % sublanes(cache.dtype) == 0 else None


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


def cache_problem(
  cache_k: Any, cache_v: Any, layout: layouts.Layout
) -> str | None:
  """Returns why Mosaic cannot work on a cache where it lies, or None.

  Args:
    cache_k: Abstract value of the keys.
    cache_v: The same of the values.
    layout: Order of their axes.
  """
  if arrays.static_size((*cache_k.shape, *cache_v.shape)) is None:
    return "the cache has symbolic sizes"
  for name, cache in (("cache_k", cache_k), ("cache_v", cache_v)):
    if 0 in cache.shape:
      return f"`{name}` is empty"
    if cache.dtype == jnp.float16:
      return f"`{name}` is float16, which Mosaic does not take"
    if not order(cache, layout):
      return (
        f"`{name}` is {checks.text(cache)}, which does not fill tiles: a"
        " kernel would have the whole cache laid out anew. One of head_dim"
        f" and slots must be a multiple of {LANES}, and the other one of"
        f" {sublanes(cache.dtype)}"
      )
  if order(cache_k, layout) is not order(cache_v, layout):
    return "keys and values do not lie in the same order"
  return None


def lead_index(layer: Any, lead: Sequence[int]) -> tuple[Any, ...]:
  """Splits a layer's number into indices of the cache's leading axes."""
  out = []
  for size in reversed(lead[1:]):
    out.append(lax.rem(layer, jnp.int32(size)))
    layer = lax.div(layer, jnp.int32(size))
  return tuple(reversed([*out, layer])) if lead else ()
