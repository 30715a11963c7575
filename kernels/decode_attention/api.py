"""One call for a decoder step: append K and V, attend over what is there."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..cache import checks as cache_checks
from ..common import dispatch
from ..common import options as options_lib
from . import checks, primitive


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
  arguments = _arguments(
    (cache_k, cache_v, q, index),
    (
      options_lib.array("new_k", new_k),
      options_lib.array("new_v", new_v),
    ),
    {
      "lengths": lengths, "layer": layer, "layout": layout, "ring": ring,
      "k_scale": k_scale, "v_scale": v_scale, "block_table": block_table,
      "cache_batch_index": cache_batch_index, "left_padding": left_padding,
      "scale": scale, "causal": causal, "window": window, "chunk": chunk,
      "softcap": softcap, "alibi_slopes": alibi_slopes, "bias": bias,
      "mask": mask, "sinks": sinks, "qv": qv, "rope_cos": rope_cos,
      "rope_sin": rope_sin, "rope_positions": rope_positions,
      "rope_interleaved": rope_interleaved,
      "rope_cached_keys": rope_cached_keys, "out_dtype": out_dtype,
    },
  )  # fmt: skip
  return _run(primitive.APPEND, arguments, return_lse, implementation)


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
  options = _ATTEND_OPTIONS | options
  result = _run(
    primitive.ATTEND,
    _arguments((cache_k, cache_v, q, index), None, options),
    return_lse,
    options["implementation"],
  )
  return result if return_lse else result[0]


_ATTEND_OPTIONS: dict[str, Any] = {
  name: default
  for name, default in (decode_attention.__kwdefaults__ or {}).items()
  if name != "return_lse"
}


def _arguments(
  arrays: tuple[Any, Any, Any, Any],
  new: tuple[jax.Array, jax.Array] | None,
  options: Mapping[str, Any],
) -> checks.Arguments:
  """Sorts what a user gives into groups.

  Args:
    arrays: cache_k, cache_v, q and index.
    new: New keys and values, if there are any.
    options: Keyword arguments of `decode_attention`.
  """
  cache_k, cache_v, q, index = arrays
  o = options
  return checks.Arguments(
    cache=cache_checks.Request(
      cache_k, cache_v, index, o["lengths"], o["layer"],
      cache_checks.canonical_layout(o["layout"]), o["ring"], o["k_scale"],
      o["v_scale"], o["block_table"], o["cache_batch_index"],
    ),
    q=q,
    new=new,
    masking=checks.Masking(
      o["causal"], o["window"], o["chunk"], o["left_padding"], o["mask"]
    ),
    logits=checks.Logits(
      o["scale"], o["softcap"], o["alibi_slopes"], o["bias"], o["sinks"],
      o["qv"],
    ),
    rotation=checks.Rotation(
      o["rope_cos"], o["rope_sin"], o["rope_positions"],
      o["rope_interleaved"], o["rope_cached_keys"],
    ),
    out_dtype=o["out_dtype"],
  )  # fmt: skip


def _run(
  op: dispatch.Op,
  arguments: checks.Arguments,
  return_lse: bool,
  implementation: str,
) -> tuple[jax.Array, ...]:
  """Checks the arguments, runs the op and folds the heads of the result."""
  return_lse = options_lib.boolean("return_lse", return_lse)
  x, options, sizes = checks.canonicalize(arguments)
  *caches, out, lse = op(
    *x.values(), options=options, implementation=implementation
  )
  b, n, g, t = sizes
  heads = n * g
  shape = (b, *options.layout.order(t, heads), out.shape[-1])
  result = (*caches, out.reshape(shape))
  if return_lse:
    result += (lse.reshape(b, heads, t),)
  return result


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
  text = cache_checks.text
  named = {"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
  for name, value in named.items():
    named[name] = options_lib.array(name, value)
    if not jnp.issubdtype(named[name].dtype, jnp.floating):
      raise TypeError(
        f"`{name}` must be floating, but got `{text(named[name])}`."
      )
  out_a, lse_a, out_b, lse_b = named.values()
  if out_a.ndim == 0 or out_b.shape != out_a.shape:
    raise ValueError(
      "`out_a` and `out_b` must have the same shape [..., h], but got"
      f" `{text(out_a)}` and `{text(out_b)}`."
    )
  if out_b.dtype != out_a.dtype:
    raise TypeError(
      "`out_a` and `out_b` must have the same dtype, but got"
      f" `{text(out_a)}` and `{text(out_b)}`. Cast one."
    )
  for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
    if lse.shape != out_a.shape[:-1]:
      raise ValueError(
        f"`{name}` must have the shape of `out_a` without its last axis,"
        f" [{', '.join(map(str, out_a.shape[:-1]))}], but got"
        f" `{text(lse)}`. Transpose it where the layout differs."
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
    TypeError: If an option is not a number.
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
