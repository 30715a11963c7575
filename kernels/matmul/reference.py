"""The plain JAX form of the product, which every platform can run.

Throughout, `x` is `[batch axes..., ..., k]`, `w` is `[batch axes..., k, n]` and
`bias` is `[batch axes..., n]`, with `batch_axes` leading axes that are
independent products.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from . import sharding


def multiply(
  x: jax.Array,
  w: jax.Array,
  bias: jax.Array | None = None,
  *,
  batch_axes: int,
  dtype: Any,
  precision: Any,
) -> tuple[jax.Array]:
  """Computes `x @ w + bias`.

  Args:
    x: `[..., k]`, floating.
    w: `[k, n]`, floating.
    bias: `[n]`, floating, or None.
    batch_axes: Number of leading axes that are independent products.
    dtype: Of the result.
    precision: As in `jax.lax.dot_general`; a name, a pair of names, or None.

  Returns:
    A tuple of one array `[..., n]`.
  """
  common = jnp.promote_types(x.dtype, w.dtype)
  batch = tuple(range(batch_axes))
  y = lax.dot_general(
    x.astype(common),
    w.astype(common),
    (((x.ndim - 1,), (batch_axes,)), (batch, batch)),
    precision=precision,
    preferred_element_type=dtype,
    out_sharding=sharding.of_result(jax.typeof(x), jax.typeof(w), batch_axes),
  )
  if bias is not None:
    y = y + expand_bias(bias, y.ndim, batch_axes).astype(dtype)
  return (y,)


def expand_bias(bias: jax.Array, rank: int, batch_axes: int) -> jax.Array:
  """Gives a bias the rank of a result, so that it broadcasts against it."""
  return jnp.expand_dims(bias, tuple(range(batch_axes, rank - 1)))
