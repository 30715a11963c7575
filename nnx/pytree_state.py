"""What Flax keeps of an object besides its attributes, as views of ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from nnx import tracers
from nnx.attribute_marks import is_data
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

  __slots__ = ("_trace_state", "_initializing", "_is_setup")

  def __init__(self, initializing: bool = False, is_setup: bool = False):
    self._trace_state = tracers.TraceState()
    self._initializing = initializing
    self._is_setup = is_setup

  @property
  def trace_state(self) -> tracers.TraceState:
    """The trace that the object belongs to."""
    return self._trace_state

  @property
  def initializing(self) -> bool:
    """Whether a bridged module makes its variables when called."""
    return self._initializing

  @property
  def is_setup(self) -> bool:
    """Whether `setup` has run."""
    return self._is_setup

  # Programs put it among the attributes, where it is static.

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, PytreeState) and (
      (self._initializing, self._is_setup)
      == (other._initializing, other._is_setup)
    )

  def __hash__(self) -> int:
    return hash((self._initializing, self._is_setup))

  def __repr__(self) -> str:
    return f"PytreeState(trace_state={self._trace_state!r})"


jax.tree_util.register_pytree_node(
  PytreeState,
  lambda state: ((), (state._initializing, state._is_setup)),
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
    return state

  def __set__(self, node: Any, state: PytreeState) -> None:
    _states.set(node, state)


class NodesView:
  """The attribute `_pytree__nodes`: which attributes are data."""

  def __get__(self, node: Any, owner: Any) -> dict[str, bool]:
    nodes = dict(owner._class_statuses)
    if node is not None:
      for name, value in vars(node).items():
        status = (node._pytree_status or {}).get(name)
        nodes[name] = is_data(value) if status in (None, ...) else status
    return nodes

  def __set__(self, node: Any, nodes: Mapping[str, bool]) -> None:
    for name, value in vars(node).items():
      if name in nodes and nodes[name] != is_data(value):
        node._pytree_status = {
          **(node._pytree_status or {}),
          name: nodes[name],
        }
