"""The caches of attention layers, which decoding appends to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import core
import jax.numpy as jnp
import numpy as np

from nnx import partitioning
from nnx.module import Module, iter_modules
from nnx.nn import checks, decoding, dtypes
from nnx.nn.products import as_tuple
from nnx.variablelib import Cache, Variable, using_eager_sharding


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros_on(sharding, shape, dtype):
  """Makes each device's part where it belongs, and the whole nowhere."""
  return partitioning.place(jnp.zeros(shape, dtype), {"sharding": sharding})


@dataclasses.dataclass(frozen=True)
class _Places:
  """Where the arrays of a cache belong.

  Attributes:
    names: Of the axes of `[*batch, max_length, kv heads, h]`; None for nowhere.
    metadata: The `mesh` and `sharding_rules` that go with the names.
    annotated: Whether Variables keep the names, as those they come from do.
  """

  names: tuple[Any, ...] | None = None
  metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
  annotated: bool = True

  @classmethod
  def given(cls, sharding: Any, axes: int) -> _Places:
    """Returns what a user says of a cache of so many axes."""
    names, metadata = sharding, {}
    if isinstance(sharding, jax.sharding.NamedSharding):
      names, metadata = sharding.spec, {"mesh": sharding.mesh}
    fits = isinstance(names, (tuple, list, jax.sharding.PartitionSpec))
    if not fits or len(names) > axes:
      raise ValueError(
        f"`sharding` must name the mesh axis, or None, of each of the {axes}"
        " axes of a cache, in a tuple, a `PartitionSpec` or a `NamedSharding`,"
        f" but got `{sharding!r}`."
      )
    return cls(_fill(names, axes), metadata)

  @classmethod
  def like(cls, kernel: Any, axes: int) -> _Places:
    """Returns where the heads are that a kernel `[..., kv heads, h]` makes."""
    variable = kernel if isinstance(kernel, Variable) else Variable(kernel)
    annotation = variable.get_metadata("out_sharding", None)
    value = variable.raw_value
    metadata, annotated = {}, bool(annotation)
    if not annotation and not isinstance(value, core.Tracer):
      annotation = getattr(value, "sharding", None)
    if isinstance(annotation, jax.sharding.NamedSharding):
      metadata["mesh"] = annotation.mesh
      annotation = annotation.spec
    elif not isinstance(annotation, (tuple, list, jax.sharding.PartitionSpec)):
      return cls()
    else:
      for name in ("mesh", "sharding_rules"):
        if (found := variable.get_metadata(name, None)) is not None:
          metadata[name] = found
    heads = _fill(annotation, getattr(value, "ndim", 3))[-2]
    return cls((*(None,) * (axes - 2), heads, None), metadata, annotated)

  def zeros(
    self, shape: Sequence[int], dtype: dtypes.Dtype, *axes: int
  ) -> Cache:
    """Makes zeros whose axes are these of the cache's."""
    shape = tuple(shape)
    if self.names is None:
      return Cache(jnp.zeros(shape, dtype))
    spec = jax.sharding.PartitionSpec(*(self.names[axis] for axis in axes))
    metadata = {**self.metadata, "out_sharding": spec}
    mesh = metadata.get("mesh") or partitioning.active_mesh()
    if mesh is None or not using_eager_sharding():
      value = jnp.zeros(shape, dtype)
    else:
      rules = metadata.get("sharding_rules") or ()
      sharding = jax.sharding.NamedSharding(
        mesh, partitioning.partition_spec(spec, rules)
      )
      value = _zeros_on(sharding, shape, jnp.dtype(dtype))
    return Cache(value, **(metadata if self.annotated else {}))


def _fill(names, axes):
  return (*names, *(None,) * (axes - len(names)))


class CachedAttention(Module):
  """Base of attention layers that keep keys and values for later calls.

  Attributes:
    key: The projection to keys, of which the cache takes the sharding.
    num_kv_heads: The number of key and value heads.
    head_dim: h, the features of a head.
    dtype: The dtype that the layer computes in; of inputs and parameters, if
      None.
    param_dtype: The dtype of the parameters.
    cached_key: `[*batch, max_length, kv heads, h]`, or None before
      `init_cache`; `[blocks, block_size, kv heads, h]` if there is a
      `block_size`.
    cached_value: The same.
    cache_index: `[]` or `[*batch]` int32, the number of tokens in the cache.
    cached_key_scale: `[*batch, kv heads]` float32, the factors of what an int8
      or float8 cache stores, or `[kv heads]` for blocks; None for other caches.
    cached_value_scale: The same.
    block_size: How many tokens a block has; None, if each sequence has a row of
      its own.
  """

  key: Any
  num_kv_heads: int
  head_dim: int
  dtype: dtypes.Dtype | None
  param_dtype: dtypes.Dtype
  cached_key: Cache[jax.Array] | None
  cached_value: Cache[jax.Array] | None
  cache_index: Cache[jax.Array] | None
  cached_key_scale: Cache[jax.Array] | None
  cached_value_scale: Cache[jax.Array] | None
  block_size: int | None

  def init_cache(
    self,
    input_shape: Sequence[int],
    dtype: dtypes.Dtype | None = None,
    *,
    per_sequence: bool = False,
    block_size: int | None = None,
    blocks: int | None = None,
    sharding: Any = None,
  ) -> None:
    """Makes an empty cache, which decoding needs.

    `nnx.init_cache` does it for all layers of a model. On a mesh, the cache is
    split over heads as the kernel of `key` is, by that one's sharding
    annotation or by where it lies, and not along other axes unless `sharding`
    says so.

    Example:

      >>> import jax.numpy as jnp
      >>> import nnx
      >>> layer = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
      >>> layer.init_cache((5, 16, 4))
      >>> y = layer(jnp.ones((5, 3, 4)))
      >>> y = layer(jnp.ones((5, 1, 4)))
      >>> layer.cached_key.shape, int(layer.cache_index.value)
      ((5, 16, 2, 2), 4)

      Prompts of different lengths, in a cache of a quarter of the size:

      >>> layer.init_cache((2, 16, 4), jnp.int8, per_sequence=True)
      >>> y = layer(jnp.ones((2, 3, 4)), lengths=jnp.array([3, 1]))
      >>> layer.cached_key.dtype, layer.cache_index.value.tolist()
      (dtype('int8'), [3, 1])

      A pool of blocks, of which each sequence takes what it needs:

      >>> layer.init_cache((2, 16, 4), block_size=4, blocks=6)
      >>> table = jnp.array([[5, 0], [3, 1]])
      >>> y = layer(jnp.ones((2, 3, 4)), block_table=table)
      >>> layer.cached_key.shape, layer.cache_index.value.tolist()
      ((6, 4, 2, 2), [3, 3])

    Args:
      input_shape: `(*batch, max_length, features)` of the inputs of a whole
        sequence; the last is not used.
      dtype: Dtype of the cache: float32, bfloat16 or float16; or int8,
        float8_e4m3fn or float8_e5m2, with a scale for each sequence and head
        that the first tokens decide. If None, that of the layer: `dtype`, or
        `param_dtype` if that is None too.
      per_sequence: Whether each sequence has its own position, `cache_index`
        `[*batch]`: for prompts of different `lengths`, or to restart one by
        setting its index (and its scales) to 0. So it is with blocks anyway.
      block_size: How many tokens a block has, for a pool of blocks in place of
        rows: each call then takes a `block_table`. The scales of a pool, if it
        has any, are of each head alone.
      blocks: The number of blocks; as many as all sequences of `max_length`
        take, if None.
      sharding: Of `cached_key`: a name of a mesh axis, or None, for each axis,
        a `PartitionSpec`, or a `NamedSharding`. For example `("data", None,
        "model", None)` for a batch that is split too. The scales follow, and
        the index of rows.

    Raises:
      TypeError: If `block_size` or `blocks` is not an integer.
      ValueError: If one of them is not positive, or there are `blocks` without
        `block_size`; or if `sharding` does not fit the cache.
    """
    *batch, length, _ = input_shape
    if dtype is None:
      dtype = self._cache_dtype()
    heads = self.num_kv_heads
    index_shape = tuple(batch)
    if block_size is None:
      if blocks is not None:
        raise ValueError(
          "`blocks` must not be given without `block_size`, but got"
          f" `blocks={blocks}`."
        )
      rows = (*batch, length)
      of_index = tuple(range(len(batch)))  # axes of the cache that are its own
    else:
      checks.whole("block_size", block_size, 1)
      if blocks is None:
        blocks = int(np.prod(batch, dtype=int)) * -(-length // block_size)
      checks.whole("blocks", blocks, 1)
      per_sequence = True
      rows = (blocks, block_size)
      of_index = ()
    if not per_sequence:
      index_shape = ()
    shape = (*rows, heads, self.head_dim)
    scale_shape = (*(shape[axis] for axis in of_index), heads)
    places = self._places(sharding, len(shape))
    self.block_size = block_size
    self.cached_key = places.zeros(shape, dtype, *range(len(shape)))
    self.cached_value = places.zeros(shape, dtype, *range(len(shape)))
    self.cache_index = places.zeros(
      index_shape, jnp.int32, *(of_index if per_sequence else ())
    )
    self.cached_key_scale = None
    self.cached_value_scale = None
    if decoding.is_quantized(dtype):
      scales = scale_shape, jnp.float32, *of_index, len(shape) - 2
      self.cached_key_scale = places.zeros(*scales)
      self.cached_value_scale = places.zeros(*scales)

  def _places(self, sharding: Any, axes: int) -> _Places:
    """Returns where the arrays of a cache of so many axes belong."""
    if sharding is not None:
      return _Places.given(sharding, axes)
    kernel = getattr(self.key, "kernel", None)
    return _Places() if kernel is None else _Places.like(kernel, axes)

  def rewind_cache(self, length: jax.Array | int = 0) -> None:
    """Forgets all tokens of the cache from some position on.

    `nnx.rewind_cache` does it for all layers of a model.

    Example:

      >>> import jax.numpy as jnp
      >>> import nnx
      >>> layer = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
      >>> layer.init_cache((2, 16, 4), per_sequence=True)
      >>> y = layer(jnp.ones((2, 3, 4)))
      >>> layer.rewind_cache(jnp.array([2, 9]))
      >>> layer.cache_index.value.tolist()
      [2, 3]

    Args:
      length: `[]` or `[*batch]` integers that are at least 0: how many tokens
        to keep at most. With none, the next tokens choose the scales of a
        quantised cache again, unless it is a pool of blocks.

    Raises:
      ValueError: If there is no cache; or if a length is negative or of each
        sequence where the cache has one index.
    """
    if self.cache_index is None:
      raise ValueError(
        f"`{type(self).__name__}` must have a cache to rewind, but has none."
        " Call `init_cache` first."
      )
    index = self.cache_index.value
    length = jnp.asarray(length)
    if length.shape not in ((), index.shape) or not jnp.issubdtype(
      length.dtype, jnp.integer
    ):
      raise ValueError(
        "`length` must be one integer or have the shape of `cache_index`,"
        f" {index.shape}, but got `{length.dtype.name}` of the shape"
        f" {length.shape}. For one of each sequence, call"
        " `init_cache(..., per_sequence=True)`."
      )
    if not isinstance(length, core.Tracer) and (length < 0).any():
      raise ValueError(f"`length` must be at least 0, but got {length}.")
    index = jnp.minimum(index, length.astype(index.dtype))
    self.cache_index.value = index
    if self.block_size is None:
      for scale in (self.cached_key_scale, self.cached_value_scale):
        if scale is not None:
          some = (index > 0)[..., None]
          scale.value = jnp.where(some, scale.value, 0)

  def _cache_dtype(self) -> jnp.dtype:
    """Returns the dtype of keys and values where inputs have the layer's."""
    dtype = jnp.dtype(self.dtype or self.param_dtype)
    if decoding.is_quantized(dtype) or not jnp.issubdtype(dtype, jnp.floating):
      return jnp.dtype(jnp.float32)
    return dtype

  def _buffers(self) -> decoding.Buffers:
    """Returns the arrays of the cache."""
    if (
      self.cached_key is None
      or self.cached_value is None
      or self.cache_index is None
    ):
      raise ValueError(
        "`MultiHeadAttention` must have a cache to decode, but has none. Call"
        " `init_cache((*batch, max_length, in_features))` first."
      )
    key_scale, value_scale = self.cached_key_scale, self.cached_value_scale
    return decoding.Buffers(
      self.cached_key.value,
      self.cached_value.value,
      None if key_scale is None else key_scale.value,
      None if value_scale is None else value_scale.value,
    )

  def _keep(
    self, buffers: decoding.Buffers, step: decoding.AttentionStep
  ) -> None:
    """Writes what a step made of the cache."""
    key, value, index = self.cached_key, self.cached_value, self.cache_index
    assert key is not None and value is not None and index is not None
    if step.counts:
      assert step.next_index is not None
      index.value = step.next_index
    key.value = buffers.key
    value.value = buffers.value
    key_scale, value_scale = self.cached_key_scale, self.cached_value_scale
    if key_scale is not None and value_scale is not None:
      assert buffers.key_scale is not None and buffers.value_scale is not None
      key_scale.value = buffers.key_scale
      value_scale.value = buffers.value_scale


def _layers(model: Any) -> Iterator[CachedAttention]:
  """Returns the attention layers of a model."""
  found = False
  for _, layer in iter_modules(model):
    if isinstance(layer, CachedAttention):
      found = True
      yield layer
  if not found:
    raise ValueError(
      "`model` must have an attention layer, as `nnx.MultiHeadAttention`, but"
      f" this `{type(model).__name__}` has none."
    )


def init_cache(
  model: Any,
  batch_size: int | Sequence[int],
  max_length: int,
  dtype: dtypes.Dtype | None = None,
  *,
  per_sequence: bool = False,
  block_size: int | None = None,
  blocks: int | None = None,
  sharding: Any = None,
) -> None:
  """Makes empty caches for all attention layers of a model.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> def make(rngs):
    ...   return nnx.MultiHeadAttention(
    ...     2, 4, is_causal=True, decode=True, rngs=rngs
    ...   )
    >>> model = nnx.Sequential(make(nnx.Rngs(0)), make(nnx.Rngs(1)))
    >>> nnx.init_cache(model, batch_size=3, max_length=16)
    >>> model(jnp.ones((3, 5, 4))).shape
    (3, 5, 4)
    >>> [int(layer.cache_index.value) for layer in model.layers]
    [5, 5]

  Args:
    model: A Module, or a pytree of them. For a part of a model, pass that part.
    batch_size: The batch axes, an int for one.
    max_length: How many tokens a sequence may have.
    dtype: Dtype of the caches, as for `MultiHeadAttention.init_cache`: that of
      each layer, if None.
    per_sequence: Whether each sequence has its own position.
    block_size: How many tokens a block has, for pools of blocks.
    blocks: The number of blocks of a pool.
    sharding: Of each layer's `cached_key`, as for
      `MultiHeadAttention.init_cache`: along its heads as its kernel, if None.

  Raises:
    TypeError: If a number is not an integer.
    ValueError: If there is no attention layer, or a number is out of range.
  """
  checks.wholes("batch_size", batch_size)
  checks.whole("max_length", max_length)
  batch = as_tuple(batch_size)
  for layer in _layers(model):
    layer.init_cache(
      (*batch, max_length, 0),
      dtype,
      per_sequence=per_sequence,
      block_size=block_size,
      blocks=blocks,
      sharding=sharding,
    )


def rewind_cache(model: Any, length: jax.Array | int = 0) -> None:
  """Forgets all tokens from some position on, in all caches of a model.

  Without a length it empties the caches, without new memory: for the next
  prompt. With one, it takes back what a speculation got wrong.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> model = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
    >>> nnx.init_cache(model, batch_size=3, max_length=16)
    >>> y = model(jnp.ones((3, 5, 4)))
    >>> nnx.rewind_cache(model, 2)
    >>> int(model.cache_index.value)
    2
    >>> nnx.rewind_cache(model)
    >>> int(model.cache_index.value)
    0

  Args:
    model: A Module, or a pytree of them.
    length: `[]` or `[*batch]` integers that are at least 0: how many tokens of
      each sequence to keep at most.

  Raises:
    ValueError: If there is no attention layer, or one has no cache; or if a
      length does not fit.
  """
  for layer in _layers(model):
    layer.rewind_cache(length)
