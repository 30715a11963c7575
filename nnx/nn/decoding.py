"""One step of attention with a cache: append keys and values, and attend.

These are functions of arrays, which run as `nnx.eager` says: outside of traces
each is one compiled call.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from nnx import eager
from nnx.nn import masks, rotary

# By this factor, later keys and values may exceed those that set the scales.
# An integer loses a bit for each factor of 2, a float nothing.
_INTEGER_HEADROOM = 2
_FLOAT_HEADROOM = 16


@dataclasses.dataclass(frozen=True)
class Options:
  """How attention decodes: its window, cap and rotation.

  Example:

    >>> from nnx.nn import decoding
    >>> decoding.Options(window=128)
    Options(window=128, softcap=None, rope_base=None, rope_scale=1.0)

  Attributes:
    window: How many keys a query sees, as for
      `nnx.nn.masks.check_window`.
    softcap: Logits become `softcap * tanh(logits / softcap)`.
    rope_base: Base of the wavelengths of rotary embedding; no rotation, if
      None.
    rope_scale: Positions are divided by it.
  """

  window: masks.Window | None = None
  softcap: float | None = None
  rope_base: float | None = None
  rope_scale: float = 1.0

  def rope_rows(
    self, positions: jax.Array, max_length: int, features: int
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines of `nnx.nn.rotary.rows`.

    Example:

      >>> import jax.numpy as jnp
      >>> from nnx.nn import decoding
      >>> options = decoding.Options(rope_base=10000.0)
      >>> options.rope_rows(jnp.arange(3), 8, 4)[0].shape
      (3, 2)

    Args:
      positions: `[...]` integers.
      max_length: The number of positions.
      features: The features of a head.
    """
    assert self.rope_base is not None
    return rotary.rows(
      positions, max_length, features, self.rope_base, self.rope_scale
    )


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["index", "key", "value", "key_scale", "value_scale"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Buffers:
  """The arrays of a cache.

  Attributes:
    index: `[]` or `[*batch]` int32, the number of tokens in it.
    key: `[*batch, max_length, kv heads, h]`.
    value: The same.
    key_scale: `[*batch, kv heads]` float32 for a quantised cache, the factors
      of what is stored, 0 where there are no tokens yet; otherwise None.
    value_scale: The same.
  """

  index: jax.Array
  key: jax.Array
  value: jax.Array
  key_scale: jax.Array | None = None
  value_scale: jax.Array | None = None


def is_quantized(dtype: jnp.dtype) -> bool:
  """Returns whether a cache of `dtype` has scales.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import decoding
    >>> decoding.is_quantized(jnp.int8), decoding.is_quantized(jnp.bfloat16)
    (True, False)
  """
  return jnp.dtype(dtype).itemsize == 1


def check_room(
  buffers: Buffers,
  query: jax.Array,
  key: jax.Array,
  lengths: jax.Array | None,
) -> jax.Array | None:
  """Refuses new tokens that do not fit into the cache.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import decoding
    >>> cache, x = jnp.zeros((1, 4, 1, 2)), jnp.ones((1, 2, 1, 2))
    >>> buffers = decoding.Buffers(jnp.array(3), cache, cache)
    >>> decoding.check_room(buffers, x, x, None)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: The cache must have room for all tokens, but ...

  Args:
    buffers: The cache.
    query: `[*batch, t, n, h]`.
    key: `[*batch, t, kv heads, h]`.
    lengths: `[]` or `[*batch]` int32, the number of tokens that are not
      padding; all, if None.

  Returns:
    None if all tokens fit. Where a trace does not know the number of tokens,
    which of them do not, `[*index axes, t]`.

  Raises:
    ValueError: If shapes do not fit, or the cache has no room.
  """
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
    return _without_room(buffers, tokens, lengths)
  room = np.max(np.asarray(index) + np.asarray(new), initial=0)
  if room > length:
    raise ValueError(
      f"The cache must have room for all tokens, but its `max_length` is"
      f" {length}, `cache_index` is {np.max(index)}, and the call adds"
      f" {np.max(new)}. Call `init_cache` for a larger or an empty one."
    )
  return None


def _without_room(
  buffers: Buffers, tokens: int, lengths: jax.Array | None
) -> jax.Array:
  """Returns which new tokens the cache cannot take: `[*index axes, t]`."""
  index = jnp.expand_dims(buffers.index, -1)
  steps = jnp.arange(tokens).reshape((1,) * buffers.index.ndim + (-1,))
  lost = index + steps >= buffers.key.shape[-3]
  if lengths is None:
    return lost
  real = masks.real_tokens(lengths, tokens)
  return jnp.logical_and(lost, masks.both(None, real, lost.ndim))


def _positions(first: jax.Array, tokens: int) -> jax.Array:
  """Returns the positions of consecutive tokens: `[*first, t]`."""
  steps = jnp.arange(tokens, dtype=jnp.int32)
  return jnp.expand_dims(first, -1) + steps.reshape((1,) * first.ndim + (-1,))


def _scale(
  scale: jax.Array, size: jax.Array, lengths: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """Keeps a scale, or makes one from the first tokens if there is none.

  Args:
    scale: `[*batch, kv heads]`, 0 where there is none.
    size: `[*batch, t, kv heads, ...]`, bounds of what the cache stores.
    lengths: `[*batch]`, how many tokens count.
    dtype: Dtype of the cache.
  """
  axis = lengths.ndim
  steps = jnp.expand_dims(jnp.arange(size.shape[axis]), tuple(range(axis)))
  real = steps < jnp.expand_dims(lengths, -1)
  real = jnp.expand_dims(real, (-2, -1))
  largest = jnp.max(jnp.where(real, size, 0), (axis, -1)).astype(jnp.float32)
  if jnp.issubdtype(dtype, jnp.integer):
    top = jnp.iinfo(dtype).max / _INTEGER_HEADROOM
  else:
    top = float(jnp.finfo(dtype).max) / _FLOAT_HEADROOM
  return jnp.where(scale > 0, scale, largest / top)


def _with_scales(
  buffers: Buffers,
  key: jax.Array,
  value: jax.Array,
  lengths: jax.Array,
  rotates: bool,
) -> tuple[Buffers, dict[str, jax.Array]]:
  """Returns the cache with scales for new tokens, and the kernel's operands."""
  if buffers.key_scale is None or buffers.value_scale is None:
    return buffers, {}
  lengths = jnp.broadcast_to(lengths, buffers.key.shape[:-3])
  size = jnp.abs(key)
  if rotates:  # a rotation keeps the length of a pair
    size = jnp.hypot(*jnp.split(key, 2, -1))
  key_scale = _scale(buffers.key_scale, size, lengths, buffers.key.dtype)
  value_scale = _scale(
    buffers.value_scale, jnp.abs(value), lengths, buffers.value.dtype
  )
  buffers = dataclasses.replace(
    buffers, key_scale=key_scale, value_scale=value_scale
  )
  # Without a scale there were only zeros, and any scale stores them.
  scales = {
    "k_scale": jnp.where(key_scale > 0, key_scale, 1.0),
    "v_scale": jnp.where(value_scale > 0, value_scale, 1.0),
  }
  return buffers, {
    name: scale.reshape(-1, scale.shape[-1]) for name, scale in scales.items()
  }


def _filled(
  buffers: Buffers, new: tuple[jax.Array, ...], lengths: jax.Array
) -> Buffers:
  """Returns the cache with what a kernel wrote, and the index after it."""
  key, value = (x.reshape(buffers.key.shape) for x in new)
  return dataclasses.replace(
    buffers, index=buffers.index + lengths, key=key, value=value
  )


def _in_one_batch_axis(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
  return x if len(batch) == 1 else x.reshape((-1, *x.shape[len(batch) :]))


def _each(number: jax.Array) -> jax.Array:
  """Returns one number, or one for each sequence in one axis."""
  return number.reshape(-1) if number.ndim else number


def _written(
  cache: jax.Array, new: jax.Array, index: jax.Array, lengths: jax.Array
) -> jax.Array:
  """Appends to one cache as `kernels.kv_cache.update` does, in plain jax."""
  batch, tokens = new.shape[:2]
  index = jnp.broadcast_to(index, (batch,))
  lengths = jnp.broadcast_to(lengths, (batch,))
  slots = _positions(index, tokens)
  real = jnp.arange(tokens)[None] < lengths[:, None]
  slots = jnp.where(real, slots, cache.shape[1])  # outside: dropped
  return cache.at[jnp.arange(batch)[:, None], slots].set(new, mode="drop")


@functools.partial(eager.compiled, static=("options",))
def append(
  buffers: Buffers,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  lengths: jax.Array | None = None,
  options: Options = Options(),
) -> tuple[Buffers, jax.Array, jax.Array, jax.Array, jax.Array]:
  """Appends keys and values; another function then computes the attention.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import decoding
    >>> cache = jnp.zeros((1, 4, 1, 2))
    >>> buffers = decoding.Buffers(jnp.array(1), cache, cache)
    >>> x = jnp.ones((1, 2, 1, 2))
    >>> buffers, _, key, _, seen = decoding.append(buffers, x, x, x)
    >>> key[0, :, 0, 0].tolist(), seen[0].astype(int).tolist()
    ([0.0, 1.0, 1.0, 0.0], [[1, 1, 0, 0], [1, 1, 1, 0]])

  Args:
    buffers: The cache.
    query: `[*batch, t, n, h]`.
    key: `[*batch, t, kv heads, h]`.
    value: Like `key`.
    lengths: `[]` or `[*batch]` int32, the number of tokens that are not
      padding; all, if None.
    options: Options of the attention.

  Returns:
    The new cache; the query, rotated; all keys and values of the cache, in the
    dtypes of the new ones; and which of them each query sees, `[*index axes, 1,
    t, max_length]`.
  """
  # While tracing: programs that never decode import no kernels.
  from nnx.kernels import kv_cache

  batch, (length, _, features) = buffers.key.shape[:-3], buffers.key.shape[-3:]
  tokens = key.shape[-3]
  lengths = jnp.int32(tokens) if lengths is None else lengths
  positions = _positions(buffers.index, tokens)
  if options.rope_base is not None:
    table = options.rope_rows(positions, length, features)
    query, key = rotary.rotate(query, *table), rotary.rotate(key, *table)
  buffers, scales = _with_scales(buffers, key, value, lengths, rotates=False)
  new = key, value
  if not scales:
    new = key.astype(buffers.key.dtype), value.astype(buffers.value.dtype)
  old_key, old_value, new_key, new_value = (
    _in_one_batch_axis(x, batch) for x in (buffers.key, buffers.value, *new)
  )
  index, count = _each(buffers.index), _each(lengths)
  if buffers.key.dtype == jnp.float64:  # which the kernels do not take
    new = (
      _written(old_key, new_key, index, count),
      _written(old_value, new_value, index, count),
    )
  else:
    new = kv_cache.update(
      old_key, old_value, new_key, new_value, index, lengths=count, **scales
    )
  buffers = _filled(buffers, new, lengths)

  def read(cache, scale, dtype):
    cache = cache.astype(dtype)
    if scale is None:
      return cache
    return cache * jnp.expand_dims(scale, (-3, -1)).astype(dtype)

  seen = masks.positions_mask(
    positions, jnp.arange(length), True, options.window
  )
  return (
    buffers,
    query,
    read(buffers.key, buffers.key_scale, key.dtype),
    read(buffers.value, buffers.value_scale, value.dtype),
    jnp.expand_dims(seen, -3),
  )


@functools.partial(eager.compiled, static=("options",))
def append_and_attend(
  buffers: Buffers,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  lengths: jax.Array | None = None,
  mask: jax.Array | None = None,
  options: Options = Options(),
) -> tuple[Buffers, jax.Array]:
  """Appends keys and values and attends, in one kernel.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import decoding
    >>> cache = jnp.zeros((1, 4, 1, 2))
    >>> buffers = decoding.Buffers(jnp.array(0), cache, cache)
    >>> x = jnp.ones((1, 2, 1, 2))
    >>> buffers, y = decoding.append_and_attend(buffers, x, x, x)
    >>> y.shape, buffers.key[0, :, 0, 0].tolist(), int(buffers.index)
    ((1, 2, 1, 2), [1.0, 1.0, 0.0, 0.0], 2)

  Args:
    buffers: The cache.
    query: `[*batch, t, n, h]`, float32, bfloat16 or float16.
    key: `[*batch, t, kv heads, h]`.
    value: Like `key`.
    lengths: `[]` or `[*batch]` int32, the number of tokens that are not
      padding; all, if None.
    mask: Broadcasts to `[*batch, n, t, max_length]`; False where a key is not
      seen.
    options: Options of the attention.

  Returns:
    The new cache, and `[*batch, t, n, h]` of the query's dtype, 0 for padding.
  """
  from nnx.kernels import decode_attention

  batch, (length, _, features) = buffers.key.shape[:-3], buffers.key.shape[-3:]
  tokens = key.shape[-3]
  lengths = jnp.int32(tokens) if lengths is None else lengths
  index = _each(buffers.index)
  if mask is not None:
    mask = jnp.asarray(mask).astype(bool)
    mask = mask.reshape((1,) * (3 - mask.ndim) + mask.shape)
    mask = jnp.broadcast_to(mask, (*batch, *mask.shape[-3:]))
    mask = _in_one_batch_axis(mask, batch)
  rotates = options.rope_base is not None
  rope = {}
  if rotates:
    # Tables of the rows in use only, one for each new token in order.
    positions = _positions(index, tokens)
    table = options.rope_rows(positions.reshape(-1), length, features)
    row = jnp.arange(positions.size, dtype=jnp.int32).reshape(-1, tokens)
    rope = {
      "rope_cos": table[0],
      "rope_sin": table[1],
      "rope_positions": jnp.broadcast_to(row, (math.prod(batch), tokens)),
    }
  buffers, scales = _with_scales(buffers, key, value, lengths, rotates)
  dtype = query.dtype if scales else buffers.key.dtype
  new = (x.astype(dtype) for x in (query, key, value))
  *new, out = decode_attention.decode_attention(  # type: ignore[misc]
    *(_in_one_batch_axis(x, batch) for x in (buffers.key, buffers.value, *new)),
    index,
    lengths=_each(lengths),
    mask=mask,
    window=options.window,
    softcap=options.softcap,
    out_dtype=query.dtype,
    **rope,
    **scales,
  )
  return _filled(buffers, tuple(new), lengths), out.reshape(query.shape)
