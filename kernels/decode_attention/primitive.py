"""The primitives of decode attention: what runs where, how they are split.

There are two, of the same operands but for the new rows: one appends them and
attends, the other only attends. Operands are named by `Options.fields`.
"""

import dataclasses

import jax
from jax import lax
from jax.interpreters import ad
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from ..cache import batching, sharding
from ..cache import checks as cache_checks
from ..common import arrays, dispatch, jax_private, libraries
from . import checks, ffi, reference

_PALLAS = f"{__package__}.pallas_tpu"

# Operands that a batch does not have an axis of.
_SHARED = ("rope_cos", "rope_sin", "sinks")

# Operands `[b, n, g, ...]`, any axis of which may be 1.
_PER_LOGIT = ("alibi_slopes", "bias", "mask")


def _abstract(*avals, options):
  return tuple(
    arrays.out_aval(result.shape, result.dtype, *avals)
    for result in reference.results(avals, options)
  )


def _batching(op, args, dims, *, options):
  x = options.named(args)
  dims = options.named(dims)
  if dims["first_slot"] is not None:
    raise NotImplementedError("`first_slot` cannot be mapped over.")
  size = next(
    x[name].shape[dim] for name, dim in dims.items() if dim is not None
  )

  def front(name):
    value, dim = x[name], dims[name]
    if dim is None:
      return jnp.broadcast_to(value, (size, *value.shape))
    return jnp.moveaxis(value, dim, 0)

  batch = front("layer").shape[1]
  if any(dims.get(name) is not None for name in _SHARED):
    return _batching_shared(op, x, dims, size, options)
  values = {
    name: front(name) for name in x if name not in (*_SHARED, "first_slot")
  }
  for name in _PER_LOGIT:
    if name in values and values[name].shape[1] != batch:
      value = values[name]
      values[name] = jnp.broadcast_to(value, (size, batch, *value.shape[2:]))
  folded = batching.fold_batch(values, size, options.layout)
  options = dataclasses.replace(
    options,
    aligned=False,
    uniform=batching.uniform_of_batch(options.uniform, dims),
  )
  results = op(
    *(folded[name] if name in folded else x[name] for name in options.fields),
    options=options,
  )
  *caches, out, lse = results

  def unfold(a):
    return a.reshape((size, batch, *a.shape[1:]))

  return (*caches, unfold(out), unfold(lse)), (0,) * len(results)


def _batching_shared(op, x, dims, size, options):
  """Maps over what a batch shares: one call for each, in a loop."""

  def step(carry, i):
    taken = [
      lax.dynamic_index_in_dim(x[name], i, dims[name], keepdims=False)
      if dims[name] is not None
      else x[name]
      for name in options.fields
    ]
    return carry, tuple(op(*taken, options=options))

  _, results = lax.scan(step, None, jnp.arange(size))
  return results, (0,) * len(results)


def _sharding_rule(avals, *, options):
  x = options.named(avals)
  row = "b" if options.aligned else "r"
  cache, whole = sharding.cache_factors(
    len(x["cache_k"].shape), row, options.layout
  )
  new = " ".join(("b", *options.layout.order("t", "n")))
  query = " ".join(("b", *options.layout.order("t", "n", "g")))
  whole |= {"hk", "hv", "t", "g", "m", "p", "c"}
  paged = x["table"].shape[1] != 1
  if paged:
    whole.add("s")
  if not options.aligned:
    whole.add("b")
  fixed = {
    "cache_k": f"{cache} hk", "cache_v": f"{cache} hv",
    "new_k": f"{new} hk", "new_v": f"{new} hv",
    "q": f"{query} hk", "qv": f"{query} hv",
    "index": "b", "count": "b", "layer": "b", "table": "b m",
    "first_slot": "", "k_scale": "b n", "v_scale": "b n",
    "rope_cos": "p c", "rope_sin": "p c", "rope_positions": "b t",
    "left_padding": "b", "sinks": "n g",
  }  # fmt: skip
  operands = []
  for name in options.fields:
    if name in fixed:
      operands.append(fixed[name])
      continue
    # Axes of size 1 are nobody's factor.
    axes = ("b", "n", "g", "t", "z" if paged else "s")[: len(x[name].shape)]
    sizes = zip(axes, x[name].shape)
    words = [
      f"{name.replace('_', '')}{i}" if size == 1 and axis != "t" else axis
      for i, (axis, size) in enumerate(sizes)
    ]
    whole |= {word for word in words if word not in ("b", "n", "s")}
    operands.append(" ".join(words))
  results = [f"{query} hv", "b n g t"]
  if options.appends:
    results = [f"{cache} hk", f"{cache} hv", *results]
  rule = f"{', '.join(operands)} -> {', '.join(results)}"
  return rule, sharding.in_order(rule, whole)


def _partition(mesh, arg_infos, result_infos, call, *, options):
  del mesh, result_infos
  infos = options.named(arg_infos)
  split = sharding.Split.of(
    infos["cache_k"], infos["table"].shape[1], options.layout, options.aligned
  )
  heads, query = split.heads, split.tokens(None)
  per_logit = (split.batch()[0], heads, None, None, split.slots)
  fixed = {
    "cache_k": split.cache(), "cache_v": split.cache(),
    "new_k": split.tokens(), "new_v": split.tokens(),
    "q": query, "qv": query,
    "k_scale": split.per_head(), "v_scale": split.per_head(),
    "first_slot": split.replicated(),
    "rope_cos": split.replicated(), "rope_sin": split.replicated(),
    "sinks": P(heads),
  }  # fmt: skip
  specs = []
  for name in options.fields:
    if name in fixed:
      specs.append(fixed[name])
    elif name in _PER_LOGIT:
      specs.append(
        P(
          *(
            None if size == 1 else axis
            for axis, size in zip(per_logit, infos[name].shape)
          )
        )
      )
    else:
      specs.append(split.batch())
  # Devices that hold other keys of the same sequences.
  partners = arrays.mesh_axes(split.slots) + (
    () if options.aligned else arrays.mesh_axes(split.rows)
  )

  def local(*operands):
    x = options.named(operands)
    x["table"], x["first_slot"] = split.readdress(
      x["cache_k"], x["table"], x["first_slot"]
    )
    if not partners:
      return call(*x.values(), options=options)
    sinks = x.pop("sinks", None)
    part = dataclasses.replace(options, fields=tuple(x), out_dtype="float32")
    *caches, out, lse = call(*x.values(), options=part)
    out, lse = _join(out, lse, sinks, x, options, partners)
    return (*caches, out.astype(options.out_dtype), lse)

  results = [query, split.batch(heads, None, None)]
  if options.appends:
    results = [split.cache(), split.cache(), *results]
  return local, tuple(results), tuple(specs)


def _join(out, lse, sinks, x, options, partners):
  """Joins the results of devices that hold different keys."""

  def like_out(a):
    return options.layout.from_heads_first(a[..., None])

  largest = lax.pmax(lse, partners)
  if sinks is not None:
    tokens = lse.shape[-1]
    real = jnp.arange(tokens) < x["count"][:, None, None, None]
    sinks = jnp.where(real, sinks[..., None], -jnp.inf)
    largest = jnp.maximum(largest, sinks)
  base = jnp.where(jnp.isneginf(largest), 0.0, largest)
  weight = jnp.exp(lse - base)
  total = lax.psum(weight, partners)
  if sinks is not None:
    total += jnp.exp(sinks - base)
  safe = jnp.where(total == 0, 1.0, total)
  out = lax.psum(out * like_out(weight), partners) / like_out(safe)
  return out, jnp.where(total == 0, -jnp.inf, base + jnp.log(safe))


def _make_jvp(op, function):
  def rule(primals, tangents, *, implementation, options):
    x = options.named(primals)
    moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]
    names = {options.fields[i] for i in moving}
    if cache_checks.is_quantized(x["cache_k"].dtype) and names & {
      "cache_k", "cache_v", "new_k", "new_v",
    }:  # fmt: skip
      raise TypeError(
        "`decode_attention` with a quantised cache cannot be differentiated"
        " with respect to the cache or the new rows: rounding to"
        f" {x['cache_k'].dtype.name} has no useful derivative. Keep the cache"
        " in a floating dtype, or stop gradients at its inputs."
      )

    def of_moving(*values):
      full = list(primals)
      for i, value in zip(moving, values):
        full[i] = value
      return tuple(function(*full, options=options))

    out = op(*primals, implementation=implementation, options=options)
    _, derivatives = jax.jvp(
      of_moving,
      tuple(primals[i] for i in moving),
      tuple(tangents[i] for i in moving),
    )
    return out, list(derivatives)

  return rule


def _make_op(name, function):
  op = dispatch.Op(
    name,
    abstract_eval=_abstract,
    reference=function,
    implementations=(
      dispatch.Implementation(
        name="cpu", platforms=("cpu",), fn=ffi.cpu, library=ffi.LIBRARY
      ),
      dispatch.Implementation(
        name="cuda",
        platforms=("cuda",),
        fn=ffi.cuda,
        library=ffi.CUDA_LIBRARY,
        unsupported=ffi.unsupported_on_cuda,
      ),
      dispatch.Implementation(
        name="pallas",
        platforms=("tpu",),
        partitionable=False,
        fn=libraries.lazily(_PALLAS, function.__name__),
        unsupported=libraries.lazily(_PALLAS, "unsupported"),
      ),
    ),
    batching=_batching,
    partitioning=dispatch.Partitioning(_sharding_rule, _partition),
    static_types={"options": reference.Options},
  )
  ad.primitive_jvps[op.primitive] = _make_jvp(op, function)
  jax_private.add_checkify_rule(op.primitive, checks.value_violations)
  return op


APPEND = _make_op("decode_attention", reference.append_and_attend)
ATTEND = _make_op("decode_attention_attend", reference.attend)
