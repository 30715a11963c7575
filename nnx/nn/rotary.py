"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

Element i of the first half of a head and element i of the second half are a
pair, which turns by an angle proportional to its token's position. The product
of a query and a key then depends on their distance alone. `Rotation` holds the
ways in which models differ: which elements are pairs, how many there are, and
how fast they turn.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx import eager
from nnx.module import Module
from nnx.nn import checks
from nnx.nn.dot_product import dot_product_attention
from nnx.nn.rope_scaling import RopeScaling
from nnx.variablelib import Variable

# Positions are split into multiples of this and the rest.
_STRIDE = 256
_UNSCALED = RopeScaling()


# `kernels.decode_attention.rope_tables` computes the same angles, in an order
# that rounds differently unless `scale` is a power of two.  It is not called
# here, so that numbers stay and programs that only train import no kernels.
@functools.lru_cache(maxsize=64)
def _angles(
  count: int,
  stride: int,
  features: int,
  base: float,
  scale: float,
  scaling: RopeScaling,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns cosines and sines at multiples of `stride`, by float64 angles."""
  angles = np.arange(count, dtype=np.float64)[:, None] * (stride / scale)
  angles = angles * scaling.rates(features, base)
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rows(
  positions: jax.Array,
  max_length: int | None,
  features: int,
  base: float,
  scale: float = 1.0,
  scaling: RopeScaling | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns the cosines and sines of the angles at some positions.

  The angle of pair i is `position / scale / base ** (2 * i / features)`.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import rotary
    >>> cos, sin = rotary.rows(jnp.array([0, 1]), 2, 4, 10000.0)
    >>> cos.shape, float(sin[1, 0].round(2)), float(sin[0, 0])
    ((2, 2), 0.8399999737739563, 0.0)

  Args:
    positions: `[...]` integers in [0, `max_length`).
    max_length: The number of positions; all of int32, if None or symbolic.
    features: How many features of a head are rotated, even.
    base: Base of the wavelengths.
    scale: Positions are divided by it.
    scaling: Changes how fast pairs turn, and the magnitude.

  Returns:
    Two arrays `[..., features // 2]`, float32.

  Numerics: A float32 angle is off by 0.01 at position 100,000. So the angles of
    each digit of a position, in base 256, are computed in float64 when the
    program is traced; their cosines and sines are combined in float32.
  """
  scaling = scaling or _UNSCALED
  most = max_length if isinstance(max_length, int) else 2**31
  table: tuple[jax.Array, jax.Array] | None = None
  stride = 1
  while table is None or stride < most:
    count = min(-(-most // stride), _STRIDE)
    digit = positions // stride
    if count * stride < most:  # not the last digit
      digit = digit % _STRIDE
    far = _angles(count, stride, features, base, scale, scaling)
    far_cos, far_sin = (jnp.asarray(part)[digit] for part in far)
    if table is None:
      table = far_cos, far_sin
    else:
      cos, sin = table
      table = far_cos * cos - far_sin * sin, far_sin * cos + far_cos * sin
    stride *= _STRIDE
  if scaling.magnitude == 1.0:
    return table
  return table[0] * scaling.magnitude, table[1] * scaling.magnitude


def rotate(
  x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False
) -> jax.Array:
  """Rotates the pairs of each head.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import rotary
    >>> quarter = jnp.zeros((1, 1)), jnp.ones((1, 1))
    >>> rotary.rotate(jnp.array([[[1.0, 0.0, 5.0]]]), *quarter)
    Array([[[0., 1., 5.]]], dtype=float32)

  Args:
    x: `[..., t, n, h]`, floating.
    cos: `[..., t, pairs]`, or with fewer leading axes. Elements after the first
      `2 * pairs` are left alone.
    sin: Like `cos`.
    interleaved: Whether elements 2i and 2i + 1 are a pair, else elements i and
      `i + pairs`.

  Returns:
    An array like x, computed in float32 at least.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  pairs = cos.shape[-1]
  shape = (*cos.shape[:-1], 1, pairs)
  shape = (1,) * (x.ndim - len(shape)) + shape
  cos, sin = (a.reshape(shape).astype(wide.dtype) for a in (cos, sin))
  first, second = _pairs(wide, pairs, interleaved)
  parts = [first * cos - second * sin, second * cos + first * sin]
  if interleaved:
    parts = [jnp.stack(parts, -1).reshape((*x.shape[:-1], 2 * pairs))]
  turned = jnp.concatenate([*parts, wide[..., 2 * pairs :]], -1)
  return turned.astype(x.dtype)


def _pairs(
  x: jax.Array, pairs: int, interleaved: bool
) -> tuple[jax.Array, jax.Array]:
  """Returns the first and the second elements of all pairs."""
  if interleaved:
    split = x[..., : 2 * pairs].reshape((*x.shape[:-1], pairs, 2))
    return split[..., 0], split[..., 1]
  return x[..., :pairs], x[..., pairs : 2 * pairs]


@dataclasses.dataclass(frozen=True)
class Rotation:
  """How a layer rotates its queries and keys.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import rotary
    >>> rotation = rotary.Rotation(10000.0, 4, interleaved=True)
    >>> cos, sin = rotation.rows(jnp.arange(3), 3)
    >>> rotation.rotate(jnp.ones((3, 1, 6)), cos, sin)[1, 0].round(1).tolist()
    [-0.30000001192092896, 1.399999976158142, 1.0, 1.0, 1.0, 1.0]

  Attributes:
    base: Base of the wavelengths.
    features: How many features of a head are rotated, the first of them.
    scale: Positions are divided by it.
    interleaved: Whether elements 2i and 2i + 1 are a pair, else elements i and
      `i + features // 2`.
    scaling: Changes how fast pairs turn.
  """

  base: float
  features: int
  scale: float = 1.0
  interleaved: bool = False
  scaling: RopeScaling | None = None

  def check(self, head_dim: int) -> None:
    """Refuses options that are not possible.

    Example:

      >>> from nnx.nn import rotary
      >>> rotary.Rotation(10000.0, 4).check(8)

    Args:
      head_dim: The features of a head.

    Raises:
      ValueError: If a number is out of range, or odd.
      TypeError: If `scaling` is not a `RopeScaling`.
    """
    checks.positive("rope_base", self.base)
    checks.positive("rope_scale", self.scale)
    checks.whole("rope_dim", self.features, 2)
    if self.features % 2 or self.features > head_dim:
      raise ValueError(
        "`rope_dim` must be even and at most the features of a head, but got"
        f" {self.features} for heads of {head_dim}."
      )
    if self.scaling is None:
      return
    if not isinstance(self.scaling, RopeScaling):
      raise TypeError(
        "`rope_scaling` must be an `nnx.RopeScaling`, such as"
        f" `nnx.Llama3Scaling(8.0)`, but got {self.scaling!r}."
      )
    self.scaling.rates(self.features, self.base)

  def rows(
    self, positions: jax.Array, max_length: int | None
  ) -> tuple[jax.Array, jax.Array]:
    """Returns cosines and sines, as the function `rows` does.

    Example:

      >>> import jax.numpy as jnp
      >>> from nnx.nn import rotary
      >>> rotary.Rotation(10000.0, 4).rows(jnp.arange(3), 8)[0].shape
      (3, 2)

    Args:
      positions: `[...]` integers in [0, `max_length`).
      max_length: The number of positions; all of int32, if None.
    """
    return rows(
      positions,
      max_length,
      self.features,
      self.base,
      self.scale,
      self.scaling,
    )

  def rotate(self, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs of each head, as the function `rotate` does.

    Example:

      >>> import jax.numpy as jnp
      >>> from nnx.nn import rotary
      >>> rotation = rotary.Rotation(10000.0, 2)
      >>> quarter = jnp.zeros((1, 1)), jnp.ones((1, 1))
      >>> rotation.rotate(jnp.array([[[1.0, 0.0]]]), *quarter)
      Array([[[0., 1.]]], dtype=float32)

    Args:
      x: `[..., t, n, h]`, floating.
      cos: `[..., t, features // 2]`, or with fewer leading axes.
      sin: Like `cos`.
    """
    return rotate(x, cos, sin, self.interleaved)

  def bound(self, x: jax.Array) -> jax.Array:
    """Returns what the sizes of elements are at most once they are rotated.

    Example:

      >>> import jax.numpy as jnp
      >>> from nnx.nn import rotary
      >>> rotary.Rotation(10000.0, 2).bound(jnp.array([3.0, 4.0, -1.0]))
      Array([5., 1.], dtype=float32)

    Args:
      x: `[..., h]`, floating.

    Returns:
      `[..., features // 2 + rest]`, a bound for each pair and for each of the
      elements that are not rotated.
    """
    pair = jnp.hypot(*_pairs(x, self.features // 2, self.interleaved))
    if self.scaling is not None:
      pair = pair * self.scaling.magnitude
    return jnp.concatenate([pair, jnp.abs(x[..., self.features :])], -1)


@functools.partial(eager.compiled, static=("rotation",))
def rotate_at(
  query: jax.Array,
  key: jax.Array,
  positions: jax.Array | None,
  rotation: Rotation,
  table: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Rotates queries and keys by their positions.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import rotary
    >>> x = jnp.ones((3, 1, 2))
    >>> rotation = rotary.Rotation(10000.0, 2)
    >>> query, key = rotary.rotate_at(x, x, jnp.array([0, 1, 5]), rotation)
    >>> query[:2, 0].round(1).tolist()  # the second by one radian
    [[1.0, 1.0], [-0.30000001192092896, 1.399999976158142]]

  Args:
    query: `[..., t, n, h]`, floating.
    key: `[..., s, kv heads, h]`, floating.
    positions: `[..., t]` integers that are at least 0, or with fewer leading
      axes; then s is t. From the first token on, if None.
    rotation: How to rotate.
    table: The `rotation.rows` of the positions, if they are there already.

  Returns:
    Arrays like `query` and `key`.
  """
  if table is None and positions is None:
    tokens, keys = query.shape[-3], key.shape[-3]
    queries = rotation.rows(jnp.arange(tokens), tokens)
    table = queries if keys == tokens else rotation.rows(jnp.arange(keys), keys)
    return rotation.rotate(query, *queries), rotation.rotate(key, *table)
  if table is None:
    assert positions is not None
    table = rotation.rows(positions, None)
  return rotation.rotate(query, *table), rotation.rotate(key, *table)


def rotate_from_start(
  query: jax.Array, key: jax.Array, base: float, scale: float = 1.0
) -> tuple[jax.Array, jax.Array]:
  """Rotates queries and keys of sequences from their first token on.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import rotary
    >>> x = jnp.ones((3, 1, 2))
    >>> query, key = rotary.rotate_from_start(x, x, 10000.0)
    >>> query[:2, 0].round(1).tolist()  # the second by one radian
    [[1.0, 1.0], [-0.30000001192092896, 1.399999976158142]]

  Args:
    query: `[..., t, n, h]`, floating.
    key: `[..., s, kv heads, h]`, floating.
    base: Base of the wavelengths.
    scale: Positions are divided by it.

  Returns:
    Arrays like `query` and `key`.
  """
  rotation = Rotation(base, query.shape[-1], scale)
  return rotate_at(query, key, None, rotation)


class RoPE(Module):
  """Rotary position embedding as a module of its own.

  It is for custom attention, and for models of Flax.
  `MultiHeadAttention(..., rope_base=theta)` does the same without it, and also
  decodes.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> rope = nnx.RoPE(embedding_size=2, max_seq_len=8)
    >>> rope(jnp.ones((3, 2)))[:2].round(1).tolist()  # the second by one radian
    [[1.0, 1.0], [-0.30000001192092896, 1.399999976158142]]

  Args:
    theta: Base of the wavelengths.
    embedding_size: h, even; with `max_seq_len`, tables are made once.
    max_seq_len: The most tokens that the tables serve.

  Attributes:
    cached_sin: `Variable`, `[max_seq_len, h // 2]`, or None without
      `max_seq_len`; `cached_cos` likewise.

  Raises:
    ValueError: If only one of `embedding_size` and `max_seq_len` is given, or
      `embedding_size` is odd.
  """

  def __init__(
    self,
    theta: float = 10000.0,
    embedding_size: int | None = None,
    max_seq_len: int | None = None,
  ):
    if (embedding_size is None) != (max_seq_len is None):
      raise ValueError(
        "`embedding_size` and `max_seq_len` must both be given to make tables,"
        f" but got `embedding_size={embedding_size}` and"
        f" `max_seq_len={max_seq_len}`."
      )
    self.theta = theta
    self.cached_sin = None
    self.cached_cos = None
    if embedding_size is not None and max_seq_len is not None:
      cos, sin = self._from_start(max_seq_len, embedding_size)
      self.cached_sin = Variable(sin)
      self.cached_cos = Variable(cos)

  def _from_start(
    self, length: int, features: int
  ) -> tuple[jax.Array, jax.Array]:
    _check_even(features)
    return rows(jnp.arange(length), length, features, self.theta)

  def __call__(
    self, x: jax.Array, input_positions: jax.Array | None = None
  ) -> jax.Array:
    """Rotates the pairs of each token.

    Args:
      x: `[..., t, h]`, floating.
      input_positions: `[..., t]`, or with fewer leading axes: the positions of
        the tokens; 0 to t - 1, if None.

    Returns:
      An array like x, of float32 at least.

    Raises:
      ValueError: If x has no axis of tokens; if h is odd, or not that of the
        tables; if t is more than they serve, or not that of `input_positions`.

    Numerics: `input_positions` are not known when compiling, and make angles in
      float32, as Flax does. See `rows` for others.
    """
    if x.ndim < 2:
      raise ValueError(
        f"`x` must be `[..., t, h]`, but got the shape {x.shape}."
      )
    length, features = x.shape[-2:]
    _check_even(features)
    if input_positions is not None:
      input_positions = jnp.asarray(input_positions, jnp.float32)
      if input_positions.shape[-1:] != (length,):
        raise ValueError(
          f"`input_positions` must have one for each of the {length} tokens of"
          f" `x`, but got the shape {input_positions.shape}."
        )
      rates = _UNSCALED.rates(features, self.theta).astype(np.float32)
      angles = input_positions[..., None] * rates
      cos, sin = jnp.cos(angles), jnp.sin(angles)
    elif self.cached_sin is None or self.cached_cos is None:
      cos, sin = self._from_start(length, features)
    else:
      most, pairs = self.cached_sin.shape
      if length > most or features != 2 * pairs:
        raise ValueError(
          f"`x` must have at most `max_seq_len={most}` tokens of"
          f" `embedding_size={2 * pairs}`, but got the shape {x.shape}."
        )
      cos, sin = self.cached_cos.value[:length], self.cached_sin.value[:length]
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return rotate(x[..., None, :], cos, sin)[..., 0, :]


def _check_even(features: int) -> None:
  if features <= 0 or features % 2:
    raise ValueError(
      f"`embedding_size` must be positive and even, but got {features}."
    )


def dot_product_attention_with_rope(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  *,
  rope: RoPE,
  input_positions: jax.Array | None = None,
  **kwargs: Any,
) -> jax.Array:
  """Rotates queries and keys by their positions, then attends.

  Where nothing is decoded, `MultiHeadAttention` takes it with its `rope` as
  `attention_fn`; with `rope_base`, it decodes as well.

  Example:

    >>> import functools
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> attend = functools.partial(
    ...   nnx.dot_product_attention_with_rope, rope=nnx.RoPE()
    ... )
    >>> layer = nnx.MultiHeadAttention(
    ...   2, 4, attention_fn=attend, decode=False, rngs=nnx.Rngs(0)
    ... )
    >>> layer(jnp.ones((3, 4)), input_positions=jnp.arange(3)).shape
    (3, 4)

  Args:
    query: `[..., t, n, h]`.
    key: `[..., s, n // groups, h]`.
    value: `[..., s, n // groups, v]`.
    rope: The rotary embedding.
    input_positions: `[..., t]`, or with fewer leading axes: the positions of
      queries and keys, of which there are then as many; those from the start
      on, if None.
    **kwargs: Of `dot_product_attention`.

  Returns:
    `[..., t, n, v]`.

  Raises:
    ValueError: If shapes do not fit.
  """
  for name, x in (("query", query), ("key", key)):
    if x.ndim < 3:
      raise ValueError(
        f"`{name}` must be `[..., t, n, h]`, but got the shape {x.shape}."
      )
  if input_positions is not None:
    input_positions = jnp.asarray(input_positions)[..., None, :]  # every head's

  def turned(x):
    return jnp.swapaxes(rope(jnp.swapaxes(x, -3, -2), input_positions), -3, -2)

  return dot_product_attention(turned(query), turned(key), value, **kwargs)
