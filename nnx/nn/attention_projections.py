"""The projections of an attention layer, and the norms after them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
from typing import Any

import jax

from nnx.module import Module
from nnx.nn import checks, dtypes
from nnx.nn.initializers import Initializer
from nnx.nn.linear_general import LinearGeneral
from nnx.nn.products import DotGeneral
from nnx.rnglib import Rngs


def head_features(
  num_heads: int, qkv_features: int, head_dim: int | None
) -> int:
  """Returns the features of a head; refuses numbers that do not fit.

  Example:

    >>> from nnx.nn import attention_projections
    >>> attention_projections.head_features(4, 32, None)
    8

  Args:
    num_heads: The number of query heads.
    qkv_features: The features of all of them.
    head_dim: Those of one, if they are given.

  Raises:
    ValueError: If they contradict each other.
  """
  if head_dim is not None:
    if num_heads * head_dim != qkv_features:
      raise ValueError(
        "`qkv_features` must be `num_heads * head_dim`, but got"
        f" `qkv_features={qkv_features}`, `num_heads={num_heads}` and"
        f" `head_dim={head_dim}`. Leave one of them out."
      )
    return head_dim
  if qkv_features % num_heads:
    raise ValueError(
      "`qkv_features` must be a multiple of `num_heads`, but got"
      f" `qkv_features={qkv_features}` and"
      f" `num_heads={num_heads}`."
    )
  return qkv_features // num_heads


class ProjectedAttention(Module):
  """Base of attention layers that project inputs to queries, keys and values.

  Attributes:
    num_heads: The number of query heads.
    num_kv_heads: The number of key and value heads.
    head_dim: h, the features of a head.
    in_features: Size of the last axis of the queries' inputs.
    in_kv_features: The same of the keys' and values' inputs.
    out_features: Size of the last axis of the result.
    query: To `[..., heads, h]`; `key` and `value` likewise.
    out: From `[..., heads, h]`.
    query_ln: The queries' norm, or None; `key_ln` likewise.
  """

  num_heads: int
  num_kv_heads: int
  head_dim: int
  dtype: dtypes.Dtype | None
  param_dtype: dtypes.Dtype
  in_features: int
  in_kv_features: int
  qkv_features: int
  out_features: int
  use_bias: bool
  precision: Any
  qkv_promote_dtype: dtypes.PromoteDtypeFn
  out_promote_dtype: dtypes.PromoteDtypeFn
  ln_promote_dtype: dtypes.PromoteDtypeFn
  qkv_dot_general: DotGeneral | None
  out_dot_general: DotGeneral | None
  qkv_dot_general_cls: Callable[[], DotGeneral] | None
  out_dot_general_cls: Callable[[], DotGeneral] | None
  query: LinearGeneral
  key: LinearGeneral
  value: LinearGeneral
  out: LinearGeneral
  query_ln: Callable[[jax.Array], jax.Array] | None
  key_ln: Callable[[jax.Array], jax.Array] | None

  def _set_sizes(
    self,
    num_heads: int,
    in_features: int,
    qkv_features: int | None,
    out_features: int | None,
    num_kv_heads: int | None,
    in_kv_features: int | None,
    head_dim: int | None,
  ) -> None:
    """Sets the sizes, and refuses those that do not fit."""
    if head_dim is not None:
      checks.whole("head_dim", head_dim, 1)
    checks.whole("num_heads", num_heads, 1)
    if qkv_features is None:
      qkv_features = in_features if head_dim is None else num_heads * head_dim
    self.num_heads = num_heads
    self.in_features = in_features
    self.qkv_features = qkv_features
    self.out_features = in_features if out_features is None else out_features
    self.in_kv_features = (
      in_features if in_kv_features is None else in_kv_features
    )
    self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    checks.whole("num_kv_heads", self.num_kv_heads, 1)
    checks.whole("in_features", self.in_features)
    checks.whole("qkv_features", self.qkv_features)
    checks.whole("out_features", self.out_features)
    checks.whole("in_kv_features", self.in_kv_features)
    if num_heads % self.num_kv_heads:
      raise ValueError(
        "`num_heads` must be a multiple of `num_kv_heads`, but got"
        f" `num_heads={num_heads}` and"
        f" `num_kv_heads={self.num_kv_heads}`."
      )
    self.head_dim = head_features(num_heads, self.qkv_features, head_dim)

  def _make_projections(
    self,
    rngs: Rngs,
    *,
    kernel_init: Initializer,
    out_kernel_init: Initializer | None,
    bias_init: Initializer,
    out_bias_init: Initializer | None,
    kernel_metadata: Mapping[str, Any],
    out_kernel_metadata: Mapping[str, Any],
    bias_metadata: Mapping[str, Any],
    out_bias_metadata: Mapping[str, Any],
    query_ln_scale_metadata: Mapping[str, Any],
    key_ln_scale_metadata: Mapping[str, Any],
    qk_norm: Callable[..., Callable[[jax.Array], jax.Array]] | None,
  ) -> None:
    """Makes projections and norms, by what is set on the layer before."""
    linear = functools.partial(
      LinearGeneral,
      use_bias=self.use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      precision=self.precision,
      rngs=rngs,
    )
    to_heads = functools.partial(
      linear,
      kernel_init=kernel_init,
      bias_init=bias_init,
      promote_dtype=self.qkv_promote_dtype,
      dot_general=self.qkv_dot_general,
      dot_general_cls=self.qkv_dot_general_cls,
      kernel_metadata=kernel_metadata,
      bias_metadata=bias_metadata,
    )
    # In this order: the keys come from one stream.
    kv_heads = (self.num_kv_heads, self.head_dim)
    self.query = to_heads(self.in_features, (self.num_heads, self.head_dim))
    self.key = to_heads(self.in_kv_features, kv_heads)
    self.value = to_heads(self.in_kv_features, kv_heads)
    self.query_ln = None
    self.key_ln = None
    if qk_norm is not None:
      norm = functools.partial(
        qk_norm,
        self.head_dim,
        dtype=self.dtype,
        param_dtype=self.param_dtype,
        promote_dtype=self.ln_promote_dtype,
        rngs=rngs,
      )
      self.query_ln = norm(scale_metadata=query_ln_scale_metadata)
      self.key_ln = norm(scale_metadata=key_ln_scale_metadata)
    self.out = linear(
      (self.num_heads, self.head_dim),
      self.out_features,
      axis=(-2, -1),
      kernel_init=out_kernel_init or kernel_init,
      bias_init=out_bias_init or bias_init,
      promote_dtype=self.out_promote_dtype,
      dot_general=self.out_dot_general,
      dot_general_cls=self.out_dot_general_cls,
      kernel_metadata=out_kernel_metadata or kernel_metadata,
      bias_metadata=out_bias_metadata or bias_metadata,
    )

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
    given = {"inputs_q": inputs_q, "inputs_k": inputs_k, "inputs_v": inputs_v}
    for name, inputs in given.items():
      if inputs.ndim < 2:
        raise ValueError(
          f"`{name}` must have the axes [..., tokens, features], but got the"
          f" shape {inputs.shape}."
        )
    query = self.query(inputs_q, out_sharding=qkv_sharding)
    key = self.key(inputs_k, out_sharding=qkv_sharding)
    value = self.value(inputs_v, out_sharding=qkv_sharding)
    if self.query_ln is not None:
      query = self.query_ln(query)
    if self.key_ln is not None:
      key = self.key_ln(key)
    return query, key, value
