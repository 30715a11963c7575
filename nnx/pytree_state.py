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
# Marks of an object as a whole; no attribute has such a name.
_INITIALIZING, _IS_SETUP = "(initializing)", "(is setup)"


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

  __slots__ = ("_trace_state", "_own", "_node")

  def __init__(self, initializing: bool = False, is_setup: bool = False):
    self._trace_state = tracers.TraceState()
    self._own = {_INITIALIZING: initializing, _IS_SETUP: is_setup}
    self._node: Any = None  # a weak reference to the object that it is of

  @classmethod
  def of(cls, node: Any) -> PytreeState:
    """Returns the view of an object's, which does not keep it alive."""
    result = object.__new__(cls)
    result._trace_state = tracers.TraceState.of(node)
    result._own, result._node = {}, weakref.ref(node)
    return result

  def _flags(self) -> Mapping[str, bool]:
    node = None if self._node is None else self._node()
    if node is None:
      return self._own
    # Past `__getattribute__` of its class, as the write below.
    return object.__getattribute__(node, "_pytree_status") or {}

  def _set_flag(self, name: str, value: bool) -> None:
    flags = self._flags()
    if flags.get(name, False) == value:
      return
    node = None if self._node is None else self._node()
    if node is None:
      self._own[name] = value
      return
    # A mark without an attribute: it goes where marks go, through `split`,
    # `merge`, `clone` and pickles.
    marks = {k: v for k, v in flags.items() if k != name}
    if value:
      marks[name] = True
    object.__setattr__(node, "_pytree_status", marks or None)

  @property
  def trace_state(self) -> tracers.TraceState:
    """The trace that the object belongs to."""
    return self._trace_state

  @property
  def initializing(self) -> bool:
    """Whether a bridged module makes its variables when called."""
    return self._flags().get(_INITIALIZING, False)

  @property
  def is_setup(self) -> bool:
    """Whether `setup` has run."""
    return self._flags().get(_IS_SETUP, False)

  _initializing = property(
    lambda self: self.initializing,
    lambda self, value: self._set_flag(_INITIALIZING, value),
  )
  _is_setup = property(
    lambda self: self.is_setup,
    lambda self, value: self._set_flag(_IS_SETUP, value),
  )

  # Programs put it among the attributes, where it is static.

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, PytreeState) and _pair(self) == _pair(other)

  def __hash__(self) -> int:
    return hash(_pair(self))

  def __reduce__(self):
    # What is loaded belongs to the trace and the object that load it.
    return PytreeState, _pair(self)

  def __setstate__(self, state: Any) -> None:
    # Flax pickles the attributes after an object made without `__init__`.
    _, flags = state
    PytreeState.__init__(self, flags["_initializing"], flags["_is_setup"])

  def __repr__(self) -> str:
    return f"PytreeState(trace_state={self._trace_state!r})"


def _pair(state: PytreeState) -> tuple[bool, bool]:
  return state.initializing, state.is_setup


jax.tree_util.register_pytree_node(
  PytreeState,
  lambda state: ((), _pair(state)),
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
      state = PytreeState.of(node)
      _states.set(node, state)
    return state

  def __set__(self, node: Any, state: PytreeState) -> None:
    initializing, is_setup = _pair(state)
    state._node = weakref.ref(node)
    state._initializing, state._is_setup = initializing, is_setup
    _states.set(node, state)


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
        if name not in (_INITIALIZING, _IS_SETUP):
          nodes[name] = bool(mark)
    return Nodes(nodes)

  def __set__(self, node: Any, nodes: Mapping[str, bool]) -> None:
    known = self.__get__(node, type(node))
    changed = {k: v for k, v in nodes.items() if known.get(k) != v}
    if changed:
      marks = {**(node._pytree_status or {}), **changed}
      object.__setattr__(node, "_pytree_status", marks)
