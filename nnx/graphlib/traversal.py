"""Walks that call Python for each node: iteration, maps, duplicates.

The engine opens the nodes, in the canonical order: ints, then strings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax

from nnx import filterlib
from nnx.engine import _engine
from nnx.graphlib import modes, trees

Key = filterlib.Key
PathParts = filterlib.PathParts


def is_graph_node(value: Any) -> bool:
  """Tells whether a value has an identity: an object or a custom node.

  Example:

    >>> import nnx
    >>> nnx.graph.is_graph_node(nnx.Dict()), nnx.graph.is_graph_node([1])
    (True, False)
  """
  return isinstance(value, _engine.ObjectBase) or _engine.is_custom_node(value)


def is_node(value: Any) -> bool:
  """Tells whether a value is a node: a graph node or a pytree node.

  Example:

    >>> import nnx
    >>> [nnx.graph.is_node(x) for x in (nnx.Dict(), [1], nnx.Param(1), 1)]
    [True, True, False, False]
  """
  return _engine.items(value) is not None


def iter_graph(
  node: Any, /, *, graph: bool | None = None
) -> Iterator[tuple[PathParts, Any]]:
  """Walks over the nodes and leaves of a graph with their paths.

  Children come before their parents, in the order of their names, ints before
  strings. A node or Variable that is shared comes once; static values come
  whenever they are met.

  Example:

    >>> import nnx
    >>> class Foo(nnx.Module):
    ...   def __init__(self):
    ...     self.w = nnx.Param(1.0)
    ...     self.size = 3
    >>> foo = Foo()
    >>> for path, value in nnx.iter_graph([foo, foo]):
    ...   print(path, type(value).__name__)
    (0, 'size') int
    (0, 'w') Param
    (0,) Foo
    () list

  Args:
    node: an object, or a pytree of objects.
    graph: `False` refuses what is no tree, and comes to an object without
      Variables wherever it is; None stands for `nnx.set_graph_mode`.

  Returns:
    An iterator over pairs of path and value.

  Raises:
    ValueError: in tree mode, if the graph is no tree.
  """
  is_tree = modes.is_tree(graph)
  if is_tree and not _engine.is_tree(node):
    trees.check(_engine.graphdef(node), ["node"], "iter_graph")
  return _iterate(node, is_tree)


def _iterate(node: Any, is_tree: bool) -> Iterator[tuple[PathParts, Any]]:
  """Walks over a node, to each value once or, in a tree, to each place."""
  seen: set[int] = set()
  # What was seen is kept alive, or another object might get its address.
  kept: list[Any] = []
  stack: list[tuple[PathParts, Any, bool]] = [((), node, False)]
  while stack:
    path, value, opened = stack.pop()
    if opened:
      yield path, value
      continue
    items = _engine.items(value, is_tree)
    if not is_tree and (
      items is not None or isinstance(value, _engine.VariableBase)
    ):
      if id(value) in seen:
        continue
      seen.add(id(value))
      kept.append(value)
    if items is None:
      yield path, value
      continue
    stack.append((path, value, True))
    for key, child in reversed(items):
      stack.append(((*path, key), child, False))


def check_opened(node: Any, graph: bool | None, function: str) -> None:
  """Refuses in tree mode to open an object that is no pytree.

  Example:

    >>> import nnx
    >>> from nnx.graphlib import traversal
    >>> traversal.check_opened(nnx.Dict(), False, "iter_children")

  Args:
    node: the object, or anything else.
    graph: the argument of the function.
    function: its name.

  Raises:
    ValueError: if it is one.
  """
  if modes.is_tree(graph) and isinstance(node, _engine.ObjectBase):
    trees.check_type(type(node), function, "node")


def iter_children(
  node: Any, /, *, graph: bool | None = None
) -> Iterator[tuple[Key, Any]]:
  """Walks over the graph nodes directly below a node, with their names.

  Example:

    >>> import nnx
    >>> children = nnx.graph.iter_children([nnx.Dict(), 1, nnx.List()])
    >>> [key for key, _ in children]
    [0, 2]

  Args:
    node: an object or a pytree node.
    graph: `False` takes trees; children that are shared come each time in any
      mode. None stands for `nnx.set_graph_mode`.

  Yields:
    Pairs of name and node, in the order of the names.

  Raises:
    ValueError: if `node` is not a node, or in tree mode not a pytree.
  """
  check_opened(node, graph, "iter_children")
  items = _engine.items(node)
  if items is None:
    raise ValueError(
      f"`node` must be an object of nnx, but got a `{type(node).__name__}`."
    )
  for key, child in items:
    if is_graph_node(child):
      yield key, child


def _with_child(
  node: Any, items: list[tuple[Key, Any]], position: int, child: Any
) -> Any:
  """Replaces a child of a node: in place if it can be changed."""
  key = items[position][0]
  if isinstance(node, _engine.ObjectBase):
    node._check_can_update()
    attributes: dict[Any, Any] = vars(node)
    attributes[key] = child
  elif isinstance(node, list):
    node[position] = child
  elif isinstance(node, dict):
    node[key] = child
  elif _engine.is_custom_node(node):
    _engine.set_item(node, key, child)
  elif hasattr(type(node), "_from_nested"):  # a State
    node[key] = child
  else:
    # Tuples, and pytrees that are registered with jax.
    children, treedef = jax.tree_util.tree_flatten(
      node, is_leaf=lambda x: x is not node
    )
    children[position] = child
    return jax.tree_util.tree_unflatten(treedef, children)
  return node


def recursive_map(
  f: Callable[[PathParts, Any], Any], node: Any, /, *, graph: bool | None = None
) -> Any:
  """Applies a function to the nodes and leaves of a copy of a graph.

  Children come before their parents. The copy shares the Variables of the
  original; where the function returns something else than it got, that takes
  the place. Shared nodes and Variables are mapped once.

  Example:

    >>> import nnx
    >>> class Foo(nnx.Module):
    ...   def __init__(self):
    ...     self.sizes = [1, 2]
    >>> double = lambda path, x: 2 * x if isinstance(x, int) else x
    >>> foo = Foo()
    >>> nnx.recursive_map(double, foo).sizes, foo.sizes
    ([2, 4], [1, 2])

  Args:
    f: called with the path and the value; returns what takes its place.
    node: an object, or a pytree of objects.
    graph: `False` refuses what is no tree; None stands for
      `nnx.set_graph_mode`.

  Returns:
    The copy, or what the function made of it.

  Raises:
    ValueError: if the graph has a cycle, whose nodes have no order; in tree
      mode, if it is no tree.
  """
  is_tree = modes.is_tree(graph)
  if is_tree:
    copy = trees.clone(node, False, "recursive_map")
  else:
    copy = _engine.clone(node, False)
  results: dict[int, Any] = {}
  pending: set[int] = set()
  kept: list[Any] = []

  def visit(path: PathParts, value: Any) -> Any:
    if id(value) in results:
      return results[id(value)]
    if id(value) in pending:
      raise ValueError(
        "The graph must have no cycle to be mapped, but there is one at"
        f" `{path}` through a `{type(value).__name__}`."
      )
    items = _engine.items(value, is_tree) or []
    shared = isinstance(value, (list, dict, _engine.VariableBase)) or (
      is_graph_node(value)
    )
    original = value
    if shared:
      pending.add(id(original))
      kept.append(original)
    for position, (key, child) in enumerate(items):
      new_child = visit((*path, key), child)
      if new_child is not child:
        value = _with_child(value, items, position, new_child)
    result = f(path, value)
    if shared:
      pending.discard(id(original))
      results[id(original)] = result
    return result

  return visit((), copy)


def find_duplicates(
  node: Any, /, *, only: filterlib.Filter = ...
) -> list[list[PathParts]]:
  """Finds the paths of nodes, Variables and arrays that occur repeatedly.

  Example:

    >>> import nnx
    >>> class Foo(nnx.Module):
    ...   def __init__(self):
    ...     self.a = nnx.Param(1.0)
    ...     self.b = nnx.Param(2.0)
    ...     self.c = self.b
    >>> nnx.find_duplicates(Foo())
    [[('b',), ('c',)]]

  Args:
    node: an object, or a pytree of objects.
    only: a filter of the nodes and leaves meant.

  Returns:
    A list of paths for each node or leaf that has several.
  """
  selected = filterlib.to_predicate(only)
  paths: dict[int, list[PathParts]] = {}
  pending: set[int] = set()
  kept: list[Any] = []

  def visit(path: PathParts, value: Any) -> None:
    items = _engine.items(value)
    if _has_identity(value, items is None):
      if id(value) in paths:
        if selected(path, value):
          paths[id(value)].append(path)
        return
      paths[id(value)] = [path]
      kept.append(value)
    elif items is None or id(value) in pending:
      return
    pending.add(id(value))
    for key, child in items or ():
      visit((*path, key), child)
    pending.discard(id(value))

  visit((), node)
  return [group for group in paths.values() if len(group) > 1]


def _has_identity(value: Any, is_leaf: bool) -> bool:
  if is_leaf:  # a Variable, an array, or a static value
    return _engine.holds_data(value)
  return is_graph_node(value)
