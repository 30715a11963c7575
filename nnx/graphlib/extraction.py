"""Pytrees of objects as pytrees of arrays, with references kept."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import jax

from nnx import environment
from nnx.engine import _engine, preorder, serialization
from nnx.graphlib import contexts, traversal


class NodeStates:
  """The graphdef and the states of an object in a tree; a pytree of the states.

  Example:

    >>> import nnx
    >>> tree = nnx.to_tree([nnx.Dict(a=nnx.Param(1.0)), 2])
    >>> tree[0].state["a"].value, tree[1]
    (1.0, 2)

  Args:
    graphdef: the graphdef, or None.
    states: the states.
    metadata: anything static that compares by value.
  """

  __slots__ = ("_graphdef", "states", "metadata")

  def __init__(
    self, graphdef: Any, states: tuple[Any, ...], metadata: Any = None
  ):
    self._graphdef = graphdef
    self.states = states
    self.metadata = metadata

  @property
  def graphdef(self) -> Any:
    """The graphdef."""
    if self._graphdef is None:
      raise ValueError(
        "These `NodeStates` were made of states or prefixes alone, and have no"
        " graphdef."
      )
    return self._graphdef

  @property
  def state(self) -> Any:
    """The only state."""
    if len(self.states) != 1:
      raise ValueError(
        f"There must be one state, but there are {len(self.states)}. Use"
        " `.states`."
      )
    return self.states[0]

  @classmethod
  def from_split(
    cls, graphdef: Any, state: Any, /, *states: Any, metadata: Any = None
  ) -> NodeStates:
    """Makes one of the results of a split."""
    return cls(graphdef, (state, *states), metadata)

  @classmethod
  def from_states(cls, state: Any, *states: Any) -> NodeStates:
    """Makes one of states alone."""
    return cls(None, (state, *states))

  @classmethod
  def from_prefixes(
    cls, prefixes: Any, /, *, metadata: Any = None
  ) -> NodeStates:
    """Makes one of what stands for states in a prefix of a tree, say axes."""
    return cls(None, tuple(prefixes), metadata)


def _restore(metadata: Any, children: Any) -> NodeStates:
  graphdef, states = children
  return NodeStates(graphdef, states, metadata)


jax.tree_util.register_pytree_with_keys(
  NodeStates,
  lambda node: (
    (
      (jax.tree_util.GetAttrKey("_graphdef"), node._graphdef),
      (jax.tree_util.GetAttrKey("states"), node.states),
    ),
    node.metadata,
  ),
  _restore,
)
serialization.register(NodeStates)


def _is_object(value: Any) -> bool:
  return isinstance(value, _engine.VariableBase) or traversal.is_graph_node(
    value
  )


def _is_node_states(value: Any) -> bool:
  return isinstance(value, NodeStates)


def _split(context, path, prefix, leaf):
  del path, prefix
  return NodeStates.from_split(*context.split(leaf))


def _merge(context, path, prefix, leaf):
  del prefix
  if not isinstance(leaf, NodeStates):
    raise ValueError(
      f"The tree must hold `NodeStates` at `{jax.tree_util.keystr(path)}`, as"
      f" `nnx.to_tree` makes them, but got a `{type(leaf).__name__}`."
    )
  return context.merge(leaf.graphdef, *leaf.states)


def _map(
  function: Callable[[Any, Any, Any], Any],
  tree: Any,
  prefix: Any,
  is_leaf: Callable[[Any], bool],
) -> Any:
  """Applies `function(path, prefix, leaf)` to a tree; None is not a prefix."""
  leaves, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  if prefix is None:
    prefixes = [None] * len(leaves)
  else:
    prefixes = []
    jax.tree.map(
      lambda part, below: prefixes.extend(
        [part] * len(jax.tree.leaves(below, is_leaf=is_leaf))
      ),
      prefix,
      tree,
      is_leaf=lambda x: x is None or is_leaf(x),
    )
  return jax.tree.unflatten(
    treedef,
    [
      function(path, part, leaf) for (path, leaf), part in zip(leaves, prefixes)
    ],
  )


def _text(path: Any, below: Any) -> str:
  return preorder.path_text(below, f"tree{jax.tree_util.keystr(path)}")


class _Aliases:
  """What a prefix says of each Variable, which must be one thing."""

  def __init__(self) -> None:
    self._seen: dict[int, tuple[tuple[Any, Any], Any]] = {}

  def check(self, path: Any, part: Any, node: Any) -> None:
    """Refuses a shared Variable of which two things are said.

    Raises:
      ValueError: if there is one in the node.
    """
    # `nnx.StateAxes` and the like say another thing of each Variable.
    map_prefix = getattr(part, "map_prefix", None)
    for below, variable in traversal.iter_graph(node, graph=True):
      if not isinstance(variable, _engine.VariableBase):
        continue
      entry = part if map_prefix is None else map_prefix(below, variable)
      place = path, below
      first, given = self._seen.setdefault(id(variable), (place, entry))
      if given != entry:
        raise ValueError(
          "`prefix` must give a shared Variable one entry, but the"
          f" `{type(variable).__name__}` at `{_text(*first)}` and"
          f" `{_text(*place)}` has both {given!r} and {entry!r}."
        )


def to_tree(
  tree: Any,
  /,
  *,
  prefix: Any = None,
  split_fn: Callable[[Any, Any, Any, Any], Any] = _split,
  map_non_graph_nodes: bool = False,
  ctxtag: Hashable | None = None,
  check_aliasing: bool = True,
) -> Any:
  """Replaces the objects and Variables of a tree by `NodeStates`.

  Example:

    >>> import nnx
    >>> model = nnx.Dict(a=nnx.Param(1.0))
    >>> first, second = nnx.from_tree(nnx.to_tree((model, model)))
    >>> first is second
    True

  Args:
    tree: a pytree of objects and anything else.
    prefix: a prefix of the tree, whose leaves `split_fn` gets.
    split_fn: `split_fn(context, path, prefix, leaf)` makes the replacement of
      an object; by default of what `context.split` returns.
    map_non_graph_nodes: whether `split_fn` is called for all other leaves too.
    ctxtag: the tag of an `nnx.update_context` that this belongs to.
    check_aliasing: whether the prefix must say the same of a Variable in each
      place where it is.

  Returns:
    The tree.

  Raises:
    ValueError: if the prefix says two things of a shared Variable.
  """
  environment.check_flags(
    map_non_graph_nodes=map_non_graph_nodes, check_aliasing=check_aliasing
  )
  aliases = _Aliases() if check_aliasing and prefix is not None else None
  with contexts.split_context(ctxtag) as context:

    def replace(path, part, leaf):
      if aliases is not None and _is_object(leaf):
        aliases.check(path, part, leaf)
      if map_non_graph_nodes or _is_object(leaf):
        return split_fn(context, path, part, leaf)
      return leaf

    return _map(replace, tree, prefix, _is_object)


def from_tree(
  tree: Any,
  /,
  *,
  prefix: Any = None,
  merge_fn: Callable[[Any, Any, Any, Any], Any] = _merge,
  is_node_leaf: Callable[[Any], bool] = _is_node_states,
  is_leaf: Callable[[Any], bool] = _is_node_states,
  map_non_graph_nodes: bool = False,
  is_inner: bool | None = None,
  ctxtag: Hashable | None = None,
) -> Any:
  """Inverts `to_tree`; see there.

  Example:

    >>> import nnx
    >>> nnx.from_tree(nnx.to_tree([nnx.Param(1.0), 2]))[0].value
    1.0

  Args:
    tree: the tree.
    prefix: a prefix of the tree, whose leaves `merge_fn` gets.
    merge_fn: `merge_fn(context, path, prefix, leaf)` makes the object of its
      replacement; by default by `context.merge`.
    is_node_leaf: which leaves are replacements.
    is_leaf: which nodes of the tree are leaves.
    map_non_graph_nodes: whether `merge_fn` is called for all other leaves too.
    is_inner: with a tag, whether this is inside of the transform.
    ctxtag: the tag of an `nnx.update_context` that this belongs to.

  Returns:
    The tree with objects.

  Raises:
    ValueError: if the tree is not one that `to_tree` has made.
  """
  environment.check_flags(map_non_graph_nodes=map_non_graph_nodes)
  if is_inner is not None:
    environment.check_flags(is_inner=is_inner)
  with contexts.merge_context(ctxtag, is_inner) as context:

    def restore(path, part, leaf):
      if map_non_graph_nodes or is_node_leaf(leaf):
        return merge_fn(context, path, part, leaf)
      return leaf

    return _map(restore, tree, prefix, is_leaf)
