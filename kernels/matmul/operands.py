"""What the operands of the product's primitives are.

They are x, the weights, and perhaps the bias.
"""

from collections.abc import Sequence
import enum
from typing import Any

import jax
import jax.numpy as jnp


class Form(enum.Enum):
  """How the weights of a product are given.

  Attributes:
    MATRIX: One array, `[batch axes..., k, n]`.
    TRANSPOSED: One array, `[batch axes..., n, k]`.
    PACKED: The arrays of `quantization.QuantizedWeight`.
  """

  MATRIX = enum.auto()
  TRANSPOSED = enum.auto()
  PACKED = enum.auto()

  def parts(self, operands: Sequence[Any]) -> tuple[Any, tuple[Any, ...], Any]:
    """Tells operands apart.

    Args:
      operands: Arrays or what is known of them.

    Returns:
      x; the weights, one array or a few; and the bias or None.
    """
    x, *rest = operands
    count = 1
    if self is Form.PACKED:
      count = 3 if rest[0].dtype == jnp.uint32 else 2
    bias = rest[count] if len(rest) > count else None
    return x, tuple(rest[:count]), bias

  def matrix(self, axes: Sequence[Any]) -> tuple[Any, Any]:
    """Returns what there is for k and for n, given it for each axis of w."""
    first, last = axes[-2:]
    return (last, first) if self is Form.TRANSPOSED else (first, last)

  def axes(self, k: Any, n: Any) -> tuple[Any, Any]:
    """Puts what there is for k and for n in the order of the axes of w."""
    return self.matrix((k, n))


def expand_bias(bias: jax.Array, rank: int, batch_axes: int) -> jax.Array:
  """Gives a bias the rank of a result, so that it broadcasts against it."""
  return jnp.expand_dims(bias, tuple(range(batch_axes, rank - 1)))
