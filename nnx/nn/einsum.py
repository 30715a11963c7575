"""`Einsum`: multiplies its input by a kernel as an equation says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nnx import eager
from nnx.module import Module
from nnx.nn import checks, dtypes
from nnx.nn.initializers import (
  NO_METADATA,
  Initializer,
  default_bias_init,
  default_kernel_init,
  initialize,
)
from nnx.nn.products import as_tuple, few_rows, product_options
from nnx.rnglib import Rngs
from nnx.variablelib import Param

# As it was imported, and the layer's default; see `eager.current`.
_EINSUM = jnp.einsum


def _parse_equation(equation: str) -> tuple[str, str, str]:
  """Splits an equation into the labels of inputs, kernel and result."""
  equation = equation.replace(" ", "")
  if "->" not in equation:
    raise ValueError(
      "`einsum_str` must have the result after `->`, but got"
      f" `{equation}`. Write it as in 'nta,hab->nthb'."
    )
  operands, result = equation.split("->", 1)
  if operands.count(",") != 1:
    raise ValueError(
      "`einsum_str` must have two operands, the inputs and the kernel, but got"
      f" {operands.count(',') + 1} in `{equation}`."
    )
  inputs, kernel = operands.split(",")
  return inputs, kernel, result


def _contracted(equation: str) -> int:
  """Returns how many axes a product contracts; 0, if it is none of matrices.

  That is one of the last axes of the inputs with the first of the kernel.
  """
  inputs, kernel, result = _parse_equation(equation)
  labels = inputs.replace("...", "") + kernel
  for axes in range(1, len(kernel) + 1):
    shared, out = kernel[:axes], kernel[axes:]
    rest = inputs.removesuffix(shared)
    if rest != inputs and result == rest + out and "..." not in kernel:
      return axes if len(set(labels)) == len(labels) - axes else 0
  return 0


def _expand_labels(labels: str, rank: int) -> list[Any]:
  """Returns a label for each axis; an ellipsis gives negative ints."""
  if "..." not in labels:
    return list(labels)
  before, after = labels.split("...", 1)
  hidden = rank - len(before) - len(after)
  return [*before, *range(-hidden, 0), *after]


def _bias_shape(
  equation: str, inputs_rank: int, kernel_shape: Sequence[int]
) -> list[int]:
  """Returns the shape in which the bias broadcasts to the result."""
  inputs, kernel, result = _parse_equation(equation)
  kernel_labels = _expand_labels(kernel, len(kernel_shape))
  sizes = dict(zip(kernel_labels, kernel_shape))
  hidden = [
    sum(isinstance(label, int) for label in labels)
    for labels in (_expand_labels(inputs, inputs_rank), kernel_labels)
  ]
  rank = len(result.replace("...", ""))
  if "..." in result:
    rank += max(hidden)
  return [sizes.get(label, 1) for label in _expand_labels(result, rank)]


def einsum(
  inputs: Any,
  kernel: jax.Array,
  bias: jax.Array | None,
  equation: str,
  kernel_shape: tuple[int, ...],
  dtype: dtypes.Dtype | None = None,
  precision: Any = None,
  preferred_element_type: dtypes.Dtype | None = None,
  out_sharding: Any = None,
  promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
  einsum_op: Callable[..., jax.Array] = jnp.einsum,
) -> jax.Array:
  """Multiplies by a kernel as an equation says and adds a bias.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn.linear import einsum
    >>> x, kernel = jnp.ones((5, 2)), jnp.ones((2, 3))
    >>> einsum(x, kernel, jnp.ones(3), "na,ab->nb", (2, 3)).shape
    (5, 3)

  Args:
    inputs: The first operand.
    kernel: The second operand.
    bias: None, or as many elements as the axes of the result that come from
      the kernel have.
    equation: As in `jnp.einsum`, with `->`.
    kernel_shape: The shape of the kernel.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    precision: Precision of the product, as in `jnp.einsum`.
    preferred_element_type: The dtype of the product, likewise.
    out_sharding: The sharding of the product, likewise.
    promote_dtype: Converts the three arrays to `dtype`.
    einsum_op: The product; gets `preferred_element_type` only if it is set.

  Returns:
    An array with the axes that the equation says.
  """
  inputs, kernel, bias = promote_dtype((inputs, kernel, bias), dtype=dtype)
  function = eager.current(einsum_op)
  options = product_options(precision, preferred_element_type, out_sharding)
  axes = _contracted(equation) if function is _EINSUM else 0
  y = few_rows(inputs, kernel, axes, **options) if axes else None
  if y is None:
    y = function(equation, inputs, kernel, **options)
  if bias is None:
    return y
  return y + jnp.reshape(bias, _bias_shape(equation, inputs.ndim, kernel_shape))


_einsum = eager.compiled(
  einsum,
  static=(
    "equation",
    "kernel_shape",
    "dtype",
    "precision",
    "preferred_element_type",
    "out_sharding",
  ),
)


class Einsum(Module):
  """Multiplies by a learned kernel as an equation says, and adds a bias.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((16, 11, 2))).shape
    (16, 11, 8, 4)

  Args:
    einsum_str: The equation as in `jnp.einsum`, with `->`; its first operand is
      the input, its second the kernel. None, if each call gives it.
    kernel_shape: The shape of the kernel.
    bias_shape: The shape of the bias: the axes of the result that come from the
      kernel, or the size of the only one. There is none, if None.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    param_dtype: The dtype of the parameters.
    precision: Precision of the product, as in `jnp.einsum`.
    kernel_init: `(key, shape, dtype) -> kernel`.
    bias_init: `(key, shape, dtype) -> bias`.
    promote_dtype: `((inputs, kernel, bias), dtype=dtype)`; returns those three
      in the dtype to compute in.
    einsum_op: Called in place of `jnp.einsum`.
    preferred_element_type: The dtype of the product, as in `jnp.einsum`.
    rngs: The stream `params` gives the keys of kernel and bias.
    kernel_metadata: Metadata of the kernel.
    bias_metadata: Metadata of the bias.

  Attributes:
    kernel: `Param`, `[*kernel_shape]`.
    bias: `Param`, `[*bias_shape]`, or None.

  Raises:
    ValueError: If the equation has no `->` or not two operands.
  """

  def __init__(
    self,
    einsum_str: str | None,
    kernel_shape: Sequence[int],
    bias_shape: Sequence[int] | int | None = None,
    *,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    precision: Any = None,
    kernel_init: Initializer = default_kernel_init,
    bias_init: Initializer = default_bias_init,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    einsum_op: Callable[..., jax.Array] = jnp.einsum,
    preferred_element_type: dtypes.Dtype | None = None,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = NO_METADATA,
    bias_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    if einsum_str is not None:
      einsum_str = einsum_str.replace(" ", "")
      _parse_equation(einsum_str)
    checks.wholes("kernel_shape", kernel_shape)
    checks.wholes("bias_shape", () if bias_shape is None else bias_shape)
    self.kernel = Param(
      initialize(kernel_init, checks.key(rngs), kernel_shape, param_dtype),
      **kernel_metadata,
    )
    self.bias = None
    if bias_shape is not None:
      bias_shape = as_tuple(bias_shape)
      self.bias = Param(
        initialize(bias_init, checks.key(rngs), bias_shape, param_dtype),
        **bias_metadata,
      )
    self.einsum_str = einsum_str
    self.kernel_shape = tuple(kernel_shape)
    self.bias_shape = bias_shape
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.precision = precision
    self.promote_dtype = promote_dtype
    self.einsum_op = einsum_op
    self.preferred_element_type = preferred_element_type

  def __call__(
    self,
    inputs: jax.Array,
    einsum_str: str | None = None,
    out_sharding: Any = None,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      inputs: The first operand.
      einsum_str: The equation, in place of the constructor's.
      out_sharding: The sharding of the product, under a mesh with explicit
        axes.

    Returns:
      An array with the axes that the equation says.

    Raises:
      ValueError: If there is no equation, or one that the constructor refuses.
    """
    if einsum_str is None:
      einsum_str = self.einsum_str
      if einsum_str is None:
        raise ValueError(
          "`Einsum` must get `einsum_str` from its constructor or its call, but"
          " both are None."
        )
    else:
      einsum_str = einsum_str.replace(" ", "")
      _parse_equation(einsum_str)
    arguments = (
      inputs,
      self.kernel[...],
      None if self.bias is None else self.bias[...],
      einsum_str,
      self.kernel_shape,
      self.dtype,
      self.precision,
      self.preferred_element_type,
      out_sharding,
    )
    if self.promote_dtype is dtypes.promote_dtype and self.einsum_op is _EINSUM:
      return _einsum(*arguments)
    return einsum(*arguments, self.promote_dtype, self.einsum_op)
