"""The plain JAX form of the product, which every platform can run.

Throughout, `x` is `[batch axes..., ..., k]`, `w` is `[batch axes..., k, n]` and
`bias` is `[batch axes..., n]`, with `batch_axes` leading axes that are
independent products.
"""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from . import operands, quantization, sharding


def multiply(
  x: jax.Array,
  w: jax.Array,
  bias: jax.Array | None = None,
  *,
  form: operands.Form = operands.Form.MATRIX,
  batch_axes: int,
  dtype: Any,
  precision: Any,
) -> tuple[jax.Array]:
  """Computes `x @ w + bias`.

  Args:
    x: `[..., k]`, floating.
    w: `[k, n]`, floating, or `[n, k]`.
    bias: `[n]`, floating, or None.
    form: Of the weights; which of the two.
    batch_axes: Number of leading axes that are independent products.
    dtype: Of the result.
    precision: As in `jax.lax.dot_general`; a name, a pair of names, or None.

  Returns:
    A tuple of one array `[..., n]`.
  """
  common = jnp.promote_types(x.dtype, w.dtype)
  batch = tuple(range(batch_axes))
  k_axis, _ = form.matrix(range(w.ndim))
  # XLA rounds to the dtype of the factors before it converts to a narrow one.
  wide = dtype if dtype == common else jnp.promote_types(dtype, jnp.float32)
  y = lax.dot_general(
    x.astype(common),
    w.astype(common),
    (((x.ndim - 1,), (k_axis,)), (batch, batch)),
    precision=precision,
    preferred_element_type=wide,
    out_sharding=sharding.of_result(
      jax.typeof(x), jax.typeof(w), batch_axes, form
    ),
  )
  y = y.astype(dtype)
  if bias is not None:
    y = y + operands.expand_bias(bias, y.ndim, batch_axes).astype(dtype)
  return (y,)


def multiply_transposed(*args: jax.Array, **params: Any) -> tuple[jax.Array]:
  """Computes `x @ w.T + bias`, as `multiply` with w `[n, k]`."""
  return multiply(*args, form=operands.Form.TRANSPOSED, **params)


def multiply_packed(
  x: jax.Array,
  values: jax.Array,
  scale: jax.Array,
  *rest: jax.Array,
  batch_axes: int,
  dtype: Any,
  precision: Any,
) -> tuple[jax.Array]:
  """Computes `x @ w + bias` for packed weights, which it unpacks to x's dtype.

  Args:
    x: `[..., k]`, floating.
    values: As in `quantization.QuantizedWeight`.
    scale: The same.
    *rest: The minimum for weights of 4 bits, and then perhaps the bias, `[n]`.
    batch_axes: As in `multiply`.
    dtype: As in `multiply`.
    precision: As in `multiply`.

  Returns:
    A tuple of one array `[..., n]`.
  """
  _, packed, bias = operands.Form.PACKED.parts((x, values, scale, *rest))
  w = quantization.unpacked(*packed).astype(x.dtype)
  return multiply(
    x, w, bias, batch_axes=batch_axes, dtype=dtype, precision=precision
  )
