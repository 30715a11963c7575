"""The handlers of matmul, and how they are called."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ..common import arrays, libraries
from . import operands as operands_lib

TARGET_MULTIPLY = "fused_nnx_matmul_multiply_1"
TARGET_MULTIPLY_TRANSPOSED = "fused_nnx_matmul_multiply_transposed_1"
TARGET_MULTIPLY_PACKED = "fused_nnx_matmul_multiply_packed_1"

# What the extension calls its handlers.
HANDLERS = {
  TARGET_MULTIPLY: "multiply",
  TARGET_MULTIPLY_TRANSPOSED: "multiply_transposed",
  TARGET_MULTIPLY_PACKED: "multiply_packed",
}

LIBRARY = libraries.Library(f"{__package__}.cpu._matmul_cpu", HANDLERS)

_DTYPES = ("float32", "bfloat16", "float16")


def multiply(
  *operands: jax.Array,
  target: str = TARGET_MULTIPLY,
  form: operands_lib.Form = operands_lib.Form.MATRIX,
  batch_axes: int,
  dtype: Any,
  precision: Any,
) -> Sequence[jax.Array]:
  """Calls the handler of `reference.multiply`.

  Args:
    *operands: As of the reference.
    target: Of the handler.
    form: Of the weights.
    batch_axes: As of the reference.
    dtype: As of the reference.
    precision: Float32's, whatever it says.
  """
  del precision
  x, w = operands[:2]
  _, n = form.matrix(w.shape)
  out = jax.ShapeDtypeStruct((*x.shape[:-1], n), dtype)
  call = jax.ffi.ffi_call(target, (out,))
  return call(*operands, batch_axes=np.int64(batch_axes))


def multiply_transposed(
  *operands: jax.Array, **params: Any
) -> Sequence[jax.Array]:
  """Calls the handler of `reference.multiply_transposed`; see `multiply`."""
  form = operands_lib.Form.TRANSPOSED
  return multiply(
    *operands, target=TARGET_MULTIPLY_TRANSPOSED, form=form, **params
  )


def multiply_packed(*operands: jax.Array, **params: Any) -> Sequence[jax.Array]:
  """Calls the handler of `reference.multiply_packed`; see `multiply`."""
  return multiply(*operands, target=TARGET_MULTIPLY_PACKED, **params)


def unsupported(
  avals: Sequence[Any], *, form: operands_lib.Form, dtype: Any, **params: Any
) -> str | None:
  """Returns why the handlers cannot take these, or None.

  Args:
    avals: Of the operands.
    form: Of the weights; packed ones have dtypes that are right.
    dtype: Of the result.
    **params: Other parameters of the op.
  """
  del params
  x, weights, bias = form.parts(avals)
  packed = form is operands_lib.Form.PACKED
  for name, aval in (("x", x), ("w", weights[0]), ("bias", bias)):
    if aval is None:
      continue
    if aval.dtype.name not in _DTYPES and not (packed and name == "w"):
      return f"`{name}` is {aval.dtype.name}"
    if arrays.static_size(aval.shape) == 0:
      return f"`{name}` of shape {aval.shape} is empty"
  if np.dtype(dtype).name not in _DTYPES:
    return f"the result is {np.dtype(dtype).name}"
  return None
