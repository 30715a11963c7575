"""flatten and unflatten: graphs as structures and flat lists of leaves."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Any, TypeVar

from nnx import environment, statelib
from nnx.engine import _engine
from nnx.graphlib import functional, modes, states, trees
from nnx.graphlib.definitions import GraphDef

Node = TypeVar("Node")


class RefMap(MutableMapping[Any, int]):
  """A mapping from objects, by identity, to numbers.

  Example:

    >>> import nnx
    >>> refs = nnx.graph.RefMap()
    >>> key = []
    >>> refs[key] = 0
    >>> key in refs, [] in refs
    (True, False)
  """

  def __init__(self, mapping: Any = ()):
    self._entries: dict[int, tuple[Any, int]] = {}
    self.update(mapping)

  def __getitem__(self, key: Any) -> int:
    return self._entries[id(key)][1]

  def __setitem__(self, key: Any, value: int) -> None:
    self._entries[id(key)] = (key, value)

  def __delitem__(self, key: Any) -> None:
    del self._entries[id(key)]

  def __contains__(self, key: Any) -> bool:
    return id(key) in self._entries

  def __iter__(self):
    return (key for key, _ in self._entries.values())

  def __len__(self) -> int:
    return len(self._entries)


class IndexMap(dict[int, Any]):
  """A mapping from numbers to objects.

  Example:

    >>> import nnx
    >>> nnx.graph.IndexMap.from_refmap(nnx.graph.RefMap([("a", 0)]))
    {0: 'a'}
  """

  @staticmethod
  def from_refmap(refmap: RefMap) -> IndexMap:
    """Inverts a `RefMap`."""
    return IndexMap((index, ref) for ref, index in refmap.items())


def _by_number(mapping: Mapping[int, Any]) -> list[Any]:
  size = max(mapping, default=-1) + 1
  return [mapping.get(number) for number in range(size)]


def flatten(
  node: Any,
  /,
  *,
  with_paths: bool = True,
  ref_index: RefMap | None = None,
  ref_outer_index: RefMap | None = None,
  graph: bool | None = None,
) -> tuple[Any, Any]:
  """Splits an object into its structure and its leaves.

  Example:

    >>> import nnx
    >>> graphdef, leaves = nnx.graph.flatten(nnx.Dict(a=nnx.Param(1.0)))
    >>> leaves.paths
    (('a',),)
    >>> nnx.graph.unflatten(graphdef, leaves).a.value
    1.0

  Args:
    node: an object, a Variable, or a pytree of them.
    with_paths: whether to return a `FlatState`; otherwise a list of the values
      of the Variables.
    ref_index: the objects that earlier calls met, with their numbers; they are
      references now, and those that are new are added.
    ref_outer_index: numbers of objects that `unflatten` is to update.
    graph: `False` refuses what is no tree: shared Variables, cycles; None
      stands for `nnx.set_graph_mode`.

  Returns:
    The graphdef and the leaves, in canonical order.
  """
  environment.check_flags(with_paths=with_paths)
  indexed = ref_index is not None or ref_outer_index is not None
  seen: list[Any] | None = None
  updated: list[Any] | None = None
  if ref_index is not None:
    seen = _by_number(IndexMap.from_refmap(ref_index))
  if ref_outer_index is not None:
    updated = _by_number(IndexMap.from_refmap(ref_outer_index))
  if not indexed:
    graphdef, (mapping,) = functional.split_in_mode(
      "flatten", node, (), True, graph
    )
  else:
    if modes.is_tree(graph):
      node = trees.unshared(node, _engine.graphdef(node), "flatten")
    graphdef, (mapping,) = _engine.split(node, (True,), True, seen, updated)
  if ref_index is not None and seen is not None:
    for number in range(len(ref_index), len(seen)):
      ref_index[seen[number]] = number
  if type(mapping) is dict:
    paths, leaves = _engine.flatten_mapping(mapping)
  else:
    paths, leaves = ((),), [mapping]
  if with_paths:
    return graphdef, statelib.FlatState.from_sorted_keys_values(paths, leaves)
  return graphdef, [
    leaf.raw_value if isinstance(leaf, _engine.VariableBase) else leaf
    for leaf in leaves
  ]


def unflatten(
  graphdef: GraphDef[Node],
  state: Any,
  /,
  *,
  index_ref: IndexMap | dict[int, Any] | None = None,
  outer_index_outer_ref: IndexMap | dict[int, Any] | None = None,
  copy_variables: bool = False,
  recreate_variables: bool = True,
) -> Node:
  """Makes an object of its structure and its leaves; inverse of `flatten`.

  Example:

    >>> import nnx
    >>> graphdef, leaves = nnx.graph.flatten(
    ...   nnx.Dict(a=nnx.Param(1.0)), with_paths=False
    ... )
    >>> nnx.graph.unflatten(graphdef, [2.0]).a.value
    2.0

  Args:
    graphdef: the graphdef.
    state: a `FlatState`, a list of leaves in canonical order, a `State`, or a
      nested dict.
    index_ref: the objects that earlier calls made, by number; those that this
      call makes are added.
    outer_index_outer_ref: objects by the numbers that `flatten` got in
      `ref_outer_index`; they are changed into what the graphdef has in their
      place.
    copy_variables: whether to copy the Variables among the leaves.
    recreate_variables: whether a value in the place of a Variable becomes a
      Variable of the kind that was there.

  Returns:
    The object.

  Raises:
    ValueError: if the leaves are not those of the graph.
  """
  environment.check_flags(
    copy_variables=copy_variables, recreate_variables=recreate_variables
  )
  seen: list[Any] | None = None
  updated: list[Any] | None = None
  if index_ref is not None:
    seen = _by_number(index_ref)
  if outer_index_outer_ref is not None:
    updated = _by_number(outer_index_outer_ref)
  node = _engine.merge(
    graphdef,
    states.from_state(state),
    copy_variables,
    not recreate_variables,
    seen,
    updated,
  )
  if index_ref is not None and seen is not None:
    for number in range(len(index_ref), len(seen)):
      index_ref[number] = seen[number]
  return node
