"""How a cache and what goes with it are split over devices."""

import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from . import layouts


def cache_factors(
  rank: int, row: str, layout: layouts.Layout
) -> tuple[str, set[str]]:
  """Writes a cache's axes but the last for a sharding rule.

  Args:
    rank: Of the cache.
    row: Factor of the rows.
    layout: Of the cache.

  Returns:
    The factors as text, and the set of those of the leading axes.
  """
  lead = [f"l{i}" for i in range(rank - 4)]
  return " ".join((*lead, row, *layout.order("s", "n"))), set(lead)


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
    layout: Of the cache.
    aligned: Whether sequence i is row i.
    leading: Number of the cache's axes before the rows.
  """

  rows: Any
  slots: Any
  heads: Any
  layout: layouts.Layout
  aligned: bool
  leading: int

  @classmethod
  def of(
    cls, cache: Any, table_width: int, layout: layouts.Layout, aligned: bool
  ) -> "Split":
    """Reads the split off the sharding of a cache."""
    rank = len(cache.shape)
    spec = [entry or None for entry in cache.sharding.spec]
    spec += [None] * (rank - len(spec))
    rows, a, b, _ = spec[-4:]
    slots, heads = layout.order(a, b)
    if table_width != 1:
      slots = None
    return cls(rows, slots, heads, layout, aligned, rank - 4)

  def cache(self) -> P:
    """Returns the spec of `[..., r, s, n, h]`."""
    lead = (None,) * self.leading
    return P(*lead, self.rows, *self.layout.order(self.slots, self.heads), None)

  def batch(self, *rest: Any) -> P:
    """Returns the spec of `[b, *rest]`."""
    return P(self.rows if self.aligned else None, *rest)

  def tokens(self, *within: None) -> P:
    """Returns the spec of `[b, t, n, ..., h]`, the heads' axes together."""
    return self.batch(*self.layout.order(None, self.heads, *within), None)

  def per_head(self) -> P:
    """Returns the spec of `[b, n]`."""
    return self.batch(self.heads)

  def replicated(self) -> P:
    """Returns the spec of a scalar."""
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
    slots = cache.shape[self.layout.slots_axis]
    return table, first_slot + _offset(self.slots, slots)
