"""Layers whose kernels are packed into 8 or 4 bits, and what makes them."""

from __future__ import annotations

import math
from typing import Any, Generic, TypeVar, overload

import jax
import jax.numpy as jnp

from nnx import filterlib
from nnx.graphlib import traversal
from nnx.module import Module
from nnx.nn import checks, dtypes
from nnx.nn.embed import Embed, check_integers
from nnx.nn.linear import Linear
from nnx.nn.linear_general import LinearGeneral
from nnx.variablelib import Param, Variable

A = TypeVar("A")
M = TypeVar("M")


class Quantized(Variable[A], Generic[A]):
  """An array of a packed kernel; filters select it by its type.

  It is no `Param`: optimizers and gradients leave it alone.

  Example:

    >>> import nnx
    >>> layer = nnx.quantize(nnx.Linear(64, 3, rngs=nnx.Rngs(0)), bits=4)
    >>> sorted(nnx.state(layer, nnx.Quantized))
    ['minimum', 'scale', 'values']
  """


class _Packed(Module):
  """What layers with a packed matrix share."""

  values: Quantized[jax.Array]
  scale: Quantized[jax.Array]
  minimum: Quantized[jax.Array] | None

  def _pack(self, matrix: jax.Array, bits: int, group: int | None) -> None:
    """Keeps a matrix packed, `[rows, columns]`."""
    from nnx.kernels import matmul

    packed = matmul.quantize(matrix, bits=bits, group=group)
    self.values = Quantized(packed.values)
    self.scale = Quantized(packed.scale)
    self.minimum = None
    if packed.minimum is not None:
      self.minimum = Quantized(packed.minimum)
    self.bits = bits
    self.group = group
    self.param_dtype = matrix.dtype

  def _packed(self) -> Any:
    """Returns the matrix as `kernels.matmul` takes it."""
    from nnx.kernels import matmul

    minimum = None if self.minimum is None else self.minimum[...]
    return matmul.QuantizedWeight(self.values[...], self.scale[...], minimum)

  def _dequantized(self, dtype: dtypes.Dtype | None) -> jax.Array:
    """Returns the matrix, in the dtype that it had if None is given."""
    from nnx.kernels import matmul

    return matmul.dequantize(
      self._packed(), self.param_dtype if dtype is None else dtype
    )

  def _no_sharding(self, out_sharding: Any) -> None:
    if out_sharding is not None:
      raise ValueError(
        f"`out_sharding` must be None for a `{type(self).__name__}`, but got"
        f" {out_sharding}."
      )


class QuantizedLinear(_Packed):
  """Contracts the last axes of its input with a packed kernel; adds a bias.

      y = inputs @ kernel + bias
      kernel = values * scale                8 bits, symmetric
      kernel = values * scale + minimum      4 bits

  with a scale, and a minimum, for each group of rows of the kernel. `quantize`
  makes one of a `Linear` or `LinearGeneral`. The product is `kernels.matmul`,
  whose README says how the bits lie.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> plain = nnx.LinearGeneral(64, (2, 3), rngs=nnx.Rngs(0))
    >>> layer = nnx.QuantizedLinear(plain, bits=8, group=32)
    >>> layer.values.shape, layer.values.dtype, layer.scale.shape
    ((64, 6), dtype('int8'), (2, 6))
    >>> x = jnp.ones((5, 64))
    >>> bool(jnp.abs(layer(x) - plain(x)).max() < 0.05)
    True

  Args:
    layer: A `Linear`, or a `LinearGeneral` that contracts the last axes.
    bits: 8 or 4.
    group: How many rows of the kernel share a scale: 32, 64, 128, or None for
      all of them. Rows are what the layer contracts, all axes in one.

  Attributes:
    values: `Quantized`, int8 `[rows, columns]`, or for 4 bits uint32 `[rows /
      8, columns]`.
    scale: `Quantized`, bfloat16 `[groups, columns]`.
    minimum: The same for 4 bits; None for 8.
    bias: The layer's own `Param`, or None.

  Raises:
    TypeError: If the layer is of another class.
    ValueError: If it contracts other axes, has a product of its own, or its
      rows are not a multiple of the group.
  """

  def __init__(
    self,
    layer: Linear | LinearGeneral,
    *,
    bits: int = 8,
    group: int | None = 64,
  ):
    in_shape, out_shape = _shapes(layer)
    kernel = jnp.asarray(layer.kernel[...])
    rows, columns = math.prod(in_shape), math.prod(out_shape)
    self._pack(kernel.reshape((rows, columns)), bits, group)
    self.bias: Param[jax.Array] | None = layer.bias
    self.in_features = in_shape
    self.out_features = out_shape
    self.dtype = layer.dtype
    self.precision = layer.precision
    self.promote_dtype = layer.promote_dtype

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Applies the layer.

    Args:
      inputs: `[..., *in_features]`.
      out_sharding: None; the compiler chooses the sharding.

    Returns:
      `[..., *out_features]`, of the dtype that the layer had before it was
      quantised.

    Raises:
      ValueError: If the last axes of `inputs` have other sizes, or
        `out_sharding` is given.
    """
    from nnx.kernels import matmul

    self._no_sharding(out_sharding)
    axes = len(self.in_features)
    shape = jnp.shape(inputs)
    if len(shape) < axes or shape[len(shape) - axes :] != self.in_features:
      raise ValueError(
        f"The last axes of `inputs` must be {self.in_features} for this"
        f" `QuantizedLinear`, but got {shape}."
      )
    bias = None if self.bias is None else self.bias[...]
    # The dtype that the kernel had counts as it did, by an element of it.
    one = jnp.zeros((), self.param_dtype)
    inputs, _, bias = self.promote_dtype((inputs, one, bias), dtype=self.dtype)
    rows = inputs.shape[: inputs.ndim - axes]
    y = matmul.matmul(
      inputs.reshape((*rows, math.prod(self.in_features))),
      self._packed(),
      precision=self.precision,
    )
    y = y.reshape((*rows, *self.out_features))
    if bias is None:
      return y
    return y + bias.reshape((1,) * len(rows) + bias.shape)

  def dequantize(self, dtype: dtypes.Dtype | None = None) -> jax.Array:
    """Returns the kernel that the packed one stands for.

    Example:

      >>> import nnx
      >>> layer = nnx.quantize(nnx.Linear(64, 3, rngs=nnx.Rngs(0)))
      >>> layer.dequantize().shape
      (64, 3)

    Args:
      dtype: Of the result; that which the kernel had, if None.

    Returns:
      `[*in_features, *out_features]`.
    """
    kernel = self._dequantized(dtype)
    return kernel.reshape((*self.in_features, *self.out_features))


class QuantizedEmbed(_Packed):
  """Looks up vectors in a packed table, and multiplies with it.

  The table is packed as its transpose, `[features, num_embeddings]`, each
  vector in groups of its own: so `attend`, which reads all of it, is a product
  of `kernels.matmul`. `quantize` makes one of an `Embed`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> plain = nnx.Embed(5, 64, rngs=nnx.Rngs(0))
    >>> layer = nnx.QuantizedEmbed(plain, bits=8, group=32)
    >>> layer.values.shape, layer.values.dtype, layer.scale.shape
    ((64, 5), dtype('int8'), (2, 5))
    >>> ids = jnp.array([[0, 1], [4, -1]])
    >>> bool(jnp.abs(layer(ids) - plain(ids)).max() < 0.01)
    True
    >>> layer.attend(jnp.ones((2, 64))).shape
    (2, 5)

  Args:
    layer: An `Embed`, of n vectors of size c.
    bits: 8 or 4.
    group: How many numbers of a vector share a scale: 32, 64, 128, or None for
      all of them.

  Attributes:
    values: `Quantized`, int8 `[c, n]`, or for 4 bits uint32 `[c / 8, n]`.
    scale: `Quantized`, bfloat16 `[groups, n]`.
    minimum: The same for 4 bits; None for 8.

  Raises:
    TypeError: If the layer is of another class.
    ValueError: If the size of a vector is not a multiple of the group.
  """

  def __init__(self, layer: Embed, *, bits: int = 8, group: int | None = 64):
    if type(layer) is not Embed:
      raise TypeError(
        f"`layer` must be an `nnx.Embed`, but got a `{type(layer).__name__}`."
      )
    self._pack(jnp.asarray(layer.embedding[...]).T, bits, group)
    self.num_embeddings = layer.num_embeddings
    self.features = layer.features
    self.dtype = layer.dtype
    self.promote_dtype = layer.promote_dtype

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Looks up vectors.

    Args:
      inputs: `[...]`, integers, as for `Embed`.
      out_sharding: None; the compiler chooses the sharding.

    Returns:
      `[..., c]`.

    Raises:
      ValueError: If `inputs` are not integers, or `out_sharding` is given.
    """
    from nnx.kernels import matmul

    self._no_sharding(out_sharding)
    check_integers(inputs)
    shape = inputs.shape
    if self.num_embeddings == 1:
      inputs = jnp.zeros_like(inputs)
    flat = inputs.reshape(-1)
    vectors = jax.tree.map(
      lambda part: jnp.take(part, flat, axis=1), self._packed()
    )
    found = matmul.dequantize(vectors, self.param_dtype).T
    found = found.reshape((*shape, self.features))
    (found,) = self.promote_dtype((found,), dtype=self.dtype, inexact=False)
    return found

  def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Multiplies vectors with all of the table, as for logits of tokens.

    Args:
      query: `[..., c]`.
      out_sharding: None; the compiler chooses the sharding.

    Returns:
      `[..., n]`.

    Raises:
      ValueError: If the last axis of `query` is not c, or `out_sharding` is
        given.
    """
    from nnx.kernels import matmul

    self._no_sharding(out_sharding)
    checks.last_axis(self, "query", query, self.features)
    one = jnp.zeros((), self.param_dtype)
    query, _ = self.promote_dtype((query, one), dtype=self.dtype)
    return matmul.matmul(query, self._packed())

  def dequantize(self, dtype: dtypes.Dtype | None = None) -> jax.Array:
    """Returns the table that the packed one stands for.

    Example:

      >>> import nnx
      >>> layer = nnx.QuantizedEmbed(nnx.Embed(5, 64, rngs=nnx.Rngs(0)))
      >>> layer.dequantize().shape
      (5, 64)

    Args:
      dtype: Of the result; that which the table had, if None.

    Returns:
      `[n, c]`.
    """
    return self._dequantized(dtype).T


def _shapes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the axes of a kernel that are contracted, and the others."""
  shapes: tuple[tuple[int, ...], tuple[int, ...]]
  if type(layer) is Linear:
    plain = layer.dot_general is jax.lax.dot_general
    shapes = (layer.in_features,), (layer.out_features,)
  elif type(layer) is LinearGeneral:
    plain = layer.dot_general is None and layer.dot_general_cls is None
    shapes = layer.in_features, layer.out_features
    last = tuple(range(-len(layer.axis), 0))
    if layer.batch_axis or tuple(layer.axis) != last:
      raise ValueError(
        "A `LinearGeneral` must contract the last axes to be quantised, but"
        f" got `axis={layer.axis}` and `batch_axis={dict(layer.batch_axis)}`."
      )
  else:
    raise TypeError(
      "`layer` must be an `nnx.Linear` or `nnx.LinearGeneral`, but got a"
      f" `{type(layer).__name__}`."
    )
  if not plain or layer.preferred_element_type is not None:
    raise ValueError(
      f"A `{type(layer).__name__}` with a `dot_general` or a"
      " `preferred_element_type` of its own must not be quantised, as its"
      " product would be another."
    )
  return shapes


_PACKED: dict[type[Module], Any] = {
  Linear: QuantizedLinear,
  LinearGeneral: QuantizedLinear,
  Embed: QuantizedEmbed,
}


@overload
def quantize(
  model: Linear | LinearGeneral | Embed,
  filter: filterlib.Filter = ...,
  *,
  bits: int = ...,
  group: int | None = ...,
) -> Any: ...
@overload
def quantize(
  model: M,
  filter: filterlib.Filter = ...,
  *,
  bits: int = ...,
  group: int | None = ...,
) -> M: ...
def quantize(
  model: Any,
  filter: filterlib.Filter = (Linear, LinearGeneral),
  *,
  bits: int = 8,
  group: int | None = 64,
) -> Any:
  """Packs the kernels of linear layers, and tables, into 8 or 4 bits.

  Each `Linear` and `LinearGeneral` that the filter selects, the projections of
  attention among them, becomes a `QuantizedLinear`, and each `Embed` a
  `QuantizedEmbed`. Tables stay as they are by default: only where they are
  multiplied with, as for logits, does a step read more of them than a few
  vectors. Weights take a half or a
  quarter of bfloat16's bytes, and so does the time of a step that makes one
  token. Checkpoints are saved and loaded as of any model, into one that was
  quantised alike (`nnx.eval_shape` makes it without arrays). For training on
  top, `nnx.LoRA` takes a quantised layer as its `base_module`.

  Source: symmetric int8 and 4 bits with a minimum, as `q8_0` and `q4_1` of GGUF
  files, but for groups of another size.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> model = nnx.Sequential(
    ...   nnx.Linear(64, 64, rngs=nnx.Rngs(0)),
    ...   nnx.relu,
    ...   nnx.Linear(64, 3, rngs=nnx.Rngs(1)),
    ... )
    >>> small = nnx.quantize(
    ...   model, lambda path, layer: layer.out_features == 64, bits=4
    ... )
    >>> [type(layer).__name__ for layer in small.layers]
    ['QuantizedLinear', 'custom_jvp', 'Linear']
    >>> bool(jnp.abs(small(jnp.ones(64)) - model(jnp.ones(64))).max() < 0.2)
    True

  Args:
    model: A Module, or a pytree of them. It stays as it is.
    filter: Which layers, as in `nnx.state`, but of layers: a function of their
      path and themselves, `nnx.PathContains`, a class, or `...` for all,
      tables too.
    bits: 8 or 4.
    group: How many rows of a kernel share a scale: 32, 64, 128, or None for all
      of them.

  Returns:
    A copy of the model, which shares all other Variables with it.

  Raises:
    ValueError: If no layer is selected, or one cannot be quantised; with its
      path.
  """
  selects = filterlib.to_predicate(filter)
  count = 0

  def replaced(path, value):
    nonlocal count
    packed = _PACKED.get(type(value))
    if packed is None or not selects(path, value):
      return value
    try:
      layer = packed(value, bits=bits, group=group)
    except ValueError as error:
      where = "/".join(map(str, path)) or "the model itself"
      raise ValueError(
        f"{error} It is the layer at `{where}`; let the filter leave it out."
      ) from None
    count += 1
    return layer

  from nnx.kernels import matmul

  checks.whole("bits", bits)
  # Options that fit no layer are refused without the name of one.
  jax.eval_shape(
    lambda w: matmul.quantize(w, bits=bits, group=group),
    jax.ShapeDtypeStruct((128, 1), jnp.float32),
  )
  model = traversal.recursive_map(replaced, model)
  if not count:
    raise ValueError(
      f"`filter` must select an `nnx.Linear`, `nnx.LinearGeneral` or"
      f" `nnx.Embed`, but {filter!r} selects none of this"
      f" `{type(model).__name__}`."
    )
  return model
