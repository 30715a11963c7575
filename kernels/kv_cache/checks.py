"""Checks of operands' values: at once if they are known, else under checkify.

`checkify.debug_check` would do the second, but it leaves an effect behind that
costs every call of the compiled program some 0.1 ms, twice what a decode step
may take. A checkify rule for the primitive costs nothing without checkify.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..common.jax_private import checkify
from . import layout as layout_lib

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


def add_checkify_rule(
  op: Any, violations: Callable[..., Iterator[Violation]]
) -> None:
  """Makes `checkify.checkify` check the operands of an op's primitive.

  Args:
    op: A `dispatch.Op`.
    violations: `violations(*operands, **params)` with traced operands.
  """
  primitive = op.primitive

  def rule(*args, **params):
    # jax 0.12 passes a context in front, which `assert_func` wants as well.
    context = () if isinstance(args[0], checkify.Error) else args[:1]
    error, enabled_errors, *operands = args[len(context) :]
    if checkify.FailedCheckError in enabled_errors:
      static = {k: v for k, v in params.items() if k != "implementation"}
      for wrong, message, values in violations(*operands, **static):
        failure = checkify.FailedCheckError(
          checkify.get_traceback(), message, **values
        )
        error = checkify.assert_func(*context, error, wrong, failure)
    return error, primitive.bind(*operands, **params)

  checkify.error_checks[primitive] = rule


def count_violation(count: Any, tokens: int, *, xp: Any = jnp) -> Violation:
  """Says whether `count` `[b]` is more than there are tokens, or negative."""
  return (
    xp.any((count < 0) | (count > tokens)),
    f"`lengths` must lie in [0, {tokens}], the number of tokens, but got"
    " {lengths}.",
    {"lengths": count},
  )


def layer_violation(
  geometry: layout_lib.Geometry, layer: Any, *, xp: Any = jnp
) -> Violation:
  """Says whether `layer` `[b]` is none of the cache's."""
  return (
    xp.any((layer < 0) | (layer >= geometry.layers)),
    f"`layer` must lie in [0, {geometry.layers}), but got {{layer}}.",
    {"layer": layer[:1]},
  )


def position_violations(
  geometry: layout_lib.Geometry,
  index: Any,
  count: Any,
  layer: Any,
  table: Any,
  tokens: int,
  ring: int,
  *,
  reads: bool = False,
  xp: Any = jnp,
) -> Iterator[Violation]:
  """Yields what is wrong with the positions that an op writes or reads.

  Args:
    geometry: Of the cache.
    index: `[b]`.
    count: `[b]`.
    layer: `[b]`.
    table: `[b, m]`.
    tokens: t.
    ring: Length of the ring, or 0.
    reads: Whether everything before `index` is read as well.
    xp: `jax.numpy` or `numpy`.
  """
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


def check_positions(
  cache: layout_lib.Cache, count: Any, tokens: int, *, reads: bool = False
) -> None:
  """Raises ValueError for positions outside the cache, if they are known."""
  if not layout_lib.concrete(cache.index, count, cache.layer, cache.table):
    return
  index, count, layer, table = layout_lib.numpy(
    cache.index, count, cache.layer, cache.table
  )
  raise_if_known(
    position_violations(
      cache.geometry,
      index,
      count,
      layer,
      table,
      tokens,
      cache.ring,
      reads=reads,
      xp=np,
    )
  )
