"""Checks of the arguments of decode attention, and the form that ops take."""

from collections.abc import Iterator, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..cache import addressing, violations
from ..cache import checks as cache_checks
from ..common import options as options_lib
from . import reference

# Distances of positions are smaller, so that this much is no limit.
_NO_LIMIT = 2**31 - 1

_LARGEST = float(np.finfo(np.float32).max)
_LEAST = float(np.finfo(np.float32).tiny)

# Operands whose values are checked.
_VALUES = ("index", "count", "layer", "table", "rope_positions")


@dataclasses.dataclass(frozen=True)
class Masking:
  """Which keys a query sees; see `decode_attention` for each."""

  causal: Any
  window: Any
  chunk: Any
  left_padding: Any
  mask: Any


@dataclasses.dataclass(frozen=True)
class Logits:
  """What happens to the logits; see `decode_attention` for each."""

  scale: Any
  softcap: Any
  alibi_slopes: Any
  bias: Any
  sinks: Any
  qv: Any


@dataclasses.dataclass(frozen=True)
class Rotation:
  """Rotary embedding; see `decode_attention` for each, named `rope_...`."""

  cos: Any
  sin: Any
  positions: Any
  interleaved: Any
  cached_keys: Any


@dataclasses.dataclass(frozen=True)
class Arguments:
  """What a user gives, in groups. Nothing of it is checked but the layout.

  Attributes:
    cache: The caches and their addressing.
    q: The queries.
    new: New keys and values as arrays, or None to attend only.
    masking: Which keys a query sees.
    logits: What happens to the logits.
    rotation: Rotary embedding.
    out_dtype: Of the result, or None.
  """

  cache: cache_checks.Request
  q: Any
  new: tuple[jax.Array, jax.Array] | None
  masking: Masking
  logits: Logits
  rotation: Rotation
  out_dtype: Any


def canonicalize(
  arguments: Arguments,
) -> tuple[dict[str, jax.Array], reference.Options, reference.Sizes]:
  """Checks everything that a call is given.

  Args:
    arguments: What the user gave.

  Returns:
    The operands by name, what is known statically, and the sizes.

  Raises:
    TypeError: If a dtype does not fit.
    ValueError: If a shape, an option or a value does not fit.
  """
  layout = arguments.cache.layout
  q = options_lib.array("q", arguments.q)
  if q.ndim != 4:
    raise ValueError(
      f"`q` must have 4 axes [{layout.words('t', 'heads')}], but got"
      f" `{cache_checks.text(q)}`."
    )
  batch, tokens = q.shape[0], q.shape[layout.tokens_axis]
  cache = cache_checks.canonicalize(arguments.cache, batch, tokens)
  _check_dtype_of_queries(q, cache.k.dtype)
  n = cache.geometry.heads
  q, group = _queries("q", q, cache, tokens, cache.geometry.k_dim)
  sizes = reference.Sizes(batch, n, group, tokens)
  out_dtype = _out_dtype(arguments.out_dtype, q.dtype)
  x = {"cache_k": cache.k, "cache_v": cache.v}
  if arguments.new is not None:
    x |= _new_rows(cache, *arguments.new, q.dtype, sizes)
  x |= {"q": q} | cache.addresses
  if cache.scales:
    x["k_scale"], x["v_scale"] = cache.scales
  static = _static(arguments, cache, tokens)
  x |= _rope_operands(
    arguments.rotation, cache, tokens, appends=arguments.new is not None
  )
  x |= _logit_operands(arguments, cache, q.dtype, sizes)
  at = cache.at
  options = reference.Options(
    layout=at.layout,
    ring=at.ring,
    aligned=at.aligned,
    uniform=at.uniform,
    fields=tuple(x),
    out_dtype=out_dtype,
    **static,
  )
  _check_values(x, options)
  return x, options, sizes


def window_sizes(
  window: int | tuple[int, int] | None,
) -> tuple[int, int]:
  """Returns how many keys before and after its own a query sees, -1 for all.

  Example:
    >>> from kernels import decode_attention
    >>> decode_attention.window_sizes(4)
    (3, 0)
    >>> decode_attention.window_sizes((2, -1))
    (2, -1)
    >>> decode_attention.window_sizes(None)
    (-1, -1)

  Args:
    window: The number of keys, the query's own the last of them; or a pair of
      the numbers before and after its own, -1 for all. No limit, if None.

  Raises:
    TypeError: If it is not an integer or a pair of integers.
    ValueError: If a number is out of range.
  """
  if window is None:
    return -1, -1
  given: Sequence[Any] = (window,)
  if is_pair := isinstance(window, (tuple, list)):
    given = window
  try:
    sizes = [options_lib.integer("window", size) for size in given]
  except TypeError as error:
    raise TypeError(
      f"`window` must be an integer or a pair of integers, but got {window}."
    ) from error
  if not is_pair:
    if sizes[0] < 1:
      raise ValueError(
        "`window` must be at least 1, the query's own key, but got"
        f" {window}. For no limit, pass None."
      )
    sizes = [sizes[0] - 1, 0]
  elif len(sizes) != 2 or min(sizes) < -1:
    raise ValueError(
      "`window` must be a pair of numbers that are at least 0, or -1 for no"
      f" limit, but got {window}."
    )
  left, right = (-1 if size >= _NO_LIMIT else size for size in sizes)
  return left, right


def _check_dtype_of_queries(q, dtype):
  if cache_checks.is_quantized(dtype):
    if q.dtype.name not in cache_checks.FLOAT_DTYPES:
      raise TypeError(
        f"`q` must be one of {', '.join(cache_checks.FLOAT_DTYPES)}, but got"
        f" `{cache_checks.text(q)}`."
      )
  elif q.dtype != dtype:
    raise TypeError(
      f"`q` must have the dtype of the cache, {dtype.name}, but got"
      f" `{cache_checks.text(q)}`. Cast it first."
    )


def _queries(name, array, cache, tokens, dim):
  """Splits the heads of `q` or `qv`.

  Returns:
    `[b, t, n, g, h]` or `[b, n, g, t, h]`, and g.
  """
  layout, n = cache.at.layout, cache.geometry.heads
  batch = cache.places.index.shape[0]
  heads = array.shape[layout.heads_axis] if array.ndim == 4 else 0
  wanted = (batch, *layout.order(tokens, heads), dim)
  if array.shape != wanted or heads == 0 or n == 0 or heads % n:
    axes = ", ".join(map(str, (batch, *layout.order(tokens, "heads"), dim)))
    raise ValueError(
      f"`{name}` must have the shape [{axes}] with heads a multiple of the"
      f" cache's {n}, and not 0, but got `{cache_checks.text(array)}`."
    )
  group = heads // n
  return array.reshape(batch, *layout.order(tokens, n, group), dim), group


def _new_rows(cache, new_k, new_v, dtype, sizes):
  """Returns the new rows by name."""
  layout = cache.at.layout
  cache_checks.check_rank_of_rows(new_k, new_v, layout)
  cache_checks.check_rows(cache, new_k, new_v, sizes.b)
  tokens = new_k.shape[layout.tokens_axis]
  if tokens != sizes.t:
    raise ValueError(
      f"`q` must have as many tokens as `new_k`, {tokens}, but got {sizes.t}."
    )
  if new_k.dtype != dtype:
    raise TypeError(
      f"`new_k` must have the dtype of `q`, {dtype.name}, but got"
      f" `{cache_checks.text(new_k)}`. Cast it first."
    )
  return {"new_k": new_k, "new_v": new_v}


def _out_dtype(given, dtype):
  """Returns the name of the result's dtype."""
  try:
    name = jnp.dtype(dtype if given is None else given).name
  except TypeError:
    name = repr(given)
  if name not in cache_checks.FLOAT_DTYPES:
    raise TypeError(
      f"`out_dtype` must be one of {', '.join(cache_checks.FLOAT_DTYPES)}, but"
      f" got `{name}`."
    )
  return name


def _static(arguments, cache, tokens):
  """Returns the options that are numbers and switches, by name."""
  masking, logits = arguments.masking, arguments.logits
  rotation = arguments.rotation
  causal = options_lib.boolean("causal", masking.causal)
  left, right = window_sizes(masking.window)
  if causal and not isinstance(masking.window, (tuple, list)):
    right = -1
  static = {
    "causal": causal,
    "window_left": left,
    "window_right": right,
    "chunk": _chunk(masking.chunk),
    "scale": _scale(logits.scale, cache.geometry.k_dim),
    "softcap": _softcap(logits.softcap),
    "interleaved": options_lib.boolean(
      "rope_interleaved", rotation.interleaved
    ),
    "rotate_keys": options_lib.boolean(
      "rope_cached_keys", rotation.cached_keys
    ),
  }
  overwrites = cache.at.ring and tokens != 1 and arguments.new is not None
  if overwrites and not (causal and 0 <= left <= cache.capacity - tokens):
    raise ValueError(
      f"With `ring` and {tokens} new tokens, `causal` must hold and `window`"
      f" must be at most {cache.capacity - tokens + 1} (the cache's length"
      f" {cache.capacity}, less the new tokens, plus 1), or the first of them"
      " would miss keys that the last ones overwrite; but got"
      f" `{masking.window}`."
    )
  return static


def _chunk(chunk):
  """Returns the length of the chunks, or 0."""
  if chunk is None:
    return 0
  chunk = options_lib.integer("chunk", chunk, 1)
  return 0 if chunk > _NO_LIMIT else chunk


def _scale(scale, k_dim):
  """Returns the factor of the logits."""
  if scale is None:
    return 1.0 / math.sqrt(k_dim)
  scale = options_lib.number("scale", scale)
  if not abs(scale) <= _LARGEST:
    raise ValueError(f"`scale` must be a finite float32, but got `{scale}`.")
  return scale


def _softcap(softcap):
  """Returns the logits' cap, or 0."""
  if softcap is None:
    return 0.0
  softcap = options_lib.number("softcap", softcap, least=0, exclusive=True)
  if not _LEAST <= softcap <= _LARGEST:
    raise ValueError(
      f"`softcap` must be a positive and finite float32, but got `{softcap}`."
    )
  return softcap


def _rope_operands(rotation, cache, tokens, *, appends):
  """Returns the operands of rotary embedding by name."""
  cos, sin, where = rotation.cos, rotation.sin, rotation.positions
  if cos is None and sin is None:
    if where is not None or rotation.cached_keys or rotation.interleaved:
      raise ValueError(
        "`rope_positions`, `rope_cached_keys` and `rope_interleaved` must not"
        " be given without `rope_cos` and `rope_sin`."
      )
    return {}
  if cos is None or sin is None:
    raise ValueError("`rope_cos` and `rope_sin` must be given together.")
  cos = options_lib.array("rope_cos", cos)
  sin = options_lib.array("rope_sin", sin)
  most = cache.geometry.k_dim // 2
  if (
    cos.ndim != 2
    or cos.shape != sin.shape
    or cos.shape[1] > most
    or cos.shape[0] < 1
    or not jnp.issubdtype(cos.dtype, jnp.floating)
    or not jnp.issubdtype(sin.dtype, jnp.floating)
  ):
    raise ValueError(
      "`rope_cos` and `rope_sin` must both be floating of shape [positions,"
      f" pairs] with at most {most} pairs, but got"
      f" `{cache_checks.text(cos)}` and `{cache_checks.text(sin)}`."
    )
  batch = cache.places.index.shape[0]
  if where is not None and np.ndim(where) == 2:
    positions = cache_checks.integers("rope_positions", where, batch, (tokens,))
  else:
    if where is not None:
      first = cache_checks.integers("rope_positions", where, batch)
    elif appends:
      first = cache.places.index
    else:
      first = cache.places.index - cache.places.count
    positions = first[:, None] + jnp.arange(tokens, dtype=jnp.int32)
  return {
    "rope_cos": cos.astype(jnp.float32),
    "rope_sin": sin.astype(jnp.float32),
    "rope_positions": positions,
  }


def _logit_operands(arguments, cache, dtype, sizes):
  """Returns the operands that mask or add to logits, by name."""
  masking, logits = arguments.masking, arguments.logits
  b, n, g, t = sizes
  x = {}
  if masking.left_padding is not None:
    x["left_padding"] = cache_checks.integers(
      "left_padding", masking.left_padding, b
    )
  if logits.alibi_slopes is not None:
    slopes = _heads("alibi_slopes", logits.alibi_slopes, n, g, b)
    x["alibi_slopes"] = slopes if slopes.ndim == 3 else slopes[None]
  if logits.sinks is not None:
    x["sinks"] = _heads("sinks", logits.sinks, n, g)
  if logits.bias is not None:
    bias = options_lib.array("bias", logits.bias)
    if not jnp.issubdtype(bias.dtype, jnp.floating):
      raise TypeError(
        f"`bias` must be floating, but got `{cache_checks.text(bias)}`. Pass a"
        " bool array as `mask`."
      )
    x["bias"] = _per_logit("bias", bias, sizes, cache).astype(jnp.float32)
  if masking.mask is not None:
    mask = options_lib.array("mask", masking.mask)
    if mask.dtype != jnp.bool_:
      raise TypeError(
        f"`mask` must be bool, but got `{cache_checks.text(mask)}`."
      )
    x["mask"] = _per_logit("mask", mask, sizes, cache)
  if logits.qv is not None:
    qv = options_lib.array("qv", logits.qv)
    x["qv"], group = _queries("qv", qv, cache, t, cache.geometry.v_dim)
    if qv.dtype != dtype:
      raise TypeError(
        f"`qv` must have the dtype {dtype.name}, but got"
        f" `{cache_checks.text(qv)}`. Cast it first."
      )
    if group != g:
      raise ValueError(
        f"`qv` must have as many heads as `q`, {g * n}, but got {group * n}."
      )
  return x


def _per_logit(name, array, sizes, cache):
  """Returns `[b, n, g, t, s]` of an operand `[b, n * g, t, s]`."""
  b, n, g, t = sizes
  full = (b, n * g, t, cache.capacity)
  if array.ndim != 4 or any(
    size != most and size != 1 for size, most in zip(array.shape, full)
  ):
    raise ValueError(
      f"`{name}` must have the shape [{', '.join(map(str, full))}], or 1 for"
      f" any of them, but got `{cache_checks.text(array)}`."
    )
  heads = (1, 1) if array.shape[1] == 1 else (n, g)
  return array.reshape((array.shape[0], *heads, *array.shape[2:]))


def _heads(name, value, n, g, batch=None):
  array = options_lib.array(name, value)
  allowed = [(n * g,)] + ([(batch, n * g)] if batch is not None else [])
  if array.shape not in allowed or not jnp.issubdtype(
    array.dtype, jnp.floating
  ):
    shapes = " or ".join(f"[{', '.join(map(str, shape))}]" for shape in allowed)
    raise ValueError(
      f"`{name}` must be floating of shape {shapes}, one for each query head,"
      f" but got `{cache_checks.text(array)}`."
    )
  return array.astype(jnp.float32).reshape((*array.shape[:-1], n, g))


def _check_values(x, options):
  """Raises ValueError for values that do not fit, if they are known."""
  known = [x[name] for name in _VALUES if name in x]
  if cache_checks.is_known(*known):
    on_host = {
      name: np.asarray(value) if name in _VALUES else value
      for name, value in x.items()
    }
    violations.raise_if_known(
      value_violations(*on_host.values(), options=options, xp=np)
    )


def value_violations(
  *operands: Any, options: reference.Options, xp: Any = jnp
) -> Iterator[violations.Violation]:
  """Yields what is wrong with operands' values.

  Args:
    *operands: Of the primitive.
    options: Of the primitive.
    xp: `jax.numpy` or `numpy`.
  """
  x = options.named(operands)
  geometry = addressing.Geometry.of(x["cache_k"], x["cache_v"], options.layout)
  tokens = reference.Sizes.of(x["q"], options.layout).t
  places = addressing.Places.of(x)
  index, count = places.index, places.count
  if options.appends:
    yield from violations.position_violations(
      geometry, places, tokens, options.ring, reads=True, xp=xp
    )
  else:
    yield violations.count_violation(count, tokens, xp=xp)
    yield violations.layer_violation(geometry, places.layer, xp=xp)
    length = places.table.shape[1] * geometry.block_size
    outside = index < 0
    if not options.ring:
      outside |= index > length
    yield (
      xp.any(outside),
      f"`index` must lie in [0, {length}], the number of keys of each"
      " sequence, but got {index}.",
      {"index": index},
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
