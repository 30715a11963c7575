"""The graph functions: between objects and pure states, over the engine.

Order: wherever leaves or children are listed, keys that are ints come first,
then those that are strings, each ascending.

With `graph=False` the functions take trees alone: see `trees`.
"""

from __future__ import annotations

from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp

from nnx import environment, filterlib, statelib, variablelib
from nnx.engine import _engine
from nnx.graphlib import modes, trees
from nnx.graphlib.definitions import GraphDef, GraphState
from nnx.graphlib.states import as_state, merged

Node = TypeVar("Node")

Filter = filterlib.Filter

_ALL = (True,)


def split_in_mode(
  function: str,
  node: Any,
  filters: tuple[Filter, ...],
  exhaustive: bool,
  graph: bool | None,
) -> tuple[Any, list[Any]]:
  """Splits as the mode says; `function` is the one that was called."""
  selected = filterlib.engine_filters(filters) if filters else _ALL
  is_tree = modes.is_tree(graph)
  parts = _engine.split(node, selected, exhaustive, is_tree)
  if is_tree:
    tree = trees.unshared(node, parts[0], function)
    if tree is not node:
      parts = _engine.split(tree, selected, exhaustive, True)
  return parts


@overload
def split(
  node: Node, *, graph: bool | None = None
) -> tuple[GraphDef[Node], statelib.State]: ...
@overload
def split(
  node: Node, filter_: Filter, /, *, graph: bool | None = None
) -> tuple[GraphDef[Node], statelib.State]: ...
@overload
def split(
  node: Node,
  first: Filter,
  second: Filter,
  /,
  *,
  graph: bool | None = None,
) -> tuple[GraphDef[Node], statelib.State, statelib.State]: ...
@overload
def split(
  node: Node,
  first: Filter,
  second: Filter,
  third: Filter,
  /,
  *,
  graph: bool | None = None,
) -> tuple[GraphDef[Node], statelib.State, statelib.State, statelib.State]: ...
# A tuple of one GraphDef and any number of States mypy would not unpack.
@overload
def split(
  node: Any, *filters: Filter, graph: bool | None = None
) -> tuple[Any, ...]: ...
def split(
  node: Node, *filters: Filter, graph: bool | None = None
) -> tuple[Any, ...]:
  """Splits an object into its structure and its state.

  The State holds the Variables of the object themselves: a write to one is seen
  in the other. `merge` is the inverse.

  Example:

    >>> import nnx
    >>> class Foo(nnx.Module):
    ...   def __init__(self):
    ...     self.w = nnx.Param(1.0)
    ...     self.mean = nnx.BatchStat(0.0)
    >>> graphdef, params, rest = nnx.split(Foo(), nnx.Param, ...)
    >>> list(params), list(rest)
    (['w'], ['mean'])
    >>> nnx.merge(graphdef, params, rest).w.value
    1.0

  Args:
    node: an object, a Variable, or a pytree of them. Of a Variable or an array
      the state is it itself.
    *filters: filters that together select every leaf; the first that selects
      a leaf gets it. Without any there is one state.
    graph: `False` refuses what is no tree: shared Variables, cycles; None
      stands for `nnx.set_graph_mode`.

  Returns:
    The graphdef, and a State for each filter.

  Raises:
    ValueError: if no filter selects a leaf, if `...` is not the last filter, or
      if a container holds a value marked by `nnx.data` or `nnx.static`.
  """
  graphdef, mappings = split_in_mode("split", node, filters, True, graph)
  return (graphdef, *(as_state(mapping) for mapping in mappings))


def merge(
  graphdef: GraphDef[Node] | GraphState[Node],
  /,
  *states: Any,
  copy: bool = False,
  recreate_variables: bool = True,
) -> Node:
  """Makes an object of its structure and its state; the inverse of `split`.

  Example:

    >>> import nnx
    >>> graphdef, state = nnx.split(nnx.Dict(a=nnx.Param(1.0)))
    >>> shared, copied = (
    ...   nnx.merge(graphdef, state),
    ...   nnx.merge(graphdef, state, copy=True),
    ... )
    >>> state.a.value = 2.0
    >>> shared.a.value, copied.a.value
    (2.0, 1.0)

  Args:
    graphdef: the graphdef, or what `unpack` returned.
    *states: the states: `State`s, nested dicts of Variables or of their values,
      `FlatState`s, or one list of the leaves in canonical order.
    copy: whether to copy the Variables; otherwise they are shared, apart from
      those of another trace, which are copied: a function that is traced may
      merge a State from outside of it and use the object as its own.
    recreate_variables: whether a value in the place of a Variable becomes a
      Variable of the kind that was there; otherwise it stays what it is.

  Returns:
    A new object.

    A checkpoint that was read without a target is taken as `update` takes it. A
    graphdef knows no shapes, so that stacked and sliced states can be merged:
    to have them checked, `update` an object with the state instead.

  Raises:
    TypeError: if there is no graphdef or no state.
    ValueError: if the states lack a leaf, or have one that the graph has not.
  """
  # The call would take half as long as the merge of a small graph.
  if not type(copy) is type(recreate_variables) is bool:
    environment.check_flags(copy=copy, recreate_variables=recreate_variables)
  if isinstance(graphdef, GraphState):
    packed = (graphdef, *states)
    graphdef, states = _unpacked(packed)
  elif not states:
    raise TypeError(
      "`merge` must be given the states that `nnx.split` returned, but got only"
      " a graphdef."
    )
  state = states[0] if len(states) == 1 else None
  if type(state) is not statelib.State:
    state = merged(states)
  keep_arrays = not recreate_variables
  return _engine.merge(graphdef, state, copy, keep_arrays)


def _unpacked(packed: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
  graphdef = packed[0]._graphdef
  for part in packed:
    if not isinstance(part, GraphState):
      raise ValueError(
        "All arguments must be `GraphState`s if the first is one, but got a"
        f" `{type(part).__name__}`."
      )
    if part._graphdef != graphdef:
      raise ValueError(
        "All `GraphState`s must be of one graph, but their graphdefs differ."
      )
  return graphdef, packed


def update(
  node: Any, state: Any, /, *states: Any, check_shapes: bool | None = None
) -> None:
  """Writes states into an object: all of it or, with an error, nothing.

  Variables take over values and metadata; Variables that the object lacks, and
  dicts of them, become attributes, and so do arrays of a `State`.

  A checkpoint that was read without a target is a state too: the text of an int
  stands for the int where the object has no such key, and the value of a
  Variable may be in a dict under `value`.

  Example:

    >>> import nnx
    >>> model = nnx.Dict(a=nnx.Param(1.0), b=nnx.Param(2.0))
    >>> nnx.update(model, {"a": 3.0})
    >>> model.a.value, model.b.value
    (3.0, 2.0)

  Args:
    node: an object, a Variable, or a pytree of them.
    state: a `State`, or a nested dict of Variables or of their values, for all
      of the leaves or for some.
    *states: more of them.
    check_shapes: whether arrays must have the shapes of those that they
      replace. With None those must that are in no `State` and no Variable, as
      the arrays of a checkpoint; a State may change shapes, as when a table
      grows. Those of `Cache`, `Intermediate` and `RngState` may in any case.

  Raises:
    ValueError: if a state does not fit the object.
    TraceContextError: if the object belongs to another trace.
  """
  # Not read from elsewhere: it may have new arrays, and arrays of new shapes.
  made_here = True
  if states or type(state) is not statelib.State:
    made_by_us = (statelib.State, GraphState, statelib.FlatState)
    made_here = all(isinstance(part, made_by_us) for part in (state, *states))
    state = merged((state, *states))
  if check_shapes is None:
    _engine.update(node, state, False, not made_here, made_here)
  else:
    environment.check_flags(check_shapes=check_shapes)
    check = bool(check_shapes)
    _engine.update(node, state, check, check, made_here)


@overload
def state(node: Any, /, *, graph: bool | None = None) -> statelib.State: ...
@overload
def state(
  node: Any, filter_: Filter, /, *, graph: bool | None = None
) -> statelib.State: ...
@overload
def state(
  node: Any, /, *filters: Filter, graph: bool | None = None
) -> tuple[statelib.State, ...]: ...
def state(node: Any, /, *filters: Filter, graph: bool | None = None) -> Any:
  """Takes the state of an object, or parts of it.

  The State holds the Variables of the object themselves. `variables` is another
  name of this function.

  Example:

    >>> import nnx
    >>> model = nnx.Dict(a=nnx.Param(1.0), b=nnx.BatchStat(2.0))
    >>> list(nnx.state(model)), list(nnx.state(model, nnx.Param))
    (['a', 'b'], ['a'])

  Args:
    node: an object, a Variable, or a pytree of them.
    *filters: filters; leaves that none of them selects are left out.
    graph: `False` refuses what is no tree: shared Variables, cycles; None
      stands for `nnx.set_graph_mode`.

  Returns:
    A State, or a tuple of them if there are several filters.

  Raises:
    ValueError: if `...` is not the last filter.
  """
  if not modes.is_tree(graph):
    mappings = _engine.state(
      node, filterlib.engine_filters(filters) if filters else _ALL
    )
  else:
    selected = filterlib.engine_filters(filters) if filters else _ALL
    mappings = _engine.state(node, selected, True)
    if mappings is NotImplemented:
      _, mappings = split_in_mode("state", node, filters, False, graph)
  if len(mappings) == 1:
    return as_state(mappings[0])
  return tuple(as_state(mapping) for mapping in mappings)


variables = state


@overload
def pop(node: Any, filter_: Filter, /) -> statelib.State: ...
@overload
def pop(node: Any, /, *filters: Filter) -> tuple[statelib.State, ...]: ...
def pop(node: Any, /, *filters: Filter) -> Any:
  """Removes Variables, and arrays that are in none, and returns them.

  Example:

    >>> import nnx
    >>> model = nnx.Dict(a=nnx.Param(1.0), seen=nnx.Intermediate(2.0))
    >>> nnx.pop(model, nnx.Intermediate).seen.value, hasattr(model, "seen")
    (2.0, False)

  Args:
    node: an object, or a pytree of them.
    *filters: filters of what to remove, at least one.

  Returns:
    A State, or a tuple of them if there are several filters.

  Raises:
    ValueError: if there is no filter, or if what is to be removed is an item of
      a sequence.
    TraceContextError: if the object belongs to another trace.
  """
  if not filters:
    raise ValueError(
      "`pop` must be given at least one filter, such as `nnx.Intermediate`, but"
      " got none."
    )
  mappings = _engine.pop(node, filterlib.engine_filters(filters))
  if len(mappings) == 1:
    return as_state(mappings[0])
  return tuple(as_state(mapping) for mapping in mappings)


def graphdef(node: Node, /, *, graph: bool | None = None) -> GraphDef[Node]:
  """Finds the structure of an object, as `split` returns it.

  Example:

    >>> import nnx
    >>> model = nnx.Dict(a=nnx.Param(1.0))
    >>> nnx.graphdef(model) == nnx.split(model)[0]
    True

  Args:
    node: an object, a Variable, or a pytree of them.
    graph: `False` refuses what is no tree: shared Variables, cycles; None
      stands for `nnx.set_graph_mode`.

  Returns:
    The graphdef.

  Raises:
    ValueError: if a container holds a value marked by `nnx.data` or
      `nnx.static`.
  """
  if not modes.is_tree(graph):
    return _engine.graphdef(node)
  structure = _engine.graphdef(node, True)
  tree = trees.unshared(node, structure, "graphdef")
  return structure if tree is node else _engine.graphdef(tree, True)


def clone(
  node: Node,
  variables: bool = True,
  *,
  arrays: bool = False,
  graph: bool | None = None,
) -> Node:
  """Copies an object; references that are shared stay shared.

  Example:

    >>> import nnx
    >>> model = nnx.Dict(a=nnx.Param(1.0))
    >>> copy, view = nnx.clone(model), nnx.clone(model, variables=False)
    >>> copy.a is model.a, view.a is model.a
    (False, True)

  Args:
    node: an object, a Variable, or a pytree of them.
    variables: whether to copy the Variables too; otherwise they are shared.
    arrays: whether to copy the arrays of the Variables too, so that one of the
      copies can be donated.
    graph: `False` refuses what is no tree: shared Variables, cycles; None
      stands for `nnx.set_graph_mode`.

  Returns:
    The copy.

  Raises:
    ValueError: if `arrays` is set and `variables` is not.
  """
  if not type(variables) is type(arrays) is bool:  # as in `merge`
    environment.check_flags(variables=variables, arrays=arrays)
  if not arrays:
    if modes.is_tree(graph):
      return trees.clone(node, bool(variables), "clone")
    return _engine.clone(node, bool(variables))
  if not variables:
    raise ValueError(
      "`arrays=True` copies the arrays of copied Variables, but got"
      " `variables=False`."
    )
  graphdef, (mapping,) = split_in_mode("clone", node, (), True, graph)
  state = as_state(mapping)
  return merge(graphdef, jax.tree.map(_copied, state, is_leaf=_is_kept_apart))


def _is_kept_apart(value: Any) -> bool:
  """Tells whether what is in a Variable is no plain array."""
  return isinstance(value, variablelib.Variable) and (value.hijax or value.ref)


def _copied(leaf: Any) -> Any:
  if not isinstance(leaf, variablelib.Variable):
    return jnp.copy(leaf)
  value: Any = leaf.raw_value
  value = value[...] if variablelib.is_ref(value) else value
  return leaf.copy(jax.tree.map(jnp.copy, value))


def unpack(node: Node, /, *filters: Filter, graph: bool | None = None) -> Any:
  """Splits an object into states that carry the structure along.

  Example:

    >>> import nnx
    >>> model = nnx.Dict(a=nnx.Param(1.0), b=nnx.BatchStat(2.0))
    >>> params, rest = nnx.unpack(model, nnx.Param, ...)
    >>> nnx.merge(params, rest).b.value
    2.0

  Args:
    node: an object, or a pytree of them.
    *filters: filters that together select every leaf.
    graph: `False` refuses what is no tree: shared Variables, cycles; None
      stands for `nnx.set_graph_mode`.

  Returns:
    A `GraphState`, or a tuple of them if there are several filters.

  Raises:
    ValueError: if no filter selects a leaf, or if `node` is a Variable.
  """
  graphdef, mappings = split_in_mode("unpack", node, filters, True, graph)
  states = [as_state(mapping) for mapping in mappings]
  packed = tuple(GraphState(graphdef, state) for state in states)
  return packed[0] if len(packed) == 1 else packed
