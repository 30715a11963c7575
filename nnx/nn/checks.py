"""Checks of the arguments of layers and of their calls.

Tracers pass, as their values are not known.
"""

from __future__ import annotations

from collections.abc import Iterable
import math
import operator
from typing import Any

import jax
from jax import core
import jax.numpy as jnp

from nnx.rnglib import Rngs


def _is_known(value: Any) -> bool:
  return not isinstance(value, core.Tracer)


def _number(name: str, value: Any) -> bool:
  """Refuses what is no number, and tells whether its value is known."""
  if not _is_known(value):
    return False
  try:
    if not isinstance(value, str):
      float(value)
      return True
  except (TypeError, ValueError):
    pass
  raise TypeError(f"`{name}` must be a number, but got {value!r}.")


def whole(name: str, value: Any, least: float = 0) -> None:
  """Refuses a value that is not an integer, or is too small.

  Example:

    >>> from nnx.nn import checks
    >>> checks.whole("features", 3)
    >>> checks.whole("features", -3)
    Traceback (most recent call last):
      ...
    ValueError: `features` must be at least 0, but got -3.

  Args:
    name: Name of the argument.
    value: Value of the argument.
    least: The smallest value allowed.

  Raises:
    TypeError: If the value is not an integer.
    ValueError: If it is below `least`.
  """
  if not _is_known(value):
    return
  try:
    number = operator.index(value)
  except TypeError:
    raise TypeError(
      f"`{name}` must be an integer, but got {value!r}."
    ) from None
  if number < least:
    raise ValueError(f"`{name}` must be at least {least}, but got {value}.")


def wholes(name: str, values: Any, least: float = 0) -> None:
  """Refuses one value or several as `whole` does.

  Example:

    >>> from nnx.nn import checks
    >>> checks.wholes("strides", (1, 2), 1)

  Args:
    name: Name of the argument.
    values: One value or several.
    least: The smallest value allowed.

  Raises:
    TypeError: If a value is not an integer.
    ValueError: If one is below `least`.
  """
  for value in values if isinstance(values, Iterable) else (values,):
    whole(name, value, least)


def rate(name: str, value: Any) -> None:
  """Refuses a value that is not a number in [0, 1].

  Example:

    >>> from nnx.nn import checks
    >>> checks.rate("dropout_rate", float("nan"))
    Traceback (most recent call last):
      ...
    ValueError: `dropout_rate` must lie in [0, 1], but got nan.

  Args:
    name: Name of the argument.
    value: Value of the argument.

  Raises:
    TypeError: If it is no number.
    ValueError: If it is outside, or NaN.
  """
  if _number(name, value) and not 0 <= value <= 1:
    raise ValueError(f"`{name}` must lie in [0, 1], but got {value}.")


def small(name: str, value: Any) -> None:
  """Refuses an epsilon, as of a variance, that is negative or not finite.

  Example:

    >>> from nnx.nn import checks
    >>> checks.small("epsilon", 1e-6)

  Args:
    name: Name of the argument.
    value: Value of the argument.

  Raises:
    TypeError: If it is no number.
    ValueError: If it is negative, infinite or NaN.
  """
  if _number(name, value) and not 0 <= value < math.inf:
    raise ValueError(
      f"`{name}` must be finite and at least 0, but got {value}."
    )


def positive(name: str, value: Any) -> None:
  """Refuses a value that is not a positive finite number.

  Example:

    >>> from nnx.nn import checks
    >>> checks.positive("rope_base", 10000.0)

  Args:
    name: Name of the argument.
    value: Value of the argument.

  Raises:
    TypeError: If it is no number.
    ValueError: If it is not positive, infinite or NaN.
  """
  if _number(name, value) and not 0 < value < math.inf:
    raise ValueError(f"`{name}` must be positive and finite, but got {value}.")


def key(rngs: Any) -> jax.Array:
  """Returns the next key for a parameter.

  Example:

    >>> import nnx
    >>> from nnx.nn import checks
    >>> checks.key(0)
    Traceback (most recent call last):
      ...
    TypeError: `rngs` must be an `nnx.Rngs`, but got 0. Pass `nnx.Rngs(seed)`.

  Args:
    rngs: Streams; `params` gives the key.

  Raises:
    TypeError: If it has no streams.
  """
  if not isinstance(rngs, Rngs) and not hasattr(rngs, "params"):
    shown = repr(rngs)
    if len(shown) > 40 or "\n" in shown:
      shown = f"a `{type(rngs).__name__}`"
    raise TypeError(
      f"`rngs` must be an `nnx.Rngs`, but got {shown}. Pass `nnx.Rngs(seed)`."
    )
  return rngs.params()


def last_axis(layer: Any, name: str, inputs: Any, features: int) -> None:
  """Refuses inputs whose last axis is not that of a layer.

  A layer calls this after an operation has failed, so that it costs nothing
  otherwise.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import checks
    >>> checks.last_axis(  # doctest: +ELLIPSIS
    ...   object(), "inputs", jnp.ones((2, 3)), 4
    ... )
    Traceback (most recent call last):
      ...
    ValueError: The last axis of `inputs` must be 4 for this `object`, ...

  Args:
    layer: The layer that was called.
    name: Name of the argument.
    inputs: An array of any shape.
    features: The size that its last axis must have.

  Raises:
    ValueError: If it has another.
  """
  shape = jnp.shape(inputs)
  if not shape or shape[-1] != features:
    raise ValueError(
      f"The last axis of `{name}` must be {features} for this"
      f" `{type(layer).__name__}`, but got {shape}."
    ) from None
