"""Linear maps of features: `Linear`, `LinearGeneral`, `Einsum`.

The arithmetic is in functions of arrays. With the default `promote_dtype` and
product they run as `nnx.eager` says: outside of traces each is one compiled
call. With other functions, which may do anything, they run as written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from nnx import eager
from nnx.module import Module
from nnx.nn import checks, dtypes
from nnx.nn.einsum import Einsum as Einsum
from nnx.nn.einsum import einsum as einsum
from nnx.nn.initializers import NO_METADATA, Initializer, initialize
from nnx.nn.initializers import default_bias_init as default_bias_init
from nnx.nn.initializers import default_kernel_init as default_kernel_init
from nnx.nn.linear_general import AxisSizes as AxisSizes
from nnx.nn.linear_general import LinearGeneral as LinearGeneral
from nnx.nn.linear_general import linear_general as linear_general
from nnx.nn.products import DotGeneral as DotGeneral
from nnx.nn.products import dot
from nnx.rnglib import Rngs
from nnx.variablelib import Param

# As it was imported, and the layer's default; see `eager.current`.
_DOT_GENERAL = lax.dot_general


def _over_last_axes(bias: jax.Array, rank: int) -> jax.Array:
  """Gives a bias leading axes of 1, so that it adds without rank promotion."""
  return jnp.reshape(bias, (1,) * (rank - bias.ndim) + bias.shape)


def linear(
  inputs: Any,
  kernel: jax.Array,
  bias: jax.Array | None,
  dtype: dtypes.Dtype | None = None,
  precision: Any = None,
  preferred_element_type: dtypes.Dtype | None = None,
  out_sharding: Any = None,
  promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
  dot_general: DotGeneral = lax.dot_general,
) -> jax.Array:
  """Multiplies the last axis by a matrix and adds a bias.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn.linear import linear
    >>> linear(jnp.ones((1, 2)), jnp.ones((2, 3)), jnp.ones(3))
    Array([[3., 3., 3.]], dtype=float32)

  Args:
    inputs: `[..., k]`.
    kernel: `[k, c]`.
    bias: `[c]` or None.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    precision: Precision of the product, as in `jax.lax.dot_general`.
    preferred_element_type: The dtype of the product, likewise.
    out_sharding: The sharding of the product, likewise.
    promote_dtype: Converts the three arrays to `dtype`.
    dot_general: The product; gets `preferred_element_type` only if it is set.

  Returns:
    `[..., c]`.
  """
  inputs, kernel, bias = promote_dtype((inputs, kernel, bias), dtype=dtype)
  y = dot(
    inputs,
    kernel,
    (((inputs.ndim - 1,), (0,)), ((), ())),
    dot_general=dot_general,
    precision=precision,
    preferred_element_type=preferred_element_type,
    out_sharding=out_sharding,
  )
  return y if bias is None else y + _over_last_axes(bias, y.ndim)


_linear = eager.compiled(
  linear,
  static=("dtype", "precision", "preferred_element_type", "out_sharding"),
)


class Linear(Module):
  """Multiplies the last axis by a learned matrix and adds a learned bias.

      y = inputs @ kernel + bias

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> print(jax.tree.map(jnp.shape, nnx.state(layer)))
    State({
      'bias': VariableState(
        type=Param,
        value=(3,)
      ),
      'kernel': VariableState(
        type=Param,
        value=(2, 3)
      )
    })
    >>> layer(jnp.ones((5, 2))).shape
    (5, 3)

  Args:
    in_features: k, the size of the last axis of the input.
    out_features: c, that of the output.
    use_bias: Whether there is a bias.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    param_dtype: The dtype of the parameters.
    precision: Precision of the product, as in `jax.lax.dot_general`.
    kernel_init: `(key, shape, dtype) -> kernel`.
    bias_init: `(key, shape, dtype) -> bias`.
    dot_general: Called in place of `jax.lax.dot_general`.
    promote_dtype: `((inputs, kernel, bias), dtype=dtype)`; returns those three
      in the dtype to compute in.
    preferred_element_type: The dtype of the product, as in
      `jax.lax.dot_general`.
    rngs: The stream `params` gives the keys of kernel and bias.
    kernel_metadata: Metadata of the kernel.
    bias_metadata: Metadata of the bias.

  Attributes:
    kernel: `Param`, `[k, c]`.
    bias: `Param`, `[c]`, or None.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    *,
    use_bias: bool = True,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    precision: Any = None,
    kernel_init: Initializer = default_kernel_init,
    bias_init: Initializer = default_bias_init,
    dot_general: DotGeneral = lax.dot_general,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    preferred_element_type: dtypes.Dtype | None = None,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = NO_METADATA,
    bias_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    checks.whole("in_features", in_features)
    checks.whole("out_features", out_features)
    self.kernel = Param(
      initialize(
        kernel_init, checks.key(rngs), (in_features, out_features), param_dtype
      ),
      **kernel_metadata,
    )
    self.bias = None
    if use_bias:
      self.bias = Param(
        initialize(bias_init, checks.key(rngs), (out_features,), param_dtype),
        **bias_metadata,
      )
    self.in_features = in_features
    self.out_features = out_features
    self.use_bias = use_bias
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.precision = precision
    self.dot_general = dot_general
    self.promote_dtype = promote_dtype
    self.preferred_element_type = preferred_element_type

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Applies the layer.

    Args:
      inputs: `[..., k]`.
      out_sharding: The sharding of the product, under a mesh with explicit
        axes.

    Returns:
      `[..., c]`.

    Raises:
      ValueError: If the last axis of `inputs` has another size.
    """
    arguments = (
      inputs,
      self.kernel[...],
      None if self.bias is None else self.bias[...],
      self.dtype,
      self.precision,
      self.preferred_element_type,
      out_sharding,
    )
    try:
      if (
        self.promote_dtype is dtypes.promote_dtype
        and self.dot_general is _DOT_GENERAL
      ):
        return _linear(*arguments)
      return linear(*arguments, self.promote_dtype, self.dot_general)
    except (TypeError, ValueError):
      checks.last_axis(self, "inputs", inputs, self.kernel.shape[0])
      raise
