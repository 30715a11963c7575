"""The primitives of batch_stat: what runs where, and how it is split.

Arguments and parameters are those of the functions in `reference`. The four
primitives behind `batch_norm` are apart because the sums over the batch may
have to cross devices between them. What has a number for each channel is made
where the sums end: on a GPU, a program of its own for it takes a few
microseconds.
"""

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from ..common import dispatch
from . import reference

# FFI target names, the same on every platform.
TARGET_UPDATE = "fused_nnx_batch_stat_update"
TARGET_TRAIN = "fused_nnx_batch_stat_train"
TARGET_MOMENTS = "fused_nnx_batch_stat_moments"
TARGET_NORMALIZE = "fused_nnx_batch_stat_normalize"
TARGET_GRAD_SUMS = "fused_nnx_batch_stat_grad_sums"
TARGET_GRAD_INPUT = "fused_nnx_batch_stat_grad_input"

# What the extensions call their handlers.
HANDLERS = {
  TARGET_UPDATE: "update",
  TARGET_TRAIN: "train",
  TARGET_MOMENTS: "moments",
  TARGET_NORMALIZE: "normalize",
  TARGET_GRAD_SUMS: "grad_sums",
  TARGET_GRAD_INPUT: "grad_input",
}

CPU_LIBRARY = dispatch.Library(f"{__package__}._batch_stat_cpu", HANDLERS)

PALLAS = f"{__package__}.pallas_tpu"

CUDA_LIBRARY = dispatch.Library(
  f"{__package__}._batch_stat_cuda", HANDLERS, platform="CUDA"
)

_KERNEL_DTYPES = ("float64", "float32", "bfloat16", "float16")


def _stat_shape(x: Any, feature_axis: int, batch_axes: int) -> tuple[Any, ...]:
  return (*x.shape[:batch_axes], x.shape[feature_axis])


def _ints(**attributes: int) -> dict[str, np.int64]:
  return {name: np.int64(value) for name, value in attributes.items()}


# ---- Abstract evaluation.


def _update_avals(*avals, x_index=3, feature_axis, batch_axes, accurate):
  del accurate
  x = avals[x_index]
  shape = _stat_shape(x, feature_axis, batch_axes)
  dtype = reference.compute_dtype(x.dtype)
  averages = dispatch.out_aval(shape, dtype, *avals)
  batch = dispatch.out_aval(shape, dtype, *avals[x_index:])
  return averages, averages, batch, batch


def _train_avals(*avals, epsilon, **params):
  del epsilon
  out = _update_avals(*avals, x_index=4, **params)
  mul = dispatch.out_aval(out[0].shape, out[0].dtype, *avals[3:])
  return *out, out[2], out[3], mul


def _moments_avals(*avals, feature_axis, batch_axes, accurate):
  del accurate
  x = avals[0]
  out = dispatch.out_aval(
    _stat_shape(x, feature_axis, batch_axes),
    reference.compute_dtype(x.dtype),
    *avals,
  )
  return out, out, out


def _normalize_avals(*avals, feature_axis, batch_axes, relu, dtype):
  del feature_axis, batch_axes, relu
  return (dispatch.out_aval(avals[0].shape, dtype, *avals),)


def _grad_sums_avals(*avals, feature_axis, batch_axes, relu):
  del relu
  x = avals[0]
  out = dispatch.out_aval(
    _stat_shape(x, feature_axis, batch_axes),
    reference.compute_dtype(x.dtype),
    *avals,
  )
  return (out,) * 4


def _grad_input_avals(*avals, feature_axis, batch_axes, relu):
  del feature_axis, batch_axes, relu
  return (dispatch.out_aval(avals[0].shape, avals[0].dtype, *avals),)


# ---- The implementations. The CUDA handlers that sum want a workspace, which
# they give as a last result.


def _like(array):
  return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _stats_like(x, count, feature_axis, batch_axes):
  shape = _stat_shape(x, feature_axis, batch_axes)
  dtype = reference.compute_dtype(x.dtype)
  return (jax.ShapeDtypeStruct(shape, dtype),) * count


# Numbers for each channel and part in the workspaces, as batch_stat_cuda.h has
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
  size = dispatch.static_size(x.shape)
  if size is None:
    return 64  # any number is right
  itemsize = np.dtype(x.dtype).itemsize
  columns = dispatch.static_size(x.shape[:batch_axes])
  channels = x.shape[feature_axis]
  if dispatch.static_size(x.shape[feature_axis + 1 :]) == 1:
    columns *= -(-channels * itemsize // 512)  # a warp's vectors of channels
  else:
    columns *= channels
  column_bytes = size * itemsize // columns
  return max(min(column_bytes // _LEAST_BYTES, _MOST_BLOCKS // columns), 1)


def _workspace(x, count, extra, feature_axis, batch_axes):
  shape = (
    splits(x, feature_axis, batch_axes) + extra,
    count,
    dispatch.static_size(_stat_shape(x, feature_axis, batch_axes)),
  )
  dtype = reference.compute_dtype(x.dtype)
  return (jax.ShapeDtypeStruct(shape, dtype),)


def _moments_workspace(cuda, x, feature_axis, batch_axes):
  if not cuda:
    return ()
  return _workspace(x, _MOMENTS_PARTS, 1, feature_axis, batch_axes)


def _update(
  cuda, mean, var, momentum, x, *mask, feature_axis, batch_axes, accurate
):
  out = _stats_like(x, 4, feature_axis, batch_axes)
  workspace = _moments_workspace(cuda, x, feature_axis, batch_axes)
  call = jax.ffi.ffi_call(
    TARGET_UPDATE, out + workspace, input_output_aliases={0: 0, 1: 1}
  )
  return call(
    mean,
    var,
    momentum,
    x,
    *mask,
    **_ints(
      feature_axis=feature_axis, batch_axes=batch_axes, accurate=accurate
    ),
  )[: len(out)]


def _train(
  cuda,
  mean,
  var,
  momentum,
  scale,
  x,
  *mask,
  feature_axis,
  batch_axes,
  accurate,
  epsilon,
):
  out = _stats_like(x, 7, feature_axis, batch_axes)
  workspace = _moments_workspace(cuda, x, feature_axis, batch_axes)
  call = jax.ffi.ffi_call(
    TARGET_TRAIN, out + workspace, input_output_aliases={0: 0, 1: 1}
  )
  return call(
    mean,
    var,
    momentum,
    scale,
    x,
    *mask,
    **_ints(
      feature_axis=feature_axis, batch_axes=batch_axes, accurate=accurate
    ),
    epsilon=np.float64(epsilon),
  )[: len(out)]


def _moments(cuda, x, *mask, feature_axis, batch_axes, accurate):
  out = _stats_like(x, 3, feature_axis, batch_axes)
  workspace = _moments_workspace(cuda, x, feature_axis, batch_axes)
  return jax.ffi.ffi_call(TARGET_MOMENTS, out + workspace)(
    x,
    *mask,
    **_ints(
      feature_axis=feature_axis, batch_axes=batch_axes, accurate=accurate
    ),
  )[: len(out)]


def _normalize(x, mean, mul, bias, *, feature_axis, batch_axes, relu, dtype):
  out = (jax.ShapeDtypeStruct(x.shape, dtype),)
  return jax.ffi.ffi_call(TARGET_NORMALIZE, out)(
    x,
    mean,
    mul,
    bias,
    **_ints(feature_axis=feature_axis, batch_axes=batch_axes, relu=relu),
  )


def _grad_sums(
  cuda,
  x,
  dy,
  mean,
  mul,
  bias,
  rstd,
  count,
  *,
  feature_axis,
  batch_axes,
  relu,
):
  out = _stats_like(x, 4, feature_axis, batch_axes)
  workspace = ()
  if cuda:
    workspace = _workspace(x, _GRAD_SUMS_PARTS, 0, feature_axis, batch_axes)
  return jax.ffi.ffi_call(TARGET_GRAD_SUMS, out + workspace)(
    x,
    dy,
    mean,
    mul,
    bias,
    rstd,
    count,
    **_ints(feature_axis=feature_axis, batch_axes=batch_axes, relu=relu),
  )[: len(out)]


def _grad_input(
  x, dy, mean, mul, bias, c0, c1, *mask, feature_axis, batch_axes, relu
):
  return jax.ffi.ffi_call(TARGET_GRAD_INPUT, (_like(x),))(
    x,
    dy,
    mean,
    mul,
    bias,
    c0,
    c1,
    *mask,
    **_ints(feature_axis=feature_axis, batch_axes=batch_axes, relu=relu),
  )


def _unsupported(x_index: int, avals: Sequence[Any], **params: Any):
  x = avals[x_index]
  if x.dtype.name not in _KERNEL_DTYPES:
    return f"`x` is {x.dtype.name}"
  if dispatch.static_size(x.shape) == 0:
    return f"`x` of shape {x.shape} is empty"
  out = params.get("dtype", x.dtype)
  wide = reference.compute_dtype(x.dtype)
  if out not in (x.dtype, wide):
    return f"`x` is {x.dtype.name} and the result {np.dtype(out).name}"
  return None


# ---- Where XLA is faster: it makes one fusion of what is elementwise and its
# neighbours, which a custom call keeps apart, each with a write and a read of a
# whole array; and some sums it does at the memory's speed.

_FUSES = "XLA makes one fusion of it and what follows"

# Bytes of x from which going over memory once more costs the CPU more than a
# call into a library.
_FUSED_BYTES = 2**17

# Bytes of x from which a GPU is faster with the kernels. Below, launches are
# what counts: on an H200, 2 MB took 1.07 times as long as with XLA, 6.4 MB 0.7
# to 1.2 times, most often less.
_SUMMED_BYTES = 2**22


def _is_small(x: Any, least_bytes: int) -> bool:
  size = dispatch.static_size(x.shape)
  return size is not None and size * x.dtype.itemsize < least_bytes


def _normalize_slower(avals: Sequence[Any], *, relu: bool, **params: Any):
  """Says where XLA's fusion is faster than the CPU's kernel that normalises.

  After relu most often nothing elementwise follows, and XLA takes longer in
  half precision.
  """
  del params
  x = avals[0]
  if _is_small(x, _FUSED_BYTES) or (relu and x.dtype.itemsize == 2):
    return None
  return _FUSES


def _grad_input_slower(avals: Sequence[Any], **params: Any):
  """Says the same of dx, which XLA takes longer for in half precision."""
  del params
  x = avals[0]
  if _is_small(x, _FUSED_BYTES) or x.dtype.itemsize == 2:
    return None
  return _FUSES


def _sums_slower_on_cuda(
  x_index: int,
  avals: Sequence[Any],
  *,
  feature_axis: int,
  accurate: bool = False,
  **params: Any,
):
  """Says where XLA sums as fast on a GPU, and takes in what makes x."""
  del params
  x, *mask = avals[x_index:]
  if x.dtype == jnp.float32:
    return "XLA sums float32 as fast, in one fusion with what makes it"
  if accurate:
    return "XLA sums faster in two passes"
  if mask:
    return "XLA sums faster under a mask"
  if dispatch.static_size(x.shape[feature_axis + 1 :]) != 1:
    return "XLA sums faster where features are not last"
  if _is_small(x, _SUMMED_BYTES):
    return f"XLA sums less than {_SUMMED_BYTES >> 20} MiB with fewer launches"
  return None


def _grad_sums_slower_on_cuda(
  avals: Sequence[Any], *, relu: bool, **params: Any
):
  """Says the same of the gradient's sums.

  Without relu in it, dy most often comes from an activation's gradient.
  """
  if not relu:
    return "XLA makes one fusion of the sums and what makes dy"
  return _sums_slower_on_cuda(0, avals[:1], **params)


def _normalize_slower_on_cuda(
  avals: Sequence[Any], *, relu: bool, **params: Any
):
  """Says where XLA's fusion is faster than CUDA's kernel that normalises."""
  del params
  x = avals[0]
  if not relu or x.dtype.itemsize > 2:
    return _FUSES
  if _is_small(x, _SUMMED_BYTES):
    return f"XLA is as fast for less than {_SUMMED_BYTES >> 20} MiB"
  return None


def _grad_input_slower_on_cuda(avals: Sequence[Any], **params: Any):
  del avals, params
  return _FUSES


def _grad_unsupported(avals: Sequence[Any], **params: Any):
  del params
  return _unsupported(0, avals[:1], dtype=avals[1].dtype)


# ---- Batching: one more batch axis in front.


def _batch_rule(op, args, dims, *, feature_axis, batch_axes, **params):
  moved, _ = dispatch.move_batch_to_front(args, dims)
  results = op(
    *moved, feature_axis=feature_axis + 1, batch_axes=batch_axes + 1, **params
  )
  return results, [0] * len(results)


# ---- Sharding. x may be split along any axis; the statistics follow the batch
# and feature axes, and sums over the others cross devices.


def _factors(x, feature_axis, batch_axes):
  """Returns the Shardy factors of x, of a statistic and of a mask."""
  names = [f"i{axis}" for axis in range(x.ndim)]
  stat = [*names[:batch_axes], names[feature_axis]]
  return names, stat


def _mask_factors(names, mask, x, feature_axis):
  if mask.shape[feature_axis] == x.shape[feature_axis]:
    return names
  return [*names[:feature_axis], "one", *names[feature_axis + 1 :]]


def _rule(x_index, mask_index, kinds, results, avals, **params):
  """Spells the Shardy rule of an op.

  Args:
    x_index: Which operand is x.
    mask_index: Which operand is the mask, if there is one.
    kinds: For each operand but the mask, "x", "s" for a statistic or "m" for
      the momentum.
    results: The same for the results.
    avals: Of the operands.
    **params: Of the op.
  """
  feature_axis = params["feature_axis"]
  x = avals[x_index]
  names, stat = _factors(x, feature_axis, params["batch_axes"])
  text = {
    "x": " ".join(names),
    "s": " ".join(stat),
    "m": " ".join([*stat[:-1], "one"]),
  }
  operands = [text[kind] for kind in kinds]
  if len(avals) > mask_index:
    mask = _mask_factors(names, avals[mask_index], x, feature_axis)
    operands.append(" ".join(mask))
  outs = [text[kind] for kind in results]
  return f"{', '.join(operands)} -> {', '.join(outs)}", ()


def _axes_of(entry) -> tuple[str, ...]:
  if entry is None:
    return ()
  return entry if isinstance(entry, tuple) else (entry,)


def _x_spec(mesh, info):
  """Returns x's spec, without the axes that do not split it evenly."""
  spec = tuple(info.sharding.spec)
  spec += (None,) * (len(info.shape) - len(spec))
  kept = []
  for size, entry in zip(info.shape, spec):
    parts = int(np.prod([mesh.shape[name] for name in _axes_of(entry)]))
    # XLA pads uneven parts, and the kernel would count the padding.
    kept.append(entry if size % parts == 0 else None)
  return kept


def _partition(
  x_index, mask_index, kinds, results, combine, mesh, infos, outs, call,
  **params,
):  # fmt: skip
  """Splits an op along x's axes; arguments as in `_rule`.

  `combine(outputs, args, axis_names)` joins the parts' results over the mesh
  axes that split what is reduced; None if nothing is.
  """
  del outs
  feature_axis, batch_axes = params["feature_axis"], params["batch_axes"]
  mesh = infos[x_index].sharding.mesh
  spec = _x_spec(mesh, infos[x_index])
  specs = {
    "x": PartitionSpec(*spec),
    "s": PartitionSpec(*spec[:batch_axes], spec[feature_axis]),
    "m": PartitionSpec(*spec[:batch_axes], None),
  }
  arg_specs = [specs[kind] for kind in kinds]
  if len(infos) > mask_index:
    mask_spec = list(spec)
    if infos[mask_index].shape[feature_axis] == 1:
      mask_spec[feature_axis] = None
    arg_specs.append(PartitionSpec(*mask_spec))
  crossed = tuple(
    name
    for axis in reference.reduced_axes(len(spec), feature_axis, batch_axes)
    for name in _axes_of(spec[axis])
  )

  def local(*args):
    if combine is None or not crossed:
      return call(*args, **params)
    return combine(call, args, crossed, **params)

  return local, [specs[kind] for kind in results], arg_specs


def combine_moments(
  mean: jax.Array,
  var: jax.Array,
  count: jax.Array,
  axis_name: Any,
  axis_index_groups: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Joins the moments of several devices' parts of a batch.

  The mean comes first and the variance is summed about it, so that nothing
  cancels.

  Args:
    mean: `[c]`, this device's.
    var: `[c]`, this device's.
    count: `[c]`, this device's number of values; it may be 0.
    axis_name: Mesh or vmap axes to join over.
    axis_index_groups: As in `jax.lax.psum`.

  Returns:
    mean, var and count of the whole, each `[c]`.
  """
  total = functools.partial(
    lax.psum, axis_name=axis_name, axis_index_groups=axis_index_groups
  )
  some = count > 0
  whole = total(count)
  centre = total(jnp.where(some, mean, 0) * count) / whole
  about = jnp.where(some, var + lax.square(mean - centre), 0)
  return centre, total(about * count) / whole, whole


def _combine_update(call, args, axes, **params):
  mean, var, momentum, x, *mask = args
  own = MOMENTS(
    x, *mask, implementation=call.keywords["implementation"], **params
  )
  batch_mean, batch_var, _ = combine_moments(*own, axes)
  return reference.blend(momentum, mean, var, batch_mean, batch_var)


def _combine_train(call, args, axes, *, epsilon, **params):
  mean, var, momentum, scale, x, *mask = args
  own = MOMENTS(
    x, *mask, implementation=call.keywords["implementation"], **params
  )
  batch_mean, batch_var, count = combine_moments(*own, axes)
  return (
    *reference.blend(momentum, mean, var, batch_mean, batch_var),
    count,
    *reference.factors(batch_var, scale, epsilon),
  )


def _combine_moments(call, args, axes, **params):
  return combine_moments(*call(*args, **params), axes)


def _combine_sums(call, args, axes, **params):
  return [lax.psum(out, axes) for out in call(*args, **params)]


def _partitioning(x_index, mask_index, kinds, results, combine=None):
  places = (x_index, mask_index, kinds, results)
  return dispatch.Partitioning(
    rule=functools.partial(_rule, *places),
    partition=functools.partial(_partition, *places, combine),
  )


def _pallas(function: str, x_index: int) -> dispatch.Implementation:
  """Returns the TPU's implementation of an op that computes moments."""
  return dispatch.Implementation(
    name="pallas",
    platforms=("tpu",),
    partitionable=False,
    fn=dispatch.lazily(PALLAS, function),
    unsupported=functools.partial(
      dispatch.lazily(PALLAS, "unsupported"), x_index
    ),
    slower=functools.partial(dispatch.lazily(PALLAS, "slower"), x_index),
  )


def _implementations(
  fn, unsupported, *, workspace=False, slower=None, slower_on_cuda=None
):
  """Returns the CPU's and CUDA's implementations, which share a function.

  Args:
    fn: Calls the handler; if `workspace`, its first argument says whether to
      ask for one.
    unsupported: As in `dispatch.Implementation`.
    workspace: Whether the CUDA handler wants one.
    slower: As in `dispatch.Implementation`, on the CPU.
    slower_on_cuda: The same on CUDA.
  """
  on_cpu, on_cuda = fn, fn
  if workspace:
    on_cpu, on_cuda = (functools.partial(fn, cuda) for cuda in (False, True))
  return (
    dispatch.Implementation(
      name="cpu",
      platforms=("cpu",),
      fn=on_cpu,
      library=CPU_LIBRARY,
      unsupported=unsupported,
      slower=slower,
    ),
    dispatch.Implementation(
      name="cuda",
      platforms=("cuda",),
      fn=on_cuda,
      library=CUDA_LIBRARY,
      unsupported=unsupported,
      slower=slower_on_cuda,
    ),
  )


UPDATE = dispatch.Op(
  "batch_stat_update",
  abstract_eval=_update_avals,
  reference=reference.update,
  implementations=(
    *_implementations(
      _update,
      functools.partial(_unsupported, 3),
      workspace=True,
      slower_on_cuda=functools.partial(_sums_slower_on_cuda, 3),
    ),
    _pallas("update", 3),
  ),
  batching=_batch_rule,
  partitioning=_partitioning(3, 4, "ssmx", "ssss", _combine_update),
)

TRAIN = dispatch.Op(
  "batch_stat_train",
  abstract_eval=_train_avals,
  reference=reference.train,
  implementations=(
    *_implementations(
      _train,
      functools.partial(_unsupported, 4),
      workspace=True,
      slower_on_cuda=functools.partial(_sums_slower_on_cuda, 4),
    ),
    _pallas("train", 4),
  ),
  batching=_batch_rule,
  partitioning=_partitioning(4, 5, "ssmsx", "s" * 7, _combine_train),
)

MOMENTS = dispatch.Op(
  "batch_stat_moments",
  abstract_eval=_moments_avals,
  reference=reference.moments,
  implementations=(
    *_implementations(
      _moments,
      functools.partial(_unsupported, 0),
      workspace=True,
      slower_on_cuda=functools.partial(_sums_slower_on_cuda, 0),
    ),
    _pallas("moments", 0),
  ),
  batching=_batch_rule,
  partitioning=_partitioning(0, 1, "x", "sss", _combine_moments),
)

NORMALIZE = dispatch.Op(
  "batch_stat_normalize",
  abstract_eval=_normalize_avals,
  reference=reference.normalize,
  implementations=_implementations(
    _normalize,
    functools.partial(_unsupported, 0),
    slower=_normalize_slower,
    slower_on_cuda=_normalize_slower_on_cuda,
  ),
  batching=_batch_rule,
  partitioning=_partitioning(0, 4, "xsss", "x"),
)

GRAD_SUMS = dispatch.Op(
  "batch_stat_grad_sums",
  abstract_eval=_grad_sums_avals,
  reference=reference.grad_sums,
  implementations=_implementations(
    _grad_sums,
    _grad_unsupported,
    workspace=True,
    slower_on_cuda=_grad_sums_slower_on_cuda,
  ),
  batching=_batch_rule,
  partitioning=_partitioning(0, 7, "xxsssss", "ssss", _combine_sums),
)

GRAD_INPUT = dispatch.Op(
  "batch_stat_grad_input",
  abstract_eval=_grad_input_avals,
  reference=reference.grad_input,
  implementations=_implementations(
    _grad_input,
    _grad_unsupported,
    slower=_grad_input_slower,
    slower_on_cuda=_grad_input_slower_on_cuda,
  ),
  batching=_batch_rule,
  partitioning=_partitioning(0, 7, "xxsssss", "x"),
)
