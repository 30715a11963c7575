"""Node types of other libraries as nodes of graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
from typing import Any

from nnx import filterlib
from nnx.engine import _engine

Key = filterlib.Key


@dataclasses.dataclass(frozen=True)
class NodeType:
  """How objects of a class are opened and made: see `register_graph_node_type`.

  Example:

    >>> import nnx
    >>> from nnx.graphlib import registry
    >>> all(
    ...   isinstance(t, registry.NodeType) for t in registry.node_types.values()
    ... )
    True
  """

  flatten: Callable[[Any], tuple[Sequence[tuple[Key, Any]], Any]]
  set_key: Callable[[Any, Key, Any], None]
  pop_key: Callable[[Any, Key], Any]
  create_empty: Callable[[Any], Any]
  clear: Callable[[Any], None]
  init: Callable[[Any, Iterable[tuple[Key, Any]]], None]


# The engine has its own table; this one is for code that is written in Python.
node_types: dict[type, NodeType] = {}


def register_graph_node_type(
  type: type,
  flatten: Callable[[Any], tuple[Sequence[tuple[Key, Any]], Any]],
  set_key: Callable[[Any, Key, Any], None],
  pop_key: Callable[[Any, Key], Any],
  create_empty: Callable[[Any], Any],
  clear: Callable[[Any], None],
  init: Callable[[Any, Iterable[tuple[Key, Any]]], None] | None = None,
) -> None:
  """Makes a class's objects nodes of graphs, with an identity and children.

  Example:

    >>> import nnx
    >>> class Box:
    ...   def __init__(self, **contents):
    ...     self.contents = contents
    >>> nnx.register_graph_node_type(
    ...   Box,
    ...   flatten=lambda box: (list(box.contents.items()), None),
    ...   set_key=lambda box, key, value: box.contents.update({key: value}),
    ...   pop_key=lambda box, key: box.contents.pop(key),
    ...   create_empty=lambda metadata: Box(),
    ...   clear=lambda box: box.contents.clear(),
    ... )
    >>> graphdef, state = nnx.split(Box(a=nnx.Param(1.0), b=2))
    >>> nnx.merge(graphdef, state).contents["a"].value
    1.0

  Args:
    type: the class; subclasses of it are not meant.
    flatten: `flatten(node)` returns pairs of key and child, and metadata that
      is hashable and compares by value.
    set_key: `set_key(node, key, child)` sets a child.
    pop_key: `pop_key(node, key)` removes a child and returns it.
    create_empty: `create_empty(metadata)` makes a node without children.
    clear: `clear(node)` removes all children.
    init: `init(node, pairs)` sets the children of an empty node; by default
      `set_key` is called for each.

  Raises:
    ValueError: if the type is registered, or known to the graph functions as
      it is.
  """
  if init is None:

    def set_all(node, pairs):
      for key, child in pairs:
        set_key(node, key, child)

    init = set_all

  _engine.register_node_type(
    type, flatten, set_key, pop_key, create_empty, clear, init
  )
  node_types[type] = NodeType(
    flatten, set_key, pop_key, create_empty, clear, init
  )
