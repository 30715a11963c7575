"""`LinearGeneral`: contracts any axes of its input with a kernel."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Iterator, Mapping, Sequence
import math
import types
from typing import Any, cast

import jax
from jax import lax
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
from nnx.nn.products import DotGeneral, as_tuple, dot
from nnx.rnglib import Rngs
from nnx.variablelib import Param, VariableMetadata

_NO_AXES: Mapping[int, int] = types.MappingProxyType({})

# As it was imported; see `eager.current`.
_DOT_GENERAL = lax.dot_general


class AxisSizes(collections.abc.Mapping):
  """An immutable, hashable mapping from axes to sizes.

  Example:

    >>> from nnx.nn.linear import AxisSizes
    >>> sizes = AxisSizes({0: 5})
    >>> sizes[0], sizes == {0: 5}, hash(sizes) == hash(AxisSizes({0: 5}))
    (5, True, True)

  Args:
    sizes: The mapping.
  """

  def __init__(self, sizes: Mapping[int, int] = _NO_AXES):
    self._sizes = dict(sizes)

  def __getitem__(self, axis: int) -> int:
    return self._sizes[axis]

  def __iter__(self) -> Iterator[int]:
    return iter(self._sizes)

  def __len__(self) -> int:
    return len(self._sizes)

  def __hash__(self) -> int:
    return hash(frozenset(self._sizes.items()))

  def __repr__(self) -> str:
    return f"AxisSizes({self._sizes})"


def linear_general(
  inputs: Any,
  kernel: jax.Array,
  bias: jax.Array | None,
  axis: tuple[int, ...],
  batch_axis: tuple[int, ...] = (),
  out_rank: int = 1,
  dtype: dtypes.Dtype | None = None,
  precision: Any = None,
  preferred_element_type: dtypes.Dtype | None = None,
  out_sharding: Any = None,
  promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
  dot_general: DotGeneral = lax.dot_general,
) -> jax.Array:
  """Contracts some axes with a kernel and adds a bias.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn.linear import linear_general
    >>> x, kernel = jnp.ones((5, 2, 3)), jnp.ones((2, 3, 4))
    >>> linear_general(x, kernel, None, (1, 2)).shape
    (5, 4)

  Args:
    inputs: An array with the axes `axis` and `batch_axis`, and any others.
    kernel: `[*batch_axis, *axis, *out]`, where `axis` is sorted.
    bias: `[*batch_axis, *out]` or None.
    axis: The axes of `inputs` to contract.
    batch_axis: The axes of `inputs` for each index of which there is a kernel.
    out_rank: How many axes `out` has.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    precision: Precision of the product, as in `jax.lax.dot_general`.
    preferred_element_type: The dtype of the product, likewise.
    out_sharding: The sharding of the product, likewise.
    promote_dtype: Converts the three arrays to `dtype`.
    dot_general: The product; gets `preferred_element_type` only if it is set.

  Returns:
    `[*batch_axis, *others, *out]`.
  """
  rank = jnp.ndim(inputs)
  shape = jnp.shape(inputs)
  axis = tuple(sorted(a % rank if a < 0 else a for a in axis))
  batch_axis = tuple(sorted(a % rank if a < 0 else a for a in batch_axis))
  inputs, kernel, bias = promote_dtype((inputs, kernel, bias), dtype=dtype)
  first = len(batch_axis)
  y = dot(
    inputs,
    kernel,
    (
      (axis, tuple(range(first, first + len(axis)))),
      (batch_axis, tuple(range(first))),
    ),
    dot_general=dot_general,
    precision=precision,
    preferred_element_type=preferred_element_type,
    out_sharding=out_sharding,
  )
  if bias is None:
    return y
  kept = [a for a in range(rank) if a not in axis]
  ones = [shape[a] if a in batch_axis else 1 for a in kept]
  features = bias.shape[bias.ndim - out_rank :]
  return y + jnp.reshape(bias, (*ones, *features))


_linear_general = eager.compiled(
  linear_general,
  static=(
    "axis",
    "batch_axis",
    "out_rank",
    "dtype",
    "precision",
    "preferred_element_type",
    "out_sharding",
  ),
)


def _initialize_flat(
  init: Initializer,
  key: jax.Array,
  flat_shape: tuple[int, ...],
  shape: tuple[int, ...],
  dtype: dtypes.Dtype,
) -> jax.Array:
  """Runs an initializer on a flat shape, on which its fans depend."""
  value = initialize(init, key, flat_shape, dtype)
  if flat_shape == shape:
    return value
  if isinstance(value, VariableMetadata):
    value.raw_value = jnp.reshape(value.raw_value, shape)
    return cast(jax.Array, value)
  return jnp.reshape(value, shape)


class LinearGeneral(Module):
  """Contracts some axes with a learned kernel and adds a learned bias.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.LinearGeneral(
    ...   (2, 3), (4, 5), axis=(1, -1), rngs=nnx.Rngs(0)
    ... )
    >>> layer.kernel.shape, layer.bias.shape
    ((2, 3, 4, 5), (4, 5))
    >>> layer(jnp.ones((16, 2, 3))).shape
    (16, 4, 5)

  Args:
    in_features: The sizes of the axes that are contracted, an int for one.
    out_features: The sizes of the axes that they become, an int for one.
    axis: Which axes of the input are contracted, as many as `in_features`.
    batch_axis: Axes of the input, the leading ones, with their sizes: each
      index along them has its own kernel and bias.
    use_bias: Whether there is a bias.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    param_dtype: The dtype of the parameters.
    kernel_init: `(key, shape, dtype) -> kernel`, of the flat shape `[inputs,
      outputs]`.
    bias_init: `(key, shape, dtype) -> bias`, of one axis.
    precision: Precision of the product, as in `jax.lax.dot_general`.
    promote_dtype: `((inputs, kernel, bias), dtype=dtype)`; returns those three
      in the dtype to compute in.
    dot_general: Called in place of `jax.lax.dot_general`, if not None.
    dot_general_cls: A constructor of a `dot_general` for each call, if not
      None.
    preferred_element_type: The dtype of the product, as in
      `jax.lax.dot_general`.
    rngs: The stream `params` gives the keys of kernel and bias.
    kernel_metadata: Metadata of the kernel.
    bias_metadata: Metadata of the bias.

  Attributes:
    kernel: `Param`, `[*batch_axis, *in_features, *out_features]`.
    bias: `Param`, `[*batch_axis, *out_features]`, or None.

  Raises:
    ValueError: If `in_features` and `axis` differ in length, or `batch_axis`
      are not the leading axes.
  """

  def __init__(
    self,
    in_features: int | Sequence[int],
    out_features: int | Sequence[int],
    *,
    axis: int | Sequence[int] = -1,
    batch_axis: Mapping[int, int] = _NO_AXES,
    use_bias: bool = True,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    kernel_init: Initializer = default_kernel_init,
    bias_init: Initializer = default_bias_init,
    precision: Any = None,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    dot_general: DotGeneral | None = None,
    dot_general_cls: Callable[[], DotGeneral] | None = None,
    preferred_element_type: dtypes.Dtype | None = None,
    rngs: Rngs,
    kernel_metadata: Mapping[str, Any] = NO_METADATA,
    bias_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    checks.wholes("in_features", in_features)
    checks.wholes("out_features", out_features)
    self.in_features = as_tuple(in_features)
    self.out_features = as_tuple(out_features)
    self.axis = as_tuple(axis)
    self.batch_axis = AxisSizes(batch_axis)
    self.use_bias = use_bias
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.precision = precision
    self.promote_dtype = promote_dtype
    self.dot_general = dot_general
    self.dot_general_cls = dot_general_cls
    self.preferred_element_type = preferred_element_type
    if len(self.in_features) != len(self.axis):
      raise ValueError(
        "`in_features` must have one size for each of `axis`, but got"
        f" `in_features={self.in_features}` and `axis={self.axis}`."
      )
    if sorted(self.batch_axis) != list(range(len(self.batch_axis))):
      raise ValueError(
        "`batch_axis` must name the leading axes, from 0 on without a gap, but"
        f" got `{dict(self.batch_axis)}`. Move those axes to the front."
      )
    batch = tuple(self.batch_axis.values())
    fan_in = math.prod(batch) * math.prod(self.in_features)
    fan_out = math.prod(self.out_features)
    self.kernel = Param(
      _initialize_flat(
        kernel_init,
        checks.key(rngs),
        (fan_in, fan_out),
        (*batch, *self.in_features, *self.out_features),
        param_dtype,
      ),
      **kernel_metadata,
    )
    self.bias = None
    if use_bias:
      self.bias = Param(
        _initialize_flat(
          bias_init,
          checks.key(rngs),
          (math.prod(batch) * fan_out,),
          (*batch, *self.out_features),
          param_dtype,
        ),
        **bias_metadata,
      )

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Applies the layer.

    Args:
      inputs: An array with the axes `axis` and `batch_axis`, and any others.
      out_sharding: The sharding of the product, under a mesh with explicit
        axes.

    Returns:
      `[*batch_axis, *others, *out_features]`.
    """
    arguments = (
      inputs,
      self.kernel[...],
      None if self.bias is None else self.bias[...],
      self.axis,
      tuple(self.batch_axis),
      len(self.out_features),
      self.dtype,
      self.precision,
      self.preferred_element_type,
      out_sharding,
    )
    try:
      if (
        self.promote_dtype is dtypes.promote_dtype
        and self.dot_general is None
        and self.dot_general_cls is None
      ):
        return _linear_general(*arguments)
      if self.dot_general_cls is not None:
        dot_general = self.dot_general_cls()
      else:
        dot_general = self.dot_general or _DOT_GENERAL
      return linear_general(*arguments, self.promote_dtype, dot_general)
    except (TypeError, ValueError):
      self._check_axes(inputs)
      raise

  def _check_axes(self, inputs: Any) -> None:
    """Raises if the inputs do not fit the kernel."""
    shape = jnp.shape(inputs)
    axes = [*self.batch_axis, *self.axis]
    sizes = (*self.batch_axis.values(), *self.in_features)
    for axis, size in zip(axes, sizes):
      if not -len(shape) <= axis < len(shape) or shape[axis] != size:
        raise ValueError(
          f"Axis {axis} of `inputs` must be {size} for this"
          f" `{type(self).__name__}`, but got {shape}."
        ) from None
