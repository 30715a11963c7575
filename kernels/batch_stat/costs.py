"""Where XLA is expected to be faster than the kernels.

It makes one fusion of what is elementwise and its neighbours, which a custom
call keeps apart, each with a write and a read of a whole array; and some sums
it does at the memory's speed.

Each function returns why XLA is faster for some operands, or None. They are
given the operands' abstract values by name, as `signatures` has them.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ..common import arrays

_FUSES = "XLA makes one fusion of it and what follows"

# Bytes of x from which going over memory once more costs the CPU more than a
# call into a library.
_FUSED_BYTES = 2**17

# Bytes of x from which a GPU is faster with the kernels. Below, launches are
# what counts: on an H200, 2 MB took 1.07 times as long as with XLA, 6.4 MB 0.7
# to 1.2 times, most often less.
_SUMMED_BYTES = 2**22


def _is_small(x: Any, least_bytes: int) -> bool:
  size = arrays.static_size(x.shape)
  return size is not None and size * x.dtype.itemsize < least_bytes


def normalize_on_cpu(
  x: Mapping[str, Any], *, relu: bool, **params: Any
) -> str | None:
  """Says where XLA's fusion is faster than the CPU's kernel that normalises.

  After relu most often nothing elementwise follows, and XLA takes longer in
  half precision.

  Args:
    x: Operands by name.
    relu: Of the op.
    **params: Other parameters of the op.
  """
  del params
  batch = x["x"]
  half = batch.dtype.itemsize == 2
  return None if _is_small(batch, _FUSED_BYTES) or (relu and half) else _FUSES


def grad_input_on_cpu(x: Mapping[str, Any], **params: Any) -> str | None:
  """Says the same of dx, which XLA takes longer for in half precision."""
  del params
  batch = x["x"]
  half = batch.dtype.itemsize == 2
  return None if _is_small(batch, _FUSED_BYTES) or half else _FUSES


def sums_on_cuda(
  x: Mapping[str, Any],
  *,
  feature_axis: int,
  accurate: bool = False,
  **params: Any,
) -> str | None:
  """Says where XLA sums as fast on a GPU, and takes in what makes x.

  Args:
    x: Operands by name.
    feature_axis: Of the op.
    accurate: Of the op.
    **params: Other parameters of the op.
  """
  del params
  batch = x["x"]
  if batch.dtype == jnp.float32:
    return "XLA sums float32 as fast, in one fusion with what makes it"
  if accurate:
    return "XLA sums faster in two passes"
  if "mask" in x:
    return "XLA sums faster under a mask"
  if arrays.static_size(batch.shape[feature_axis + 1 :]) != 1:
    return "XLA sums faster where features are not last"
  if _is_small(batch, _SUMMED_BYTES):
    return f"XLA sums less than {_SUMMED_BYTES >> 20} MiB with fewer launches"
  return None


def grad_sums_on_cuda(
  x: Mapping[str, Any], *, relu: bool, **params: Any
) -> str | None:
  """Says the same of the gradient's sums.

  Without relu in it, dy most often comes from an activation's gradient.

  Args:
    x: Operands by name.
    relu: Of the op.
    **params: Other parameters of the op.
  """
  if not relu:
    return "XLA makes one fusion of the sums and what makes dy"
  return sums_on_cuda(x, **params)


def normalize_on_cuda(
  x: Mapping[str, Any], *, relu: bool, **params: Any
) -> str | None:
  """Says where XLA's fusion is faster than CUDA's kernel that normalises.

  Args:
    x: Operands by name.
    relu: Of the op.
    **params: Other parameters of the op.
  """
  del params
  batch = x["x"]
  if not relu or batch.dtype.itemsize > 2:
    return _FUSES
  if _is_small(batch, _SUMMED_BYTES):
    return f"XLA is as fast for less than {_SUMMED_BYTES >> 20} MiB"
  return None


def grad_input_on_cuda(x: Mapping[str, Any], **params: Any) -> str | None:
  """Says that XLA's fusion is faster than CUDA's kernel for dx."""
  del x, params
  return _FUSES
