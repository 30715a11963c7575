"""The base of the normalising layers, and the options of their arithmetic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nnx import eager
from nnx.module import Module
from nnx.nn import checks, dtypes
from nnx.nn.initializers import Initializer, initialize
from nnx.rnglib import Rngs
from nnx.variablelib import Param


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
  """How a layer normalises: the arguments of its arithmetic but the arrays.

  Attributes:
    dtype: The dtype of the result; of inputs and parameters, if None.
    epsilon: Added to the variance.
    axis_name: A mapped axis that statistics are taken over as well.
    axis_index_groups: Groups of indices along it, as tuples; or None.
    use_fast_variance: Whether one pass over the input computes the variance.
    promote_dtype: Converts input and parameters to the dtype to compute in.
  """

  dtype: dtypes.Dtype | None
  epsilon: float
  axis_name: Any
  axis_index_groups: Any
  use_fast_variance: bool
  promote_dtype: dtypes.PromoteDtypeFn


_options = eager.interned(Options)


def make_vector(
  used: bool,
  init: Initializer,
  rngs: Rngs,
  num_features: int,
  dtype: dtypes.Dtype,
  metadata: Mapping[str, Any],
) -> Param[jax.Array] | None:
  """Makes a scale or a bias, or nothing for a layer that uses none.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> from nnx.nn import norm_base
    >>> ones = nnx.initializers.ones
    >>> norm_base.make_vector(True, ones, nnx.Rngs(0), 2, jnp.float32, {}).value
    Array([1., 1.], dtype=float32)

  Args:
    used: Whether the layer uses it.
    init: `(key, shape, dtype) -> value`.
    rngs: The stream `params` gives the key.
    num_features: The size of the vector.
    dtype: The dtype of the vector.
    metadata: The metadata of the parameter.
  """
  if not used:
    return None
  value = initialize(init, checks.key(rngs), (num_features,), dtype)
  return Param(value, **metadata)


def value_of(vector: Param[jax.Array] | None) -> jax.Array | None:
  """Returns the value of a parameter, or None for None.

  Example:

    >>> from nnx.nn import norm_base
    >>> norm_base.value_of(None)
  """
  return None if vector is None else vector[...]


class Norm(Module):
  """Base of the normalising layers, which assign these attributes."""

  scale: Param[jax.Array] | None
  dtype: dtypes.Dtype | None
  epsilon: float
  axis_name: str | None
  axis_index_groups: Any
  use_fast_variance: bool
  promote_dtype: dtypes.PromoteDtypeFn

  def _options(self) -> Options:
    groups = self.axis_index_groups
    return _options(
      self.dtype,
      self.epsilon,
      self.axis_name,
      None if groups is None else tuple(map(tuple, groups)),
      self.use_fast_variance,
      self.promote_dtype,
    )

  def _check_features(self, x: Any, feature_axes: Sequence[int]) -> None:
    """Raises if the features of x are not those of the parameters."""
    shape, size = jnp.shape(x), 1
    for axis in feature_axes:
      if not 0 <= axis < len(shape):
        size = -1
        break
      size *= shape[axis]
    for name in ("scale", "bias", "mean"):
      vector = getattr(self, name, None)
      if vector is not None and vector.size != size:
        raise ValueError(
          f"`x` must have {vector.size} features for this"
          f" `{type(self).__name__}`, but got {shape}."
        ) from None
