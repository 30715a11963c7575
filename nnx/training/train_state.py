"""Train states: everything that a step of training changes, as one pytree."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from nnx.engine import serialization
from nnx.graphlib.definitions import GraphDef
from nnx.pytreelib import static
from nnx.statelib import State
from nnx.training import optimizer

M = TypeVar("M")
T = TypeVar("T", bound="TrainState[Any]")


def _is_static(field: dataclasses.Field) -> bool:
  """Returns whether a field is static, by our mark or `flax.struct.field`'s."""
  metadata = field.metadata
  return metadata.get("static", not metadata.get("pytree_node", True))


def _register(cls: type) -> None:
  """Makes a class a frozen dataclass and a pytree of its fields."""
  dataclasses.dataclass(frozen=True)(cls)
  fields = dataclasses.fields(cls)
  jax.tree_util.register_dataclass(
    cls,
    [field.name for field in fields if not _is_static(field)],
    [field.name for field in fields if _is_static(field)],
  )
  serialization.register(cls)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
class TrainState(Generic[M]):
  """Parameters and the state of their optimizer, for functional programs.

  It is immutable, and a pytree of jax: `jax.jit`, `jax.grad` and the like take
  and return it. Programs that keep more derive a class from it; annotations in
  its body are fields, with `nnx.static()` those that are part of the structure.

  Example:

    >>> import jax, nnx, optax
    >>> import jax.numpy as jnp
    >>> class TrainState(nnx.TrainState):
    ...   rest: nnx.State
    >>> model = nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
    >>> graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    >>> state = TrainState.create(
    ...   graphdef, params=params, tx=optax.sgd(0.1), rest=rest
    ... )
    >>> @jax.jit
    ... def train_step(state, x):
    ...   def loss_fn(params):
    ...     y, (_, updates) = state.apply(params, "rest")(x)
    ...     return (y**2).sum(), updates.split(nnx.Param, ...)[1]
    ...
    ...   grads, rest = jax.grad(loss_fn, has_aux=True)(state.params)
    ...   return state.apply_gradients(grads, rest=rest)
    >>> state = train_step(state, jnp.array([[1.0, 2.0], [3.0, 4.0]]))
    >>> int(state.step), state.rest.mean.value
    (1, Array([1. , 1.5], dtype=float32))

  Attributes:
    graphdef: The structure of the model.
    params: The parameters.
    opt_state: The state of the transformation.
    step: The number of steps taken, a scalar integer.
    tx: The transformation, static.
  """

  graphdef: GraphDef[M]
  params: State
  opt_state: Any
  step: jax.Array
  tx: Any = static()

  def __init_subclass__(cls, **kwargs: Any) -> None:
    super().__init_subclass__(**kwargs)
    _register(cls)

  @classmethod
  def create(
    cls: type[T],
    graphdef: GraphDef[Any],
    *,
    params: State,
    tx: Any,
    step: int = 0,
    **kwargs: Any,
  ) -> T:
    """Makes a train state, with the optimizer's state for the parameters.

    Example:

      >>> import nnx, optax
      >>> graphdef, params = nnx.split(nnx.Dict(w=nnx.Param(1.0)))
      >>> tx = optax.sgd(0.1)
      >>> nnx.TrainState.create(graphdef, params=params, tx=tx).step
      Array(0, dtype=int32, weak_type=True)

    Args:
      graphdef: The structure of the model, from `nnx.split`.
      params: Its parameters.
      tx: A transformation of optax.
      step: The number of steps taken before.
      **kwargs: The fields of a derived class.

    Returns:
      The train state.
    """
    make: Any = cls
    return make(
      graphdef=graphdef,
      params=params,
      opt_state=tx.init(params),
      step=jnp.asarray(step),
      tx=tx,
      **kwargs,
    )

  def apply(self, state: State | str, *states: State | str) -> Any:
    """Calls the model, or a method of it, with given parts of its state.

    Example:

      >>> import nnx, optax
      >>> class Scale(nnx.Module):
      ...   def __init__(self):
      ...     self.w = nnx.Param(2.0)
      ...
      ...   def __call__(self, x):
      ...     return self.w * x
      >>> graphdef, params = nnx.split(Scale())
      >>> state = nnx.TrainState.create(
      ...   graphdef, params=params, tx=optax.sgd(0.1)
      ... )
      >>> y, (graphdef, params) = state.apply("params")(3.0)
      >>> y
      6.0

    Args:
      state: A State, or the name of a field that is one.
      *states: More of them; together all of the model's state.

    Returns:
      What `graphdef.apply` returns: a function of the model's arguments that
      returns its result and a pair of the graphdef and the new state.

    Raises:
      TypeError: If a field that is named is not a State.
    """
    given = []
    for part in (state, *states):
      if isinstance(part, str):
        name, part = part, getattr(self, part)
        if not isinstance(part, State):
          raise TypeError(
            f"`{type(self).__name__}.{name}` must be a State to be applied, but"
            f" it is a `{type(part).__name__}`."
          )
      # A copy, as the model must not write to Variables of this state: it is
      # immutable, and may belong to an outer trace.
      given.append(jax.tree.map(lambda leaf: leaf, part))
    return self.graphdef.apply(*given)

  def apply_gradients(self: T, grads: State, **kwargs: Any) -> T:
    """Returns the train state after one step.

    Example:

      >>> import nnx, optax
      >>> graphdef, params = nnx.split(nnx.Dict(w=nnx.Param(1.0)))
      >>> state = nnx.TrainState.create(
      ...   graphdef, params=params, tx=optax.sgd(0.5)
      ... )
      >>> state = state.apply_gradients(nnx.State({"w": nnx.Param(1.0)}))
      >>> float(state.params.w.value), int(state.step)
      (0.5, 1)

    Args:
      grads: The gradients of the parameters, of their structure.
      **kwargs: New values of other fields.

    Returns:
      A new train state.
    """
    updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
    return self.replace(
      params=optimizer.apply_updates(self.params, updates),
      opt_state=opt_state,
      step=self.step + 1,
      **kwargs,
    )

  def replace(self: T, **changes: Any) -> T:
    """Returns a copy with some fields changed.

    Example:

      >>> import nnx, optax
      >>> graphdef, params = nnx.split(nnx.Dict(w=nnx.Param(1.0)))
      >>> tx = optax.sgd(0.5)
      >>> state = nnx.TrainState.create(graphdef, params=params, tx=tx)
      >>> state.replace(step=3).step
      3
    """
    return dataclasses.replace(self, **changes)  # type: ignore[type-var]


_register(TrainState)
