"""Suite `kv_cache`: writing one step's K and V into the caches of a decoder.

The shapes are those of one layer of published decoders, with batch and length
chosen so that a whole row stays below 8 GiB. Baselines are the two expressions
that people write in JAX: `dynamic_update_slice` (vmapped when every sequence
has its own position) and a scatter, both jitted with the caches donated.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

from kernels import kv_cache
from tools.bench import harness

NAME = "kv_cache"
_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class _Shape:
  """One layer's caches, `[batch, length, heads, head_dim]`, and the step."""

  name: str
  batch: int
  length: int
  heads: int
  head_dim: int
  tokens: int = 1


# KV heads and head dims: Llama 3.2 1B (8 x 64) and 3B (8 x 128), Llama 2 7B
# (32 x 128, 268 MB for K and V in bfloat16), Llama 3.1 8B (8 x 128).
_SHAPES = (
  _Shape("1B_B8_S4096_H8_D64", 8, 4096, 8, 64),
  _Shape("3B_B16_S2048_H8_D128", 16, 2048, 8, 128),
  _Shape("7B_B8_S2048_H32_D128", 8, 2048, 32, 128),
  _Shape("8B_B4_S8192_H8_D128", 4, 8192, 8, 128),
  _Shape("8B_B4_S8192_H8_D128_T128", 4, 8192, 8, 128, tokens=128),
)
_QUICK_SHAPES = (
  _Shape("1B_B8_S512_H8_D64", 8, 512, 8, 64),
  _Shape("8B_B2_S1024_H8_D128_T16", 2, 1024, 8, 128, tokens=16),
)


def _slice_update(cache_k, cache_v, new_k, new_v, index):
  """Writes with `dynamic_update_slice`, vmapped for an index a sequence."""

  def write(cache, new):
    if index.ndim == 0:
      return lax.dynamic_update_slice(cache, new, (0, index, 0, 0))
    return jax.vmap(
      lambda row, new_row, start: lax.dynamic_update_slice(
        row, new_row, (start, 0, 0)
      )
    )(cache, new, index)

  return write(cache_k, new_k), write(cache_v, new_v)


def _scatter_update(cache_k, cache_v, new_k, new_v, index):
  """Writes with `.at[sequence, position].set`."""
  batch, tokens = new_k.shape[:2]
  rows = jnp.arange(batch)[:, None]
  index = jnp.broadcast_to(index, (batch,))
  positions = index[:, None] + jnp.arange(tokens)
  return (
    cache_k.at[rows, positions].set(new_k),
    cache_v.at[rows, positions].set(new_v),
  )


def _dispatch_only(cache_k, cache_v, new_k, new_v, index):
  """Takes and returns what an update does, and writes only a number."""
  del new_k, new_v
  return cache_k, cache_v, index + 1


def _build_update(
  shape: _Shape, dtype: str, per_sequence: bool
) -> harness.Comparison:
  """Builds the row of one layer and one kind of index."""
  keys = jax.random.split(jax.random.key(0), 2)
  cache_shape = (shape.batch, shape.length, shape.heads, shape.head_dim)
  new_shape = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
  new_k, new_v = (
    jax.random.normal(key, new_shape).astype(dtype) for key in keys
  )
  middle = shape.length // 2
  index = (
    middle + jnp.arange(shape.batch, dtype=jnp.int32) * 7
    if per_sequence
    else jnp.int32(middle)
  )
  jax.block_until_ready((new_k, new_v, index))

  def fresh() -> tuple[Any, ...]:
    caches = tuple(jnp.full(cache_shape, fill, dtype) for fill in (0.5, 0.25))
    return (*caches, new_k, new_v, index)

  def side(name: str, function: Callable[..., Any]) -> harness.Side:
    step = jax.jit(function, donate_argnums=(0, 1))
    return harness.Side(
      name=name,
      fresh=fresh,
      call=lambda state: step(*state),
      advance=lambda state, result: (*result[:2], *state[2:]),
    )

  slice_name = (
    "dynamic_update_slice"
    if not per_sequence
    else ("vmapped dynamic_update_slice")
  )
  return harness.Comparison(
    ours=side("kernels.kv_cache.update", kv_cache.update),
    baselines=[
      side(f"{slice_name}, jit", _slice_update),
      side("scatter, jit", _scatter_update),
    ],
    floor_traffic=harness.Traffic(
      read=new_k.nbytes + new_v.nbytes, written=new_k.nbytes + new_v.nbytes
    ),
    floor_side=side("dispatch", _dispatch_only),
    floor_name="copy of the new rows, and the dispatch of a donating call",
  )


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every layer, kind of index and dtype."""
  shapes = _QUICK_SHAPES if settings.quick else _SHAPES
  dtypes = _DTYPES[:2] if settings.quick else _DTYPES
  return [
    harness.Case(
      suite=NAME,
      op="update",
      case=f"{shape.name}_{'per_sequence' if per_sequence else 'single'}",
      dtype=dtype,
      build=functools.partial(_build_update, shape, dtype, per_sequence),
    )
    for shape in shapes
    for per_sequence in (False, True)
    for dtype in dtypes
  ]
