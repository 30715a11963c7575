"""The plain JAX form of the batch-norm ops, which every platform can run.

Throughout, `x` is `[batch axes..., ..., c, ...]`: `batch_axes` leading axes
that are independent batches, and the feature axis c at `feature_axis`.
Statistics are `[batch axes..., c]`, float32, or float64 for a float64 `x`.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp


def compute_dtype(dtype: Any) -> Any:
  """Returns the dtype that statistics of a `dtype` array have."""
  return jnp.float64 if dtype == jnp.float64 else jnp.float32


def stat_shape(x: Any, feature_axis: int, batch_axes: int) -> tuple[Any, ...]:
  """Returns the shape of a statistic of x."""
  return (*x.shape[:batch_axes], x.shape[feature_axis])


def reduced_axes(
  rank: int, feature_axis: int, batch_axes: int
) -> tuple[int, ...]:
  """Returns the axes of x that statistics are reduced over."""
  return tuple(i for i in range(batch_axes, rank) if i != feature_axis)


def expand_stat(
  stat: jax.Array, x: Any, feature_axis: int, batch_axes: int
) -> jax.Array:
  """Gives a statistic the rank of x, so that it broadcasts against it."""
  return jnp.expand_dims(stat, reduced_axes(x.ndim, feature_axis, batch_axes))


def moments(
  x: jax.Array,
  mask: jax.Array | None = None,
  *,
  feature_axis: int,
  batch_axes: int,
  accurate: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes mean, biased variance and count of each feature.

  Args:
    x: `[..., c, ...]`, floating.
    mask: Bool, like x or with 1 in place of c; only True positions count.
    feature_axis: The axis of c.
    batch_axes: Number of leading axes that are independent batches.
    accurate: Whether to take the variance in a second pass, about the mean.
      Otherwise it is `E[x^2] - E[x]^2`, which XLA computes in one pass, and
      which cancels where the mean is large compared with the deviation.

  Returns:
    mean, var and count, each `[c]`.
  """
  dtype = compute_dtype(x.dtype)
  axes = reduced_axes(x.ndim, feature_axis, batch_axes)
  values = x.astype(dtype)
  if mask is not None:
    mask = jnp.broadcast_to(mask, x.shape)

  def mean_of(array):
    return jnp.mean(array, axis=axes, where=mask)

  if mask is None:
    size = 1
    for axis in axes:
      size = size * x.shape[axis]
    shape = stat_shape(x, feature_axis, batch_axes)
    count = jnp.full(shape, size, dtype)
  else:
    count = jnp.sum(mask, axis=axes, dtype=dtype)
  mean = mean_of(values)
  if accurate:
    centre = expand_stat(mean, x, feature_axis, batch_axes)
    return mean, mean_of(lax.square(values - centre)), count
  var = mean_of(lax.square(values)) - lax.square(mean)
  return mean, jnp.maximum(var, 0), count


def blend(
  momentum: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  batch_mean: jax.Array,
  batch_var: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Blends a batch's statistics into running averages, all `[c]`.

  Args:
    momentum: `[1]`, weight of the old averages.
    mean: Running average of the mean.
    var: Running average of the variance.
    batch_mean: The batch's.
    batch_var: The batch's.

  Returns:
    The new averages, and the batch's statistics as they are.
  """
  return (
    momentum * mean + (1 - momentum) * batch_mean,
    momentum * var + (1 - momentum) * batch_var,
    batch_mean,
    batch_var,
  )


def factors(
  var: jax.Array, scale: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array]:
  """Returns `1 / sqrt(var + epsilon)`, and scale times it, all `[c]`."""
  rstd = lax.rsqrt(var + epsilon)
  return rstd, scale * rstd


def update(
  mean: jax.Array,
  var: jax.Array,
  momentum: jax.Array,
  x: jax.Array,
  mask: jax.Array | None = None,
  *,
  feature_axis: int,
  batch_axes: int,
  accurate: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Computes statistics of x and blends them into running averages.

  Args:
    mean: `[c]`, running average of the mean.
    var: `[c]`, running average of the variance.
    momentum: `[1]`, weight of the old averages.
    x: As in `moments`.
    mask: As in `moments`.
    feature_axis: As in `moments`.
    batch_axes: As in `moments`.
    accurate: As in `moments`.

  Returns:
    The new averages of mean and var, and x's own mean and var, each `[c]`.
  """
  batch_mean, batch_var, _ = moments(
    x,
    mask,
    feature_axis=feature_axis,
    batch_axes=batch_axes,
    accurate=accurate,
  )
  return blend(momentum, mean, var, batch_mean, batch_var)


def train(
  mean: jax.Array,
  var: jax.Array,
  momentum: jax.Array,
  scale: jax.Array,
  x: jax.Array,
  mask: jax.Array | None = None,
  *,
  feature_axis: int,
  batch_axes: int,
  accurate: bool,
  epsilon: float,
) -> tuple[jax.Array, ...]:
  """Computes all that `batch_norm` wants of x before it normalises it.

  Args:
    mean: As in `update`.
    var: As in `update`.
    momentum: As in `update`.
    scale: `[c]`.
    x: As in `moments`.
    mask: As in `moments`.
    feature_axis: As in `moments`.
    batch_axes: As in `moments`.
    accurate: As in `moments`.
    epsilon: Added to the variance.

  Returns:
    What `update` returns, the count of `moments`, and `factors`, each `[c]`.
  """
  *own, count = moments(
    x,
    mask,
    feature_axis=feature_axis,
    batch_axes=batch_axes,
    accurate=accurate,
  )
  return (
    *blend(momentum, mean, var, *own),
    count,
    *factors(own[1], scale, epsilon),
  )


def normalize(
  x: jax.Array,
  mean: jax.Array,
  mul: jax.Array,
  bias: jax.Array,
  *,
  feature_axis: int,
  batch_axes: int,
  relu: bool,
  dtype: Any,
) -> tuple[jax.Array]:
  """Computes `(x - mean) * mul + bias`, and its positive part for `relu`.

  Args:
    x: As in `moments`.
    mean: `[c]`.
    mul: `[c]`.
    bias: `[c]`.
    feature_axis: As in `moments`.
    batch_axes: As in `moments`.
    relu: Whether to apply relu.
    dtype: Of the result.

  Returns:
    A tuple of one array of x's shape.
  """
  out = _affine(x, mean, mul, bias, feature_axis, batch_axes)
  if relu:
    out = jnp.maximum(out, 0)
  return (out.astype(dtype),)


def grad_sums(
  x: jax.Array,
  dy: jax.Array,
  mean: jax.Array,
  mul: jax.Array,
  bias: jax.Array,
  rstd: jax.Array,
  count: jax.Array,
  *,
  feature_axis: int,
  batch_axes: int,
  relu: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Sums what the gradient of `normalize` needs from the whole batch.

  Args:
    x: As in `normalize`.
    dy: Gradient for the result of `normalize`, of x's shape.
    mean: As in `normalize`.
    mul: As in `normalize`.
    bias: As in `normalize`.
    rstd: `[c]`, with which scale made mul.
    count: `[c]`, of the values that made mean and rstd; 0 is taken for 1.
    feature_axis: As in `normalize`.
    batch_axes: As in `normalize`.
    relu: As in `normalize`.

  Returns:
    The gradients of bias and of scale, and the c0 and c1 of `grad_input` that
    come from them, each `[c]`.
  """
  axes = reduced_axes(x.ndim, feature_axis, batch_axes)
  dy = _gated(x, dy, mean, mul, bias, feature_axis, batch_axes, relu)
  centred = x.astype(mean.dtype) - expand_stat(
    mean, x, feature_axis, batch_axes
  )
  sum_dy = jnp.sum(dy, axis=axes)
  dscale = jnp.sum(dy * centred, axis=axes) * rstd
  share = -mul / jnp.maximum(count, 1)
  return sum_dy, dscale, share * sum_dy, share * rstd * dscale


def grad_input(
  x: jax.Array,
  dy: jax.Array,
  mean: jax.Array,
  mul: jax.Array,
  bias: jax.Array,
  c0: jax.Array,
  c1: jax.Array,
  mask: jax.Array | None = None,
  *,
  feature_axis: int,
  batch_axes: int,
  relu: bool,
) -> tuple[jax.Array]:
  """Computes `mul * dy + c0 + c1 * (x - mean)`.

  Args:
    x: As in `grad_sums`.
    dy: As in `grad_sums`.
    mean: As in `grad_sums`.
    mul: As in `grad_sums`.
    bias: As in `grad_sums`.
    c0: `[c]`, the gradient that every position gets through the mean.
    c1: `[c]`, the same through the variance, for each unit of x - mean.
    mask: As in `moments`; False positions do not get those two.
    feature_axis: As in `grad_sums`.
    batch_axes: As in `grad_sums`.
    relu: As in `grad_sums`.

  Returns:
    A tuple of one array of x's shape and dtype.
  """

  def expand(stat):
    return expand_stat(stat, x, feature_axis, batch_axes)

  dy = _gated(x, dy, mean, mul, bias, feature_axis, batch_axes, relu)
  centred = x.astype(mean.dtype) - expand(mean)
  through_stats = expand(c0) + expand(c1) * centred
  if mask is not None:
    through_stats = jnp.where(mask, through_stats, 0)
  return ((expand(mul) * dy + through_stats).astype(x.dtype),)


def _affine(x, mean, mul, bias, feature_axis, batch_axes):
  mean, mul, bias = (
    expand_stat(stat, x, feature_axis, batch_axes) for stat in (mean, mul, bias)
  )
  return (x.astype(mean.dtype) - mean) * mul + bias


def _gated(x, dy, mean, mul, bias, feature_axis, batch_axes, relu):
  """Returns dy in the statistics' dtype, 0 where relu closed the gate."""
  dy = dy.astype(mean.dtype)
  if relu:
    out = _affine(x, mean, mul, bias, feature_axis, batch_axes)
    dy = jnp.where(out > 0, dy, 0)
  return dy
