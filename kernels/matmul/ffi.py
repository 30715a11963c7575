"""The handlers of matmul, and how they are called."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ..common import arrays, libraries

TARGET_MULTIPLY = "fused_nnx_matmul_multiply"

# What the extension calls its handlers.
HANDLERS = {TARGET_MULTIPLY: "multiply"}

LIBRARY = libraries.Library(f"{__package__}.cpu._matmul_cpu", HANDLERS)

_DTYPES = ("float32", "bfloat16", "float16")


def multiply(
  *operands: jax.Array, batch_axes: int, dtype: Any, precision: Any
) -> Sequence[jax.Array]:
  """Calls the handler of `reference.multiply`.

  Args:
    *operands: As of the reference.
    batch_axes: As of the reference.
    dtype: As of the reference.
    precision: Float32's, whatever it says.
  """
  del precision
  x, w = operands[:2]
  out = jax.ShapeDtypeStruct((*x.shape[:-1], w.shape[-1]), dtype)
  call = jax.ffi.ffi_call(TARGET_MULTIPLY, (out,))
  return call(*operands, batch_axes=np.int64(batch_axes))


def unsupported(avals: Sequence[Any], *, dtype: Any, **params: Any):
  """Returns why the handler cannot take these, or None.

  Args:
    avals: Of the operands.
    dtype: Of the result.
    **params: Other parameters of the op.
  """
  del params
  for name, aval in zip(("x", "w", "bias"), avals):
    if aval.dtype.name not in _DTYPES:
      return f"`{name}` is {aval.dtype.name}"
    if arrays.static_size(aval.shape) == 0:
      return f"`{name}` of shape {aval.shape} is empty"
  if np.dtype(dtype).name not in _DTYPES:
    return f"the result is {np.dtype(dtype).name}"
  return None
