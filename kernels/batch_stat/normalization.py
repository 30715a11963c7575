"""The differentiable cores of batch normalisation."""

import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from ..common import arrays
from . import primitive, reference, sharding


class Static(NamedTuple):
  """What the cores are specialised on; see `batch_stat.batch_norm`."""

  feature_axis: int
  accurate: bool
  relu: bool
  dtype: Any
  epsilon: float
  axis_name: Any
  groups: Any
  implementation: str

  @property
  def axes(self) -> dict[str, int]:
    """Returns the parameters that say which axes of x are which."""
    return {"feature_axis": self.feature_axis, "batch_axes": 0}

  @property
  def gate(self) -> dict[str, Any]:
    """Returns the parameters of what normalises, and of its gradient."""
    return {
      **self.axes,
      "relu": self.relu,
      "implementation": self.implementation,
    }


def _normalize(static, x, mean, mul, bias):
  return primitive.NORMALIZE(
    x, mean, mul, bias, dtype=static.dtype, **static.gate
  )[0]


# ---- With given statistics: y = (x - mean) * mul + bias.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply(static, x, mean, var, scale, bias):
  """Normalises x with given statistics.

  Args:
    static: As above.
    x: The batch.
    mean: `[c]`.
    var: `[c]`.
    scale: `[c]`.
    bias: `[c]`.

  Returns:
    y.
  """
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
  dbias, dscale, dmean, twice_dvar = primitive.GRAD_SUMS(
    x, dy, mean, mul, bias, rstd, none, **static.gate
  )
  (dx,) = primitive.GRAD_INPUT(
    x, dy, mean, mul, bias, none, none, **static.gate
  )
  return dx, dmean, 0.5 * twice_dvar, dscale, dbias


apply.defvjp(_apply_fwd, _apply_bwd)


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
  tracked = names & arrays.varying_axes(jax.typeof(x))
  if tracked and not names & arrays.varying_axes(jax.typeof(direct)):
    return total(through_y) + direct
  return total(both)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def train(static, x, scale, bias, mask, old):
  """Normalises x, and blends its statistics into running averages.

  Args:
    static: As above.
    x: The batch.
    scale: `[c]`.
    bias: `[c]`.
    mask: Of x, or None.
    old: Momentum, `[1]`, and the running averages, each `[c]`.

  Returns:
    y, the batch's mean and variance, and the new averages. The latter have no
    derivatives here: `running_average.blended` has them.
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
    *new, mean, var, count, rstd, mul = primitive.TRAIN(
      *averages, momentum, scale, x, *masks, epsilon=static.epsilon, **options
    )
    centre = mean
  else:
    mean, var, count = sharding.combine_moments(
      primitive.MOMENTS(x, *masks, **options), static.axis_name, static.groups
    )
    old_mean, old_var = averages
    *new, _, _ = reference.blend(momentum, old_mean, old_var, mean, var)
    # Statistics that all devices share still meet an x that they do not.
    centre, spread = arrays.vary_like(x, mean, var)
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
    (dy,) = arrays.vary_like(x, jnp.zeros_like(x, static.dtype))
  dbias, dscale, c0, c1 = primitive.GRAD_SUMS(
    x, dy, mean, mul, bias, rstd, count, **static.gate
  )
  values = jnp.maximum(count, 1)
  # Zeros that are not known to be some would be added by XLA.
  direct0 = None if _is_zero(dmean) else dmean / values
  direct1 = None if _is_zero(dvar) else 2 * dvar / values
  c0 = _over_devices(static, x, c0, direct0)
  c1 = _over_devices(static, x, c1, direct1)
  c0, c1 = arrays.vary_like(x, c0, c1)
  masks = () if mask is None else (mask,)
  (dx,) = primitive.GRAD_INPUT(
    x, dy, mean, mul, bias, c0, c1, *masks, **static.gate
  )
  return dx, dscale, dbias, None, None


train.defvjp(_train_fwd, _train_bwd, symbolic_zeros=True)
