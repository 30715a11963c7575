"""Batch normalisation in training and in inference mode."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import export, lax
import jax.numpy as jnp

from ..common import dispatch, options
from . import checks, ops, reference, running_average


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


class _Static(NamedTuple):
  """What the differentiable core is specialised on."""

  feature_axis: int
  accurate: bool
  relu: bool
  dtype: Any
  epsilon: float
  axis_name: Any
  groups: Any
  implementation: str

  @property
  def axes(self):
    return {"feature_axis": self.feature_axis, "batch_axes": 0}

  @property
  def gate(self):
    return {
      **self.axes,
      "relu": self.relu,
      "implementation": self.implementation,
    }


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
    XLA. Forward mode is not there.

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
  static = _Static(
    feature_axis=feature_axis,
    accurate=not options.boolean("use_fast_variance", use_fast_variance),
    relu=checks.check_activation(activation),
    dtype=checks.check_result_dtype(dtype, x),
    epsilon=checks.check_epsilon(epsilon),
    axis_name=axis_name,
    groups=groups,
    implementation=implementation,
  )
  ops.NORMALIZE.check_implementation(implementation)
  old_mean, old_var = mean.astype(stat_dtype), var.astype(stat_dtype)
  scale, bias = dispatch.vary_like(
    x, scale.astype(stat_dtype), bias.astype(stat_dtype)
  )
  if use_running_average:
    centre, spread = dispatch.vary_like(x, old_mean, old_var)
    y = _apply(static, x, centre, spread, scale, bias)
    return BatchNorm(mean, var, y, old_mean, old_var)
  checks.check_not_empty(x, feature_axis)
  old = (checks.check_momentum(momentum, x), old_mean, old_var)
  y, batch_mean, batch_var, new = _train(static, x, scale, bias, mask, old)
  new_mean, new_var = running_average.blended(new, *old, batch_mean, batch_var)
  return BatchNorm(
    new_mean.astype(mean.dtype),
    new_var.astype(var.dtype),
    y,
    batch_mean,
    batch_var,
  )


def _normalize(static, x, mean, mul, bias):
  return ops.NORMALIZE(x, mean, mul, bias, dtype=static.dtype, **static.gate)[0]


# ---- With given statistics: y = (x - mean) * mul + bias.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(static, x, mean, var, scale, bias):
  return _apply_fwd(static, x, mean, var, scale, bias)[0]


def _apply_fwd(static, x, mean, var, scale, bias):
  rstd, mul = reference.factors(var, scale, static.epsilon)
  y = _normalize(static, x, mean, mul, bias)
  return y, (x, mean, mul, bias, rstd)


def _apply_bwd(static, kept, dy):
  x, mean, mul, bias, rstd = kept
  none = jnp.zeros_like(mul)
  # A count of 0 is taken for 1, which leaves the gradients of the mean and,
  # twice, of the variance.
  dbias, dscale, dmean, twice_dvar = ops.GRAD_SUMS(
    x, dy, mean, mul, bias, rstd, none, **static.gate
  )
  (dx,) = ops.GRAD_INPUT(x, dy, mean, mul, bias, none, none, **static.gate)
  return dx, dmean, 0.5 * twice_dvar, dscale, dbias


_apply.defvjp(_apply_fwd, _apply_bwd)


# ---- With the batch's own statistics.


def _is_zero(cotangent):
  """Returns whether nothing depends on a result."""
  return isinstance(cotangent, jax.custom_derivatives.SymbolicZero)


def _over_devices(static, x, through_y, direct):
  """Sums the cotangents of a statistic over the devices that share it.

  Where `shard_map` keeps track of what varies, the direct cotangent of a result
  that all devices share is the sum already. This is written out, and not left
  to differentiation, because JAX cannot trace a psum in the backward function
  of a `custom_vjp` inside a vmap; nor run one there on a constant.

  Args:
    static: Of the core.
    x: The batch.
    through_y: `[c]`, this device's cotangent by way of y.
    direct: `[c]`, the cotangent of the statistic as a result; None is 0.

  Returns:
    `[c]`, the cotangent of the statistic.
  """
  both = through_y if direct is None else through_y + direct
  if static.axis_name is None:
    return both
  names = static.axis_name
  names = set(names if isinstance(names, (tuple, list)) else (names,))
  total = functools.partial(
    lax.psum, axis_name=static.axis_name, axis_index_groups=static.groups
  )
  if direct is None:
    return total(both)
  tracked = names & dispatch.varying_axes(jax.typeof(x))
  if tracked and not names & dispatch.varying_axes(jax.typeof(direct)):
    return total(through_y) + direct
  return total(both)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _train(static, x, scale, bias, mask, old):
  """Normalises x, and blends its statistics into running averages.

  Args:
    static: As above.
    x: The batch.
    scale: `[c]`.
    bias: `[c]`.
    mask: Of x, or None.
    old: Momentum, `[1]`, and the running averages, each `[c]`.

  Returns:
    y, the batch's mean and variance, and the new averages. Derivatives of the
    latter are not there: `running_average.blended` has them.
  """
  return _train_and_keep(static, x, scale, bias, mask, old)[0]


def _train_and_keep(static, x, scale, bias, mask, old):
  masks = () if mask is None else (mask,)
  options = {
    "accurate": static.accurate,
    "implementation": static.implementation,
    **static.axes,
  }
  momentum, *averages = old
  if static.axis_name is None:
    *new, mean, var, count, rstd, mul = ops.TRAIN(
      *averages, momentum, scale, x, *masks, epsilon=static.epsilon, **options
    )
    centre = mean
  else:
    mean, var, count = ops.combine_moments(
      *ops.MOMENTS(x, *masks, **options), static.axis_name, static.groups
    )
    *new, _, _ = reference.blend(momentum, *averages, mean, var)
    # Statistics that all devices share still meet an x that they do not.
    centre, spread = dispatch.vary_like(x, mean, var)
    rstd, mul = reference.factors(spread, scale, static.epsilon)
  y = _normalize(static, x, centre, mul, bias)
  return (y, mean, var, tuple(new)), (x, bias, mask, centre, rstd, mul, count)


def _train_fwd(static, *args):
  args = jax.custom_derivatives.custom_vjp_primal_tree_values(args)
  return _train_and_keep(static, *args)


def _train_bwd(static, kept, grads):
  x, bias, mask, mean, rstd, mul, count = kept
  dy, dmean, dvar, _ = grads
  if _is_zero(dy):
    (dy,) = dispatch.vary_like(x, jnp.zeros_like(x, static.dtype))
  dbias, dscale, c0, c1 = ops.GRAD_SUMS(
    x, dy, mean, mul, bias, rstd, count, **static.gate
  )
  values = jnp.maximum(count, 1)
  # Zeros that are not known to be some would be added by XLA.
  direct0 = None if _is_zero(dmean) else dmean / values
  direct1 = None if _is_zero(dvar) else 2 * dvar / values
  c0 = _over_devices(static, x, c0, direct0)
  c1 = _over_devices(static, x, c1, direct1)
  c0, c1 = dispatch.vary_like(x, c0, c1)
  masks = () if mask is None else (mask,)
  (dx,) = ops.GRAD_INPUT(x, dy, mean, mul, bias, c0, c1, *masks, **static.gate)
  return dx, dscale, dbias, None, None


_train.defvjp(_train_fwd, _train_bwd, symbolic_zeros=True)
