"""Checks of the arguments of the cache update."""

from typing import Any

import jax

from ..cache import checks, violations
from ..common import options


def canonicalize(
  request: checks.Request, new_k: Any, new_v: Any
) -> tuple[checks.Cache, jax.Array, jax.Array]:
  """Checks everything that an update is given.

  Args:
    request: The cache and its addressing.
    new_k: `[b, t, n, h]` or `[b, n, t, h]`.
    new_v: Like `new_k`.

  Returns:
    The cache in canonical form, and the new rows as arrays.

  Raises:
    TypeError: If a dtype does not fit.
    ValueError: If a shape or a value does not fit.
  """
  new_k = options.array("new_k", new_k)
  new_v = options.array("new_v", new_v)
  layout = request.layout
  checks.check_rank_of_rows(new_k, new_v, layout)
  batch, tokens = new_k.shape[0], new_k.shape[layout.tokens_axis]
  cache = checks.canonicalize(request, batch, tokens)
  checks.check_rows(cache, new_k, new_v, batch)
  violations.check_positions(cache, tokens)
  return cache, new_k, new_v
