"""split, merge, update, state, pop, clone, graphdef: thin over the engine."""

from __future__ import annotations

from typing import Any, TypeVar

import jax

from nnx import filters as filters_lib
from nnx import state as state_lib
from nnx.graph import _engine
from nnx.graph.graphdef import GraphDef

Node = TypeVar("Node")
GraphState = state_lib.State


def engine_filters(filters: tuple[Any, ...]) -> tuple[Any, ...]:
  """Filters as the engine takes them: `True`, a class, or a predicate."""
  return tuple(map(_engine_filter, filters))


def _engine_filter(filter_: Any) -> Any:
  if isinstance(filter_, type):
    return filter_
  predicate = filters_lib.to_predicate(filter_)
  if isinstance(predicate, filters_lib.OfType) and isinstance(
    predicate.type, type
  ):
    return predicate.type
  if isinstance(predicate, filters_lib.Everything):
    return True
  return predicate


def _states(mappings: list[dict[Any, Any]]) -> Any:
  states = tuple(map(state_lib.State._from_nested, mappings))
  return states[0] if len(states) == 1 else states


def split(node: Node, /, *filters: Any) -> Any:
  """See the package."""
  graphdef, mappings = _engine.split(
    node, engine_filters(filters) or (True,), True
  )
  return (graphdef, *map(state_lib.State._from_nested, mappings))


def merge(graphdef: GraphDef, state: Any, /, *states: Any, copy: bool = False):
  """See the package."""
  if states:
    state = _engine.merge_mappings(state, *states)
  return _engine.merge(graphdef, state, copy)


def update(node: Any, state: Any, /, *states: Any) -> None:
  """See the package."""
  if states:
    state = _engine.merge_mappings(state, *states)
  _engine.update(node, state)


def state(node: Any, /, *filters: Any) -> Any:
  """See the package."""
  return _states(_engine.state(node, engine_filters(filters) or (True,)))


def pop(node: Any, first: Any, /, *filters: Any) -> Any:
  """See the package."""
  return _states(_engine.pop(node, engine_filters((first, *filters))))


def graphdef(node: Any, /) -> GraphDef:
  """See the package."""
  return _engine.graphdef(node)


def clone(node: Node, variables: bool = True) -> Node:
  """See the package."""
  return _engine.clone(node, variables)
