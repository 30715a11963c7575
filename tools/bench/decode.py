"""Suite `decode`: one decoder step, which appends K and V and attends.

The baseline is what flax.nnx's MultiHeadAttention does in decode mode between
its projections: write the cache, mask the positions not yet written, attend
over the whole buffer. It is jitted and donated. Where PyTorch is installed its
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
from tools.bench import choice, compare, harness

NAME = "decode"
_DTYPES = ("float32", "bfloat16", "int8")
# All values are multiples of 1/32 between -2 and 2: exact in every dtype here,
# so that both sides quantise to the same integers.
_INT8_SCALE = 1 / 32
_LAYERS = 16

State = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class _Shape:
  """Caches `[batch, length, heads, head_dim]` and `groups` queries a head."""

  batch: int
  length: int
  heads: int
  head_dim: int
  groups: int = 1

  @property
  def name(self) -> str:
    groups = f"_gqa{self.groups}" if self.groups > 1 else ""
    return (
      f"B{self.batch}_S{self.length}_H{self.heads}_D{self.head_dim}{groups}"
    )

  def rows(self, length: int, heads: int) -> tuple[int, ...]:
    return (self.batch, length, heads, self.head_dim)

  def position(self, fill: str) -> int:
    """Returns the position that the step writes: the last valid one."""
    valid = {"first": 8, "half": self.length // 2, "full": self.length}[fill]
    return valid - 1


# A decoder of about 1 billion parameters, its first tokens in a longer buffer,
# and one long sequence on the heads of an 8-billion decoder.
_ROWS = (
  (_Shape(8, 2048, 16, 64), "first"),
  (_Shape(8, 2048, 16, 64), "half"),
  (_Shape(8, 2048, 16, 64), "full"),
  (_Shape(8, 8192, 16, 64), "first"),
  (_Shape(1, 32768, 8, 128, groups=4), "full"),
)
_QUICK_ROWS = (
  (_Shape(8, 256, 16, 64), "first"),
  (_Shape(8, 256, 16, 64), "full"),
)
_STACKED = _Shape(8, 2048, 16, 64)
_QUICK_STACKED = _Shape(8, 128, 16, 64)


def _integers(shape: tuple[int, ...], seed: int) -> np.ndarray:
  """Returns int8 values; divided by 32 they are the data of every dtype."""
  random = np.random.default_rng(seed)
  return random.integers(-64, 65, shape, dtype=np.int8)


@functools.partial(jax.jit, static_argnums=1)
def _as_dtype(integers: jax.Array, dtype: str) -> jax.Array:
  if dtype == "int8":
    # An addition, or jit would hand back the very same buffer.
    return integers + jnp.int8(0)
  return (integers.astype(jnp.float32) * _INT8_SCALE).astype(dtype)


def _float_dtype(dtype: str) -> str:
  """Returns the dtype of queries and results for caches of `dtype`."""
  return "bfloat16" if dtype == "int8" else dtype


def _attend(q, cache_k, cache_v, index):
  """Attends over the whole buffer, masked: what flax.nnx does."""
  batch, length = cache_k.shape[:2]
  mask = jnp.broadcast_to(jnp.arange(length) <= index, (batch, 1, 1, length))
  return flax_nnx.dot_product_attention(q, cache_k, cache_v, mask=mask)


def _flax_step(cache_k, cache_v, q, new_k, new_v, index):
  """One step of flax.nnx's MultiHeadAttention in decode mode."""
  start = (0, index, 0, 0)
  cache_k = lax.dynamic_update_slice(cache_k, new_k, start)
  cache_v = lax.dynamic_update_slice(cache_v, new_v, start)
  return cache_k, cache_v, _attend(q, cache_k, cache_v, index)


def _flax_int8_step(cache_k, cache_v, q, new_k, new_v, index):
  """The same on int8 caches, which are widened for the attention."""

  def quantise(rows):
    scaled = jnp.round(rows.astype(jnp.float32) / _INT8_SCALE)
    return jnp.clip(scaled, -127, 127).astype(jnp.int8)

  def widen(cache):
    return (cache.astype(jnp.float32) * _INT8_SCALE).astype(q.dtype)

  start = (0, index, 0, 0)
  cache_k = lax.dynamic_update_slice(cache_k, quantise(new_k), start)
  cache_v = lax.dynamic_update_slice(cache_v, quantise(new_v), start)
  out = _attend(q, widen(cache_k), widen(cache_v), index)
  return cache_k, cache_v, out


def _ours_step(cache_k, cache_v, q, new_k, new_v, index):
  """One call: appends the new rows and attends over the valid prefix."""
  scale = jnp.float32(_INT8_SCALE) if cache_k.dtype == jnp.int8 else None
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
  def make(cls, shape: _Shape, fill: str) -> "_Data":
    cache = shape.rows(shape.length, shape.heads)
    new = shape.rows(1, shape.heads)
    query = shape.rows(1, shape.heads * shape.groups)
    return cls(
      cache_k=jnp.asarray(_integers(cache, seed=0)),
      cache_v=jnp.asarray(_integers(cache, seed=1)),
      q=jnp.asarray(_integers(query, seed=2)),
      new_k=jnp.asarray(_integers(new, seed=3)),
      new_v=jnp.asarray(_integers(new, seed=4)),
      index=jnp.int32(shape.position(fill)),
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
      jnp.round(cache.astype(jnp.float32) / _INT8_SCALE).astype(jnp.int8)
      for cache in result[:2]
    ),
    result[2],
  )


def _torch_side(data: _Data, shape: _Shape, dtype: str) -> harness.Side:
  """Makes a side that appends and attends with PyTorch on the valid slice."""
  import torch

  valid = int(data.index) + 1
  options = {"enable_gqa": True} if shape.groups > 1 else {}

  def to_torch(integers: jax.Array) -> Any:
    # [b, s, n, h] to PyTorch's own order, [b, n, s, h].
    values = torch.from_numpy(np.array(integers)).float() * _INT8_SCALE
    values = values.to(getattr(torch, dtype))
    return values.transpose(1, 2).contiguous()

  def to_jax(tensor: Any) -> jax.Array:
    return jnp.asarray(tensor.float().numpy()).swapaxes(1, 2).astype(dtype)

  def step(state: State) -> State:
    cache_k, cache_v, q, new_k, new_v = state
    with torch.inference_mode():
      cache_k[:, :, valid - 1 : valid] = new_k
      cache_v[:, :, valid - 1 : valid] = new_v
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


def _build_step(shape: _Shape, fill: str, dtype: str) -> harness.Comparison:
  """Builds the row of one shape, fill and dtype of the caches."""
  data = _Data.make(shape, fill)
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
    baselines.append(_torch_side(data, shape, dtype))
  row_bytes = 2 * shape.batch * shape.heads * shape.head_dim
  row_bytes *= jnp.dtype(dtype).itemsize
  return harness.Comparison(
    ours=_jax_side("kernels.decode_attention", _ours_step, fresh),
    baselines=baselines,
    floor_traffic=harness.Traffic(
      read=row_bytes * shape.position(fill), written=row_bytes
    ),
    floor_name="one read of the valid K and V at memory bandwidth",
    tolerance=_TOLERANCES[_float_dtype(dtype)],
    details=choice.chosen(_ours_step, *fresh()),
  )


def _ours_stacked(cache_k, cache_v, q, new_k, new_v, index):
  """All layers in one scan, the stacked caches in its carry."""

  def layer_step(caches, layer_input):
    layer, q, new_k, new_v = layer_input
    *caches, out = decode_attention(
      *caches, q, new_k, new_v, index, layer=layer
    )
    return tuple(caches), out

  layers = jnp.arange(cache_k.shape[0], dtype=jnp.int32)
  caches, out = lax.scan(
    layer_step, (cache_k, cache_v), (layers, q, new_k, new_v)
  )
  return *caches, out


def _ours_layer_by_layer(caches_k, caches_v, q, new_k, new_v, index):
  """All layers one after the other, each with caches of its own."""
  results = [
    _ours_step(cache_k, cache_v, q[i], new_k[i], new_v[i], index)
    for i, (cache_k, cache_v) in enumerate(zip(caches_k, caches_v, strict=True))
  ]
  caches_k, caches_v, out = zip(*results, strict=True)
  return caches_k, caches_v, jnp.stack(out)


def _flax_stacked(cache_k, cache_v, q, new_k, new_v, index):
  """All layers in one scan, which takes the caches apart and stacks them."""

  def layer_step(_, layer_input):
    *caches, out = _flax_step(*layer_input, index)
    return None, (*caches, out)

  _, result = lax.scan(layer_step, None, (cache_k, cache_v, q, new_k, new_v))
  return result


def _build_stacked(shape: _Shape, dtype: str) -> harness.Comparison:
  """Builds the row of a stack of layers, full."""
  data = _Data.make(shape, "full")

  def fresh() -> State:
    cache_k, cache_v, q, new_k, new_v, index = data.as_dtype(dtype)

    def stack(x: jax.Array) -> jax.Array:
      return jnp.broadcast_to(x, (_LAYERS, *x.shape)).copy()

    return *map(stack, (cache_k, cache_v, q, new_k, new_v)), index

  def fresh_by_layer() -> State:
    cache_k, cache_v, *operands, index = data.as_dtype(dtype)
    caches = (
      tuple(cache.copy() for _ in range(_LAYERS))
      for cache in (cache_k, cache_v)
    )
    stacked = (
      jnp.broadcast_to(x, (_LAYERS, *x.shape)).copy() for x in operands
    )
    return *caches, *stacked, index

  def stack_caches(result: State) -> State:
    return jnp.stack(result[0]), jnp.stack(result[1]), result[2]

  valid_bytes = data.cache_k.size * jnp.dtype(dtype).itemsize * 2 * _LAYERS
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
    floor_traffic=harness.Traffic(read=valid_bytes, written=0),
    floor_name="one read of the valid K and V at memory bandwidth",
    tolerance=_TOLERANCES[dtype],
    details=choice.chosen(_ours_stacked, *fresh()),
  )


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every shape, fill and dtype, and a stack of layers."""
  rows = [
    harness.Case(
      NAME,
      "step",
      f"{shape.name}_{fill}",
      dtype,
      functools.partial(_build_step, shape, fill, dtype),
    )
    for shape, fill in (_QUICK_ROWS if settings.quick else _ROWS)
    for dtype in _DTYPES
  ]
  stacked = _QUICK_STACKED if settings.quick else _STACKED
  rows.append(
    harness.Case(
      NAME,
      "stacked16",
      f"{stacked.name}_full",
      "bfloat16",
      functools.partial(_build_stacked, stacked, "bfloat16"),
    )
  )
  return rows
