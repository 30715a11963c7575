"""What an option says of each leaf: axes, shardings and the like, by prefix.

Options such as `in_axes` and `in_shardings` are pytree prefixes: one entry may
stand for a whole argument, for a part of it, or, as a filter map (`StateAxes`,
`StateSharding`), for the Variables of a graph that each filter selects.
`broadcast` gives the entry of every leaf of a structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Callable, Sequence

from nnx import filters as filters_lib
from nnx.graph import _engine


class FilterMap:
  """Pairs of a filter and an entry; the base of StateAxes and StateSharding.

  Example:

    >>> from nnx.transforms.prefix import FilterMap
    >>> FilterMap({"params": 0, ...: None})
    FilterMap({'params': 0, Ellipsis: None})

  Args:
    entries: a mapping from filters to entries, or pairs of them; the first
      filter that selects a leaf decides.
  """

  __slots__ = ("filters", "entries")

  def __init__(self, entries: Mapping[Any, Any] | Sequence[tuple[Any, Any]], /):
    pairs = entries.items() if isinstance(entries, Mapping) else entries
    pairs = list(pairs)
    self.filters = tuple(filter_ for filter_, _ in pairs)
    self.entries = tuple(entry for _, entry in pairs)

  def items(self) -> list[tuple[Any, Any]]:
    """The pairs of a filter and an entry."""
    return list(zip(self.filters, self.entries))

  def __repr__(self) -> str:
    pairs = ", ".join(f"{f!r}: {e!r}" for f, e in self.items())
    return f"{type(self).__name__}({{{pairs}}})"

  def __eq__(self, other: Any) -> bool:
    return type(self) is type(other) and self.items() == other.items()

  def __hash__(self) -> int:
    return hash((type(self), self.filters, self.entries))


def broadcast(
  structure: Any,
  leaves: Sequence[Any],
  entries: Sequence[Any],
  *,
  is_entry: Callable[[Any], bool],
  option: str,
  first_root: int = 0,
) -> list[Any]:
  """The entry of each leaf.

  Args:
    structure: of the roots (arguments, or a result), from the engine.
    leaves: the leaves of the structure.
    entries: one prefix a root, from `first_root` on.
    is_entry: whether something stands for all leaves below it.
    option: the name of the option, for errors.
    first_root: the first root that `entries` speaks of; leaves of earlier ones
      get None.

  Returns:
    One entry a leaf, in the order of the leaves.

  Raises:
    ValueError: if a prefix does not fit the structure, if no filter of a filter
      map selects a Variable, or if a shared Variable gets two entries.
  """
  objects = _engine.unflatten(structure, tuple(leaves))[1]
  walk = _Walk(structure._records, objects, leaves, is_entry, option)
  position = 0
  for _ in range(first_root):
    position = walk.end(position)
  for i, entry in enumerate(entries):
    position = walk.visit(position, entry, (), f"[{i}]" if entries[1:] else "")
  return walk.result


class _Walk:
  """One walk over the records of a structure, along a prefix."""

  def __init__(self, records, objects, leaves, is_entry, option):
    self.records = records
    self.objects = objects
    self.leaves = leaves
    self.is_entry = is_entry
    self.option = option
    self.result: list[Any] = [None] * len(leaves)
    self.assigned: dict[int, tuple[Any, str]] = {}  # node -> entry, path

  def end(self, position: int) -> int:
    """The position after a subtree."""
    children = self.records[position][3]
    position += 1
    for _ in range(children):
      position = self.end(position)
    return position

  def visit(self, position: int, entry: Any, path: tuple, where: str) -> int:
    """Assigns `entry` to the subtree at `position`; returns its end."""
    kind, index, leaf, children, _, keys, _ = self.records[position][:7]
    if kind == "ref":
      if index in self.assigned:
        self.check_same(index, entry, path, where)
      return position + 1
    whole = self.is_entry(entry) or isinstance(entry, FilterMap)
    if index >= 0:
      here = self.select(entry, path, index) if kind == "variable" else entry
      self.assigned[index] = (here, text(where, path))
      if kind == "variable" and whole:
        entry = here
    if leaf >= 0:
      if isinstance(entry, FilterMap):
        entry = self.select(entry, path, -1, self.leaves[leaf])
      elif not whole:
        self.fail(entry, kind, where, path)
      self.result[leaf] = entry
    inner = self.inner(entry, kind, keys, children, where, path, whole)
    next_position = position + 1
    for i in range(children):
      key = keys[i] if keys is not None else i
      next_position = self.visit(next_position, inner[i], (*path, key), where)
    return next_position

  def inner(self, entry, kind, keys, children, where, path, whole) -> list[Any]:
    """The entries of the children."""
    if whole:
      return [entry] * children
    if children == 0:
      return []
    if kind in ("tuple", "list", "namedtuple") and isinstance(
      entry, (tuple, list)
    ):
      if len(entry) == children:
        return list(entry)
    elif keys is not None and isinstance(entry, Mapping):
      if set(entry) == set(keys):
        return [entry[key] for key in keys]
    self.fail(entry, kind, where, path)
    raise AssertionError

  def select(self, entry: Any, path: tuple, index: int, leaf: Any = None) -> Any:
    """The entry of one leaf, by the filters if it is a filter map."""
    if not isinstance(entry, FilterMap):
      return entry
    value = self.objects[index] if index >= 0 else leaf
    for filter_, selected in entry.items():
      if filters_lib.to_predicate(filter_)(path, value):
        return selected
    raise ValueError(
      f"The filters of `{self.option}` must select every leaf, but none of"
      f" {list(entry.filters)} selects `{text('', path)}` of type"
      f" {type(value).__name__}: add `...` as the last filter."
    )

  def check_same(self, index: int, entry: Any, path: tuple, where: str) -> None:
    """Refuses a shared node that is given two different entries."""
    before, first_path = self.assigned[index]
    if isinstance(self.objects[index], _engine.VariableBase):
      entry = self.select(entry, path, index)
    if before != entry:
      raise ValueError(
        f"`{self.option}` must give a shared node one entry, but the"
        f" {type(self.objects[index]).__name__} at `{first_path}` and"
        f" `{text(where, path)}` has both {before!r} and {entry!r}."
      )

  def fail(self, entry: Any, kind: str, where: str, path: tuple) -> None:
    """Raises the error for a prefix that does not fit."""
    raise ValueError(
      f"`{self.option}` must be a prefix of what it speaks of, but at"
      f" `{text(where, path)}` there is a {kind} where it has {entry!r}."
    )


def text(where: str, path: Sequence[Any]) -> str:
  """A path as a user would type it."""
  parts = [f".{key}" if isinstance(key, str) else f"[{key!r}]" for key in path]
  return (where + "".join(parts)).lstrip(".") or "<root>"
