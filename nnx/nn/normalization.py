"""Layers that bring features to mean 0 and variance 1, or weights to norm 1.

The arithmetic is in functions of arrays, which run as `nnx.eager` says: as
one compiled call outside of traces.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from nnx import eager
from nnx.module import Module
from nnx.nn import checks, dtypes, initializers
from nnx.nn.initializers import NO_METADATA, Initializer, initialize
from nnx.rnglib import Rngs
from nnx.variablelib import BatchStat, Param

Axes = int | Sequence[int]


def _canonical_axes(rank: int, axes: Axes) -> tuple[int, ...]:
  """Axes that are sorted, not negative, and each there once."""
  if not isinstance(axes, collections.abc.Iterable):
    axes = (axes,)
  return tuple(sorted({axis + rank if axis < 0 else axis for axis in axes}))


def _as_groups(groups: Any) -> Any:
  return None if groups is None else tuple(map(tuple, groups))


def _abs_squared(x: jax.Array) -> jax.Array:
  if jnp.iscomplexobj(x):
    return lax.square(lax.real(x)) + lax.square(lax.imag(x))
  return lax.square(x)


def statistics(
  x: jax.Array,
  axes: Axes,
  dtype: dtypes.Dtype | None = None,
  axis_name: Any = None,
  axis_index_groups: Any = None,
  use_mean: bool = True,
  use_fast_variance: bool = True,
  mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Computes mean and variance over some axes.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn.normalization import statistics
    >>> statistics(jnp.array([[1.0, 3.0]]), -1)
    (Array([2.], dtype=float32), Array([1.], dtype=float32))

  Args:
    x: `[...]`, floating or complex.
    axes: the axes to reduce.
    dtype: the dtype to compute in, if wider than float32; x's, if None.
    axis_name: a mapped axis to reduce as well.
    axis_index_groups: groups of indices along `axis_name` that do so on their
      own.
    use_mean: whether to take the variance about the mean; otherwise the mean is
      0.
    use_fast_variance: whether to compute the variance as `E[x^2] - E[x]^2`, at
      least 0, which takes one pass over x but cancels for large means.
    mask: broadcasts to x; False positions do not count.

  Returns:
    Mean and variance, with the axes that are left.
  """
  dtype = jnp.promote_types(
    jnp.result_type(x) if dtype is None else dtype, jnp.float32
  )
  x = jnp.asarray(x, dtype)
  axes = _canonical_axes(x.ndim, axes)

  def means(*arrays):
    result = tuple(jnp.mean(array, axes, where=mask) for array in arrays)
    if axis_name is None:
      return result
    return lax.pmean(result, axis_name, axis_index_groups=axis_index_groups)

  if not use_mean:
    (var,) = means(_abs_squared(x))
    return jnp.zeros_like(var), var
  if use_fast_variance:
    mean, squares = means(x, _abs_squared(x))
    # Rounding may bring the difference below 0.
    return mean, jnp.maximum(0.0, squares - _abs_squared(mean))
  (mean,) = means(x)
  (var,) = means(_abs_squared(x - jnp.expand_dims(mean, axes)))
  return mean, var


def normalize(
  x: jax.Array,
  mean: jax.Array,
  var: jax.Array,
  scale: jax.Array | None,
  bias: jax.Array | None,
  reduction_axes: Axes,
  feature_axes: Axes,
  dtype: dtypes.Dtype | None,
  epsilon: float,
) -> jax.Array:
  """Computes `(x - mean) / sqrt(var + epsilon) * scale + bias`.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn.normalization import normalize
    >>> x, mean, var = jnp.array([[1.0, 3.0]]), jnp.array([2.0]), jnp.ones(1)
    >>> normalize(x, mean, var, None, jnp.ones(2), -1, -1, None, 0.0)
    Array([[0., 2.]], dtype=float32)

  Args:
    x: `[...]`.
    mean: x's shape without `reduction_axes`.
    var: the same.
    scale: as many elements as `feature_axes` have, or None.
    bias: the same.
    reduction_axes: the axes that mean and variance do not have.
    feature_axes: the axes that scale and bias have.
    dtype: of the result; the common one of x, scale and bias, if None.
    epsilon: added to the variance.

  Returns:
    An array of x's shape.
  """
  reduction_axes = _canonical_axes(x.ndim, reduction_axes)
  feature_axes = _canonical_axes(x.ndim, feature_axes)
  stat_shape = [
    1 if axis in reduction_axes else size for axis, size in enumerate(x.shape)
  ]
  feature_shape = [
    size if axis in feature_axes else 1 for axis, size in enumerate(x.shape)
  ]
  factor = lax.rsqrt(jnp.reshape(var, stat_shape) + epsilon)
  if scale is not None:
    factor = factor * jnp.reshape(scale, feature_shape)
  y = (x - jnp.reshape(mean, stat_shape)) * factor
  if bias is not None:
    y = y + jnp.reshape(bias, feature_shape)
  dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=dtype)
  return jnp.asarray(y, dtype)


class _Norm(Module):
  """What the layers of this file share: settings, a scale and a bias."""

  scale: Param | None
  bias: Param | None

  def _set_up(self, settings: Mapping[str, Any]) -> None:
    """Keeps the constructor's settings and makes the parameters.

    Args:
      settings: the constructor's local variables.
    """
    checks.whole("num_features", settings["num_features"])
    checks.small("epsilon", settings["epsilon"])
    if "momentum" in settings:
      checks.rate("momentum", settings["momentum"])
    for name in (
      "num_features",
      "use_running_average",
      "axis",
      "momentum",
      "epsilon",
      "dtype",
      "param_dtype",
      "use_bias",
      "use_scale",
      "reduction_axes",
      "feature_axes",
      "axis_name",
      "axis_index_groups",
      "use_fast_variance",
      "promote_dtype",
    ):
      if name in settings:
        setattr(self, name, settings[name])
    # In this order: the keys come from one stream.
    for name in ("scale", "bias"):
      if f"use_{name}" in settings:
        setattr(self, name, self._vector(name, settings))

  def _vector(self, name: str, settings: Mapping[str, Any]) -> Param | None:
    """The scale or bias, or None."""
    if not settings[f"use_{name}"]:
      return None
    value = initialize(
      settings[f"{name}_init"],
      checks.key(settings["rngs"]),
      (settings["num_features"],),
      settings["param_dtype"],
    )
    return Param(value, **settings[f"{name}_metadata"])

  def _apply(self, x, mask, reduction_axes, feature_axes, use_mean=True):
    rank = jnp.ndim(x)
    arguments = (
      x,
      _value(self.scale),
      _value(self.bias) if use_mean else None,
      mask,
      _canonical_axes(rank, reduction_axes),
      _canonical_axes(rank, feature_axes),
      self.dtype,
      self.epsilon,
      self.axis_name,
      _as_groups(self.axis_index_groups),
      use_mean,
      self.use_fast_variance,
    )
    try:
      if self.promote_dtype is dtypes.promote_dtype:
        return _one_norm(*arguments)
      return _norm(*arguments, self.promote_dtype)
    except (TypeError, ValueError):
      self._check_features(x, arguments[5])
      raise

  def _check_features(self, x: Any, feature_axes: Sequence[int]) -> None:
    """Says in what x does not fit scale and bias, if it does not."""
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


def _value(variable: Param | None) -> Any:
  return None if variable is None else variable.value


class BatchNorm(_Norm):
  """Normalises each feature over the batch, and keeps running averages.

      mean, var = x.mean(batch_axes), x.var(batch_axes)
      y = (x - mean) / jnp.sqrt(var + epsilon) * scale + bias
      self.mean = momentum * self.mean + (1 - momentum) * mean
      self.var = momentum * self.var + (1 - momentum) * var

  After `eval()`, y is made with the running averages, which stay as they are.

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
    use_running_average: whether to normalise with the running averages;
      `train()` and `eval()` set it. None, if each call says it.
    axis: the feature axis.
    momentum: in [0, 1], the weight of the old averages.
    epsilon: added to the variance.
    dtype: the dtype of the result; of inputs and parameters, if None.
    param_dtype: the dtype of scale and bias.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: `(key, shape, dtype) -> bias`.
    scale_init: `(key, shape, dtype) -> scale`.
    axis_name: a mapped axis, the members of which have parts of one batch.
    axis_index_groups: groups of indices along `axis_name`, as in
      `jax.lax.psum`, that have batches of their own.
    use_fast_variance: whether one pass over x may do for the variance.
    promote_dtype: `((x, mean, var, scale, bias), dtype=dtype)` to those five in
      the dtype to compute in.
    rngs: the stream `params` gives the keys of scale and bias.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.

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
    self.mean = BatchStat(jnp.zeros((num_features,), jnp.float32))
    self.var = BatchStat(jnp.ones((num_features,), jnp.float32))
    self._set_up(locals())

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
      use_running_average: in place of the layer's, if not None.
      mask: broadcasts to x; False positions do not count in the statistics.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: if neither the call nor the layer says `use_running_average`.
      TypeError: if x is complex and not only the running averages are used.
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
      mean.value,
      var.value,
      _value(self.scale),
      _value(self.bias),
    )
    compiled = self.promote_dtype is dtypes.promote_dtype
    promote = () if compiled else (self.promote_dtype,)
    try:
      if use_running_average:
        infer = _infer if compiled else _batch_norm_inference
        return infer(*arrays, self.axis, self.dtype, self.epsilon, *promote)
      train = _train if compiled else _batch_norm_training
      y, mean.value, var.value = train(
        *arrays,
        mask,
        self.momentum,
        self.axis,
        self.dtype,
        self.epsilon,
        self.axis_name,
        _as_groups(self.axis_index_groups),
        self.use_fast_variance,
        *promote,
      )
      return y
    except (TypeError, ValueError):
      self._check_features(x, _canonical_axes(jnp.ndim(x), self.axis))
      raise

  def set_view(self, use_running_average: bool | None = None):
    """Sets attributes for `nnx.view`.

    Example:

      >>> import nnx
      >>> layer = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
      >>> nnx.view(layer, use_running_average=True).use_running_average
      True

    Args:
      use_running_average: whether to normalise with the running averages.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average


def _batch_norm_inference(
  x, mean, var, scale, bias, axis, dtype, epsilon,
  promote_dtype=dtypes.promote_dtype,
):  # fmt: skip
  x, mean, var, scale, bias = promote_dtype(
    (x, mean, var, scale, bias), dtype=dtype
  )
  axis = _canonical_axes(x.ndim, axis)
  others = [i for i in range(x.ndim) if i not in axis]
  return normalize(x, mean, var, scale, bias, others, axis, dtype, epsilon)


_infer = eager.one_call(_batch_norm_inference, static_argnums=(5, 6, 7))


def _batch_norm_training(
  x, mean, var, scale, bias, mask, momentum, axis, dtype, epsilon, axis_name,
  axis_index_groups, use_fast_variance, promote_dtype=dtypes.promote_dtype,
):  # fmt: skip
  if promote_dtype is dtypes.promote_dtype:
    x = jnp.asarray(x)
    dtype = dtypes.canonicalize_dtype(x, mean, var, scale, bias, dtype=dtype)
    half = x.dtype in (jnp.bfloat16, jnp.float16)
    if not (half and dtype == jnp.float32):
      x = x.astype(dtype)
    # Otherwise the kernel computes in float32 anyway, without a wide copy.
    scale, bias = (
      None if array is None else array.astype(dtype) for array in (scale, bias)
    )
  else:
    x, _, _, scale, bias = promote_dtype(
      (x, mean, var, scale, bias), dtype=dtype
    )
    dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=dtype)
  (axis,) = _canonical_axes(x.ndim, axis)
  # While tracing: programs that never train a BatchNorm import no kernels.
  from nnx.kernels import batch_stat

  out = batch_stat.batch_norm(
    x,
    scale,
    bias,
    mean,
    var,
    momentum,
    epsilon=epsilon,
    feature_axis=axis,
    mask=mask,
    axis_name=axis_name,
    axis_index_groups=axis_index_groups,
    use_fast_variance=use_fast_variance,
    dtype=dtype,
  )
  return out.y, out.mean, out.var


_train = eager.one_call(
  _batch_norm_training, static_argnums=(7, 8, 9, 10, 11, 12)
)


# What a norm computes of x, scale, bias and mask.


def _norm(
  x, scale, bias, mask, reduction_axes, feature_axes, dtype, epsilon,
  axis_name, axis_index_groups, use_mean, use_fast_variance,
  promote_dtype=dtypes.promote_dtype,
):  # fmt: skip
  if use_mean:
    x, scale, bias = promote_dtype((x, scale, bias), dtype=dtype)
  else:
    x, scale = promote_dtype((x, scale), dtype=dtype)
  mean, var = statistics(
    x, reduction_axes, dtype, axis_name, axis_index_groups, use_mean,
    use_fast_variance, mask,
  )  # fmt: skip
  return normalize(
    x, mean, var, scale, bias, reduction_axes, feature_axes, dtype, epsilon
  )


_one_norm = eager.one_call(_norm, static_argnums=tuple(range(4, 12)))


def _group_norm(
  x, scale, bias, mask, reduction_axes, groups, dtype, epsilon, axis_name,
  axis_index_groups, use_fast_variance, promote_dtype=dtypes.promote_dtype,
):  # fmt: skip
  x, scale, bias = promote_dtype((x, scale, bias), dtype=dtype)
  size = x.shape[-1] // groups
  if mask is not None:
    split = (1, 1) if mask.shape[-1] == 1 else (groups, size)
    mask = mask.reshape((*mask.shape[:-1], *split))
  mean, var = statistics(
    x.reshape((*x.shape[:-1], groups, size)), (*reduction_axes, -1), dtype,
    axis_name, axis_index_groups, use_fast_variance=use_fast_variance,
    mask=mask,
  )  # fmt: skip
  mean, var = (jnp.repeat(stat, size, axis=-1) for stat in (mean, var))
  return normalize(
    x, mean, var, scale, bias, reduction_axes, -1, dtype, epsilon
  )


_one_group_norm = eager.one_call(
  _group_norm, static_argnums=tuple(range(4, 11))
)


class LayerNorm(_Norm):
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
    epsilon: added to the variance.
    dtype: the dtype of the result; of inputs and parameters, if None.
    param_dtype: the dtype of scale and bias.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: `(key, shape, dtype) -> bias`.
    scale_init: `(key, shape, dtype) -> scale`.
    reduction_axes: the axes that statistics are taken over.
    feature_axes: the axes of scale and bias.
    axis_name: a mapped axis that statistics are taken over as well.
    axis_index_groups: groups of indices along `axis_name`, as in
      `jax.lax.psum`, that have statistics of their own.
    use_fast_variance: whether to compute the variance as `E[x^2] - E[x]^2`.
    promote_dtype: `((x, scale, bias), dtype=dtype)` to those three in the dtype
      to compute in.
    rngs: the stream `params` gives the keys of scale and bias.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.

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
    self._set_up(locals())

  def __call__(
    self, x: jax.Array, *, mask: jax.Array | None = None
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[..., c]`, or c at `feature_axes`.
      mask: broadcasts to x; False positions do not count in the statistics.

    Returns:
      An array of x's shape.
    """
    return self._apply(x, mask, self.reduction_axes, self.feature_axes)


class RMSNorm(_Norm):
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
    epsilon: added to the mean square.
    dtype: the dtype of the result; of inputs and parameters, if None.
    param_dtype: the dtype of the scale.
    use_scale: whether there is a scale.
    scale_init: `(key, shape, dtype) -> scale`.
    reduction_axes: the axes that the mean is taken over.
    feature_axes: the axes of the scale.
    axis_name: a mapped axis that the mean is taken over as well.
    axis_index_groups: groups of indices along `axis_name`, as in
      `jax.lax.psum`, that have means of their own.
    use_fast_variance: as in `LayerNorm`; without a mean to subtract both ways
      are the same.
    promote_dtype: `((x, scale), dtype=dtype)` to those two in the dtype to
      compute in.
    rngs: the stream `params` gives the key of the scale.
    scale_metadata: metadata of the scale.

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
    self._set_up(locals())

  def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[..., c]`, or c at `feature_axes`.
      mask: broadcasts to x; False positions do not count in the mean.

    Returns:
      An array of x's shape.
    """
    return self._apply(
      x, mask, self.reduction_axes, self.feature_axes, use_mean=False
    )


class GroupNorm(_Norm):
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
    num_groups: how many groups; None, if `group_size` says it.
    group_size: how many features a group has; None, if `num_groups` says it.
    epsilon: added to the variance.
    dtype: the dtype of the result; of inputs and parameters, if None.
    param_dtype: the dtype of scale and bias.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: `(key, shape, dtype) -> bias`.
    scale_init: `(key, shape, dtype) -> scale`.
    reduction_axes: the axes that statistics are taken over, the last one among
      them; all but the first, if None.
    axis_name: a mapped axis that statistics are taken over as well.
    axis_index_groups: groups of indices along `axis_name`, as in
      `jax.lax.psum`, that have statistics of their own.
    use_fast_variance: whether to compute the variance as `E[x^2] - E[x]^2`.
    promote_dtype: `((x, scale, bias), dtype=dtype)` to those three in the dtype
      to compute in.
    rngs: the stream `params` gives the keys of scale and bias.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.

  Attributes:
    scale: `Param`, `[c]`, or None.
    bias: `Param`, `[c]`, or None.

  Raises:
    ValueError: unless one of `num_groups` and `group_size` is given, and
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
    if (num_groups is None) == (group_size is None):
      raise ValueError(
        "One of `num_groups` and `group_size` must be given, but got"
        f" `num_groups={num_groups}` and `group_size={group_size}`. With"
        " `group_size`, pass `num_groups=None`, which is 32 otherwise."
      )
    checks.whole("num_features", num_features)
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
    self.num_groups, self.group_size = (
      (number, other) if group_size is None else (other, number)
    )
    self.feature_axis = -1
    self._set_up(locals())

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
      ValueError: if `reduction_axes` lack the last axis.
    """
    rank = jnp.ndim(x)
    if self.reduction_axes is None:
      axes = tuple(range(1, rank))
    else:
      axes = _canonical_axes(rank, self.reduction_axes)
      if rank - 1 not in axes:
        raise ValueError(
          "`reduction_axes` must contain the last axis, that of the features,"
          f" but got `{self.reduction_axes}` for an input of rank {rank}."
        )
    arguments = (
      x,
      _value(self.scale),
      _value(self.bias),
      mask,
      tuple(axis for axis in axes if axis != rank - 1),
      self.num_groups,
      self.dtype,
      self.epsilon,
      self.axis_name,
      _as_groups(self.axis_index_groups),
      self.use_fast_variance,
    )
    try:
      if self.promote_dtype is dtypes.promote_dtype:
        return _one_group_norm(*arguments)
      return _group_norm(*arguments, self.promote_dtype)
    except (TypeError, ValueError):
      self._check_features(x, (rank - 1,))
      raise


class InstanceNorm(_Norm):
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
    epsilon: added to the variance.
    dtype: the dtype of the result; of inputs and parameters, if None.
    param_dtype: the dtype of scale and bias.
    use_bias: whether there is a bias.
    use_scale: whether there is a scale.
    bias_init: `(key, shape, dtype) -> bias`.
    scale_init: `(key, shape, dtype) -> scale`.
    feature_axes: the axes of the features. Statistics are taken over all others
      but the first, which is the batch.
    axis_name: a mapped axis that statistics are taken over as well.
    axis_index_groups: groups of indices along `axis_name`, as in
      `jax.lax.psum`, that have statistics of their own.
    use_fast_variance: whether to compute the variance as `E[x^2] - E[x]^2`.
    promote_dtype: `((x, scale, bias), dtype=dtype)` to those three in the dtype
      to compute in.
    rngs: the stream `params` gives the keys of scale and bias.
    bias_metadata: metadata of the bias.
    scale_metadata: metadata of the scale.

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
    self._set_up(locals())

  def __call__(
    self, x: jax.Array, *, mask: jax.Array | None = None
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x: `[b, ..., c]`, or c at `feature_axes`.
      mask: broadcasts to x; False positions do not count in the statistics.

    Returns:
      An array of x's shape.

    Raises:
      ValueError: if `feature_axes` contain the first axis.
    """
    rank = jnp.ndim(x)
    feature_axes = _canonical_axes(rank, self.feature_axes)
    if 0 in feature_axes:
      raise ValueError(
        "`feature_axes` must not contain the first axis, which is the batch,"
        f" but got `{self.feature_axes}` for an input of rank {rank}."
      )
    others = [i for i in range(1, rank) if i not in feature_axes]
    return self._apply(x, mask, others, feature_axes)
