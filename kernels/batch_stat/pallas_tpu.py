"""Batch statistics for TPUs in Pallas: one pass over x, and nothing cancels.

Only the moments, alone or blended into the running averages. Normalising and
the gradients stay with XLA: what they do to x is elementwise, or sums of such,
and XLA fuses it with what comes before and after; a kernel of our own would be
a wall between them, and cost one more pass over x.
"""

from collections.abc import Mapping
import functools
import math
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp

from ..common import arrays
from . import reference

# Elements and features of x that are in fast memory at once, twice.
_BLOCK = 1 << 18
_FEATURES = 512
_LANES = 128

_DTYPES = ("float32", "bfloat16")


def unsupported(operands: Mapping[str, Any], **params: Any) -> str | None:
  """Returns why the kernel cannot handle these operands, or None.

  Args:
    operands: Their abstract values by name.
    **params: Of the op.
  """
  x = operands["x"]
  if x.dtype.name not in _DTYPES:
    return f"`x` is {x.dtype.name}"
  if arrays.static_size(x.shape) is None:
    return "`x` has symbolic sizes"
  if 0 in x.shape:
    return f"`x` of shape {x.shape} is empty"
  if "mask" in operands:
    return "there is a mask, which XLA fuses into its sums"
  if params["feature_axis"] != x.ndim - 1:
    return f"the features are axis {params['feature_axis']} of {x.ndim} axes"
  if _columns(x.shape[-1]) > _BLOCK // 32:
    return (
      f"`x` has {x.shape[-1]} features, which are not a multiple of"
      f" {_LANES} and too many to take at once"
    )
  rows = 32 // x.dtype.itemsize
  if x.ndim - params["batch_axes"] > 2 and x.shape[-2] % rows:
    return (
      f"`x` of shape {x.shape} cannot be read as a matrix in place:"
      f" {x.shape[-2]} is not a multiple of the {rows} rows of a tile of"
      f" {x.dtype.name}"
    )
  return None


def slower(operands: Mapping[str, Any], **params: Any) -> str | None:
  """Returns why XLA is expected to be faster, or None; see `unsupported`."""
  x = operands["x"]
  if x.ndim - params["batch_axes"] > 3:
    return (
      "`x` has the axes of an image, and XLA sums in the layout, and the"
      " fusion, of the convolution that makes it"
    )
  return None


def moments(
  x: jax.Array,
  *,
  feature_axis: int,
  batch_axes: int,
  accurate: bool,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Computes mean, biased variance and count; as `reference.moments`.

  Args:
    x: `[..., c]`.
    feature_axis: The last.
    batch_axes: Number of leading axes that are independent batches.
    accurate: Not needed: nothing cancels.
    interpret: Passed on to `pallas_call`.

  Returns:
    mean, var and count, each `[c]`.
  """
  del accurate
  mean, var = _call(x, batch_axes, (), interpret)
  size = math.prod(x.shape[batch_axes:feature_axis])
  return mean, var, jnp.full(mean.shape, size, mean.dtype)


def update(
  mean: jax.Array,
  var: jax.Array,
  momentum: jax.Array,
  x: jax.Array,
  *,
  feature_axis: int,
  batch_axes: int,
  accurate: bool,
  interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Blends x's statistics into running averages; as `reference.update`.

  Args:
    mean: `[c]`, updated in place.
    var: `[c]`, updated in place.
    momentum: `[1]`.
    x: `[..., c]`.
    feature_axis: The last.
    batch_axes: As in `moments`.
    accurate: As in `moments`.
    interpret: As in `moments`.

  Returns:
    The new averages of mean and var, and x's own mean and var, each `[c]`.
  """
  del feature_axis, accurate
  momentum = jnp.broadcast_to(momentum, mean.shape)
  return tuple(_call(x, batch_axes, (mean, var, momentum), interpret))


def train(
  mean: jax.Array,
  var: jax.Array,
  momentum: jax.Array,
  scale: jax.Array,
  x: jax.Array,
  *,
  feature_axis: int,
  batch_axes: int,
  accurate: bool,
  epsilon: float,
  interpret: Any = False,
) -> tuple[jax.Array, ...]:
  """Computes all that `batch_norm` wants of x; as `reference.train`.

  Args:
    mean: `[c]`, updated in place.
    var: `[c]`, updated in place.
    momentum: `[1]`.
    scale: `[c]`.
    x: `[..., c]`.
    feature_axis: The last.
    batch_axes: As in `moments`.
    accurate: As in `moments`.
    epsilon: Added to the variance.
    interpret: As in `moments`.

  Returns:
    What `update` returns, the count of `moments`, and `reference.factors`.
  """
  out = update(
    mean,
    var,
    momentum,
    x,
    feature_axis=feature_axis,
    batch_axes=batch_axes,
    accurate=accurate,
    interpret=interpret,
  )
  size = math.prod(x.shape[batch_axes:feature_axis])
  count = jnp.full(mean.shape, size, mean.dtype)
  return (*out, count, *reference.factors(out[3], scale, epsilon))


def _columns(features: int) -> int:
  """Returns how many features to take at once: a divisor of them all."""
  if features % _LANES:
    return features
  return max(
    columns
    for columns in range(_LANES, _FEATURES + 1, _LANES)
    if features % columns == 0
  )


def _call(x, batch_axes, averages, interpret):
  """Runs the kernel; returns [new averages,] mean and var."""
  stat_shape = (*x.shape[:batch_axes], x.shape[-1])
  batch = math.prod(x.shape[:batch_axes])
  features = x.shape[-1]
  x = x.reshape(batch, -1, features)
  size = x.shape[1]
  columns = _columns(features)
  rows = min(size, _BLOCK // columns // 32 * 32)
  stat = pl.BlockSpec((None, 1, columns), lambda b, c, i: (b, 0, c))
  outputs = 4 if averages else 2
  out = pl.pallas_call(
    functools.partial(_kernel, size=size, rows=rows, blends=bool(averages)),
    grid=(batch, features // columns, pl.cdiv(size, rows)),
    in_specs=[
      *[stat] * len(averages),
      pl.BlockSpec((None, rows, columns), lambda b, c, i: (b, i, c)),
    ],
    out_specs=[stat] * outputs,
    out_shape=[
      jax.ShapeDtypeStruct(
        (batch, 1, features), reference.compute_dtype(x.dtype)
      )
    ]
    * outputs,
    scratch_shapes=[pltpu.VMEM((1, columns), jnp.float32)] * 2,
    input_output_aliases={0: 0, 1: 1} if averages else {},
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=interpret,
    name="batch_stat_update" if averages else "batch_stat_moments",
  )(*(a.reshape(batch, 1, features) for a in averages), x)
  return [a.reshape(stat_shape) for a in out]


def _kernel(*refs, size, rows, blends):
  """Merges one block's moments into those of the blocks before (Chan et al.).

  Args:
    *refs: If it blends, mean, var and momentum; x; then the results: if it
      blends, the new averages; mean and var; then scratch for the mean so far
      and the sum of squares about it.
    size: Rows of x.
    rows: Rows of a block; the last one may have fewer.
    blends: Whether there are running averages.
  """
  averages, (x, *refs) = refs[: 3 * blends], refs[3 * blends :]
  *results, mean, squares = refs
  i = pl.program_id(2)
  before = i * rows
  here = jnp.minimum(rows, size - before)

  @pl.when(i == 0)
  def _():
    mean[...] = jnp.zeros_like(mean)
    squares[...] = jnp.zeros_like(squares)

  values = x[...].astype(jnp.float32)
  count, seen = here.astype(jnp.float32), before.astype(jnp.float32)

  def keep(a):
    if size % rows == 0:
      return a
    inside = jax.lax.broadcasted_iota(jnp.int32, a.shape, 0) < here
    return jnp.where(inside, a, 0.0)

  own_mean = jnp.sum(keep(values), axis=0, keepdims=True) / count
  about = keep(values - own_mean)
  own_squares = jnp.sum(about * about, axis=0, keepdims=True)
  step = own_mean - mean[...]
  share = count / (seen + count)
  mean[...] += step * share
  squares[...] += own_squares + step * step * (seen * share)

  @pl.when(i == pl.num_programs(2) - 1)
  def _():
    variance = squares[...] / size
    if blends:
      old_mean, old_var, momentum = (ref[...] for ref in averages)
      results[0][...] = momentum * old_mean + (1 - momentum) * mean[...]
      results[1][...] = momentum * old_var + (1 - momentum) * variance
    results[-2][...] = mean[...]
    results[-1][...] = variance
