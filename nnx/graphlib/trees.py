"""What tree mode takes: objects that are trees, each place with its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax

from nnx.engine import _engine, jax_private, preorder
from nnx.graphlib import modes

T = TypeVar("T")

# What has an identity that shows, since it is written to.
_UNSHARED = (_engine.NodeKind.VARIABLE, _engine.NodeKind.LEAF)


def check(
  structure: _engine.StructureBase,
  names: Sequence[Any],
  function: str,
  *,
  updates: bool = False,
) -> bool:
  """Refuses a graph that is no tree, with the paths and the ways out.

  Objects without Variables may be shared, since each place can have a copy.

  Example:

    >>> import nnx
    >>> from nnx.graphlib import trees
    >>> w = nnx.Param(1.0)
    >>> try:
    ...   trees.check(nnx.graphdef([w, w]), ["node"], "split")
    ... except ValueError as error:
    ...   print(str(error).partition(". ")[0])
    `nnx.split` is in tree mode (`graph=False`), where nothing may be shared, \
but `node[0]` and `node[1]` are one `Param`

  Args:
    structure: of the roots.
    names: what errors call the roots.
    function: the name of the function that is to be given them.
    updates: whether it has the argument `graph_updates`.

  Returns:
    Whether objects are shared at all.

  Raises:
    ValueError: if a Variable is shared, if there is a cycle, or if an object is
      not a pytree of jax.
  """
  if structure._is_tree:
    return False
  opaque = {cls for cls in structure._object_types if not _is_pytree(cls)}
  records = structure._records
  where: dict[int, tuple[int, preorder.Path]] = {}  # of each indexed node
  for position, path in preorder.walk_roots(structure, names):
    record = records[position]
    if record.type in opaque:
      check_type(record.type, function, _text(path), updates=updates)
    if record.kind is not _engine.NodeKind.REF:
      where[record.index] = position, path
      continue
    start, first = where[record.index]
    if position < preorder.subtree_end(records, start):
      problem = f"`{_text(path)}` is `{_text(first)}` again"
      modes.Mode.TREE.refuse(
        function,
        f"there may be no cycles, but {problem}. Remove the reference",
        updates=updates,
      )
    for below, inner in preorder.walk(records, start):
      if records[below].kind in _UNSHARED and records[below].index >= 0:
        cls = records[below].type
        modes.Mode.TREE.refuse(
          function,
          f"nothing may be shared, but `{_text((*first, *inner))}` and"
          f" `{_text((*path, *inner))}` are one"
          f" `{_name(cls or jax.Ref)}`. Give each place its own, by"
          f" `{'nnx.clone' if cls else 'jax.new_ref'}`",
          updates=updates,
        )
  return structure._shares


def check_type(
  cls: type, function: str, where: str, *, updates: bool = False
) -> None:
  """Refuses a type that is not a pytree of jax.

  Example:

    >>> import nnx
    >>> from nnx.graphlib import trees
    >>> trees.check_type(nnx.Dict, "iter_children", "node")

  Args:
    cls: the type.
    function: the name of the function that is given an instance.
    where: what errors call the instance.
    updates: whether the function has the argument `graph_updates`.

  Raises:
    ValueError: if the type has `pytree=False`.
  """
  if not _is_pytree(cls):
    modes.Mode.TREE.refuse(
      function,
      f"objects must be pytrees, but `{where}` is a `{_name(cls)}`, which is"
      " none. Leave `pytree=False` out of its class",
      updates=updates,
    )


def _is_pytree(cls: type) -> bool:
  own = getattr(cls, "_is_pytree", None)
  return jax_private.is_pytree_type(cls) if own is None else own


def _text(path: Sequence[Any]) -> str:
  return preorder.path_text(path[1:], str(path[0]))


def _name(cls: type | None) -> str:
  return "" if cls is None else cls.__name__


def unshared(node: T, structure: _engine.StructureBase, function: str) -> T:
  """Returns a node as the tree that it is; see `check`.

  Example:

    >>> import nnx
    >>> from nnx.graphlib import trees
    >>> node = [nnx.Dict()] * 2
    >>> tree = trees.unshared(node, nnx.graphdef(node), "split")
    >>> tree[0] is tree[1]
    False

  Args:
    node: an object, a Variable, or a pytree of them.
    structure: of the node.
    function: the name of the function that is to be given it.

  Returns:
    The node, or if objects without Variables are shared in it, a copy where
    each place has its own.
  """
  if structure._is_tree or not check(structure, ["node"], function):
    return node
  return copied(node)


def clone(node: T, variables: bool, function: str) -> T:
  """Copies a tree, as `nnx.clone` does; see `check`.

  Example:

    >>> import nnx
    >>> from nnx.graphlib import trees
    >>> node = nnx.Dict(w=nnx.Param(1.0))
    >>> trees.clone(node, False, "clone").w is node.w
    True

  Args:
    node: an object, a Variable, or a pytree of them.
    variables: whether to copy the Variables too.
    function: the name of the function that is to be given it.
  """
  copy = _engine.clone(node, variables, True)
  if copy is not NotImplemented:
    return copy
  node = unshared(node, _engine.graphdef(node), function)
  return _engine.clone(node, variables)


def copied(node: T) -> T:
  """Copies a tree, whose Variables stay the same.

  Example:

    >>> import nnx
    >>> from nnx.graphlib import trees
    >>> node = nnx.Dict(w=nnx.Param(1.0))
    >>> copy = trees.copied(node)
    >>> copy is node, copy.w is node.w
    (False, True)
  """
  if node is None or isinstance(node, jax.Array):  # as most results are
    return node
  return jax.tree.map(
    lambda x: x, node, is_leaf=lambda x: isinstance(x, _engine.VariableBase)
  )
