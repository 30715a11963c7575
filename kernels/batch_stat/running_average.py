"""The differentiable cores of running averages of batch statistics."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from . import primitive, reference, sharding


class Static(NamedTuple):
  """What the cores are specialised on.

  Attributes:
    feature_axis: Of x.
    accurate: As in `reference.moments`.
    implementation: As of an op.
  """

  feature_axis: int
  accurate: bool
  implementation: str

  @property
  def params(self) -> dict[str, Any]:
    """Returns the parameters of the primitives."""
    return {**self._asdict(), "batch_axes": 0}


def update_over_devices(
  static: Static,
  old: tuple[jax.Array, jax.Array, jax.Array],
  x: jax.Array,
  mask: jax.Array | None,
  axis_name: Any,
  groups: Any,
) -> tuple[jax.Array, ...]:
  """Computes what `update` does for a batch that several devices share.

  Args:
    static: As above.
    old: Momentum, `[1]`, and the running averages, each `[c]`.
    x: This device's part.
    mask: As `checks.check_mask` returns it.
    axis_name: As in `batch_stat.update`.
    groups: As `checks.check_axis_groups` returns them.

  Returns:
    The new averages, and the batch's mean and variance, each `[c]`.
  """
  batch_mean, batch_var, _ = sharding.combine_moments(
    moments(static, x, mask), axis_name, groups
  )
  return reference.blend(*old, batch_mean, batch_var)


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
    static: As above.
    x: As in `batch_stat.update`.
    mask: As `checks.check_mask` returns it.

  Returns:
    mean, var and count, each `[c]`.
  """
  masks = () if mask is None else (mask,)
  return primitive.MOMENTS(x, *masks, **static.params)


@moments.defjvp
def _moments_jvp(static, primals, tangents):
  x, mask = primals
  mean, var, count = moments(static, *primals)
  dmean, dvar = _stat_tangents(static.feature_axis, x, mean, mask, tangents[0])
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
def update(static, old, x, mask):
  """Computes statistics of x and blends them into running averages.

  Args:
    static: As above.
    old: Momentum, `[1]`, and the running averages, each `[c]`.
    x: As in `batch_stat.update`.
    mask: As `checks.check_mask` returns it.

  Returns:
    The new averages, and the batch's mean and variance, each `[c]`.
  """
  momentum, mean, var = old
  masks = () if mask is None else (mask,)
  return primitive.UPDATE(mean, var, momentum, x, *masks, **static.params)


@update.defjvp
def _update_jvp(static, primals, tangents):
  old, x, mask = primals
  out = update(static, *primals)
  batch = tuple(out[2:])
  dbatch = _stat_tangents(static.feature_axis, x, batch[0], mask, tangents[1])
  _, dout = jax.jvp(reference.blend, (*old, *batch), (*tangents[0], *dbatch))
  return out, list(dout)
