"""The base of `FlatState`: leaves in the order of their paths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Self, TypeVar

from nnx import filterlib, reprlib
from nnx.nested_mappings import one_or_tuple, sorted_by_path, split_pairs

V = TypeVar("V")

PathParts = filterlib.PathParts
Filter = filterlib.Filter


class FlatLeaves(reprlib.Displayable, Sequence[tuple[PathParts, V]]):
  """The leaves of a state in the order of their paths; see `FlatState`."""

  __slots__ = ("_keys", "_values")

  def __init__(
    self, items: Iterable[tuple[PathParts, V]], /, *, sort: bool = True
  ):
    items = list(items)
    if sort:
      items = sorted_by_path(items)
    self._keys = tuple(path for path, _ in items)
    self._values = [leaf for _, leaf in items]

  @classmethod
  def from_sorted_keys_values(
    cls, keys: tuple[PathParts, ...], values: list[V], /
  ) -> Self:
    """Wraps paths in order and their leaves without copying them.

    Example:

      >>> import nnx
      >>> nnx.FlatState.from_sorted_keys_values((("a",),), [1])[0]
      (('a',), 1)
    """
    self = object.__new__(cls)
    self._keys = keys
    self._values = values
    return self

  @property
  def paths(self) -> tuple[PathParts, ...]:
    """The paths, in order.

    Example:

      >>> import nnx
      >>> nnx.FlatState([(("b",), 1), (("a",), 2)]).paths
      (('a',), ('b',))
    """
    return self._keys

  @property
  def leaves(self) -> list[V]:
    """The leaves, in the order of their paths.

    Example:

      >>> import nnx
      >>> nnx.FlatState([(("b",), 1), (("a",), 2)]).leaves
      [2, 1]
    """
    return self._values

  def __getitem__(self, index):
    if isinstance(index, slice):
      return type(self).from_sorted_keys_values(
        self._keys[index], self._values[index]
      )
    return self._keys[index], self._values[index]

  def __len__(self) -> int:
    return len(self._keys)

  def __iter__(self) -> Iterator[tuple[PathParts, V]]:
    return iter(zip(self._keys, self._values))

  def __eq__(self, other) -> bool:
    if not isinstance(other, FlatLeaves):
      return NotImplemented
    return self._keys == other._keys and self._values == other._values

  def _display(self) -> reprlib.Parts:
    return reprlib.Parts(
      type(self).__name__,
      [(None, pair) for pair in self],
      start="([",
      end="])",
      type=type(self),
      nested={"in_state": True},
    )

  def split(self, first: Filter, /, *filters: Filter):
    """Splits the leaves by filters that together must select all of them.

    Example:

      >>> import nnx
      >>> a, b = nnx.FlatState([(("a",), 1), (("b",), 2.0)]).split(int, ...)
      >>> a.paths, b.paths
      ((('a',),), (('b',),))

    Returns:
      One `FlatState`, or a tuple of them if there are several filters.

    Raises:
      ValueError: if a leaf is left.
    """
    *parts, rest = split_pairs(self, (first, *filters))
    if rest:
      raise ValueError(
        "Filters must cover every leaf, but none of them selects those at"
        f" {[path for path, _ in rest]}: add `...` as the last filter, or use"
        " the non-exhaustive `filter`."
      )
    return one_or_tuple([type(self)(part, sort=False) for part in parts])

  def filter(self, first: Filter, /, *filters: Filter):
    """Selects leaves by filters; those that no filter selects are left out.

    Example:

      >>> import nnx
      >>> nnx.FlatState([(("a",), 1), (("b",), 2.0)]).filter(int).paths
      (('a',),)

    Returns:
      One `FlatState`, or a tuple of them if there are several filters.
    """
    *parts, _ = split_pairs(self, (first, *filters))
    return one_or_tuple([type(self)(part, sort=False) for part in parts])

  @classmethod
  def merge(
    cls,
    flat_state: Iterable[tuple[PathParts, V]],
    /,
    *flat_states: Iterable[tuple[PathParts, V]],
  ) -> Self:
    """Joins flat states into one, which is sorted.

    Example:

      >>> import nnx
      >>> nnx.FlatState.merge([(("b",), 1)], [(("a",), 2)]).paths
      (('a',), ('b',))
    """
    if not flat_states and isinstance(flat_state, cls):
      return flat_state
    return cls(
      [pair for part in (flat_state, *flat_states) for pair in part], sort=True
    )
