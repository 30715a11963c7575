"""Walks over the records of a structure, which stand in preorder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from nnx.engine import _engine

Records = Sequence[_engine.NodeRecord]
Path = tuple[Any, ...]


def is_graph_node(record: _engine.NodeRecord) -> bool:
  """Tells whether a node has an identity, and is met here first.

  Example:

    >>> import nnx
    >>> from nnx.engine import preorder
    >>> shared = nnx.Param(1.0)
    >>> records = nnx.graphdef([shared, 2, shared])._records
    >>> [preorder.is_graph_node(record) for record in records]
    [True, True, False, False]
  """
  return record.index >= 0 and record.kind is not _engine.NodeKind.REF


def child_keys(record: _engine.NodeRecord) -> Sequence[Any]:
  """Lists the keys of a node's children.

  Example:

    >>> import nnx
    >>> from nnx.engine import preorder
    >>> root, variable, *_ = nnx.graphdef([nnx.Param((1.0, 2.0))])._records
    >>> list(preorder.child_keys(root)), list(preorder.child_keys(variable))
    ([0], ['value'])
  """
  if record.kind is _engine.NodeKind.VARIABLE:
    return ("value",)[: record.children]
  return range(record.children) if record.keys is None else record.keys


def walk(
  records: Records, position: int = 0, path: Path = ()
) -> Iterator[tuple[int, Path]]:
  """Walks over the nodes of a subtree, parents first.

  Example:

    >>> import nnx
    >>> from nnx.engine import preorder
    >>> graphdef = nnx.graphdef({"a": [nnx.Param(1.0), 2]})
    >>> list(preorder.walk(graphdef._records))
    [(0, ()), (1, ('a',)), (2, ('a', 0)), (3, ('a', 1))]

  Args:
    records: those of a structure.
    position: that of the subtree.
    path: that of the subtree.

  Yields:
    Positions, which are consecutive, and paths.
  """
  # Of the nodes to come; the next one last.
  below = [path] if position < len(records) else []
  while below:
    path = below.pop()
    yield position, path
    keys = child_keys(records[position])
    below += [(*path, key) for key in reversed(keys)]
    position += 1


def subtree_end(records: Records, position: int) -> int:
  """Finds the position after a subtree.

  Example:

    >>> import nnx
    >>> from nnx.engine import preorder
    >>> preorder.subtree_end(nnx.graphdef([1, [2]])._records, 0)
    4
  """
  left = 1
  while left:
    left += records[position].children - 1
    position += 1
  return position


def roots(structure: _engine.StructureBase) -> list[tuple[int, int]]:
  """Finds where the subtree of each root starts and ends.

  Example:

    >>> import nnx
    >>> from nnx.engine import preorder
    >>> preorder.roots(nnx.graphdef([1, [2]]))
    [(0, 4)]
  """
  records, spans, start = structure._records, [], 0
  for _ in range(structure._num_roots):
    end = subtree_end(records, start)
    spans.append((start, end))
    start = end
  return spans


def walk_roots(
  structure: _engine.StructureBase, keys: Sequence[Any]
) -> Iterator[tuple[int, Path]]:
  """Walks over the nodes of all roots; paths start with the key of the root.

  Example:

    >>> import nnx
    >>> from nnx.engine import preorder
    >>> list(preorder.walk_roots(nnx.graphdef([1]), ["x"]))
    [(0, ('x',)), (1, ('x', 0))]
  """
  records = structure._records  # made anew by each access
  for key, (start, _) in zip(keys, roots(structure)):
    yield from walk(records, start, (key,))


def leaf_names(
  structure: _engine.StructureBase, keys: Sequence[Any]
) -> dict[int, str]:
  """Names the leaves of a structure, by their numbers.

  Example:

    >>> import nnx
    >>> from nnx.engine import preorder
    >>> preorder.leaf_names(nnx.graphdef({"a": [nnx.Param(1.0)]}), ["x"])
    {0: 'x.a[0]'}

  Args:
    structure: the structure.
    keys: the name of each root.
  """
  records = structure._records
  return {
    records[position].leaf: path_text(path)
    for position, path in walk_roots(structure, keys)
    if records[position].leaf >= 0
  }


def path_text(path: Sequence[Any], start: str = "") -> str:
  """Writes a path, from a name on, as a user would type it.

  Example:

    >>> from nnx.engine import preorder
    >>> preorder.path_text(("layers", 0, "w"))
    'layers[0].w'
    >>> preorder.path_text(("layers", 0), "model")
    'model.layers[0]'
  """
  parts = [f".{key}" if isinstance(key, str) else f"[{key!r}]" for key in path]
  return (start + "".join(parts)).lstrip(".") or "<root>"


def leaves(records: Records, start: int, end: int) -> list[int]:
  """Lists the numbers of the leaves between two positions.

  Example:

    >>> import nnx
    >>> from nnx.engine import preorder
    >>> records = nnx.graphdef([nnx.Param(1.0), 2, nnx.Param(3.0)])._records
    >>> preorder.leaves(records, 2, len(records))
    [1]
  """
  return [record.leaf for record in records[start:end] if record.leaf >= 0]
