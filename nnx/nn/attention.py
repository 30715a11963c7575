"""Attention: the layer, with its cache for decoding.

The way of a key: `attention_projections` makes it. `attention_stepping` finds
where its token stands, which the layers of a model may share as an
`AttentionStep` (`attention_step`). Without a cache, `rotary` turns it and
`dot_product` attends. With one, which `attention_cache` keeps, `decoding` does
all of that and appends it: in one kernel, where that serves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nnx.nn import (
  checks,
  decoding,
  dtypes,
  initializers,
  masks,
  rotary,
)
from nnx.nn.attention_projections import ProjectedAttention
from nnx.nn.attention_step import AttentionStep
from nnx.nn.attention_stepping import SteppedAttention
from nnx.nn.dot_product import dot_product_attention as dot_product_attention
from nnx.nn.dot_product import (
  dot_product_attention_weights as dot_product_attention_weights,
)
from nnx.nn.initializers import NO_METADATA, Initializer, default_kernel_init
from nnx.nn.masks import combine_masks as combine_masks
from nnx.nn.masks import make_attention_mask as make_attention_mask
from nnx.nn.masks import make_causal_mask as make_causal_mask
from nnx.nn.normalization import LayerNorm
from nnx.nn.products import DotGeneral
from nnx.nn.rope_scaling import RopeScaling
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


# The norm of queries and keys that `normalize_qk` asks for.
_LAYER_NORM = functools.partial(LayerNorm, use_bias=False)


class MultiHeadAttention(ProjectedAttention, SteppedAttention):
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
  so that a model decodes as it was trained. That takes `is_causal=True`, here
  or in the calls without a cache: decoding is causal whatever it says, and a
  layer that says `is_causal=False` refuses to decode.

  Where things stand, rows of rotary embedding and masks are the same for all
  layers of a model: `prepare_step` makes them once, and each layer takes them
  as `step`.

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
    qkv_features: n * h, the features of all query heads; if None, `num_heads *
      head_dim`, or `in_features` without `head_dim`.
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
    normalize_qk: Whether to apply a `LayerNorm` without bias to each head's
      queries and keys, before they are rotated (Dehghani et al. 2023, "Scaling
      vision transformers to 22 billion parameters").
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
      model was trained on (Chen et al. 2023, arXiv:2306.15595).
    head_dim: h, the features of a head; `qkv_features / num_heads`, if None.
    qk_norm: The class of norms to apply in place of `LayerNorm`, as
      `nnx.RMSNorm` (Qwen 3, Gemma 3): called as `qk_norm(head_dim, dtype=...,
      param_dtype=..., promote_dtype=..., rngs=..., scale_metadata=...)`.
    rope_dim: How many features of a head are rotated, the first of them; all,
      if None. They make `rope_dim / 2` pairs, and pair i turns by `position /
      rope_scale / rope_base ** (2 * i / rope_dim)`.
    rope_interleaved: Whether elements 2i and 2i + 1 are a pair (GPT-J, Llama as
      published), else elements i and `i + rope_dim / 2` (GPT-NeoX, and Llama in
      Hugging Face).
    rope_scaling: How fast the pairs turn past the lengths of the training:
      `nnx.Llama3Scaling` or `nnx.YarnScaling`.
    is_causal: True, if no token of any call sees a later one; False, if the
      layer must not decode; None, if each call without a cache says so, as in
      Flax.

  Attributes:
    query: `LinearGeneral` to `[..., n, h]`; `key` and `value` likewise.
    out: `LinearGeneral` from `[..., n, h]`.
    query_ln: The norm of queries, or None; `key_ln` likewise.
    cached_key: `Cache`, `[..., max_length, kv heads, h]`, or None before
      `init_cache`; `[blocks, block_size, kv heads, h]` with a `block_size`.
      `cached_value` likewise.
    cache_index: `Cache`, int32, the number of tokens in the cache, `[]`; or one
      for each sequence.
    cached_key_scale: `Cache`, `[..., kv heads]` float32, for a cache of int8 or
      float8: the factors of what is stored. 0 until the first call, which
      chooses them by its tokens, unless they are set before. None for other
      caches. `cached_value_scale` likewise.

  Raises:
    TypeError: If an option has the wrong type.
    ValueError: If `qkv_features`, `num_heads` or the features of a head cannot
      be divided or contradict each other, or if `window`, `softcap` or an
      option of rotary embedding is out of range or has no `rope_base`.
  """

  # What an object pickled by Flax, whose layer has none of them, is without.
  window = softcap = rope_base = None
  rope_scale = 1.0
  rope_dim = rope_scaling = is_causal = None
  rope_interleaved = False
  cached_key_scale = cached_value_scale = block_size = None

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
    head_dim: int | None = None,
    qk_norm: Callable[..., Any] | None = None,
    rope_dim: int | None = None,
    rope_interleaved: bool = False,
    rope_scaling: RopeScaling | None = None,
    is_causal: bool | None = None,
  ):
    """Assigns each parameter by name: a line each, and no more."""
    self._set_sizes(
      num_heads,
      in_features,
      qkv_features,
      out_features,
      num_kv_heads,
      in_kv_features,
      head_dim,
    )
    checks.rate("dropout_rate", dropout_rate)
    masks.check_window(window)
    if softcap is not None:
      checks.positive("softcap", softcap)
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.broadcast_dropout = broadcast_dropout
    self.dropout_rate = dropout_rate
    self.deterministic = deterministic
    self.precision = precision
    self.use_bias = use_bias
    self.attention_fn = attention_fn
    self.decode = decode
    self.normalize_qk = normalize_qk or qk_norm is not None
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
    self.rope_dim = rope_dim
    self.rope_interleaved = rope_interleaved
    self.rope_scaling = rope_scaling
    self.is_causal = is_causal
    self._check_rotation()
    if self.normalize_qk and qk_norm is None:
      qk_norm = _LAYER_NORM
    self._make_projections(
      rngs,
      kernel_init=kernel_init,
      out_kernel_init=out_kernel_init,
      bias_init=bias_init,
      out_bias_init=out_bias_init,
      kernel_metadata=kernel_metadata,
      out_kernel_metadata=out_kernel_metadata,
      bias_metadata=bias_metadata,
      out_bias_metadata=out_bias_metadata,
      query_ln_scale_metadata=query_ln_scale_metadata,
      key_ln_scale_metadata=key_ln_scale_metadata,
      qk_norm=qk_norm,
    )
    self.rngs = None
    if keep_rngs and dropout_rate > 0:
      self.rngs = rngs.dropout.fork()
    self.cached_key = None  # in this order, which `repr` shows
    self.cached_value = None
    self.cache_index = None
    self.cached_key_scale = None
    self.cached_value_scale = None
    self.block_size = None

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
    block_table: jax.Array | None = None,
    step: AttentionStep | None = None,
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
      is_causal: Whether token i sees no key after key i, if the layer's own
        `is_causal` does not say so; decoding is causal anyway.
      out_sharding: The sharding of the last projection's product, under a mesh
        with explicit axes.
      qkv_sharding: The same for the first three.
      input_positions: `[t]` or `[..., t]` integers that are at least 0: where
        the tokens stand for rotary embedding by `rope_base`, which counts them
        if None. They change no mask, and nothing in the cache. Without
        `rope_base`, they are passed on to the layer's `attention_fn`, which
        must be one that takes them.
      lengths: `[]` or `[...]` integers in [0, t]: the number of real tokens of
        each sequence; all, if None. The rest is padding: no token sees it, its
        own result is that of attending to nothing, and it takes no room in the
        cache. With a cache, a length for each sequence needs an index for each:
        `init_cache(..., per_sequence=True)`.
      block_table: `[..., m]` integers, for a cache of blocks: position p of a
        sequence is slot `p % block_size` of block `block_table[..., p //
        block_size]`.
      step: What `prepare_step` of a layer with the same options made for the
        same tokens, in place of `decode`, `lengths`, `input_positions` and
        `block_table`.

    Returns:
      `[..., t, out_features]`.

    Raises:
      ValueError: If shapes do not fit; if there are `input_positions` and
        neither `rope_base` nor an `attention_fn` for them; if the cache is
        missing, has no index for each of the `lengths` or, where the index is
        known (outside of `jit`), no room; if the `step` is of other layers or
        tokens, or the layer's `is_causal` forbids to decode; or if neither the
        call nor the layer says what is needed.
    """
    query, key, value = self._project(
      inputs_q, inputs_k, inputs_v, qkv_sharding
    )
    keywords: dict[str, Any] = {}
    if step is not None:
      self._check_step(
        step, query, key, decode, lengths, input_positions, block_table
      )
    else:
      if self.rope_base is None and input_positions is not None:
        keywords["input_positions"] = self._for_attention_fn(input_positions)
        input_positions = None
      step = self._step(
        self._decodes(decode),
        query.shape[:-2],
        key.shape[-3],
        lengths,
        input_positions,
        block_table,
      )
    deterministic, dropout_rng = self._dropout(deterministic, rngs)
    if self.softcap is not None:
      keywords["softcap"] = self.softcap
    keywords.update(
      dropout_rng=dropout_rng,
      dropout_rate=self.dropout_rate,
      broadcast_dropout=self.broadcast_dropout,
      deterministic=deterministic,
      dtype=self.dtype,
      precision=self.precision,
      module=self if sow_weights else None,
    )
    if step.index is not None:
      can_fuse = deterministic and not sow_weights
      x = self._decode(query, key, value, step, mask, keywords, can_fuse)
    else:
      x = self._attend(query, key, value, step, mask, is_causal, keywords)
    return self.out(x, out_sharding=out_sharding)

  def _for_attention_fn(self, input_positions: jax.Array) -> jax.Array:
    if self.attention_fn is dot_product_attention:
      raise ValueError(
        "`input_positions` are for `rope_base` or for an `attention_fn` that"
        " takes them, but the layer's `rope_base` is None and its"
        " `attention_fn` is `dot_product_attention`. Give the layer one of"
        " them."
      )
    return input_positions

  def _attend(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    step: AttentionStep,
    mask: jax.Array | None,
    is_causal: bool,
    keywords: dict[str, Any],
  ) -> jax.Array:
    """Attends to the keys of the call alone: `[..., t, n, h]`."""
    rotation = self._rotation()
    if rotation is not None:
      table = None
      if step.cos is not None and step.sin is not None:
        table = step.cos, step.sin
      query, key = rotary.rotate_at(query, key, step.positions, rotation, table)
    if self.window is not None:
      keywords["window"] = self.window
    if step.lengths is not None:
      seen = step.seen
      if seen is None:
        real = masks.real_tokens(step.lengths, key.shape[-3])
        seen = real[..., None, None, :]
      mask = masks.both(mask, seen, query.ndim)
    x = self.attention_fn(
      query,
      key,
      value,
      mask=mask,
      is_causal=bool(is_causal or self.is_causal),
      **keywords,
    )
    return _zero_padding(step.lengths, x)

  def _decode(
    self,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    step: AttentionStep,
    mask: jax.Array | None,
    keywords: dict[str, Any],
    can_fuse: bool,
  ) -> jax.Array:
    """Appends keys and values to the cache and attends to all of it.

    Args:
      query: `[..., t, n, h]`.
      key: `[..., t, kv heads, h]`.
      value: Like `key`.
      step: Where the tokens stand.
      mask: Broadcasts to `[..., n, t, max_length]`, or None.
      keywords: Further keywords of `attention_fn`.
      can_fuse: Whether one kernel may append and attend.

    Returns:
      `[..., t, n, h]`; NaN for tokens that found no room, if a trace did not
      know their number.
    """
    buffers, options = self._buffers(), self._options()
    if (
      can_fuse
      and self._may_fuse()
      and query.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    ):
      buffers, x, step = decoding.append_and_attend(
        buffers, query, key, value, step, mask, options=options
      )
      self._keep(buffers, step)
    else:
      buffers, query, key, value, step = decoding.append(
        buffers, query, key, value, step, options=options
      )
      self._keep(buffers, step)
      assert step.seen is not None
      mask = masks.both(mask, step.seen, query.ndim)
      x = self.attention_fn(
        query, key, value, mask=mask, is_causal=False, **keywords
      )
      x = _zero_padding(step.lengths, x)
    return _nan_where(step.lost, x)

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
    self.init_cache((*batch, max_length, self.in_features))
