"""Group normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnx import eager
from nnx.nn import checks, dtypes, initializers, moments, norm_base
from nnx.nn.initializers import NO_METADATA, Initializer
from nnx.nn.moments import Axes
from nnx.rnglib import Rngs


def _normalize_groups(
  x: jax.Array,
  scale: jax.Array | None,
  bias: jax.Array | None,
  mask: jax.Array | None,
  reduction_axes: tuple[int, ...],
  groups: int,
  options: norm_base.Options,
) -> jax.Array:
  """Normalises groups of features over some other axes."""
  dtype = options.dtype
  x, scale, bias = options.promote_dtype((x, scale, bias), dtype=dtype)
  size = x.shape[-1] // groups
  if mask is not None:
    split = (1, 1) if mask.shape[-1] == 1 else (groups, size)
    mask = mask.reshape((*mask.shape[:-1], *split))
  mean, var = moments.statistics(
    x.reshape((*x.shape[:-1], groups, size)),
    (*reduction_axes, -1),
    dtype,
    options.axis_name,
    options.axis_index_groups,
    use_fast_variance=options.use_fast_variance,
    mask=mask,
  )
  mean, var = (jnp.repeat(stat, size, axis=-1) for stat in (mean, var))
  return moments.normalize(
    x,
    mean,
    var,
    scale,
    bias,
    reduction_axes,
    -1,
    dtype,
    options.epsilon,
  )


_normalize_groups_compiled = eager.compiled(
  _normalize_groups, static=("reduction_axes", "groups", "options")
)


class GroupNorm(norm_base.Norm):
  """Normalises groups of features of each example.

  Equivalent to `LayerNorm` over each group of consecutive features and all axes
  between the batch and them.

  Source: Wu and He 2018, "Group normalization".

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0, 3.0, 10.0, 30.0]])).round(3)
    Array([[-1.,  1., -1.,  1.]], dtype=float32)

  Args:
    num_features: c, the number of features.
    num_groups: The number of groups; None, if `group_size` is given.
    group_size: The number of features of a group; None, if `num_groups` is
      given.
    epsilon: Added to the variance.
    dtype: The dtype of the result; of inputs and parameters, if None.
    param_dtype: The dtype of scale and bias.
    use_bias: Whether there is a bias.
    use_scale: Whether there is a scale.
    bias_init: `(key, shape, dtype) -> bias`.
    scale_init: `(key, shape, dtype) -> scale`.
    reduction_axes: The axes that statistics are taken over, the last one among
      them; all but the first, if None.
    axis_name: A mapped axis that statistics are taken over as well.
    axis_index_groups: Groups of indices along `axis_name`, as in
      `jax.lax.psum`, that have separate statistics.
    use_fast_variance: Whether to compute the variance as `E[x^2] - E[x]^2`.
    promote_dtype: `((x, scale, bias), dtype=dtype)`; returns those three in the
      dtype to compute in.
    rngs: The stream `params` gives the keys of scale and bias.
    bias_metadata: Metadata of the bias.
    scale_metadata: Metadata of the scale.

  Attributes:
    scale: `Param`, `[c]`, or None.
    bias: `Param`, `[c]`, or None.

  Raises:
    ValueError: Unless one of `num_groups` and `group_size` is given, and
      divides `num_features`.
  """

  def __init__(
    self,
    num_features: int,
    num_groups: int | None = 32,
    group_size: int | None = None,
    *,
    epsilon: float = 1e-6,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: Initializer = initializers.zeros_init(),  # noqa: B008
    scale_init: Initializer = initializers.ones_init(),  # noqa: B008
    reduction_axes: Axes | None = None,
    axis_name: str | None = None,
    axis_index_groups: Any = None,
    use_fast_variance: bool = True,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    rngs: Rngs,
    bias_metadata: Mapping[str, Any] = NO_METADATA,
    scale_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    checks.whole("num_features", num_features)
    checks.small("epsilon", epsilon)
    self.num_groups, self.group_size = _groups(
      num_features, num_groups, group_size
    )
    self.feature_axis = -1
    self.num_features = num_features
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
    self.reduction_axes = reduction_axes
    self.axis_name = axis_name
    self.axis_index_groups = axis_index_groups
    self.use_fast_variance = use_fast_variance
    self.promote_dtype = promote_dtype
    self.scale = norm_base.make_vector(
      use_scale, scale_init, rngs, num_features, param_dtype, scale_metadata
    )
    self.bias = norm_base.make_vector(
      use_bias, bias_init, rngs, num_features, param_dtype, bias_metadata
    )

  def __call__(
    self, x: jax.Array, *, mask: jax.Array | None = None
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[b, ..., c]`.
      mask: `[..., c]` or `[..., 1]`, broadcasts to x; False positions do not
        count in the statistics.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: If `reduction_axes` lack the last axis.
    """
    rank = jnp.ndim(x)
    if self.reduction_axes is None:
      others = tuple(range(1, rank - 1))
    else:
      axes = moments.canonical_axes(rank, self.reduction_axes)
      if rank - 1 not in axes:
        raise ValueError(
          "`reduction_axes` must contain the last axis, that of the features,"
          f" but got `{self.reduction_axes}` for an input of rank {rank}."
        )
      others = tuple(axis for axis in axes if axis != rank - 1)
    arguments = (
      x,
      norm_base.value_of(self.scale),
      norm_base.value_of(self.bias),
      mask,
      others,
      self.num_groups,
      self._options(),
    )
    try:
      if self.promote_dtype is dtypes.promote_dtype:
        return _normalize_groups_compiled(*arguments)
      return _normalize_groups(*arguments)
    except (TypeError, ValueError):
      self._check_features(x, (rank - 1,))
      raise


def _groups(
  num_features: int, num_groups: int | None, group_size: int | None
) -> tuple[int, int]:
  """Returns the number and the size of groups, of which one is given."""
  if (num_groups is None) == (group_size is None):
    raise ValueError(
      "One of `num_groups` and `group_size` must be given, but got"
      f" `num_groups={num_groups}` and `group_size={group_size}`. With"
      " `group_size`, pass `num_groups=None`, which is 32 otherwise."
    )
  name, number = (
    ("num_groups", num_groups)
    if group_size is None
    else ("group_size", group_size)
  )
  if not isinstance(number, int) or number <= 0 or num_features % number:
    raise ValueError(
      f"`{name}` must be a positive divisor of `num_features={num_features}`,"
      f" but got `{number}`."
    )
  other = num_features // number
  return (number, other) if group_size is None else (other, number)
