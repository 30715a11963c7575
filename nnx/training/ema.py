"""Exponential moving averages of parameters."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from nnx.filterlib import Filter
from nnx.graphlib import functional, leaves
from nnx.pytreelib import Pytree, data
from nnx.statelib import State, map_state, merge_state, to_flat_state
from nnx.variablelib import Variable, is_ref

A = TypeVar("A")


class EMA(Pytree):
  """The exponential moving average of a model's Variables.

      average = decay * average + (1 - decay) * value

  An average has the dtype of its Variable. In bfloat16 it stands still where a
  step is smaller than its rounding, as nearly all are with a decay of 0.999.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> model = nnx.Dict(w=nnx.Param(jnp.ones(2)))
    >>> ema = nnx.EMA(model, decay=0.75)
    >>> averaged = ema.apply_to(model)  # its Variables are those of the EMA
    >>> model.w.value = jnp.full(2, 5.0)
    >>> nnx.jit(lambda ema, model: ema.update(model))(ema, model)
    >>> averaged.w.value
    Array([2., 2.], dtype=float32)

  Args:
    params: The model, or any pytree of Variables.
    decay: In [0, 1], the weight of the old average.
    only: A filter of the Variables that are averaged.
    graph: `False` refuses a model that is no tree; None stands for
      `nnx.set_graph_mode`, at each use.

  Attributes:
    decay: The weight.
    filter: The filter.
    graph: As it was given.
    params: A State of the averages, Variables of the same kinds.

  Raises:
    TypeError: If the filter selects something that is not a Variable.
    ValueError: If `decay` is not in [0, 1].
  """

  graph: bool | None = None

  def __init__(
    self,
    params: Any,
    decay: float,
    *,
    only: Filter = ...,
    graph: bool | None = None,
  ):
    if isinstance(decay, (int, float)) and not 0 <= decay <= 1:
      raise ValueError(f"`decay` must lie in [0, 1], but got {decay}.")
    if graph is not None:
      self.graph = graph
    self.decay = decay
    self.filter = tuple(only) if isinstance(only, list) else only
    state = functional.state(params, only, graph=graph)
    if isinstance(state, State):
      state = map_state(_average_of, state)
    else:
      state = _average_of((), state)
    self.params = data(state)

  def update(self, updates: Any) -> None:
    """Moves the averages towards new values.

    Values that are not floating-point, such as a count or a key, are not
    averaged: the newest one is kept.

    Example:

      >>> import nnx
      >>> w = nnx.Dict(w=nnx.Param(0.0))
      >>> ema = nnx.EMA(w, decay=0.5)
      >>> ema.update(nnx.Dict(w=nnx.Param(4.0)))
      >>> float(ema.params.w.value)
      2.0

    Args:
      updates: The model, or its State.

    Raises:
      ValueError: If it lacks one of the Variables that are averaged.
    """
    if not isinstance(self.params, State):
      self._move(self.params, updates)
      return
    given = dict(to_flat_state(functional.state(updates, graph=self.graph)))
    averages = to_flat_state(self.params)
    missing = ["/".join(map(str, p)) for p in averages.paths if p not in given]
    if missing:
      raise ValueError(
        "`updates` must have all Variables that are averaged, but lacks"
        f" {missing}. Pass the model that the `EMA` was made for, or one like"
        " it."
      )
    for path, average in averages:
      self._move(average, given[path])

  def _move(self, average: Variable[Any], value: Any) -> None:
    def moved(old, new):
      if not jnp.issubdtype(jnp.result_type(old), jnp.inexact):
        return new
      return (self.decay * old + (1.0 - self.decay) * new).astype(old.dtype)

    old, new = leaves.as_pure((average, value))
    old = jax.tree.map(jnp.asarray, old)
    _set_raw_value(average, jax.tree.map(moved, old, new))

  def apply_to(self, model: A) -> A:
    """Returns a model like the one given whose Variables are the averages.

    It shares them with this object, so that it follows each `update`. Variables
    that are not averaged are those of `model`.

    Example:

      >>> import nnx
      >>> model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
      >>> ema = nnx.EMA(model, decay=0.9, only=nnx.PathContains("kernel"))
      >>> averaged = ema.apply_to(model)
      >>> averaged.kernel is ema.params.kernel, averaged.bias is model.bias
      (True, True)

    Args:
      model: The model that this was made for, or one like it.

    Returns:
      A new model.
    """
    graphdef, state = functional.split(model, graph=self.graph)
    if not isinstance(self.params, State):
      return functional.merge(graphdef, self.params)
    return functional.merge(graphdef, merge_state(state, self.params))


def _average_of(path: Any, leaf: Any) -> Variable[Any]:
  """Copies a Variable and its arrays, which may then be donated."""
  if not isinstance(leaf, Variable):
    where = "/".join(map(str, path))
    raise TypeError(
      f"An `EMA` averages Variables, but at `{where}` there is a"
      f" `{type(leaf).__name__}`. Leave it out by a filter, such as"
      " `only=nnx.Param`."
    )
  value = leaf.raw_value
  if is_ref(value):
    value = value[...]
  return leaf.copy(jax.tree.map(jnp.copy, value))


def _set_raw_value(variable: Variable[Any], value: Any) -> None:
  if is_ref(variable.raw_value):
    variable.raw_value[...] = value
  else:
    variable.raw_value = value
