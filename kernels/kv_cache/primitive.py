"""The primitive of the cache update: what runs where, and how it is split.

Operands are those of `reference.OPERANDS`, parameters the fields of
`addressing.Addressing`.
"""

from collections.abc import Iterator
from typing import Any

from jax.interpreters import ad
import jax.numpy as jnp

from ..cache import (
  addressing,
  batching,
  checks,
  layouts,
  sharding,
  violations,
)
from ..common import arrays, dispatch, jax_private, libraries
from . import ffi, reference

_PALLAS = f"{__package__}.pallas_tpu"


def _abstract_eval(*avals, **params):
  del params
  return tuple(arrays.out_aval(c.shape, c.dtype, *avals) for c in avals[:2])


def _batching(op, args, dims, **params):
  at = addressing.Addressing(**params)
  moved, size = arrays.move_batch_to_front(args, dims)
  x, dims = reference.named(moved), reference.named(dims)
  del x["first_slot"]
  folded = batching.fold_batch(x, size, at.layout)
  folded["first_slot"] = jnp.int32(0)
  params["aligned"] = False
  params["uniform"] = batching.uniform_of_batch(at.uniform, dims)
  return op(*(folded[name] for name in dims), **params), (0, 0)


def _sharding_rule(avals, **params):
  at = addressing.Addressing(**params)
  x = reference.named(avals)
  cache, whole = sharding.cache_factors(
    len(x["cache_k"].shape), "b" if at.aligned else "r", at.layout
  )
  new = " ".join(("b", *at.layout.order("t", "n")))
  factors = {
    "cache_k": f"{cache} hk", "cache_v": f"{cache} hv",
    "new_k": f"{new} hk", "new_v": f"{new} hv",
    "index": "b", "count": "b", "layer": "b", "table": "b m",
    "first_slot": "", "k_scale": "b n", "v_scale": "b n",
  }  # fmt: skip
  whole |= {"hk", "hv", "t", "m"}
  if x["table"].shape[1] != 1:
    whole.add("s")
  if not at.aligned:
    whole.add("b")
  operands = ", ".join(factors[name] for name in x)
  rule = f"{operands} -> {cache} hk, {cache} hv"
  return rule, sharding.in_order(rule, whole)


def _partition(mesh, arg_infos, result_infos, call, **params):
  del mesh, result_infos
  at = addressing.Addressing(**params)
  infos = reference.named(arg_infos)
  split = sharding.Split.of(
    infos["cache_k"], infos["table"].shape[1], at.layout, at.aligned
  )
  cache, new = split.cache(), split.tokens()
  specs = {
    "cache_k": cache, "cache_v": cache, "new_k": new, "new_v": new,
    "index": split.batch(), "count": split.batch(), "layer": split.batch(),
    "table": split.batch(None), "first_slot": split.replicated(),
    "k_scale": split.per_head(), "v_scale": split.per_head(),
  }  # fmt: skip

  def local(*operands):
    x = reference.named(operands)
    x["table"], x["first_slot"] = split.readdress(
      x["cache_k"], x["table"], x["first_slot"]
    )
    return call(*x.values(), **params)

  return local, (cache, cache), tuple(specs[name] for name in infos)


def _violations(
  *operands: Any, **params: Any
) -> Iterator[violations.Violation]:
  at = addressing.Addressing(**params)
  x = reference.named(operands)
  yield from violations.position_violations(
    addressing.Geometry.of(x["cache_k"], x["cache_v"], at.layout),
    addressing.Places.of(x),
    x["new_k"].shape[at.layout.tokens_axis],
    at.ring,
  )


def _jvp(primals, tangents, *, implementation, **params):
  out = UPDATE(*primals, implementation=implementation, **params)
  if checks.is_quantized(primals[0].dtype):
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
      name="cpu", platforms=("cpu",), fn=ffi.update, library=ffi.LIBRARY
    ),
    dispatch.Implementation(
      name="cuda",
      platforms=("cuda",),
      fn=ffi.update,
      library=ffi.CUDA_LIBRARY,
    ),
    dispatch.Implementation(
      name="pallas",
      platforms=("tpu",),
      partitionable=False,
      fn=libraries.lazily(_PALLAS, "update"),
      unsupported=libraries.lazily(_PALLAS, "unsupported"),
    ),
  ),
  batching=_batching,
  partitioning=dispatch.Partitioning(_sharding_rule, _partition),
  static_types={"layout": layouts.Layout},
)
ad.primitive_jvps[UPDATE.primitive] = _jvp
jax_private.add_checkify_rule(UPDATE.primitive, _violations)
