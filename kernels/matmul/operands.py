"""What the operands of the product's primitives are.

They are x, the weights, and perhaps the bias. Weights are one array, or those
of
`quantization.QuantizedWeight`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def parts(
  operands: Sequence[Any], packed: bool
) -> tuple[Any, tuple[Any, ...], Any]:
  """Tells operands apart.

  Args:
    operands: Arrays or what is known of them.
    packed: Whether the weights are.

  Returns:
    x; the weights, one array or a few; and the bias or None.
  """
  x, *rest = operands
  count = (3 if rest[0].dtype == jnp.uint32 else 2) if packed else 1
  return x, tuple(rest[:count]), rest[count] if len(rest) > count else None


def expand_bias(bias: jax.Array, rank: int, batch_axes: int) -> jax.Array:
  """Gives a bias the rank of a result, so that it broadcasts against it."""
  return jnp.expand_dims(bias, tuple(range(batch_axes, rank - 1)))
