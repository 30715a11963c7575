"""Argument checks of the public functions of matmul."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from ..common import options


def floating(name: str, value: Any) -> jax.Array:
  """Returns an argument as an array; raises TypeError if it is not floating."""
  array = options.array(name, value)
  if not jnp.issubdtype(array.dtype, jnp.floating):
    raise TypeError(
      f"`{name}` must be floating, but got {array.dtype.name}. Convert it with"
      f" `{name}.astype`."
    )
  return array


def check_shapes(
  x: Any, w_shape: tuple[Any, ...], bias: Any, transposed: bool
) -> None:
  """Checks that the arguments fit one another.

  Args:
    x: The activations.
    w_shape: Of the weights.
    bias: An array or None.
    transposed: Whether the weights are `[n, k]`.

  Raises:
    ValueError: If they do not.
  """
  if x.ndim == 0:
    raise ValueError("`x` must have an axis of k numbers, but got a scalar.")
  if len(w_shape) != 2:
    raise ValueError(
      f"`w` must have 2 axes {'[n, k]' if transposed else '[k, n]'}, but got"
      f" shape {w_shape}. Use `jax.vmap` for several matrices."
    )
  k, n = reversed(w_shape) if transposed else w_shape
  if x.shape[-1] != k:
    raise ValueError(
      "The last axis of `x` must be as long as the"
      f" {'last' if transposed else 'first'} of `w`, but their shapes are"
      f" {x.shape} and {w_shape}."
    )
  if bias is not None and bias.shape != (n,):
    raise ValueError(
      f"`bias` must have the shape ({n},), one number for each"
      f" {'row' if transposed else 'column'} of `w` of shape {w_shape}, but got"
      f" {bias.shape}."
    )


def dtype_name(name: str, dtype: Any) -> str:
  """Returns the name of a dtype; raises TypeError if it is not one."""
  try:
    return jnp.dtype(dtype).name
  except TypeError as error:
    raise TypeError(f"`{name}` must be a dtype, but got {dtype!r}.") from error


def check_dtype(preferred: Any, *inputs: Any) -> np.dtype:
  """Returns the dtype of the result.

  Args:
    preferred: What the user wants, or None.
    *inputs: Dtypes of the arguments.

  Raises:
    TypeError: If `preferred` is not floating.
  """
  if preferred is None:
    return jnp.dtype(jnp.result_type(*inputs))
  dtype = jnp.dtype(dtype_name("preferred_element_type", preferred))
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(
      f"`preferred_element_type` must be floating, but got {dtype.name}."
    )
  return jax.dtypes.canonicalize_dtype(dtype)


def check_precision(precision: Any) -> Any:
  """Returns a precision as its name, a pair of names, or None.

  Args:
    precision: As in `jax.numpy.matmul`.

  Raises:
    ValueError: If it is not one of `jax.lax.Precision`, nor two of them.
  """
  if precision is None:
    return None
  if isinstance(precision, (tuple, list)) and len(precision) == 2:
    return tuple(check_precision(one) for one in precision)
  try:
    return lax.Precision(precision).name.lower()
  except ValueError as error:
    raise ValueError(
      "`precision` must be None, one of jax.lax.Precision, or two of them, but"
      f" got {precision!r}."
    ) from error
