"""Batch normalisation: running averages, training and inference."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax import export
import jax.numpy as jnp

from ..common import arrays, dispatch, options
from . import (
  checks,
  normalization,
  primitive,
  reference,
  running_average,
  sharding,
)


class Update(NamedTuple):
  """Result of `update`; the running averages first, so that donation pairs.

  Attributes:
    mean: `[c]`, the new running average of the mean.
    var: `[c]`, the new running average of the variance.
    batch_mean: `[c]`, mean of this batch.
    batch_var: `[c]`, biased variance of this batch.
  """

  mean: jax.Array
  var: jax.Array
  batch_mean: jax.Array
  batch_var: jax.Array


export.register_namedtuple_serialization(
  Update, serialized_name="fused_nnx.kernels.batch_stat.Update"
)


class BatchNorm(NamedTuple):
  """Result of `batch_norm`; the running averages first, so donation pairs.

  Attributes:
    mean: `[c]`, the new running average of the mean.
    var: `[c]`, the new running average of the variance.
    y: The normalised x.
    batch_mean: `[c]`, the mean that x was normalised with.
    batch_var: `[c]`, the biased variance that x was normalised with.
  """

  mean: jax.Array
  var: jax.Array
  y: jax.Array
  batch_mean: jax.Array
  batch_var: jax.Array


export.register_namedtuple_serialization(
  BatchNorm, serialized_name="fused_nnx.kernels.batch_stat.BatchNorm"
)


def update(
  x: Any,
  mean: Any,
  var: Any,
  momentum: Any = 0.99,
  *,
  feature_axis: int = -1,
  mask: Any = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  use_fast_variance: bool = True,
  implementation: str = dispatch.AUTO,
) -> Update:
  """Computes batch statistics and blends them into running averages.

  Equivalent to

      axes = every axis of x but feature_axis
      batch_mean = jnp.mean(x, axes, where=mask)
      batch_var = jnp.var(x, axes, where=mask)
      mean = momentum * mean + (1 - momentum) * batch_mean
      var = momentum * var + (1 - momentum) * batch_var

  Args:
    x: `[..., c, ...]`, float64, float32, bfloat16 or float16; other floating
      dtypes go through XLA. Under `jit` it may be sharded along any axis.
    mean: `[c]`, floating, the running average of the mean.
    var: `[c]`, floating, the running average of the variance.
    momentum: A number in `[0, 1]` or a scalar array, weight of the old average.
    feature_axis: The axis of x that is not reduced.
    mask: Broadcasts to x's shape; only nonzero positions count.
    axis_name: Mesh axes of `shard_map`, or a vmap axis, whose members each hold
      a part of one batch. Each value counts the same, wherever it is.
    axis_index_groups: As in `jax.lax.psum`: only members of a group share.
    use_fast_variance: Whether one pass over x may do for the variance. False
      takes it in a second pass, about the mean.
    implementation: "auto", or by name: "xla", "cpu", "cuda" or "pallas".

  Returns:
    The new averages, in their own dtypes, and the batch's statistics, in
    float32 or, for a float64 x, float64.

  Raises:
    TypeError: If an array is not floating.
    ValueError: If shapes do not match, a number is out of range, or x has no
      value for a feature. Where a mask keeps no value of a feature, its
      statistics are NaN, as in `jnp.mean`.

  Not finite: The mean and the variance of a feature are infinite or NaN if a
    value of it that counts is. Which of the two the mean is depends on the
    order of summation. Other features are as they would be without it.
  Numerics: float32 (float64 for a float64 x). On the CPU one pass loses nothing
    to a large mean: values are shifted by a running estimate of it, and parts
    are merged in float64. The result does not depend on the number of threads.
    XLA's one pass is `E[x^2] - E[x]^2`, which cancels where the mean is large
    compared with the deviation; `use_fast_variance=False` does not.
  Aliasing: `mean` and `var` are updated in place if they are donated, or
    carried through a loop, and have the dtype of the statistics.
  Batching: `jax.vmap` makes one call with one more axis.
  Differentiation: forward and reverse, for x, mean, var and momentum.

  Example:
    >>> import jax.numpy as jnp
    >>> from kernels import batch_stat
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> out = batch_stat.update(x, jnp.zeros(2), jnp.ones(2), momentum=0.5)
    >>> out.mean.tolist(), out.var.tolist()
    ([1.0, 10.0], [1.0, 50.5])
    >>> out.batch_var.tolist()
    [1.0, 100.0]
  """
  x = options.array("x", x)
  feature_axis = checks.canonical_feature_axis(x, feature_axis)
  checks.check_not_empty(x, feature_axis)
  mean = checks.check_stat(mean, "mean", x, feature_axis)
  var = checks.check_stat(var, "var", x, feature_axis)
  momentum = checks.check_momentum(momentum, x)
  mask = checks.check_mask(mask, x, feature_axis)
  groups = checks.check_axis_groups(axis_name, axis_index_groups)
  primitive.UPDATE.check_implementation(implementation)
  dtype = reference.compute_dtype(x.dtype)
  old_mean, old_var = mean.astype(dtype), var.astype(dtype)
  use_fast_variance = options.boolean("use_fast_variance", use_fast_variance)
  static = running_average.Static(
    feature_axis, not use_fast_variance, implementation
  )
  old = (momentum, old_mean, old_var)
  if axis_name is None:
    out = running_average.update(static, old, x, mask)
  else:
    out = running_average.update_over_devices(
      static, old, x, mask, axis_name, groups
    )
  return Update(
    out[0].astype(mean.dtype), out[1].astype(var.dtype), out[2], out[3]
  )


def batch_norm(
  x: Any,
  scale: Any,
  bias: Any,
  mean: Any,
  var: Any,
  momentum: Any = 0.99,
  *,
  epsilon: float = 1e-5,
  feature_axis: int = -1,
  mask: Any = None,
  axis_name: Any = None,
  axis_index_groups: Sequence[Sequence[int]] | None = None,
  use_fast_variance: bool = True,
  activation: str | None = None,
  dtype: Any = None,
  use_running_average: bool = False,
  implementation: str = dispatch.AUTO,
) -> BatchNorm:
  """Normalises x with its own statistics, and keeps running averages of them.

  Equivalent to

      out = update(x, mean, var, momentum, ...)
      y = (x - out.batch_mean) / jnp.sqrt(out.batch_var + epsilon)
      y = activation(y * scale + bias).astype(dtype)

  or, with `use_running_average`, to the last two lines with `mean` and `var` in
  place of the batch's.

  Args:
    x: `[..., c, ...]`, float64, float32, bfloat16 or float16; other floating
      dtypes go through XLA. Under `jit` it may be sharded along any axis.
    scale: `[c]`, floating, or None for 1.
    bias: `[c]`, floating, or None for 0.
    mean: `[c]`, floating, the running average of the mean.
    var: `[c]`, floating, the running average of the variance.
    momentum: A number in `[0, 1]` or a scalar array, weight of the old average.
    epsilon: Added to the variance.
    feature_axis: The axis of x that is not reduced.
    mask: Broadcasts to x's shape; only nonzero positions make the statistics.
      All positions are normalised.
    axis_name: Mesh axes of `shard_map`, or a vmap axis, whose members each hold
      a part of one batch. Each value counts the same, wherever it is.
    axis_index_groups: As in `jax.lax.psum`: only members of a group share.
    use_fast_variance: Whether one pass over x may do for the variance. False
      takes it in a second pass, about the mean.
    activation: None, or "relu" to apply it to y in the same pass.
    dtype: Of y. x's, if None; the arithmetic is in the statistics' dtype
      anyway.
    use_running_average: Whether to normalise with `mean` and `var`, and leave
      them as they are (inference).
    implementation: "auto", or by name: "xla", "cpu" or "cuda".

  Returns:
    The new averages, in their own dtypes, y, and the statistics that made it.

  Raises:
    TypeError: If an array is not floating.
    ValueError: If shapes do not match, an argument is out of range, or, unless
      `use_running_average`, x has no value for a feature.

  Numerics: as in `update`; y and the gradients are computed in the statistics'
    dtype and rounded once.
  Aliasing: `mean` and `var` are updated in place if they are donated and have
    the dtype of the statistics. y is a new array.
  Batching: `jax.vmap` makes the same calls with one more axis.
  Differentiation: reverse mode for x, scale and bias, and through all results,
    in two passes over x and y's gradient; x is all that is kept for it. With
    relu, the gate is found again from x. Derivatives of derivatives go through
    XLA. There is no forward mode.

  Example:
    >>> import jax.numpy as jnp
    >>> from kernels import batch_stat
    >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
    >>> zeros, ones = jnp.zeros(2), jnp.ones(2)
    >>> out = batch_stat.batch_norm(x, ones, zeros, zeros, ones, 0.5)
    >>> print(out.y.round())
    [[-1. -1.]
     [ 1.  1.]]
    >>> print(out.mean)
    [ 1. 10.]
    >>> out = batch_stat.batch_norm(
    ...   x, ones, zeros, zeros, ones, use_running_average=True
    ... )
    >>> print(out.y.round())
    [[ 1. 10.]
     [ 3. 30.]]
  """
  x = options.array("x", x)
  use_running_average = options.boolean(
    "use_running_average", use_running_average
  )
  feature_axis = checks.canonical_feature_axis(x, feature_axis)
  stat_dtype = reference.compute_dtype(x.dtype)
  mean = checks.check_stat(mean, "mean", x, feature_axis)
  var = checks.check_stat(var, "var", x, feature_axis)
  scale, bias = (
    jnp.full((x.shape[feature_axis],), fill, stat_dtype)
    if stat is None
    else checks.check_stat(stat, name, x, feature_axis)
    for stat, name, fill in ((scale, "scale", 1), (bias, "bias", 0))
  )
  mask = checks.check_mask(mask, x, feature_axis)
  groups = checks.check_axis_groups(axis_name, axis_index_groups)
  static = normalization.Static(
    feature_axis=feature_axis,
    accurate=not options.boolean("use_fast_variance", use_fast_variance),
    relu=checks.check_activation(activation),
    dtype=checks.check_result_dtype(dtype, x),
    epsilon=checks.check_epsilon(epsilon),
    axis_name=axis_name,
    groups=groups,
    implementation=implementation,
  )
  primitive.NORMALIZE.check_implementation(implementation)
  old_mean, old_var = mean.astype(stat_dtype), var.astype(stat_dtype)
  scale, bias, old_mean, old_var = sharding.follow_channels(
    x,
    feature_axis,
    scale.astype(stat_dtype),
    bias.astype(stat_dtype),
    old_mean,
    old_var,
  )
  scale, bias = arrays.vary_like(x, scale, bias)
  if use_running_average:
    centre, spread = arrays.vary_like(x, old_mean, old_var)
    y: Any = normalization.apply(static, x, centre, spread, scale, bias)
    return BatchNorm(mean, var, y, old_mean, old_var)
  checks.check_not_empty(x, feature_axis)
  old = (checks.check_momentum(momentum, x), old_mean, old_var)
  results: Any = normalization.train(static, x, scale, bias, mask, old)
  y, batch_mean, batch_var, new = results
  new_mean, new_var = running_average.blended(new, *old, batch_mean, batch_var)
  return BatchNorm(
    new_mean.astype(mean.dtype),
    new_var.astype(var.dtype),
    y,
    batch_mean,
    batch_var,
  )
