"""Quantisation of cache rows with one scale a head, in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp

from ..common import options

_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def _floating(name: str, value: Any) -> jax.Array:
  value = options.array(name, value)
  if not jnp.issubdtype(value.dtype, jnp.floating):
    raise TypeError(f"`{name}` must be floating, but got `{value.dtype.name}`.")
  return value


def _scale(value: Any, shape: tuple[int, ...]) -> Any:
  """Returns a scale for `x` of a shape; arrays' values are not looked at."""
  if isinstance(value, (int, float)):
    return options.number("scale", value, least=0, exclusive=True)
  value = _floating("scale", value)
  fits = value.ndim <= len(shape) and all(
    a in (b, 1) for a, b in zip(value.shape[::-1], shape[::-1])
  )
  if not fits:
    raise ValueError(
      f"`scale` must broadcast to the shape {shape} of `x`, but got one of"
      f" {value.shape}."
    )
  return value


def _limit(dtype: Any) -> float:
  """Returns the largest number of a dtype that a cache is quantised to."""
  name = jnp.dtype(dtype).name
  if name not in _LARGEST:
    raise ValueError(
      f"`dtype` must be one of {', '.join(_LARGEST)}, but got `{name}`."
    )
  return _LARGEST[name]


def quantize(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
  """Quantises as `round(x / scale)`, clipped to what `dtype` can hold.

  Rounding is to nearest even. NaN becomes 0 in int8 and stays NaN in float8.

  Args:
    x: `[...]`, floating.
    scale: Positive, floating; broadcasts to the shape of `x`.
    dtype: int8, float8_e4m3fn or float8_e5m2.

  Returns:
    `[...]` of `dtype`.

  Raises:
    TypeError: If `x` or `scale` is not floating.
    ValueError: If `dtype` is another, or `scale` does not broadcast, or is a
      number that is not positive and finite.

  Example:
    >>> import jax.numpy as jnp
    >>> from kernels import kv_cache
    >>> kv_cache.quantize(jnp.array([0.1, -0.5, 9.0]), 0.01, "int8").tolist()
    [10, -50, 127]
  """
  limit = _limit(dtype)
  x = _floating("x", x)
  ratio = x.astype(jnp.float32) / _scale(scale, x.shape)
  if jnp.dtype(dtype).name == "int8":
    ratio = jnp.where(jnp.isnan(ratio), 0.0, jnp.round(ratio))
  return jnp.clip(ratio, -limit, limit).astype(dtype)


def dequantize(x: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns `x * scale` in float32.

  Args:
    x: `[...]`, int8 or float8.
    scale: Positive, floating; broadcasts to the shape of `x`.

  Returns:
    `[...]` float32.

  Raises:
    TypeError: If `scale` is not floating.
    ValueError: If `x` has another dtype, or `scale` does not broadcast, or is a
      number that is not positive and finite.

  Example:
    >>> import jax.numpy as jnp
    >>> from kernels import kv_cache
    >>> kv_cache.dequantize(jnp.array([2, -3], jnp.int8), 0.5).tolist()
    [1.0, -1.5]
  """
  x = options.array("x", x)
  if x.dtype.name not in _LARGEST:
    raise ValueError(
      f"`x` must be {', '.join(_LARGEST)}, but got `{x.dtype.name}`."
    )
  return x.astype(jnp.float32) * _scale(scale, x.shape)


def scale_for(x: jax.Array, dtype: Any, axis: Any = None) -> jax.Array:
  """Returns the scale that lets `dtype` just hold the largest value of `x`.

  Args:
    x: `[...]`, floating: keys or values of a calibration run.
    dtype: int8, float8_e4m3fn or float8_e5m2.
    axis: Axes to take the largest value over; all, if None.

  Returns:
    float32, `x` without `axis`; 1 where `x` is all zero, NaN where it has one.

  Raises:
    TypeError: If `x` is not floating.
    ValueError: If `dtype` is another, or `x` has no elements.

  Example:
    >>> import jax.numpy as jnp
    >>> from kernels import kv_cache
    >>> float(kv_cache.scale_for(jnp.array([0.5, -254.0]), "int8"))
    2.0
  """
  limit = _limit(dtype)
  x = _floating("x", x)
  if not x.size:
    raise ValueError(f"`x` must have elements, but has the shape {x.shape}.")
  largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axis)
  return jnp.where(largest == 0, 1.0, largest / limit)
