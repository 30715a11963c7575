"""The handlers of batch_stat, and how they are called.

The CUDA handlers that sum want a workspace, which they give as a last result.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ..common import arrays, libraries
from . import reference, signatures

# FFI target names, the same on every platform.
TARGET_UPDATE = "fused_nnx_batch_stat_update_1"
TARGET_TRAIN = "fused_nnx_batch_stat_train_1"
TARGET_MOMENTS = "fused_nnx_batch_stat_moments_1"
TARGET_NORMALIZE = "fused_nnx_batch_stat_normalize_1"
TARGET_GRAD_SUMS = "fused_nnx_batch_stat_grad_sums_1"
TARGET_GRAD_INPUT = "fused_nnx_batch_stat_grad_input_1"

# What the extensions call their handlers.
HANDLERS = {
  TARGET_UPDATE: "update",
  TARGET_TRAIN: "train",
  TARGET_MOMENTS: "moments",
  TARGET_NORMALIZE: "normalize",
  TARGET_GRAD_SUMS: "grad_sums",
  TARGET_GRAD_INPUT: "grad_input",
}
# What artifacts call them that were exported before names had versions.
HANDLERS |= {name.removesuffix("_1"): fn for name, fn in HANDLERS.items()}

CPU_LIBRARY = libraries.Library(f"{__package__}.cpu._batch_stat_cpu", HANDLERS)
CUDA_LIBRARY = libraries.Library(
  f"{__package__}.cuda._batch_stat_cuda", HANDLERS, platform="CUDA"
)

_DTYPES = ("float64", "float32", "bfloat16", "float16")

# Numbers for each channel and part in the workspaces, as cuda/batch_stat.h has
# them; the moments' has a part more.
_MOMENTS_PARTS = 3
_GRAD_SUMS_PARTS = 2

# Bytes of x that a block of threads should at least have, and how many blocks
# are enough: two for each multiprocessor of a large GPU, which they keep busy
# to the end; where channels are as many, nothing is left to be added up.
_LEAST_BYTES = 2**14
_MOST_BLOCKS = 264


def splits(x: Any, feature_axis: int, batch_axes: int) -> int:
  """Returns into how many parts the CUDA kernels cut the sums of a channel.

  The shape alone decides, so that sums are the same to the bit on every device.

  Args:
    x: The batch.
    feature_axis: Its axis of c.
    batch_axes: Number of leading axes that are independent batches.
  """
  size = arrays.static_size(x.shape)
  if size is None:
    return 64  # any number is right
  itemsize = np.dtype(x.dtype).itemsize
  columns = arrays.static_size(x.shape[:batch_axes])
  channels = x.shape[feature_axis]
  if arrays.static_size(x.shape[feature_axis + 1 :]) == 1:
    columns *= -(-channels * itemsize // 512)  # a warp's vectors of channels
  else:
    columns *= channels
  column_bytes = size * itemsize // columns
  return max(min(column_bytes // _LEAST_BYTES, _MOST_BLOCKS // columns), 1)


def _statistics(x, count, feature_axis, batch_axes):
  """Returns the types of so many results that are statistics of x."""
  shape = reference.stat_shape(x, feature_axis, batch_axes)
  dtype = reference.compute_dtype(x.dtype)
  return (jax.ShapeDtypeStruct(shape, dtype),) * count


def _workspace(x, count, extra, feature_axis, batch_axes):
  shape = (
    splits(x, feature_axis, batch_axes) + extra,
    count,
    arrays.static_size(reference.stat_shape(x, feature_axis, batch_axes)),
  )
  dtype = reference.compute_dtype(x.dtype)
  return (jax.ShapeDtypeStruct(shape, dtype),)


def _moments_workspace(cuda, x, feature_axis, batch_axes):
  if not cuda:
    return ()
  return _workspace(x, _MOMENTS_PARTS, 1, feature_axis, batch_axes)


def _call(
  target: str,
  operands: Sequence[jax.Array],
  results: Sequence[Any],
  attributes: Mapping[str, Any],
  *,
  workspace: Sequence[Any] = (),
  aliases: Mapping[int, int] | None = None,
) -> Sequence[jax.Array]:
  """Calls a handler; attributes that are not floats become int64."""
  call = jax.ffi.ffi_call(
    target, (*results, *workspace), input_output_aliases=dict(aliases or {})
  )
  out = call(
    *operands,
    **{
      name: np.float64(value) if isinstance(value, float) else np.int64(value)
      for name, value in attributes.items()
    },
  )
  return out[: len(results)]


_AVERAGES_IN_PLACE = {0: 0, 1: 1}


def update(
  *operands: jax.Array, cuda: bool = False, accurate: bool, **axes: int
) -> Sequence[jax.Array]:
  """Calls the handler of `reference.update`.

  Args:
    *operands: As of the reference.
    cuda: Whether the handler is that for CUDA.
    accurate: As of the reference.
    **axes: `feature_axis` and `batch_axes`.
  """
  x = signatures.UPDATE.named(operands)["x"]
  return _call(
    TARGET_UPDATE,
    operands,
    _statistics(x, 4, **axes),
    {"accurate": accurate, **axes},
    workspace=_moments_workspace(cuda, x, **axes),
    aliases=_AVERAGES_IN_PLACE,
  )


def train(
  *operands: jax.Array,
  cuda: bool = False,
  accurate: bool,
  epsilon: float,
  **axes: int,
) -> Sequence[jax.Array]:
  """Calls the handler of `reference.train`; arguments as in `update`."""
  x = signatures.TRAIN.named(operands)["x"]
  return _call(
    TARGET_TRAIN,
    operands,
    _statistics(x, 7, **axes),
    {"accurate": accurate, "epsilon": float(epsilon), **axes},
    workspace=_moments_workspace(cuda, x, **axes),
    aliases=_AVERAGES_IN_PLACE,
  )


def moments(
  *operands: jax.Array, cuda: bool = False, accurate: bool, **axes: int
) -> Sequence[jax.Array]:
  """Calls the handler of `reference.moments`; arguments as in `update`."""
  x = signatures.MOMENTS.named(operands)["x"]
  return _call(
    TARGET_MOMENTS,
    operands,
    _statistics(x, 3, **axes),
    {"accurate": accurate, **axes},
    workspace=_moments_workspace(cuda, x, **axes),
  )


def normalize(
  *operands: jax.Array, relu: bool, dtype: Any, **axes: int
) -> Sequence[jax.Array]:
  """Calls the handler of `reference.normalize`; see `update`."""
  x = signatures.NORMALIZE.named(operands)["x"]
  out = (jax.ShapeDtypeStruct(x.shape, dtype),)
  return _call(TARGET_NORMALIZE, operands, out, {"relu": relu, **axes})


def grad_sums(
  *operands: jax.Array, cuda: bool = False, relu: bool, **axes: int
) -> Sequence[jax.Array]:
  """Calls the handler of `reference.grad_sums`; see `update`."""
  x = signatures.GRAD_SUMS.named(operands)["x"]
  workspace = _workspace(x, _GRAD_SUMS_PARTS, 0, **axes) if cuda else ()
  out = _statistics(x, 4, **axes)
  attributes = {"relu": relu, **axes}
  return _call(TARGET_GRAD_SUMS, operands, out, attributes, workspace=workspace)


def grad_input(
  *operands: jax.Array, relu: bool, **axes: int
) -> Sequence[jax.Array]:
  """Calls the handler of `reference.grad_input`; see `update`."""
  x = signatures.GRAD_INPUT.named(operands)["x"]
  out = (jax.ShapeDtypeStruct(x.shape, x.dtype),)
  return _call(TARGET_GRAD_INPUT, operands, out, {"relu": relu, **axes})


def unsupported(x: Any, result: Any) -> str | None:
  """Returns why the handlers cannot take x, or None.

  Args:
    x: Its abstract value.
    result: The dtype of y or of its gradient, that of x for statistics.
  """
  if x.dtype.name not in _DTYPES:
    return f"`x` is {x.dtype.name}"
  if arrays.static_size(x.shape) == 0:
    return f"`x` of shape {x.shape} is empty"
  if result not in (x.dtype, reference.compute_dtype(x.dtype)):
    return f"`x` is {x.dtype.name} and the result {np.dtype(result).name}"
  return None
