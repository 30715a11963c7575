"""Checks of options: arguments that are not arrays but settings of a call."""

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def array(name: str, value: Any) -> jax.Array:
  """Returns `value` as a JAX array.

  Raises:
    TypeError: If it is not one.
    ValueError: If it holds an integer that is too large for JAX.
  """
  try:
    return jnp.asarray(value)
  except OverflowError as error:
    raise ValueError(
      f"`{name}` must hold numbers of JAX's dtypes, but got a larger one."
    ) from error
  except (TypeError, ValueError) as error:
    raise TypeError(
      f"`{name}` must be an array, but got `{type(value).__name__}`."
    ) from error


def boolean(name: str, value: Any) -> bool:
  """Returns a switch; raises TypeError for what is not True or False."""
  if not isinstance(value, (bool, np.bool_)):
    raise TypeError(f"`{name}` must be True or False, but got {value!r}.")
  return bool(value)


def integer(name: str, value: Any, least: int | None = None) -> int:
  """Returns an integer option.

  Args:
    name: Of the option.
    value: A Python or NumPy integer.
    least: The smallest allowed; any, if None.

  Raises:
    TypeError: If it is not an integer; a bool is not one.
    ValueError: If it is too small.
  """
  if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
    raise TypeError(f"`{name}` must be an integer, but got {value!r}.")
  try:
    value = operator.index(value)
  except TypeError as error:  # an array that is traced, or of floats
    raise TypeError(
      f"`{name}` must be an integer that is known now, but got {value!r}."
    ) from error
  if least is not None and value < least:
    raise ValueError(f"`{name}` must be at least {least}, but got {value}.")
  return value


def number(
  name: str,
  value: Any,
  *,
  least: float = -math.inf,
  most: float = math.inf,
  exclusive: bool = False,
) -> float:
  """Returns a finite number.

  Args:
    name: Of the option.
    value: A Python or NumPy number, or an array of one that is known.
    least: The smallest allowed.
    most: The largest allowed.
    exclusive: Whether it must not be `least` itself.

  Raises:
    TypeError: If it is not a number; bools and strings are not.
    ValueError: If it is not finite, or too small or too large.
  """
  kind = getattr(value, "dtype", None)
  if isinstance(value, (bool, np.bool_, str, bytes)) or kind == np.bool_:
    raise TypeError(f"`{name}` must be a number, but got {value!r}.")
  try:
    result = float(value)
  except OverflowError:
    result = math.inf
  except (TypeError, ValueError) as error:
    raise TypeError(
      f"`{name}` must be a number that is known now, but got {value!r}."
    ) from error
  fits = least <= result <= most and not (exclusive and result == least)
  if not (math.isfinite(result) and fits):
    if math.isfinite(most):
      wanted = f"lie in [{least:g}, {most:g}]"
    elif not math.isfinite(least):
      wanted = "be finite"
    elif exclusive:
      wanted = "be positive and finite"
    else:
      wanted = "not be negative, and finite"
    shown = value if math.isfinite(result) else result
    raise ValueError(f"`{name}` must {wanted}, but got {shown}.")
  return result


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
  """Returns `value`; raises ValueError unless it is one of `allowed`."""
  # By type as well: comparing an array raises or gives an array, and 1 is not
  # True.
  for choice in allowed:
    if type(value) is type(choice) and value == choice:
      return value
  wanted = " or ".join(repr(choice) for choice in allowed)
  raise ValueError(f"`{name}` must be {wanted}, but got `{value!r}`.")
