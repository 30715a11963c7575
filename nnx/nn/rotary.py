"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864).

Element i of the first half of a head and element i of the second half are a
pair, which turns by an angle proportional to its token's position. The product
of a query and a key then depends on their distance alone.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Positions are split into multiples of this and the rest.
_STRIDE = 256


@functools.lru_cache(maxsize=64)
def _angles(
  count: int, stride: int, pairs: int, base: float, scale: float
) -> tuple[np.ndarray, np.ndarray]:
  """Cosines and sines at the multiples of `stride`, from angles in float64."""
  rates = base ** (-np.arange(pairs, dtype=np.float64) / pairs)
  angles = np.arange(count, dtype=np.float64)[:, None] * (stride / scale)
  angles = angles * rates
  return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rows(
  positions: jax.Array,
  max_length: int,
  features: int,
  base: float,
  scale: float = 1.0,
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
    max_length: how many positions there may be.
    features: h, even, those of a head.
    base: of the wavelengths.
    scale: positions are divided by it.

  Returns:
    Two arrays `[..., h // 2]`, float32.

  Numerics: a float32 angle is wrong by 0.01 at position 100,000. So angles are
    float64 and known when compiling, at multiples of 256 and for the rest, and
    their cosines and sines are joined in float32.
  """
  pairs = features // 2
  blocks = -(-max_length // _STRIDE)
  cos, sin = _angles(min(max_length, _STRIDE), 1, pairs, base, scale)
  rest = positions % _STRIDE
  cos, sin = jnp.asarray(cos)[rest], jnp.asarray(sin)[rest]
  if blocks <= 1:
    return cos, sin
  block = positions // _STRIDE
  far = _angles(blocks, _STRIDE, pairs, base, scale)
  far_cos, far_sin = (jnp.asarray(table)[block] for table in far)
  return far_cos * cos - far_sin * sin, far_sin * cos + far_cos * sin


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Turns the pairs of each head.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import rotary
    >>> quarter = jnp.zeros((1, 1)), jnp.ones((1, 1))
    >>> rotary.rotate(jnp.array([[[1.0, 0.0]]]), *quarter)
    Array([[[0., 1.]]], dtype=float32)

  Args:
    x: `[..., t, n, h]`, floating.
    cos: `[..., t, h // 2]`, or with fewer leading axes.
    sin: like `cos`.

  Returns:
    An array like x, computed in float32 at least.
  """
  wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  shape = (*cos.shape[:-1], 1, cos.shape[-1])
  shape = (1,) * (x.ndim - len(shape)) + shape
  cos, sin = (a.reshape(shape).astype(wide.dtype) for a in (cos, sin))
  first, second = jnp.split(wide, 2, -1)
  turned = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], -1
  )
  return turned.astype(x.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
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
    base: of the wavelengths.
    scale: positions are divided by it.

  Returns:
    Arrays like `query` and `key`.
  """
  length = max(query.shape[-3], key.shape[-3])
  table = rows(jnp.arange(length), length, query.shape[-1], base, scale)
  return tuple(
    rotate(x, *(part[: x.shape[-3]] for part in table)) for x in (query, key)
  )
