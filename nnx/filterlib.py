"""Filters: short descriptions of which leaves of a graph are meant.

A filter is anything that `to_predicate` accepts:

- a type: leaves that are instances of it, as `OfType`
- a `str`: leaves whose `tag` is that string, as `WithTag`
- `...` or `True`: all of them, as `Everything`
- `None` or `False`: none, as `Nothing`
- a callable `f(path, value) -> bool`: what it says
- a tuple or list of filters: leaves that one of them selects, as `Any`

The classes below are such callables. They compare and hash by what they hold,
so that a filter can be part of a cache key.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Sequence
from typing import Any as AnyValue
from typing import Union

from nnx.missing import MISSING

Key = int | str
PathParts = tuple[Key, ...]
Predicate = Callable[[PathParts, AnyValue], bool]
Filter = Union[
  type, str, Predicate, bool, "ellipsis", None, Sequence["Filter"]  # noqa: F821
]


class _Predicate:
  """Value semantics for the predicate classes: equal type, equal contents.

  What a program adds to an object, a `__doc__` for instance, does not count.
  """

  _fields: tuple[str, ...] = ()

  def _contents(self) -> tuple[AnyValue, ...]:
    return tuple(getattr(self, name) for name in self._fields)

  def __call__(self, path: PathParts, value: AnyValue) -> bool:
    raise NotImplementedError

  def __eq__(self, other) -> bool:
    return type(self) is type(other) and self._contents() == other._contents()

  def __hash__(self) -> int:
    return hash((type(self), self._contents()))

  def __repr__(self) -> str:
    return f"{type(self).__name__}({', '.join(map(repr, self._contents()))})"


class OfType(_Predicate):
  """Selects the leaves that are instances of a type.

  Example:

    >>> import nnx
    >>> nnx.OfType(nnx.Param)(("kernel",), nnx.Param(1))
    True

  Args:
    type: the type, or a tuple of types.
  """

  _fields = ("type",)

  def __init__(self, type: type):
    self.type = type

  def __call__(self, path: PathParts, value: AnyValue) -> bool:
    return isinstance(value, self.type)


class WithTag(_Predicate):
  """Selects the leaves whose `tag`, attribute or metadata, is a given string.

  Example:

    >>> import nnx
    >>> nnx.WithTag("frozen")((), nnx.Param(1, tag="frozen"))
    True

  Args:
    tag: the string that the tag must equal.
  """

  _fields = ("tag",)

  def __init__(self, tag: str):
    self.tag = tag

  def __call__(self, path: PathParts, value: AnyValue) -> bool:
    # Looking in the metadata first spares Variables without a tag the search
    # through their value, which would end in an AttributeError.
    metadata = getattr(value, "_metadata", None)
    if isinstance(metadata, dict):
      tag = metadata.get("tag", MISSING)
      if tag is MISSING:
        tag = getattr(type(value), "tag", MISSING)
    else:
      tag = getattr(value, "tag", MISSING)
    return isinstance(tag, str) and tag == self.tag


class PathContains(_Predicate):
  """Selects the leaves with a given key on their path.

  Example:

    >>> import nnx
    >>> nnx.PathContains("encoder")(("encoder", 0, "kernel"), None)
    True
    >>> nnx.PathContains("enc", exact=False)(("encoder", 0, "kernel"), None)
    True

  Args:
    key: the key to look for.
    exact: whether a part of the path must equal `key`; otherwise it is enough
      that the text of a part contains the text of `key`.
  """

  _fields = ("key", "exact")

  def __init__(self, key: Key, exact: bool = True):
    self.key = key
    self.exact = exact

  def __call__(self, path: PathParts, value: AnyValue) -> bool:
    if self.exact:
      return self.key in path
    text = str(self.key)
    return any(text in str(part) for part in path)

  def __repr__(self) -> str:
    return f"PathContains({self.key!r}, exact={self.exact})"


class PathIn(_Predicate):
  """Selects the leaves at given paths.

  Example:

    >>> import nnx
    >>> nnx.PathIn(("linear", "kernel"), ("bias",))(("bias",), None)
    True

  Args:
    *paths: the paths, each a tuple of keys.
  """

  _fields = ("paths",)

  def __init__(self, *paths: PathParts):
    self.paths = frozenset(paths)

  def __call__(self, path: PathParts, value: AnyValue) -> bool:
    return path in self.paths

  def __repr__(self) -> str:
    return f"PathIn({', '.join(map(repr, sorted(self.paths, key=repr)))})"


class _Combination(_Predicate):
  """A predicate made of several."""

  _fields = ("predicates",)

  def __init__(self, *filters: Filter):
    self.predicates = tuple(map(to_predicate, filters))

  def __repr__(self) -> str:
    return f"{type(self).__name__}({', '.join(map(repr, self.predicates))})"


class Any(_Combination):
  """Selects what at least one of the filters selects.

  Example:

    >>> import nnx
    >>> nnx.Any(nnx.Param, "frozen")((), nnx.BatchStat(1, tag="frozen"))
    True

  Args:
    *filters: any filters; with none, nothing is selected.
  """

  def __call__(self, path: PathParts, value: AnyValue) -> bool:
    return any(predicate(path, value) for predicate in self.predicates)


class All(_Combination):
  """Selects what every one of the filters selects.

  Example:

    >>> import nnx
    >>> nnx.All(nnx.Param, nnx.PathContains("bias"))(("bias",), nnx.Param(1))
    True

  Args:
    *filters: any filters; with none, everything is selected.
  """

  def __call__(self, path: PathParts, value: AnyValue) -> bool:
    return all(predicate(path, value) for predicate in self.predicates)


class Not(_Predicate):
  """Selects what a filter does not.

  Example:

    >>> import nnx
    >>> nnx.Not(nnx.Param)((), nnx.BatchStat(1))
    True

  Args:
    filter: any filter.
  """

  _fields = ("predicate",)

  def __init__(self, filter: Filter, /):
    self.predicate = to_predicate(filter)

  def __call__(self, path: PathParts, value: AnyValue) -> bool:
    return not self.predicate(path, value)


class Everything(_Predicate):
  """Selects everything; `...` and `True` mean the same.

  Example:

    >>> import nnx
    >>> nnx.Everything()((), 1)
    True
  """

  def __call__(self, path: PathParts, value: AnyValue) -> bool:
    return True


class Nothing(_Predicate):
  """Selects nothing; `None` and `False` mean the same.

  Example:

    >>> import nnx
    >>> nnx.Nothing()((), 1)
    False
  """

  def __call__(self, path: PathParts, value: AnyValue) -> bool:
    return False


def to_predicate(filter: Filter) -> Predicate:
  """Turns a filter into the predicate `f(path, value) -> bool` that it means.

  Example:

    >>> import nnx
    >>> nnx.filterlib.to_predicate((nnx.Param, "frozen"))
    Any(OfType(<class 'nnx.variablelib.Param'>), WithTag('frozen'))

  Args:
    filter: any filter, see the table at the head of this module.

  Returns:
    A callable.

  Raises:
    TypeError: if `filter` is not of a kind in the table.
  """
  if isinstance(filter, type):
    return OfType(filter)
  if filter is ... or filter is True:
    return Everything()
  if filter is None or filter is False:
    return Nothing()
  if isinstance(filter, str):
    return WithTag(filter)
  if callable(filter):
    return filter
  if isinstance(filter, (list, tuple)):
    return Any(*filter)
  raise TypeError(
    "A filter must be a type, a str, a callable, a bool, `...`, `None`, or a"
    f" tuple or list of filters, but got `{filter!r}` of type"
    f" `{type(filter).__name__}`."
  )


def filters_to_predicates(
  filters: collections.abc.Sequence[Filter],
) -> tuple[Predicate, ...]:
  """Turns filters that are tried in order into predicates.

  Example:

    >>> import nnx
    >>> nnx.filterlib.filters_to_predicates(["frozen", ...])
    (WithTag('frozen'), Everything())

  Args:
    filters: filters, of which the first that selects a leaf gets it.

  Returns:
    One predicate a filter.

  Raises:
    ValueError: if a filter after `...` or `True` could never get a leaf.
    TypeError: if one of them is not a filter.
  """
  _check_order(filters)
  return tuple(map(to_predicate, filters))


def engine_filters(
  filters: collections.abc.Sequence[Filter],
) -> tuple[AnyValue, ...]:
  """Turns filters that are tried in order into the form the engine takes.

  Types, and what is always true, it tests without calling Python.

  Example:

    >>> import nnx
    >>> nnx.filterlib.engine_filters([nnx.Param, "frozen", ...])
    (<class 'nnx.variablelib.Param'>, WithTag('frozen'), True)

  Args:
    filters: filters, of which the first that selects a leaf gets it.

  Returns:
    For each filter a class, `True`, or a predicate.

  Raises:
    ValueError: if a filter after `...` or `True` could never get a leaf.
    TypeError: if one of them is not a filter.
  """
  _check_order(filters)
  # Types first and without a call: they are the most common by far.
  return tuple(
    [f if isinstance(f, type) else _engine_filter(f) for f in filters]
  )


def _engine_filter(filter: Filter) -> AnyValue:
  if filter is ... or filter is True:
    return True
  predicate = to_predicate(filter)
  if type(predicate) is OfType and isinstance(predicate.type, type):
    return predicate.type
  return True if type(predicate) is Everything else predicate


def _check_order(filters: collections.abc.Sequence[Filter]) -> None:
  for i, filter in enumerate(filters):
    if filter is ... or filter is True:
      for later in filters[i + 1 :]:
        if later is not ... and later is not True:
          raise ValueError(
            "`...` and `True` select every leaf that is left and must come"
            f" last, but filter {i} is `{filter}` and `{later!r}` follows it."
            " Move it to the end."
          )
