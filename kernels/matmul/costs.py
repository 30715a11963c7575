"""Where XLA is expected to be faster than the kernels.

Each function returns why XLA is faster for some operands, or None.
"""

from collections.abc import Sequence
from typing import Any

from ..common import arrays

# With more rows a product takes as long as the arithmetic does, in which XLA
# is as good: it multiplies weights that it has packed.
MOST_ROWS = 32

# The same of float32 weights that stay in a cache, where XLA is as good sooner.
MOST_ROWS_FLOAT32 = 4

# Numbers in float32 weights from which reading them is what takes long.
UNCACHED_SIZE = 2**21

# Packed weights XLA unpacks into memory first.
MOST_ROWS_PACKED = 128

# Numbers in the weights below which a call into a library is what it costs.
LEAST_SIZE = 2**12

# Numbers in the weights from which XLA reads float32 as fast for a single row.
LARGE_SIZE = 2**22


def on_cpu(
  avals: Sequence[Any], *, packed: bool, batch_axes: int, **params: Any
) -> str | None:
  """Says where XLA multiplies faster on the CPU.

  Args:
    avals: Of the operands.
    packed: Whether the weights are.
    batch_axes: Of the op.
    **params: Other parameters of the op.
  """
  del params
  x, w = avals[:2]
  rows = arrays.static_size(x.shape[batch_axes:-1])
  if rows is None:
    return "it is not known that the rows are few"
  most = MOST_ROWS_PACKED if packed else MOST_ROWS
  if rows > most:
    return f"XLA multiplies more than {most} rows as fast"
  size = arrays.static_size((x.shape[-1], w.shape[-1]))
  if size is not None and size < LEAST_SIZE:
    return f"XLA needs no call for weights of less than {LEAST_SIZE} numbers"
  if w.dtype.name != "float32":
    return None
  if rows == 1 and (size is None or size >= LARGE_SIZE):
    return "XLA reads large weights of float32 as fast for one row"
  most = MOST_ROWS_FLOAT32
  if rows > most and size is not None and size < UNCACHED_SIZE:
    return f"XLA multiplies more than {most} rows of float32 as fast"
  return None
