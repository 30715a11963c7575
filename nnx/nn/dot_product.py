"""Attention as functions of arrays; the masks for it are in `masks`.

Arrays are `[..., t, n, h]`: tokens, heads, features of a head. Keys and values
may have fewer heads than queries (grouped-query attention): of `n` query heads,
each `n // key heads` in a row share one.
"""

from __future__ import annotations

import math
from typing import Any

import jax
from jax import random
import jax.numpy as jnp

from nnx import eager
from nnx.module import Module
from nnx.nn import checks, dtypes
from nnx.nn.masks import Window as Window
from nnx.nn.masks import check_window as check_window
from nnx.nn.masks import combine_masks as combine_masks
from nnx.nn.masks import make_attention_mask as make_attention_mask
from nnx.nn.masks import make_causal_mask as make_causal_mask
from nnx.nn.masks import positions_mask as positions_mask
from nnx.variablelib import Intermediate


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
  """Returns how many query heads share a head of the keys or values."""
  if heads % shared:
    raise ValueError(
      f"The heads of `query` must be a multiple of those of `{name}`, but got"
      f" {heads} and {shared}."
    )
  return heads // shared


def _soft_cap(logits, softcap):
  checks.positive("softcap", softcap)
  return softcap * jnp.tanh(logits / softcap)


def _products(query, key, **options):
  """Multiplies all queries with all keys: `[..., n, t, s]`."""
  heads, shared = query.shape[-2], key.shape[-2]
  groups = _check_groups(heads, "key", shared)
  if groups == 1:
    return jnp.einsum("...tnh,...snh->...nts", query, key, **options)
  split = query.reshape((*query.shape[:-2], shared, groups, query.shape[-1]))
  logits = jnp.einsum("...tngh,...snh->...ngts", split, key, **options)
  return logits.reshape((*logits.shape[:-4], heads, *logits.shape[-2:]))


def _averages(weights, value, **options):
  """Sums the values by weights: `[..., t, n, v]`."""
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
  """Applies softmax over the keys that are seen."""
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
    bias: Broadcasts to `[..., n, t, s]`, added to the logits.
    mask: Broadcasts to `[..., n, t, s]`; False where a key is not seen.
    broadcast_dropout: Whether all of a batch and all heads drop the same
      weights.
    dropout_rng: `[]`, the key of the dropout.
    dropout_rate: In [0, 1], the probability with which a weight is dropped.
    deterministic: Whether to drop none.
    dtype: The dtype to compute in; of query and key, if None.
    precision: Precision of the product, as in `jnp.einsum`.
    module: Sows the weights, before dropout, as `Intermediate`
      `attention_weights`.
    promote_dtype: `((query, key), dtype=dtype)`; returns those two in the dtype
      to compute in.
    is_causal: Whether query i sees no key after key i.
    window: The number of keys that a query sees, its own the last of them; or a
      pair of the numbers before and after its own, -1 for all.
    softcap: Logits become `softcap * tanh(logits / softcap)`.

  Returns:
    `[..., n, t, s]`, in the dtype to compute in.

  Raises:
    ValueError: If ranks, batch axes, features, heads, `window` or `softcap` do
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
  assert dropout_rng is not None
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
  """Computes attention, without dropout and without sowing weights."""
  query, key, value = promote_dtype((query, key, value), dtype=dtype)
  _check_qkv(query, key, value)
  if mask is not None:
    mask = jnp.asarray(mask).astype(bool)
  # jax asks for a product of float16 that XLA refuses on the CPU.
  is_half = query.dtype == jnp.float16 and eager.functions_are_as_imported()
  if softcap is not None or is_half:
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = _products(query, key, preferred_element_type=wide)
    logits = logits / math.sqrt(query.shape[-1])
    if softcap is not None:
      logits = _soft_cap(logits, softcap)
    weights = _softmax(logits, bias, mask, is_causal, window)
    return _averages(weights.astype(value.dtype), value)
  near = check_window(window)
  if near is not None:
    everything = max(query.shape[-3], key.shape[-3])
    before, after = (everything if size < 0 else size for size in near)
    near = before, after
  batch = query.shape[:-3]
  if len(batch) > 1:  # jax takes one batch axis
    flat = (math.prod(batch),)

    def flatten(x: Any) -> Any:
      if x is None:
        return None
      x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
      return x.reshape((*flat, *x.shape[-3:]))

    query, key, value = flatten(query), flatten(key), flatten(value)
    bias, mask = flatten(bias), flatten(mask)
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


_plain_attention_compiled = eager.compiled(
  _plain_attention, static=("is_causal", "window", "softcap", "dtype")
)


def _check_qkv(query, key, value):
  _check_shapes("`query`, `key` and `value`", query, key, value)
  if key.shape[-3] != value.shape[-3]:
    raise ValueError(
      "`key` and `value` must have the same number of tokens, but got the"
      f" shapes {key.shape} and {value.shape}."
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
    bias: Broadcasts to `[..., n, t, s]`, added to the logits.
    mask: Broadcasts to `[..., n, t, s]`; False where a key is not seen.
    broadcast_dropout: Whether all of a batch and all heads drop the same
      weights.
    dropout_rng: `[]`, the key of the dropout.
    dropout_rate: In [0, 1], the probability with which a weight is dropped.
    deterministic: Whether to drop none.
    dtype: The dtype to compute in; of the three arrays, if None.
    precision: Precision of the products, as in `jnp.einsum`.
    module: Sows the weights, before dropout, as `Intermediate`
      `attention_weights`.
    promote_dtype: `((query, key, value), dtype=dtype)`; returns those three in
      the dtype to compute in.
    is_causal: Whether query i sees no key after key i.
    window: The number of keys that a query sees, its own the last of them; or a
      pair of the numbers before and after its own, -1 for all.
    softcap: Logits become `softcap * tanh(logits / softcap)`.

  Returns:
    `[..., t, n, v]`, in the dtype to compute in.

  Raises:
    ValueError: If ranks, batch axes, lengths, features, heads, `window` or
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
      return _plain_attention_compiled(*arguments)
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
