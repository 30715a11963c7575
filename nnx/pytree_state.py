"""What Flax keeps of an object besides its attributes, as views of ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
import weakref

import jax

from nnx import tracers
from nnx.attribute_marks import has_data, is_data
from nnx.engine import serialization

THEIR_STATE, THEIR_NODES = "_pytree__state", "_pytree__nodes"


class PytreeState:
  """What Flax keeps of an object besides its attributes.

  That of an object, `module._pytree__state`, is a view.

  Example:

    >>> import nnx
    >>> module = nnx.Module()
    >>> state = module._pytree__state
    >>> state.initializing, state.trace_state.is_valid()
    (False, True)

  Args:
    initializing: whether a bridged module makes its variables when called.
    is_setup: whether `setup` has run.
  """

  __slots__ = ("_trace_state", "_flags", "_node")

  def __init__(self, initializing: bool = False, is_setup: bool = False):
    self._trace_state = tracers.TraceState()
    self._flags = initializing, is_setup
    self._node: Any = None  # a weak reference to the object that it is of

  def _set_flags(self, initializing: bool, is_setup: bool) -> None:
    self._flags = initializing, is_setup
    node = None if self._node is None else self._node()
    if node is None:
      return
    # Among the attributes, it goes where those go: through `split`, `merge`,
    # `clone` and pickles. Most objects have no flag set, and so need none.
    if any(self._flags):
      vars(node)[THEIR_STATE] = self
    elif vars(node).get(THEIR_STATE) is self:
      _states.set(node, vars(node).pop(THEIR_STATE))

  @property
  def trace_state(self) -> tracers.TraceState:
    """The trace that the object belongs to."""
    return self._trace_state

  @property
  def initializing(self) -> bool:
    """Whether a bridged module makes its variables when called."""
    return self._flags[0]

  @property
  def is_setup(self) -> bool:
    """Whether `setup` has run."""
    return self._flags[1]

  _initializing = initializing.setter(
    lambda self, value: self._set_flags(value, self.is_setup)
  )
  _is_setup = is_setup.setter(
    lambda self, value: self._set_flags(self.initializing, value)
  )

  # Programs put it among the attributes, where it is static.

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, PytreeState) and self._flags == other._flags

  def __hash__(self) -> int:
    return hash(self._flags)

  def __reduce__(self):
    # What is loaded belongs to the trace and the object that load it.
    return PytreeState, self._flags

  def __setstate__(self, state: Any) -> None:
    # Flax pickles the attributes after an object made without `__init__`.
    _, flags = state
    PytreeState.__init__(self, flags["_initializing"], flags["_is_setup"])

  def __repr__(self) -> str:
    return f"PytreeState(trace_state={self._trace_state!r})"


jax.tree_util.register_pytree_node(
  PytreeState,
  lambda state: ((), state._flags),
  lambda flags, _: PytreeState(*flags),
)
serialization.register(PytreeState)
ObjectState = PytreeState  # of Flax 0.10

_states = tracers.Attached()


class StateView:
  """The attribute `_pytree__state`, by this and by its older name."""

  def __get__(self, node: Any, owner: type) -> Any:
    if node is None:
      return self
    state = vars(node).get(THEIR_STATE) or _states.get(node)
    if state is None:
      state = PytreeState()
      state._trace_state = tracers.TraceState.of(node)
      _states.set(node, state)
    state._node = weakref.ref(node)
    return state

  def __set__(self, node: Any, state: PytreeState) -> None:
    _states.set(node, state)
    state._node = weakref.ref(node)
    state._set_flags(*state._flags)


class Nodes(Mapping[str, bool]):
  """Which attributes of an object are data; the view `_pytree__nodes`.

  Example:

    >>> import nnx
    >>> nodes = nnx.Dict(a=nnx.Param(1), b="x")._pytree__nodes
    >>> nodes["a"], nodes["b"], nodes.update({"b": True})["b"]
    (True, False, True)

  Args:
    nodes: by the name of each attribute, whether it is data.
  """

  def __init__(self, nodes: Mapping[str, bool]):
    self._nodes = dict(nodes)

  def __getitem__(self, name: str) -> bool:
    return self._nodes[name]

  def __iter__(self) -> Iterator[str]:
    return iter(self._nodes)

  def __len__(self) -> int:
    return len(self._nodes)

  def __hash__(self) -> int:
    return hash(frozenset(self._nodes.items()))

  def __repr__(self) -> str:
    return f"Nodes({self._nodes!r})"

  def update(self, other: Mapping[str, bool]) -> Nodes:
    """Returns what is known here and there; `other` has the last word."""
    return Nodes({**self._nodes, **other})


class NodesView:
  """The attribute `_pytree__nodes`, by this and by its older name."""

  def __get__(self, node: Any, owner: Any) -> Nodes:
    nodes = {THEIR_STATE: True, **owner._class_statuses}
    if node is not None:
      for name, value in vars(node).items():
        nodes[name] = is_data(value) or bool(has_data(value))
      # A mark that is not a bool is of what stands in the place of data.
      for name, mark in (node._pytree_status or {}).items():
        nodes[name] = bool(mark)
    return Nodes(nodes)

  def __set__(self, node: Any, nodes: Mapping[str, bool]) -> None:
    known = self.__get__(node, type(node))
    changed = {k: v for k, v in nodes.items() if known.get(k) != v}
    if changed:
      node._pytree_status = {**(node._pytree_status or {}), **changed}
