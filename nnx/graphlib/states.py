"""States as the engine takes and gives them."""

from __future__ import annotations

import collections.abc
from typing import Any

from nnx import statelib
from nnx.engine import _engine
from nnx.graphlib.definitions import GraphState


def as_state(mapping: Any) -> Any:
  """Wraps a mapping of the engine; a leaf is the state of a Variable."""
  if type(mapping) is dict:
    return statelib.State._from_nested(mapping)
  return mapping


def from_state(state: Any) -> Any:
  """Makes of a state what the engine takes: a State, dict, list or leaf."""
  if isinstance(state, (statelib.State, dict)):
    return state
  if isinstance(state, GraphState):
    return state._state
  if isinstance(state, statelib.FlatState):
    if state.paths == ((),):
      return state.leaves[0]
    return statelib.unflatten_mapping(state)
  if isinstance(state, collections.abc.Mapping):
    return statelib.copy_mapping(state)
  return state


def merged(states: tuple[Any, ...]) -> Any:
  """Joins states into one; a leaf and empty ones make the leaf."""
  parts = tuple(from_state(state) for state in states)
  if len(parts) == 1:
    return parts[0]
  leaves = [
    part for part in parts if not isinstance(part, (statelib.State, dict))
  ]
  if not leaves:
    return _engine.merge_mappings(*parts)
  if len(leaves) > 1 or any(
    len(part) for part in parts if part is not leaves[0]
  ):
    raise ValueError(
      "The states of a single Variable or array must be one leaf and otherwise"
      f" empty, but got {[type(part).__name__ for part in parts]}."
    )
  return leaves[0]
