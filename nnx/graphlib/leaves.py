"""Functions of the leaves of an object: of its Variables, one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax

from nnx import environment, filterlib, statelib, variablelib
from nnx.engine import _engine
from nnx.graphlib import functional
from nnx.graphlib.states import as_state
from nnx.graphlib.traversal import find_duplicates

A = TypeVar("A")

Filter = filterlib.Filter
PathParts = filterlib.PathParts


def map(
  f: Callable[[PathParts, Any], Any],
  node: A,
  /,
  *,
  graph: bool | None = None,
  recreate_variables: bool = True,
) -> A:
  """Copies an object, with a function applied to its leaves.

  Example:

    >>> import nnx
    >>> model = nnx.Dict(a=nnx.Param(1.0))
    >>> nnx.map(lambda path, v: v.replace(v.value + 1), model).a.value
    2.0

  Args:
    f: called with the path and the leaf, a Variable or an array; returns the
      new leaf, or the new value of the Variable.
    node: an object, a Variable, or a pytree of them.
    graph: `False` refuses what is no tree: shared Variables, cycles; None
      stands for `nnx.set_graph_mode`.
    recreate_variables: whether a value in the place of a Variable becomes a
      Variable of the kind that was there; otherwise it stays what it is.

  Returns:
    The copy.
  """
  graphdef, (mapping,) = functional.split_in_mode("map", node, (), True, graph)
  state = as_state(mapping)
  if isinstance(state, statelib.State):
    state = statelib.map_state(f, state)
  else:
    state = f((), state)
  return functional.merge(
    graphdef, state, recreate_variables=recreate_variables
  )


def as_pure(tree: A) -> A:
  """Replaces the Variables of a pytree by their raw values.

  `pure` is another name of it.

  Example:

    >>> import nnx
    >>> nnx.as_pure(nnx.state(nnx.Dict(a=nnx.Param(1.0))))
    State({
      'a': 1.0
    })

  Args:
    tree: a State, an object, or any pytree.

  Returns:
    A new pytree.
  """

  def value(leaf):
    if isinstance(leaf, _engine.VariableBase):
      return as_pure(leaf.raw_value)
    return leaf[...] if variablelib.is_ref(leaf) else leaf

  return jax.tree.map(
    value, tree, is_leaf=lambda x: isinstance(x, _engine.VariableBase)
  )


pure = as_pure


def with_vars(
  node: A,
  /,
  *,
  hijax: bool | None = None,
  ref: bool | None = None,
  mutable: bool | None = None,
  only: Filter = ...,
  allow_duplicates: bool = False,
) -> A:
  """Copies an object; the new Variables hold their values in another way.

  `vars_as` is another name of it.

  Example:

    >>> import nnx
    >>> import jax.numpy as jnp
    >>> model = nnx.Dict(a=nnx.Param(jnp.ones(2)))
    >>> refs = nnx.with_vars(model, ref=True)
    >>> refs.a.ref, model.a.ref
    (True, False)

  Args:
    node: an object, a Variable, or a pytree of them.
    hijax: whether traces of jax itself can write the values.
    ref: whether the values are in mutable arrays of jax.
    mutable: whether the values may be written. If not, they are kept as plain
      arrays, so that jax can differentiate with respect to them; `mutable=True`
      undoes it.
    only: a filter of the Variables meant.
    allow_duplicates: whether a Variable that changes may be shared.

  Returns:
    The copy.

  Raises:
    TypeError: if a switch is something else than True, False or None.
    ValueError: if a Variable that changes is shared.
  """
  changes = {
    name: value
    for name, value in (("hijax", hijax), ("ref", ref), ("mutable", mutable))
    if value is not None
  }
  environment.check_flags(**changes, allow_duplicates=allow_duplicates)
  selected = filterlib.to_predicate(only)

  def changed(path, value):
    if not isinstance(value, _engine.VariableBase) or not selected(path, value):
      return False
    return any(getattr(value, name) != new for name, new in changes.items())

  if not allow_duplicates:
    duplicates = find_duplicates(node, only=changed)
    if duplicates:
      raise ValueError(
        "Variables that change must not be shared, but these paths lead to one"
        f" each: {duplicates}. Pass `allow_duplicates=True` to change them all"
        " alike."
      )

  def convert(path, value):
    return value.copy(**changes) if changed(path, value) else value

  return map(convert, node, recreate_variables=False)


vars_as = with_vars


def set_metadata(
  node: Any, /, *, only: Filter = variablelib.Variable, **metadata: Any
) -> None:
  """Sets metadata of the Variables of an object.

  Example:

    >>> import nnx
    >>> model = nnx.Dict(a=nnx.Param(1.0), b=nnx.BatchStat(2.0))
    >>> nnx.set_metadata(model, only=nnx.Param, frozen=True)
    >>> model.a.get_metadata("frozen", False), model.b.has_metadata("frozen")
    (True, False)

  Args:
    node: an object, a Variable, or a pytree of them.
    only: a filter of the Variables meant.
    **metadata: the metadata.

  Raises:
    ValueError: in tree mode, if the object is no tree.
  """
  _, (mapping,) = functional.split_in_mode(
    "set_metadata", node, (only,), False, None
  )
  leaves = (
    _engine.flatten_mapping(mapping)[1] if type(mapping) is dict else [mapping]
  )
  for leaf in leaves:
    if isinstance(leaf, _engine.VariableBase):
      leaf.set_metadata(**metadata)
