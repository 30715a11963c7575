"""Convolutions, channels last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import numbers
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from nnx import eager
from nnx.module import Module
from nnx.nn import checks, convolutions, dtypes
from nnx.nn.initializers import (
  NO_METADATA,
  Initializer,
  default_bias_init,
  default_kernel_init,
  initialize,
)
from nnx.nn.products import product_options
from nnx.rnglib import Rngs
from nnx.variablelib import Param

Padding = str | int | Sequence[int | tuple[int, int]]

# As it was imported, and the default; see `eager.current`.
_CONV_GENERAL_DILATED = lax.conv_general_dilated

# Paddings that `jnp.pad` makes before the convolution, and its modes for them.
_PAD_MODES = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def _as_tuple(value: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
  """Returns one number for each spatial axis; None is 1."""
  if value is None:
    value = 1
  return (value,) * rank if isinstance(value, int) else tuple(value)


def _canonical_padding(padding: Padding, rank: int) -> Any:
  """Returns a string, or a pair for each spatial axis."""
  if isinstance(padding, str):
    return padding.upper()
  if isinstance(padding, int):
    return ((padding, padding),) * rank
  pairs = tuple((p, p) if isinstance(p, int) else p for p in padding)
  if len(pairs) == rank and all(
    isinstance(p, (tuple, list)) and len(p) == 2 for p in pairs
  ):
    return tuple((int(low), int(high)) for low, high in pairs)
  raise ValueError(
    f"`padding` must be a string, an int, or {rank} ints or pairs of ints, one"
    f" for each spatial axis, but got `{padding}`."
  )


def _check_steps(name: str, value: Any, kernel_size: Any) -> None:
  """Refuses anything but one step, or one for each spatial axis."""
  if value is None:
    return
  checks.wholes(name, value, 1)
  rank = 1 if isinstance(kernel_size, int) else len(tuple(kernel_size))
  if not isinstance(value, int) and len(tuple(value)) != rank:
    raise ValueError(
      f"`{name}` must be one number or one for each axis of"
      f" `kernel_size={kernel_size}`, but got {value}."
    )


def _check_padding(
  padding: Padding, others: Sequence[str], any_case: bool
) -> None:
  """Refuses a string that is no name of a padding, and broken numbers."""
  names = ("SAME", "VALID", "SAME_LOWER", *others)
  if not isinstance(padding, str):
    for size in jax.tree.leaves(padding):
      if isinstance(size, numbers.Real):
        checks.whole("padding", size, -math.inf)
  elif (padding.upper() if any_case else padding) not in names:
    raise ValueError(
      f"`padding` must be one of {', '.join(names)} or numbers, but got"
      f" {padding!r}."
    )


def _check_inputs(layer: Any, inputs: Any, channels: int) -> None:
  """Raises if the inputs do not fit the kernel."""
  least = len(layer.kernel_size) + 1
  if jnp.ndim(inputs) < least:
    raise ValueError(
      f"`inputs` must have at least {least} axes for this"
      f" `{type(layer).__name__}`, but got {jnp.shape(inputs)}."
    ) from None
  checks.last_axis(layer, "inputs", inputs, channels)


def _check_dilated(layer: Conv) -> None:
  """Raises if the padding is a name, which means none of a dilated input."""
  steps = layer.input_dilation
  if isinstance(layer.padding, str) and max(_as_tuple(steps, 1)) > 1:
    raise ValueError(
      "`padding` must be numbers where `input_dilation` is more than 1, but got"
      f" {layer.padding!r} and `input_dilation={steps}`. Pass how many zeros to"
      " put before and after, or use an `nnx.ConvTranspose`."
    ) from None


def _check_mask(layer: Any) -> None:
  if layer.mask is not None and layer.mask.shape != layer.kernel_shape:
    raise ValueError(
      f"`mask` must have the shape of the kernel, {layer.kernel_shape}, but got"
      f" {layer.mask.shape}."
    )


def _one_batch_axis(inputs: jax.Array, spatial: int) -> jax.Array:
  batch = inputs.ndim - spatial - 1
  if batch == 1:
    return inputs
  return jnp.reshape(inputs, (-1, *inputs.shape[batch:]))


def _add_bias(y: jax.Array, bias: jax.Array | None) -> jax.Array:
  return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))


@dataclasses.dataclass(frozen=True, eq=False)
class _Convolution:
  """How `Conv` convolves: the arguments of its arithmetic but the arrays."""

  strides: tuple[int, ...]
  padding: Any
  input_dilation: tuple[int, ...]
  kernel_dilation: tuple[int, ...]
  groups: int
  dtype: dtypes.Dtype | None
  precision: Any
  preferred_element_type: dtypes.Dtype | None
  out_sharding: Any
  promote_dtype: dtypes.PromoteDtypeFn
  conv_general_dilated: Callable[..., jax.Array]


_convolution = eager.interned(_Convolution)


def _padded(
  inputs: jax.Array, sizes: tuple[int, ...], how: _Convolution
) -> tuple[jax.Array, Any]:
  """Pads the inputs where jax has no name for the padding.

  Args:
    inputs: `[b, *spatial, k]`.
    sizes: The sizes of the kernel's spatial axes.
    how: The convolution.

  Returns:
    The padded inputs, and the padding that is left to the convolution.
  """
  padding, dilation = how.padding, how.kernel_dilation
  if padding in _PAD_MODES:
    reach = [(k - 1) * d for k, d in zip(sizes, dilation)]
    pads = [(0, 0), *((r // 2, (r + 1) // 2) for r in reach), (0, 0)]
    return jnp.pad(inputs, pads, mode=_PAD_MODES[padding]), "VALID"
  if padding == "CAUSAL":
    before = dilation[0] * (sizes[0] - 1)
    return jnp.pad(inputs, [(0, 0), (before, 0), (0, 0)]), "VALID"
  return inputs, padding


def _convolve(
  inputs: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None,
  mask: jax.Array | None,
  how: _Convolution,
) -> jax.Array:
  """Computes what `Conv` does to arrays."""
  inputs = jnp.asarray(inputs)
  sizes = kernel.shape[:-2]
  spatial = len(sizes)
  batch = inputs.shape[: inputs.ndim - spatial - 1]
  inputs, padding = _padded(_one_batch_axis(inputs, spatial), sizes, how)
  if mask is not None:
    kernel = kernel * mask
  inputs, kernel, bias = how.promote_dtype(
    (inputs, kernel, bias), dtype=how.dtype
  )
  y = convolutions.convolve(
    inputs,
    kernel,
    how.strides,
    padding,
    input_dilation=how.input_dilation,
    kernel_dilation=how.kernel_dilation,
    groups=how.groups,
    conv_general_dilated=how.conv_general_dilated,
    **product_options(
      how.precision, how.preferred_element_type, how.out_sharding
    ),
  )
  y = _add_bias(y, bias)
  return y if len(batch) == 1 else y.reshape((*batch, *y.shape[1:]))


_convolve_compiled = eager.compiled(_convolve, static=("how",))


class Conv(Module):
  """Convolves with a learned kernel and adds a learned bias.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.Conv(3, 4, kernel_size=(5, 5), strides=2, rngs=nnx.Rngs(0))
    >>> layer.kernel.shape
    (5, 5, 3, 4)
    >>> layer(jnp.ones((2, 8, 8, 3))).shape
    (2, 4, 4, 4)

  Args:
    in_features: k, the channels of the input.
    out_features: c, the channels of the result.
    kernel_size: The size of the kernel along each spatial axis; an int for one
      axis.
    strides: Steps of the kernel, one number or one for each spatial axis.
    padding: "SAME", "VALID", "CIRCULAR" (the input repeats), "REFLECT" (it is
      mirrored), "CAUSAL" (zeros in front, for one spatial axis), or how many
      zeros: one number, or for each spatial axis a number or a pair (before,
      after).
    input_dilation: Distance of the input's elements, likewise; with more than
      1, the padding must be numbers.
    kernel_dilation: Distance of the kernel's elements, likewise.
    feature_group_count: How many groups of channels are convolved separately.
    use_bias: Whether there is a bias.
    mask: An array of the kernel's shape that the kernel is multiplied by, or
      None.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    param_dtype: The dtype of the parameters.
    precision: Precision of the products, as in `jax.lax.conv_general_dilated`.
    kernel_init: `(key, shape, dtype) -> kernel`.
    bias_init: `(key, shape, dtype) -> bias`.
    conv_general_dilated: Called in place of `jax.lax.conv_general_dilated`.
    promote_dtype: `((inputs, kernel, bias), dtype=dtype)`; returns those three
      in the dtype to compute in.
    preferred_element_type: The dtype of the result before the bias, as in
      `jax.lax.conv_general_dilated`.
    rngs: The stream `params` gives the keys of kernel and bias.
    kernel_metadata: Metadata of the kernel.
    bias_metadata: Metadata of the bias.

  Attributes:
    kernel: `Param`, `[*kernel_size, k // feature_group_count, c]`.
    bias: `Param`, `[c]`, or None.

  Raises:
    ValueError: If `feature_group_count` does not divide the channels.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] | None = 1,
    *,
    padding: Padding = "SAME",
    input_dilation: int | Sequence[int] | None = 1,
    kernel_dilation: int | Sequence[int] | None = 1,
    feature_group_count: int = 1,
    use_bias: bool = True,
    mask: jax.Array | None = None,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    precision: Any = None,
    kernel_init: Initializer = default_kernel_init,
    bias_init: Initializer = default_bias_init,
    conv_general_dilated: Callable[..., jax.Array] = lax.conv_general_dilated,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    preferred_element_type: dtypes.Dtype | None = None,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = NO_METADATA,
    bias_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    checks.whole("in_features", in_features)
    checks.whole("out_features", out_features)
    checks.wholes("kernel_size", kernel_size, 1)
    checks.whole("feature_group_count", feature_group_count, 1)
    for name, value in (
      ("strides", strides),
      ("input_dilation", input_dilation),
      ("kernel_dilation", kernel_dilation),
    ):
      _check_steps(name, value, kernel_size)
    _check_padding(padding, ("CAUSAL", *_PAD_MODES), any_case=True)
    if in_features % feature_group_count or out_features % feature_group_count:
      raise ValueError(
        "`feature_group_count` must divide `in_features` and `out_features`,"
        f" but got {feature_group_count} for {in_features} and {out_features}."
      )
    self.kernel_size = (
      (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
    )
    self.kernel_shape = (
      *self.kernel_size,
      in_features // feature_group_count,
      out_features,
    )
    self.kernel = Param(
      initialize(kernel_init, checks.key(rngs), self.kernel_shape, param_dtype),
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
    self.strides = strides
    self.padding = padding
    self.input_dilation = input_dilation
    self.kernel_dilation = kernel_dilation
    self.feature_group_count = feature_group_count
    self.use_bias = use_bias
    self.mask = mask
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.precision = precision
    self.conv_general_dilated = conv_general_dilated
    self.promote_dtype = promote_dtype
    self.preferred_element_type = preferred_element_type

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Applies the layer.

    Args:
      inputs: `[..., *spatial, k]`.
      out_sharding: The sharding of the convolution, under a mesh with explicit
        axes.

    Returns:
      `[..., *spatial, c]`, the sizes as strides and padding make them.

    Raises:
      ValueError: If `mask` or `padding` do not fit the kernel, or `padding` is
        a name where the input is dilated.
    """
    rank = len(self.kernel_size)
    _check_mask(self)
    padding = _canonical_padding(self.padding, rank)
    if padding == "CAUSAL" and rank != 1:
      raise ValueError(
        "`padding='CAUSAL'` needs exactly one spatial axis, but got"
        f" `kernel_size={self.kernel_size}`."
      )
    arrays = (
      inputs,
      self.kernel[...],
      None if self.bias is None else self.bias[...],
      self.mask,
    )
    how = _convolution(
      _as_tuple(self.strides, rank),
      padding,
      _as_tuple(self.input_dilation, rank),
      _as_tuple(self.kernel_dilation, rank),
      self.feature_group_count,
      self.dtype,
      self.precision,
      self.preferred_element_type,
      out_sharding,
      self.promote_dtype,
      self.conv_general_dilated,
    )
    try:
      if (
        self.promote_dtype is dtypes.promote_dtype
        and self.conv_general_dilated is _CONV_GENERAL_DILATED
      ):
        return _convolve_compiled(*arrays, how)
      return _convolve(*arrays, how)
    except (IndexError, TypeError, ValueError):
      channels = self.kernel.shape[-2] * self.feature_group_count
      _check_inputs(self, inputs, channels)
      _check_dilated(self)
      raise


def _wrap_around(y: jax.Array, axis: int, period: int, before: int):
  """Sums the elements that are a multiple of the period apart."""
  after = -(before + y.shape[axis]) % period
  pads = [(0, 0)] * y.ndim
  pads[axis] = (before, after)
  y = jnp.pad(y, pads)
  return y.reshape((*y.shape[:axis], -1, period, *y.shape[axis + 1 :])).sum(
    axis
  )


@dataclasses.dataclass(frozen=True, eq=False)
class _Transposed:
  """How `ConvTranspose` convolves; see `_Convolution`."""

  strides: tuple[int, ...]
  padding: Any
  kernel_dilation: tuple[int, ...]
  transpose_kernel: bool
  dtype: dtypes.Dtype | None
  precision: Any
  preferred_element_type: dtypes.Dtype | None
  promote_dtype: dtypes.PromoteDtypeFn


_transposed = eager.interned(_Transposed)


def _convolve_transposed(
  inputs: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None,
  mask: jax.Array | None,
  how: _Transposed,
) -> jax.Array:
  """Computes what `ConvTranspose` does to arrays."""
  inputs = jnp.asarray(inputs)
  spatial = kernel.ndim - 2
  batch = inputs.shape[: inputs.ndim - spatial - 1]
  inputs = _one_batch_axis(inputs, spatial)
  if mask is not None:
    kernel = kernel * mask
  inputs, kernel, bias = how.promote_dtype(
    (inputs, kernel, bias), dtype=how.dtype
  )
  circular = how.padding == "CIRCULAR"
  y = lax.conv_transpose(
    inputs,
    kernel,
    how.strides,
    "VALID" if circular else how.padding,
    rhs_dilation=how.kernel_dilation,
    transpose_kernel=how.transpose_kernel,
    precision=how.precision,
    preferred_element_type=how.preferred_element_type,
  )
  if circular:
    for axis, stride in enumerate(how.strides, 1):
      period = inputs.shape[axis] * stride
      # Pads to an odd number of periods, the middle one of which is that of
      # the input.
      missing = -(y.shape[axis] - period) % (2 * period)
      before = missing // 2 if how.transpose_kernel else (missing + 1) // 2
      y = _wrap_around(y, axis, period, before)
  y = _add_bias(y, bias)
  return y if len(batch) == 1 else y.reshape((*batch, *y.shape[1:]))


_convolve_transposed_compiled = eager.compiled(
  _convolve_transposed, static=("how",)
)


class ConvTranspose(Module):
  """Convolves with strides in the result, as the transpose of `Conv` does.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.ConvTranspose(3, 4, (5, 5), strides=2, rngs=nnx.Rngs(0))
    >>> layer.kernel.shape
    (5, 5, 3, 4)
    >>> layer(jnp.ones((2, 8, 8, 3))).shape
    (2, 16, 16, 4)

  Args:
    in_features: k, the channels of the input.
    out_features: c, the channels of the result.
    kernel_size: The size of the kernel along each spatial axis; an int for one
      axis.
    strides: From element to element in the result, one number or one for each
      spatial axis; 1, if None.
    padding: "SAME", "VALID", "CIRCULAR" (the result repeats), or how many zeros
      around the input with its strides: one number, or for each spatial axis a
      number or a pair (before, after). The `Conv` of `padding=p` is undone, in
      shape, by `kernel_dilation * (kernel_size - 1) - p` here.
    kernel_dilation: Distance of the kernel's elements, like `strides`.
    use_bias: Whether there is a bias.
    mask: An array of the kernel's shape that the kernel is multiplied by, or
      None.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    param_dtype: The dtype of the parameters.
    precision: Precision of the products, as in `jax.lax.conv_transpose`.
    kernel_init: `(key, shape, dtype) -> kernel`.
    bias_init: `(key, shape, dtype) -> bias`.
    transpose_kernel: Whether to flip the kernel's spatial axes and swap its
      channels, so that the layer is the transpose of the `Conv` with it.
    promote_dtype: `((inputs, kernel, bias), dtype=dtype)`; returns those three
      in the dtype to compute in.
    preferred_element_type: The dtype of the result before the bias, as in
      `jax.lax.conv_transpose`.
    rngs: The stream `params` gives the keys of kernel and bias.
    kernel_metadata: Metadata of the kernel.
    bias_metadata: Metadata of the bias.

  Attributes:
    kernel: `Param`, `[*kernel_size, k, c]`, or `[*kernel_size, c, k]` with
      `transpose_kernel`.
    bias: `Param`, `[c]`, or None.
  """

  def __init__(
    self,
    in_features: int,
    out_features: int,
    kernel_size: int | Sequence[int],
    strides: int | Sequence[int] | None = None,
    *,
    padding: Padding = "SAME",
    kernel_dilation: int | Sequence[int] | None = None,
    use_bias: bool = True,
    mask: jax.Array | None = None,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    precision: Any = None,
    kernel_init: Initializer = default_kernel_init,
    bias_init: Initializer = default_bias_init,
    transpose_kernel: bool = False,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    preferred_element_type: dtypes.Dtype | None = None,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = NO_METADATA,
    bias_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    checks.whole("in_features", in_features)
    checks.whole("out_features", out_features)
    checks.wholes("kernel_size", kernel_size, 1)
    _check_steps("strides", strides, kernel_size)
    _check_steps("kernel_dilation", kernel_dilation, kernel_size)
    # In small letters jax takes them for something else.
    _check_padding(padding, ("CIRCULAR",), any_case=False)
    self.kernel_size = (
      (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
    )
    channels = (in_features, out_features)
    self.kernel_shape = (
      *self.kernel_size,
      *(channels[::-1] if transpose_kernel else channels),
    )
    self.kernel = Param(
      initialize(kernel_init, checks.key(rngs), self.kernel_shape, param_dtype),
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
    self.strides = strides
    self.padding = padding
    self.kernel_dilation = kernel_dilation
    self.use_bias = use_bias
    self.mask = mask
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.precision = precision
    self.transpose_kernel = transpose_kernel
    self.promote_dtype = promote_dtype
    self.preferred_element_type = preferred_element_type

  def __call__(self, inputs: jax.Array) -> jax.Array:
    """Applies the layer.

    Args:
      inputs: `[..., *spatial, k]`.

    Returns:
      `[..., *spatial, c]`, the sizes as strides and padding make them.

    Raises:
      ValueError: If `mask` or `padding` do not fit the kernel.
    """
    rank = len(self.kernel_size)
    _check_mask(self)
    arrays = (
      inputs,
      self.kernel[...],
      None if self.bias is None else self.bias[...],
      self.mask,
    )
    how = _transposed(
      _as_tuple(self.strides, rank),
      _canonical_padding(self.padding, rank),
      _as_tuple(self.kernel_dilation, rank),
      self.transpose_kernel,
      self.dtype,
      self.precision,
      self.preferred_element_type,
      self.promote_dtype,
    )
    try:
      if self.promote_dtype is dtypes.promote_dtype:
        return _convolve_transposed_compiled(*arrays, how)
      return _convolve_transposed(*arrays, how)
    except (IndexError, TypeError, ValueError):
      axis = -1 if self.transpose_kernel else -2
      _check_inputs(self, inputs, self.kernel.shape[axis])
      raise
