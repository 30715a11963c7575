"""Layers that normalise their inputs to mean 0 and variance 1.

The arithmetic is in functions of arrays, which run as `nnx.eager` says: outside
of traces each is one compiled call. `BatchNorm` and `GroupNorm` are in files of
their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnx import eager
from nnx.nn import checks, dtypes, initializers, moments, norm_base
from nnx.nn.batch_norm import BatchNorm as BatchNorm
from nnx.nn.group_norm import GroupNorm as GroupNorm
from nnx.nn.initializers import NO_METADATA, Initializer
from nnx.nn.moments import Axes
from nnx.nn.moments import normalize as normalize
from nnx.nn.moments import statistics as statistics
from nnx.rnglib import Rngs
from nnx.variablelib import Param


def _normalize(
  x: jax.Array,
  scale: jax.Array | None,
  bias: jax.Array | None,
  mask: jax.Array | None,
  reduction_axes: Axes,
  feature_axes: Axes,
  use_mean: bool,
  options: norm_base.Options,
) -> jax.Array:
  """Normalises over some axes, by mean and variance or by the mean square."""
  dtype = options.dtype
  if use_mean:
    x, scale, bias = options.promote_dtype((x, scale, bias), dtype=dtype)
  else:
    x, scale = options.promote_dtype((x, scale), dtype=dtype)
  mean, var = statistics(
    x,
    reduction_axes,
    dtype,
    options.axis_name,
    options.axis_index_groups,
    use_mean,
    options.use_fast_variance,
    mask,
  )
  return normalize(
    x,
    mean,
    var,
    scale,
    bias,
    reduction_axes,
    feature_axes,
    dtype,
    options.epsilon,
  )


_normalize_compiled = eager.compiled(
  _normalize, static=("reduction_axes", "feature_axes", "use_mean", "options")
)


def _apply(
  layer: norm_base.Norm,
  x: jax.Array,
  bias: Param[jax.Array] | None,
  mask: jax.Array | None,
  reduction_axes: Axes,
  feature_axes: Axes,
  use_mean: bool = True,
) -> jax.Array:
  """Applies a layer that normalises over some axes."""
  rank = jnp.ndim(x)
  feature_axes = moments.canonical_axes(rank, feature_axes)
  arguments = (
    x,
    norm_base.value_of(layer.scale),
    norm_base.value_of(bias),
    mask,
    moments.canonical_axes(rank, reduction_axes),
    feature_axes,
    use_mean,
    layer._options(),
  )
  try:
    if layer.promote_dtype is dtypes.promote_dtype:
      return _normalize_compiled(*arguments)
    return _normalize(*arguments)
  except (TypeError, ValueError):
    layer._check_features(x, feature_axes)
    raise


class LayerNorm(norm_base.Norm):
  """Normalises each example over its features.

      mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
      y = (x - mean) / jnp.sqrt(var + epsilon) * scale + bias

  Source: Ba et al. 2016, "Layer normalization".

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.LayerNorm(2, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[1.0, 3.0]])).round(3)
    Array([[-1.,  1.]], dtype=float32)

  Args:
    num_features: c, the number of features.
    epsilon: Added to the variance.
    dtype: The dtype of the result; of inputs and parameters, if None.
    param_dtype: The dtype of scale and bias.
    use_bias: Whether there is a bias.
    use_scale: Whether there is a scale.
    bias_init: `(key, shape, dtype) -> bias`.
    scale_init: `(key, shape, dtype) -> scale`.
    reduction_axes: The axes that statistics are taken over.
    feature_axes: The axes of scale and bias.
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
  """

  def __init__(
    self,
    num_features: int,
    *,
    epsilon: float = 1e-6,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: Initializer = initializers.zeros_init(),  # noqa: B008
    scale_init: Initializer = initializers.ones_init(),  # noqa: B008
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
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
    self.num_features = num_features
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
    self.reduction_axes = reduction_axes
    self.feature_axes = feature_axes
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
      x: `[..., c]`, or c at `feature_axes`.
      mask: Broadcasts to x; False positions do not count in the statistics.

    Returns:
      An array of x's shape.
    """
    return _apply(
      self, x, self.bias, mask, self.reduction_axes, self.feature_axes
    )


class RMSNorm(norm_base.Norm):
  """Divides each example by the root of the mean square of its features.

      y = x / jnp.sqrt((x**2).mean(axes, keepdims=True) + epsilon) * scale

  Source: Zhang and Sennrich 2019, "Root mean square layer normalization".

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.RMSNorm(2, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[3.0, -3.0]])).round(3)
    Array([[ 1., -1.]], dtype=float32)

  Args:
    num_features: c, the number of features.
    epsilon: Added to the mean square.
    dtype: The dtype of the result; of inputs and parameters, if None.
    param_dtype: The dtype of the scale.
    use_scale: Whether there is a scale.
    scale_init: `(key, shape, dtype) -> scale`.
    reduction_axes: The axes that the mean is taken over.
    feature_axes: The axes of the scale.
    axis_name: A mapped axis that the mean is taken over as well.
    axis_index_groups: Groups of indices along `axis_name`, as in
      `jax.lax.psum`, that have separate means.
    use_fast_variance: As in `LayerNorm`; both ways are the same here, where no
      mean is subtracted.
    promote_dtype: `((x, scale), dtype=dtype)`; returns those two in the dtype
      to compute in.
    rngs: The stream `params` gives the key of the scale.
    scale_metadata: Metadata of the scale.

  Attributes:
    scale: `Param`, `[c]`, or None.
  """

  def __init__(
    self,
    num_features: int,
    *,
    epsilon: float = 1e-6,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    use_scale: bool = True,
    scale_init: Initializer = initializers.ones,
    reduction_axes: Axes = -1,
    feature_axes: Axes = -1,
    axis_name: str | None = None,
    axis_index_groups: Any = None,
    use_fast_variance: bool = True,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    rngs: Rngs,
    scale_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    checks.whole("num_features", num_features)
    checks.small("epsilon", epsilon)
    self.num_features = num_features
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_scale = use_scale
    self.reduction_axes = reduction_axes
    self.feature_axes = feature_axes
    self.axis_name = axis_name
    self.axis_index_groups = axis_index_groups
    self.use_fast_variance = use_fast_variance
    self.promote_dtype = promote_dtype
    self.scale = norm_base.make_vector(
      use_scale, scale_init, rngs, num_features, param_dtype, scale_metadata
    )

  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[..., c]`, or c at `feature_axes`.
      mask: Broadcasts to x; False positions do not count in the mean.

    Returns:
      An array of x's shape.
    """
    return _apply(
      self,
      x,
      None,
      mask,
      self.reduction_axes,
      self.feature_axes,
      use_mean=False,
    )


class InstanceNorm(norm_base.Norm):
  """Normalises each feature of each example over the axes between them.

  Source: Ulyanov et al. 2016, "Instance normalization".

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.InstanceNorm(1, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[[1.0], [3.0]]])).round(3).tolist()
    [[[-1.0], [1.0]]]

  Args:
    num_features: c, the number of features.
    epsilon: Added to the variance.
    dtype: The dtype of the result; of inputs and parameters, if None.
    param_dtype: The dtype of scale and bias.
    use_bias: Whether there is a bias.
    use_scale: Whether there is a scale.
    bias_init: `(key, shape, dtype) -> bias`.
    scale_init: `(key, shape, dtype) -> scale`.
    feature_axes: The axes of the features. Statistics are taken over all others
      but the first, which is the batch.
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
  """

  def __init__(
    self,
    num_features: int,
    *,
    epsilon: float = 1e-6,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: Initializer = initializers.zeros,
    scale_init: Initializer = initializers.ones,
    feature_axes: Axes = -1,
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
    self.num_features = num_features
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
    self.feature_axes = feature_axes
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
      x: `[b, ..., c]`, or c at `feature_axes`.
      mask: Broadcasts to x; False positions do not count in the statistics.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: If `feature_axes` contain the first axis.
    """
    rank = jnp.ndim(x)
    feature_axes = moments.canonical_axes(rank, self.feature_axes)
    if 0 in feature_axes:
      raise ValueError(
        "`feature_axes` must not contain the first axis, which is the batch,"
        f" but got `{self.feature_axes}` for an input of rank {rank}."
      )
    others = [i for i in range(1, rank) if i not in feature_axes]
    return _apply(self, x, self.bias, mask, others, feature_axes)
