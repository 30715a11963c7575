"""Splits and merges that share references between several objects.

`split_context` and `merge_context` number the objects of several splits, and of
the merges that undo them, as one sequence. `update_context` ties the four of
them together that carry objects into a transform of jax and back: what happened
inside to the copies happens to the originals. `nnx.jit` and the other
transforms do all of this by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
import contextlib
import functools
import threading
from typing import Any

from nnx import environment, filterlib
from nnx.engine import _engine
from nnx.graphlib.states import as_state, merged


class _Stacks(threading.local):
  def __init__(self) -> None:
    self.update: dict[Hashable, list[UpdateContext]] = {}


_stacks = _Stacks()


class SplitContext:
  """Splits objects whose references to each other are kept.

  Example:

    >>> import nnx
    >>> a = nnx.Dict(w=nnx.Param(1.0))
    >>> b = nnx.Dict(a=a)
    >>> with nnx.split_context() as ctx:
    ...   split_a, split_b = ctx.split(a), ctx.split(b)
    >>> with nnx.merge_context() as ctx:
    ...   new_a, new_b = ctx.merge(*split_a), ctx.merge(*split_b)
    >>> new_b.a is new_a
    True
  """

  def __init__(self, update: UpdateContext | None):
    self._seen: list[Any] = []
    # Inside of a transform, the copies that its merge has made.
    self._updated = update.inner if update is not None else None

  def split(self, node: Any, /, *filters: filterlib.Filter) -> tuple[Any, ...]:
    """Splits as `nnx.split`, with references to objects split before.

    Args:
      node: an object, a Variable, or a pytree of them.
      *filters: filters that together select every leaf.

    Returns:
      The graphdef, and a State for each filter.
    """
    graphdef, mappings = _engine.split(
      node,
      filterlib.engine_filters(filters) or (True,),
      True,
      self._seen,
      self._updated,
    )
    return (graphdef, *map(as_state, mappings))

  def flatten(self, node: Any, /, *filters: filterlib.Filter) -> Any:
    """Splits as `split`, into flat states.

    Args:
      node: an object, a Variable, or a pytree of them.
      *filters: filters that together select every leaf.

    Returns:
      The graphdef, and a `FlatState` for each filter.
    """
    graphdef, *states = self.split(node, *filters)
    return (graphdef, *(state.flat_state() for state in states))


class MergeContext:
  """Merges what a `SplitContext` has split; see there."""

  def __init__(self, update: UpdateContext | None, inner: bool | None):
    self._seen: list[Any] = []
    # Outside of a transform, the originals that are to be changed.
    self._updated = update.outer if update is not None and not inner else None

  def merge(self, graphdef: Any, state: Any, /, *states: Any) -> Any:
    """Merges as `nnx.merge`, with references to objects merged before.

    Args:
      graphdef: the graphdef.
      state: the state.
      *states: more states.

    Returns:
      The object.

    Raises:
      ValueError: if the states do not fit, or if an object that the graphdef
        refers to was not merged before.
    """
    return _engine.merge(
      graphdef,
      merged((state, *states)),
      False,
      False,
      self._seen,
      self._updated,
    )

  unflatten = merge


class UpdateContext:
  """What `update_context` knows between its four steps."""

  def __init__(self, tag: Hashable):
    self.tag = tag
    self.outer: list[Any] | None = None
    self.inner: list[Any] | None = None
    self._coming_back = False

  def split(self, node: Any, /, *filters: filterlib.Filter) -> tuple[Any, ...]:
    """Splits one object in a `split_context` of its own, as Flax 0.10 did.

    Args:
      node: an object, a Variable, or a pytree of them.
      *filters: filters that together select every leaf.

    Returns:
      The graphdef, and a State for each filter.
    """
    self._coming_back = self.inner is not None
    with split_context(self.tag) as context:
      return context.split(node, *filters)

  def merge(self, graphdef: Any, state: Any, /, *states: Any) -> Any:
    """Merges what `split` has split: a copy, and after that the original.

    Args:
      graphdef: the graphdef.
      state: the state.
      *states: more states.

    Returns:
      The object.
    """
    with merge_context(self.tag, inner=not self._coming_back) as context:
      return context.merge(graphdef, state, *states)


@contextlib.contextmanager
def split_context(ctxtag: Hashable | None = None) -> Iterator[SplitContext]:
  """Opens a block in which several objects are split; see `SplitContext`.

  Example:

    >>> import nnx
    >>> p = nnx.Param(1.0)
    >>> with nnx.split_context() as ctx:
    ...   first, second = ctx.split([p]), ctx.split([p])
    >>> len(first[1]), len(second[1])
    (1, 0)

  Args:
    ctxtag: the tag of an `update_context` that the splits belong to.

  Yields:
    The `SplitContext`.
  """
  update = None if ctxtag is None else current_update_context(ctxtag)
  context = SplitContext(update)
  yield context
  if update is not None:
    if update.inner is None:
      update.outer = context._seen
    else:
      update.inner = None


@contextlib.contextmanager
def merge_context(
  ctxtag: Hashable | None = None, inner: bool | None = None
) -> Iterator[MergeContext]:
  """Opens a block in which several objects are merged; see `SplitContext`.

  Example:

    >>> import nnx
    >>> p = nnx.Param(1.0)
    >>> with nnx.split_context() as ctx:
    ...   first, second = ctx.split([p]), ctx.split([p])
    >>> with nnx.merge_context() as ctx:
    ...   ctx.merge(*first)[0] is ctx.merge(*second)[0]
    True

  Args:
    ctxtag: the tag of an `update_context` that the merges belong to.
    inner: whether this is the merge inside of the transform, which makes
      copies, or the one after it, which changes the originals.

  Yields:
    The `MergeContext`.

  Raises:
    ValueError: if there is a tag and `inner` is not given.
  """
  update = None
  if inner is not None:
    environment.check_flags(inner=inner)
  if ctxtag is not None:
    if inner is None:
      raise ValueError(
        "With a `ctxtag`, `inner` must say which merge this is, but got `None`."
        " Pass `inner=True` inside of the transform, `inner=False` after it."
      )
    update = current_update_context(ctxtag)
  context = MergeContext(update, inner)
  yield context
  if update is not None:
    if inner:
      update.inner = context._seen
    else:
      update.outer = None


class update_context:
  """A block or function in which objects go into a transform and come back.

  In it, objects are split, merged inside of the transform, split there, and
  merged outside again; see the example. Changes of attributes, new and removed
  ones, and references are done to the originals.

  Example:

    >>> import jax
    >>> import nnx
    >>> @jax.jit
    ... def inside(graphdef, state):
    ...   with nnx.merge_context("example", inner=True) as ctx:
    ...     model = ctx.merge(graphdef, state)
    ...   model.size = 3
    ...   model.itself = model
    ...   with nnx.split_context("example") as ctx:
    ...     return ctx.split(model)
    >>> model = nnx.Dict(w=nnx.Param(1.0))
    >>> with nnx.update_context("example"):
    ...   with nnx.split_context("example") as ctx:
    ...     graphdef, state = ctx.split(model)
    ...   graphdef, state = inside(graphdef, state)
    ...   with nnx.merge_context("example", inner=False) as ctx:
    ...     result = ctx.merge(graphdef, state)
    >>> result is model, model.size, model.itself is model
    (True, 3, True)

  Args:
    tag: names the context, for the blocks in it.
  """

  def __init__(self, tag: Hashable):
    self.tag = tag

  def __enter__(self) -> UpdateContext:
    context = UpdateContext(self.tag)
    _stacks.update.setdefault(self.tag, []).append(context)
    return context

  def __exit__(self, *exc_info) -> None:
    stack = _stacks.update[self.tag]
    context = stack.pop()
    context.outer = context.inner = None
    if not stack:
      del _stacks.update[self.tag]

  def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
      with update_context(self.tag):
        return function(*args, **kwargs)

    return wrapper


def current_update_context(tag: Hashable) -> UpdateContext:
  """Finds the innermost `update_context` with a given tag.

  Example:

    >>> import nnx
    >>> with nnx.update_context("example"):
    ...   nnx.current_update_context("example").tag
    'example'

  Args:
    tag: the tag.

  Returns:
    The context.

  Raises:
    ValueError: if there is none.
  """
  stack = _stacks.update.get(tag)
  if not stack:
    raise ValueError(
      f"There must be an `nnx.update_context` with the tag {tag!r}, but there"
      f" are {list(_stacks.update)}."
    )
  return stack[-1]
