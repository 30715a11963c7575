"""The primitives of batch_stat: what runs where, and how it is split.

Arguments and parameters are those of the functions in `reference`. The four
primitives behind `batch_norm` are apart because the sums over the batch may
have to cross devices between them. What has a number for each channel is made
where the sums end: on a GPU, a program of its own for it takes a few
microseconds.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from jax import lax

from ..common import arrays, dispatch, jax_private, libraries
from . import costs, ffi, reference, sharding, signatures

_PALLAS = f"{__package__}.pallas_tpu"


def _statistic(x, feature_axis, batch_axes, inputs):
  """Returns the abstract value of a statistic of x that `inputs` make."""
  return arrays.out_aval(
    reference.stat_shape(x, feature_axis, batch_axes),
    reference.compute_dtype(x.dtype),
    *inputs,
  )


def _update_avals(*avals, feature_axis, batch_axes, accurate):
  del accurate
  x = avals[3]
  of = functools.partial(_statistic, x, feature_axis, batch_axes)
  return (of(avals),) * 2 + (of(avals[3:]),) * 2


def _train_avals(*avals, feature_axis, batch_axes, accurate, epsilon):
  del accurate, epsilon
  x = avals[4]
  of = functools.partial(_statistic, x, feature_axis, batch_axes)
  batch = of(avals[4:])
  # The averages; mean, var, count and rstd of the batch; mul.
  return (of(avals),) * 2 + (batch,) * 4 + (of(avals[3:]),)


def _moments_avals(*avals, feature_axis, batch_axes, accurate):
  del accurate
  return (_statistic(avals[0], feature_axis, batch_axes, avals),) * 3


def _normalize_avals(*avals, dtype, **params):
  del params
  return (arrays.out_aval(avals[0].shape, dtype, *avals),)


def _grad_sums_avals(*avals, feature_axis, batch_axes, relu):
  del relu
  return (_statistic(avals[0], feature_axis, batch_axes, avals),) * 4


def _grad_input_avals(*avals, **params):
  del params
  return (arrays.out_aval(avals[0].shape, avals[0].dtype, *avals),)


def _batching(op, args, dims, *, feature_axis, batch_axes, **params):
  """Gives everything one more batch axis in front."""
  moved, _ = arrays.move_batch_to_front(args, dims)
  results = op(
    *moved, feature_axis=feature_axis + 1, batch_axes=batch_axes + 1, **params
  )
  return results, [0] * len(results)


# What joins the results of parts whose sums cross devices.


def _own_moments(call, signature, args, **params):
  """Returns the moments of this device's part, and the operands by name."""
  x = signature.named(args)
  masks = (x["mask"],) if "mask" in x else ()
  implementation = call.keywords["implementation"]
  return x, MOMENTS(x["x"], *masks, implementation=implementation, **params)


def _combine_update(call, args, axes, **params):
  x, own = _own_moments(call, signatures.UPDATE, args, **params)
  batch_mean, batch_var, _ = sharding.combine_moments(own, axes)
  return reference.blend(
    x["momentum"], x["mean"], x["var"], batch_mean, batch_var
  )


def _combine_train(call, args, axes, *, epsilon, **params):
  x, own = _own_moments(call, signatures.TRAIN, args, **params)
  batch_mean, batch_var, count = sharding.combine_moments(own, axes)
  return (
    *reference.blend(x["momentum"], x["mean"], x["var"], batch_mean, batch_var),
    count,
    *reference.factors(batch_var, x["scale"], epsilon),
  )


def _combine_moments(call, args, axes, **params):
  return sharding.combine_moments(call(*args, **params), axes)


def _combine_sums(call, args, axes, **params):
  return [lax.psum(out, axes) for out in call(*args, **params)]


def _by_name(signature, fn):
  """Makes a function of operands by name one of their abstract values."""
  if fn is None:
    return None
  return lambda avals, **params: fn(signature.named(avals), **params)


def _unsupported(x, *, dtype=None, **params):
  """Says what the handlers cannot take; as `dispatch.Implementation` wants."""
  del params
  if "dy" in x:
    dtype = x["dy"].dtype
  return ffi.unsupported(x["x"], dtype or x["x"].dtype)


def _on_cpu(
  signature: signatures.Signature,
  fn: Callable[..., Any],
  slower: Callable[..., str | None] | None = None,
) -> dispatch.Implementation:
  """Returns the CPU's implementation; `slower` takes operands by name."""
  return dispatch.Implementation(
    name="cpu",
    platforms=("cpu",),
    fn=fn,
    library=ffi.CPU_LIBRARY,
    unsupported=_by_name(signature, _unsupported),
    slower=_by_name(signature, slower),
  )


def _on_cuda(
  signature: signatures.Signature,
  fn: Callable[..., Any],
  slower: Callable[..., str | None],
) -> dispatch.Implementation:
  """Returns CUDA's implementation; `slower` takes operands by name."""
  return dispatch.Implementation(
    name="cuda",
    platforms=("cuda",),
    fn=fn,
    library=ffi.CUDA_LIBRARY,
    unsupported=_by_name(signature, _unsupported),
    slower=_by_name(signature, slower),
  )


def _with_workspace(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Returns the call of the handler for CUDA, which wants a workspace."""
  return functools.partial(fn, cuda=True)


def _moments_op(
  name: str,
  signature: signatures.Signature,
  abstract_eval: Callable[..., Any],
  combine: Callable[..., Sequence[Any]],
) -> dispatch.Op:
  """Defines an op that computes moments, which the TPU has a kernel for."""
  fn = getattr(ffi, name)
  return dispatch.Op(
    f"batch_stat_{name}",
    abstract_eval=abstract_eval,
    reference=getattr(reference, name),
    implementations=(
      _on_cpu(signature, fn),
      _on_cuda(signature, _with_workspace(fn), costs.sums_on_cuda),
      dispatch.Implementation(
        name="pallas",
        platforms=("tpu",),
        partitionable=False,
        fn=libraries.lazily(_PALLAS, name),
        unsupported=_by_name(
          signature, libraries.lazily(_PALLAS, "unsupported")
        ),
        slower=_by_name(signature, libraries.lazily(_PALLAS, "slower")),
      ),
    ),
    batching=_batching,
    partitioning=sharding.partitioning(signature, combine),
  )


UPDATE = _moments_op(
  "update", signatures.UPDATE, _update_avals, _combine_update
)
TRAIN = _moments_op("train", signatures.TRAIN, _train_avals, _combine_train)
MOMENTS = _moments_op(
  "moments", signatures.MOMENTS, _moments_avals, _combine_moments
)

NORMALIZE = dispatch.Op(
  "batch_stat_normalize",
  abstract_eval=_normalize_avals,
  reference=reference.normalize,
  implementations=(
    _on_cpu(signatures.NORMALIZE, ffi.normalize, costs.normalize_on_cpu),
    _on_cuda(signatures.NORMALIZE, ffi.normalize, costs.normalize_on_cuda),
  ),
  batching=_batching,
  partitioning=sharding.partitioning(signatures.NORMALIZE),
)

GRAD_SUMS = dispatch.Op(
  "batch_stat_grad_sums",
  abstract_eval=_grad_sums_avals,
  reference=reference.grad_sums,
  implementations=(
    _on_cpu(signatures.GRAD_SUMS, ffi.grad_sums),
    _on_cuda(
      signatures.GRAD_SUMS,
      _with_workspace(ffi.grad_sums),
      costs.grad_sums_on_cuda,
    ),
  ),
  batching=_batching,
  partitioning=sharding.partitioning(signatures.GRAD_SUMS, _combine_sums),
)

GRAD_INPUT = dispatch.Op(
  "batch_stat_grad_input",
  abstract_eval=_grad_input_avals,
  reference=reference.grad_input,
  implementations=(
    _on_cpu(signatures.GRAD_INPUT, ffi.grad_input, costs.grad_input_on_cpu),
    _on_cuda(signatures.GRAD_INPUT, ffi.grad_input, costs.grad_input_on_cuda),
  ),
  batching=_batching,
  partitioning=sharding.partitioning(signatures.GRAD_INPUT),
)

for _op in (UPDATE, TRAIN, MOMENTS, NORMALIZE, GRAD_SUMS, GRAD_INPUT):
  jax_private.add_checkify_rule(_op.primitive, results=True)
