"""Attention: the layer, with its cache for decoding.

The functions that it is made of are in `dot_product`, `masks`, `rotary` and
`decoding`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nnx import eager
from nnx.nn import (
  checks,
  decoding,
  dot_product,
  dtypes,
  initializers,
  masks,
  rotary,
)
from nnx.nn.attention_cache import CachedAttention
from nnx.nn.dot_product import dot_product_attention as dot_product_attention
from nnx.nn.dot_product import (
  dot_product_attention_weights as dot_product_attention_weights,
)
from nnx.nn.initializers import NO_METADATA, Initializer, default_kernel_init
from nnx.nn.linear_general import LinearGeneral
from nnx.nn.masks import combine_masks as combine_masks
from nnx.nn.masks import make_attention_mask as make_attention_mask
from nnx.nn.masks import make_causal_mask as make_causal_mask
from nnx.nn.normalization import LayerNorm
from nnx.nn.products import DotGeneral
from nnx.rnglib import Rngs, RngStream


def _nan_where(lost: jax.Array | None, x: jax.Array) -> jax.Array:
  """Puts NaN in the place of lost tokens of `[..., t, n, h]`, if any."""
  if lost is None:
    return x
  return jnp.where(masks.both(None, lost[..., None, None], x.ndim), jnp.nan, x)


def _zero_padding(lengths: jax.Array | None, x: jax.Array) -> jax.Array:
  """Puts 0 in the place of padding of `[..., t, n, h]`, if any."""
  if lengths is None:
    return x
  real = masks.real_tokens(lengths, x.shape[-3])[..., None, None]
  return jnp.where(masks.both(None, real, x.ndim), x, 0)


def _head_dim(layer: MultiHeadAttention, rope_base: float | None) -> int:
  """Returns the features of a head; refuses numbers that do not fit."""
  checks.whole("num_heads", layer.num_heads, 1)
  checks.whole("num_kv_heads", layer.num_kv_heads, 1)
  checks.whole("in_features", layer.in_features)
  checks.whole("qkv_features", layer.qkv_features)
  checks.whole("out_features", layer.out_features)
  checks.whole("in_kv_features", layer.in_kv_features)
  if layer.num_heads % layer.num_kv_heads:
    raise ValueError(
      "`num_heads` must be a multiple of `num_kv_heads`, but got"
      f" `num_heads={layer.num_heads}` and"
      f" `num_kv_heads={layer.num_kv_heads}`."
    )
  if layer.qkv_features % layer.num_heads:
    raise ValueError(
      "`qkv_features` must be a multiple of `num_heads`, but got"
      f" `qkv_features={layer.qkv_features}` and"
      f" `num_heads={layer.num_heads}`."
    )
  head_dim = layer.qkv_features // layer.num_heads
  if rope_base is not None and head_dim % 2:
    raise ValueError(
      "`rope_base` needs heads of an even number of features, but"
      f" `qkv_features={layer.qkv_features}` and"
      f" `num_heads={layer.num_heads}` make {head_dim}."
    )
  return head_dim


class MultiHeadAttention(CachedAttention):
  """Projects inputs to queries, keys and values, attends, projects back.

      q, k, v = query(inputs_q), key(inputs_k), value(inputs_v)
      y = out(dot_product_attention(q, k, v))

  With `decode=True`, a cache keeps the keys and values of earlier calls, and
  each call appends those of its tokens. Call `init_cache` first, then the layer
  with any number of tokens, usually with a prompt and then with one token at a
  time. Each token sees itself and earlier ones. One kernel,
  `kernels.decode_attention`, appends and attends; it updates the cache in place
  if the caller donates it. A call with more tokens than the cache has room for
  raises. Under `jit`, where their number is not known, it overwrites nothing,
  and the results of tokens without room are NaN.

  `window`, `softcap` and rotary embedding do the same with and without a cache,
  so that a model decodes as it was trained.

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
    in_features: Size of the last axis of the queries' inputs, and of the
      others' unless `in_kv_features` says otherwise.
    qkv_features: n * h, the features of all query heads; `in_features`, if
      None.
    out_features: Size of the last axis of the result; `in_features`, if None.
    num_kv_heads: Number of key and value heads, a divisor of `num_heads`, which
      is taken if None.
    in_kv_features: Size of the last axis of the keys' and values' inputs.
    dtype: The dtype to compute in; of inputs and parameters, if None.
    param_dtype: The dtype of the parameters.
    broadcast_dropout: Whether all of a batch and all heads drop the same
      weights.
    dropout_rate: In [0, 1], the probability with which an attention weight is
      dropped.
    deterministic: Whether to drop none; `train()` and `eval()` set it. None, if
      each call says so or `dropout_rate` is 0.
    precision: Precision of the products, as in `jax.lax.dot_general`.
    kernel_init: `(key, shape, dtype) -> kernel`, of the flat shape `[inputs,
      outputs]`.
    out_kernel_init: The same for the last projection; `kernel_init`, if None.
    bias_init: `(key, shape, dtype) -> bias`.
    out_bias_init: The same for the last projection; `bias_init`, if None.
    use_bias: Whether the projections have biases.
    attention_fn: Called in place of `dot_product_attention`, with its
      arguments; with `window`, `softcap` and `input_positions` only if they are
      set.
    decode: Whether to use the cache. None, if each call says so.
    normalize_qk: Whether to apply a `LayerNorm` to each head's queries and keys
      (Dehghani et al. 2023, "Scaling vision transformers to 22 billion
      parameters").
    qkv_promote_dtype: `promote_dtype` of the first three projections.
    out_promote_dtype: `promote_dtype` of the last projection.
    ln_promote_dtype: `promote_dtype` of the norms.
    qkv_dot_general: `dot_general` of the first three projections.
    out_dot_general: `dot_general` of the last projection.
    qkv_dot_general_cls: `dot_general_cls` of the first three projections.
    out_dot_general_cls: `dot_general_cls` of the last projection.
    rngs: The stream `params` gives the keys of the parameters; of `dropout` a
      fork is kept, if there is dropout.
    keep_rngs: Whether to keep that fork; otherwise each call brings keys.
    kernel_metadata: Metadata of the kernels.
    out_kernel_metadata: The same for the last projection; `kernel_metadata`, if
      empty.
    bias_metadata: Metadata of the biases.
    out_bias_metadata: The same for the last projection; `bias_metadata`, if
      empty.
    query_ln_scale_metadata: Metadata of the scale of the queries' norm.
    key_ln_scale_metadata: Metadata of the scale of the keys' norm.
    window: The number of keys that a token sees, its own the last of them; or a
      pair of the numbers before and after its own, -1 for all. With a cache,
      none after.
    softcap: Logits become `softcap * tanh(logits / softcap)`.
    rope_base: Base of the wavelengths of rotary embedding, usually 10000.0:
      queries and keys are rotated by their positions (`nnx.nn.rotary`). They
      are not, if None.
    rope_scale: Positions are divided by it, to reach past the lengths that a
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
    ValueError: If `qkv_features`, `num_heads` or the features of a head cannot
      be divided, or if `window`, `softcap`, `rope_base` or `rope_scale` is out
      of range.
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
    window: masks.Window | None = None,
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
    checks.rate("dropout_rate", dropout_rate)
    self.head_dim = _head_dim(self, rope_base)
    masks.check_window(window)
    dot_product.check_softcap(softcap)
    if rope_base is not None:
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

    linear = functools.partial(
      LinearGeneral,
      use_bias=use_bias,
      dtype=dtype,
      param_dtype=param_dtype,
      precision=precision,
      rngs=rngs,
    )
    to_heads = functools.partial(
      linear,
      kernel_init=kernel_init,
      bias_init=bias_init,
      promote_dtype=qkv_promote_dtype,
      dot_general=qkv_dot_general,
      dot_general_cls=qkv_dot_general_cls,
      kernel_metadata=kernel_metadata,
      bias_metadata=bias_metadata,
    )
    # In this order: the keys come from one stream.
    kv_heads = (self.num_kv_heads, self.head_dim)
    self.query = to_heads(in_features, (num_heads, self.head_dim))
    self.key = to_heads(self.in_kv_features, kv_heads)
    self.value = to_heads(self.in_kv_features, kv_heads)
    self.query_ln = None
    self.key_ln = None
    if normalize_qk:
      norm = functools.partial(
        LayerNorm,
        self.head_dim,
        dtype=dtype,
        param_dtype=param_dtype,
        use_bias=False,
        promote_dtype=ln_promote_dtype,
        rngs=rngs,
      )
      self.query_ln = norm(scale_metadata=query_ln_scale_metadata)
      self.key_ln = norm(scale_metadata=key_ln_scale_metadata)
    self.out = linear(
      (num_heads, self.head_dim),
      self.out_features,
      axis=(-2, -1),
      kernel_init=out_kernel_init or kernel_init,
      bias_init=out_bias_init or bias_init,
      promote_dtype=out_promote_dtype,
      dot_general=out_dot_general,
      dot_general_cls=out_dot_general_cls,
      kernel_metadata=out_kernel_metadata or kernel_metadata,
      bias_metadata=out_bias_metadata or bias_metadata,
    )
    self.rngs = None
    if keep_rngs and dropout_rate > 0:
      self.rngs = rngs.dropout.fork()
    self.cached_key = None  # in this order, which `repr` shows
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
      inputs_v: Like `inputs_k`, which is taken if it is None.
      mask: Broadcasts to `[..., n, t, s]`; False where a key is not seen. When
        decoding, s is the length of the cache.
      deterministic: Overrides that of the layer, if not None.
      rngs: Streams or the stream that the dropout's key comes from, overriding
        those of the layer, if not None.
      sow_weights: Whether to sow the attention weights as `Intermediate`
        `attention_weights`.
      decode: Overrides that of the layer, if not None.
      is_causal: Whether token i sees no key after key i; decoding is causal
        anyway.
      out_sharding: The sharding of the last projection's product, under a mesh
        with explicit axes.
      qkv_sharding: The same for the first three.
      input_positions: Passed on to the layer's `attention_fn`, which must be
        one that takes them. Rotary embedding by `rope_base` needs none: it
        counts the tokens.
      lengths: `[]` or `[...]` integers in [0, t]: the number of real tokens of
        each sequence; all, if None. The rest is padding: no token sees it, its
        own result is that of attending to nothing, and it takes no room in the
        cache. With a cache, a length for each sequence needs an index for each:
        `init_cache(..., per_sequence=True)`.

    Returns:
      `[..., t, out_features]`.

    Raises:
      ValueError: If shapes do not fit; if there are `input_positions` and no
        `attention_fn` for them; if the cache is missing, has no index for each
        of the `lengths` or, where the index is known (outside of `jit`), no
        room; or if neither the call nor the layer says what is needed.
    """
    keywords = self._own_keywords(input_positions)
    query, key, value = self._project(
      inputs_q, inputs_k, inputs_v, qkv_sharding
    )
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
    keywords.update(
      dropout_rng=dropout_rng,
      dropout_rate=self.dropout_rate,
      broadcast_dropout=self.broadcast_dropout,
      deterministic=deterministic,
      dtype=self.dtype,
      precision=self.precision,
      module=self if sow_weights else None,
    )
    if decode:
      can_fuse = deterministic and not sow_weights
      x = self._decode(query, key, value, lengths, mask, keywords, can_fuse)
    else:
      if self.rope_base is not None:
        query, key = rotary.rotate_from_start(
          query, key, self.rope_base, self.rope_scale
        )
      if self.window is not None:
        keywords["window"] = self.window
      if lengths is not None:
        real = masks.real_tokens(lengths, key.shape[-3])
        mask = masks.both(mask, real[..., None, None, :], query.ndim)
      x = self.attention_fn(
        query, key, value, mask=mask, is_causal=is_causal, **keywords
      )
      x = _zero_padding(lengths, x)
    return self.out(x, out_sharding=out_sharding)

  def _project(
    self,
    inputs_q: jax.Array,
    inputs_k: jax.Array | None,
    inputs_v: jax.Array | None,
    qkv_sharding: Any,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects the inputs to queries, keys and values."""
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
      assert self.query_ln is not None and self.key_ln is not None
      query = self.query_ln(query)
      key = self.key_ln(key)
    return query, key, value

  def _own_keywords(self, input_positions: jax.Array | None) -> dict[str, Any]:
    """Returns the keywords that `attention_fn` gets only if they are set."""
    keywords: dict[str, Any] = {}
    if input_positions is not None:
      if self.attention_fn is dot_product_attention:
        raise ValueError(
          "`input_positions` are for an `attention_fn` that takes them, but the"
          " layer's is `dot_product_attention`. Give the layer another, or"
          " `rope_base`, which counts the tokens and needs none."
        )
      keywords["input_positions"] = input_positions
    if self.softcap is not None:
      keywords["softcap"] = self.softcap
    return keywords

  def _decode(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lengths: jax.Array | None,
    mask: jax.Array | None,
    keywords: Mapping[str, Any],
    can_fuse: bool,
  ) -> jax.Array:
    """Appends keys and values to the cache and attends to all of it.

    Args:
      query: `[..., t, n, h]`.
      key: `[..., t, kv heads, h]`.
      value: Like `key`.
      lengths: How many tokens are not padding; all, if None.
      mask: Broadcasts to `[..., n, t, max_length]`, or None.
      keywords: Further keywords of `attention_fn`.
      can_fuse: Whether one kernel may append and attend.

    Returns:
      `[..., t, n, h]`; NaN for tokens that found no room, if a trace did not
      know their number.
    """
    buffers = self._buffers()
    lost = decoding.check_room(buffers, query, key, lengths)
    options = decoding.Options(
      self.window, self.softcap, self.rope_base, self.rope_scale
    )
    if (
      can_fuse
      and self.precision is None
      and self.attention_fn is dot_product_attention
      # A kernel would hide functions that were replaced.
      and eager.functions_are_as_imported()
      and query.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    ):
      buffers, x = decoding.append_and_attend(
        buffers, query, key, value, lengths, mask, options=options
      )
      self._keep(buffers)
    else:
      buffers, query, key, value, seen = decoding.append(
        buffers, query, key, value, lengths, options=options
      )
      self._keep(buffers)
      mask = masks.both(mask, seen, query.ndim)
      x = self.attention_fn(
        query, key, value, mask=mask, is_causal=False, **keywords
      )
      x = _zero_padding(lengths, x)
    return _nan_where(lost, x)

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
    """Returns whether there is no dropout, and the key if there is."""
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
      deterministic: Whether to drop no attention weights.
      decode: Whether to use the cache.
      batch_size: The batch axes of the cache, which is made if there is none
        and `max_length` is given too.
      max_length: Its length.

    Raises:
      TypeError: If only one of `batch_size` and `max_length` is given.
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
