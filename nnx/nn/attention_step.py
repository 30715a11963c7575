"""What the attention layers of a model share in one call.

Positions, the rows of rotary embedding and masks depend on how many tokens
there are and where they stand, not on the layer. An `AttentionStep` holds them.
A layer makes one for itself; given the one that
`MultiHeadAttention.prepare_step` of another layer made, it makes nothing again.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import core
import jax.numpy as jnp
import numpy as np

from nnx import eager
from nnx.nn import masks
from nnx.nn.rotary import Rotation


@dataclasses.dataclass(frozen=True)
class Options:
  """How a layer attends: its window, cap and rotation.

  Example:

    >>> from nnx.nn import attention_step
    >>> attention_step.Options(window=128)
    Options(window=128, softcap=None, rotation=None)

  Attributes:
    window: How many keys a query sees, as for
      `nnx.nn.masks.check_window`.
    softcap: Logits become `softcap * tanh(logits / softcap)`.
    rotation: How queries and keys are rotated; not at all, if None.
  """

  window: masks.Window | None = None
  softcap: float | None = None
  rotation: Rotation | None = None


NO_OPTIONS = Options()


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=[
    "index",
    "lengths",
    "positions",
    "block_table",
    "lost",
    "count",
    "next_index",
    "cos",
    "sin",
    "seen",
  ],
  meta_fields=["counts", "tokens", "rotation", "window"],
)
@dataclasses.dataclass(frozen=True)
class AttentionStep:
  """What the layers of a model share in one call; a pytree.

  `MultiHeadAttention.prepare_step` makes one.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layers = [
    ...   nnx.MultiHeadAttention(
    ...     2, 4, rope_base=10000.0, decode=True, rngs=nnx.Rngs(seed)
    ...   )
    ...   for seed in range(2)
    ... ]
    >>> nnx.init_cache(layers, batch_size=3, max_length=16)
    >>> x = jnp.ones((3, 5, 4))
    >>> step = layers[0].prepare_step(x)
    >>> for layer in layers:
    ...   x += layer(x, step=step)
    >>> [int(layer.cache_index.value) for layer in layers]
    [5, 5]

  Attributes:
    index: `[]` or `[*batch]` int32, how many tokens the cache has; None without
      a cache.
    lengths: `[]` or `[*batch]` int32, how many tokens are not padding; all, if
      None.
    positions: `[t]` or `[*batch, t]` int32, where the tokens stand for rotary
      embedding; None, if they follow what is in the cache.
    block_table: `[*batch, blocks of a sequence]` int32, which blocks of the
      cache a sequence has; None where each has a row.
    lost: Which tokens the cache cannot take, `[*index axes, t]`; None, if all
      fit.
    count: `lengths`, or how many tokens there are.
    next_index: `index` after the step.
    cos: `[..., t, pairs]` float32, cosines of the tokens' angles, where queries
      and keys are rotated.
    sin: The same of their sines.
    seen: Which keys each token sees, `[..., 1, t, keys]`; None, where a kernel
      finds that out.
    counts: Whether `cache_index` of the layers becomes `next_index`.
    tokens: t; None, where each layer finds the rest for itself.
    rotation: How queries and keys are rotated.
    window: How many keys a token sees.
  """

  index: jax.Array | None = None
  lengths: jax.Array | None = None
  positions: jax.Array | None = None
  block_table: jax.Array | None = None
  lost: jax.Array | None = None
  count: jax.Array | None = None
  next_index: jax.Array | None = None
  cos: jax.Array | None = None
  sin: jax.Array | None = None
  seen: jax.Array | None = None
  counts: bool = True
  tokens: int | None = None
  rotation: Rotation | None = None
  window: masks.Window | None = None

  def slots(self, cache: jax.Array) -> int:
    """Returns how many tokens of a sequence a cache has room for.

    Example:

      >>> import jax.numpy as jnp
      >>> from nnx.nn import attention_step
      >>> step = attention_step.AttentionStep(
      ...   block_table=jnp.zeros((2, 3), int)
      ... )
      >>> step.slots(jnp.zeros((10, 16, 1, 4)))
      48

    Args:
      cache: `[*batch, max_length, kv heads, h]`, or with a block table
        `[blocks, block_size, kv heads, h]`.
    """
    size = cache.shape[-3]
    if self.block_table is None:
      return size
    return self.block_table.shape[-1] * size


def begin(
  step: AttentionStep,
  tokens: int,
  slots: int,
  options: Options,
  *,
  with_mask: bool = False,
) -> AttentionStep:
  """Completes a step of a cache with what follows from where tokens stand.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import attention_step
    >>> step = attention_step.AttentionStep(jnp.int32(2))
    >>> step = attention_step.begin(
    ...   step, 1, 4, attention_step.Options(window=2), with_mask=True
    ... )
    >>> step.seen.astype(int).tolist(), int(step.next_index)
    ([[[0, 1, 1, 0]]], 3)

  Args:
    step: With an `index`. What it has already stays.
    tokens: t, how many tokens come.
    slots: How many tokens of a sequence the cache has room for.
    options: Options of the attention.
    with_mask: Whether to find `seen`.
  """
  assert step.index is not None
  made: dict[str, Any] = {}
  if step.count is None:
    count = jnp.int32(tokens) if step.lengths is None else step.lengths
    made |= {"count": count, "next_index": step.index + count}
  rotation = options.rotation if step.cos is None else None
  wants_mask = with_mask and (
    step.seen is None or step.window != options.window
  )
  if rotation is not None or wants_mask:
    follow = _positions(step.index, tokens)
    if rotation is not None:
      where, most = step.positions, None
      if where is None:
        where, most = follow, slots
      made["cos"], made["sin"] = rotation.rows(where, most)
    if wants_mask:
      keys = jnp.arange(slots)
      seen = masks.positions_mask(follow, keys, True, options.window)
      made["seen"] = jnp.expand_dims(seen, -3)
  return dataclasses.replace(step, **made)


@functools.partial(
  eager.compiled, static=("tokens", "slots", "options", "with_mask")
)
def prepared(
  step: AttentionStep,
  tokens: int,
  slots: int,
  options: Options,
  with_mask: bool,
) -> AttentionStep:
  """Makes all that the layers of a model share, with a cache or without.

  Example:

    >>> from nnx.nn import attention_step, rotary
    >>> options = attention_step.Options(rotation=rotary.Rotation(100.0, 4))
    >>> step = attention_step.prepared(
    ...   attention_step.AttentionStep(), 3, 3, options, False
    ... )
    >>> step.cos.shape, step.tokens
    ((3, 2), 3)

  Args:
    step: Where the tokens stand.
    tokens: t, how many there are.
    slots: How many tokens of a sequence the cache has room for.
    options: Options of the attention.
    with_mask: Whether to find which keys of the cache each token sees.
  """
  if step.index is not None:
    step = begin(step, tokens, slots, options, with_mask=with_mask)
  else:
    if options.rotation is not None:
      where, most = step.positions, None
      if where is None:
        where, most = jnp.arange(tokens), tokens
      cos, sin = options.rotation.rows(where, most)
      step = dataclasses.replace(step, cos=cos, sin=sin)
    if step.lengths is not None:
      seen = masks.real_tokens(step.lengths, tokens)[..., None, None, :]
      step = dataclasses.replace(step, seen=seen)
  return dataclasses.replace(
    step, tokens=tokens, rotation=options.rotation, window=options.window
  )


def _integers(
  name: str, value: Any, shapes: tuple[tuple[int, ...], ...], more: str
) -> jax.Array:
  """Returns an argument as an int32 array of one of some shapes."""
  value = jnp.asarray(value)
  if not jnp.issubdtype(value.dtype, jnp.integer) or value.shape not in shapes:
    raise ValueError(
      f"`{name}` must be integers of the shape"
      f" {' or '.join(map(str, shapes))}{more}, but got"
      f" `{value.dtype.name}` of the shape {value.shape}."
    )
  return value.astype(jnp.int32)


def as_lengths(
  lengths: Any, batch: Sequence[int], tokens: int, keys: int
) -> jax.Array:
  """Returns the numbers of tokens that are not padding, checked.

  Example:

    >>> from nnx.nn import attention_step
    >>> attention_step.as_lengths([2, 1], (2,), 3, 3).tolist()
    [2, 1]

  Args:
    lengths: `[]` or `[*batch]` integers.
    batch: The batch axes.
    tokens: t, the number of queries.
    keys: s, the number of keys.

  Raises:
    ValueError: If the shape does not fit, or s is not t.
  """
  lengths = jnp.asarray(lengths, jnp.int32)
  if lengths.shape not in ((), tuple(batch)) or tokens != keys:
    raise ValueError(
      "`lengths` must be one integer or have the shape"
      f" {tuple(batch)}, and the queries and keys must be of the same tokens,"
      f" but got `lengths` of the shape {lengths.shape} for {tokens} queries"
      f" and {keys} keys of each sequence. Use `mask` for others."
    )
  return lengths


def as_positions(
  positions: Any, batch: Sequence[int], tokens: int, keys: int
) -> jax.Array:
  """Returns where tokens stand for rotary embedding, checked.

  Example:

    >>> from nnx.nn import attention_step
    >>> attention_step.as_positions([4, 5, 6], (2,), 3, 3).tolist()
    [4, 5, 6]

  Args:
    positions: `[t]` or `[*batch, t]` integers.
    batch: The batch axes.
    tokens: t, the number of queries.
    keys: s, the number of keys.

  Raises:
    ValueError: If it does not fit, or s is not t; if a position is negative and
      known.
  """
  shapes = ((tokens,), (*batch, tokens))
  positions = _integers(
    "input_positions", positions, shapes, ", one for each token"
  )
  if tokens != keys:
    raise ValueError(
      "`input_positions` need keys of the same tokens as the queries, but got"
      f" {tokens} queries and {keys} keys."
    )
  if not isinstance(positions, core.Tracer) and (positions < 0).any():
    raise ValueError(
      f"`input_positions` must be at least 0, but got {positions.min()}."
    )
  return positions


def as_index(index: Any, batch: Sequence[int]) -> jax.Array:
  """Returns how many tokens a cache has, as the caller counts, checked.

  Example:

    >>> from nnx.nn import attention_step
    >>> int(attention_step.as_index(3, (2,)))
    3

  Args:
    index: `[]` or `[*batch]` integers.
    batch: The batch axes.

  Raises:
    ValueError: If it does not fit.
  """
  return _integers("index", index, ((), tuple(batch)), "")


def as_block_table(table: Any, batch: Sequence[int]) -> jax.Array:
  """Returns which blocks each sequence has, checked.

  Example:

    >>> from nnx.nn import attention_step
    >>> attention_step.as_block_table([[4, 0], [2, 1]], (2,)).shape
    (2, 2)

  Args:
    table: `[*batch, m]` integers.
    batch: The batch axes.

  Raises:
    ValueError: If it does not fit.
  """
  shape = np.shape(table)
  more = ", with the blocks of a sequence in the last axis"
  return _integers("block_table", table, ((*batch, *shape[-1:]),), more)


def check_index(step: AttentionStep, index: jax.Array) -> None:
  """Refuses a step of a cache that has seen other tokens, where that is known.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import attention_step
    >>> step = attention_step.AttentionStep(jnp.int32(3))
    >>> attention_step.check_index(step, jnp.int32(3))

  Args:
    step: With an `index`.
    index: The `cache_index` of a layer.

  Raises:
    ValueError: If it is another.
  """
  assert step.index is not None
  traced = (isinstance(x, core.Tracer) for x in (step.index, index))
  if any(traced):
    if step.index.shape == index.shape:
      return
  elif np.array_equal(step.index, index):
    return
  raise ValueError(
    "`step` must be of a layer whose cache has seen the same tokens, but its"
    f" index is {step.index} and `cache_index` is {index}. Prepare a step in"
    " each call, and make all caches by `nnx.init_cache`."
  )


def check_room(
  step: AttentionStep, tokens: int, slots: int
) -> jax.Array | None:
  """Refuses new tokens for which the cache has no room.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import attention_step
    >>> step = attention_step.AttentionStep(jnp.int32(3))
    >>> attention_step.check_room(step, 2, 4)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    ValueError: The cache must have room for all tokens, but ...

  Args:
    step: With an `index`.
    tokens: t, how many tokens come.
    slots: How many tokens of a sequence the cache has room for.

  Returns:
    None if all tokens fit. Where a trace does not know the number of tokens,
    which of them do not, `[*index axes, t]`.

  Raises:
    ValueError: If `lengths` are of each sequence and `index` is not, or the
      cache has no room.
  """
  index, lengths = step.index, step.lengths
  assert index is not None
  if lengths is not None and lengths.ndim > index.ndim:
    raise ValueError(
      "`lengths` of each sequence need a `cache_index` of each, but its shape"
      f" is {index.shape} and that of `lengths` is {lengths.shape}. Call"
      " `init_cache(..., per_sequence=True)`."
    )
  new = tokens if lengths is None else lengths
  if isinstance(index, core.Tracer) or isinstance(new, core.Tracer):
    return _without_room(index, tokens, slots, lengths)
  room = np.max(np.asarray(index) + np.asarray(new), initial=0)
  if room > slots:
    raise ValueError(
      f"The cache must have room for all tokens, but its `max_length` is"
      f" {slots}, `cache_index` is {np.max(index)}, and the call adds"
      f" {np.max(new)}. Call `init_cache` for a larger or an empty one."
    )
  return None


def _without_room(
  index: jax.Array, tokens: int, slots: int, lengths: jax.Array | None
) -> jax.Array:
  """Returns which new tokens the cache cannot take: `[*index axes, t]`."""
  lost = _positions(index, tokens) >= slots
  if lengths is None:
    return lost
  real = masks.real_tokens(lengths, tokens)
  return jnp.logical_and(lost, masks.both(None, real, lost.ndim))


def _positions(first: jax.Array, tokens: int) -> jax.Array:
  """Returns the positions of consecutive tokens: `[*first, t]`."""
  steps = jnp.arange(tokens, dtype=jnp.int32)
  return jnp.expand_dims(first, -1) + steps.reshape((1,) * first.ndim + (-1,))
