"""Argument checks that the public functions of batch_stat share."""

from typing import Any

import jax
from jax import core
import jax.numpy as jnp
import numpy as np

from ..common import arrays, options
from . import reference


def canonical_feature_axis(x: Any, feature_axis: int) -> int:
  """Checks x and its feature axis.

  Args:
    x: The batch.
    feature_axis: In `[-x.ndim, x.ndim)`.

  Returns:
    The feature axis, not negative.

  Raises:
    TypeError: If `x` is not real floating, or `feature_axis` is not an integer.
    ValueError: If `feature_axis` is out of range.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f"`x` must be floating, but got {x.dtype.name}. Convert it with"
      " `x.astype`."
    )
  if isinstance(feature_axis, (bool, np.bool_)) or not isinstance(
    feature_axis, (int, np.integer)
  ):
    raise TypeError(
      f"`feature_axis` must be one integer, but got {feature_axis!r}."
    )
  if x.ndim == 0:
    raise ValueError("`x` must have an axis of features, but got a scalar.")
  if not -x.ndim <= feature_axis < x.ndim:
    raise ValueError(
      f"`feature_axis` must lie in [{-x.ndim}, {x.ndim}) for `x` of shape"
      f" {x.shape}, but got {feature_axis}."
    )
  return int(feature_axis) % x.ndim


def check_not_empty(x: Any, feature_axis: int) -> None:
  """Raises ValueError if x has no value for a feature."""
  rest = (*x.shape[:feature_axis], *x.shape[feature_axis + 1 :])
  if arrays.static_size(rest) == 0:
    raise ValueError(
      f"`x` must have at least one value for each feature, but its shape is"
      f" {x.shape}. Skip the update for an empty batch."
    )


def check_stat(stat: Any, name: str, x: Any, feature_axis: int) -> jax.Array:
  """Checks that an argument has one number for each feature of x.

  Args:
    stat: The argument.
    name: What the caller calls it.
    x: The batch.
    feature_axis: Of x, not negative.

  Returns:
    The argument as an array, in its own dtype.

  Raises:
    TypeError: If it is not floating.
    ValueError: If it has another shape.
  """
  stat = options.array(name, stat)
  if not jnp.issubdtype(stat.dtype, jnp.floating):
    raise TypeError(f"`{name}` must be floating, but got {stat.dtype.name}.")
  if stat.shape != (x.shape[feature_axis],):
    raise ValueError(
      f"`{name}` must have the shape ({x.shape[feature_axis]},), one number for"
      f" each feature of `x`, but got {stat.shape}. `x` has the shape"
      f" {x.shape} and `feature_axis` is {feature_axis}."
    )
  return stat


def check_momentum(momentum: Any, x: Any) -> jax.Array:
  """Checks the weight of the old averages.

  Args:
    momentum: A number in `[0, 1]`, or a traced scalar.
    x: The batch.

  Returns:
    `[1]`, in the dtype of the statistics.

  Raises:
    TypeError: If it is not a number.
    ValueError: If it is known to be outside, or is not a scalar.
  """
  if not isinstance(momentum, core.Tracer) and np.ndim(momentum) == 0:
    options.number("momentum", momentum, least=0, most=1)
  kind = jnp.asarray(momentum).dtype
  if not (
    jnp.issubdtype(kind, jnp.integer) or jnp.issubdtype(kind, jnp.floating)
  ):
    raise TypeError(f"`momentum` must be a real number, but got {kind.name}.")
  momentum = jnp.asarray(momentum, reference.compute_dtype(x.dtype))
  if momentum.ndim != 0:
    raise ValueError(
      f"`momentum` must be a scalar, but got shape {momentum.shape}."
    )
  return momentum.reshape(1)


def check_mask(mask: Any, x: Any, feature_axis: int) -> jax.Array | None:
  """Brings a mask into the form that the ops take.

  Args:
    mask: None, or an array that broadcasts to x's shape; nonzero keeps.
    x: The batch.
    feature_axis: Of x, not negative.

  Returns:
    None, or a bool array of x's shape, with 1 in place of the features where
    the mask does not depend on them.

  Raises:
    ValueError: If it does not broadcast to x's shape.
  """
  if mask is None:
    return None
  mask = options.array("mask", mask)
  fits = mask.ndim <= x.ndim and all(
    m == n or m == 1 for m, n in zip(mask.shape[::-1], x.shape[::-1])
  )
  if not fits:
    raise ValueError(
      f"`mask` must broadcast to the shape of `x`, {x.shape}, but got"
      f" {mask.shape}."
    )
  shape = list(x.shape)
  from_end = x.ndim - feature_axis
  if mask.ndim < from_end or mask.shape[-from_end] == 1:
    shape[feature_axis] = 1
  return jnp.broadcast_to(mask.astype(bool), shape)


def check_axis_groups(axis_name: Any, axis_index_groups: Any) -> Any:
  """Checks the cross-device arguments.

  Args:
    axis_name: None, a name or several.
    axis_index_groups: None or a sequence of sequences of indices.

  Returns:
    The groups as nested tuples, or None.

  Raises:
    ValueError: If there are groups without a name.
  """
  if axis_index_groups is None:
    return None
  if axis_name is None:
    raise ValueError(
      "`axis_index_groups` must come with an `axis_name`, but `axis_name` is"
      " None."
    )
  return tuple(tuple(group) for group in axis_index_groups)


def check_activation(activation: str | None) -> bool:
  """Returns whether relu is asked for; raises ValueError for anything else."""
  if not (activation is None or isinstance(activation, str)) or (
    activation not in (None, "relu")
  ):
    raise ValueError(
      f"`activation` must be None or 'relu', but got {activation!r}. Apply"
      " another one to the result."
    )
  return activation == "relu"


def check_result_dtype(dtype: Any, x: Any) -> np.dtype:
  """Returns the dtype of the result, x's by default.

  Args:
    dtype: None or a floating dtype.
    x: The batch.

  Raises:
    TypeError: If it is not floating.
  """
  if dtype is None:
    return np.dtype(x.dtype)
  try:
    known = np.dtype(dtype)
  except TypeError as error:
    raise TypeError(f"`dtype` must be floating, but got {dtype!r}.") from error
  if not jnp.issubdtype(known, jnp.floating):
    raise TypeError(f"`dtype` must be floating, but got {known.name}.")
  return known


def check_epsilon(epsilon: Any) -> float:
  """Returns epsilon; raises unless it is a finite number, not negative."""
  return options.number("epsilon", epsilon, least=0)
