"""What is differentiated of the arguments, and the form of the derivatives."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from nnx.engine import _engine
from nnx.filterlib import Filter
from nnx.graphlib import modes
from nnx.statelib import State
from nnx.transforms import callables, lift, prefix
from nnx.variablelib import Param


@dataclasses.dataclass(frozen=True)
class DiffState:
  """An argument, and the part of its state to differentiate.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Line(nnx.Module):
    ...   def __init__(self):
    ...     self.a, self.b = (
    ...       nnx.Param(jnp.array(2.0)),
    ...       nnx.Param(jnp.array(1.0)),
    ...     )
    >>> f = lambda line, x: line.a * x + line.b
    >>> only_a = nnx.DiffState(0, nnx.PathContains("a"))
    >>> grads = nnx.grad(f, argnums=only_a)(Line(), 3.0)
    >>> list(grads), float(grads.a.value)
    (['a'], 3.0)

  Args:
    argnum: the position of the argument.
    filter: which Variables and arrays of the graph nodes in it are
      differentiated.
  """

  argnum: int
  filter: Filter


class Selection(prefix.FilterMap):
  """Selects the leaves of graph nodes to differentiate; others all are."""

  __slots__ = ()

  by_all_paths = False

  def __init__(self, filter_: Filter):
    super().__init__(((filter_, True), (..., False)))

  def select(self, path: tuple, value: Any) -> tuple[bool, Any]:
    # A path leads from a graph node to what is in it.
    return super().select(path, value) if path else (True, True)


def is_selection(value: Any) -> bool:
  """Tells whether a selection is the same for all leaves."""
  return isinstance(value, bool)


def as_tuple(
  argnums: int | DiffState | Iterable[int | DiffState], option: str = "argnums"
) -> tuple[int | DiffState, ...]:
  """Returns argument numbers as a tuple.

  Raises:
    TypeError: if they are something else.
  """
  kinds = (int, np.integer, DiffState)
  nums: tuple[Any, ...] = (argnums,)
  if isinstance(argnums, Iterable) and not isinstance(
    argnums, _engine.ObjectBase
  ):
    nums = tuple(argnums)
  if all(isinstance(n, kinds) and not isinstance(n, bool) for n in nums):
    return nums
  raise TypeError(
    f"`{option}` must be an int, an `nnx.DiffState` or several, but got"
    f" `{argnums!r}` of type `{type(argnums).__name__}`. To differentiate by"
    " what a filter selects, pass `nnx.DiffState(0, filter)`."
  )


def numbers(argnums: Sequence[int | DiffState]) -> list[int]:
  """Returns the numbers of arguments that are meant, whole or in part."""
  return [a.argnum if isinstance(a, DiffState) else a for a in argnums]


def check_states(
  policy: lift.Policy, option: str, argnums: Sequence[int | DiffState]
) -> None:
  """Refuses `DiffState`s in a mode without updates.

  Raises:
    ValueError: if there is one.
  """
  if policy.mode.updates:
    return
  if any(isinstance(argnum, DiffState) for argnum in argnums):
    raise ValueError(
      "With `graph=False` or `graph_updates=False` the derivative of a Module"
      f" is a whole Module, but got `{option}={argnums!r}`. Select a part of"
      " the derivative, by `nnx.state(grads, filter)`, or"
      f" {modes.way_out(policy.transform, updates=True)}."
    )


def selections(
  argnums: Sequence[int | DiffState], count: int, tree: bool
) -> tuple[tuple[int, ...], list[Any]]:
  """Returns the positions meant, and what is selected of each argument."""
  wanted = callables.positions(numbers(argnums), count, "argnums")
  entries: list[Any] = [False] * count
  for position, argnum in zip(wanted, argnums):
    if isinstance(argnum, DiffState):
      entries[position] = Selection(argnum.filter)
    else:
      entries[position] = True if tree else Selection(Param)
  return wanted, entries


def walk_selected(call: lift.Call, entries: Sequence[Any], option: str) -> Any:
  """Walks over the arguments of a call; entries are True where selected."""
  walk = prefix.Walk(call.structure, call.leaves, call.objects, is_selection)
  for i, entry in enumerate(entries):
    walk.visit_root(prefix.Root(entry, option, f"args[{i}]"))
  for name in call.lifted.names:
    walk.visit_root(prefix.Root(False, option, name))
  return walk


class Gradients:
  """Puts derivatives in the form of the arguments they belong to.

  Args:
    call: the call.
    walk: a walk over its arguments.
    tree: whether Modules stand for the derivatives of Modules, not States.
  """

  def __init__(self, call: lift.Call, walk: prefix.Walk, tree: bool):
    self.call = call
    self.walk = walk
    self.tree = tree
    self.seen: set[int] = set()

  def build(self, leaves: Sequence[Any], selected: Sequence[int]) -> list[Any]:
    """Builds the arguments; selected leaves of Modules are in States."""
    values, objects = _engine.unflatten(self.call.structure, tuple(leaves))
    if self.tree:
      return list(values)
    nested: dict[int, dict[Any, Any]] = {
      id(node): {} for node in _outermost_nodes(self.walk, objects)
    }
    for leaf in selected:
      place = self.walk.places[leaf]
      assert place is not None
      top = id(objects[place.top]) if place.top >= 0 else 0
      if top not in nested:
        continue
      target = nested[top]
      for key in place.path[:-1]:
        target = target.setdefault(key, {})
      target[place.path[-1]] = (
        objects[place.variable] if place.variable >= 0 else leaves[leaf]
      )
    if not nested and not self.call.structure._shares:
      return list(values)
    return [self._with_states(value, nested) for value in values]

  def _with_states(self, value: Any, nested: dict[int, Any]) -> Any:
    def is_node(node):
      return id(node) in nested or isinstance(node, _engine.VariableBase)

    def convert(node):
      if not is_node(node):
        return node
      # Of a node that comes twice, the derivative is where it comes first.
      if id(node) in self.seen:
        return State._from_nested({})
      self.seen.add(id(node))
      return (
        State._from_nested(nested[id(node)]) if id(node) in nested else node
      )

    return jax.tree.map(convert, value, is_leaf=is_node)


def _outermost_nodes(walk: prefix.Walk, objects: Sequence[Any]) -> list[Any]:
  return [
    objects[index]
    for index in walk.top_indices
    if not isinstance(objects[index], _engine.VariableBase)
  ]


def check_reduce_axes(reduce_axes: Sequence[Hashable]) -> None:
  if reduce_axes:
    raise NotImplementedError(
      "`reduce_axes` must be empty, since jax no longer has it, but got"
      f" `{reduce_axes!r}`. Use `jax.lax.psum` inside of the function."
    )
