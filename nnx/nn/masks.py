"""Masks of attention: which keys a query sees.

A mask is an array of booleans, or of 0 and 1, that broadcasts to `[..., n, t,
s]`: heads, query tokens, key tokens.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nnx.nn.dtypes import Dtype

# How many keys a query sees, its own the last of them; or how many before and
# how many after its own, -1 for all.
Window = int | tuple[int, int]


def check_window(window: Window | None) -> tuple[int, int] | None:
  """Returns how many keys before and after its own a query sees.

  Example:

    >>> from nnx.nn import masks
    >>> masks.check_window(4), masks.check_window((2, -1))
    ((3, 0), (2, -1))

  Args:
    window: The number of keys, the query's own the last of them; or a pair of
      the numbers before and after its own, -1 for all.

  Returns:
    A pair, or None for None.

  Raises:
    TypeError: If it is not an integer or a pair of integers.
    ValueError: If a number is out of range.
  """
  if window is None:
    return None
  # Here, so that programs without windows import no kernels.
  from nnx.kernels import decode_attention

  return decode_attention.window_sizes(window)


def positions_mask(
  query: jax.Array,
  key: jax.Array,
  is_causal: bool,
  window: Window | None = None,
) -> jax.Array:
  """Returns which keys each query sees, by positions alone.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import masks
    >>> at = jnp.arange(3)
    >>> masks.positions_mask(at, at, True, 2).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]

  Args:
    query: `[..., t]` integers, positions.
    key: `[s]` integers, positions.
    is_causal: Whether no key after the query's position is seen.
    window: Which keys around it are, as for `check_window`.

  Returns:
    `[..., t, s]`, bool.
  """
  query = jnp.expand_dims(query, -1)
  key = key.reshape((1,) * (query.ndim - 1) + key.shape)
  before, after = check_window(window) or (-1, -1)
  if is_causal:
    after = 0
  seen = jnp.ones((*query.shape[:-1], key.size), bool)
  if before >= 0:
    seen &= key >= query - before
  if after >= 0:
    seen &= key <= query + after
  return seen


def real_tokens(lengths: jax.Array, tokens: int) -> jax.Array:
  """Returns which tokens of padded sequences are not padding.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import masks
    >>> masks.real_tokens(jnp.array([2, 1]), 3).astype(int).tolist()
    [[1, 1, 0], [1, 0, 0]]

  Args:
    lengths: `[...]` integers, the number of real tokens of each sequence.
    tokens: t, the number of all tokens of a sequence.

  Returns:
    `[..., t]`, bool.
  """
  steps = jnp.arange(tokens).reshape((1,) * lengths.ndim + (-1,))
  return steps < jnp.expand_dims(lengths, -1)


def both(mask: jax.Array | None, seen: jax.Array, rank: int) -> jax.Array:
  """Returns the conjunction of two masks.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import masks
    >>> one, other = jnp.array([1, 1, 0]), jnp.array([[True, False, True]])
    >>> masks.both(one, other, 2).astype(int).tolist()
    [[1, 0, 0]]

  Args:
    mask: A mask with at most `rank` axes; None lets everything through.
    seen: Another one, bool.
    rank: The number of axes of the result, the leading ones of size 1.
  """
  seen = seen.reshape((1,) * (rank - seen.ndim) + seen.shape)
  if mask is None:
    return seen
  mask = jnp.asarray(mask).astype(bool)
  return jnp.logical_and(
    mask.reshape((1,) * (rank - mask.ndim) + mask.shape), seen
  )


def make_attention_mask(
  query_input: jax.Array,
  key_input: jax.Array,
  pairwise_fn: Callable[..., Any] = jnp.multiply,
  extra_batch_dims: int = 0,
  dtype: Dtype = jnp.float32,
) -> jax.Array:
  """Compares each query token with each key token.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> tokens = jnp.array([1, 1, 0])
    >>> nnx.make_attention_mask(tokens, tokens)[0].tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]

  Args:
    query_input: `[..., t]`.
    key_input: `[..., s]`.
    pairwise_fn: A function of two arrays that broadcast.
    extra_batch_dims: How many axes of 1 to put in front.
    dtype: Dtype of the mask.

  Returns:
    `[1, ..., 1, t, s]`, an axis of 1 for the heads.
  """
  mask = pairwise_fn(
    jnp.expand_dims(query_input, -1), jnp.expand_dims(key_input, -2)
  )
  mask = jnp.expand_dims(mask, -3)
  return mask.reshape((1,) * extra_batch_dims + mask.shape).astype(dtype)


def make_causal_mask(
  x: jax.Array, extra_batch_dims: int = 0, dtype: Dtype = jnp.float32
) -> jax.Array:
  """Returns the mask by which each token sees itself and earlier ones.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> nnx.make_causal_mask(jnp.ones(3))[0].tolist()
    [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]

  Args:
    x: `[..., t]`, of which only the shape matters.
    extra_batch_dims: How many axes of 1 to put in front.
    dtype: Dtype of the mask.

  Returns:
    `[1, ..., 1, t, t]`, an axis of 1 for the heads.
  """
  positions = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
  return make_attention_mask(
    positions, positions, jnp.greater_equal, extra_batch_dims, dtype
  )


def combine_masks(
  *masks: jax.Array | None, dtype: Dtype = jnp.float32
) -> jax.Array | None:
  """Returns the conjunction of masks.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> nnx.combine_masks(jnp.array([1, 1, 0]), None, jnp.array([1, 0, 1]))
    Array([1., 0., 0.], dtype=float32)

  Args:
    *masks: Arrays of one rank that broadcast; None is passed over.
    dtype: Dtype of the mask.

  Returns:
    The mask, or None if there are none.

  Raises:
    ValueError: If the ranks differ.
  """
  given = [mask for mask in masks if mask is not None]
  if not given:
    return None
  ranks = [jnp.ndim(mask) for mask in given]
  if len(set(ranks)) > 1:
    raise ValueError(
      f"`masks` must have the same rank, but got the ranks {ranks}."
    )
  return functools.reduce(jnp.logical_and, given).astype(dtype)
