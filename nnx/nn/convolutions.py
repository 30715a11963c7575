"""The convolution of `Conv`, and its other forms on the CPU.

Where a kernel has more places than its image, XLA exchanges the two, and on the
CPU there is no fast code for what comes out: it runs at a fiftieth of the speed
of others. The gradients are convolutions as well, of which the result or its
gradient may be the image or the kernel. `convolve` says where that happens, and
then computes the same by a product, or keeps XLA from the exchange.

With a kernel of one place it is a product, the gradients of which are products
too, and take a third of the time that XLA's take.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from nnx import eager
from nnx.nn import products

Pads = Sequence[tuple[int, int]]

# As it was imported; see `eager.current`.
_CONV_GENERAL_DILATED = lax.conv_general_dilated
_DTYPES = ("float32", "bfloat16", "float16")
# Patches are made of as many slices as a kernel is long along each axis.
_MOST_SLICES = 64


@dataclasses.dataclass(frozen=True)
class _Axis:
  """A spatial axis: its sizes, and what of the kernel meets the image.

  Attributes:
    size: of the image.
    kernel: the size of the kernel.
    stride: of the kernel.
    low: zeros before the image; fewer than none cut it.
    high: those after it.
    dilation: distance of the image's elements.
    kernel_dilation: that of the kernel's.
  """

  size: int
  kernel: int
  stride: int
  low: int
  high: int
  dilation: int
  kernel_dilation: int

  @property
  def dilated(self) -> int:
    """The image's size with the zeros between its elements."""
    return (self.size - 1) * self.dilation + 1

  @property
  def out(self) -> int:
    """The size of the result."""
    reach = (self.kernel - 1) * self.kernel_dilation + 1
    return (self.low + self.dilated + self.high - reach) // self.stride + 1

  def cropped(self) -> tuple[_Axis, slice]:
    """Leaves out what of the kernel meets zeros alone.

    Returns:
      The axis of the smaller kernel, and which part of the kernel that is.
    """
    step = self.kernel_dilation
    last_window = (self.out - 1) * self.stride
    first = max(0, -((last_window - self.low) // step))
    end = min(self.kernel, (self.dilated - 1 + self.low) // step + 1)
    if first >= end:
      return self, slice(None)
    axis = dataclasses.replace(
      self,
      kernel=end - first,
      low=self.low - first * step,
      high=self.high - (self.kernel - end) * step,
    )
    return axis, slice(first, end)


def convolve(
  inputs: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: str | Pads,
  *,
  input_dilation: Sequence[int],
  kernel_dilation: Sequence[int],
  groups: int = 1,
  conv_general_dilated: Callable[..., jax.Array] = lax.conv_general_dilated,
  **options: Any,
) -> jax.Array:
  """Convolves, channels last.

  It is `conv_general_dilated`, or where that changes nothing but the time that
  it takes and the operations in a jaxpr, what the module says: on the CPU, for
  one group, in float32, bfloat16 and float16, and while functions of jax are
  those that were imported.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import convolutions
    >>> x, kernel = jnp.ones((1, 1, 2)), jnp.ones((3, 2, 4))
    >>> convolutions.convolve(
    ...   x, kernel, (1,), "SAME", input_dilation=(1,), kernel_dilation=(1,)
    ... )
    Array([[[2., 2., 2., 2.]]], dtype=float32)

  Args:
    inputs: `[b, *spatial, k]`.
    kernel: `[*sizes, k // groups, c]`.
    strides: Steps of the kernel, one for each spatial axis.
    padding: As in `jax.lax.conv_general_dilated`.
    input_dilation: Distance of the input's elements, likewise.
    kernel_dilation: Distance of the kernel's elements, likewise.
    groups: Of channels that are convolved separately.
    conv_general_dilated: The convolution, as in `jax.lax`.
    **options: Of the product, as `products.product_options` returns them.

  Returns:
    `[b, *sizes, c]`.
  """
  function = eager.current(conv_general_dilated)
  if function is _CONV_GENERAL_DILATED and groups == 1:
    axes = _axes(
      inputs, kernel, strides, padding, input_dilation, kernel_dilation
    )
    if axes and all(axis.out > 0 for axis in axes):
      y = _other_form(inputs, kernel, axes, options)
      if y is not None:
        return y
  return function(
    inputs,
    kernel,
    strides,
    padding,
    lhs_dilation=input_dilation,
    rhs_dilation=kernel_dilation,
    dimension_numbers=_channels_last(inputs.ndim),
    feature_group_count=groups,
    **options,
  )


def _channels_last(rank: int) -> lax.ConvDimensionNumbers:
  last = rank - 1
  data_axes = (0, last, *range(1, last))
  kernel_axes = (last, last - 1, *range(last - 1))
  return lax.ConvDimensionNumbers(data_axes, kernel_axes, data_axes)


def _axes(
  inputs: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: str | Pads,
  input_dilation: Sequence[int],
  kernel_dilation: Sequence[int],
) -> list[_Axis]:
  """Returns the spatial axes; none, if there is no other form."""
  shape = (*inputs.shape, *kernel.shape)
  if not (
    # jax says no pads by name for an image with zeros between its elements.
    not (isinstance(padding, str) and max(input_dilation, default=1) > 1)
    and inputs.dtype == kernel.dtype
    and inputs.dtype.name in _DTYPES
    and inputs.ndim == kernel.ndim
    and inputs.shape[-1] == kernel.shape[-2]
    and all(isinstance(size, int) and size > 0 for size in shape)
    and products.on_plain_cpu()
  ):
    return []
  sizes, taps = inputs.shape[1:-1], kernel.shape[:-2]
  if isinstance(padding, str):
    reach = [(k - 1) * d + 1 for k, d in zip(taps, kernel_dilation)]
    padding = lax.padtype_to_pads(sizes, reach, strides, padding)
  lows, highs = zip(*padding)
  return [
    _Axis(*numbers)
    for numbers in zip(
      sizes, taps, strides, lows, highs, input_dilation, kernel_dilation
    )
  ]


def _other_form(
  inputs: jax.Array,
  kernel: jax.Array,
  axes: Sequence[_Axis],
  options: dict[str, Any],
) -> jax.Array | None:
  """Returns the convolution in a form that is faster; None, if none is."""
  image = math.prod(axis.size for axis in axes)
  taps = math.prod(axis.kernel for axis in axes)
  out = math.prod(axis.out for axis in axes)
  if taps == 1:
    return _product(inputs, kernel, axes, options)
  if taps > min(image, out):  # here, or in the gradient by the inputs
    cropped, parts = zip(*(axis.cropped() for axis in axes))
    if sum(axis.kernel for axis in cropped) <= _MOST_SLICES:
      return _product(inputs, kernel[parts], cropped, options)
  if max(taps, out) > image:  # here, or in the gradient by the kernel
    return _padded_first(inputs, kernel, axes, options)
  return None


def _padded(inputs: jax.Array, axes: Sequence[_Axis]) -> jax.Array:
  """Writes the zeros before, after and between the inputs' elements."""
  pads = [(axis.low, axis.high, axis.dilation - 1) for axis in axes]
  zero = jnp.zeros((), inputs.dtype)
  return lax.pad(inputs, zero, [(0, 0, 0), *pads, (0, 0, 0)])


def _padded_first(
  inputs: jax.Array,
  kernel: jax.Array,
  axes: Sequence[_Axis],
  options: dict[str, Any],
) -> jax.Array:
  """Convolves an image that has its zeros: it is no smaller than the result."""
  # XLA would make padding of the convolution of it again.
  x = lax.optimization_barrier(_padded(inputs, axes))
  return _CONV_GENERAL_DILATED(
    x,
    kernel,
    [axis.stride for axis in axes],
    "VALID",
    rhs_dilation=[axis.kernel_dilation for axis in axes],
    dimension_numbers=_channels_last(x.ndim),
    **options,
  )


def _product(
  inputs: jax.Array,
  kernel: jax.Array,
  axes: Sequence[_Axis],
  options: dict[str, Any],
) -> jax.Array:
  """Multiplies what each window sees, as a row, by the kernel as a matrix."""
  x = _padded(inputs, axes)
  for i, axis in enumerate(axes, 1):
    last_window = (axis.out - 1) * axis.stride
    x = jnp.stack(
      [
        lax.slice_in_dim(x, at, at + last_window + 1, axis.stride, axis=i)
        for at in range(
          0, axis.kernel * axis.kernel_dilation, axis.kernel_dilation
        )
      ],
      axis=-2,
    )
  contracted = len(axes) + 1
  last = tuple(range(x.ndim - contracted, x.ndim))
  return products.dot(
    x, kernel, ((last, tuple(range(contracted))), ((), ())), **options
  )
