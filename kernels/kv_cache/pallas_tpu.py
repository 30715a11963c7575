"""The cache update for TPUs in Pallas."""

from collections.abc import Sequence
from typing import Any

import jax

from ..cache import addressing, rows_tpu
from . import reference


def unsupported(avals: Sequence[Any], **params: Any) -> str | None:
  """Returns why the kernel cannot handle these operands, or None."""
  cache_k, cache_v, new_k = avals[:3]
  return rows_tpu.unsupported(cache_k, cache_v, new_k, params["layout"])


def update(
  *operands: jax.Array, interpret: Any = False, **params: Any
) -> tuple[jax.Array, jax.Array]:
  """Writes new rows in place; as `reference.update`.

  Args:
    *operands: As of the reference.
    interpret: Passed on to `pallas_call`.
    **params: As of the reference.

  Returns:
    The updated caches.
  """
  x = reference.named(operands)
  return rows_tpu.write(x, addressing.Addressing(**params), interpret)
