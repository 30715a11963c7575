"""One call for a decoder step: append K and V, attend over what is there."""

from collections.abc import Iterator
import dataclasses
import math
from typing import Any

import jax
from jax import lax
from jax.interpreters import ad
import jax.numpy as jnp
import numpy as np

from ..common import dispatch
from ..common import options as options_lib
from ..kv_cache import checks
from ..kv_cache import layout as layout_lib
from . import reference

APPEND_TARGET = "decode_attention_append_and_attend"
ATTEND_TARGET = "decode_attention_attend"

LIBRARY = dispatch.Library(
  f"{__package__}._decode_attention_cpu",
  {APPEND_TARGET: "append_and_attend", ATTEND_TARGET: "attend"},
)
CUDA_LIBRARY = dispatch.Library(
  f"{__package__}._decode_attention_cuda",
  {APPEND_TARGET: "append_and_attend", ATTEND_TARGET: "attend"},
  platform="CUDA",
)

# Of the CUDA kernels; see decode_attention_cuda.h. Rows of a head are read 16
# bytes at a time where they are multiples of that, else element by element.
_MAX_ROW_BYTES = 2048
_MAX_ODD_DIM = 512
_LEAST_KEYS = 128  # of a worker
_WHOLE_KEYS = 256  # of a sequence that is not divided
# Blocks that a large GPU runs at a time, twice as many where it takes few rows
# of float32; and those that occupy it at all.
_FEW_ROWS = 8
_BLOCKS = 296
_BUSY_BLOCKS = 96
_WORKERS_OF_UNKNOWN = 16  # where sizes of the queries are symbolic

PALLAS = f"{__package__}.pallas_tpu"

# Every operand after the caches and the new rows, in the handlers' order, with
# the rank and dtype of the empty array that stands for one that is not given.
_OPERANDS: dict[str, tuple[int, Any]] = {
  "q": (5, None),
  "index": (1, jnp.int32),
  "count": (1, jnp.int32),
  "layer": (1, jnp.int32),
  "table": (2, jnp.int32),
  "first_slot": (0, jnp.int32),
  "k_scale": (2, jnp.float32),
  "v_scale": (2, jnp.float32),
  "rope_cos": (2, jnp.float32),
  "rope_sin": (2, jnp.float32),
  "rope_positions": (2, jnp.int32),
  "left_padding": (1, jnp.int32),
  "alibi_slopes": (3, jnp.float32),
  "sinks": (2, jnp.float32),
  "bias": (5, jnp.float32),
  "mask": (5, jnp.bool_),
  "qv": (5, jnp.float32),
}


def decode_attention(
  cache_k: jax.Array,
  cache_v: jax.Array,
  q: jax.Array,
  new_k: jax.Array,
  new_v: jax.Array,
  index: jax.Array | int,
  *,
  lengths: jax.Array | int | None = None,
  layer: jax.Array | int | None = None,
  layout: str = "bsnh",
  ring: bool = False,
  k_scale: jax.Array | float | None = None,
  v_scale: jax.Array | float | None = None,
  block_table: jax.Array | None = None,
  cache_batch_index: jax.Array | None = None,
  left_padding: jax.Array | int | None = None,
  scale: float | None = None,
  causal: bool = True,
  window: int | tuple[int, int] | None = None,
  chunk: int | None = None,
  softcap: float | None = None,
  alibi_slopes: jax.Array | None = None,
  bias: jax.Array | None = None,
  mask: jax.Array | None = None,
  sinks: jax.Array | None = None,
  qv: jax.Array | None = None,
  rope_cos: jax.Array | None = None,
  rope_sin: jax.Array | None = None,
  rope_positions: jax.Array | int | None = None,
  rope_interleaved: bool = False,
  rope_cached_keys: bool = False,
  out_dtype: Any = None,
  return_lse: bool = False,
  implementation: str = dispatch.AUTO,
) -> tuple[jax.Array, ...]:
  """Appends new keys and values to a cache and attends over its valid prefix.

  Without options, for one new token, equivalent to

      cache_k, cache_v = kv_cache.update(cache_k, cache_v, new_k, new_v, index)
      logits = q @ cache_k[:, : index + 1] / sqrt(h)
      out = softmax(logits) @ cache_v[:, : index + 1]

  but nothing after the valid prefix is read, and the caches are updated in
  place. Query token i stands at position `index + i` and sees the keys at
  positions up to its own.

  Args:
    cache_k: `[b, s, n, h]`, or with layout "bnsh" `[b, n, s, h]`; float32,
      bfloat16, float16, int8, float8_e4m3fn or float8_e5m2. With `layer`, one
      more axis in front. With `block_table`, `[blocks, block_size, n, h]`.
    cache_v: Like `cache_k`; its last axis may have another size.
    q: `[b, t, n * g, h]`, or with layout "bnsh" `[b, n * g, t, h]`; query heads
      `i * g` to `i * g + g - 1` share key-value head i. Of the dtype of the
      cache, or float32, bfloat16 or float16 if that is quantised.
    new_k: `[b, t, n, h]`, or with layout "bnsh" `[b, n, t, h]`, of q's dtype.
    new_v: Like `new_k`, with the last axis of `cache_v`.
    index: Scalar or `[b]` integers: the position of new token 0, that is the
      number of tokens that the sequence already has.
    lengths: Scalar or `[b]` integers in [0, t]: how many of the new tokens
      there are; the rest is padding, which is not written and whose result is
      zero. All, if None.
    layer: Integer scalar: which layer of a stacked cache `[l, b, s, n, h]`.
    layout: "bsnh" or "bnsh", the order of the axes of all of these arrays.
    ring: Whether position p lies in slot `p % s`: the cache keeps the last s
      positions. With more than one new token, `window` must be small enough
      that no query needs a key that the call overwrites.
    k_scale: Scalar, `[n]` or `[b, n]`, for int8 and float8 caches: the factor
      of what is stored. New keys are stored as `round(x / k_scale)`.
    v_scale: Like `k_scale`.
    block_table: `[b, m]` integers, for a paged cache: position p of sequence i
      is slot `p % block_size` of block `block_table[i, p // block_size]`.
    cache_batch_index: `[b]` integers: the row of the cache that each sequence
      has, where that is not its own number.
    left_padding: Scalar or `[b]` integers: keys at positions below are not
      seen.
    scale: Factor of the logits; `1 / sqrt(h)`, if None.
    causal: Whether a query sees no key after its own position.
    window: Sliding window: the number of keys that a query sees, its own the
      last of them; or a pair of how many before and how many after its own,
      -1 for all.
    chunk: Chunked attention: a query sees keys from the last multiple of
      `chunk` on.
    softcap: Logits become `softcap * tanh(logits / softcap)`.
    alibi_slopes: `[n * g]` or `[b, n * g]`: logits get minus the slope times
      the distance of query and key.
    bias: `[b, n * g, t, s]` with any axis 1: added to the logits. The last axis
      runs over the slots of a sequence.
    mask: Like `bias`, bool: False where a key must not be seen.
    sinks: `[n * g]`: one more logit in each head's softmax, without a value.
    qv: Like `q` with the values' h: `qv @ values` is added to the logits before
      they are scaled.
    rope_cos: `[positions, pairs]` floating, with `rope_sin`: q and the new keys
      are rotated by the angles of their positions, before keys are stored. See
      `rope_tables`. Elements after the first `2 * pairs` are left alone.
    rope_sin: Like `rope_cos`.
    rope_positions: `[b]` or `[b, t]` integers: rows of `rope_cos` to use, where
      they are not the tokens' positions; with `[b]`, of new token 0.
    rope_interleaved: Whether elements 2i and 2i + 1 are a pair, else elements i
      and i + pairs.
    rope_cached_keys: Whether keys are stored as they are and rotated when read.
    out_dtype: Of the result; that of `q`, if None.
    return_lse: Whether to return the logarithms of the softmax's sums as well.
    implementation: "auto", "xla", "cpu", "cuda" or "pallas" (TPU).

  Returns:
    The updated `cache_k` and `cache_v`, then the result, `[b, t, n * g, h]` or
    with layout "bnsh" `[b, n * g, t, h]`, and with `return_lse`
    `[b, n * g, t]` float32. A query that sees no key has the result 0 and the
    logarithm -inf.

  Raises:
    TypeError: If a dtype does not fit.
    ValueError: If a shape or an option does not fit; or, where the values are
      known (outside of `jit`), if a position lies outside the cache. Under
      `checkify.checkify` the latter is an error of `user_checks`.

  Numerics: Logits, softmax and sums in float32, whatever the dtypes; the cache
    is never widened in memory. Bits do not depend on the number of threads.
  Aliasing: As `kv_cache.update`.
  Batching: `vmap` folds its axis into the batch.
  Differentiation: Forward and reverse mode, through plain JAX on the whole
    buffer; a TypeError for the new rows of a quantised cache.

  Source: Flash-decoding, split over the keys; the online softmax of Milakov and
    Gimelshein, arXiv:1805.02867.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> import kernels
    >>> cache = jnp.zeros((1, 16, 2, 4))
    >>> q, k, v = (
    ...   jnp.ones((1, 1, 4, 4)),
    ...   jnp.ones((1, 1, 2, 4)),
    ...   jnp.ones((1, 1, 2, 4)),
    ... )
    >>> step = jax.jit(kernels.decode_attention, donate_argnums=(0, 1))
    >>> cache_k, cache_v, out = step(cache, cache + 0, q, k, v, 0)
    >>> cache_k, cache_v, out = step(cache_k, cache_v, q, k, 3 * v, 1)
    >>> out[0, 0, :, 0].tolist()
    [2.0, 2.0, 2.0, 2.0]
  """
  new_k = options_lib.array("new_k", new_k)
  new_v = options_lib.array("new_v", new_v)
  return _call(
    cache_k, cache_v, q, (new_k, new_v), index, lengths=lengths, layer=layer,
    layout=layout, ring=ring, k_scale=k_scale, v_scale=v_scale,
    block_table=block_table, cache_batch_index=cache_batch_index,
    left_padding=left_padding, scale=scale, causal=causal, window=window,
    chunk=chunk, softcap=softcap, alibi_slopes=alibi_slopes, bias=bias,
    mask=mask, sinks=sinks, qv=qv, rope_cos=rope_cos, rope_sin=rope_sin,
    rope_positions=rope_positions, rope_interleaved=rope_interleaved,
    rope_cached_keys=rope_cached_keys, out_dtype=out_dtype,
    return_lse=return_lse, implementation=implementation,
  )  # fmt: skip


def attend(
  cache_k: jax.Array,
  cache_v: jax.Array,
  q: jax.Array,
  index: jax.Array | int,
  *,
  return_lse: bool = False,
  **options: Any,
) -> Any:
  """Attends over a cache without appending to it.

  For layers that share a cache, for cross attention over a cached encoder (with
  `causal=False`), and for a prefix that several sequences have in common.

  Args:
    cache_k: As for `decode_attention`.
    cache_v: As for `decode_attention`.
    q: As for `decode_attention`.
    index: Scalar or `[b]` integers: the number of keys of each sequence. The
      query tokens stand at the last positions: token i of t at
      `index - t + i`.
    return_lse: Whether to return the logarithms of the softmax's sums as well.
    **options: Any keyword argument of `decode_attention`. `lengths` is then the
      number of query tokens that are not padding.

  Returns:
    The result, or with `return_lse` the result and the logarithms, as from
    `decode_attention`.

  Raises:
    TypeError: If a dtype does not fit.
    ValueError: If a shape or an option does not fit.

  Example:
    >>> import jax.numpy as jnp
    >>> from kernels import decode_attention
    >>> values = jnp.arange(4.0).reshape(1, 4, 1, 1)
    >>> q = jnp.zeros((1, 1, 1, 1))
    >>> float(decode_attention.attend(values, values, q, 3)[0, 0, 0, 0])
    1.0
  """
  unknown = set(options) - set(_ATTEND_OPTIONS)
  if unknown:
    raise TypeError(
      "`attend` has no keyword arguments"
      f" {', '.join(f'`{name}`' for name in sorted(unknown))}; it takes those"
      f" of `decode_attention`: {', '.join(_ATTEND_OPTIONS)}."
    )
  result = _call(
    cache_k, cache_v, q, None, index, return_lse=return_lse,
    **(_ATTEND_OPTIONS | options),
  )  # fmt: skip
  return result if return_lse else result[0]


_ATTEND_OPTIONS: dict[str, Any] = {
  name: default
  for name, default in (decode_attention.__kwdefaults__ or {}).items()
  if name != "return_lse"
}


def merge(
  out_a: jax.Array, lse_a: jax.Array, out_b: jax.Array, lse_b: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Joins attention over two disjoint sets of keys.

  For a prefix shared by all sequences, attended to once, and their own rests.

  Args:
    out_a: `[..., h]`.
    lse_a: `[...]` float32; transposed to go with `out_a` where needed.
    out_b: Like `out_a`.
    lse_b: Like `lse_a`.

  Returns:
    The result over both sets, of `out_a`'s dtype, and its logarithms.

  Raises:
    TypeError: If an operand is not floating, or the results' dtypes differ.
    ValueError: If the shapes do not go together; none is broadcast.

  Example:
    >>> import jax.numpy as jnp
    >>> from kernels import decode_attention
    >>> out, lse = decode_attention.merge(
    ...   jnp.array([1.0]), jnp.array(0.0), jnp.array([3.0]), jnp.array(0.0)
    ... )
    >>> out.tolist(), round(float(lse), 4)
    ([2.0], 0.6931)
  """
  named = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
  for name, value in named.items():
    named[name] = options_lib.array(name, value)
    if not jnp.issubdtype(named[name].dtype, jnp.floating):
      raise TypeError(
        f"`{name}` must be floating, but got `{layout_lib.text(named[name])}`."
      )
  out_a, lse_a, out_b, lse_b = named.values()
  if out_a.ndim == 0 or out_b.shape != out_a.shape:
    raise ValueError(
      "`out_a` and `out_b` must have the same shape [..., h], but got"
      f" `{layout_lib.text(out_a)}` and `{layout_lib.text(out_b)}`."
    )
  if out_b.dtype != out_a.dtype:
    raise TypeError(
      "`out_a` and `out_b` must have the same dtype, but got"
      f" `{layout_lib.text(out_a)}` and `{layout_lib.text(out_b)}`. Cast one."
    )
  for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
    if lse.shape != out_a.shape[:-1]:
      raise ValueError(
        f"`{name}` must have the shape of `out_a` without its last axis,"
        f" [{', '.join(map(str, out_a.shape[:-1]))}], but got"
        f" `{layout_lib.text(lse)}`. Transpose it where the layout differs."
      )
  lse = jnp.logaddexp(lse_a, lse_b)
  base = jnp.where(jnp.isneginf(lse), 0.0, lse)
  weight_a = jnp.exp(lse_a - base)[..., None]
  weight_b = jnp.exp(lse_b - base)[..., None]
  out = out_a.astype(jnp.float32) * weight_a + (
    out_b.astype(jnp.float32) * weight_b
  )
  return out.astype(out_a.dtype), lse


def rope_tables(
  positions: int,
  dim: int,
  *,
  theta: float = 10000.0,
  scale: float = 1.0,
  dtype: Any = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
  """Returns the cosines and sines of rotary embedding.

  The angle of pair i at position p is `p / scale / theta ** (2 * i / dim)`.

  Args:
    positions: Number of positions.
    dim: Number of elements to rotate, even.
    theta: Base of the wavelengths.
    scale: Positions are divided by it.
    dtype: Of the tables.

  Returns:
    `rope_cos` and `rope_sin`, `[positions, dim // 2]`.

  Raises:
    TypeError: If an option is no number.
    ValueError: If a number is out of range.

  Example:
    >>> from kernels import decode_attention
    >>> cos, sin = decode_attention.rope_tables(8, 64)
    >>> cos.shape, float(cos[0, 0]), round(float(sin[1, 0]), 4)
    ((8, 32), 1.0, 0.8415)
  """
  positions = options_lib.integer("positions", positions, 1)
  dim = options_lib.integer("dim", dim, 2)
  if dim % 2:
    raise ValueError(f"`dim` must be even, but got `{dim}`.")
  theta = options_lib.number("theta", theta, least=0, exclusive=True)
  scale = options_lib.number("scale", scale, least=0, exclusive=True)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise TypeError(f"`dtype` must be floating, but got `{dtype!r}`.")
  # In float64 on the host: float32 loses digits at large positions.
  rates = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
  angles = np.arange(positions, dtype=np.float64)[:, None] / scale * rates
  return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


# Distances of positions are smaller, so that this much is no limit.
_NO_LIMIT = 2**31 - 1


def _window(window, causal):
  """Returns how many keys before and after its own a query sees, or -1."""
  if window is None:
    return -1, -1
  if isinstance(window, (tuple, list)):
    pair = [options_lib.integer("window", size) for size in window]
    if len(pair) != 2 or min(pair) < -1:
      raise ValueError(
        "`window` must be a pair of numbers that are at least 0, or -1 for no"
        f" limit, but got `{window}`."
      )
  else:
    own = options_lib.integer("window", window)
    if own < 1:
      raise ValueError(
        f"`window` must be at least 1, the query's own key, but got {own}."
      )
    pair = [own - 1, -1 if causal else 0]
  left, right = (-1 if size >= _NO_LIMIT else size for size in pair)
  return left, right


def _numbers(scale, softcap, chunk, k_dim):
  """Returns the factor of the logits, their cap and the chunk; 0 for none."""
  if scale is None:
    scale = 1.0 / math.sqrt(k_dim)
  else:
    scale = options_lib.number("scale", scale)
    if not abs(scale) <= _LARGEST:
      raise ValueError(f"`scale` must be a finite float32, but got `{scale}`.")
  if softcap is None:
    softcap = 0.0
  else:
    softcap = options_lib.number("softcap", softcap, least=0, exclusive=True)
    if not _LEAST <= softcap <= _LARGEST:
      raise ValueError(
        f"`softcap` must be a positive and finite float32, but got `{softcap}`."
      )
  if chunk is None:
    chunk = 0
  else:
    chunk = options_lib.integer("chunk", chunk, 1)
    chunk = 0 if chunk > _NO_LIMIT else chunk
  return scale, softcap, chunk


_LARGEST = float(np.finfo(np.float32).max)
_LEAST = float(np.finfo(np.float32).tiny)


def _per_logit(name, value, sizes, dtype):
  """Returns `[b, n, g, t, s]` of an operand `[b, n * g, t, s]`."""
  array = options_lib.array(name, value)
  b, n, g, t, s = sizes
  full = (b, n * g, t, s)
  if array.ndim != 4 or any(
    size != most and size != 1 for size, most in zip(array.shape, full)
  ):
    raise ValueError(
      f"`{name}` must have the shape [{', '.join(map(str, full))}], or 1 for"
      f" any of them, but got `{layout_lib.text(array)}`."
    )
  heads = (1, 1) if array.shape[1] == 1 else (n, g)
  shape = (array.shape[0], *heads, *array.shape[2:])
  return array.reshape(shape).astype(dtype)


def _heads(name, value, n, g, batch=None):
  array = options_lib.array(name, value)
  allowed = [(n * g,)] + ([(batch, n * g)] if batch is not None else [])
  if array.shape not in allowed or not jnp.issubdtype(
    array.dtype, jnp.floating
  ):
    shapes = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in allowed)
    raise ValueError(
      f"`{name}` must be floating of shape {shapes}, one for each query head,"
      f" but got `{layout_lib.text(array)}`."
    )
  return array.astype(jnp.float32).reshape((*array.shape[:-1], n, g))


def _queries(name, value, cache, batch, tokens, dim, dtype):
  """Returns q `[b, t, n, g, h]`, or `[b, n, g, t, h]` with layout "bnsh"."""
  array = options_lib.array(name, value)
  g = cache.geometry
  first = cache.layout == "bnsh"
  heads = array.shape[1 if first else 2] if array.ndim == 4 else None
  if (
    heads is None
    or array.shape[2 if first else 1] != tokens
    or array.shape[0] != batch
    or array.shape[3] != dim
    or heads == 0
    or g.heads == 0
    or heads % g.heads
  ):
    axes = (
      f"[{batch}, heads, {tokens}, {dim}]"
      if first
      else f"[{batch}, {tokens}, heads, {dim}]"
    )
    raise ValueError(
      f"`{name}` must have the shape {axes} with heads a multiple of the"
      f" cache's {g.heads}, and not 0, but got `{layout_lib.text(array)}`."
    )
  if dtype is not None and array.dtype != dtype:
    raise TypeError(
      f"`{name}` must have the dtype {jnp.dtype(dtype).name}, but got"
      f" `{layout_lib.text(array)}`. Cast it first."
    )
  group = heads // g.heads
  if first:
    return array.reshape(batch, g.heads, group, tokens, dim), group
  return array.reshape(batch, tokens, g.heads, group, dim), group


def _rope_operands(x, cos, sin, where, options, batch, tokens, k_dim, index):
  """Adds the operands of rotary embedding to `x`."""
  if cos is None and sin is None:
    if where is not None or options["rotate_keys"] or options["interleaved"]:
      raise ValueError(
        "`rope_positions`, `rope_cached_keys` and `rope_interleaved` must not"
        " be given without `rope_cos` and `rope_sin`."
      )
    return
  if cos is None or sin is None:
    raise ValueError("`rope_cos` and `rope_sin` must be given together.")
  cos = options_lib.array("rope_cos", cos)
  sin = options_lib.array("rope_sin", sin)
  if (
    cos.ndim != 2
    or cos.shape != sin.shape
    or 2 * cos.shape[1] > k_dim
    or cos.shape[0] < 1
    or not jnp.issubdtype(cos.dtype, jnp.floating)
    or not jnp.issubdtype(sin.dtype, jnp.floating)
  ):
    raise ValueError(
      "`rope_cos` and `rope_sin` must both be floating of shape [positions,"
      f" pairs] with at most {k_dim // 2} pairs, but got"
      f" `{layout_lib.text(cos)}` and `{layout_lib.text(sin)}`."
    )
  x["rope_cos"] = cos.astype(jnp.float32)
  x["rope_sin"] = sin.astype(jnp.float32)
  steps = jnp.arange(tokens, dtype=jnp.int32)
  if where is None:
    x["rope_positions"] = index[:, None] + steps
    return
  if np.ndim(where) == 2:
    x["rope_positions"] = layout_lib.integers(
      "rope_positions", where, batch, (tokens,)
    )
  else:
    first = layout_lib.integers("rope_positions", where, batch)
    x["rope_positions"] = first[:, None] + steps


def _known_dtype(name, value):
  try:
    return jnp.dtype(value)
  except TypeError as error:
    raise TypeError(
      f"`{name}` must be one of {', '.join(layout_lib.FLOAT_DTYPES)}, but got"
      f" `{value!r}`."
    ) from error


def _call(
  cache_k, cache_v, q, new, index, *, lengths, layer, layout, ring, k_scale,
  v_scale, block_table, cache_batch_index, left_padding, scale, causal, window,
  chunk, softcap, alibi_slopes, bias, mask, sinks, qv, rope_cos, rope_sin,
  rope_positions, rope_interleaved, rope_cached_keys, out_dtype, return_lse,
  implementation,
):  # fmt: skip
  """Checks and canonicalises the arguments and runs the op."""
  return_lse = options_lib.boolean("return_lse", return_lse)
  options_lib.one_of("layout", layout, layout_lib.LAYOUTS)
  ring = options_lib.boolean("ring", ring)
  q = options_lib.array("q", q)
  if q.ndim != 4:
    axes = "[b, t, heads, h]" if layout != "bnsh" else "[b, heads, t, h]"
    raise ValueError(
      f"`q` must have 4 axes {axes}, but got `{layout_lib.text(q)}`."
    )
  batch = q.shape[0]
  tokens = q.shape[2 if layout == "bnsh" else 1]
  cache = layout_lib.canonicalize(
    cache_k, cache_v, index, batch, layer=layer, layout=layout, ring=ring,
    k_scale=k_scale, v_scale=v_scale, block_table=block_table,
    cache_batch_index=cache_batch_index,
  )  # fmt: skip
  g = cache.geometry
  quantized = layout_lib.is_quantized(cache.k.dtype)
  if quantized and q.dtype.name not in layout_lib.FLOAT_DTYPES:
    raise TypeError(
      f"`q` must be one of {', '.join(layout_lib.FLOAT_DTYPES)}, but got"
      f" `{layout_lib.text(q)}`."
    )
  if not quantized and q.dtype != cache.k.dtype:
    raise TypeError(
      f"`q` must have the dtype of the cache, {cache.k.dtype.name}, but got"
      f" `{layout_lib.text(q)}`. Cast it first."
    )
  q, group = _queries("q", q, cache, batch, tokens, g.k_dim, None)
  if out_dtype is not None:
    out_dtype = _known_dtype("out_dtype", out_dtype)
  count = layout_lib.integers(
    "lengths", tokens if lengths is None else lengths, batch
  )
  x = {"cache_k": cache.k, "cache_v": cache.v}
  if new is not None:
    new_k, new_v = new
    if new_k.ndim != 4 or new_v.ndim != 4:
      axes = "[b, t, n, h]" if layout == "bsnh" else "[b, n, t, h]"
      raise ValueError(
        f"`new_k` and `new_v` must have 4 axes {axes}, but got"
        f" `{layout_lib.text(new_k)}` and `{layout_lib.text(new_v)}`."
      )
    layout_lib.check_new(cache, new_k, new_v, batch)
    new_tokens = new_k.shape[2 if layout == "bnsh" else 1]
    if new_tokens != tokens:
      raise ValueError(
        f"`q` must have as many tokens as `new_k`, {new_tokens}, but got"
        f" {tokens}."
      )
    if new_k.dtype != q.dtype:
      raise TypeError(
        f"`new_k` must have the dtype of `q`, {q.dtype.name}, but got"
        f" `{layout_lib.text(new_k)}`. Cast it first."
      )
    x |= {"new_k": new_k, "new_v": new_v}
  x |= {
    "q": q, "index": cache.index, "count": count, "layer": cache.layer,
    "table": cache.table, "first_slot": jnp.int32(0),
  }  # fmt: skip
  if cache.scales:
    x["k_scale"], x["v_scale"] = cache.scales

  causal = options_lib.boolean("causal", causal)
  left, right = _window(window, causal)
  scale, softcap, chunk = _numbers(scale, softcap, chunk, g.k_dim)
  if (
    ring
    and tokens != 1
    and new is not None
    and not (causal and 0 <= left <= cache.capacity - tokens)
  ):
    raise ValueError(
      f"With `ring` and {tokens} new tokens, `causal` must hold and `window`"
      f" must be at most {cache.capacity - tokens + 1} (the cache's length"
      f" {cache.capacity}, less the new tokens, plus 1), or the first of them"
      f" would miss keys that the last ones overwrite; but got `{window}`."
    )
  static: dict[str, Any] = {
    "layout": layout,
    "ring": cache.ring,
    "aligned": cache.aligned,
    "uniform": cache.uniform + layout_lib.uniform_axes(1, count=lengths),
    "scale": scale,
    "causal": causal,
    "window_left": left,
    "window_right": right,
    "chunk": chunk,
    "softcap": softcap,
    "interleaved": options_lib.boolean("rope_interleaved", rope_interleaved),
    "rotate_keys": options_lib.boolean("rope_cached_keys", rope_cached_keys),
    "out_dtype": jnp.dtype(q.dtype if out_dtype is None else out_dtype).name,
  }
  if static["out_dtype"] not in layout_lib.FLOAT_DTYPES:
    raise TypeError(
      f"`out_dtype` must be one of {', '.join(layout_lib.FLOAT_DTYPES)}, but"
      f" got `{static['out_dtype']}`."
    )
  position = cache.index if new is not None else cache.index - count
  _rope_operands(
    x, rope_cos, rope_sin, rope_positions, static, batch, tokens, g.k_dim,
    position,
  )  # fmt: skip
  if left_padding is not None:
    x["left_padding"] = layout_lib.integers("left_padding", left_padding, batch)
  if alibi_slopes is not None:
    slopes = _heads("alibi_slopes", alibi_slopes, g.heads, group, batch)
    x["alibi_slopes"] = slopes if slopes.ndim == 3 else slopes[None]
  if sinks is not None:
    x["sinks"] = _heads("sinks", sinks, g.heads, group)
  sizes = (batch, g.heads, group, tokens, cache.capacity)
  if bias is not None:
    bias = options_lib.array("bias", bias)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
      raise TypeError(
        f"`bias` must be floating, but got `{layout_lib.text(bias)}`. Pass a"
        " bool array as `mask`."
      )
    x["bias"] = _per_logit("bias", bias, sizes, jnp.float32)
  if mask is not None:
    mask = options_lib.array("mask", mask)
    if mask.dtype != jnp.bool_:
      raise TypeError(
        f"`mask` must be bool, but got `{layout_lib.text(mask)}`."
      )
    x["mask"] = _per_logit("mask", mask, sizes, jnp.bool_)
  if qv is not None:
    x["qv"], qv_group = _queries(
      "qv", qv, cache, batch, tokens, g.v_dim, q.dtype
    )
    if qv_group != group:
      raise ValueError(
        f"`qv` must have as many heads as `q`, {group * g.heads}, but got"
        f" {qv_group * g.heads}."
      )
  options = reference.Options(fields=tuple(x), **static)
  known = [x[name] for name in _VALUES if name in x]
  if layout_lib.concrete(*known):
    host = {
      name: np.asarray(value) if name in _VALUES else value
      for name, value in x.items()
    }
    checks.raise_if_known(_violations(*host.values(), options=options, xp=np))

  op = ATTEND if new is None else APPEND
  *caches, out, lse = op(
    *x.values(), options=options, implementation=implementation
  )
  shape = (
    (batch, g.heads * group, tokens, g.v_dim)
    if layout == "bnsh"
    else (batch, tokens, g.heads * group, g.v_dim)
  )
  result = (*caches, out.reshape(shape))
  if return_lse:
    result += (lse.reshape(batch, g.heads * group, tokens),)
  return result


# Operands whose values are checked.
_VALUES = ("index", "count", "layer", "table", "rope_positions")


def _violations(
  *operands: Any, options: reference.Options, xp: Any = jnp
) -> Iterator[checks.Violation]:
  x = options.named(operands)
  geometry = layout_lib.Geometry.of(x["cache_k"], x["cache_v"], options.layout)
  tokens = x["q"].shape[1 if options.layout == "bsnh" else 3]
  count = x["count"]
  if options.appends:
    yield from checks.position_violations(
      geometry, x["index"], count, x["layer"], x["table"], tokens,
      options.ring, reads=True, xp=xp,
    )  # fmt: skip
  else:
    yield checks.count_violation(count, tokens, xp=xp)
    yield checks.layer_violation(geometry, x["layer"], xp=xp)
    length = x["table"].shape[1] * geometry.block_size
    outside = x["index"] < 0
    if not options.ring:
      outside |= x["index"] > length
    yield (
      xp.any(outside),
      f"`index` must lie in [0, {length}], the number of keys of each"
      " sequence, but got {index}.",
      {"index": x["index"]},
    )
  if "rope_positions" in x:
    where = x["rope_positions"]
    rows = x["rope_cos"].shape[0]
    used = xp.arange(tokens) < count[:, None]
    yield (
      xp.any(used & ((where < 0) | (where >= rows))),
      f"`rope_cos` must have a row for every token's position, but it has"
      f" {rows} and the positions are {{where}}.",
      {"where": where},
    )


def _abstract(*avals, options):
  x = options.named(avals)
  q, v = x["q"], x["cache_v"]
  b, n, g, t = _sizes(x, options)
  return (
    dispatch.out_aval((*q.shape[:-1], v.shape[-1]), options.out_dtype, *avals),
    dispatch.out_aval((b, n, g, t), jnp.float32, *avals),
  )


def _append_abstract(*avals, options):
  caches = (dispatch.out_aval(c.shape, c.dtype, *avals) for c in avals[:2])
  return (*caches, *_abstract(*avals, options=options))


def _ffi_call(operands, options, targets, workspace):
  """Calls a handler; `workspace` are types of results that it also wants."""
  x = options.named(operands)
  caches = [x["cache_k"], x["cache_v"]]
  new = [x["new_k"], x["new_v"]] if options.appends else []
  x = layout_lib.once(x, options.aligned, options.uniform)
  rest = [
    x[name] if name in x else jnp.zeros((0,) * rank, dtype)
    for name, (rank, dtype) in _OPERANDS.items()
  ]
  abstract = _append_abstract if options.appends else _abstract
  avals = abstract(*map(jax.typeof, operands), options=options)
  results = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
  call = jax.ffi.ffi_call(
    targets[0] if options.appends else targets[1],
    (*results, *workspace),
    input_output_aliases={0: 0, 1: 1} if options.appends else {},
  )
  out = call(
    *caches,
    *new,
    *rest,
    ring=np.int64(options.ring),
    window_left=np.int64(options.window_left),
    window_right=np.int64(options.window_right),
    chunk=np.int64(options.chunk),
    scale=np.float32(options.scale),
    softcap=np.float32(options.softcap),
    heads_first=np.bool_(options.layout == "bnsh"),
    causal=np.bool_(options.causal),
    interleaved=np.bool_(options.interleaved),
    rotate_keys=np.bool_(options.rotate_keys),
  )
  return out[: len(results)]


def _cpu(*operands, options):
  return _ffi_call(operands, options, (APPEND_TARGET, ATTEND_TARGET), ())


def cuda(
  *operands: jax.Array,
  options: reference.Options,
  targets: tuple[str, str] = (APPEND_TARGET, ATTEND_TARGET),
) -> list[jax.Array]:
  """Calls the handlers for CUDA, which need room for the results of parts.

  Args:
    *operands: As of the reference.
    options: As of the reference.
    targets: Names that the handlers are registered under: the one that appends
      and the one that only attends.

  Returns:
    What the reference returns.
  """
  return _ffi_call(
    operands, options, targets, (_cuda_workspace(operands, options),)
  )


def _cuda_workspace(operands, options):
  """Returns the type of the CUDA workspace: parts, and what each has."""
  x = options.named(operands)
  b, n, g, t = _sizes(x, options)
  s = x["cache_k"].shape[-3 if options.layout == "bsnh" else -2]
  rows, v_dim = t * g, x["cache_v"].shape[-1]
  workers = _most_workers(
    b, n, rows, x["table"].shape[1] * s, x["cache_k"].dtype
  )
  floats = n * rows * (v_dim + 3) if workers else 0
  return jax.ShapeDtypeStruct((2 * workers, (floats + 3) // 4 * 4), jnp.float32)


def _most_workers(b, n, rows, capacity, dtype):
  """Returns among how many the keys of all sequences are divided, at most.

  The kernels take as many as the device keeps busy. 0, if no sequence is.
  """
  if dispatch.static_size((n, rows)) is None:
    return _WORKERS_OF_UNKNOWN
  # A block takes up to 64 rows; more rows, more blocks without any splitting.
  blocks = max(1, n * -(-rows // 64))
  twice = rows <= _FEW_ROWS and dtype == jnp.float32
  workers = -(-_BLOCKS * (2 if twice else 1) // blocks)
  if dispatch.static_size((b, capacity)) is not None:
    if capacity <= _WHOLE_KEYS or (rows > 64 and b * blocks >= _BUSY_BLOCKS):
      return 0
    keys = b * capacity
    # What parts write should be little beside the keys that they read, unless
    # the device would be idle.
    workers = min(
      workers,
      -(-keys // _LEAST_KEYS),
      max(-(-keys // max(1, 16 * rows)), -(-_BUSY_BLOCKS // blocks)),
    )
  return workers if workers > 1 else 0


def _cuda_unsupported(avals, *, options):
  x = options.named(avals)
  dims = (x["cache_k"].shape[-1], x["cache_v"].shape[-1])
  if dispatch.static_size(dims) is None:
    return "`head_dim` is not known"
  if max(dims) <= _MAX_ODD_DIM:
    return None
  sizes = [dim * x["cache_k"].dtype.itemsize for dim in dims]
  if options.rotate_keys:
    return (
      f"`rope_cached_keys` is written for `head_dim` up to {_MAX_ODD_DIM}, and"
      f" here it is {max(dims)}"
    )
  if any(size % 16 or size > _MAX_ROW_BYTES for size in sizes):
    return (
      f"a head's row must be a multiple of 16 bytes and at most"
      f" {_MAX_ROW_BYTES}, or have at most {_MAX_ODD_DIM} elements, and here"
      f" `head_dim` is {max(dims)}"
    )
  return None


def _sizes(x, options):
  """Returns b, n, g and t."""
  if options.layout == "bsnh":
    b, t, n, g, _ = x["q"].shape
  else:
    b, n, g, t, _ = x["q"].shape
  return b, n, g, t


# Operands that a batch does not have an axis of.
_SHARED = ("rope_cos", "rope_sin", "sinks")


def _batching(op, args, dims, *, options):
  x = options.named(args)
  dims = options.named(dims)
  if dims["first_slot"] is not None:
    raise NotImplementedError("`first_slot` cannot be mapped over.")
  size = next(
    x[name].shape[dim] for name, dim in dims.items() if dim is not None
  )

  def front(name):
    value, dim = x[name], dims[name]
    if dim is None:
      return jnp.broadcast_to(value, (size, *value.shape))
    return jnp.moveaxis(value, dim, 0)

  batch = front("layer").shape[1]
  scan = [name for name in _SHARED if dims.get(name) is not None]
  if scan:
    return _batching_shared(op, x, dims, scan, size, options)
  values = {
    name: front(name) for name in x if name not in (*_SHARED, "first_slot")
  }
  for name in ("alibi_slopes", "bias", "mask"):
    if name in values and values[name].shape[1] != batch:
      value = values[name]
      values[name] = jnp.broadcast_to(value, (size, batch, *value.shape[2:]))
  folded = layout_lib.fold_batch(values, size, options.layout)
  options = dataclasses.replace(
    options,
    aligned=False,
    uniform=layout_lib.uniform_of_batch(options.uniform, dims),
  )
  results = op(
    *(folded[name] if name in folded else x[name] for name in options.fields),
    options=options,
  )
  *caches, out, lse = results

  def unfold(a):
    return a.reshape((size, batch, *a.shape[1:]))

  return (*caches, unfold(out), unfold(lse)), (0,) * len(results)


def _batching_shared(op, x, dims, names, size, options):
  """Mapping over what a batch shares: one call for each, in a loop."""

  def step(carry, i):
    taken = [
      lax.dynamic_index_in_dim(x[name], i, dims[name], keepdims=False)
      if dims[name] is not None
      else x[name]
      for name in options.fields
    ]
    return carry, tuple(op(*taken, options=options))

  del names
  _, results = lax.scan(step, None, jnp.arange(size))
  return results, (0,) * len(results)


def _sharding_rule(avals, *, options):
  x = options.named(avals)
  row = "b" if options.aligned else "r"
  cache, whole = layout_lib.cache_factors(
    len(x["cache_k"].shape), row, options.layout
  )
  first = options.layout == "bnsh"
  new = "b n t" if first else "b t n"
  query = "b n g t" if first else "b t n g"
  whole |= {"hk", "hv", "t", "g", "m", "p", "c"}
  paged = x["table"].shape[1] != 1
  if paged:
    whole.add("s")
  if not options.aligned:
    whole.add("b")
  fixed = {
    "cache_k": f"{cache} hk", "cache_v": f"{cache} hv",
    "new_k": f"{new} hk", "new_v": f"{new} hv",
    "q": f"{query} hk", "qv": f"{query} hv",
    "index": "b", "count": "b", "layer": "b", "table": "b m",
    "first_slot": "", "k_scale": "b n", "v_scale": "b n",
    "rope_cos": "p c", "rope_sin": "p c", "rope_positions": "b t",
    "left_padding": "b", "sinks": "n g",
  }  # fmt: skip
  operands = []
  for name in options.fields:
    if name in fixed:
      operands.append(fixed[name])
      continue
    # Axes of size 1 are nobody's factor.
    axes = ("b", "n", "g", "t", "z" if paged else "s")[: len(x[name].shape)]
    sizes = zip(axes, x[name].shape)
    words = [
      f"{name.replace('_', '')}{i}" if size == 1 and axis != "t" else axis
      for i, (axis, size) in enumerate(sizes)
    ]
    whole |= {word for word in words if word not in ("b", "n", "s")}
    operands.append(" ".join(words))
  results = [f"{query} hv", "b n g t"]
  if options.appends:
    results = [f"{cache} hk", f"{cache} hv", *results]
  rule = f"{', '.join(operands)} -> {', '.join(results)}"
  return rule, layout_lib.in_order(rule, whole)


def _partition(mesh, arg_infos, result_infos, call, *, options):
  del mesh, result_infos
  infos = options.named(arg_infos)
  split = layout_lib.Split.of(
    infos["cache_k"], infos["table"].shape[1], options.layout, options.aligned
  )
  first = options.layout == "bnsh"
  heads = split.heads
  query = (
    split.batch(heads, None, None, None)
    if first
    else split.batch(None, heads, None, None)
  )
  per_logit = (split.batch()[0], heads, None, None, split.slots)
  fixed = {
    "cache_k": split.cache(), "cache_v": split.cache(),
    "new_k": split.tokens(), "new_v": split.tokens(),
    "q": query, "qv": query,
    "k_scale": split.per_head(), "v_scale": split.per_head(),
    "first_slot": split.replicated(),
    "rope_cos": split.replicated(), "rope_sin": split.replicated(),
    "sinks": layout_lib.P(heads),
  }  # fmt: skip
  specs = []
  for name in options.fields:
    if name in fixed:
      specs.append(fixed[name])
    elif name in ("alibi_slopes", "bias", "mask"):
      specs.append(
        layout_lib.P(
          *(
            None if size == 1 else axis
            for axis, size in zip(per_logit, infos[name].shape)
          )
        )
      )
    else:
      specs.append(split.batch())
  # Devices that hold other keys of the same sequences.
  partners = layout_lib.flat_names(split.slots) + (
    () if options.aligned else layout_lib.flat_names(split.rows)
  )

  def local(*operands):
    x = options.named(operands)
    x["table"], x["first_slot"] = split.readdress(
      x["cache_k"], x["table"], x["first_slot"]
    )
    if not partners:
      return call(*x.values(), options=options)
    sinks = x.pop("sinks", None)
    part = dataclasses.replace(options, fields=tuple(x), out_dtype="float32")
    *caches, out, lse = call(*x.values(), options=part)
    out, lse = _join(out, lse, sinks, x, options, partners)
    return (*caches, out.astype(options.out_dtype), lse)

  results = [query, split.batch(heads, None, None)]
  if options.appends:
    results = [split.cache(), split.cache(), *results]
  return local, tuple(results), tuple(specs)


def _join(out, lse, sinks, x, options, partners):
  """Joins the results of devices that hold different keys."""

  def like_out(a):
    if options.layout == "bsnh":
      a = a.transpose(0, 3, 1, 2)
    return a[..., None]

  largest = lax.pmax(lse, partners)
  if sinks is not None:
    tokens = lse.shape[-1]
    real = jnp.arange(tokens) < x["count"][:, None, None, None]
    sinks = jnp.where(real, sinks[..., None], -jnp.inf)
    largest = jnp.maximum(largest, sinks)
  base = jnp.where(jnp.isneginf(largest), 0.0, largest)
  weight = jnp.exp(lse - base)
  total = lax.psum(weight, partners)
  if sinks is not None:
    total += jnp.exp(sinks - base)
  safe = jnp.where(total == 0, 1.0, total)
  out = lax.psum(out * like_out(weight), partners) / like_out(safe)
  return out, jnp.where(total == 0, -jnp.inf, base + jnp.log(safe))


def _make_jvp(op, function):
  def rule(primals, tangents, *, implementation, options):
    x = options.named(primals)
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    names = {options.fields[i] for i in moving}
    if layout_lib.is_quantized(x["cache_k"].dtype) and names & {
      "cache_k", "cache_v", "new_k", "new_v",
    }:  # fmt: skip
      raise TypeError(
        "`decode_attention` with a quantised cache cannot be differentiated"
        " with respect to the cache or the new rows: rounding to"
        f" {x['cache_k'].dtype.name} has no useful derivative. Keep the cache"
        " in a floating dtype, or stop gradients at its inputs."
      )

    def of_moving(*values):
      full = list(primals)
      for i, value in zip(moving, values):
        full[i] = value
      return tuple(function(*full, options=options))

    out = op(*primals, implementation=implementation, options=options)
    _, derivatives = jax.jvp(
      of_moving,
      tuple(primals[i] for i in moving),
      tuple(tangents[i] for i in moving),
    )
    return out, list(derivatives)

  return rule


def _make_op(name, abstract_eval, function):
  op = dispatch.Op(
    name,
    abstract_eval=abstract_eval,
    reference=function,
    implementations=(
      dispatch.Implementation(
        name="cpu", platforms=("cpu",), fn=_cpu, library=LIBRARY
      ),
      dispatch.Implementation(
        name="cuda",
        platforms=("cuda",),
        fn=cuda,
        library=CUDA_LIBRARY,
        unsupported=_cuda_unsupported,
      ),
      dispatch.Implementation(
        name="pallas",
        platforms=("tpu",),
        partitionable=False,
        fn=dispatch.lazily(PALLAS, function.__name__),
        unsupported=dispatch.lazily(PALLAS, "unsupported"),
      ),
    ),
    batching=_batching,
    partitioning=dispatch.Partitioning(_sharding_rule, _partition),
    static_types={"options": reference.Options},
  )
  ad.primitive_jvps[op.primitive] = _make_jvp(op, function)
  checks.add_checkify_rule(op, _violations)
  return op


APPEND = _make_op(
  "decode_attention", _append_abstract, reference.append_and_attend
)
ATTEND = _make_op("decode_attention_attend", _abstract, reference.attend)
