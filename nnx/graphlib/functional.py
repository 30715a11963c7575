"""The graph functions: between objects and pure states, over the engine.

Order: wherever leaves or children are listed, keys that are ints come first,
then those that are strings, each ascending.

With `graph=False` the functions take trees alone: see `trees`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp

from nnx import environment, filterlib, statelib, variablelib
from nnx.engine import _engine
from nnx.graphlib import modes, trees
from nnx.graphlib.definitions import GraphDef as GraphDef
from nnx.graphlib.definitions import GraphState as GraphState
from nnx.graphlib.definitions import NodeDef as NodeDef
from nnx.graphlib.definitions import PureState as PureState
from nnx.graphlib.definitions import call as call
from nnx.graphlib.flat import IndexMap as IndexMap
from nnx.graphlib.flat import RefMap as RefMap
from nnx.graphlib.flat import flatten as flatten
from nnx.graphlib.flat import unflatten as unflatten
from nnx.graphlib.states import as_state, merged
from nnx.graphlib.traversal import find_duplicates as find_duplicates
from nnx.graphlib.traversal import iter_children as iter_children
from nnx.graphlib.traversal import iter_graph as iter_graph
from nnx.graphlib.traversal import recursive_map as recursive_map

A = TypeVar("A")
Node = TypeVar("Node")

Filter = filterlib.Filter
PathParts = filterlib.PathParts

_ALL = (True,)


def _split(
  function: str,
  node: Any,
  filters: tuple[Filter, ...],
  exhaustive: bool,
  graph: bool | None,
) -> tuple[Any, list[Any]]:
  """Splits as the mode says; `function` is the one that was called."""
  selected = filterlib.engine_filters(filters) if filters else _ALL
  is_tree = not modes.resolve(graph).graph
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
  node: Node, *filters: Filter, graph: bool | None = None
) -> tuple[GraphDef[Node], *tuple[statelib.State, ...]]: ...
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
  graphdef, mappings = _split("split", node, filters, True, graph)
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
  node: Any, state: Any, /, *states: Any, check_shapes: bool = True
) -> None:
  """Writes states into an object: all of it or, with an error, nothing.

  Variables take over values and metadata; Variables that the object lacks
  become attributes, and so do arrays of a `State`.

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
      replace. Those of `Cache`, `Intermediate` and `RngState` may have others
      in any case; and `variable.value = x` writes an array of any shape.

  Raises:
    ValueError: if a state does not fit the object.
    TraceContextError: if the object belongs to another trace.
  """
  environment.check_flags(check_shapes=check_shapes)
  new_arrays = True
  if states or type(state) is not statelib.State:
    made_by_us = (statelib.State, GraphState, statelib.FlatState)
    new_arrays = all(isinstance(part, made_by_us) for part in (state, *states))
    state = merged((state, *states))
  any_shape = not check_shapes
  _engine.update(node, state, any_shape, new_arrays)


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
  if modes.resolve(graph).graph:
    mappings = _engine.state(
      node, filterlib.engine_filters(filters) if filters else _ALL
    )
  else:
    _, mappings = _split("state", node, filters, False, graph)
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
  if modes.resolve(graph).graph:
    return _engine.graphdef(node)
  return _split("graphdef", node, (), True, graph)[0]


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
  environment.check_flags(variables=variables, arrays=arrays)
  if not modes.resolve(graph).graph:
    node = trees.unshared(node, _engine.graphdef(node), "clone")
  if not arrays:
    return _engine.clone(node, bool(variables))
  if not variables:
    raise ValueError(
      "`arrays=True` copies the arrays of copied Variables, but got"
      " `variables=False`."
    )
  graphdef, state = split(node, graph=True)
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
  graphdef, mappings = _split("unpack", node, filters, True, graph)
  states = [as_state(mapping) for mapping in mappings]
  packed = tuple(GraphState(graphdef, state) for state in states)
  return packed[0] if len(packed) == 1 else packed


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
  graphdef, (mapping,) = _split("map", node, (), True, graph)
  state = as_state(mapping)
  if isinstance(state, statelib.State):
    state = statelib.map_state(f, state)
  else:
    state = f((), state)
  return merge(graphdef, state, recreate_variables=recreate_variables)


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
  """
  (mapping,) = _engine.state(node, filterlib.engine_filters((only,)))
  leaves = (
    _engine.flatten_mapping(mapping)[1] if type(mapping) is dict else [mapping]
  )
  for leaf in leaves:
    if isinstance(leaf, _engine.VariableBase):
      leaf.set_metadata(**metadata)


def cached_partial(
  f: Callable[..., A],
  *cached_args: Any,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Callable[..., A]:
  """Gives a function its first arguments, for programs of Flax.

  In Flax it saves `nnx.jit` the walk over the arguments. Here that walk costs
  next to nothing, so `nnx.jit` needs no help; this function does what it
  promises all the same: it calls `f` with copies of the objects, made once,
  that share their Variables with the originals.

  Example:

    >>> import nnx
    >>> @nnx.jit
    ... def add(counter, n):
    ...   counter.count.value += n
    >>> counter = nnx.Dict(count=nnx.Variable(0))
    >>> step = nnx.cached_partial(add, counter)
    >>> step(1), step(2)
    (None, None)
    >>> counter.count.value
    Array(3, dtype=int32, weak_type=True)

  Args:
    f: a function, such as `nnx.jit` returns.
    *cached_args: the first arguments.
    graph: as in `nnx.jit`, but must not be `False`.
    graph_updates: the same.

  Returns:
    A function of the remaining arguments. It raises a ValueError after a call
    that has changed the structure of a cached object, which cannot reach the
    original.

  Raises:
    ValueError: in a mode without updates, where `nnx.jit_partial` does it.
  """
  mode = modes.resolve(graph, graph_updates)
  if not mode.updates:
    raise ValueError(
      "`nnx.cached_partial` works in graph mode with updates only, but is in"
      f" {mode}. Use `nnx.jit_partial`, or"
      f" {modes.way_out('cached_partial', updates=True)}."
    )
  cached = _engine.clone(cached_args, False)
  structure, _, _ = _engine.flatten(cached)

  def call_with_cached(*args: Any, **kwargs: Any) -> A:
    result = f(*cached, *args, **kwargs)
    if not _engine.matches(structure, cached):
      raise ValueError(
        "A function given to `cached_partial` must leave the structure of the"
        " cached arguments as it is, but it has changed it. Undo the change"
        " before it returns, for instance by `nnx.pop`, or call the function"
        " with the objects themselves."
      )
    return result

  names = ("__name__", "__doc__", "__module__", "__qualname__", "jitted_fn")
  for name in names:
    if hasattr(f, name):
      setattr(call_with_cached, name, getattr(f, name))
  vars(call_with_cached)["__wrapped__"] = f
  return call_with_cached
