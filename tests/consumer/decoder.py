"""A decoder's cache, as a workspace that uses ours would write it."""

import _scale
import jax
import jax.numpy as jnp

from kernels import kv_cache
import nnx


class Keys(nnx.Module):
  """Keeps the keys and values of one sequence.

  Example:
    >>> keys = Keys(length=4, heads=1, head_dim=2)
    >>> keys.append(jnp.ones((1, 1, 1, 2)))
    >>> keys.index[...].item(), keys.k[0, :, 0, 0].tolist()
    (1, [2.0, 0.0, 0.0, 0.0])
  """

  def __init__(self, length: int, heads: int, head_dim: int):
    """Makes an empty cache.

    Args:
      length: how many positions it holds.
      heads: how many heads.
      head_dim: the size of each.
    """
    shape = (1, length, heads, head_dim)
    self.k = nnx.Cache(jnp.zeros(shape))
    self.v = nnx.Cache(jnp.zeros(shape))
    self.index = nnx.Cache(jnp.zeros((), jnp.int32))

  def append(self, row: jax.Array) -> None:
    """Writes one position; its values are the keys, doubled keys are kept.

    Args:
      row: `[1, 1, heads, head_dim]`.
    """
    k, v = kv_cache.update(
      self.k[...], self.v[...], row * _scale.twice(1.0), row, self.index[...]
    )
    self.k[...] = k
    self.v[...] = v
    self.index[...] += 1
