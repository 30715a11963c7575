"""A fuzzer of the FFI handlers, called by programs that lie.

A program of `jax.export` can name a handler with any operands, results and
attributes. The calls that the ops make are recorded, and one thing about one of
them is changed: the handler must refuse it, or do something in its own memory,
which AddressSanitizer watches over.
"""

from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from kernels import batch_stat, decode_attention, kv_cache
from tests.fuzz import kernels_attention, worker
from tests.fuzz import kernels_data as data

pick, chance = data.pick, data.chance
INT64 = np.iinfo(np.int64)


class Call(NamedTuple):
  """A call of a handler.

  Attributes:
    target: Its name.
    operands: Their types.
    results: Their types.
    attributes: By name.
    aliases: Which result has the buffer of which operand.
  """

  target: str
  operands: tuple[jax.ShapeDtypeStruct, ...]
  results: tuple[jax.ShapeDtypeStruct, ...]
  attributes: dict[str, Any]
  aliases: dict[int, int]


def recorded(function: Any, *args: Any, **kwargs: Any) -> list[Call]:
  """Returns the calls of handlers in what a function is lowered to."""
  calls = []
  real = jax.ffi.ffi_call

  def ffi_call(target, results, **options):
    call = real(target, results, **options)

    def record(*operands, **attributes):
      operands_like = [
        jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)) for x in operands
      ]
      of = results if isinstance(results, (tuple, list)) else (results,)
      aliases = dict(options.get("input_output_aliases") or {})
      calls.append(
        Call(target, tuple(operands_like), tuple(of), attributes, aliases)
      )
      return call(*operands, **attributes)

    return record

  with mock.patch.object(jax.ffi, "ffi_call", ffi_call):
    jax.jit(function).lower(*args, **kwargs)
  return calls


def _values(rng, of, capacity):
  """Draws an operand; integers, which are positions and addresses, of any."""
  if of.dtype == np.int32:
    kind = rng.integers(4)
    if kind < 2:
      return rng.integers(0, max(capacity, 1), of.shape).astype(np.int32)
    if kind == 2:
      return rng.integers(-3, 3 * capacity + 3, of.shape).astype(np.int32)
    far = data.INT32
    return rng.choice([far.min, far.max, -1, 0, far.max - 1], of.shape).astype(
      np.int32
    )
  if of.dtype == np.bool_:
    return rng.random(of.shape) < 0.7
  if np.issubdtype(of.dtype, np.integer):
    return rng.integers(0, 100, of.shape).astype(of.dtype)
  if np.issubdtype(of.dtype, np.complexfloating):
    return rng.normal(size=of.shape).astype(of.dtype)
  return data.normal(rng, of.shape, np.dtype(of.dtype).name)


_DTYPES = (
  "float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2",
  "int32", "bool", "uint8", "float64", "int64", "complex64",
)  # fmt: skip


def _other_dtype(rng, of):
  names = [name for name in _DTYPES if name != np.dtype(of.dtype).name]
  return jax.ShapeDtypeStruct(of.shape, data.dtype_of(pick(rng, *names)))


def _other_shape(rng, of):
  """Draws another shape: longer, shorter, empty, of another rank."""
  shape = list(of.shape)
  kind = rng.integers(6)
  axis = int(rng.integers(len(shape))) if shape else 0
  if not shape or kind == 0:
    shape.insert(axis, int(pick(rng, 1, 2, 0)))
  elif kind == 1:
    del shape[axis]
  elif kind == 2:
    shape[axis] += int(pick(rng, 1, 3, 64))
  elif kind == 3:
    shape[axis] = max(shape[axis] - 1, 0)
  elif kind == 4:
    shape[axis] = int(pick(rng, 0, 1))
  else:
    shape = [int(np.prod(shape))] if chance(rng) else shape[::-1]
  return jax.ShapeDtypeStruct(tuple(shape), of.dtype)


def _lie(rng, call: Call) -> tuple[Call, str, bool]:
  """Changes one thing; returns what, and whether it must be refused."""
  kinds = ["operand", "operand", "result", "result", "attribute", "arity"]
  kind = pick(rng, *kinds)
  operands, results = list(call.operands), list(call.results)
  attributes = dict(call.attributes)
  refused = False
  if kind == "operand":
    i = int(rng.integers(len(operands)))
    before = operands[i]
    change = pick(rng, _other_shape, _other_shape, _other_dtype)
    operands[i] = change(rng, before)
    what = f"operand {i}: {operands[i]} for {before}"
  elif kind == "result":
    i = int(rng.integers(len(results)))
    before = results[i]
    change = pick(rng, _other_shape, _other_shape, _other_dtype)
    results[i] = change(rng, before)
    # Nothing can be written that is right; of a batch's y, two dtypes are.
    refused = np.prod(results[i].shape) != np.prod(before.shape)
    what = f"result {i}: {results[i]} for {before}"
  elif kind == "attribute":
    name = pick(rng, *attributes)
    before = attributes[name]
    if chance(rng, 0.2):
      del attributes[name]
      refused, what = True, f"no `{name}`"
    elif chance(rng, 0.3):
      other = np.float32 if before.dtype != np.float32 else np.int64
      attributes[name] = other(3)
      refused, what = True, f"`{name}` of {other.__name__}"
    elif before.dtype == np.bool_:
      attributes[name] = np.bool_(not before)
      what = f"`{name}` turned"
    elif before.dtype == np.int64:
      value = pick(
        rng, -1, -2, 0, 1, 2, 3, 7, 1000, 2**31, 2**40, INT64.min, INT64.max
      )
      attributes[name] = np.int64(value)
      what = f"`{name}` = {value}"
    else:
      value = pick(rng, 0.0, -1.0, np.nan, np.inf, 1e30)
      attributes[name] = before.dtype.type(value)
      what = f"`{name}` = {value}"
  elif chance(rng) and operands:
    i = int(rng.integers(len(operands)))
    del operands[i]
    what = f"no operand {i}"
  elif chance(rng):
    i = int(rng.integers(len(operands) + 1))
    operands.insert(i, pick(rng, *call.operands))
    what = f"one more operand at {i}: {operands[i]}"
  else:
    i = int(rng.integers(len(results)))
    del results[i]
    refused, what = True, f"no result {i}"
  # XLA leaves out what has no result, or empty ones.
  refused &= any(np.prod(of.shape) for of in results)
  lied = Call(call.target, tuple(operands), tuple(results), attributes, {})
  if kind == "attribute" and chance(rng):
    lied = lied._replace(aliases=call.aliases)
  return lied, what, refused


def _run(rng, call: Call, capacity: int) -> None:
  function = jax.ffi.ffi_call(
    call.target, call.results, input_output_aliases=call.aliases
  )
  operands = [_values(rng, of, capacity) for of in call.operands]
  attributes = call.attributes
  with data.some_level(rng):
    jax.block_until_ready(
      jax.jit(lambda *xs: function(*xs, **attributes))(*operands)
    )


def _case(calls: list[Call], capacity: int) -> worker.Case:
  def case(rng: np.random.Generator) -> None:
    call = pick(rng, *calls)
    if chance(rng, 0.05):
      _run(rng, call, capacity)  # the truth
      return
    lied, what, refused = _lie(rng, call)
    with jax.enable_x64(True):
      try:
        _run(rng, lied, capacity)
      except jax.errors.JaxRuntimeError as error:
        assert len(str(error)) > 20, f"{call.target}, {what}: {error}"
      except (ValueError, TypeError):
        pass  # of jax itself, which did not get to the handler
      else:
        assert not refused, f"{call.target} takes {what}"

  return case


def cache(rng: np.random.Generator) -> worker.Case:
  """The handlers of the cache and of attention."""
  problem = kernels_attention.draw_problem(rng)
  args, index, kwargs = kernels_attention.draw_arrays(rng, problem)
  kwargs = problem.static | kwargs | {"implementation": "cpu"}
  function: Any = decode_attention.attend
  if problem.appends:
    function = decode_attention.decode_attention
    if chance(rng, 0.4):
      function = kv_cache.update
      del args[2]
      keep = {*kernels_attention.UPDATE_OPTIONS, "lengths", "implementation"}
      kwargs = {name: kwargs[name] for name in keep if name in kwargs}

  def call(arrays):
    return function(
      *arrays[0], **({k: v for k, v in kwargs.items() if k not in arrays[1]}),
      **arrays[1],
    )  # fmt: skip

  traced = {k: v for k, v in kwargs.items() if isinstance(v, np.ndarray)}
  calls = recorded(call, ([*args, index], traced))
  return _case(calls, problem.capacity)


def statistics(rng: np.random.Generator) -> worker.Case:
  """The handlers of batch normalisation."""
  rank = int(rng.integers(1, 5))
  shape = tuple(int(size) for size in rng.integers(1, 9, rank))
  axis = int(rng.integers(rank))
  dtype = pick(rng, *data.FLOATS)
  stat = data.normal(rng, (shape[axis],), "float32")
  x = data.normal(rng, shape, dtype)
  mask = pick(rng, None, np.ones(shape, bool))
  options: dict[str, Any] = {
    "feature_axis": axis, "mask": mask, "implementation": "cpu",
    "use_fast_variance": chance(rng),
  }  # fmt: skip

  def update(x, mean, var):
    own = batch_stat.update(x, mean, var, **options)
    parts = jax.vmap(
      lambda x: batch_stat.update(x, mean, var, axis_name="i", **options),
      axis_name="i",
    )(x[None])
    return own, parts

  def norm(x, scale, bias):
    return batch_stat.batch_norm(
      x, scale, bias, stat, stat, activation=pick(rng, None, "relu"), **options
    ).y.sum()

  def both(x, stat):
    return update(x, stat, stat), jax.grad(norm, (0, 1, 2))(x, stat, stat)

  return _case(recorded(both, x, stat), 8)


FAMILIES = {"cache_artifacts": cache, "statistics_artifacts": statistics}
