"""Suite `kv_cache`: writing one step's K and V into the caches of a decoder.

The shapes are those of one layer of published decoders of 1 to 8 billion
parameters, with batch and length chosen so that a row stays below 8 GiB.
Baselines are the two expressions that people write in JAX:
`dynamic_update_slice` (vmapped when every sequence has its own position) and a
scatter, both jitted with the caches donated. The slice does less than the
scatter and than ours: of a position outside the cache it makes the nearest one
inside, where they write nothing. `update_int8` quantises to int8 caches and
`update_layer` writes into one layer of a stacked cache. `update_16` and
`update_int8_16` write into 16 pairs of caches in one program, as the layers of
a decoder do: a call of one update is mostly dispatch, and XLA overlaps that of
one call with the work of the one before where it takes the program for
expensive.
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
from tools.bench import choice, harness, int8

NAME = "kv_cache"
_DTYPES = ("float32", "bfloat16", "float16")
_QUICK_DTYPES = ("bfloat16",)

# One token of every layer whose cache is not stacked, and one prefill.
_SPECS = tuple(
  spec
  for spec in arg_specs.ARG_SPECS
  if spec.layers is None
  and spec.dtype != "float32"
  and not spec.name.endswith("one_index")
)
# Shorter, so that 16 pairs of caches a side fit.
_LAYERS = 16
_IN_LAYERS = f"_{_LAYERS}"
_LAYERS_SPECS = tuple(
  dataclasses.replace(spec, length=512)
  for spec in _SPECS
  if spec.name in ("llama_3_2_1b", "llama_3_1_8b", "gemma_2_2b")
)
_STACKED_SPECS = tuple(
  spec for spec in arg_specs.ARG_SPECS if spec.layers is not None
)
_QUICK_SPECS = tuple(
  dataclasses.replace(spec, batch=2, length=1024)
  for spec in (_SPECS[0], _SPECS[-1])
)
_QUICK_STACKED_SPECS = tuple(
  dataclasses.replace(spec, batch=2, length=256) for spec in _STACKED_SPECS
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


def _dispatch_only(cache_k, cache_v, new_k, new_v, index, *operands):
  """Takes and returns what an update does, and writes only a number."""
  del new_k, new_v, operands
  return cache_k, cache_v, index + 1


def _quantised(update: Callable[..., Any]) -> Callable[..., Any]:
  """Makes `update` take floating rows for int8 caches."""

  def quantised_update(cache_k, cache_v, new_k, new_v, index):
    news = int8.quantise(new_k), int8.quantise(new_v)
    return update(cache_k, cache_v, *news, index)

  return quantised_update


def _ours_int8(cache_k, cache_v, new_k, new_v, index):
  return kv_cache.update(
    cache_k,
    cache_v,
    new_k,
    new_v,
    index,
    k_scale=int8.SCALE,
    v_scale=int8.SCALE,
  )


def _ours_layer(cache_k, cache_v, new_k, new_v, index, layer):
  return kv_cache.update(cache_k, cache_v, new_k, new_v, index, layer=layer)


def _slice_layer(cache_k, cache_v, new_k, new_v, index, layer):
  """Takes the layer out, writes to it, and puts it back."""
  caches = (cache_k, cache_v)
  one_k, one_v = (
    lax.dynamic_index_in_dim(c, layer, keepdims=False) for c in caches
  )
  written = _slice_update(one_k, one_v, new_k, new_v, index)
  return tuple(
    lax.dynamic_update_index_in_dim(cache, new, layer, 0)
    for cache, new in zip(caches, written, strict=True)
  )


def _scatter_layer(cache_k, cache_v, new_k, new_v, index, layer):
  """Writes with `.at[layer, sequence, position].set`."""
  batch, tokens = new_k.shape[:2]
  rows = jnp.arange(batch)[:, None]
  index = jnp.broadcast_to(index, (batch,))
  positions = index[:, None] + jnp.arange(tokens)
  return (
    cache_k.at[layer, rows, positions].set(new_k),
    cache_v.at[layer, rows, positions].set(new_v),
  )


def _in_layers(update: Callable[..., Any]) -> Callable[..., Any]:
  """Makes `update` take tuples, with the arrays of a layer each."""

  def update_layers(caches_k, caches_v, new_k, new_v, index):
    pairs = (
      update(*layer, index)
      for layer in zip(caches_k, caches_v, new_k, new_v, strict=True)
    )
    return tuple(zip(*pairs, strict=True))

  return update_layers


# Of each op: ours, by slices, by scatter.
_OPS: dict[str, tuple[Callable[..., Any], ...]] = {
  "update": (kv_cache.update, _slice_update, _scatter_update),
  "update_int8": (
    _ours_int8,
    _quantised(_slice_update),
    _quantised(_scatter_update),
  ),
  "update_layer": (_ours_layer, _slice_layer, _scatter_layer),
}
_OPS |= {
  op + _IN_LAYERS: tuple(_in_layers(update) for update in _OPS[op])
  for op in ("update", "update_int8")
}


def _build(op: str, spec: arg_specs.ArgSpec) -> harness.Comparison:
  """Builds the row of one op, layer, dtype and kind of index."""
  ours, by_slices, by_scatter = _OPS[op]
  new_dtype = "bfloat16" if spec.dtype == "int8" else spec.dtype
  random = np.random.default_rng(0)
  layers = _LAYERS if op.endswith(_IN_LAYERS) else None

  def of_layers(make: Callable[[], Any]) -> Any:
    return make() if layers is None else tuple(make() for _ in range(layers))

  def new_rows() -> jax.Array:
    rows = random.standard_normal(spec.new_shape)
    return jnp.asarray(rows.astype(new_dtype))

  new_k, new_v = of_layers(new_rows), of_layers(new_rows)
  index = jnp.asarray(
    random.integers(
      spec.length - spec.tokens + 1,
      size=spec.batch if spec.per_sequence else (),
      dtype=np.int32,
    )
  )
  operands = [new_k, new_v, index]
  if spec.layers is not None:
    operands.append(jnp.int32(spec.layers // 2))

  def fresh() -> tuple[Any, ...]:
    caches = (
      of_layers(functools.partial(jnp.full, spec.cache_shape, x, spec.dtype))
      for x in (1, 2)
    )
    return *caches, *operands

  def side(name: str, function: Callable[..., Any]) -> harness.Side:
    step = jax.jit(function, donate_argnums=(0, 1))
    return harness.Side(
      name=name,
      fresh=fresh,
      call=lambda state: step(*state),
      advance=lambda state, result: (*result[:2], *state[2:]),
    )

  vmapped = "vmapped " if spec.per_sequence else ""
  news = jax.tree.leaves((new_k, new_v))
  new_size = sum(new.size for new in news)
  cache_aval = jax.ShapeDtypeStruct(spec.cache_shape, spec.dtype)
  return harness.Comparison(
    ours=side("kernels.kv_cache.update", ours),
    baselines=[
      side(f"{vmapped}dynamic_update_slice, jit", by_slices),
      side("scatter, jit", by_scatter),
    ],
    floor_traffic=harness.Traffic(
      read=sum(new.nbytes for new in news),
      written=new_size * jnp.dtype(spec.dtype).itemsize,
    ),
    floor_side=side("dispatch", _dispatch_only),
    floor_name="copy of the new rows, and the dispatch of a donating call",
    details=choice.chosen(
      ours,
      *(of_layers(lambda: cache_aval) for _ in range(2)),
      *operands,
    ),
  )


def _case(
  op: str, spec: arg_specs.ArgSpec, per_sequence: bool, dtype: str
) -> harness.Case:
  spec = dataclasses.replace(spec, per_sequence=per_sequence, dtype=dtype)
  shape = f"B{spec.batch}_S{spec.length}_H{spec.heads}_D{spec.head_dim}"
  layers = f"L{spec.layers}_" if spec.layers is not None else ""
  tokens = f"_T{spec.tokens}" if spec.tokens > 1 else ""
  index = "per_sequence" if per_sequence else "single"
  return harness.Case(
    suite=NAME,
    op=op,
    case=f"{spec.name}_{layers}{shape}{tokens}_{index}",
    dtype=dtype,
    build=functools.partial(_build, op, spec),
  )


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every layer, kind of index and dtype."""
  rows = [
    _case("update", spec, per_sequence, dtype)
    for spec in (_QUICK_SPECS if settings.quick else _SPECS)
    for per_sequence in (False, True)
    for dtype in (_QUICK_DTYPES if settings.quick else _DTYPES)
    if per_sequence or not settings.quick or spec is _QUICK_SPECS[0]
  ]
  rows += [
    _case("update" + _IN_LAYERS, spec, per_sequence, dtype)
    for spec in (_QUICK_SPECS[:1] if settings.quick else _LAYERS_SPECS)
    for per_sequence in ((True,) if settings.quick else (False, True))
    for dtype in (_QUICK_DTYPES if settings.quick else _DTYPES)
  ]
  rows += [
    _case("update_int8" + _IN_LAYERS, spec, True, "int8")
    for spec in (() if settings.quick else _LAYERS_SPECS)
  ]
  rows += [
    _case("update_int8", spec, True, "int8")
    for spec in (_QUICK_SPECS[:1] if settings.quick else _SPECS)
  ]
  rows += [
    _case("update_layer", spec, True, dtype)
    for spec in (_QUICK_STACKED_SPECS if settings.quick else _STACKED_SPECS)
    for dtype in (("bfloat16",) if settings.quick else _DTYPES)
  ]
  return rows
