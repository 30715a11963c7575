"""Optimizers: the state of an optax transformation kept in Variables.

Nothing here imports optax: a transformation is anything with `init` and
`update`, as those of optax are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import jax
from jax import core
import jax.numpy as jnp
from jax.sharding import NamedSharding

from nnx import partitioning
from nnx.engine import jax_private
from nnx.filterlib import Filter
from nnx.graphlib import functional, leaves, modes
from nnx.missing import MISSING
from nnx.pytreelib import Pytree, data
from nnx.statelib import State, from_flat_state, map_state, to_flat_state
from nnx.variablelib import Param, Variable, is_ref

A = TypeVar("A")
M = TypeVar("M")

# Hooks on the values of a parameter must not run on its momentum.
_VALUE_HOOKS = frozenset(["on_create_value", "on_get_value", "on_set_value"])


# What may be a model that has nothing to learn.
_HOLDERS = (Pytree, State, Mapping, list, tuple)


class OptState(Variable[A]):
  """State of an optimizer.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> nnx.OptState(jnp.uint32(0)).dtype
    dtype('uint32')
  """

  __slots__ = ()


class OptArray(OptState[A]):
  """State of an optimizer that does not belong to one Variable: a step count.

  Example:

    >>> import nnx, optax
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    >>> type(optimizer.opt_state[0].count).__name__
    'OptArray'
  """

  __slots__ = ()


class OptVariable(OptState[A]):
  """State of an optimizer that belongs to a Variable: its momentum.

  It has the metadata of the Variable except hooks on values. A sharding named
  `optimizer_sharding` replaces that of the Variable.

  Example:

    >>> import nnx, optax
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> model.kernel.set_metadata(sharding=("model", None))
    >>> optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    >>> mean = optimizer.opt_state[0].mu.kernel
    >>> type(mean).__name__, mean.shape, mean.sharding_names
    ('OptVariable', (2, 3), ('model', None))
  """

  __slots__ = ()


def _is_variable(value: Any) -> bool:
  return isinstance(value, Variable)


# Metadata that says, while `tx.init` runs, which array a parameter is.
_PARAMETER = "_parameter"


class _Array:
  """An array in metadata, where it is compared by identity."""

  def __init__(self, array: Any):
    self.array = array


def _for_init(path: Any, leaf: Any) -> Any:
  """Returns a Variable for `tx.init`: of its type, with a plain array."""
  del path
  if not _is_variable(leaf):
    return leaf
  value = leaf.raw_value
  metadata = {
    name: entry
    for name, entry in leaf.get_metadata().items()
    if name not in _VALUE_HOOKS
  }
  value = value[...] if is_ref(value) else value
  metadata[_PARAMETER] = _Array(value)
  return leaf.from_metadata(value, metadata)


def _opt_state_of(leaf: Any) -> Variable[Any]:
  """Returns the Variable that holds a leaf of the result of `tx.init`."""
  if not _is_variable(leaf):
    return OptArray(leaf)
  metadata = leaf.get_metadata()
  parameter = metadata.pop(_PARAMETER).array
  own = metadata.pop("optimizer_sharding", None)
  if own is not None:
    return OptVariable(leaf.raw_value, **metadata | {"out_sharding": own})
  value = leaf.raw_value
  annotated = "out_sharding" in metadata
  if annotated and jnp.shape(value) != jnp.shape(parameter):
    # What a transformation keeps may have other axes than the parameter, as the
    # factors of Adafactor have; which ones is not known here.
    del metadata["out_sharding"]
  elif annotated and leaf.eager_sharding:
    placed = _placed_like(value, parameter, metadata["out_sharding"])
    if placed is not None:
      return OptVariable.from_metadata(placed, metadata)
  return OptVariable(value, **metadata)


def _placed_like(value: Any, parameter: Any, annotation: Any) -> Any:
  """Places an array like its parameter; None if the annotation says where.

  An annotation with fewer names than the array has axes may be that of a slice,
  if a transform has stacked the parameter.
  """
  if not isinstance(value, jax.Array) or not isinstance(parameter, jax.Array):
    return None
  spec = getattr(annotation, "spec", annotation)
  if len(spec) >= parameter.ndim:
    return None
  if not isinstance(parameter, core.Tracer):
    sharding = parameter.sharding
    if not isinstance(sharding, NamedSharding):
      return None
    if isinstance(value, core.Tracer):
      return jax.lax.with_sharding_constraint(value, sharding)
    return jax.device_put(value, sharding)
  if partitioning.active_mesh() is None:
    return None
  sharding = jax.typeof(parameter).sharding
  if sharding.mesh.are_all_axes_explicit:
    return jax.sharding.reshard(value, sharding)
  return jax_private.sharded_alike(value, parameter)


def apply_updates(params: Any, updates: Any) -> Any:
  """Adds updates to parameters, each in the dtype of the parameter.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.training import optimizer
    >>> optimizer.apply_updates({"w": jnp.bfloat16(1)}, {"w": 0.5})
    {'w': Array(1.5, dtype=bfloat16)}

  Args:
    params: A pytree of arrays.
    updates: One of the same structure.

  Returns:
    A pytree of that structure.
  """
  return jax.tree.map(
    lambda p, u: jnp.asarray(p + u).astype(jnp.asarray(p).dtype),
    params,
    updates,
  )


def _gradients_of(
  params: Any, grads: Any, wrt: Filter, graph: bool | None
) -> Any:
  """Returns the arrays of the gradients, in the structure of parameters."""
  if not isinstance(params, State):  # of a model that is one Variable
    return leaves.as_pure(grads)
  state = functional.state(grads, graph=graph)
  if not isinstance(state, State):
    raise TypeError(
      "`grads` must be what `nnx.grad` returns for the model, but got"
      f" `{grads!r}` of type `{type(grads).__name__}`."
    )
  given = dict(to_flat_state(state))
  wanted = dict(to_flat_state(params))
  selected = to_flat_state(functional.state(grads, wrt, graph=graph)).paths
  missing = [path for path in wanted if path not in given]
  foreign = [path for path in selected if path not in wanted]
  if missing or foreign:
    faults = [
      text + _listed(paths)
      for text, paths in (
        ("there is none for ", missing),
        ("too many: ", foreign),
      )
      if paths
    ]
    raise ValueError(
      "`grads` must be those of the Variables that `wrt` selects of the model,"
      f" but {'; '.join(faults)}. Give `nnx.grad` the filter of the optimizer,"
      f" by an `nnx.DiffState`, here `{wrt!r}`."
    )
  pure = {path: leaves.as_pure(given[path]) for path in wanted}
  for path, grad in pure.items():
    shapes = [jax.tree.map(jnp.shape, x) for x in (grad, wanted[path])]
    if shapes[0] != shapes[1]:
      raise ValueError(
        "Gradients must have the shapes of their parameters, but at"
        f" `{_text(path)}` the gradient has `{shapes[0]}` and the parameter"
        f" `{shapes[1]}`."
      )
  return from_flat_state(pure)


def _text(path: tuple[Any, ...]) -> str:
  return "/".join(map(str, path))


def _listed(paths: list[tuple[Any, ...]]) -> str:
  dots = ", ..." if len(paths) > 5 else ""
  return ", ".join(f"`{_text(path)}`" for path in paths[:5]) + dots


class Optimizer(Pytree, Generic[M]):
  """Updates the parameters of a model by an optax transformation.

  It keeps the transformation's state in Variables, so it goes through
  `nnx.jit` and the other transforms, `split`, and checkpoints like a Module.

  Made with `wrt=`, it does not keep the model, and `update` takes the model and
  the gradients, as in Flax 0.11 and later. Made without, it keeps the model as
  its attribute `model`, and `update` takes the gradients alone, as before; a
  filter by position, which only Flax 0.10 took, means that too. In Flax 0.11
  and later `wrt` has no default and its absence is an error: here it asks for
  the older meaning, with `nnx.Param`, on purpose.

  Example:

    >>> import jax, nnx, optax
    >>> import jax.numpy as jnp
    >>> x, y = jnp.ones((4, 2)), jnp.ones((4, 3))
    >>> def loss_fn(model):
    ...   return ((model(x) - y) ** 2).mean()
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    >>> @nnx.jit
    ... def train_step(model, optimizer):
    ...   loss, grads = nnx.value_and_grad(loss_fn)(model)
    ...   optimizer.update(model, grads)
    ...   return loss
    >>> bool(train_step(model, optimizer) > train_step(model, optimizer))
    True
    >>> int(optimizer.step.value)
    2

    The same as it was written for Flax 0.10:

    >>> optimizer = nnx.Optimizer(model, optax.sgd(0.1))
    >>> _ = optimizer.update(nnx.grad(loss_fn)(optimizer.model))

  Args:
    model: The model.
    tx: The transformation.
    *old_wrt: At most one filter: that of an optimizer that keeps the model,
      in place of `nnx.Param`.
    wrt: A filter of the Variables to update, which should be the one that
      `nnx.grad` is given.
    graph: `False` refuses a model that is no tree; None stands for
      `nnx.set_graph_mode`, at each use.

  Attributes:
    step: An `OptState`, the number of updates.
    tx: The transformation.
    opt_state: Its state: what `tx.init` returns, with an `OptVariable` in the
      place of each Variable and an `OptArray` in that of each other leaf.
    wrt: The filter.
    graph: As it was given.

  Raises:
    TypeError: If `tx` has no `init` and `update`, or if two filters are given.
    ValueError: If `wrt` selects nothing of the model.
  """

  model: M
  graph: bool | None = None

  def __init__(
    self,
    model: M,
    tx: Any,
    *old_wrt: Filter,
    wrt: Filter = MISSING,
    graph: bool | None = None,
  ):
    if not (hasattr(tx, "init") and hasattr(tx, "update")):
      raise TypeError(
        "`tx` must be a transformation of optax, with `init` and `update`, but"
        f" got `{tx!r}`. Pass one such as `optax.adam(1e-3)`."
      )
    keeps_model = wrt is MISSING
    if old_wrt and (len(old_wrt) > 1 or not keeps_model):
      raise TypeError(
        "`Optimizer` must be given a model, a transformation and at most one"
        f" filter, but got {2 + len(old_wrt)} arguments and `wrt={wrt!r}`."
      )
    if keeps_model:
      wrt = old_wrt[0] if old_wrt else Param
    if isinstance(wrt, list):
      wrt = tuple(wrt)  # a filter must be hashable
    if graph is not None:
      self.graph = graph
    params = functional.state(model, wrt, graph=graph)
    if isinstance(params, State) and not (
      params or isinstance(model, _HOLDERS)
    ):
      raise TypeError(
        "`model` must be a Module or something else that holds Variables, but"
        f" got `{model!r}` of type `{type(model).__name__}`."
      )
    if isinstance(params, State) and not params and functional.state(model):
      raise ValueError(
        f"`wrt` must select Variables of the model, but `{wrt!r}` selects none"
        f" of the `{type(model).__name__}`. Pass a filter such as `nnx.Param`."
      )
    self.step = OptState(jnp.array(0, dtype=jnp.uint32))
    if keeps_model:
      self.model = model
    self.tx = tx
    if isinstance(params, State):
      params = map_state(_for_init, params)
    else:  # the model is one Variable
      params = _for_init((), params)
    self.opt_state = data(
      jax.tree.map(_opt_state_of, tx.init(params), is_leaf=_is_variable)
    )
    self.wrt = wrt

  def __getattr__(self, name: str) -> Any:
    if name == "model":
      raise AttributeError(
        "An optimizer that was made with `wrt` does not keep its model."
        " Make it without `wrt`, or make an `nnx.ModelAndOptimizer`.",
        name=name,
        obj=self,
      )
    raise AttributeError(
      f"`{type(self).__name__}` has no attribute `{name}`.", name=name, obj=self
    )

  def update(
    self, model: Any = MISSING, grads: Any = MISSING, **kwargs: Any
  ) -> Any:
    """Takes one step: updates the parameters and the optimizer's own state.

    Called as `update(model, grads)`; as `update(grads)` if the optimizer keeps
    the model.

    Example:

      >>> import jax, nnx, optax
      >>> w = nnx.Dict(w=nnx.Param(1.0))
      >>> optimizer = nnx.Optimizer(w, optax.sgd(0.5), wrt=nnx.Param)
      >>> updates = optimizer.update(w, nnx.grad(lambda m: m.w**2)(w))
      >>> float(updates.w), float(w.w.value)
      (-1.0, 0.0)

    Args:
      model: The model that the optimizer was made for, or one like it.
      grads: The gradients, with those of the Variables that `wrt` selects: a
        `State` as `nnx.grad` returns it, a Module, or nested dicts.
      **kwargs: Passed to `tx.update`, for the transformations that take more,
        such as `value` for those that look at the loss. Variables in them are
        replaced by their values.

    Returns:
      The updates that were added to the parameters: of their structure, with
      arrays in place of the Variables.

    Raises:
      TypeError: If the gradients are missing, or the model, and the optimizer
        does not keep one.
      ValueError: If the gradients are not those of the Variables that `wrt`
        selects of the model, or if the model is not like the one that the
        optimizer was made for.
    """
    if grads is MISSING:
      model, grads = MISSING, model
    if grads is MISSING:
      raise TypeError(
        f"`{type(self).__name__}.update` must be given the gradients, but got"
        " none. Call `update(model, grads)`, or `update(grads)` if the"
        " optimizer keeps the model."
      )
    if isinstance(model, State) and isinstance(grads, Pytree):
      raise TypeError(
        f"`{type(self).__name__}.update` must be given the model first, but got"
        f" a `State` and a `{type(grads).__name__}`. Call `update(model,"
        " grads)`."
      )
    if model is MISSING:
      if "model" not in vars(self):
        raise TypeError(
          "An optimizer that was made with `wrt` keeps no model, and its"
          " `update` must be given the model and the gradients, but got one"
          " argument. Call `update(model, grads)`, or make an"
          " `nnx.ModelAndOptimizer`."
        )
      model = self.model
    params = leaves.as_pure(functional.state(model, self.wrt, graph=self.graph))
    grads = _gradients_of(params, grads, self.wrt, self.graph)
    with modes.named_scope(type(self).__name__):
      updates, opt_state = self.tx.update(
        grads,
        leaves.as_pure(self.opt_state),
        params,
        **leaves.as_pure(kwargs),
      )
      new_params = apply_updates(params, updates)
      step = self.step.value + 1

    def store(variable, value):
      variable.value = value

    jax.tree.map(store, self.opt_state, opt_state, is_leaf=_is_variable)
    functional.update(model, new_params, check_shapes=True)
    self.step.value = step
    return updates


class ModelAndOptimizer(Optimizer[M]):
  """An optimizer that keeps its model: `update` takes the gradients alone.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx, optax
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> state = nnx.ModelAndOptimizer(model, optax.sgd(0.1))
    >>> grads = nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(state.model)
    >>> _ = state.update(grads)
    >>> state.model is model, int(state.step.value)
    (True, 1)

  Args:
    model: The model, kept as the attribute `model`.
    tx: The transformation.
    wrt: A filter of the Variables to update.
  """

  def __init__(self, model: M, tx: Any, *, wrt: Filter = Param):
    super().__init__(model, tx, wrt=wrt)
    self.model = model

  def update(self, grads: Any, /, **kwargs: Any) -> Any:  # type: ignore[override]
    """Takes one step; see `Optimizer.update`.

    Example:

      >>> import nnx, optax
      >>> model = nnx.Dict(w=nnx.Param(1.0))
      >>> state = nnx.ModelAndOptimizer(model, optax.sgd(0.5))
      >>> _ = state.update(nnx.grad(lambda m: m.w**2)(state.model))
      >>> float(model.w.value)
      0.0

    Args:
      grads: The gradients.
      **kwargs: Passed to `tx.update`.

    Returns:
      The updates that were added to the parameters.
    """
    return super().update(self.model, grads, **kwargs)
