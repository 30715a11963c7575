"""Shapes from real models, shared by the tests and the benchmarks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..cache.arg_specs import CacheSpec


@dataclasses.dataclass(frozen=True)
class ArgSpec(CacheSpec):
  """Arguments of one `kv_cache.update`.

  Attributes:
    per_sequence: Whether each sequence has its own index.
  """

  _: dataclasses.KW_ONLY
  per_sequence: bool = True

  def scaled(self, *, batch: int, length: int) -> "ArgSpec":
    """Returns the same layer with a smaller batch and cache, for tests."""
    return dataclasses.replace(
      self,
      batch=min(batch, self.batch),
      length=min(length, self.length),
      tokens=min(self.tokens, length // 2),
      layers=None if self.layers is None else min(self.layers, 3),
    )

  def shapes(self) -> tuple[Any, ...]:
    """Returns the positional arguments as `jax.ShapeDtypeStruct`s."""
    cache = jax.ShapeDtypeStruct(self.cache_shape, self.dtype)
    new = jax.ShapeDtypeStruct(self.new_shape, self.dtype)
    index = jax.ShapeDtypeStruct(
      (self.batch,) if self.per_sequence else (), jnp.int32
    )
    return cache, cache, new, new, index

  def make(self, seed: int = 0) -> tuple[jax.Array, ...]:
    """Returns random positional arguments; each call makes new buffers."""
    keys = jax.random.split(jax.random.key(seed), 5)
    arrays = [
      jax.random.normal(key, shape, jnp.float32).astype(self.dtype)
      for key, shape in zip(
        keys, (self.cache_shape,) * 2 + (self.new_shape,) * 2
      )
    ]
    index = jax.random.randint(
      keys[4],
      (self.batch,) if self.per_sequence else (),
      0,
      self.length - self.tokens + 1,
      jnp.int32,
    )
    return (*arrays, index)


# Key-value heads and head dims of published decoders, 1B to 8B parameters.
ARG_SPECS = (
  ArgSpec("llama_3_2_1b", 8, 4096, 8, 64),
  ArgSpec("gemma_2_2b", 8, 4096, 4, 256),
  ArgSpec("llama_3_2_3b", 16, 2048, 8, 128),
  ArgSpec("phi_2_2_7b", 4, 2048, 32, 80, dtype="float16"),
  ArgSpec("llama_2_7b", 8, 2048, 32, 128),
  ArgSpec("llama_2_7b_f32", 4, 2048, 32, 128, dtype="float32"),
  ArgSpec("llama_3_1_8b", 4, 8192, 8, 128),
  ArgSpec("llama_3_1_8b_one_index", 4, 8192, 8, 128, per_sequence=False),
  ArgSpec("llama_3_1_8b_prefill", 4, 8192, 8, 128, tokens=512),
  ArgSpec("llama_3_2_1b_stacked", 4, 2048, 8, 64, layers=16),
)
