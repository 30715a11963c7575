"""How an attention layer finds, or is told, where tokens stand."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from nnx import eager
from nnx.nn import attention_step, decoding, masks, rotary
from nnx.nn.attention_cache import CachedAttention
from nnx.nn.attention_step import AttentionStep
from nnx.nn.dot_product import dot_product_attention
from nnx.nn.rope_scaling import RopeScaling


class SteppedAttention(CachedAttention):
  """Base of attention layers that share what is the same in a whole model.

  Attributes:
    window: How many keys a token sees.
    softcap: Logits become `softcap * tanh(logits / softcap)`.
    rope_base: Base of the wavelengths of rotary embedding; none, if None.
    rope_scale: Positions are divided by it.
    rope_dim: How many features of a head are rotated; all, if None.
    rope_interleaved: Whether neighbours are a pair.
    rope_scaling: Changes how fast pairs turn.
    is_causal: Whether no token sees a later one; None, if calls say so.
    decode: Whether to use the cache; None, if calls say so.
    precision: Precision of the products.
    attention_fn: The attention without a fused kernel.
  """

  num_heads: int
  qkv_features: int
  window: masks.Window | None
  softcap: float | None
  rope_base: float | None
  rope_scale: float
  rope_dim: int | None
  rope_interleaved: bool
  rope_scaling: RopeScaling | None
  is_causal: bool | None
  decode: bool | None
  precision: Any
  attention_fn: Callable[..., jax.Array]

  def prepare_step(
    self,
    inputs_q: jax.Array,
    *,
    decode: bool | None = None,
    lengths: jax.Array | None = None,
    input_positions: jax.Array | None = None,
    block_table: jax.Array | None = None,
    index: jax.Array | None = None,
  ) -> AttentionStep:
    """Makes what this layer and others like it need for a call, once.

    Layers are alike if they have the same options of rotary embedding and, with
    a cache, caches of one shape that have seen the same tokens.

    Example:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import nnx
      >>> class Decoder(nnx.Module):
      ...   def __init__(self, rngs):
      ...     self.layers = nnx.List(
      ...       nnx.MultiHeadAttention(
      ...         2, 8, rope_base=1e4, is_causal=True, decode=True, rngs=rngs
      ...       )
      ...       for _ in range(4)
      ...     )
      ...
      ...   def __call__(self, x):
      ...     step = self.layers[0].prepare_step(x)
      ...     for layer in self.layers:
      ...       x += layer(x, step=step)
      ...     return x
      >>> model = Decoder(nnx.Rngs(0))
      >>> nnx.init_cache(model, batch_size=3, max_length=16)
      >>> model(jnp.ones((3, 5, 8))).shape
      (3, 5, 8)

    Args:
      inputs_q: `[..., t, in_features]`, of which only the shape matters; keys
        and values are of the same tokens.
      decode: As for a call of the layer; so are the next three.
      lengths: How many tokens of each sequence are not padding.
      input_positions: Where the tokens stand for rotary embedding.
      block_table: Which blocks of the cache a sequence has.
      index: `[]` or `[...]` integers: how many tokens the cache has, where the
        caller counts them (of many sequences that share a pool of blocks, say).
        The layers then leave their `cache_index` alone.

    Returns:
      A pytree for the `step` of calls.

    Raises:
      ValueError: As for a call of the layer.
    """
    if input_positions is not None and self.rope_base is None:
      raise ValueError(
        "`input_positions` of a step are for rotary embedding, but the layer's"
        " `rope_base` is None. Pass them to the call, for its `attention_fn`."
      )
    tokens = inputs_q.shape[-2]
    step = self._step(
      self._decodes(decode),
      inputs_q.shape[:-1],
      tokens,
      lengths,
      input_positions,
      block_table,
      index,
    )
    slots = tokens
    if step.index is not None:
      assert self.cached_key is not None
      slots = step.slots(self.cached_key.value)
    return attention_step.prepared(
      step, tokens, slots, self._options(), not self._may_fuse()
    )

  def _options(self) -> decoding.Options:
    """Returns what the attention depends on."""
    return decoding.Options(self.window, self.softcap, self._rotation())

  def _rotation(self) -> rotary.Rotation | None:
    """Returns how queries and keys are rotated."""
    if self.rope_base is None:
      return None
    return rotary.Rotation(
      self.rope_base,
      self.head_dim if self.rope_dim is None else self.rope_dim,
      self.rope_scale,
      self.rope_interleaved,
      self.rope_scaling,
    )

  def _check_rotation(self) -> None:
    """Refuses options of rotary embedding that are not possible."""
    rotation = self._rotation()
    if rotation is None:
      for name in ("rope_dim", "rope_interleaved", "rope_scaling"):
        value = getattr(self, name)
        if value is not None and value is not False:
          raise ValueError(
            f"`{name}` must not be given without `rope_base`, but got"
            f" `{name}={value}`. Give a base, usually 10000.0."
          )
      return
    if self.rope_dim is None and self.head_dim % 2:
      raise ValueError(
        "`rope_base` needs heads of an even number of features, but"
        f" `qkv_features={self.qkv_features}` and"
        f" `num_heads={self.num_heads}` make {self.head_dim}."
      )
    rotation.check(self.head_dim)

  def _decodes(self, decode: bool | None) -> bool:
    """Returns whether a call uses the cache."""
    if decode is None:
      decode = self.decode
      if decode is None:
        raise ValueError(
          "`MultiHeadAttention` must be told `decode`, but it is None in the"
          " layer and in the call. Pass it to one of them, or set it for a"
          " whole model by `nnx.view(model, decode=...)`."
        )
    if decode and self.is_causal is False:
      raise ValueError(
        "`MultiHeadAttention` decodes causally, but its `is_causal` is False."
        " Make the layer with `is_causal=True`, or call it with"
        " `decode=False`."
      )
    return decode

  def _step(
    self,
    decode: bool,
    shape: tuple[int, ...],
    keys: int,
    lengths: jax.Array | None,
    input_positions: jax.Array | None,
    block_table: jax.Array | None,
    index: jax.Array | None = None,
  ) -> AttentionStep:
    """Returns where the tokens of a call stand, checked.

    Args:
      decode: Whether there is a cache.
      shape: `[..., t]`, of the tokens.
      keys: s, how many keys come.
      lengths: As for a call.
      input_positions: The same, for `rope_base`.
      block_table: The same.
      index: As for `prepare_step`.
    """
    *batch, tokens = shape
    if lengths is not None:
      lengths = attention_step.as_lengths(lengths, batch, tokens, keys)
    if input_positions is not None:
      input_positions = attention_step.as_positions(
        input_positions, batch, tokens, keys
      )
    counts = index is None
    if not decode:
      if not counts or block_table is not None:
        raise ValueError(
          "`index` and `block_table` are of a cache, but `decode` is False."
        )
      return AttentionStep(lengths=lengths, positions=input_positions)
    cache = self._buffers().key
    if counts:
      assert self.cache_index is not None
      index = self.cache_index.value
    else:
      index = attention_step.as_index(index, batch)
    if (block_table is None) != (self.block_size is None):
      raise ValueError(
        "`block_table` must be given for a cache of blocks and for no other,"
        f" but got `{block_table}` for one of"
        f" `block_size={self.block_size}`. Call"
        " `init_cache(..., block_size=...)` for blocks."
      )
    if block_table is not None:
      block_table = attention_step.as_block_table(block_table, batch)
    step = AttentionStep(
      index, lengths, input_positions, block_table, counts=counts
    )
    decoding.check_shapes(cache, shape, keys, block_table is not None)
    lost = attention_step.check_room(step, tokens, step.slots(cache))
    return dataclasses.replace(step, lost=lost)

  def _check_step(
    self, step: AttentionStep, query, key, decode, *others
  ) -> None:
    """Refuses a step that was not made for this call."""
    given = [decode, *others]
    if any(x is not None for x in given):
      raise ValueError(
        "`decode`, `lengths`, `input_positions` and `block_table` must be given"
        " to `prepare_step`, not beside the `step` that it returned."
      )
    tokens = query.shape[-3], key.shape[-3]
    rotation = self._rotation()
    if tokens != (step.tokens, step.tokens) or step.rotation != rotation:
      raise ValueError(
        "`step` must be of a layer with the same rotary embedding, for as many"
        f" tokens, but got one of {step.tokens} tokens and"
        f" `{step.rotation}` for {tokens[0]} queries, {tokens[1]} keys and"
        f" `{rotation}`. Prepare one for each kind of layer, in each call."
      )
    if step.index is None:
      return
    self._decodes(True)
    decoding.check_shapes(
      self._buffers().key,
      query.shape[:-2],
      key.shape[-3],
      step.block_table is not None,
    )
    if step.counts:
      assert self.cache_index is not None
      attention_step.check_index(step, self.cache_index.value)

  def _may_fuse(self) -> bool:
    """Returns whether one kernel may append and attend."""
    return (
      self.precision is None
      and self.attention_fn is dot_product_attention
      # A kernel would hide functions that were replaced.
      and eager.functions_are_as_imported()
    )
