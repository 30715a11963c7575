"""Attention: the function, masks, and the layer with its cache for decoding.

Arrays are `[..., t, n, h]`: tokens, heads, features of a head. Keys and values
may have fewer heads than queries (grouped-query attention): of `n` query heads,
each `n // key heads` in a row share one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import math
from typing import Any

import jax
from jax import random
import jax.numpy as jnp

from nnx.module import Module
from nnx.nn import dtypes, initializers
from nnx.nn.initializers import NO_METADATA, Initializer, default_kernel_init
from nnx.nn.linear import DotGeneral, LinearGeneral
from nnx.nn.normalization import LayerNorm
from nnx.rngs import Rngs, RngStream
from nnx.variables import Cache, Intermediate


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
) -> jax.Array:
  """Computes how much each query attends to each key.

      softmax(query @ key / sqrt(h) + bias, where mask)

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
    dropout_rate: in [0, 1), the probability with which a weight is dropped.
    deterministic: whether to drop none.
    dtype: the dtype to compute in; of query and key, if None.
    precision: of the product, as in `jnp.einsum`.
    module: sows the weights, before dropout, as `Intermediate`
      `attention_weights`.
    promote_dtype: `((query, key), dtype=dtype)` to those two in the dtype to
      compute in.
    is_causal: whether query i sees no key after key i.

  Returns:
    `[..., n, t, s]`, in the dtype to compute in.

  Raises:
    ValueError: if ranks, batch axes, features or heads do not fit.
  """
  query, key = promote_dtype((query, key), dtype=dtype)
  dtype = query.dtype
  _check_shapes("`query` and `key`", query, key)
  if query.shape[-1] != key.shape[-1]:
    raise ValueError(
      "`query` and `key` must have the same last axis, but got the shapes"
      f" {query.shape} and {key.shape}."
    )
  heads, shared = query.shape[-2], key.shape[-2]
  groups = _check_groups(heads, "key", shared)
  query = query / jnp.sqrt(query.shape[-1]).astype(dtype)
  if groups == 1:
    logits = jnp.einsum(
      "...tnh,...snh->...nts", query, key, precision=precision
    )
  else:
    split = query.reshape((*query.shape[:-2], shared, groups, query.shape[-1]))
    logits = jnp.einsum(
      "...tngh,...snh->...ngts", split, key, precision=precision
    )
    logits = logits.reshape((*logits.shape[:-4], heads, *logits.shape[-2:]))
  if bias is not None:
    logits = logits + bias
  seen = None if mask is None else jnp.asarray(mask).astype(bool)
  if is_causal:
    causal = jnp.tril(jnp.ones(logits.shape[-2:], bool))
    seen = causal if seen is None else jnp.logical_and(seen, causal)
  if seen is not None:
    seen = jnp.broadcast_to(seen, logits.shape)
    logits = jnp.where(seen, logits, jnp.finfo(dtype).min)
  weights = jax.nn.softmax(logits).astype(dtype)
  if module is not None:
    module.sow(Intermediate, "attention_weights", weights)
  if deterministic or dropout_rate == 0.0:
    return weights
  shape = weights.shape
  if broadcast_dropout:
    shape = (1,) * (len(shape) - 2) + shape[-2:]
  keep_prob = 1.0 - dropout_rate
  keep = random.bernoulli(dropout_rng, keep_prob, shape)
  return weights * (keep.astype(dtype) / jnp.asarray(keep_prob, dtype))


def _plain_attention(
  query, key, value, bias, mask, is_causal, dtype,
  promote_dtype=dtypes.promote_dtype,
):  # fmt: skip
  """Attention of which nothing but the result is wanted."""
  query, key, value = promote_dtype((query, key, value), dtype=dtype)
  _check_qkv(query, key, value)
  if mask is not None:
    mask = jnp.asarray(mask).astype(bool)
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
    query, key, value, bias, mask, is_causal=is_causal
  )
  return out.reshape((*batch, *out.shape[-3:])) if len(batch) > 1 else out


_compiled_attention = functools.partial(
  jax.jit, static_argnums=(5, 6), inline=True
)(_plain_attention)


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
) -> jax.Array:
  """Averages values, weighted by how well their keys match each query.

      softmax(query @ key / sqrt(h) + bias, where mask) @ value

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
    dropout_rate: in [0, 1), the probability with which a weight is dropped.
    deterministic: whether to drop none.
    dtype: the dtype to compute in; of the three arrays, if None.
    precision: of the products, as in `jnp.einsum`.
    module: sows the weights, before dropout, as `Intermediate`
      `attention_weights`.
    promote_dtype: `((query, key, value), dtype=dtype)` to those three in the
      dtype to compute in.
    is_causal: whether query i sees no key after key i.

  Returns:
    `[..., t, n, v]`, in the dtype to compute in.

  Raises:
    ValueError: if ranks, batch axes, lengths, features or heads do not fit.

  Numerics: without dropout, `precision` and `module`,
    `jax.nn.dot_product_attention`, with softmax in float32; otherwise all in
    the dtype to compute in.
  """
  if dropout_rate == 0.0 and module is None and precision is None:
    arguments = (query, key, value, bias, mask, bool(is_causal), dtype)
    if promote_dtype is dtypes.promote_dtype:
      return _compiled_attention(*arguments)
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
  )
  heads, shared = weights.shape[-3], value.shape[-2]
  groups = _check_groups(heads, "value", shared)
  if groups == 1:
    return jnp.einsum(
      "...nts,...snh->...tnh", weights, value, precision=precision
    )
  split = weights.reshape(
    (*weights.shape[:-3], shared, groups, *weights.shape[-2:])
  )
  out = jnp.einsum("...ngts,...snh->...tngh", split, value, precision=precision)
  return out.reshape((*out.shape[:-3], heads, out.shape[-1]))


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


# The layer.


def _cached_positions(tokens: int, length: int, index: jax.Array) -> jax.Array:
  """Which slots new tokens see: `[*index axes, 1, t, s]`."""
  positions = jnp.expand_dims(index, (-3, -2, -1)) + jnp.expand_dims(
    jnp.arange(tokens), -1
  )
  return jnp.arange(length) <= positions


def _in_one_batch_axis(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
  return x if len(batch) == 1 else x.reshape((-1, *x.shape[len(batch) :]))


@functools.partial(jax.jit, inline=True)
def _append(cached_key, cached_value, key, value, index):
  """Writes new keys and values into the caches."""
  # While tracing: programs that never decode import no kernels.
  from kernels import kv_cache

  batch = cached_key.shape[:-3]
  if index.ndim:
    index = index.reshape(-1)
  new = kv_cache.update(
    *(
      _in_one_batch_axis(x, batch)
      for x in (
        cached_key,
        cached_value,
        key.astype(cached_key.dtype),
        value.astype(cached_value.dtype),
      )
    ),
    index,
  )
  return tuple(x.reshape(cached_key.shape[:-1] + x.shape[-1:]) for x in new)


@functools.partial(jax.jit, inline=True)
def _append_and_attend(
  cached_key, cached_value, query, key, value, index, mask
):
  """One call for the new caches and the result."""
  from kernels import decode_attention

  batch = cached_key.shape[:-3]
  if mask is not None:
    mask = jnp.asarray(mask).astype(bool)
    mask = jnp.broadcast_to(mask, (*batch, *mask.shape[-3:]))
    mask = _in_one_batch_axis(mask, batch)
  if index.ndim:
    index = index.reshape(-1)
  cache_k, cache_v, out = decode_attention.decode_attention(
    *(
      _in_one_batch_axis(x, batch)
      for x in (
        cached_key,
        cached_value,
        query.astype(cached_key.dtype),
        key.astype(cached_key.dtype),
        value.astype(cached_value.dtype),
      )
    ),
    index,
    mask=mask,
    out_dtype=query.dtype,
  )
  return (
    cache_k.reshape(cached_key.shape),
    cache_v.reshape(cached_value.shape),
    out.reshape(query.shape),
  )


class MultiHeadAttention(Module):
  """Projects inputs to queries, keys and values, attends, projects back.

      q, k, v = query(inputs_q), key(inputs_k), value(inputs_v)
      y = out(dot_product_attention(q, k, v))

  With `decode=True`, keys and values of earlier calls are kept in a cache, to
  which each call appends those of its tokens: call `init_cache` first, then the
  layer with any number of tokens, usually a prompt and then one by one. Each
  token sees itself and those before. The call that appends and attends is one
  kernel, `kernels.decode_attention`, which updates the cache in place where the
  caller donates it.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.MultiHeadAttention(
    ...   num_heads=2,
    ...   in_features=3,
    ...   qkv_features=6,
    ...   out_features=6,
    ...   decode=True,
    ...   rngs=nnx.Rngs(0),
    ... )
    >>> layer.init_cache((1, 3))
    >>> print(jax.tree.map(jnp.shape, nnx.state(layer, nnx.Cache)))
    State({
      'cache_index': VariableState(
        type=Cache,
        value=()
      ),
      'cached_key': VariableState(
        type=Cache,
        value=(1, 2, 3)
      ),
      'cached_value': VariableState(
        type=Cache,
        value=(1, 2, 3)
      )
    })
    >>> layer(jnp.ones((1, 3))).shape
    (1, 6)

  Args:
    num_heads: n, the number of query heads.
    in_features: size of the last axis of the queries' inputs, and of the
      others' unless `in_kv_features` says otherwise.
    qkv_features: n * h, the features of all query heads; `in_features`, if
      None.
    out_features: size of the last axis of the result; `in_features`, if None.
    num_kv_heads: number of key and value heads, a divisor of `num_heads`, which
      is taken if None.
    in_kv_features: size of the last axis of the keys' and values' inputs.
    dtype: the dtype to compute in; of inputs and parameters, if None.
    param_dtype: the dtype of the parameters.
    broadcast_dropout: whether all of a batch and all heads drop the same
      weights.
    dropout_rate: in [0, 1), the probability with which an attention weight is
      dropped.
    deterministic: whether to drop none; `train()` and `eval()` set it. None, if
      each call says it, or `dropout_rate` is 0.
    precision: of the products, as in `jax.lax.dot_general`.
    kernel_init: `(key, shape, dtype) -> kernel`, of the flat shape `[inputs,
      outputs]`.
    out_kernel_init: the same for the last projection; `kernel_init`, if None.
    bias_init: `(key, shape, dtype) -> bias`.
    out_bias_init: the same for the last projection; `bias_init`, if None.
    use_bias: whether the projections have biases.
    attention_fn: called in place of `dot_product_attention`, with its
      arguments.
    decode: whether to use the cache. None, if each call says it.
    normalize_qk: whether to apply a `LayerNorm` to each head's queries and keys
      (Dehghani et al. 2023, "Scaling vision transformers to 22 billion
      parameters").
    qkv_promote_dtype: `promote_dtype` of the first three projections.
    out_promote_dtype: `promote_dtype` of the last projection.
    ln_promote_dtype: `promote_dtype` of the norms.
    qkv_dot_general: `dot_general` of the first three projections.
    out_dot_general: `dot_general` of the last projection.
    qkv_dot_general_cls: `dot_general_cls` of the first three projections.
    out_dot_general_cls: `dot_general_cls` of the last projection.
    rngs: the stream `params` gives the keys of the parameters; of `dropout` a
      fork is kept, if there is dropout.
    keep_rngs: whether to keep it; otherwise each call brings keys.
    kernel_metadata: metadata of the kernels.
    out_kernel_metadata: the same for the last projection; `kernel_metadata`, if
      empty.
    bias_metadata: metadata of the biases.
    out_bias_metadata: the same for the last projection; `bias_metadata`, if
      empty.
    query_ln_scale_metadata: metadata of the scale of the queries' norm.
    key_ln_scale_metadata: metadata of the scale of the keys' norm.

  Attributes:
    query: `LinearGeneral` to `[..., n, h]`; `key` and `value` likewise.
    out: `LinearGeneral` from `[..., n, h]`.
    query_ln: `LayerNorm` or None; `key_ln` likewise.
    cached_key: `Cache`, `[..., max_length, kv heads, h]`, or None before
      `init_cache`; `cached_value` likewise.
    cache_index: `Cache`, `[]` int32, the number of tokens in the cache; or, as
      a user may set it, one number for each sequence.

  Raises:
    ValueError: if `qkv_features` or `num_heads` cannot be divided.
  """

  def __init__(
    self,
    num_heads: int,
    in_features: int,
    qkv_features: int | None = None,
    out_features: int | None = None,
    num_kv_heads: int | None = None,
    in_kv_features: int | None = None,
    *,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    broadcast_dropout: bool = True,
    dropout_rate: float = 0.0,
    deterministic: bool | None = None,
    precision: Any = None,
    kernel_init: Initializer = default_kernel_init,
    out_kernel_init: Initializer | None = None,
    bias_init: Initializer = initializers.zeros_init(),  # noqa: B008
    out_bias_init: Initializer | None = None,
    use_bias: bool = True,
    attention_fn: Callable[..., jax.Array] = dot_product_attention,
    decode: bool | None = None,
    normalize_qk: bool = False,
    qkv_promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    out_promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    ln_promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    qkv_dot_general: DotGeneral | None = None,
    out_dot_general: DotGeneral | None = None,
    qkv_dot_general_cls: Callable[[], DotGeneral] | None = None,
    out_dot_general_cls: Callable[[], DotGeneral] | None = None,
    rngs: Rngs,
    keep_rngs: bool = True,
    kernel_metadata: Mapping[str, Any] = NO_METADATA,
    out_kernel_metadata: Mapping[str, Any] = NO_METADATA,
    bias_metadata: Mapping[str, Any] = NO_METADATA,
    out_bias_metadata: Mapping[str, Any] = NO_METADATA,
    query_ln_scale_metadata: Mapping[str, Any] = NO_METADATA,
    key_ln_scale_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    self.num_heads = num_heads
    self.in_features = in_features
    self.qkv_features = in_features if qkv_features is None else qkv_features
    self.out_features = in_features if out_features is None else out_features
    self.in_kv_features = (
      in_features if in_kv_features is None else in_kv_features
    )
    self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads % self.num_kv_heads:
      raise ValueError(
        "`num_heads` must be a multiple of `num_kv_heads`, but got"
        f" `num_heads={num_heads}` and `num_kv_heads={self.num_kv_heads}`."
      )
    if self.qkv_features % num_heads:
      raise ValueError(
        "`qkv_features` must be a multiple of `num_heads`, but got"
        f" `qkv_features={self.qkv_features}` and `num_heads={num_heads}`."
      )
    self.head_dim = self.qkv_features // num_heads
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.broadcast_dropout = broadcast_dropout
    self.dropout_rate = dropout_rate
    self.deterministic = deterministic
    self.precision = precision
    self.use_bias = use_bias
    self.attention_fn = attention_fn
    self.decode = decode
    self.normalize_qk = normalize_qk
    self.qkv_promote_dtype = qkv_promote_dtype
    self.out_promote_dtype = out_promote_dtype
    self.ln_promote_dtype = ln_promote_dtype
    self.qkv_dot_general = qkv_dot_general
    self.out_dot_general = out_dot_general
    self.qkv_dot_general_cls = qkv_dot_general_cls
    self.out_dot_general_cls = out_dot_general_cls

    def projection(in_features, heads):
      return LinearGeneral(
        in_features,
        (heads, self.head_dim),
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=param_dtype,
        kernel_init=kernel_init,
        bias_init=bias_init,
        precision=precision,
        promote_dtype=qkv_promote_dtype,
        dot_general=qkv_dot_general,
        dot_general_cls=qkv_dot_general_cls,
        rngs=rngs,
        kernel_metadata=kernel_metadata,
        bias_metadata=bias_metadata,
      )

    def norm(metadata):
      if not normalize_qk:
        return None
      return LayerNorm(
        self.head_dim,
        dtype=dtype,
        param_dtype=param_dtype,
        use_bias=False,
        promote_dtype=ln_promote_dtype,
        rngs=rngs,
        scale_metadata=metadata,
      )

    self.query = projection(in_features, num_heads)
    self.key = projection(self.in_kv_features, self.num_kv_heads)
    self.value = projection(self.in_kv_features, self.num_kv_heads)
    self.query_ln = norm(query_ln_scale_metadata)
    self.key_ln = norm(key_ln_scale_metadata)
    self.out = LinearGeneral(
      (num_heads, self.head_dim),
      self.out_features,
      axis=(-2, -1),
      use_bias=use_bias,
      dtype=dtype,
      param_dtype=param_dtype,
      kernel_init=out_kernel_init or kernel_init,
      bias_init=out_bias_init or bias_init,
      precision=precision,
      promote_dtype=out_promote_dtype,
      dot_general=out_dot_general,
      dot_general_cls=out_dot_general_cls,
      rngs=rngs,
      kernel_metadata=out_kernel_metadata or kernel_metadata,
      bias_metadata=out_bias_metadata or bias_metadata,
    )
    self.rngs = None
    if keep_rngs and dropout_rate > 0:
      self.rngs = rngs.dropout.fork()
    self.cached_key = None
    self.cached_value = None
    self.cache_index = None

  def __call__(
    self,
    inputs_q: jax.Array,
    inputs_k: jax.Array | None = None,
    inputs_v: jax.Array | None = None,
    *,
    mask: jax.Array | None = None,
    deterministic: bool | None = None,
    rngs: Rngs | RngStream | None = None,
    sow_weights: bool = False,
    decode: bool | None = None,
    is_causal: bool = False,
    out_sharding: Any = None,
    qkv_sharding: Any = None,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      inputs_q: `[..., t, in_features]`.
      inputs_k: `[..., s, in_kv_features]`; `inputs_q`, if None.
      inputs_v: like `inputs_k`, which is taken if it is None.
      mask: broadcasts to `[..., n, t, s]`; False where a key is not seen. When
        decoding, s is the length of the cache.
      deterministic: in place of the layer's, if not None.
      rngs: streams or the stream that the dropout's key comes from, in place of
        the layer's, if not None.
      sow_weights: whether to sow the attention weights as `Intermediate`
        `attention_weights`.
      decode: in place of the layer's, if not None.
      is_causal: whether token i sees no key after key i; decoding is causal
        anyway.
      out_sharding: the sharding of the last projection's product, under a mesh
        with explicit axes.
      qkv_sharding: the same for the first three.

    Returns:
      `[..., t, out_features]`.

    Raises:
      ValueError: if shapes do not fit, the cache is missing or, where its index
        is known (outside of `jit`), full; or if neither the call nor the layer
        says what is needed.
    """
    if inputs_k is None:
      if inputs_v is not None:
        raise ValueError(
          "`inputs_k` must be given where `inputs_v` is, but it is None. For"
          " one input as both, pass it as `inputs_k`."
        )
      inputs_k = inputs_q
    if inputs_v is None:
      inputs_v = inputs_k
    if inputs_q.shape[-1] != self.in_features:
      raise ValueError(
        f"`inputs_q` must have `in_features={self.in_features}` as its last"
        f" axis, but got the shape {inputs_q.shape}."
      )
    query = self.query(inputs_q, out_sharding=qkv_sharding)
    key = self.key(inputs_k, out_sharding=qkv_sharding)
    value = self.value(inputs_v, out_sharding=qkv_sharding)
    if self.normalize_qk:
      query = self.query_ln(query)
      key = self.key_ln(key)
    if decode is None:
      decode = self.decode
      if decode is None:
        raise ValueError(
          "`MultiHeadAttention` must be told `decode`, but it is None in the"
          " layer and in the call. Pass it to one of them, or set it for a"
          " whole model by `nnx.view(model, decode=...)`."
        )
    deterministic, dropout_rng = self._dropout(deterministic, rngs)
    if decode:
      self._check_cache(query, key)
      is_causal = False
      index = self.cache_index.value
      tokens = key.shape[-3]
      if (
        deterministic
        and not sow_weights
        and self.precision is None
        and self.attention_fn is dot_product_attention
        and query.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
      ):
        self.cached_key.value, self.cached_value.value, x = _append_and_attend(
          self.cached_key.value,
          self.cached_value.value,
          query,
          key,
          value,
          index,
          mask,
        )
        self.cache_index.value = index + tokens
        return self.out(x, out_sharding=out_sharding)
      key, value = _append(
        self.cached_key.value, self.cached_value.value, key, value, index
      )
      self.cached_key.value, self.cached_value.value = key, value
      self.cache_index.value = index + tokens
      seen = _cached_positions(tokens, key.shape[-3], index)
      if seen.ndim < query.ndim:
        seen = jnp.broadcast_to(seen, (*query.shape[:-3], *seen.shape[-3:]))
      mask = combine_masks(mask, seen)
    x = self.attention_fn(
      query,
      key,
      value,
      mask=mask,
      dropout_rng=dropout_rng,
      dropout_rate=self.dropout_rate,
      broadcast_dropout=self.broadcast_dropout,
      deterministic=deterministic,
      dtype=self.dtype,
      precision=self.precision,
      module=self if sow_weights else None,
      is_causal=is_causal,
    )
    return self.out(x, out_sharding=out_sharding)

  def _dropout(
    self, deterministic: bool | None, rngs: Rngs | RngStream | None
  ) -> tuple[bool, jax.Array | None]:
    """Whether there is no dropout, and the key if there is."""
    if self.dropout_rate == 0.0:
      return True, None
    if deterministic is None:
      deterministic = self.deterministic
      if deterministic is None:
        raise ValueError(
          "`MultiHeadAttention` with dropout must be told `deterministic`, but"
          " it is None in the layer and in the call. Pass it to one of them, or"
          " set it for a whole model: `model.train()` or `model.eval()`."
        )
    if deterministic:
      return True, None
    if rngs is None:
      rngs = self.rngs
      if rngs is None:
        raise ValueError(
          "`MultiHeadAttention` must have `rngs` unless it is deterministic,"
          " but they are None in the layer, which has `keep_rngs=False`, and in"
          " the call. Pass them to the call."
        )
    elif isinstance(rngs, Rngs):
      rngs = rngs.dropout
    return False, rngs()

  def _check_cache(self, query: jax.Array, key: jax.Array) -> None:
    if (
      self.cached_key is None
      or self.cached_value is None
      or self.cache_index is None
    ):
      raise ValueError(
        "`MultiHeadAttention` must have a cache to decode, but has none. Call"
        " `init_cache((*batch, max_length, in_features))` first."
      )
    *batch, length, heads, features = self.cached_key.value.shape
    tokens = key.shape[-3]
    expected = (*batch, tokens, heads, features)
    if key.shape != expected or query.shape[:-2] != expected[:-2]:
      raise ValueError(
        "The inputs must fit the cache, whose shape"
        f" {self.cached_key.value.shape} expects keys of the shape {expected},"
        f" but got keys of the shape {key.shape} and queries of the shape"
        f" {query.shape}. Call `init_cache` with this batch."
      )
    index = self.cache_index.value
    if isinstance(index, jax.core.Tracer):
      return
    last = int(jnp.max(index)) if index.ndim else int(index)
    if last + tokens > length:
      raise ValueError(
        f"The cache must have room for all tokens, but its `max_length` is"
        f" {length}, `cache_index` is {last}, and {tokens} more came. Call"
        " `init_cache` with more room, or again to start anew."
      )

  def init_cache(
    self, input_shape: Sequence[int], dtype: dtypes.Dtype = jnp.float32
  ) -> None:
    """Makes an empty cache, which decoding needs.

    Example:

      >>> import jax.numpy as jnp
      >>> import nnx
      >>> layer = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
      >>> layer.init_cache((5, 16, 4))
      >>> y = layer(jnp.ones((5, 3, 4)))
      >>> y = layer(jnp.ones((5, 1, 4)))
      >>> layer.cached_key.shape, int(layer.cache_index.value)
      ((5, 16, 2, 2), 4)

    Args:
      input_shape: `(*batch, max_length, features)` of the inputs of a whole
        sequence; the last is not used.
      dtype: of the cache, float32, bfloat16 or float16.
    """
    shape = (*input_shape[:-1], self.num_kv_heads, self.head_dim)
    self.cached_key = Cache(jnp.zeros(shape, dtype))
    self.cached_value = Cache(jnp.zeros(shape, dtype))
    self.cache_index = Cache(jnp.array(0, jnp.int32))

  def set_view(
    self,
    deterministic: bool | None = None,
    decode: bool | None = None,
    batch_size: int | Sequence[int] | None = None,
    max_length: int | None = None,
  ):
    """Sets attributes for `nnx.view`.

    Example:

      >>> import nnx
      >>> layer = nnx.MultiHeadAttention(2, 4, rngs=nnx.Rngs(0))
      >>> new = nnx.view(layer, decode=True, batch_size=5, max_length=16)
      >>> new.cached_key.shape
      (5, 16, 2, 2)

    Args:
      deterministic: whether to drop no attention weights.
      decode: whether to use the cache.
      batch_size: the batch axes of the cache, which is made if there is none
        and `max_length` is given too.
      max_length: its length.

    Raises:
      TypeError: if only one of `batch_size` and `max_length` is given.
    """
    if deterministic is not None:
      self.deterministic = deterministic
    if decode is None:
      return
    self.decode = decode
    if not decode or self.cached_key is not None:
      return
    if batch_size is None and max_length is None:
      return  # for a later `init_cache`
    if batch_size is None or max_length is None:
      raise TypeError(
        "`batch_size` and `max_length` must both be given to make a cache, but"
        f" got `batch_size={batch_size}` and `max_length={max_length}`."
      )
    batch = (batch_size,) if isinstance(batch_size, int) else tuple(batch_size)
    self.init_cache(
      (*batch, max_length, self.in_features),
      jnp.float32 if self.dtype is None else self.dtype,
    )
