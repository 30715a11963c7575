"""Means and variances, and normalisation by them."""

from __future__ import annotations

import collections.abc
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from nnx.nn import dtypes

Axes = int | Sequence[int]


def canonical_axes(rank: int, axes: Axes) -> tuple[int, ...]:
  """Returns axes as numbers from 0 on, sorted, each once.

  Example:

    >>> from nnx.nn import moments
    >>> moments.canonical_axes(3, (-1, 1, 2))
    (1, 2)

  Args:
    rank: The number of axes of the array.
    axes: One axis or several; negative ones count from the end.
  """
  if isinstance(axes, int):  # the usual case, in each eager call
    return (axes + rank if axes < 0 else axes,)
  if not isinstance(axes, collections.abc.Iterable):
    axes = (axes,)
  return tuple(sorted({axis + rank if axis < 0 else axis for axis in axes}))


def _abs_squared(x: jax.Array) -> jax.Array:
  if jnp.iscomplexobj(x):
    return lax.square(lax.real(x)) + lax.square(lax.imag(x))
  return lax.square(x)


def statistics(
  x: jax.Array,
  axes: Axes,
  dtype: dtypes.Dtype | None = None,
  axis_name: Any = None,
  axis_index_groups: Any = None,
  use_mean: bool = True,
  use_fast_variance: bool = True,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes mean and variance over some axes.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn.normalization import statistics
    >>> statistics(jnp.array([[1.0, 3.0]]), -1)
    (Array([2.], dtype=float32), Array([1.], dtype=float32))

  Args:
    x: `[...]`, floating or complex.
    axes: The axes to reduce.
    dtype: The dtype to compute in, if wider than float32; that of x, if None.
    axis_name: A mapped axis to reduce as well.
    axis_index_groups: Groups of indices along `axis_name` that are reduced
      separately.
    use_mean: Whether to take the variance about the mean; otherwise the mean is
      taken to be 0.
    use_fast_variance: Whether to compute the variance as `E[x^2] - E[x]^2`, at
      least 0. That takes one pass over x, but cancels for large means.
    mask: Broadcasts to x; False positions do not count.

  Returns:
    Mean and variance, with the axes that remain.
  """
  dtype = jnp.promote_types(
    jnp.result_type(x) if dtype is None else dtype, jnp.float32
  )
  x = jnp.asarray(x, dtype)
  axes = canonical_axes(x.ndim, axes)

  def means(*arrays):
    if axis_name is None or mask is None:
      result = tuple(jnp.mean(array, axes, where=mask) for array in arrays)
      if axis_name is None:
        return result
      return lax.pmean(result, axis_name, axis_index_groups=axis_index_groups)
    # Members of the axis may keep different numbers of values.
    sums = [jnp.sum(array, axes, where=mask) for array in arrays]
    kept = jnp.broadcast_to(mask, x.shape)
    sums.append(jnp.sum(kept, axes, dtype=sums[-1].dtype))
    *sums, count = lax.psum(
      sums, axis_name, axis_index_groups=axis_index_groups
    )
    return tuple(sum_ / count for sum_ in sums)

  if not use_mean:
    (var,) = means(_abs_squared(x))
    return jnp.zeros_like(var), var
  if use_fast_variance:
    mean, squares = means(x, _abs_squared(x))
    # Rounding may bring the difference below 0.
    return mean, jnp.maximum(0.0, squares - _abs_squared(mean))
  (mean,) = means(x)
  (var,) = means(_abs_squared(x - jnp.expand_dims(mean, axes)))
  return mean, var


def normalize(
  x: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array | None,
  bias: jax.Array | None,
  reduction_axes: Axes,
  feature_axes: Axes,
  dtype: dtypes.Dtype | None,
  epsilon: float,
) -> jax.Array:
  """Computes `(x - mean) / sqrt(var + epsilon) * scale + bias`.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn.normalization import normalize
    >>> x, mean, var = jnp.array([[1.0, 3.0]]), jnp.array([2.0]), jnp.ones(1)
    >>> normalize(x, mean, var, None, jnp.ones(2), -1, -1, None, 0.0)
    Array([[0., 2.]], dtype=float32)

  Args:
    x: `[...]`.
    mean: The shape of x without `reduction_axes`.
    var: The same.
    scale: As many elements as `feature_axes` have, or None.
    bias: The same.
    reduction_axes: The axes that mean and variance lack.
    feature_axes: The axes that scale and bias have.
    dtype: The dtype of the result; the common one of x, scale and bias, if
      None.
    epsilon: Added to the variance.

  Returns:
    An array of the shape of x.
  """
  reduction_axes = canonical_axes(x.ndim, reduction_axes)
  feature_axes = canonical_axes(x.ndim, feature_axes)
  stat_shape = [
    1 if axis in reduction_axes else size for axis, size in enumerate(x.shape)
  ]
  feature_shape = [
    size if axis in feature_axes else 1 for axis, size in enumerate(x.shape)
  ]
  factor = lax.rsqrt(jnp.reshape(var, stat_shape) + epsilon)
  if scale is not None:
    factor = factor * jnp.reshape(scale, feature_shape)
  y = (x - jnp.reshape(mean, stat_shape)) * factor
  if bias is not None:
    y = y + jnp.reshape(bias, feature_shape)
  dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=dtype)
  return jnp.asarray(y, dtype)
