"""One step of attention with a cache: append keys and values, and attend.

These are functions of arrays, which run as `nnx.eager` says: outside of traces
each is one compiled call.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from nnx import eager
from nnx.nn import masks
from nnx.nn.attention_step import NO_OPTIONS, begin
from nnx.nn.attention_step import AttentionStep as AttentionStep
from nnx.nn.attention_step import Options as Options
from nnx.nn.rotary import Rotation

# By this factor, later keys and values may exceed those that set the scales.
# An integer loses a bit for each factor of 2, a float nothing.
_INTEGER_HEADROOM = 2
_FLOAT_HEADROOM = 16


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=["key", "value", "key_scale", "value_scale"],
  meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Buffers:
  """The arrays of a cache.

  Attributes:
    key: `[*batch, max_length, kv heads, h]`; or, where a step has a block
      table, `[blocks, block_size, kv heads, h]`.
    value: The same.
    key_scale: `[*batch, kv heads]` float32 for a quantised cache, the factors
      of what is stored, 0 where there are no tokens yet; `[kv heads]` for
      blocks, which sequences share. Otherwise None.
    value_scale: The same.
  """

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


def check_shapes(
  cache: jax.Array, tokens: tuple[int, ...], keys: int, paged: bool
) -> None:
  """Refuses new tokens that are not those of a cache.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import decoding
    >>> decoding.check_shapes(jnp.zeros((3, 16, 1, 4)), (3, 5), 5, False)

  Args:
    cache: `[*batch, max_length, kv heads, h]`, or blocks.
    tokens: `[*batch, t]`, the shape of the queries' tokens.
    keys: s, the number of keys of each sequence.
    paged: Whether the cache is a pool of blocks, for any batch.

  Raises:
    ValueError: If the batch is another, or s is not t.
  """
  batch = cache.shape[:-3]
  if keys != tokens[-1] or not (paged or batch == tuple(tokens[:-1])):
    heads, features = cache.shape[-2:]
    given = (*tokens[:-1], keys, heads, features)
    expected = (*(tokens[:-1] if paged else batch), tokens[-1], heads, features)
    raise ValueError(
      "The inputs must fit the cache, whose shape"
      f" {cache.shape} expects keys of the shape {expected},"
      f" but got keys of the shape {given} and queries of"
      f" {tokens[-1]} tokens. Call `init_cache` with this batch."
    )


def _scale(
  scale: jax.Array, size: jax.Array, lengths: jax.Array, dtype: jnp.dtype
) -> jax.Array:
  """Keeps a scale, or makes one from the first tokens if there is none.

  Args:
    scale: `[*batch, kv heads]` or `[kv heads]`, 0 where there is none.
    size: `[*batch, t, kv heads, ...]`, bounds of what the cache stores.
    lengths: `[*batch]`, how many tokens count.
    dtype: Dtype of the cache.
  """
  axis = lengths.ndim
  real = masks.real_tokens(lengths, size.shape[axis])
  real = jnp.expand_dims(real, (-2, -1))
  shared = tuple(range(axis)) if scale.ndim == 1 else ()
  largest = jnp.max(jnp.where(real, size, 0), (*shared, axis, -1))
  if jnp.issubdtype(dtype, jnp.integer):
    top = jnp.iinfo(dtype).max / _INTEGER_HEADROOM
  else:
    top = float(jnp.finfo(dtype).max) / _FLOAT_HEADROOM
  return jnp.where(scale > 0, scale, largest.astype(jnp.float32) / top)


def _with_scales(
  buffers: Buffers,
  key: jax.Array,
  value: jax.Array,
  lengths: jax.Array,
  rotation: Rotation | None,
) -> tuple[Buffers, dict[str, Any]]:
  """Returns the cache with scales for new tokens, and the kernel's operands."""
  if buffers.key_scale is None or buffers.value_scale is None:
    return buffers, {}
  lengths = jnp.broadcast_to(lengths, key.shape[:-3])
  size = jnp.abs(key) if rotation is None else rotation.bound(key)
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
  if key_scale.ndim == 1:
    return buffers, scales
  return buffers, {
    name: scale.reshape(-1, scale.shape[-1]) for name, scale in scales.items()
  }


def _filled(buffers: Buffers, new: tuple[jax.Array, ...]) -> Buffers:
  """Returns the cache with what a kernel wrote."""
  key, value = (x.reshape(buffers.key.shape) for x in new)
  return dataclasses.replace(buffers, key=key, value=value)


def _in_one_batch_axis(x: jax.Array, batch: tuple[int, ...]) -> jax.Array:
  return x if len(batch) == 1 else x.reshape((-1, *x.shape[len(batch) :]))


def _each(number: jax.Array) -> jax.Array:
  """Returns one number, or one for each sequence in one axis."""
  return number.reshape(-1) if number.ndim else number


def _caches(
  buffers: Buffers, step: AttentionStep, batch: tuple[int, ...]
) -> tuple[jax.Array, jax.Array, dict[str, Any]]:
  """Returns both caches as kernels take them, and the table of their blocks."""
  if step.block_table is None:
    key, value = (
      _in_one_batch_axis(x, batch) for x in (buffers.key, buffers.value)
    )
    return key, value, {}
  table = _in_one_batch_axis(step.block_table, batch)
  return buffers.key, buffers.value, {"block_table": table}


def _written(
  cache: jax.Array,
  new: jax.Array,
  index: jax.Array,
  lengths: jax.Array,
  block_table: jax.Array | None = None,
) -> jax.Array:
  """Appends to one cache as `kernels.kv_cache.update` does, in plain jax."""
  batch, tokens = new.shape[:2]
  rows, size = cache.shape[:2]
  index = jnp.broadcast_to(index, (batch,))
  lengths = jnp.broadcast_to(lengths, (batch,))
  slots = index[:, None] + jnp.arange(tokens, dtype=jnp.int32)
  real = masks.real_tokens(lengths, tokens)
  row = jnp.arange(batch)[:, None]
  if block_table is not None:
    block, slots = slots // size, slots % size
    real &= block < block_table.shape[1]
    row = jnp.take_along_axis(block_table, block, 1, mode="clip")
  row = jnp.where(real, row, rows)  # outside: dropped
  return cache.at[row, slots].set(new, mode="drop")


def _read(
  cache: jax.Array,
  scale: jax.Array | None,
  dtype: jnp.dtype,
  block_table: jax.Array | None,
) -> jax.Array:
  """Returns what is in a cache: `[*batch, slots, kv heads, h]`."""
  if block_table is not None:
    cache = cache[block_table]
    *batch, blocks, size, heads, features = cache.shape
    cache = cache.reshape((*batch, blocks * size, heads, features))
  cache = cache.astype(dtype)
  if scale is None:
    return cache
  axes = -1 if scale.ndim == 1 else (-3, -1)
  return cache * jnp.expand_dims(scale, axes).astype(dtype)


@functools.partial(eager.compiled, static=("options",))
def append(
  buffers: Buffers,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  step: AttentionStep,
  options: Options = NO_OPTIONS,
) -> tuple[Buffers, jax.Array, jax.Array, jax.Array, AttentionStep]:
  """Appends keys and values; another function then computes the attention.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import decoding
    >>> cache = jnp.zeros((1, 4, 1, 2))
    >>> buffers = decoding.Buffers(cache, cache)
    >>> x = jnp.ones((1, 2, 1, 2))
    >>> step = decoding.AttentionStep(jnp.int32(1))
    >>> buffers, _, key, _, step = decoding.append(buffers, x, x, x, step)
    >>> key[0, :, 0, 0].tolist(), step.seen[0].astype(int).tolist()
    ([0.0, 1.0, 1.0, 0.0], [[1, 1, 0, 0], [1, 1, 1, 0]])
    >>> step.next_index.tolist()
    3

  Args:
    buffers: The cache.
    query: `[*batch, t, n, h]`.
    key: `[*batch, t, kv heads, h]`.
    value: Like `key`.
    step: What the layers of a model share; it may lack what follows from the
      rest.
    options: Options of the attention.

  Returns:
    The new cache; the query, rotated; all keys and values of the cache, in the
    dtypes of the new ones; and the step, with which of them each query sees.
  """
  # While tracing: programs that never decode import no kernels.
  from nnx.kernels import kv_cache

  batch, tokens = key.shape[:-3], key.shape[-3]
  slots = step.slots(buffers.key)
  step = begin(step, tokens, slots, options, with_mask=True)
  assert step.index is not None and step.count is not None
  rotation = options.rotation
  if rotation is not None:
    assert step.cos is not None and step.sin is not None
    query = rotation.rotate(query, step.cos, step.sin)
    key = rotation.rotate(key, step.cos, step.sin)
  buffers, scales = _with_scales(buffers, key, value, step.count, None)
  new = key, value
  if not scales:
    new = key.astype(buffers.key.dtype), value.astype(buffers.value.dtype)
  new_key, new_value = (_in_one_batch_axis(x, batch) for x in new)
  old_key, old_value, table = _caches(buffers, step, batch)
  index, count = _each(step.index), _each(step.count)
  if buffers.key.dtype == jnp.float64:  # which the kernels do not take
    new = (
      _written(old_key, new_key, index, count, **table),
      _written(old_value, new_value, index, count, **table),
    )
  else:
    new = kv_cache.update(
      old_key,
      old_value,
      new_key,
      new_value,
      index,
      lengths=count,
      **scales,
      **table,
    )
  buffers = _filled(buffers, new)
  return (
    buffers,
    query,
    _read(buffers.key, buffers.key_scale, key.dtype, step.block_table),
    _read(buffers.value, buffers.value_scale, value.dtype, step.block_table),
    step,
  )


@functools.partial(eager.compiled, static=("options",))
def append_and_attend(
  buffers: Buffers,
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  step: AttentionStep,
  mask: jax.Array | None = None,
  options: Options = NO_OPTIONS,
) -> tuple[Buffers, jax.Array, AttentionStep]:
  """Appends keys and values and attends, in one kernel.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import decoding
    >>> cache = jnp.zeros((1, 4, 1, 2))
    >>> buffers = decoding.Buffers(cache, cache)
    >>> x = jnp.ones((1, 2, 1, 2))
    >>> step = decoding.AttentionStep(jnp.int32(0))
    >>> buffers, y, step = decoding.append_and_attend(buffers, x, x, x, step)
    >>> y.shape, buffers.key[0, :, 0, 0].tolist(), int(step.next_index)
    ((1, 2, 1, 2), [1.0, 1.0, 0.0, 0.0], 2)

  Args:
    buffers: The cache.
    query: `[*batch, t, n, h]`, float32, bfloat16 or float16.
    key: `[*batch, t, kv heads, h]`.
    value: Like `key`.
    step: What the layers of a model share; it may lack what follows from the
      rest.
    mask: Broadcasts to `[*batch, n, t, slots]`; False where a key is not seen.
    options: Options of the attention.

  Returns:
    The new cache; `[*batch, t, n, h]` of the query's dtype, 0 for padding; and
    the step, complete.
  """
  from nnx.kernels import decode_attention

  batch, tokens = key.shape[:-3], key.shape[-3]
  slots = step.slots(buffers.key)
  step = begin(step, tokens, slots, options)
  assert step.index is not None and step.count is not None
  if mask is not None:
    mask = jnp.asarray(mask).astype(bool)
    mask = mask.reshape((1,) * (3 - mask.ndim) + mask.shape)
    mask = jnp.broadcast_to(mask, (*batch, *mask.shape[-3:]))
    mask = _in_one_batch_axis(mask, batch)
  rotation = options.rotation
  rope: dict[str, Any] = {}
  if rotation is not None:
    # Tables of the rows in use only, one for each new token in order.
    assert step.cos is not None and step.sin is not None
    pairs = step.cos.shape[-1]
    row = jnp.arange(step.cos.size // pairs, dtype=jnp.int32)
    rope = {
      "rope_cos": step.cos.reshape(-1, pairs),
      "rope_sin": step.sin.reshape(-1, pairs),
      "rope_positions": jnp.broadcast_to(
        row.reshape(-1, tokens), (math.prod(batch), tokens)
      ),
      "rope_interleaved": rotation.interleaved,
    }
  buffers, scales = _with_scales(buffers, key, value, step.count, rotation)
  dtype = query.dtype if scales else buffers.key.dtype
  new_query, new_key, new_value = (
    _in_one_batch_axis(x.astype(dtype), batch) for x in (query, key, value)
  )
  old_key, old_value, table = _caches(buffers, step, batch)
  *written, out = decode_attention.decode_attention(
    old_key,
    old_value,
    new_query,
    new_key,
    new_value,
    _each(step.index),
    lengths=_each(step.count),
    mask=mask,
    window=options.window,
    softcap=options.softcap,
    out_dtype=query.dtype,
    **rope,
    **scales,
    **table,
  )
  return _filled(buffers, tuple(written)), out.reshape(query.shape), step
