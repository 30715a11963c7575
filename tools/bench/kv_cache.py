"""Suite `kv_cache`: writing one step's K and V into the caches of a decoder.

The shapes are those of one layer of published decoders of 1 to 8 billion
parameters, with batch and length chosen so that a row stays below 8 GiB.
Baselines are the two expressions
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
import numpy as np

from kernels import kv_cache
from kernels.kv_cache import arg_specs
from tools.bench import choice, harness

NAME = "kv_cache"
_DTYPES = ("float32", "bfloat16", "float16")
_QUICK_DTYPES = ("float32", "bfloat16")


# One token of every layer whose cache is not stacked, and one prefill.
_SPECS = tuple(
  spec
  for spec in arg_specs.ARG_SPECS
  if spec.layers is None
  and spec.dtype != "float32"
  and not spec.name.endswith("one_index")
)
_QUICK_SPECS = tuple(
  dataclasses.replace(spec, batch=2, length=1024)
  for spec in (_SPECS[0], _SPECS[-1])
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


def _build_update(spec: arg_specs.ArgSpec) -> harness.Comparison:
  """Builds the row of one layer, dtype and kind of index."""
  random = np.random.default_rng(0)
  new_k, new_v = (
    jnp.asarray(random.standard_normal(spec.new_shape).astype(spec.dtype))
    for _ in range(2)
  )
  index = jnp.asarray(
    random.integers(
      spec.length - spec.tokens + 1,
      size=spec.batch if spec.per_sequence else (),
      dtype=np.int32,
    )
  )

  def fresh() -> tuple[Any, ...]:
    caches = (jnp.full(spec.cache_shape, x, spec.dtype) for x in (0.5, 0.25))
    return (*caches, new_k, new_v, index)

  def side(name: str, function: Callable[..., Any]) -> harness.Side:
    step = jax.jit(function, donate_argnums=(0, 1))
    return harness.Side(
      name=name,
      fresh=fresh,
      call=lambda state: step(*state),
      advance=lambda state, result: (*result[:2], *state[2:]),
    )

  vmapped = "vmapped " if spec.per_sequence else ""
  new_bytes = new_k.nbytes + new_v.nbytes
  return harness.Comparison(
    ours=side("kernels.kv_cache.update", kv_cache.update),
    baselines=[
      side(f"{vmapped}dynamic_update_slice, jit", _slice_update),
      side("scatter, jit", _scatter_update),
    ],
    floor_traffic=harness.Traffic(read=new_bytes, written=new_bytes),
    floor_side=side("dispatch", _dispatch_only),
    floor_name="copy of the new rows, and the dispatch of a donating call",
    details=choice.chosen(kv_cache.update, *spec.shapes()),
  )


def _case(
  spec: arg_specs.ArgSpec, per_sequence: bool, dtype: str
) -> harness.Case:
  spec = dataclasses.replace(spec, per_sequence=per_sequence, dtype=dtype)
  shape = f"B{spec.batch}_S{spec.length}_H{spec.heads}_D{spec.head_dim}"
  tokens = f"_T{spec.tokens}" if spec.tokens > 1 else ""
  index = "per_sequence" if per_sequence else "single"
  return harness.Case(
    suite=NAME,
    op="update",
    case=f"{spec.name}_{shape}{tokens}_{index}",
    dtype=dtype,
    build=functools.partial(_build_update, spec),
  )


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every layer, kind of index and dtype."""
  return [
    _case(spec, per_sequence, dtype)
    for spec in (_QUICK_SPECS if settings.quick else _SPECS)
    for per_sequence in (False, True)
    for dtype in (_QUICK_DTYPES if settings.quick else _DTYPES)
  ]
