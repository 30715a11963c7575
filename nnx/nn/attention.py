"""Attention: the layer, with its cache for decoding.

The functions that it is made of are in `dot_product` (attention and masks),
`rotary` and `decoding`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx import eager
from nnx.module import Module
from nnx.nn import (
  checks,
  decoding,
  dot_product,
  dtypes,
  initializers,
  rotary,
)
from nnx.nn.dot_product import combine_masks as combine_masks
from nnx.nn.dot_product import dot_product_attention as dot_product_attention
from nnx.nn.dot_product import (
  dot_product_attention_weights as dot_product_attention_weights,
)
from nnx.nn.dot_product import make_attention_mask as make_attention_mask
from nnx.nn.dot_product import make_causal_mask as make_causal_mask
from nnx.nn.initializers import NO_METADATA, Initializer, default_kernel_init
from nnx.nn.linear import DotGeneral, LinearGeneral
from nnx.nn.normalization import LayerNorm
from nnx.rnglib import Rngs, RngStream
from nnx.variablelib import Cache


def _real(lengths: jax.Array, x: jax.Array) -> jax.Array:
  """Which tokens of `[..., t, n, h]` are no padding: `[*lengths axes, t]`."""
  steps = jnp.arange(x.shape[-3]).reshape((1,) * lengths.ndim + (-1,))
  return steps < jnp.expand_dims(lengths, -1)


def _without_room(
  buffers: decoding.Buffers, key: jax.Array, lengths: jax.Array | None
) -> jax.Array:
  """Which tokens of `[..., t, n, h]` the cache cannot take: `[*index, t]`."""
  index = jnp.expand_dims(buffers.index, -1)
  steps = jnp.arange(key.shape[-3]).reshape((1,) * buffers.index.ndim + (-1,))
  lost = index + steps >= buffers.key.shape[-3]
  if lengths is None:
    return lost
  return jnp.logical_and(lost, _both(None, _real(lengths, key), lost.ndim))


def _nan_where(lost: jax.Array | None, x: jax.Array) -> jax.Array:
  """Puts NaN in the place of lost tokens of `[..., t, n, h]`, if any."""
  if lost is None:
    return x
  return jnp.where(_both(None, lost[..., None, None], x.ndim), jnp.nan, x)


def _both(mask: jax.Array | None, seen: jax.Array, rank: int) -> jax.Array:
  """A mask and what else decides which keys are seen: `[..., n, t, s]`."""
  seen = seen.reshape((1,) * (rank - seen.ndim) + seen.shape)
  if mask is None:
    return seen
  mask = jnp.asarray(mask).astype(bool)
  return jnp.logical_and(
    mask.reshape((1,) * (rank - mask.ndim) + mask.shape), seen
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
  caller donates it. A call with more tokens than the cache has room for raises;
  under `jit`, where their number is not known, it overwrites nothing, and the
  results of the tokens that found no room are NaN.

  `window`, `softcap` and rotary embedding do the same with a cache and without,
  so that what was trained is what decodes.

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
    dropout_rate: in [0, 1], the probability with which an attention weight is
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
      arguments; with `window`, `softcap` and `input_positions` only if they are
      set.
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
    window: how many keys a token sees, its own the last of them; or a pair of
      how many before and how many after its own, -1 for all. With a cache,
      none after.
    softcap: logits become `softcap * tanh(logits / softcap)`.
    rope_base: base of the wavelengths of rotary embedding, usually 10000.0:
      queries and keys are rotated by their positions (`nnx.nn.rotary`). None
      are, if None.
    rope_scale: positions are divided by it, to reach past the lengths that a
      model was trained on.

  Attributes:
    query: `LinearGeneral` to `[..., n, h]`; `key` and `value` likewise.
    out: `LinearGeneral` from `[..., n, h]`.
    query_ln: `LayerNorm` or None; `key_ln` likewise.
    cached_key: `Cache`, `[..., max_length, kv heads, h]`, or None before
      `init_cache`; `cached_value` likewise.
    cache_index: `Cache`, int32, the number of tokens in the cache, `[]`; or one
      for each sequence.
    cached_key_scale: `Cache`, `[..., kv heads]` float32, for a cache of int8 or
      float8: the factors of what is stored. 0 until the first call, which
      chooses them by its tokens, unless they are set before. None for other
      caches. `cached_value_scale` likewise.

  Raises:
    ValueError: if `qkv_features`, `num_heads` or the features of a head cannot
      be divided, or if `window`, `softcap` or a number of `rope_*` is not
      possible.
  """

  # What an object pickled by Flax, whose layer has none of them, is without.
  window = softcap = rope_base = None
  rope_scale = 1.0
  cached_key_scale = cached_value_scale = None

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
    window: dot_product.Window | None = None,
    softcap: float | None = None,
    rope_base: float | None = None,
    rope_scale: float = 1.0,
  ):
    self.num_heads = num_heads
    self.in_features = in_features
    self.qkv_features = in_features if qkv_features is None else qkv_features
    self.out_features = in_features if out_features is None else out_features
    self.in_kv_features = (
      in_features if in_kv_features is None else in_kv_features
    )
    self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for name in (
      "num_heads",
      "num_kv_heads",
      "in_features",
      "qkv_features",
      "out_features",
      "in_kv_features",
    ):
      checks.whole(name, getattr(self, name), 1 if "heads" in name else 0)
    checks.rate("dropout_rate", dropout_rate)
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
    dot_product.check_window(window)
    dot_product.check_softcap(softcap)
    if rope_base is not None:
      if self.head_dim % 2:
        raise ValueError(
          "`rope_base` needs heads of an even number of features, but"
          f" `qkv_features={self.qkv_features}` and `num_heads={num_heads}`"
          f" make {self.head_dim}."
        )
      checks.positive("rope_base", rope_base)
      checks.positive("rope_scale", rope_scale)
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
    self.window = window
    self.softcap = softcap
    self.rope_base = rope_base
    self.rope_scale = rope_scale

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
    self.cached_key_scale = None
    self.cached_value_scale = None

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
    input_positions: jax.Array | None = None,
    lengths: jax.Array | None = None,
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
      input_positions: passed on to the layer's `attention_fn`, which must be
        one that takes them. Rotary embedding by `rope_base` needs none: it
        counts the tokens.
      lengths: `[]` or `[...]` integers in [0, t]: how many of a sequence's
        tokens are real. The rest is padding, which no token sees, whose own
        result is that of attending to nothing, and which takes no room in the
        cache. All, if None. For each sequence with a cache, it needs an index
        of each: `init_cache(..., per_sequence=True)`.

    Returns:
      `[..., t, out_features]`.

    Raises:
      ValueError: if shapes do not fit; if there are `input_positions` and no
        `attention_fn` for them; if the cache is missing, has no index for each
        of the `lengths` or, where the index is known (outside of `jit`), no
        room; or if neither the call nor the layer says what is needed.
    """
    options: dict[str, Any] = {}
    if input_positions is not None:
      if self.attention_fn is dot_product_attention:
        raise ValueError(
          "`input_positions` are for an `attention_fn` that takes them, but the"
          " layer's is `dot_product_attention`. Give the layer another, or"
          " `rope_base`, which counts the tokens and needs none."
        )
      options["input_positions"] = input_positions
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
    if lengths is not None:
      lengths = self._as_lengths(lengths, query, key)
    if self.softcap is not None:
      options["softcap"] = self.softcap
    lost = None
    if decode:
      buffers, lost = self._buffers(query, key, lengths)
      if (
        deterministic
        and not sow_weights
        and self.precision is None
        and self.attention_fn is dot_product_attention
        # A kernel would hide functions that were replaced.
        and eager.functions_are_as_imported()
        and query.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
      ):
        buffers, x = decoding.append_and_attend(
          buffers, query, key, value, lengths, mask, options=self._options()
        )
        self._keep(buffers)
        return self.out(_nan_where(lost, x), out_sharding=out_sharding)
      buffers, query, key, value, seen = decoding.append(
        buffers, query, key, value, lengths, options=self._options()
      )
      self._keep(buffers)
      mask = _both(mask, seen, query.ndim)
      is_causal = False
    else:
      if self.rope_base is not None:
        query, key = rotary.rotate_from_start(
          query, key, self.rope_base, self.rope_scale
        )
      if self.window is not None:
        options["window"] = self.window
      if lengths is not None:
        mask = _both(mask, _real(lengths, key)[..., None, None, :], query.ndim)
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
      **options,
    )
    if lengths is not None:
      real = _both(None, _real(lengths, query)[..., None, None], x.ndim)
      x = jnp.where(real, x, 0)
    return self.out(_nan_where(lost, x), out_sharding=out_sharding)

  def _options(self) -> decoding.Options:
    return decoding.Options(
      self.window, self.softcap, self.rope_base, self.rope_scale
    )

  def _as_lengths(
    self, lengths: jax.Array, query: jax.Array, key: jax.Array
  ) -> jax.Array:
    lengths = jnp.asarray(lengths, jnp.int32)
    batch = query.shape[:-3]
    if lengths.shape not in ((), batch) or query.shape[-3] != key.shape[-3]:
      raise ValueError(
        f"`lengths` must be one integer or have the shape {batch}, and the"
        " queries and keys must be of the same tokens, but got `lengths` of the"
        f" shape {lengths.shape} for {query.shape[-3]} queries and"
        f" {key.shape[-3]} keys of each sequence. Use `mask` for others."
      )
    return lengths

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

  def _buffers(
    self, query: jax.Array, key: jax.Array, lengths: jax.Array | None
  ) -> tuple[decoding.Buffers, jax.Array | None]:
    """The arrays of the cache, and which new tokens do not fit into it.

    None of them where the index is known: then it is an error.
    """
    if (
      self.cached_key is None
      or self.cached_value is None
      or self.cache_index is None
    ):
      raise ValueError(
        "`MultiHeadAttention` must have a cache to decode, but has none. Call"
        " `init_cache((*batch, max_length, in_features))` first."
      )
    scales = ()
    if self.cached_key_scale is not None:
      scales = self.cached_key_scale.value, self.cached_value_scale.value
    buffers = decoding.Buffers(
      self.cache_index.value,
      self.cached_key.value,
      self.cached_value.value,
      *scales,
    )
    *batch, length, heads, features = buffers.key.shape
    tokens = key.shape[-3]
    expected = (*batch, tokens, heads, features)
    if key.shape != expected or query.shape[:-2] != expected[:-2]:
      raise ValueError(
        "The inputs must fit the cache, whose shape"
        f" {buffers.key.shape} expects keys of the shape {expected},"
        f" but got keys of the shape {key.shape} and queries of the shape"
        f" {query.shape}. Call `init_cache` with this batch."
      )
    index = buffers.index
    if lengths is not None and lengths.ndim > index.ndim:
      raise ValueError(
        "`lengths` of each sequence need a `cache_index` of each, but its shape"
        f" is {index.shape} and that of `lengths` is {lengths.shape}. Call"
        " `init_cache(..., per_sequence=True)`."
      )
    new = tokens if lengths is None else lengths
    if isinstance(index, jax.core.Tracer) or isinstance(new, jax.core.Tracer):
      return buffers, _without_room(buffers, key, lengths)
    room = np.max(np.asarray(index) + np.asarray(new), initial=0)
    if room > length:
      raise ValueError(
        f"The cache must have room for all tokens, but its `max_length` is"
        f" {length}, `cache_index` is {np.max(index)}, and {np.max(new)} more"
        " came. Call `init_cache` with more room, or again to start anew."
      )
    return buffers, None

  def _keep(self, buffers: decoding.Buffers) -> None:
    """Writes what a step made of the cache."""
    self.cache_index.value = buffers.index
    self.cached_key.value = buffers.key
    self.cached_value.value = buffers.value
    if buffers.key_scale is not None:
      self.cached_key_scale.value = buffers.key_scale
      self.cached_value_scale.value = buffers.value_scale

  def init_cache(
    self,
    input_shape: Sequence[int],
    dtype: dtypes.Dtype = jnp.float32,
    *,
    per_sequence: bool = False,
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

      Prompts of different lengths, in a cache of a quarter of the size:

      >>> layer.init_cache((2, 16, 4), jnp.int8, per_sequence=True)
      >>> y = layer(jnp.ones((2, 3, 4)), lengths=jnp.array([3, 1]))
      >>> layer.cached_key.dtype, layer.cache_index.value.tolist()
      (dtype('int8'), [3, 1])

    Args:
      input_shape: `(*batch, max_length, features)` of the inputs of a whole
        sequence; the last is not used.
      dtype: of the cache: float32, bfloat16 or float16; or int8,
        float8_e4m3fn or float8_e5m2, with a scale for each sequence and head
        that the first tokens decide.
      per_sequence: whether each sequence has its own position, `cache_index`
        `[*batch]`: for prompts of different `lengths`, or to start one anew by
        setting its index (and its scales) to 0.
    """
    *batch, length, _ = input_shape
    heads = self.num_kv_heads
    shape = (*batch, length, heads, self.head_dim)
    index_shape = tuple(batch) if per_sequence else ()
    self.cached_key = Cache(jnp.zeros(shape, dtype))
    self.cached_value = Cache(jnp.zeros(shape, dtype))
    self.cache_index = Cache(jnp.zeros(index_shape, jnp.int32))
    self.cached_key_scale = None
    self.cached_value_scale = None
    if decoding.is_quantized(dtype):
      self.cached_key_scale = Cache(jnp.zeros((*batch, heads), jnp.float32))
      self.cached_value_scale = Cache(jnp.zeros((*batch, heads), jnp.float32))

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
