"""Shapes from real models, shared by the tests and the benchmarks."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ..cache.arg_specs import CacheSpec


@dataclasses.dataclass(frozen=True)
class ArgSpec(CacheSpec):
  """Arguments of one `decode_attention`.

  Attributes:
    group: g, the query heads for each key-value head.
    filled: Tokens in the cache after the step.
  """

  group: int = 1
  _: dataclasses.KW_ONLY
  filled: int | None = None

  @property
  def query_shape(self) -> tuple[int, ...]:
    """Returns the shape of `q`."""
    return (self.batch, self.tokens, self.heads * self.group, self.head_dim)

  @property
  def query_dtype(self) -> str:
    """Returns the dtype of `q` and the new rows."""
    return "bfloat16" if "8" in self.dtype else self.dtype

  @property
  def index(self) -> int:
    """Returns the position of the first new token."""
    return (self.filled or self.length) - self.tokens

  @property
  def bytes_read(self) -> int:
    """Bytes of the valid prefix, which have to be read once."""
    size = jnp.dtype(self.dtype).itemsize
    filled = self.index + self.tokens
    return 2 * self.batch * filled * self.heads * self.head_dim * size

  def scales(self) -> dict[str, Any]:
    """Returns `k_scale` and `v_scale` where the cache needs them."""
    if "8" not in self.dtype:
      return {}
    return {"k_scale": jnp.float32(0.03), "v_scale": jnp.float32(0.03)}

  def scaled(self, *, batch: int, length: int) -> "ArgSpec":
    """Returns the same layer with a smaller batch and cache, for tests."""
    filled = None
    if self.filled is not None:
      filled = max(self.tokens, self.filled * length // self.length)
    return dataclasses.replace(
      self,
      batch=min(batch, self.batch),
      length=min(length, self.length),
      tokens=min(self.tokens, length // 2),
      filled=filled,
      layers=None if self.layers is None else min(self.layers, 3),
    )

  def shapes(self) -> tuple[Any, ...]:
    """Returns the positional arguments as `jax.ShapeDtypeStruct`s."""
    cache = jax.ShapeDtypeStruct(self.cache_shape, self.dtype)
    q = jax.ShapeDtypeStruct(self.query_shape, self.query_dtype)
    new = jax.ShapeDtypeStruct(self.new_shape, self.query_dtype)
    return cache, cache, q, new, new, jax.ShapeDtypeStruct((), jnp.int32)

  def make(self, seed: int = 0) -> tuple[jax.Array, ...]:
    """Returns random positional arguments; each call makes new buffers."""
    keys = jax.random.split(jax.random.key(seed), 5)
    arrays = []
    for key, struct in zip(keys, self.shapes()):
      x = jax.random.normal(key, struct.shape, jnp.float32)
      if struct.dtype == jnp.int8:
        x = jnp.round(x * 40)
      arrays.append(x.astype(struct.dtype))
    return (*arrays, jnp.int32(self.index))


# Decoders of 1B to 8B parameters: Llama 3.2 1B (8 x 64, 4 queries a head),
# Llama 2 7B (32 x 128), Llama 3.1 8B (8 x 128, 4), Gemma 2 2B (4 x 256, 2),
# Falcon 7B (1 x 64, 71). With `tp8`, what one of 8 chips has where the heads
# of Llama 3.1 8B and 70B (8 x 128, 8) are split: a single one.
ARG_SPECS = (
  ArgSpec("B8_S2048_H16_D64_first", 8, 2048, 16, 64, dtype="float32", filled=8),
  ArgSpec(
    "B8_S2048_H16_D64_half", 8, 2048, 16, 64, dtype="float32", filled=1024
  ),
  ArgSpec("B8_S2048_H16_D64_full", 8, 2048, 16, 64, dtype="float32"),
  ArgSpec("B8_S2048_H16_D64_full_bf16", 8, 2048, 16, 64),
  ArgSpec("B8_S2048_H16_D64_full_int8", 8, 2048, 16, 64, dtype="int8"),
  ArgSpec("B1_S32768_H8_D128_gqa4_full", 1, 32768, 8, 128, 4, dtype="float32"),
  ArgSpec("B1_S32768_H1_D128_gqa4_full", 1, 32768, 1, 128, 4, dtype="float32"),
  ArgSpec("llama_3_2_1b", 8, 4096, 8, 64, 4),
  ArgSpec("gemma_2_2b", 4, 4096, 4, 256, 2),
  ArgSpec("llama_2_7b", 2, 2048, 32, 128, dtype="float16"),
  ArgSpec("falcon_7b", 4, 2048, 1, 64, 71),
  ArgSpec("llama_3_1_8b", 4, 4096, 8, 128, 4),
  ArgSpec("llama_3_1_8b_tp8", 4, 4096, 1, 128, 4),
  ArgSpec("llama_3_1_70b_tp8", 16, 4096, 1, 128, 8),
  ArgSpec("llama_3_1_8b_fp8", 4, 4096, 8, 128, 4, dtype="float8_e4m3fn"),
  ArgSpec("llama_3_1_8b_speculative", 4, 4096, 8, 128, 4, tokens=5),
  ArgSpec("llama_3_1_8b_prefill", 1, 4096, 8, 128, 4, tokens=256, filled=1024),
  ArgSpec("llama_3_2_1b_stacked", 4, 2048, 8, 64, 4, layers=16),
)
