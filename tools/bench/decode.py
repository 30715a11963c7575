"""Suite `decode`: one decoder step, which appends K and V and attends.

The baseline is what flax.nnx's MultiHeadAttention does in decode mode between
its projections: write the cache, mask the positions not yet written, attend
over the whole buffer. It takes one token at a time; for several, a chunk of a
prompt or speculative tokens, each gets a mask of its own. The baseline is
jitted and donated. Where PyTorch is installed its
`scaled_dot_product_attention` on the valid slice is a further baseline.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import importlib.util
from typing import Any

from flax import nnx as flax_nnx
import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from kernels import decode_attention
from kernels.decode_attention import arg_specs
from tools.bench import choice, compare, harness, int8

NAME = "decode"
_DTYPES = ("float32", "bfloat16", "int8")
_LAYERS = 16

State = tuple[Any, ...]


def _has_row(spec: arg_specs.ArgSpec) -> bool:
  """Says whether the baselines can do it and no other dtype's row is it."""
  return spec.layers is None and not spec.name.endswith(
    ("_bf16", "_int8", "_fp8")
  )


_SPECS = tuple(spec for spec in arg_specs.ARG_SPECS if _has_row(spec))
# The first tokens must cost the same in a longer buffer.
_LONGER = dataclasses.replace(
  _SPECS[0], name="B8_S8192_H16_D64_first", length=8192
)
# The last chunk of a long prompt: all of the buffer is valid.
_LAST_CHUNK = dataclasses.replace(
  next(spec for spec in _SPECS if spec.name.endswith("_prefill")),
  name="llama_3_1_8b_prefill_last",
  filled=None,
)
_STACKED = next(spec for spec in arg_specs.ARG_SPECS if spec.layers == _LAYERS)
_QUICK_LENGTH = 256
_QUICK_SPECS = tuple(
  dataclasses.replace(
    _SPECS[0],
    name=f"B8_S{_QUICK_LENGTH}_H16_D64_{fill}",
    length=_QUICK_LENGTH,
    filled=filled,
  )
  for fill, filled in (("first", 8), ("full", None))
)
_QUICK_STACKED = dataclasses.replace(_STACKED, length=128, layers=4)


def _integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Returns int8 values; times `int8.SCALE` they are the data of every dtype.

  Multiples of 1/32 between -2 and 2 are exact in every dtype here, so that both
  sides quantise to the same integers.
  """
  random = np.random.default_rng(seed)
  return random.integers(-64, 65, shape, dtype=np.int8)


@functools.partial(jax.jit, static_argnums=1)
def _as_dtype(integers: jax.Array, dtype: str) -> jax.Array:
  if dtype == "int8":
    # An addition, or jit would hand back the very same buffer.
    return integers + jnp.int8(0)
  return (integers.astype(jnp.float32) * int8.SCALE).astype(dtype)


def _float_dtype(dtype: str) -> str:
  """Returns the dtype of queries and results for caches of `dtype`."""
  return "bfloat16" if dtype == "int8" else dtype


def _attend(q, cache_k, cache_v, index):
  """Attends over the whole buffer, masked: what flax.nnx does."""
  (batch, length), tokens = cache_k.shape[:2], q.shape[1]
  last = index + jnp.arange(tokens)[:, None]
  mask = jnp.arange(length) <= last
  mask = jnp.broadcast_to(mask, (batch, 1, tokens, length))
  return flax_nnx.dot_product_attention(q, cache_k, cache_v, mask=mask)


def _flax_step(cache_k, cache_v, q, new_k, new_v, index):
  """Takes a step of flax.nnx's MultiHeadAttention in decode mode."""
  start = (0, index, 0, 0)
  cache_k = lax.dynamic_update_slice(cache_k, new_k, start)
  cache_v = lax.dynamic_update_slice(cache_v, new_v, start)
  return cache_k, cache_v, _attend(q, cache_k, cache_v, index)


def _flax_int8_step(cache_k, cache_v, q, new_k, new_v, index):
  """Does the same on int8 caches, which are widened for the attention."""

  def widen(cache):
    return (cache.astype(jnp.float32) * int8.SCALE).astype(q.dtype)

  start = (0, index, 0, 0)
  cache_k = lax.dynamic_update_slice(cache_k, int8.quantise(new_k), start)
  cache_v = lax.dynamic_update_slice(cache_v, int8.quantise(new_v), start)
  out = _attend(q, widen(cache_k), widen(cache_v), index)
  return cache_k, cache_v, out


def _ours_step(cache_k, cache_v, q, new_k, new_v, index):
  """Appends the new rows and attends over the valid prefix, in one call."""
  scale = jnp.float32(int8.SCALE) if cache_k.dtype == jnp.int8 else None
  return decode_attention(
    cache_k, cache_v, q, new_k, new_v, index, k_scale=scale, v_scale=scale
  )


def _jax_side(
  name: str,
  step: Callable[..., State],
  fresh: Callable[[], State],
  observe: Callable[[State], Any] = lambda result: result,
) -> harness.Side:
  """Makes a side that donates its caches, which come first in its state."""
  jitted = jax.jit(step, donate_argnums=(0, 1))
  return harness.Side(
    name=name,
    fresh=fresh,
    call=lambda state: jitted(*state),
    advance=lambda state, result: (*result[:2], *state[2:]),
    observe=lambda state, result: observe(result),
  )


@dataclasses.dataclass(frozen=True)
class _Data:
  """The integers that every side's input is made from."""

  cache_k: jax.Array
  cache_v: jax.Array
  q: jax.Array
  new_k: jax.Array
  new_v: jax.Array
  index: jax.Array

  @classmethod
  def make(cls, spec: arg_specs.ArgSpec) -> "_Data":
    """Returns the data of one layer."""
    # A stacked spec's caches have one more axis in front.
    cache = spec.cache_shape[-4:]
    return cls(
      cache_k=jnp.asarray(_integers(cache, seed=0)),
      cache_v=jnp.asarray(_integers(cache, seed=1)),
      q=jnp.asarray(_integers(spec.query_shape, seed=2)),
      new_k=jnp.asarray(_integers(spec.new_shape, seed=3)),
      new_v=jnp.asarray(_integers(spec.new_shape, seed=4)),
      index=jnp.int32(spec.index),
    )

  def as_dtype(self, dtype: str) -> State:
    """Returns new caches of `dtype`, then the operands of one step."""
    small = _float_dtype(dtype)
    return (
      _as_dtype(self.cache_k, dtype),
      _as_dtype(self.cache_v, dtype),
      _as_dtype(self.q, small),
      _as_dtype(self.new_k, small),
      _as_dtype(self.new_v, small),
      self.index,
    )


def _quantised(result: State) -> State:
  """Returns a floating-point result with its caches as int8 would hold them."""
  return (
    *(
      jnp.round(cache.astype(jnp.float32) / int8.SCALE).astype(jnp.int8)
      for cache in result[:2]
    ),
    result[2],
  )


def _torch_side(data: _Data, spec: arg_specs.ArgSpec) -> harness.Side:
  """Makes a side that appends and attends with PyTorch on the valid slice."""
  import torch  # pyright: ignore[reportMissingImports]

  dtype, valid = spec.dtype, spec.index + spec.tokens
  options: dict[str, Any] = {"enable_gqa": True} if spec.group > 1 else {}
  if spec.tokens > 1:
    last = torch.arange(spec.index, valid)[:, None]
    options["attn_mask"] = torch.arange(valid) <= last

  def to_torch(integers: jax.Array) -> Any:
    # [b, s, n, h] to PyTorch's own order, [b, n, s, h].
    values = torch.from_numpy(np.array(integers)).float() * int8.SCALE
    values = values.to(getattr(torch, dtype))
    return values.transpose(1, 2).contiguous()

  def to_jax(tensor: Any) -> jax.Array:
    return jnp.asarray(tensor.float().numpy()).swapaxes(1, 2).astype(dtype)

  def step(state: State) -> State:
    cache_k, cache_v, q, new_k, new_v = state
    with torch.inference_mode():
      cache_k[:, :, spec.index : valid] = new_k
      cache_v[:, :, spec.index : valid] = new_v
      out = torch.nn.functional.scaled_dot_product_attention(
        q, cache_k[:, :, :valid], cache_v[:, :, :valid], **options
      )
    return cache_k, cache_v, out

  integers = (data.cache_k, data.cache_v, data.q, data.new_k, data.new_v)
  return harness.Side(
    name="torch scaled_dot_product_attention",
    # Written in place, to the same values at every call.
    fresh=functools.cache(lambda: tuple(map(to_torch, integers))),
    call=step,
    observe=lambda state, result: tuple(map(to_jax, result)),
  )


_TOLERANCES = {
  "float32": compare.Tolerance(1e-4, 1e-5),
  # Weights and results are rounded to 8 bits on one side or the other.
  "bfloat16": compare.Tolerance(2e-2, 2e-2),
}


def _build_step(spec: arg_specs.ArgSpec) -> harness.Comparison:
  """Builds the row of one layer and dtype of the caches."""
  data, dtype = _Data.make(spec), spec.dtype
  flax_step = _flax_int8_step if dtype == "int8" else _flax_step
  fresh = functools.partial(data.as_dtype, dtype)
  baselines = [_jax_side("flax.nnx attention core, jit", flax_step, fresh)]
  if dtype == "int8":
    baselines.append(
      _jax_side(
        "kernels.decode_attention, bfloat16",
        _ours_step,
        functools.partial(data.as_dtype, "bfloat16"),
        _quantised,
      )
    )
  elif importlib.util.find_spec("torch") is not None:
    baselines.append(_torch_side(data, spec))
  return harness.Comparison(
    ours=_jax_side("kernels.decode_attention", _ours_step, fresh),
    baselines=baselines,
    floor_traffic=harness.Traffic(read=spec.bytes_read, written=0),
    floor_name="one read of the valid K and V at memory bandwidth",
    tolerance=_TOLERANCES[_float_dtype(dtype)],
    details=choice.chosen(_ours_step, *fresh()),
  )


def _after(q, before):
  """Returns a query that waits for what the layer before puts out.

  As in a model; layers that need nothing of each other would be run at once.
  """
  return q + 0 * before


def _ours_stacked(cache_k, cache_v, q, new_k, new_v, index):
  """Runs all layers in one scan, the stacked caches in its carry."""

  def layer_step(carry, layer_input):
    cache_k, cache_v, before = carry
    layer, q, new_k, new_v = layer_input
    *caches, out = decode_attention(
      cache_k, cache_v, _after(q, before), new_k, new_v, index, layer=layer
    )
    return (*caches, out), out

  layers = jnp.arange(cache_k.shape[0], dtype=jnp.int32)
  (*caches, _), out = lax.scan(
    layer_step,
    (cache_k, cache_v, jnp.zeros_like(q[0])),
    (layers, q, new_k, new_v),
  )
  return *caches, out


def _ours_layer_by_layer(caches_k, caches_v, q, new_k, new_v, index):
  """Runs all layers one after the other, each with caches of its own."""
  results, before = [], jnp.zeros_like(q[0])
  for i, caches in enumerate(zip(caches_k, caches_v, strict=True)):
    results.append(
      _ours_step(*caches, _after(q[i], before), new_k[i], new_v[i], index)
    )
    before = results[-1][2]
  caches_k, caches_v, out = zip(*results, strict=True)
  return caches_k, caches_v, jnp.stack(out)


def _flax_stacked(cache_k, cache_v, q, new_k, new_v, index):
  """Runs all layers in a scan, which takes caches apart and stacks them."""

  def layer_step(before, layer_input):
    cache_k, cache_v, q, new_k, new_v = layer_input
    *caches, out = _flax_step(
      cache_k, cache_v, _after(q, before), new_k, new_v, index
    )
    return out, (*caches, out)

  _, result = lax.scan(
    layer_step, jnp.zeros_like(q[0]), (cache_k, cache_v, q, new_k, new_v)
  )
  return result


def _build_stacked(spec: arg_specs.ArgSpec) -> harness.Comparison:
  """Builds the row of a stack of layers, full."""
  data, dtype, layers = _Data.make(spec), spec.dtype, spec.layers
  assert layers is not None

  def fresh() -> State:
    cache_k, cache_v, q, new_k, new_v, index = data.as_dtype(dtype)

    def stack(x: jax.Array) -> jax.Array:
      return jnp.broadcast_to(x, (layers, *x.shape)).copy()

    return *map(stack, (cache_k, cache_v, q, new_k, new_v)), index

  def fresh_by_layer() -> State:
    cache_k, cache_v, *operands, index = data.as_dtype(dtype)
    caches = (
      tuple(cache.copy() for _ in range(layers)) for cache in (cache_k, cache_v)
    )
    stacked = (jnp.broadcast_to(x, (layers, *x.shape)).copy() for x in operands)
    return *caches, *stacked, index

  def stack_caches(result: State) -> State:
    return jnp.stack(result[0]), jnp.stack(result[1]), result[2]

  return harness.Comparison(
    ours=_jax_side("kernels.decode_attention in scan", _ours_stacked, fresh),
    baselines=[
      _jax_side(
        "the same layer by layer, jit",
        _ours_layer_by_layer,
        fresh_by_layer,
        stack_caches,
      ),
      _jax_side("flax.nnx attention core in scan", _flax_stacked, fresh),
    ],
    floor_traffic=harness.Traffic(read=spec.bytes_read * layers, written=0),
    floor_name="one read of the valid K and V at memory bandwidth",
    tolerance=_TOLERANCES[dtype],
    details=choice.chosen(_ours_stacked, *fresh()),
  )


def _step_specs(quick: bool) -> list[arg_specs.ArgSpec]:
  """Returns every layer, the ones named by their shape in every dtype."""
  named: tuple[arg_specs.ArgSpec, ...] = _QUICK_SPECS
  others: tuple[arg_specs.ArgSpec, ...] = ()
  if not quick:
    named = tuple(s for s in _SPECS if s.name.startswith("B")) + (_LONGER,)
    # XLA has no float16 attention on the CPU: those layers are in bfloat16.
    others = tuple(
      dataclasses.replace(s, dtype="bfloat16")
      for s in (*_SPECS, _LAST_CHUNK)
      if not s.name.startswith("B")
    )
  return [
    dataclasses.replace(spec, dtype=dtype)
    for spec in named
    for dtype in _DTYPES
  ] + list(others)


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every layer and dtype, and a stack of layers."""
  stacked = _QUICK_STACKED if settings.quick else _STACKED
  rows = [("step", spec, _build_step) for spec in _step_specs(settings.quick)]
  rows.append((f"stacked{stacked.layers}", stacked, _build_stacked))
  return [
    harness.Case(
      NAME, op, spec.name, spec.dtype, functools.partial(build, spec)
    )
    for op, spec, build in rows
  ]
