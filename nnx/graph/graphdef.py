"""GraphDef and NodeDef: the static half of what `nnx.split` returns."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from nnx.graph import _engine

Node = TypeVar("Node")

_MAX_SHOWN = 64


class GraphDef(_engine.StructureBase, Generic[Node]):
  """The structure of an object graph, without its Variables' values.

  Holds the classes, the attribute names, the static attributes, the metadata of
  the Variables and which references are shared. It is immutable, hashable,
  compares by value, pickles, and is a pytree of jax without leaves, so it can
  be closed over or passed to a jitted function.

  Example:

    >>> import nnx
    >>> class Foo(nnx.Module):
    ...   def __init__(self):
    ...     self.w = nnx.Param(1.0)
    ...     self.size = 3
    >>> graphdef, state = nnx.split(Foo())
    >>> isinstance(graphdef, nnx.GraphDef), graphdef.num_leaves
    (True, 1)
    >>> graphdef == nnx.graphdef(Foo())
    True
  """

  __slots__ = ()

  def __reduce__(self):
    return _restore, (type(self), self._records, self._num_roots)

  def __repr__(self) -> str:
    lines = []
    _describe(self._records, 0, "", 0, lines)
    shown = lines[:_MAX_SHOWN]
    if len(lines) > len(shown):
      shown.append(f"... {len(lines) - len(shown)} more lines")
    body = "\n".join("  " + line for line in shown)
    return (
      f"{type(self).__name__}(num_nodes={self.num_nodes},"
      f" num_leaves={self.num_leaves},\n{body}\n)"
    )


class NodeDef(GraphDef[Node]):
  """The GraphDef of a graph with nodes: what the graph functions return.

  Example:

    >>> import nnx
    >>> type(nnx.graphdef(nnx.Dict(a=nnx.Param(1.0))))
    <class 'nnx.graph.NodeDef'>
  """

  __slots__ = ()


NodeDef.__module__ = "nnx.graph"
GraphDef.__module__ = "nnx.graph"


def _restore(cls: type, records: tuple, num_roots: int) -> GraphDef[Any]:
  return cls._restore(records, num_roots)


def _describe(
  records: tuple, position: int, label: str, depth: int, lines: list[str]
) -> int:
  """Adds the lines of one subtree; returns the position after it."""
  kind, index, _, children, type_, keys, aux = records[position][:7]
  name = type_.__name__ if type_ is not None else kind
  indent = "  " * depth
  prefix = f"{indent}{label}: " if label else indent
  if kind == "static":
    lines.append(f"{prefix}{aux!r}")
  elif kind == "leaf":
    lines.append(f"{prefix}<array>")
  elif kind == "ref":
    lines.append(f"{prefix}<shared #{index}>")
  else:
    number = f" #{index}" if index >= 0 else ""
    metadata = f" {aux}" if kind == "variable" and aux else ""
    lines.append(f"{prefix}{name}{number}{metadata}")
  position += 1
  for i in range(children):
    key = keys[i] if keys is not None else i
    position = _describe(records, position, str(key), depth + 1, lines)
  return position
