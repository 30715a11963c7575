"""Activation functions: those of jax, by their names there, and PReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.nn import celu as celu
from jax.nn import elu as elu
from jax.nn import gelu as gelu
from jax.nn import glu as glu
from jax.nn import hard_sigmoid as hard_sigmoid
from jax.nn import hard_silu as hard_silu
from jax.nn import hard_swish as hard_swish
from jax.nn import hard_tanh as hard_tanh
from jax.nn import identity as identity
from jax.nn import leaky_relu as leaky_relu
from jax.nn import log_sigmoid as log_sigmoid
from jax.nn import log_softmax as log_softmax
from jax.nn import logsumexp as logsumexp
from jax.nn import one_hot as one_hot
from jax.nn import relu as relu
from jax.nn import relu6 as relu6
from jax.nn import selu as selu
from jax.nn import sigmoid as sigmoid
from jax.nn import silu as silu
from jax.nn import soft_sign as soft_sign
from jax.nn import softmax as softmax
from jax.nn import softplus as softplus
from jax.nn import standardize as standardize
from jax.nn import swish as swish
import jax.numpy as jnp
from jax.numpy import tanh as tanh

from nnx import eager
from nnx.module import Module
from nnx.nn import dtypes
from nnx.nn.initializers import NO_METADATA
from nnx.variablelib import Param


class PReLU(Module):
  """A rectifier whose negative slope is learned.

      y = jnp.where(x >= 0, x, negative_slope * x)

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> nnx.PReLU(0.5)(jnp.array([-2.0, 2.0]))
    Array([-1.,  2.], dtype=float32)

  Args:
    negative_slope_init: The first slope.
    dtype: The dtype to compute in; the input's, if None, also where the
      parameter's is wider.
    param_dtype: The dtype of the parameter.
    promote_dtype: Converts input and slope to `dtype`, if that is not None.
    negative_slope_metadata: Metadata of the parameter.

  Attributes:
    negative_slope: `Param`, `[]`.
  """

  def __init__(
    self,
    negative_slope_init: float = 0.01,
    *,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    negative_slope_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    self.negative_slope = Param(
      jnp.asarray(negative_slope_init, dtype=param_dtype),
      **negative_slope_metadata,
    )
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.promote_dtype = promote_dtype

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the rectifier.

    Args:
      inputs: `[...]`, floating.

    Returns:
      An array of the shape of `inputs`.
    """
    slope = self.negative_slope[...]
    if self.dtype is None:
      return _prelu_in_dtype_of_inputs(inputs, slope)
    return _prelu(*self.promote_dtype((inputs, slope), dtype=self.dtype))


def _prelu(inputs: jax.Array, slope: jax.Array) -> jax.Array:
  return jnp.where(inputs >= 0, inputs, slope * inputs)


@eager.compiled
def _prelu_in_dtype_of_inputs(inputs: jax.Array, slope: jax.Array) -> jax.Array:
  inputs = jnp.asarray(inputs)
  return _prelu(inputs, slope.astype(inputs.dtype))
