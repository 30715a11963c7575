"""Writing this step's keys and values into a cache, in place."""

from collections.abc import Iterator

import jax
from jax.interpreters import ad
import jax.numpy as jnp
import numpy as np

from ..common import dispatch, options
from . import checks, reference
from . import layout as layout_lib

TARGET = "kv_cache_update"
PALLAS = f"{__package__}.pallas_tpu"

LIBRARY = dispatch.Library(
  f"{__package__}._kv_cache_cpu", {TARGET: "kv_cache_update"}
)
CUDA_LIBRARY = dispatch.Library(
  f"{__package__}._kv_cache_cuda",
  {TARGET: "kv_cache_update"},
  platform="CUDA",
)


def update(
  cache_k: jax.Array,
  cache_v: jax.Array,
  new_k: jax.Array,
  new_v: jax.Array,
  index: jax.Array | int,
  *,
  lengths: jax.Array | int | None = None,
  layer: jax.Array | int | None = None,
  layout: str = "bsnh",
  ring: bool = False,
  k_scale: jax.Array | float | None = None,
  v_scale: jax.Array | float | None = None,
  block_table: jax.Array | None = None,
  cache_batch_index: jax.Array | None = None,
  implementation: str = dispatch.AUTO,
) -> tuple[jax.Array, jax.Array]:
  """Writes new keys and values into a cache, in place.

  With one index for all sequences, equivalent to

      cache_k.at[:, index : index + t].set(new_k)
      cache_v.at[:, index : index + t].set(new_v)

  but for positions that the cache does not have: nothing is written for them.

  Args:
    cache_k: `[b, s, n, h]`, or with layout "bnsh" `[b, n, s, h]`; float32,
      bfloat16, float16, int8, float8_e4m3fn or float8_e5m2. With `layer`, one
      more axis in front. With `block_table`, `[blocks, block_size, n, h]`.
    cache_v: Like `cache_k`; its last axis may have another size.
    new_k: `[b, t, n, h]`, or with layout "bnsh" `[b, n, t, h]`; of the dtype of
      the cache, or float32, bfloat16 or float16 if that is quantised.
    new_v: Like `new_k`, with the last axis of `cache_v`.
    index: Scalar or `[b]` integers: the position of new token 0, that is the
      number of tokens that the sequence already has.
    lengths: Scalar or `[b]` integers in [0, t]: how many of the new tokens to
      write; the rest is padding. All, if None.
    layer: Integer scalar: which layer of a stacked cache `[l, b, s, n, h]`.
    layout: "bsnh" or "bnsh", the order of the axes of the caches and of the
      new rows.
    ring: Whether position p goes to slot `p % s` (sliding window). Of more than
      s new tokens, the last s are written.
    k_scale: Scalar, `[n]` or `[b, n]`, for int8 and float8 caches: an element x
      is stored as `round(x / k_scale)`, clipped to the dtype's range.
    v_scale: Like `k_scale`.
    block_table: `[b, m]` integers, for a paged cache: position p of sequence i
      is slot `p % block_size` of block `block_table[i, p // block_size]`.
      Entries that are not needed may be negative.
    cache_batch_index: `[b]` integers: the row of the cache that each sequence
      has, where that is not its own number. Sequences that share a row must
      not write the same slot.
    implementation: "auto", "xla", "cpu", "cuda" or "pallas" (TPU).

  Returns:
    The updated caches, with the shapes and dtypes of `cache_k` and `cache_v`.

  Raises:
    TypeError: If a dtype does not fit.
    ValueError: If a shape or an option does not fit; or, where the values are
      known (outside of `jit`), if a position lies outside the cache. Under
      `checkify.checkify` the latter is an error of `user_checks`.

  Aliasing: The results take over the buffers of `cache_k` and `cache_v` where
    those are donated or are carries of a loop; else XLA copies them first.
  Batching: `vmap` folds its axis into the batch; a batched cache is not moved
    if the mapped axis is the first.
  Differentiation: Linear in the caches and the new rows, in forward and reverse
    mode; a TypeError for quantised caches.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> from kernels import kv_cache
    >>> cache = jnp.zeros((2, 4, 1, 1))
    >>> new = jnp.array([[1.0], [2.0]])[..., None, None]
    >>> step = jax.jit(kv_cache.update, donate_argnums=(0, 1))
    >>> k, v = step(cache, cache + 0, new, new, jnp.array([0, 3]))
    >>> k[:, :, 0, 0].tolist()
    [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]
  """
  new_k = options.array("new_k", new_k)
  new_v = options.array("new_v", new_v)
  if new_k.ndim != 4 or new_v.ndim != 4:
    axes = "[b, t, n, h]" if layout == "bsnh" else "[b, n, t, h]"
    raise ValueError(
      f"`new_k` and `new_v` must have 4 axes {axes}, but got"
      f" `{layout_lib.text(new_k)}` and `{layout_lib.text(new_v)}`."
    )
  batch = new_k.shape[0]
  cache = layout_lib.canonicalize(
    cache_k,
    cache_v,
    index,
    batch,
    layer=layer,
    layout=layout,
    ring=ring,
    k_scale=k_scale,
    v_scale=v_scale,
    block_table=block_table,
    cache_batch_index=cache_batch_index,
  )
  layout_lib.check_new(cache, new_k, new_v, batch)
  tokens = new_k.shape[1 if layout == "bsnh" else 2]
  count = layout_lib.integers(
    "lengths", tokens if lengths is None else lengths, batch
  )
  checks.check_positions(cache, count, tokens)
  k, v = UPDATE(
    cache.k,
    cache.v,
    new_k,
    new_v,
    cache.index,
    count,
    cache.layer,
    cache.table,
    jnp.int32(0),
    *cache.scales,
    layout=layout,
    ring=cache.ring,
    aligned=cache.aligned,
    uniform=cache.uniform + layout_lib.uniform_axes(1, count=lengths),
    implementation=implementation,
  )
  return k, v


def _abstract_eval(cache_k, cache_v, *rest, **params):
  del params
  return tuple(
    dispatch.out_aval(c.shape, c.dtype, cache_k, cache_v, *rest)
    for c in (cache_k, cache_v)
  )


# Operands after the caches.
_NAMES = (
  "new_k", "new_v", "index", "count", "layer", "table", "first_slot", "k_scale",
  "v_scale",
)  # fmt: skip


def ffi_update(
  cache_k: jax.Array,
  cache_v: jax.Array,
  *rest: jax.Array,
  layout: str,
  ring: int,
  aligned: bool,
  uniform: layout_lib.Uniform,
  target: str = TARGET,
) -> list[jax.Array]:
  """Calls the handler that is registered as `target`; see the reference."""
  scales = rest[7:] or (jnp.zeros((0, 0), jnp.float32),) * 2
  x = dict(zip(_NAMES, (*rest[:7], *scales), strict=True))
  call = jax.ffi.ffi_call(
    target,
    tuple(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in (cache_k, cache_v)),
    input_output_aliases={0: 0, 1: 1},
  )
  return call(
    cache_k,
    cache_v,
    *layout_lib.once(x, aligned, uniform).values(),
    ring=np.int64(ring),
    heads_first=np.bool_(layout == "bnsh"),
  )


def _batching(op, args, dims, *, layout, ring, aligned, uniform):
  del aligned
  args, size = dispatch.move_batch_to_front(args, dims)
  names = (
    "cache_k", "cache_v", "new_k", "new_v", "index", "count", "layer", "table",
  )  # fmt: skip
  values = dict(zip(names, args))
  for i, scale in enumerate(args[9:]):
    values[f"scale{i}"] = scale
  folded = layout_lib.fold_batch(values, size, layout)
  out = op(
    *(folded[name] for name in names),
    jnp.int32(0),
    *(folded[f"scale{i}"] for i in range(len(args) - 9)),
    layout=layout,
    ring=ring,
    aligned=False,
    uniform=layout_lib.uniform_of_batch(
      uniform, dict(zip(("cache_k", "cache_v", *_NAMES), dims))
    ),
  )
  return out, (0, 0)


def _sharding_rule(avals, *, layout, ring, aligned, uniform):
  del ring, uniform
  paged = avals[7].shape[1] != 1
  cache, whole = layout_lib.cache_factors(
    len(avals[0].shape), "b" if aligned else "r", layout
  )
  new = "b t n" if layout == "bsnh" else "b n t"
  operands = [
    f"{cache} hk", f"{cache} hv", f"{new} hk", f"{new} hv",
    "b", "b", "b", "b m", "",
  ]  # fmt: skip
  if len(avals) > 9:
    operands += ["b n", "b n"]
  whole |= {"hk", "hv", "t", "m"}
  if paged:
    whole.add("s")
  if not aligned:
    whole.add("b")
  rule = f"{', '.join(operands)} -> {cache} hk, {cache} hv"
  return rule, layout_lib.in_order(rule, whole)


def _partition(
  mesh, arg_infos, result_infos, call, *, layout, ring, aligned, uniform
):
  del mesh, result_infos
  split = layout_lib.Split.of(
    arg_infos[0], arg_infos[7].shape[1], layout, aligned
  )
  new = split.tokens()
  arg_specs = (
    split.cache(), split.cache(), new, new,
    split.batch(), split.batch(), split.batch(), split.batch(None),
    split.replicated(),
  ) + (split.per_head(),) * (len(arg_infos) - 9)  # fmt: skip

  def local(k, v, new_k, new_v, index, count, layer, table, first, *scales):
    table, first = split.readdress(k, table, first)
    return call(
      k, v, new_k, new_v, index, count, layer, table, first, *scales,
      layout=layout, ring=ring, aligned=aligned, uniform=uniform,
    )  # fmt: skip

  return local, (split.cache(), split.cache()), arg_specs


def _violations(
  k, v, new_k, new_v, index, count, layer, table, first, *scales,
  layout, ring, aligned, uniform,
) -> Iterator[checks.Violation]:  # fmt: skip
  del new_v, first, scales, aligned, uniform
  yield from checks.position_violations(
    layout_lib.Geometry.of(k, v, layout), index, count, layer, table,
    new_k.shape[1 if layout == "bsnh" else 2], ring,
  )  # fmt: skip


def _jvp(primals, tangents, *, implementation, **params):
  out = UPDATE(*primals, implementation=implementation, **params)
  if layout_lib.is_quantized(primals[0].dtype):
    raise TypeError(
      "`kv_cache.update` of a quantised cache cannot be differentiated:"
      f" rounding to {primals[0].dtype.name} has no useful derivative. Keep the"
      " cache in a floating dtype, or stop gradients at its inputs."
    )
  # The update is linear in the caches and the rows: the same update of the
  # tangents, in plain JAX, which can be transposed.
  linear = [ad.instantiate_zeros(tangent) for tangent in tangents[:4]]
  return out, list(reference.update(*linear, *primals[4:], **params))


UPDATE = dispatch.Op(
  "kv_cache_update",
  abstract_eval=_abstract_eval,
  reference=reference.update,
  implementations=(
    dispatch.Implementation(
      name="cpu", platforms=("cpu",), fn=ffi_update, library=LIBRARY
    ),
    dispatch.Implementation(
      name="cuda", platforms=("cuda",), fn=ffi_update, library=CUDA_LIBRARY
    ),
    dispatch.Implementation(
      name="pallas",
      platforms=("tpu",),
      partitionable=False,
      fn=dispatch.lazily(PALLAS, "update"),
      unsupported=dispatch.lazily(PALLAS, "unsupported"),
    ),
  ),
  batching=_batching,
  partitioning=dispatch.Partitioning(_sharding_rule, _partition),
)
ad.primitive_jvps[UPDATE.primitive] = _jvp
checks.add_checkify_rule(UPDATE, _violations)
