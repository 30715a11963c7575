"""The cache of an attention layer, which decoding appends to."""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nnx import partitioning
from nnx.module import Module
from nnx.nn import decoding, dtypes
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
    if isinstance(sharding, jax.sharding.NamedSharding):
      return cls(_fill(sharding.spec, axes), {"mesh": sharding.mesh})
    return cls(_fill(sharding, axes))

  @classmethod
  def like(cls, kernel: Any, axes: int) -> _Places:
    """Returns where the heads are that a kernel `[..., kv heads, h]` makes."""
    variable = kernel if isinstance(kernel, Variable) else Variable(kernel)
    annotation = variable.get_metadata("out_sharding", None)
    value = variable.raw_value
    metadata, annotated = {}, bool(annotation)
    if not annotation and not isinstance(value, jax.core.Tracer):
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
    cached_key: `[*batch, max_length, kv heads, h]`, or None before
      `init_cache`.
    cached_value: The same.
    cache_index: `[]` or `[*batch]` int32, the number of tokens in the cache.
    cached_key_scale: `[*batch, kv heads]` float32, the factors of what an int8
      or float8 cache stores; None for other caches.
    cached_value_scale: The same.
  """

  key: Any
  num_kv_heads: int
  head_dim: int
  cached_key: Cache | None
  cached_value: Cache | None
  cache_index: Cache | None
  cached_key_scale: Cache | None
  cached_value_scale: Cache | None

  def init_cache(
    self,
    input_shape: Sequence[int],
    dtype: dtypes.Dtype = jnp.float32,
    *,
    per_sequence: bool = False,
    sharding: Any = None,
  ) -> None:
    """Makes an empty cache, which decoding needs.

    On a mesh, it is split over heads as the kernel of `key` is, by that one's
    sharding annotation or by where it lies, and not along other axes unless
    `sharding` says so.

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

    Args:
      input_shape: `(*batch, max_length, features)` of the inputs of a whole
        sequence; the last is not used.
      dtype: Dtype of the cache: float32, bfloat16 or float16; or int8,
        float8_e4m3fn or float8_e5m2, with a scale for each sequence and head
        that the first tokens decide.
      per_sequence: Whether each sequence has its own position, `cache_index`
        `[*batch]`: for prompts of different `lengths`, or to restart one by
        setting its index (and its scales) to 0.
      sharding: Of `[*batch, max_length, kv heads, h]`: a name of a mesh axis,
        or None, for each axis, a `PartitionSpec`, or a `NamedSharding`. For
        example `("data", None, "model", None)` for a batch that is split too.
        The index and the scales follow.
    """
    *batch, length, _ = input_shape
    heads = self.num_kv_heads
    shape = (*batch, length, heads, self.head_dim)
    kernel = getattr(self.key, "kernel", None)
    if sharding is not None:
      places = _Places.given(sharding, len(shape))
    elif kernel is not None:
      places = _Places.like(kernel, len(shape))
    else:
      places = _Places()
    rows = range(len(batch))
    self.cached_key = places.zeros(shape, dtype, *range(len(shape)))
    self.cached_value = places.zeros(shape, dtype, *range(len(shape)))
    if per_sequence:
      self.cache_index = places.zeros(batch, jnp.int32, *rows)
    else:
      self.cache_index = places.zeros((), jnp.int32)
    self.cached_key_scale = None
    self.cached_value_scale = None
    if decoding.is_quantized(dtype):
      scales = (*batch, heads), jnp.float32, *rows, len(shape) - 2
      self.cached_key_scale = places.zeros(*scales)
      self.cached_value_scale = places.zeros(*scales)

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
    scales = ()
    if self.cached_key_scale is not None:
      scales = self.cached_key_scale.value, self.cached_value_scale.value
    return decoding.Buffers(
      self.cache_index.value,
      self.cached_key.value,
      self.cached_value.value,
      *scales,
    )

  def _keep(self, buffers: decoding.Buffers) -> None:
    """Writes what a step made of the cache."""
    self.cache_index.value = buffers.index
    self.cached_key.value = buffers.key
    self.cached_value.value = buffers.value
    if buffers.key_scale is not None:
      self.cached_key_scale.value = buffers.key_scale
      self.cached_value_scale.value = buffers.value_scale
