"""Weights packed into 8 or 4 bits, with a scale for each group of them."""

import dataclasses
import functools
from typing import Any

import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np

from ..common import options
from . import checks

GROUPS = (32, 64, 128)

# Numbers of 4 bits in a word.
PACKED = 8

# Rows that the kernel takes at once, so that a group begins where it does.
_UNIT = 4

# The largest code of each kind that has no minimum.
_LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
  """A matrix `[k, n]` of packed numbers; `quantize` makes one.

  It is a pytree of arrays and stands wherever those do: in a Variable, in a
  checkpoint, as an argument of `jax.jit`, mapped over by `vmap` and `scan`.

  Attributes:
    values: int8 or float8_e4m3fn `[k, n]`; for 4 bits uint32 `[k / 8, n]`, of
      which the bits from 4 * i on are row 8 * r + i of the matrix.
    scale: bfloat16 `[groups, n]`.
    minimum: bfloat16 `[groups, n]` for 4 bits, None otherwise.

  Example:
    >>> import jax.numpy as jnp
    >>> import kernels
    >>> w = kernels.matmul.quantize(jnp.ones((64, 3)), bits=4)
    >>> w.shape, w.bits, w.group, w.values.shape
    ((64, 3), 4, 64, (8, 3))
  """

  values: jax.Array
  scale: jax.Array
  minimum: jax.Array | None = None

  @property
  def bits(self) -> int:
    """Bits of one number, without its group's."""
    return 8 if self.minimum is None else 4

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the matrix."""
    *lead, k, n = self.values.shape
    return (*lead, k if self.minimum is None else PACKED * k, n)

  @property
  def ndim(self) -> int:
    """Number of axes of the matrix."""
    return self.values.ndim

  @property
  def group(self) -> int:
    """How many rows share a scale."""
    return self.shape[-2] // self.scale.shape[-2]

  @property
  def nbytes(self) -> int:
    """Bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(self))


export.register_pytree_node_serialization(
  QuantizedWeight,
  serialized_name="fused_nnx.kernels.matmul.QuantizedWeight",
  serialize_auxdata=lambda aux: b"",
  deserialize_auxdata=lambda data: (),
)


def quantize(
  w: Any, bits: int = 8, *, dtype: Any = None, group: int | None = 64
) -> QuantizedWeight:
  """Packs a matrix of weights.

  8 bits are symmetric, `w = values * scale`; 4 bits have a minimum,
  `w = values * scale + minimum` with values from 0 to 15. The scale is rounded
  up, and the minimum down, to bfloat16 before the values are chosen: no value
  is cut off, and their rounding costs nothing.

  Args:
    w: `[..., k, n]`, floating and finite.
    bits: 8 or 4.
    dtype: float8_e4m3fn in place of int8.
    group: How many rows share a scale: 32, 64, 128, or None for all of them.

  Raises:
    TypeError: If `w` is not floating.
    ValueError: If an option is not known, or k is not a multiple of the group,
      or of 8 for 4 bits.

  Example:
    >>> import jax.numpy as jnp
    >>> import kernels
    >>> w = jnp.linspace(-1.0, 1.0, 128).reshape(64, 2)
    >>> packed = kernels.matmul.quantize(w, bits=4, group=32)
    >>> y = kernels.matmul(jnp.ones((1, 64)), packed)
    >>> bool(jnp.allclose(y, jnp.sum(w, 0), atol=0.5))
    True
  """
  w = checks.floating("w", w)
  bits = options.one_of("bits", bits, (8, 4))
  if w.ndim < 2:
    raise ValueError(
      f"`w` must have at least 2 axes [k, n], but got shape {w.shape}."
    )
  name = "int8" if dtype is None else checks.dtype_name("dtype", dtype)
  if name not in _LARGEST or (dtype is not None and bits == 4):
    raise ValueError(
      "`dtype` must be float8_e4m3fn, int8 or None, and None for 4 bits, but"
      f" got {name} for {bits} bits."
    )
  k = w.shape[-2]
  if group is not None:
    group = options.one_of("group", group, (*GROUPS,))
  rows = k if group is None else group
  unit = PACKED if bits == 4 else 1
  if k == 0 or k % rows or rows % unit:
    raise ValueError(
      f"`w` of shape {w.shape} must have a multiple of"
      f" {max(unit, group or 1)} rows for {bits} bits and `group={group}`. Pad"
      " it, or take a smaller group."
    )
  return _quantize(w, bits, name, rows)


def dequantize(w: QuantizedWeight, dtype: Any = jnp.float32) -> jax.Array:
  """Returns the matrix that packed weights stand for.

  Args:
    w: Of shape `[..., k, n]`.
    dtype: Of the result.

  Example:
    >>> import jax.numpy as jnp
    >>> import kernels
    >>> packed = kernels.matmul.quantize(jnp.full((32, 1), 0.5), group=32)
    >>> kernels.matmul.dequantize(packed).shape
    (32, 1)
  """
  check_packed("w", w)
  return _dequantize(w, checks.dtype_name("dtype", dtype))


def quantization_error(w: Any, packed: QuantizedWeight) -> jax.Array:
  """Returns the error of packed weights as a part of the weights.

  It is the root of the mean of squares, of the difference over that of `w`.

  Args:
    w: What was packed.
    packed: What came out.

  Example:
    >>> import jax.numpy as jnp
    >>> import kernels
    >>> w = jnp.cos(jnp.arange(640.0)).reshape(64, 10)
    >>> packed = kernels.matmul.quantize(w)
    >>> bool(kernels.matmul.quantization_error(w, packed) < 0.005)
    True
  """
  w = checks.floating("w", w).astype(jnp.float32)
  off = dequantize(packed) - w
  return jnp.sqrt(jnp.mean(lax.square(off)) / jnp.mean(lax.square(w)))


@functools.partial(jax.jit, static_argnums=1)
def _dequantize(w, dtype):
  return unpacked(w.values, w.scale, w.minimum).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(w, bits, name, rows):
  """Packs `w`, of which so many `rows` share a scale."""
  k = w.shape[-2]
  grouped = w.astype(jnp.float32).reshape(
    *w.shape[:-2], k // rows, rows, w.shape[-1]
  )
  if bits == 8:
    top = jnp.max(jnp.abs(grouped), axis=-2)
    scale = _round_up(top / _LARGEST[name])
    codes = grouped / _divisor(scale)
    if name == "int8":
      codes = jnp.clip(jnp.rint(codes), -127, 127)
    values = codes.reshape(w.shape).astype(name)
    return QuantizedWeight(values, scale)
  minimum = -_round_up(-jnp.min(grouped, axis=-2))
  low = minimum.astype(jnp.float32)
  scale = _round_up((jnp.max(grouped, axis=-2) - low) / 15)
  codes = (grouped - jnp.expand_dims(low, -2)) / _divisor(scale)
  codes = jnp.clip(jnp.rint(codes), 0, 15).astype(jnp.uint32)
  codes = codes.reshape(*w.shape[:-2], k // PACKED, PACKED, w.shape[-1])
  values = jnp.sum(codes << _shifts(), axis=-2, dtype=jnp.uint32)
  return QuantizedWeight(values, scale, minimum)


def unpacked(
  values: jax.Array, scale: jax.Array, minimum: jax.Array | None = None
) -> jax.Array:
  """Returns the matrix in float32; arguments as in `QuantizedWeight`."""
  if values.dtype == jnp.uint32:
    codes = (jnp.expand_dims(values, -2) >> _shifts()) & 15
    k = PACKED * values.shape[-2]
    values = codes.reshape(*values.shape[:-2], k, values.shape[-1])
  shape, groups = values.shape, scale.shape[-2]
  grouped = values.astype(jnp.float32).reshape(
    *shape[:-2], groups, shape[-2] // groups, shape[-1]
  )
  grouped = grouped * jnp.expand_dims(scale, -2).astype(jnp.float32)
  if minimum is not None:
    grouped = grouped + jnp.expand_dims(minimum, -2).astype(jnp.float32)
  return grouped.reshape(shape)


def check_packed(name: str, w: Any) -> None:
  """Checks that the arrays of packed weights fit one another.

  Args:
    name: What the caller calls it.
    w: A QuantizedWeight.

  Raises:
    TypeError: If it is not one, or a dtype is not as it must be.
    ValueError: If a shape is not.
  """
  if not isinstance(w, QuantizedWeight):
    raise TypeError(
      f"`{name}` must be a QuantizedWeight, but got `{type(w).__name__}`."
    )
  kinds = ("int8", "float8_e4m3fn") if w.minimum is None else ("uint32",)
  if w.values.dtype.name not in kinds:
    raise TypeError(
      f"`{name}.values` must be {' or '.join(kinds)}"
      f" {'without' if w.minimum is None else 'with'} a minimum, but got"
      f" {w.values.dtype.name}."
    )
  for part in ("scale", "minimum"):
    array = getattr(w, part)
    if array is None:
      continue
    if array.dtype != jnp.bfloat16:
      raise TypeError(
        f"`{name}.{part}` must be bfloat16, but got {array.dtype.name}."
      )
    lead, n = w.values.shape[:-2], w.values.shape[-1]
    groups = w.scale.shape[-2] if w.scale.ndim > 1 else 0
    unit = 1 if w.minimum is None else PACKED
    fits = w.values.ndim >= 2 and array.shape == (*lead, groups, n)
    if not fits or groups == 0 or w.shape[-2] % (groups * unit):
      raise ValueError(
        f"`{name}.{part}` must have a row for each group of rows of the"
        f" matrix, but the shapes are {array.shape} and {w.values.shape}."
      )
  if w.scale.shape[-2] > 1 and w.group % _UNIT:
    raise ValueError(
      f"The groups of `{name}` must be of a multiple of {_UNIT} rows, or there"
      f" must be one of all rows, but they are of {w.group}."
    )


def _shifts() -> np.ndarray:
  """Returns where the numbers of a word begin, `[8, 1]`."""
  return 4 * np.arange(PACKED, dtype=np.uint32)[:, None]


def _divisor(scale):
  scale = scale.astype(jnp.float32)
  return jnp.expand_dims(jnp.where(scale == 0, 1, scale), -2)


def _round_up(x):
  """Rounds float32 to bfloat16, never towards minus infinity."""
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  cut = bits & jnp.uint32(0xFFFF0000)
  # Of a negative number the bits that are cut make it smaller in magnitude.
  up = (cut != bits) & (x > 0)
  cut = jnp.where(up, cut + jnp.uint32(0x10000), cut)
  return lax.bitcast_convert_type(cut, jnp.float32).astype(jnp.bfloat16)
