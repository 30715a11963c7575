"""The cache update in plain JAX: correct on every platform."""

from collections.abc import Sequence
from typing import Any

import jax

from ..cache import addressing, rows

# The primitive's operands, in the handlers' order. The scales are there for
# quantised caches alone.
OPERANDS = (
  "cache_k", "cache_v", "new_k", "new_v", "index", "count", "layer", "table",
  "first_slot", "k_scale", "v_scale",
)  # fmt: skip


def named(operands: Sequence[Any]) -> dict[str, Any]:
  """Returns the primitive's operands by name."""
  return dict(zip(OPERANDS, operands))


def update(*operands: jax.Array, **params: Any) -> tuple[jax.Array, jax.Array]:
  """Writes new rows with one scatter.

  Args:
    *operands: See `OPERANDS`, and `rows.write` for their shapes.
    **params: The fields of `addressing.Addressing`.

  Returns:
    The updated caches.
  """
  return rows.write(named(operands), addressing.Addressing(**params))
