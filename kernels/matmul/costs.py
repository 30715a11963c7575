"""Where XLA is expected to be faster than the kernels.

Each function returns why XLA is faster for some operands, or None.
"""

from collections.abc import Sequence
from typing import Any

from ..common import arrays
from . import ffi, operands

# With more rows a product takes as long as the arithmetic does, in which XLA
# is as good: it multiplies weights that it has packed.
MOST_ROWS = 32

# The same of float32 weights that stay in a cache, where XLA is as good sooner.
MOST_ROWS_FLOAT32 = 4

# Numbers in float32 weights from which reading them is what takes long.
UNCACHED_SIZE = 2**21

# Packed weights XLA unpacks into memory first.
MOST_ROWS_PACKED = 128

# Small ones of 4 bits it unpacks in the time of fewer rows.
MOST_ROWS_INT4 = 16

# The level at which the kernels multiply pairs of bfloat16, faster than XLA,
# which multiplies float32, whatever the number of rows.
PAIRS = "avx512_bf16"
OF_PAIRS = ("bfloat16", "int8", "uint32", "float8_e4m3fn")

# Numbers in the weights below which a call into a library is what it costs.
LEAST_SIZE = 2**12

# Numbers in the weights from which XLA reads float32, as they are or their
# transpose, as fast for a single row.
LARGE_SIZE = 2**22

# Rows up to which XLA multiplies the transpose of large weights of float32
# slower.
MOST_ROWS_TRANSPOSED = 8


def _pairs(x: Any, w: Any, form: operands.Form) -> bool:
  """Tells whether this machine's kernel multiplies many rows as pairs."""
  return (
    form is not operands.Form.TRANSPOSED
    and x.dtype.name == "bfloat16"
    and w.dtype.name in OF_PAIRS
    and ffi.LIBRARY.missing() is None
    and ffi.LIBRARY.load().simd_level() == PAIRS
  )


def on_cpu(
  avals: Sequence[Any],
  *,
  form: operands.Form,
  batch_axes: int,
  **params: Any,
) -> str | None:
  """Says where XLA multiplies faster on the CPU.

  Args:
    avals: Of the operands.
    form: Of the weights.
    batch_axes: Of the op.
    **params: Other parameters of the op.
  """
  del params
  x, w = avals[:2]
  rows = arrays.static_size(x.shape[batch_axes:-1])
  if rows is None:
    return "it is not known that the rows are few"
  most = MOST_ROWS_PACKED if form is operands.Form.PACKED else MOST_ROWS
  pairs = _pairs(x, w, form)
  if rows > most and not pairs:
    return f"XLA multiplies more than {most} rows as fast"
  _, n = form.matrix(w.shape)
  size = arrays.static_size((x.shape[-1], n))
  if size is not None and size < LEAST_SIZE:
    return f"XLA needs no call for weights of less than {LEAST_SIZE} numbers"
  large = size is None or size >= LARGE_SIZE
  if form is operands.Form.TRANSPOSED:
    if w.dtype.name != "float32" or not large:
      return None
    if rows == 1:
      return "XLA reads large weights of float32 as fast for one row"
    if rows > MOST_ROWS_TRANSPOSED:
      return f"XLA multiplies more than {MOST_ROWS_TRANSPOSED} rows as fast"
    return None
  if pairs:
    return None
  in_cache = size is not None and size < UNCACHED_SIZE
  if w.dtype.name == "uint32" and rows > MOST_ROWS_INT4 and in_cache:
    return f"XLA multiplies more than {MOST_ROWS_INT4} rows of 4 bits as fast"
  if w.dtype.name != "float32":
    return None
  if rows == 1 and large:
    return "XLA reads large weights of float32 as fast for one row"
  most = MOST_ROWS_FLOAT32
  if rows > most and in_cache:
    return f"XLA multiplies more than {most} rows of float32 as fast"
  return None
