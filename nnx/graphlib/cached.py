"""cached_partial: the first arguments of a function, walked over once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from nnx.engine import _engine
from nnx.graphlib import modes

A = TypeVar("A")


def cached_partial(
  f: Callable[..., A],
  *cached_args: Any,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Callable[..., A]:
  """Gives a function its first arguments, for programs of Flax.

  In Flax it saves `nnx.jit` the walk over the arguments. Here that walk costs
  next to nothing, so `nnx.jit` needs no help; this function does what it
  promises all the same: it calls `f` with copies of the objects, made once,
  that share their Variables with the originals.

  Example:

    >>> import nnx
    >>> @nnx.jit
    ... def add(counter, n):
    ...   counter.count.value += n
    >>> counter = nnx.Dict(count=nnx.Variable(0))
    >>> step = nnx.cached_partial(add, counter)
    >>> step(1), step(2)
    (None, None)
    >>> counter.count.value
    Array(3, dtype=int32, weak_type=True)

  Args:
    f: a function, such as `nnx.jit` returns.
    *cached_args: the first arguments.
    graph: as in `nnx.jit`, but must not be `False`.
    graph_updates: the same.

  Returns:
    A function of the remaining arguments. It raises a ValueError after a call
    that has changed the structure of a cached object, which cannot reach the
    original.

  Raises:
    ValueError: in a mode without updates, where `nnx.jit_partial` does it.
  """
  mode = modes.resolve(graph, graph_updates)
  if not mode.updates:
    raise ValueError(
      "`nnx.cached_partial` works in graph mode with updates only, but is in"
      f" {mode}. Use `nnx.jit_partial`, or"
      f" {modes.way_out('cached_partial', updates=True)}."
    )
  cached = _engine.clone(cached_args, False)
  structure, _, _ = _engine.flatten(cached)

  def call_with_cached(*args: Any, **kwargs: Any) -> A:
    result = f(*cached, *args, **kwargs)
    if not _engine.matches(structure, cached):
      raise ValueError(
        "A function given to `cached_partial` must leave the structure of the"
        " cached arguments as it is, but it has changed it. Undo the change"
        " before it returns, for instance by `nnx.pop`, or call the function"
        " with the objects themselves."
      )
    return result

  names = ("__name__", "__doc__", "__module__", "__qualname__", "jitted_fn")
  for name in names:
    if hasattr(f, name):
      setattr(call_with_cached, name, getattr(f, name))
  vars(call_with_cached)["__wrapped__"] = f
  return call_with_cached
