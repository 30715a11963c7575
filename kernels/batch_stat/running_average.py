"""Running averages of batch statistics, in one pass over the batch."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import export
import jax.numpy as jnp

from ..common import dispatch, options
from . import checks, ops, reference


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

  Numerics: float32 (float64 for a float64 x). On the CPU one pass loses nothing
    to a large mean: values are shifted by a running estimate of it, and parts
    are merged in float64. The result does not depend on the number of threads.
    XLA's one pass is `E[x^2] - E[x]^2`, which cancels where the mean is large
    beside the deviation; `use_fast_variance=False` does not.
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
  ops.UPDATE.check_implementation(implementation)
  dtype = reference.compute_dtype(x.dtype)
  old_mean, old_var = mean.astype(dtype), var.astype(dtype)
  use_fast_variance = options.boolean("use_fast_variance", use_fast_variance)
  static = (feature_axis, not use_fast_variance, implementation)
  if axis_name is None:
    out = _update(static, old_mean, old_var, momentum, x, mask)
  else:
    own_mean, own_var, count = moments(static, x, mask)
    batch_mean, batch_var, _ = ops.combine_moments(
      own_mean, own_var, count, axis_name, groups
    )
    out = reference.blend(momentum, old_mean, old_var, batch_mean, batch_var)
  return Update(
    out[0].astype(mean.dtype), out[1].astype(var.dtype), out[2], out[3]
  )


@jax.custom_jvp
def blended(
  averages: tuple[jax.Array, jax.Array],
  momentum: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  batch_mean: jax.Array,
  batch_var: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Gives new averages that are there already the derivatives of `blend`.

  Args:
    averages: What `reference.blend` makes of the rest.
    momentum: As in `reference.blend`.
    mean: As in `reference.blend`.
    var: As in `reference.blend`.
    batch_mean: As in `reference.blend`.
    batch_var: As in `reference.blend`.

  Returns:
    The new averages, as they are.
  """
  del momentum, mean, var, batch_mean, batch_var
  return averages


@blended.defjvp
def _blended_jvp(primals, tangents):
  _, dout = jax.jvp(reference.blend, primals[1:], tangents[1:])
  return primals[0], dout[:2]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def moments(static, x, mask):
  """Computes mean, var and count of a device's part, differentiably.

  Args:
    static: (feature axis, accurate, implementation).
    x: As in `update`.
    mask: As `checks.check_mask` returns it.

  Returns:
    mean, var and count, each `[c]`.
  """
  feature_axis, accurate, implementation = static
  masks = () if mask is None else (mask,)
  return ops.MOMENTS(
    x,
    *masks,
    feature_axis=feature_axis,
    batch_axes=0,
    accurate=accurate,
    implementation=implementation,
  )


@moments.defjvp
def _moments_jvp(static, primals, tangents):
  x, mask = primals
  mean, var, count = moments(static, *primals)
  dmean, dvar = _stat_tangents(static[0], x, mean, mask, tangents[0])
  return [mean, var, count], [dmean, dvar, jnp.zeros_like(count)]


def _stat_tangents(feature_axis, x, mean, mask, dx):
  """Returns the tangents of the mean and of the variance."""
  axes = reference.reduced_axes(x.ndim, feature_axis, 0)
  dx = dx.astype(mean.dtype)
  centred = x.astype(mean.dtype) - reference.expand_stat(
    mean, x, feature_axis, 0
  )
  where = None if mask is None else jnp.broadcast_to(mask, x.shape)
  return (
    jnp.mean(dx, axes, where=where),
    2 * jnp.mean(centred * dx, axes, where=where),
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _update(static, mean, var, momentum, x, mask):
  feature_axis, accurate, implementation = static
  masks = () if mask is None else (mask,)
  return ops.UPDATE(
    mean,
    var,
    momentum,
    x,
    *masks,
    feature_axis=feature_axis,
    batch_axes=0,
    accurate=accurate,
    implementation=implementation,
  )


@_update.defjvp
def _update_jvp(static, primals, tangents):
  mean, var, momentum, x, mask = primals
  out = _update(static, *primals)
  batch_mean, batch_var = out[2:]
  dbatch = _stat_tangents(static[0], x, batch_mean, mask, tangents[3])
  _, dout = jax.jvp(
    reference.blend,
    (momentum, mean, var, batch_mean, batch_var),
    (tangents[2], tangents[0], tangents[1], *dbatch),
  )
  return out, list(dout)
