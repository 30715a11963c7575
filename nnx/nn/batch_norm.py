"""Batch normalisation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from nnx import eager
from nnx.nn import checks, dtypes, initializers, moments, norm_base
from nnx.nn.initializers import NO_METADATA, Initializer
from nnx.rnglib import Rngs
from nnx.variablelib import BatchStat


class BatchNorm(norm_base.Norm):
  """Normalises each feature over the batch, and keeps running averages.

      mean, var = x.mean(batch_axes), x.var(batch_axes)
      y = (x - mean) / jnp.sqrt(var + epsilon) * scale + bias
      self.mean = momentum * self.mean + (1 - momentum) * mean
      self.var = momentum * self.var + (1 - momentum) * var

  After `eval()`, the running averages normalise, and are not updated.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    >>> print(jax.tree.map(jnp.shape, nnx.state(layer)))
    State({
      'bias': VariableState(
        type=Param,
        value=(3,)
      ),
      'mean': VariableState(
        type=BatchStat,
        value=(3,)
      ),
      'scale': VariableState(
        type=Param,
        value=(3,)
      ),
      'var': VariableState(
        type=BatchStat,
        value=(3,)
      )
    })
    >>> y = layer(jnp.ones((2, 3)))
    >>> layer.mean.value.round(2)
    Array([0.01, 0.01, 0.01], dtype=float32)

  Args:
    num_features: c, the size of the feature axis.
    use_running_average: Whether to normalise with the running averages;
      `train()` and `eval()` set it. None, if each call says so.
    axis: The feature axis.
    momentum: In [0, 1], the weight of the old averages.
    epsilon: Added to the variance.
    dtype: The dtype of the result; of inputs and parameters, if None.
    param_dtype: The dtype of scale and bias.
    use_bias: Whether there is a bias.
    use_scale: Whether there is a scale.
    bias_init: `(key, shape, dtype) -> bias`.
    scale_init: `(key, shape, dtype) -> scale`.
    axis_name: A mapped axis, over which a batch is split.
    axis_index_groups: Groups of indices along `axis_name`, as in
      `jax.lax.psum`, that have separate batches.
    use_fast_variance: Whether to compute the variance in one pass over x.
    promote_dtype: `((x, mean, var, scale, bias), dtype=dtype)`; returns those
      five in the dtype to compute in.
    rngs: The stream `params` gives the keys of scale and bias.
    bias_metadata: Metadata of the bias.
    scale_metadata: Metadata of the scale.

  Attributes:
    mean: `BatchStat`, `[c]`, float32.
    var: `BatchStat`, `[c]`, float32.
    scale: `Param`, `[c]`, or None.
    bias: `Param`, `[c]`, or None.
  """

  def __init__(
    self,
    num_features: int,
    *,
    use_running_average: bool | None = False,
    axis: int = -1,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: Initializer = initializers.zeros_init(),  # noqa: B008
    scale_init: Initializer = initializers.ones_init(),  # noqa: B008
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
    checks.rate("momentum", momentum)
    self.mean = BatchStat(jnp.zeros((num_features,), jnp.float32))
    self.var = BatchStat(jnp.ones((num_features,), jnp.float32))
    self.num_features = num_features
    self.use_running_average = use_running_average
    self.axis = axis
    self.momentum = momentum
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.use_bias = use_bias
    self.use_scale = use_scale
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
    self,
    x: jax.Array,
    use_running_average: bool | None = None,
    *,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[..., c, ...]`, c at `axis`.
      use_running_average: Overrides that of the layer, if not None.
      mask: Broadcasts to x; False positions do not count in the statistics.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: If neither the call nor the layer says `use_running_average`.
      TypeError: If x is complex and not only the running averages are used.
    """
    if use_running_average is None:
      use_running_average = self.use_running_average
      if use_running_average is None:
        raise ValueError(
          "`BatchNorm` must be told `use_running_average`, but it is None in"
          " the layer and in the call. Pass it to one of them, or set it for a"
          " whole model: `model.train()`, `model.eval()` or `nnx.view(model,"
          " use_running_average=...)`."
        )
    mean, var = self.mean, self.var
    arrays = (
      x,
      mean[...],
      var[...],
      norm_base.value_of(self.scale),
      norm_base.value_of(self.bias),
    )
    is_plain = self.promote_dtype is not dtypes.promote_dtype
    try:
      if use_running_average:
        options = (self.axis, self.dtype, self.epsilon)
        if is_plain:
          return _infer(*arrays, *options, self.promote_dtype)
        return _infer_compiled(*arrays, *options)
      train = _train if is_plain else _train_compiled
      y, mean.value, var.value = train(
        *arrays, mask, self.momentum, self.axis, self._options()
      )
      return y
    except (TypeError, ValueError):
      self._check_features(x, moments.canonical_axes(jnp.ndim(x), self.axis))
      raise

  def set_view(self, use_running_average: bool | None = None):
    """Sets attributes for `nnx.view`.

    Example:

      >>> import nnx
      >>> layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> nnx.view(layer, use_running_average=True).use_running_average
      True

    Args:
      use_running_average: Whether to normalise with the running averages.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average


def _infer(
  x: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array | None,
  bias: jax.Array | None,
  axis: int,
  dtype: dtypes.Dtype | None,
  epsilon: float,
  promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
) -> jax.Array:
  """Normalises with the running averages."""
  x, mean, var, scale, bias = promote_dtype(
    (x, mean, var, scale, bias), dtype=dtype
  )
  axes = moments.canonical_axes(x.ndim, axis)
  others = [i for i in range(x.ndim) if i not in axes]
  return moments.normalize(
    x, mean, var, scale, bias, others, axes, dtype, epsilon
  )


_infer_compiled = eager.compiled(_infer, static=("axis", "dtype", "epsilon"))


def _train(
  x: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array | None,
  bias: jax.Array | None,
  mask: jax.Array | None,
  momentum: float,
  axis: int,
  options: norm_base.Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises with the statistics of the batch, and moves the averages."""
  if options.promote_dtype is dtypes.promote_dtype:
    x = jnp.asarray(x)
    dtype = dtypes.canonicalize_dtype(
      x, mean, var, scale, bias, dtype=options.dtype
    )
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    if not (half and dtype == jnp.float32):
      x = x.astype(dtype)
    # Otherwise the kernel computes in float32 anyway, without a wide copy.
    scale, bias = (
      None if array is None else array.astype(dtype) for array in (scale, bias)
    )
  else:
    x, _, _, scale, bias = options.promote_dtype(
      (x, mean, var, scale, bias), dtype=options.dtype
    )
    dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=options.dtype)
  (axis,) = moments.canonical_axes(x.ndim, axis)
  # While tracing: programs that never train a BatchNorm import no kernels.
  from nnx.kernels import batch_stat

  out = batch_stat.batch_norm(
    x,
    scale,
    bias,
    mean,
    var,
    momentum,
    epsilon=options.epsilon,
    feature_axis=axis,
    mask=mask,
    axis_name=options.axis_name,
    axis_index_groups=options.axis_index_groups,
    use_fast_variance=options.use_fast_variance,
    dtype=dtype,
  )
  # No derivative goes through the averages, nor can it where they are kept in
  # mutable values of jax.
  return out.y, jax.lax.stop_gradient(out.mean), jax.lax.stop_gradient(out.var)


_train_compiled = eager.compiled(_train, static=("axis", "options"))
