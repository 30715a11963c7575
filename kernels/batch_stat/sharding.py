"""How the ops of batch_stat are split over devices.

x may be split along any axis; the statistics follow the batch and feature axes,
and sums over the others cross devices.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from ..common import arrays, dispatch, jax_private
from . import reference, signatures
from .signatures import Kind


def partitioning(
  signature: signatures.Signature,
  combine: Callable[..., Sequence[jax.Array]] | None = None,
) -> dispatch.Partitioning:
  """Returns how an op is split along the axes of x.

  Args:
    signature: Of the op.
    combine: `combine(call, args, axis_names, **params)` joins the parts'
      results over the mesh axes that split what is reduced; None if nothing is.
  """
  return dispatch.Partitioning(
    rule=functools.partial(_rule, signature),
    partition=functools.partial(_partition, signature, combine),
  )


def follow_channels(x: Any, feature_axis: int, *vectors: Any) -> list[Any]:
  """Splits `[c]` as the channels of x are, on a mesh with explicit axes.

  There a gradient must be split as its argument, and those of the channels come
  as x is. Elsewhere this does nothing.

  Args:
    x: The array to follow.
    feature_axis: That of its channels.
    *vectors: Each `[c]`.
  """
  mesh = jax_private.explicit_mesh([jax.typeof(x)])
  if mesh is None:
    return list(vectors)
  spec = PartitionSpec(jax.typeof(x).sharding.spec[feature_axis])
  channels = NamedSharding(mesh, spec)
  return [jax.sharding.reshard(vector, channels) for vector in vectors]


def _rule(signature, avals, *, feature_axis, batch_axes, **params):
  """Writes the Shardy rule of an op."""
  del params
  operands = signature.named(avals)
  x = operands["x"]
  names = [f"i{axis}" for axis in range(x.ndim)]
  mask = list(names)
  if "mask" in operands:
    if operands["mask"].shape[feature_axis] != x.shape[feature_axis]:
      mask[feature_axis] = "one"
  batch = names[:batch_axes]
  factors = {
    Kind.BATCH: names,
    Kind.STATISTIC: [*batch, names[feature_axis]],
    Kind.MOMENTUM: [*batch, "one"],
    Kind.MASK: mask,
  }
  text = {kind: " ".join(words) for kind, words in factors.items()}
  left = ", ".join(text[signature.operands[name]] for name in operands)
  right = ", ".join(text[kind] for kind in signature.results)
  return f"{left} -> {right}", ()


def _partition(
  signature, combine, mesh, infos, outs, call, *, feature_axis, batch_axes,
  **params,
):  # fmt: skip
  del mesh, outs
  params |= {"feature_axis": feature_axis, "batch_axes": batch_axes}
  operands = signature.named(infos)
  spec = arrays.even_split(operands["x"])
  whole = "mask" in operands and operands["mask"].shape[feature_axis] == 1
  mask = [
    None if whole and axis == feature_axis else names
    for axis, names in enumerate(spec)
  ]
  batch = spec[:batch_axes]
  specs = {
    Kind.BATCH: PartitionSpec(*spec),
    Kind.STATISTIC: PartitionSpec(*batch, spec[feature_axis]),
    Kind.MOMENTUM: PartitionSpec(*batch, None),
    Kind.MASK: PartitionSpec(*mask),
  }
  crossed = tuple(
    name
    for axis in reference.reduced_axes(len(spec), feature_axis, batch_axes)
    for name in spec[axis]
  )

  def local(*args):
    if combine is None or not crossed:
      return call(*args, **params)
    return combine(call, args, crossed, **params)

  return (
    local,
    [specs[kind] for kind in signature.results],
    [specs[signature.operands[name]] for name in operands],
  )


# So many parts are sent to every device, in one message; the moments of more
# would be longer than two short messages take.
_AT_ONCE = 64


def combine_moments(
  moments: Sequence[jax.Array],
  axis_name: Any,
  axis_index_groups: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Joins the moments of several devices' parts of a batch.

  The mean comes first and the variance is summed about it, so that nothing
  cancels. One all-reduce brings all parts to every device, which then needs no
  second one for the variance.

  Args:
    moments: mean and var of this device's values, `[c]`, and the number of
      them, which may be 0.
    axis_name: Mesh or vmap axes to join over.
    axis_index_groups: As in `jax.lax.psum`.

  Returns:
    mean, var and count of the whole, each `[c]`.
  """
  mean, var, count = moments
  reduce = functools.partial(
    lax.psum, axis_name=axis_name, axis_index_groups=axis_index_groups
  )
  size = reduce(1)
  at_once = size <= _AT_ONCE
  if at_once:
    own = jnp.stack([mean, var, count])
    place = jnp.arange(size) == _place(axis_name, axis_index_groups)
    place = place.reshape((size,) + (1,) * own.ndim)
    mean, var, count = jnp.moveaxis(reduce(jnp.where(place, own, 0)), 1, 0)
  total = functools.partial(jnp.sum, axis=0) if at_once else reduce
  some = count > 0
  mean = jnp.where(some, mean, 0)
  whole = total(count)
  centre = total(mean * count) / whole
  if at_once:
    # What rounding has left of the sum above.
    centre += total((mean - centre) * count) / whole
  about = jnp.where(some, var + lax.square(mean - centre), 0)
  return centre, total(about * count) / whole, whole


def _place(axis_name, groups):
  """Returns this device's number among those that it joins with."""
  index = lax.axis_index(axis_name)
  if groups is None:
    return index
  places = np.zeros(sum(map(len, groups)), np.int32)
  for group in groups:
    places[list(group)] = np.arange(len(group))
  return jnp.asarray(places)[index]
