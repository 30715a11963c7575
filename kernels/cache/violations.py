"""Checks of operands' values: at once if they are known, else under checkify.

`checkify.debug_check` would do the second, but it leaves an effect behind that
costs every call of the compiled program some 0.1 ms, twice what a decode step
may take. A checkify rule for the primitive costs nothing without checkify; see
`jax_private.add_checkify_rule`.
"""

from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from . import addressing, checks

# What `violations` functions yield: whether something is wrong, the sentence
# that says so, and the values that the sentence names.
Violation = tuple[Any, str, dict[str, Any]]


def raise_if_known(violations: Iterator[Violation]) -> None:
  """Raises ValueError for the first violation; for values that are known."""
  for wrong, message, values in violations:
    if wrong:
      shown = {
        name: value.tolist() if hasattr(value, "tolist") else value
        for name, value in values.items()
      }
      raise ValueError(message.format(**shown))


def count_violation(count: Any, tokens: int, *, xp: Any = jnp) -> Violation:
  """Says whether `count` `[b]` is more than there are tokens, or negative."""
  return (
    xp.any((count < 0) | (count > tokens)),
    f"`lengths` must lie in [0, {tokens}], the number of tokens, but got"
    " {lengths}.",
    {"lengths": count},
  )


def layer_violation(
  geometry: addressing.Geometry, layer: Any, *, xp: Any = jnp
) -> Violation:
  """Says whether `layer` `[b]` is outside the cache."""
  return (
    xp.any((layer < 0) | (layer >= geometry.layers)),
    f"`layer` must lie in [0, {geometry.layers}), but got {{layer}}.",
    {"layer": layer[:1]},
  )


def position_violations(
  geometry: addressing.Geometry,
  places: addressing.Places,
  tokens: int,
  ring: int,
  *,
  reads: bool = False,
  xp: Any = jnp,
) -> Iterator[Violation]:
  """Yields what is wrong with the positions that an op writes or reads.

  Args:
    geometry: Of the cache.
    places: Of the sequences.
    tokens: t.
    ring: Length of the ring, or 0.
    reads: Whether everything before `index` is read as well.
    xp: `jax.numpy` or `numpy`.
  """
  index, count = places.index, places.count
  layer, table = places.layer, places.table
  length = table.shape[1] * geometry.block_size
  yield count_violation(count, tokens, xp=xp)
  busy = count > 0
  outside = busy & (index < 0)
  if not ring:
    outside |= busy & (index > length - count)
  yield (
    xp.any(outside),
    f"`index` must lie in [0, {length}) and leave room for the new tokens in a"
    f" cache of length {length}, but got {{index}} with {{lengths}} new"
    " tokens.",
    {"index": index, "lengths": count},
  )
  yield layer_violation(geometry, layer, xp=xp)
  size = max(geometry.block_size, 1)
  entry = xp.arange(table.shape[1], dtype=xp.int32)[None]
  last = (index + count - 1)[:, None]
  first = 0 if reads else (index // size)[:, None]
  used = busy[:, None] & (entry >= first) & (entry <= last // size)
  if ring:
    # Not of `last`, which may have left int32.
    all_around = busy & (index > length - count)
    used |= all_around[:, None]
  yield (
    xp.any(used & ((table < 0) | (table >= geometry.blocks))),
    "`block_table` (or `cache_batch_index`) must name blocks in"
    f" [0, {geometry.blocks}) wherever tokens lie, but got {{table}}.",
    {"table": table},
  )


def check_positions(cache: checks.Cache, tokens: int) -> None:
  """Raises ValueError for positions outside the cache, if they are known."""
  places = cache.places
  values = (places.index, places.count, places.layer, places.table)
  if checks.is_known(*values):
    on_host = addressing.Places(*map(np.asarray, values))
    raise_if_known(
      position_violations(cache.geometry, on_host, tokens, cache.at.ring, xp=np)
    )
