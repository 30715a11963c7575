"""Quantisation of cache rows with one scale a head, in plain JAX."""

from typing import Any

import jax
import jax.numpy as jnp

_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def quantize(x: jax.Array, scale: jax.Array, dtype: Any) -> jax.Array:
  """Quantises as `round(x / scale)`, clipped to what `dtype` can hold.

  Rounding is to nearest even. NaN becomes 0 in int8 and stays NaN in float8.

  Args:
    x: `[...]`, floating.
    scale: Broadcasts against `x`.
    dtype: int8, float8_e4m3fn or float8_e5m2.

  Returns:
    `[...]` of `dtype`.

  Example:
    >>> import jax.numpy as jnp
    >>> from kernels import kv_cache
    >>> kv_cache.quantize(jnp.array([0.1, -0.5, 9.0]), 0.01, "int8").tolist()
    [10, -50, 127]
  """
  dtype = jnp.dtype(dtype)
  if dtype.name not in _LARGEST:
    raise ValueError(
      f"`dtype` must be one of {', '.join(_LARGEST)}, but got `{dtype.name}`."
    )
  limit = _LARGEST[dtype.name]
  ratio = x.astype(jnp.float32) / scale
  if dtype.name == "int8":
    ratio = jnp.where(jnp.isnan(ratio), 0.0, jnp.round(ratio))
  return jnp.clip(ratio, -limit, limit).astype(dtype)


def dequantize(x: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns `x * scale` in float32.

  Args:
    x: `[...]`, int8 or float8.
    scale: Broadcasts against `x`.

  Returns:
    `[...]` float32.

  Example:
    >>> import jax.numpy as jnp
    >>> from kernels import kv_cache
    >>> kv_cache.dequantize(jnp.array([2, -3], jnp.int8), 0.5).tolist()
    [1.0, -1.5]
  """
  return x.astype(jnp.float32) * scale


def scale_for(x: jax.Array, dtype: Any, axis: Any = None) -> jax.Array:
  """Returns the scale that lets `dtype` just hold the largest value of `x`.

  Args:
    x: `[...]`, floating: keys or values of a calibration run.
    dtype: int8, float8_e4m3fn or float8_e5m2.
    axis: Axes to take the largest value over; all, if None.

  Returns:
    float32, `x` without `axis`; 1 where `x` is all zero.

  Example:
    >>> import jax.numpy as jnp
    >>> from kernels import kv_cache
    >>> float(kv_cache.scale_for(jnp.array([0.5, -254.0]), "int8"))
    2.0
  """
  dtype = jnp.dtype(dtype)
  if dtype.name not in _LARGEST:
    raise ValueError(
      f"`dtype` must be one of {', '.join(_LARGEST)}, but got `{dtype.name}`."
    )
  largest = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axis)
  return jnp.where(largest > 0, largest / _LARGEST[dtype.name], 1.0)
