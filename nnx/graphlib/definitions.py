"""GraphDef and NodeDef, the static half of a graph, and calls through them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping
import itertools
import operator
from typing import Any, Generic, TypeVar

import jax

from nnx.engine import _engine, preorder, serialization
from nnx.statelib import State

Node = TypeVar("Node")

_MAX_SHOWN = 64


class GraphDef(_engine.StructureBase, Generic[Node]):
  """The structure of an object graph, without its Variables' values.

  Holds the classes, the attribute names, the static attributes, the metadata of
  the Variables and which references are shared. It is immutable, hashable,
  compares by value, pickles, and is a pytree of jax without leaves, so it can
  be closed over or passed to a jitted function. What a static attribute prints
  stands for its hash if it has none.

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

  def apply(self, state: Any, /, *states: Any) -> Caller:
    """Calls the described object, or a method of it, with a given state.

    Example:

      >>> import nnx
      >>> class Counter(nnx.Module):
      ...   def __init__(self):
      ...     self.count = nnx.Variable(0)
      ...
      ...   def add(self, n):
      ...     self.count.value += n
      ...     return self.count.value
      >>> graphdef, state = nnx.split(Counter())
      >>> out, (graphdef, state) = graphdef.apply(state).add(3)
      >>> out, state["count"].value
      (3, 3)

    Args:
      state: the state, as from `nnx.split`.
      *states: more states that belong to it.

    Returns:
      A proxy whose attributes and items are those of the object. A call of it
      returns the result and the pair of graphdef and state afterwards.
    """
    return call((self, state, *states))

  def __new__(cls, *args: Any, **kwargs: Any) -> GraphDef[Node]:
    raise TypeError(
      "A graphdef must come from `nnx.split` or `nnx.graphdef`, but its class"
      " was called. One that `flax.nnx` has pickled is of another kind:"
      " pickle the Module or the State, and make the graphdef of the Module."
    )

  def __copy__(self) -> GraphDef[Node]:
    return self

  def __deepcopy__(self, memo: dict[int, Any]) -> GraphDef[Node]:
    # Immutable; and a static value that compares by identity must stay it.
    return self

  def __reduce__(self):
    # Plain tuples and names: a pickle must not depend on the engine's types.
    records = tuple(
      (str(record.kind), *record[1:-1], int(record.hook_flags))
      for record in self._records
    )
    return _restore, (
      type(self),
      records,
      self._num_roots,
      self._num_outer,
      self._updates,
    )

  def leaf_records(
    self,
  ) -> list[tuple[tuple[Any, ...], type[Any] | None, dict]]:
    """Lists the leaves: path, type of Variable (None: array), metadata.

    Example:

      >>> import nnx
      >>> graphdef = nnx.graphdef({"a": [nnx.Param(1.0, tag="x")]})
      >>> graphdef.leaf_records()
      [(('a', 0), <class 'nnx.variablelib.Param'>, {'tag': 'x'})]

    Returns:
      One entry a leaf, in canonical order; a shared Variable once, at its first
      path.
    """
    leaves: list[tuple[tuple[Any, ...], type[Any] | None, dict]] = []
    records, inside = self._records, 0
    for position, path in preorder.walk(records):
      record = records[position]
      if position < inside:
        continue  # a Variable's value is not looked into
      if record.kind is _engine.NodeKind.VARIABLE:
        leaves.append((path, record.type, dict(record.aux or {})))
        inside = preorder.subtree_end(records, position)
      elif record.leaf >= 0:
        leaves.append((path, None, {}))
    return leaves

  def __repr__(self) -> str:
    records = self._records
    nodes = itertools.islice(preorder.walk(records), _MAX_SHOWN)
    shown = [_describe(records[position], path) for position, path in nodes]
    if len(records) > len(shown):
      shown.append(f"... {len(records) - len(shown)} more lines")
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


def _restore(cls: type[GraphDef[Any]], *contents: Any) -> GraphDef[Any]:
  return cls._restore(*contents)


class Caller:
  """What `call` returns: names a method by attributes and items, and calls it.

  Example:

    >>> import nnx
    >>> nodes = {"a": nnx.Sequential(abs)}
    >>> out, _ = nnx.call(nnx.split(nodes))["a"](-3)
    >>> out
    3
  """

  __slots__ = ("_call", "_steps")

  def __init__(
    self,
    function: Callable[..., Any],
    steps: tuple[Callable[[Any], Any], ...] = (),
  ):
    self._call = function
    self._steps = steps

  def __getattr__(self, name: str) -> Caller:
    return Caller(self._call, (*self._steps, operator.attrgetter(name)))

  def __getitem__(self, key: Any) -> Caller:
    return Caller(self._call, (*self._steps, operator.itemgetter(key)))

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._call(self._steps, args, kwargs)


def call(graphdef_and_state: tuple[Any, ...], /) -> Caller:
  """Calls an object that is given as the results of `nnx.split`.

  The same as `nnx.merge`, a call, and `nnx.split`, for pure functions of jax.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Counter(nnx.Module):
    ...   def __init__(self):
    ...     self.count = nnx.Variable(jnp.zeros((), jnp.int32))
    ...
    ...   def __call__(self, x):
    ...     self.count.value += 1
    ...     return x * self.count.value
    >>> @jax.jit
    ... def forward(counter, x):
    ...   return nnx.call(counter)(x)
    >>> y, counter = forward(nnx.split(Counter()), 2)
    >>> y, counter = forward(counter, 2)
    >>> y, nnx.merge(*counter).count.value
    (Array(4, dtype=int32), Array(2, dtype=int32))

  Args:
    graphdef_and_state: the graphdef and the states.

  Returns:
    A proxy whose attributes and items are those of the object. A call of it
    returns the result and the pair of graphdef and state afterwards.

  Raises:
    TypeError: on call, if the first item is not a graphdef.
    ValueError: on call, if the states are not those of the graphdef.
  """

  def run(steps, args, kwargs):
    graphdef, *states = graphdef_and_state
    state = states[0] if len(states) == 1 else _engine.merge_mappings(*states)
    value = node = _engine.merge(graphdef, state, False, False)
    for step in steps:
      value = step(value)
    result = value(*args, **kwargs)
    graphdef, (mapping,) = _engine.split(node, (True,), True)
    return result, (graphdef, State._from_nested(mapping))

  return Caller(run)


class GraphState(MutableMapping, Generic[Node]):
  """A `State` that carries the graphdef it belongs to; see `nnx.unpack`.

  A mapping like the State, and a pytree whose leaves are those of the State.

  Example:

    >>> import nnx
    >>> packed = nnx.unpack(nnx.Dict(a=nnx.Param(1.0)))
    >>> packed.a.value, nnx.merge(packed).a.value
    (1.0, 1.0)

  Args:
    graphdef: the graphdef.
    state: the `State`.
  """

  __slots__ = ("_graphdef", "_state")

  def __init__(self, graphdef: GraphDef[Node], state: Any):
    if not isinstance(state, State):
      raise ValueError(
        f"`state` must be a `State`, but got a `{type(state).__name__}`."
      )
    object.__setattr__(self, "_graphdef", graphdef)
    object.__setattr__(self, "_state", state)

  def __getattr__(self, name: str) -> Any:
    if name in GraphState.__slots__:  # While it is unpickled or copied.
      raise AttributeError(name)
    return getattr(self._state, name)

  def __setattr__(self, name: str, value: Any) -> None:
    self._state[name] = value

  def __getitem__(self, key: Any) -> Any:
    return self._state[key]

  def __setitem__(self, key: Any, value: Any) -> None:
    self._state[key] = value

  def __delitem__(self, key: Any) -> None:
    del self._state[key]

  def __iter__(self) -> Iterator[Any]:
    return iter(self._state)

  def __len__(self) -> int:
    return len(self._state)

  def __contains__(self, key: Any) -> bool:
    return key in self._state

  def __reduce__(self):
    return GraphState, (self._graphdef, self._state)

  def __repr__(self) -> str:
    return f"GraphState(\n  {self._graphdef!r},\n  {self._state!r}\n)"


def _with_keys(packed: GraphState[Any]) -> tuple[Any, Any]:
  """Opens it as jax opens its State, so that paths are the same."""
  values, keys = _engine.state_flatten(packed._state)
  entries = zip(map(jax.tree_util.DictKey, keys), values)
  return tuple(entries), (packed._graphdef, keys)


def _from_values(aux: Any, values: Iterable[Any]) -> GraphState[Any]:
  graphdef, keys = aux
  return GraphState(graphdef, State._from_nested(dict(zip(keys, values))))


jax.tree_util.register_pytree_with_keys(GraphState, _with_keys, _from_values)
serialization.register(GraphState)

PureState = tuple[GraphDef[Node], State]


def _describe(record: _engine.NodeRecord, path: preorder.Path) -> str:
  """Writes the line of one node."""
  kinds = _engine.NodeKind
  indent = "  " * len(path)
  prefix = f"{indent}{path[-1]}: " if path else indent
  if record.kind is kinds.STATIC:
    return f"{prefix}{record.aux!r}"
  if record.kind is kinds.LEAF:
    return f"{prefix}<array>"
  if record.kind is kinds.REF:
    return f"{prefix}<shared #{record.index}>"
  name = record.kind if record.type is None else record.type.__name__
  number = f" #{record.index}" if record.index >= 0 else ""
  is_variable = record.kind is kinds.VARIABLE
  metadata = f" {record.aux}" if is_variable and record.aux else ""
  return f"{prefix}{name}{number}{metadata}"
