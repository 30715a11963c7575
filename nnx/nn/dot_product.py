"""Attention as functions of arrays, and the masks for it.

Arrays are `[..., t, n, h]`: tokens, heads, features of a head. Keys and values
may have fewer heads than queries (grouped-query attention): of `n` query heads,
each `n // key heads` in a row share one.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import random
import jax.numpy as jnp
import numpy as np

from nnx import eager
from nnx.module import Module
from nnx.nn import checks, dtypes
from nnx.variablelib import Intermediate

# How many keys a query sees, its own the last of them; or how many before and
# how many after its own, -1 for all.
Window = int | tuple[int, int]


def _check_shapes(names: str, *arrays: jax.Array) -> None:
  if len({array.ndim for array in arrays}) > 1:
    raise ValueError(
      f"{names} must have the same rank, but got"
      f" {', '.join(str(array.ndim) for array in arrays)}."
    )
  if len({array.shape[:-3] for array in arrays}) > 1:
    raise ValueError(
      f"{names} must have the same batch axes, but got the shapes"
      f" {', '.join(str(array.shape) for array in arrays)}."
    )


def _check_groups(heads: int, name: str, shared: int) -> int:
  """How many query heads share a head of the keys or values."""
  if heads % shared:
    raise ValueError(
      f"The heads of `query` must be a multiple of those of `{name}`, but got"
      f" {heads} and {shared}."
    )
  return heads // shared


def check_window(window: Window | None) -> tuple[int, int] | None:
  """Returns how many keys before and after its own a query sees.

  Example:

    >>> from nnx.nn import dot_product
    >>> dot_product.check_window(4), dot_product.check_window((2, -1))
    ((3, 0), (2, -1))

  Args:
    window: the number of keys, the query's own the last of them; or a pair of
      how many before and how many after its own, -1 for all.

  Returns:
    A pair, or None for None.

  Raises:
    TypeError: if it is no integer or pair of integers.
    ValueError: if there is no such window.
  """
  if window is None:
    return None
  if isinstance(window, (tuple, list)) and len(window) == 2:
    before, after = window
  else:
    before, after = window, None
  for size in (before, 0 if after is None else after):
    if not isinstance(size, (int, np.integer)) or isinstance(size, bool):
      raise TypeError(
        f"`window` must be an integer or a pair of integers, but got {window}."
      )
  if after is None:
    if before < 1:
      raise ValueError(
        "`window` must be at least 1, the query's own key, but got"
        f" {window}. For no limit, pass None."
      )
    return before - 1, 0
  if before < -1 or after < -1:
    raise ValueError(
      "`window` must be a pair of numbers that are at least 0, or -1 for no"
      f" limit, but got {window}."
    )
  return before, after


def positions_mask(
  query: jax.Array,
  key: jax.Array,
  is_causal: bool,
  window: Window | None = None,
) -> jax.Array:
  """Returns which keys each query sees, by positions alone.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import dot_product
    >>> at = jnp.arange(3)
    >>> dot_product.positions_mask(at, at, True, 2).astype(int).tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]

  Args:
    query: `[..., t]` integers, positions.
    key: `[s]` integers, positions.
    is_causal: whether no key after the query's position is seen.
    window: which keys around it are, as for `check_window`.

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


def check_softcap(softcap: float | None) -> None:
  """Refuses a soft cap that is none.

  Example:

    >>> from nnx.nn import dot_product
    >>> dot_product.check_softcap(50.0)

  Args:
    softcap: as for `dot_product_attention`.

  Raises:
    ValueError: if it is not positive and finite.
  """
  if softcap is not None and not 0 < softcap < math.inf:
    raise ValueError(
      f"`softcap` must be positive and finite, but got {softcap}. For no cap,"
      " pass None."
    )


def _soft_cap(logits, softcap):
  check_softcap(softcap)
  return softcap * jnp.tanh(logits / softcap)


def _products(query, key, **options):
  """All queries with all keys: `[..., n, t, s]`."""
  heads, shared = query.shape[-2], key.shape[-2]
  groups = _check_groups(heads, "key", shared)
  if groups == 1:
    return jnp.einsum("...tnh,...snh->...nts", query, key, **options)
  split = query.reshape((*query.shape[:-2], shared, groups, query.shape[-1]))
  logits = jnp.einsum("...tngh,...snh->...ngts", split, key, **options)
  return logits.reshape((*logits.shape[:-4], heads, *logits.shape[-2:]))


def _averages(weights, value, **options):
  """Sums of values by weights: `[..., t, n, v]`."""
  heads, shared = weights.shape[-3], value.shape[-2]
  groups = _check_groups(heads, "value", shared)
  if groups == 1:
    return jnp.einsum("...nts,...snh->...tnh", weights, value, **options)
  split = weights.reshape(
    (*weights.shape[:-3], shared, groups, *weights.shape[-2:])
  )
  out = jnp.einsum("...ngts,...snh->...tngh", split, value, **options)
  return out.reshape((*out.shape[:-3], heads, out.shape[-1]))


def _softmax(logits, bias, mask, is_causal, window):
  """Softmax over the keys that are seen."""
  if bias is not None:
    logits = logits + bias
  seen = None if mask is None else jnp.asarray(mask).astype(bool)
  if is_causal or window is not None:
    queries, keys = map(jnp.arange, logits.shape[-2:])
    near = positions_mask(queries, keys, is_causal, window)
    near = jnp.broadcast_to(near, logits.shape)
    seen = near if seen is None else jnp.broadcast_to(seen, near.shape) & near
  if seen is not None:
    seen = jnp.broadcast_to(seen, logits.shape)
    logits = jnp.where(seen, logits, jnp.finfo(logits.dtype).min)
  return jax.nn.softmax(logits)


def dot_product_attention_weights(
  query: jax.Array,
  key: jax.Array,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  broadcast_dropout: bool = True,
  dropout_rng: jax.Array | None = None,
  dropout_rate: float = 0.0,
  deterministic: bool = False,
  dtype: dtypes.Dtype | None = None,
  precision: Any = None,
  module: Module | None = None,
  promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
  is_causal: bool = False,
  *,
  window: Window | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """Computes how much each query attends to each key.

      softmax(query @ key / sqrt(h) + bias, where mask)

  `softcap` is applied before the bias is added.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import attention
    >>> x = jnp.ones((4, 1, 8))
    >>> attention.dot_product_attention_weights(x, x)[0, 0]
    Array([0.25, 0.25, 0.25, 0.25], dtype=float32)

  Args:
    query: `[..., t, n, h]`.
    key: `[..., s, n // groups, h]`.
    bias: broadcasts to `[..., n, t, s]`, added to the logits.
    mask: broadcasts to `[..., n, t, s]`; False where a key is not seen.
    broadcast_dropout: whether all of a batch and all heads drop the same
      weights.
    dropout_rng: `[]`, the key of the dropout.
    dropout_rate: in [0, 1], the probability with which a weight is dropped.
    deterministic: whether to drop none.
    dtype: the dtype to compute in; of query and key, if None.
    precision: of the product, as in `jnp.einsum`.
    module: sows the weights, before dropout, as `Intermediate`
      `attention_weights`.
    promote_dtype: `((query, key), dtype=dtype)` to those two in the dtype to
      compute in.
    is_causal: whether query i sees no key after key i.
    window: how many keys a query sees, its own the last of them; or a pair of
      how many before and how many after its own, -1 for all.
    softcap: logits become `softcap * tanh(logits / softcap)`.

  Returns:
    `[..., n, t, s]`, in the dtype to compute in.

  Raises:
    ValueError: if ranks, batch axes, features, heads, `window` or `softcap` do
      not fit; if `dropout_rate` is not in [0, 1], or has no key.
  """
  _check_dropout(dropout_rate, dropout_rng, deterministic)
  query, key = promote_dtype((query, key), dtype=dtype)
  dtype = query.dtype
  _check_shapes("`query` and `key`", query, key)
  if query.shape[-1] != key.shape[-1]:
    raise ValueError(
      "`query` and `key` must have the same last axis, but got the shapes"
      f" {query.shape} and {key.shape}."
    )
  query = query / jnp.sqrt(query.shape[-1]).astype(dtype)
  logits = _products(query, key, precision=precision)
  if softcap is not None:
    logits = _soft_cap(logits, softcap)
  weights = _softmax(logits, bias, mask, is_causal, window).astype(dtype)
  if module is not None:
    module.sow(Intermediate, "attention_weights", weights)
  if deterministic or dropout_rate == 0.0:
    return weights
  shape = weights.shape
  if broadcast_dropout:
    shape = (1,) * (len(shape) - 2) + shape[-2:]
  if dropout_rate == 1.0:  # where 1 / (1 - rate) would make NaN
    return jnp.zeros_like(weights)
  keep_prob = 1.0 - dropout_rate
  keep = random.bernoulli(dropout_rng, keep_prob, shape)
  return weights * (keep.astype(dtype) / jnp.asarray(keep_prob, dtype))


def _check_dropout(rate, rng, deterministic):
  checks.rate("dropout_rate", rate)
  if not deterministic and rate != 0.0 and rng is None:
    raise ValueError(
      f"`dropout_rng` must be a key for `dropout_rate={rate}`, but got None."
      " Pass a key, or `deterministic=True`."
    )


def _plain_attention(
  query, key, value, bias, mask, is_causal, window, softcap, dtype,
  promote_dtype=dtypes.promote_dtype,
):  # fmt: skip
  """Attention of which nothing but the result is wanted."""
  query, key, value = promote_dtype((query, key, value), dtype=dtype)
  _check_qkv(query, key, value)
  if mask is not None:
    mask = jnp.asarray(mask).astype(bool)
  if softcap is not None:
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = _products(query, key, preferred_element_type=wide)
    logits = _soft_cap(logits / math.sqrt(query.shape[-1]), softcap)
    weights = _softmax(logits, bias, mask, is_causal, window)
    return _averages(weights.astype(value.dtype), value)
  near = check_window(window)
  if near is not None:
    everything = max(query.shape[-3], key.shape[-3])
    near = tuple(everything if size < 0 else size for size in near)
  batch = query.shape[:-3]
  if len(batch) > 1:  # jax takes one batch axis
    flat = (math.prod(batch),)

    def flatten(x):
      if x is None:
        return None
      x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
      return x.reshape((*flat, *x.shape[-3:]))

    query, key, value, bias, mask = map(
      flatten, (query, key, value, bias, mask)
    )
  out = jax.nn.dot_product_attention(
    query,
    key,
    value,
    bias,
    mask,
    is_causal=is_causal,
    local_window_size=near,
  )
  return out.reshape((*batch, *out.shape[-3:])) if len(batch) > 1 else out


_one_attention = eager.one_call(_plain_attention, static_argnums=(5, 6, 7, 8))


def _check_qkv(query, key, value):
  _check_shapes("`query`, `key` and `value`", query, key, value)
  if key.shape[-3] != value.shape[-3]:
    raise ValueError(
      "`key` and `value` must have as many tokens, but got the shapes"
      f" {key.shape} and {value.shape}."
    )


def dot_product_attention(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  broadcast_dropout: bool = True,
  dropout_rng: jax.Array | None = None,
  dropout_rate: float = 0.0,
  deterministic: bool = False,
  dtype: dtypes.Dtype | None = None,
  precision: Any = None,
  module: Module | None = None,
  promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
  is_causal: bool = False,
  *,
  window: Window | None = None,
  softcap: float | None = None,
) -> jax.Array:
  """Averages values, weighted by how well their keys match each query.

      softmax(query @ key / sqrt(h) + bias, where mask) @ value

  `softcap` is applied before the bias is added.

  Source: Vaswani et al. 2017, "Attention is all you need".

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> x = jnp.ones((4, 1, 1))
    >>> v = jnp.arange(4.0).reshape(4, 1, 1)
    >>> nnx.dot_product_attention(x, x, v, is_causal=True)[:, 0, 0]
    Array([0. , 0.5, 1. , 1.5], dtype=float32)

  Args:
    query: `[..., t, n, h]`.
    key: `[..., s, n // groups, h]`.
    value: `[..., s, n // groups, v]`.
    bias: broadcasts to `[..., n, t, s]`, added to the logits.
    mask: broadcasts to `[..., n, t, s]`; False where a key is not seen.
    broadcast_dropout: whether all of a batch and all heads drop the same
      weights.
    dropout_rng: `[]`, the key of the dropout.
    dropout_rate: in [0, 1], the probability with which a weight is dropped.
    deterministic: whether to drop none.
    dtype: the dtype to compute in; of the three arrays, if None.
    precision: of the products, as in `jnp.einsum`.
    module: sows the weights, before dropout, as `Intermediate`
      `attention_weights`.
    promote_dtype: `((query, key, value), dtype=dtype)` to those three in the
      dtype to compute in.
    is_causal: whether query i sees no key after key i.
    window: how many keys a query sees, its own the last of them; or a pair of
      how many before and how many after its own, -1 for all.
    softcap: logits become `softcap * tanh(logits / softcap)`.

  Returns:
    `[..., t, n, v]`, in the dtype to compute in.

  Raises:
    ValueError: if ranks, batch axes, lengths, features, heads, `window` or
      `softcap` do not fit; if `dropout_rate` is not in [0, 1], or has no key.

  Numerics: without dropout, `precision` and `module`, softmax in float32, as in
    `jax.nn.dot_product_attention`; otherwise all in the dtype to compute in.
  """
  _check_dropout(dropout_rate, dropout_rng, deterministic)
  if dropout_rate == 0.0 and module is None and precision is None:
    arguments = (
      query,
      key,
      value,
      bias,
      mask,
      bool(is_causal),
      window,
      softcap,
      dtype,
    )
    if promote_dtype is dtypes.promote_dtype:
      return _one_attention(*arguments)
    return _plain_attention(*arguments, promote_dtype)
  query, key, value = promote_dtype((query, key, value), dtype=dtype)
  _check_qkv(query, key, value)
  weights = dot_product_attention_weights(
    query,
    key,
    bias,
    mask,
    broadcast_dropout,
    dropout_rng,
    dropout_rate,
    deterministic,
    query.dtype,
    precision,
    module,
    promote_dtype,
    is_causal,
    window=window,
    softcap=softcap,
  )
  return _averages(weights, value, precision=precision)


# Masks.


def make_attention_mask(
  query_input: jax.Array,
  key_input: jax.Array,
  pairwise_fn: Callable[..., Any] = jnp.multiply,
  extra_batch_dims: int = 0,
  dtype: dtypes.Dtype = jnp.float32,
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
    pairwise_fn: the comparison, of arrays that broadcast.
    extra_batch_dims: how many axes of 1 to put in front.
    dtype: of the mask.

  Returns:
    `[1, ..., 1, t, s]`, an axis of 1 for the heads.
  """
  mask = pairwise_fn(
    jnp.expand_dims(query_input, -1), jnp.expand_dims(key_input, -2)
  )
  mask = jnp.expand_dims(mask, -3)
  return mask.reshape((1,) * extra_batch_dims + mask.shape).astype(dtype)


def make_causal_mask(
  x: jax.Array, extra_batch_dims: int = 0, dtype: dtypes.Dtype = jnp.float32
) -> jax.Array:
  """Returns the mask by which each token sees itself and those before.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> nnx.make_causal_mask(jnp.ones(3))[0].tolist()
    [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]

  Args:
    x: `[..., t]`, of which only the shape matters.
    extra_batch_dims: how many axes of 1 to put in front.
    dtype: of the mask.

  Returns:
    `[1, ..., 1, t, t]`, an axis of 1 for the heads.
  """
  positions = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape)
  return make_attention_mask(
    positions, positions, jnp.greater_equal, extra_batch_dims, dtype
  )


def combine_masks(
  *masks: jax.Array | None, dtype: dtypes.Dtype = jnp.float32
) -> jax.Array | None:
  """Returns the mask that lets through what all of some masks do.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> nnx.combine_masks(jnp.array([1, 1, 0]), None, jnp.array([1, 0, 1]))
    Array([1., 0., 0.], dtype=float32)

  Args:
    *masks: arrays of one rank that broadcast; None is passed over.
    dtype: of the mask.

  Returns:
    The mask, or None if there are none.

  Raises:
    ValueError: if the ranks differ.
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
