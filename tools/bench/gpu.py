"""The ops on a GPU: how close to memory's speed, and beside what else there is.

The suites of this package wait for every call, which at a GPU's speed measures
the waiting. Here calls are queued, as a training or decoding loop queues them,
and only the last is waited for; what is over sooner than a program starts is
called for several layers in one program, as a model does, each with arrays of
its own. Every row says how many bytes must move, and what part of the bandwidth
of a plain copy, measured next to it, that comes to.

Run by tools/gpu_check.py, a process for as many rows as go well:

    python3 -m tools.bench.gpu update/65536x1024/float32

writes what the first device is called, then a record for each row, a line each.
After a row that fails the process ends: its device may be of no more use.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import importlib.util
import itertools
import json
import statistics
import time
import traceback
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from kernels import batch_stat, decode_attention, kv_cache

_SAMPLES = 7
_SAMPLE_SECONDS = 0.04
_COPY_BYTES = 2**30

# Between ours and XLA's results, see `_difference`; rounding is 1e-3 at most.
_LARGEST_DIFFERENCE = 1e-2

Arrays = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Row:
  """What to measure.

  Attributes:
    name: `op/case/dtype`.
    moved: Bytes that must be read or written.
    arguments: Makes the arrays, for an implementation.
    call: `call(implementation, *arrays) -> arrays`, the donated ones first.
    donated: Which arrays it donates.
    layers: How many of it one program has; times are those of one.
    steps: How often `call` does it, one after the other; times are those of
      one.
    baselines: Further things to compare with, as `call` without its first
      argument.
    torch: Makes what PyTorch does of so many layers, by name.
  """

  name: str
  moved: int
  arguments: Callable[[str], Arrays]
  call: Callable[..., Arrays]
  donated: tuple[int, ...] = ()
  layers: int = 1
  steps: int = 1
  baselines: dict[str, Callable[..., Arrays]] = dataclasses.field(
    default_factory=dict
  )
  torch: Callable[[int], dict[str, Callable[[], Any]]] | None = None


def device() -> str:
  """Returns what the first device calls itself."""
  return jax.devices()[0].device_kind


def _queue(step: Callable[[Any], Any], state: Any, count: int):
  """Returns the seconds of each of `count` calls, and the last state."""
  start = time.perf_counter()
  for _ in range(count):
    state, out = step(state)
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / count, state


class _Side:
  """Measures one thing, a sample at a time.

  Args:
    step: `state -> (state, results)`.
    state: The first.
  """

  def __init__(self, step: Callable[[Any], Any], state: Any):
    self._step = step
    _, state = _queue(step, state, 2)  # compiles
    seconds, self._state = _queue(step, state, 5)
    self._count = max(3, min(2000, round(_SAMPLE_SECONDS / seconds)))
    self.samples: list[float] = []

  def sample(self) -> None:
    """Adds the seconds of one call."""
    seconds, self._state = _queue(self._step, self._state, self._count)
    self.samples.append(seconds)


def _time(sides: Sequence[_Side]) -> None:
  """Takes samples of all sides by turns, so that all meet the same clocks."""
  for _ in range(_SAMPLES):
    for side in sides:
      side.sample()


def _stepping(call: Callable[..., Arrays], donated: tuple[int, ...]):
  """Returns `state -> (state, results)`; donated arrays are replaced.

  Args:
    call: What a layer does.
    donated: Which of its arrays it donates, in order; it returns those anew,
      before anything else. The state is a list of the arrays of each layer.
  """

  def split(arrays):
    kept = [x for place, x in enumerate(arrays) if place not in donated]
    return [arrays[place] for place in donated], kept

  def merge(given, kept):
    arrays = list(kept)
    for place, array in zip(donated, given, strict=True):
      arrays.insert(place, array)
    return arrays

  @functools.partial(jax.jit, donate_argnums=0)
  def run(given, kept):
    outs = [call(*merge(*arrays)) for arrays in zip(given, kept, strict=True)]
    number = len(donated)
    return [out[:number] for out in outs], [out[number:] for out in outs]

  def step(state):
    given, kept = zip(*map(split, state))
    new, out = run(given, kept)
    return [merge(*arrays) for arrays in zip(new, kept)], (new, out)

  return step


@jax.jit
def _norms(got: Any, want: Any) -> tuple[Any, Any]:
  """Returns the norms of the difference and of what is wanted."""
  got, want = (jnp.ravel(x).astype(jnp.float32) for x in (got, want))
  return jnp.linalg.norm(got - want), jnp.linalg.norm(want)


def _difference(got: Arrays, want: Arrays) -> float:
  """Returns how far the array that is furthest off is from what is wanted.

  As the norm of the difference beside the norm of the array. One element says
  nothing: where one is within rounding of 0, relu's gate may be open on one
  side alone, and its gradient is then all there or not at all.

  Args:
    got: Arrays.
    want: As many.

  Returns:
    0 where all are equal; NaN, which is less than no limit, where anything is
    NaN or infinite.
  """
  each = []
  for pair in zip(got, want, strict=True):
    difference, size = map(float, _norms(*pair))
    each.append(difference / (size or 1.0))
  return float(np.max(each))  # `max` would drop NaN


@functools.cache
def _copy_bandwidth() -> float:
  """Returns the bytes a second that a copy reads and writes."""
  x = jnp.ones(_COPY_BYTES // 4, jnp.float32)
  side = _Side(_stepping(jnp.negative, ()), [(x,)])
  _time([side])
  return 2 * _COPY_BYTES / statistics.median(side.samples)


def _sample(
  row: Row, calls: dict[str, Callable[..., Arrays]], whose: dict[str, str]
) -> tuple[dict[str, list[float]], dict[str, str]]:
  """Measures the sides of a row, whose arrays are all there until it returns.

  Args:
    row: What.
    calls: The sides by name; "ours" and "xla" must work.
    whose: For which implementation the arguments of each are made.

  Returns:
    The seconds of a call by side, some samples of each; and by those of the
    others that do not work, why.
  """
  sides, without = {}, {}
  for name, call in calls.items():
    try:
      sides[name] = _Side(
        _stepping(call, row.donated),
        [row.arguments(whose[name]) for _ in range(row.layers)],
      )
    except Exception as error:
      if name in ("ours", "xla"):
        raise
      without[name] = str(error)[:300]
  _time(list(sides.values()))
  return {name: side.samples for name, side in sides.items()}, without


def measure(row: Row, ours: str = "auto") -> dict[str, Any]:
  """Measures one row.

  Args:
    row: What.
    ours: The implementation to compare with "xla".

  Returns:
    Milliseconds of every side, the difference between ours and XLA's results,
    and what part of a copy's bandwidth ours has.

  Raises:
    ValueError: If ours and XLA's results differ by more than rounding.
  """
  record: dict[str, Any] = {
    "row": row.name, "bytes": row.moved, "layers": row.layers,
    "steps": row.steps, "ms": {},
  }  # fmt: skip
  calls: dict[str, Callable[..., Arrays]] = {
    "ours": functools.partial(row.call, ours),
    "xla": functools.partial(row.call, "xla"),
    **row.baselines,
  }
  # For whom the arguments are.
  whose = {name: name if name in ("xla", "cuda") else ours for name in calls}
  results = {}
  for name in ("ours", "xla"):
    arrays = row.arguments(whose[name])
    results[name] = jax.jit(calls[name])(*arrays)
    del arrays
  record["difference"] = _difference(results["ours"], results["xla"])
  del results
  if not record["difference"] < _LARGEST_DIFFERENCE:
    raise ValueError(
      f"`{row.name}` must have results within {_LARGEST_DIFFERENCE} of XLA's,"
      f" but differs by {record['difference']}: it is wrong, and not timed."
    )
  samples, without = _sample(row, calls, whose)
  each = 1e3 / row.layers / row.steps
  spread = {}
  for name, seconds in samples.items():
    record["ms"][name] = statistics.median(seconds) * each
    spread[name] = [min(seconds) * each, max(seconds) * each]
  if row.torch is not None and importlib.util.find_spec("torch") is not None:
    for name, run in row.torch(row.layers).items():
      try:
        record["ms"][name] = _time_torch(run) / row.layers
      except Exception as error:
        without[name] = str(error)[:300]
  if without:
    record["without"] = without
  record["spread_ms"] = spread
  bandwidth = row.moved / record["ms"]["ours"] * 1e3
  record["gigabytes_per_second"] = bandwidth / 1e9
  record["copy_gigabytes_per_second"] = _copy_bandwidth() / 1e9
  record["fraction_of_copy"] = bandwidth / _copy_bandwidth()
  return record


def _time_torch(run: Callable[[], Any]) -> float:
  """Returns the milliseconds of a call in a CUDA graph, by CUDA's events."""
  import torch

  for _ in range(3):
    run()
  torch.cuda.synchronize()
  graph = torch.cuda.CUDAGraph()
  with torch.cuda.graph(graph):
    run()
  samples = []
  for _ in range(_SAMPLES):
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(20):
      graph.replay()
    last.record()
    torch.cuda.synchronize()
    samples.append(first.elapsed_time(last) / 20)
  return statistics.median(samples)


def text(record: dict[str, Any]) -> str:
  """Says a record in a line."""
  if "error" in record:
    return f"FAILED {record['row']}\n{record['error']}"
  times = ", ".join(f"{name} {ms:.4f}" for name, ms in record["ms"].items())
  return (
    f"{record['row']}: {times} ms; {record['fraction_of_copy']:.2f} of a copy,"
    f" differs by {record['difference']:.1e}"
  )


def run(names: Sequence[str], tiny: bool) -> Iterator[dict[str, Any]]:
  """Measures rows by their names; yields their records, a failure as the last.

  Args:
    names: Of the rows.
    tiny: Whether to take sizes that are over at once: a rehearsal.
  """
  table = {row.name: row for row in rows(tiny)}
  for name in names:
    try:
      yield measure(table[name])
    except Exception:
      yield {"row": name, "error": traceback.format_exc()[-3000:]}
      return


def _normal(shape: Sequence[int], dtype: str, seed: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), tuple(shape), dtype)


# ---- batch_stat.

_BATCHES = (
  # Shape, dtype, feature axis, whether with a residual as well.
  ((256, 56, 56, 256), "bfloat16", -1, True),
  ((128, 112, 112, 64), "float32", -1, True),
  ((64, 56, 56, 256), "float16", -1, False),
  ((128, 256, 56, 56), "float32", 1, False),
  ((128, 256, 56, 56), "bfloat16", 1, True),
  ((65536, 1024), "float32", -1, False),
  ((32, 28, 28, 512), "float32", -1, True),
  ((32, 7, 7, 2048), "bfloat16", -1, True),
)


def _update(axis, implementation, mean, var, x):
  return batch_stat.update(
    x, mean, var, 0.9, feature_axis=axis, implementation=implementation
  )


def _forward(axis, implementation, mean, var, x, scale, bias):
  return batch_stat.batch_norm(
    x, scale, bias, mean, var, 0.9,
    feature_axis=axis, activation="relu", implementation=implementation,
  )[:3]  # fmt: skip


def _residual(axis, implementation, mean, var, x, scale, bias, residual):
  """A layer at the end of a residual block."""
  *averages, y = batch_stat.batch_norm(
    x, scale, bias, mean, var, 0.9,
    feature_axis=axis, implementation=implementation,
  )[:3]  # fmt: skip
  return *averages, jax.nn.relu(y + residual)


def _pull(implementation, pull, dy):
  del implementation
  return pull(dy)


def _batch_rows(tiny: bool) -> Iterator[Row]:
  for shape, dtype, axis, with_residual in _BATCHES:
    name = (
      f"{'x'.join(map(str, shape))}{'' if axis == -1 else '_first'}/{dtype}"
    )
    if tiny:
      shape = tuple(min(size, 8) for size in shape)
    channels = shape[axis]
    itemsize = jnp.dtype(dtype).itemsize
    size = int(np.prod(shape)) * itemsize

    def arguments(
      count, implementation, shape=shape, dtype=dtype, channels=channels
    ):
      del implementation
      stat = jnp.zeros(channels), jnp.ones(channels)
      affine = jnp.linspace(0.5, 1.5, channels), jnp.linspace(-1, 1, channels)
      x, residual = (_normal(shape, dtype, seed) for seed in (0, 2))
      return (*stat, x, *affine, residual)[:count]

    def gradient_of(layer, count, implementation, arguments=arguments):
      mean, var, *inputs = arguments(count, implementation)

      def run(*inputs):
        return layer(implementation, mean, var, *inputs)[2]

      # As a program of its own: a model's gradient comes from what follows.
      y, pull = jax.jit(functools.partial(jax.vjp, run))(*inputs)
      return pull, _normal(y.shape, y.dtype, 1)

    update = functools.partial(_update, axis)
    forward = functools.partial(_forward, axis)
    residual = functools.partial(_residual, axis)
    ops: list[tuple[str, Callable[..., Arrays], float, Callable[..., Arrays]]]
    ops = [
      ("update", update, 1, functools.partial(arguments, 3)),
      # x for the statistics, x again and y.
      ("batch_norm", forward, 3, functools.partial(arguments, 5)),
      # x and dy for the sums, x, dy and dx.
      (
        "batch_norm_grad", _pull, 5,
        functools.partial(gradient_of, forward, 5),
      ),
    ]  # fmt: skip
    if with_residual:
      ops += [
        # The residual as well.
        ("batch_norm_residual", residual, 4, functools.partial(arguments, 6)),
        # x, dy and the gate's bytes for the sums; the gradient behind the gate,
        # which is the residual's, written and read; x again and dx.
        (
          "batch_norm_residual_grad", _pull, 6 + 1 / itemsize,
          functools.partial(gradient_of, residual, 6),
        ),
      ]  # fmt: skip
    for op, call, passes, make in ops:
      yield Row(
        f"{op}/{name}",
        round(passes * size),
        make,
        call,
        donated=() if call is _pull else (0, 1),
        layers=16 if size < 2**26 else 4,
        # "auto" takes XLA for some.
        baselines={"cuda": functools.partial(call, "cuda")},
      )


# ---- kv_cache.


def _cache_rows(tiny: bool) -> Iterator[Row]:
  for kind, batch, length, dtype, new_dtype in (
    ("prefill", 8, 32768, "bfloat16", "bfloat16"),
    ("prefill", 8, 16384, "float32", "float32"),
    ("prefill", 8, 32768, "int8", "bfloat16"),
    ("token", 64, 4096, "bfloat16", "bfloat16"),
    ("token", 8, 32768, "bfloat16", "bfloat16"),
  ):
    name = f"{kind}_B{batch}_S{length}_N8_H128"
    if tiny:
      batch, length = 2, max(8, length // 1024)
    tokens = length if kind == "prefill" else 1
    # One update is over before a program starts.
    steps = 8 if kind == "token" else 1
    cache, new = (batch, length, 8, 128), (batch, tokens, 8, 128)

    def arguments(
      implementation,
      cache=cache,
      new=new,
      dtype=dtype,
      new_dtype=new_dtype,
      batch=batch,
    ):
      index = jnp.zeros(batch, jnp.int32)
      rows = (_normal(new, new_dtype, seed) for seed in (0, 1))
      return jnp.zeros(cache, dtype), jnp.zeros(cache, dtype), *rows, index

    def call(implementation, *args, dtype=dtype, steps=steps):
      scale = jnp.float32(1 / 32) if dtype == "int8" else None
      *caches, new_k, new_v, index = args
      for step in range(steps):
        caches = kv_cache.update(
          *caches, new_k, new_v, index + step,
          k_scale=scale, v_scale=scale, implementation=implementation,
        )  # fmt: skip
      return caches

    each = jnp.dtype(dtype).itemsize + jnp.dtype(new_dtype).itemsize
    yield Row(
      f"kv_cache.update/{name}/{dtype}",
      2 * int(np.prod(new)) * each,
      arguments,
      call,
      donated=(0, 1),
      layers=16 if kind == "token" else 1,
      steps=steps,
    )


# ---- decode_attention.


def _torch_attention(batch, length, heads, group, dtype, layers):
  """Returns what runs PyTorch's attention, on the valid slice alone.

  By name: a step with the backend that it chooses, and with its own flash
  attention, after a copy of the new row into the cache; and attending alone.
  """
  import torch

  kind = getattr(torch, dtype)
  q = torch.randn(batch, heads * group, 1, 128, dtype=kind, device="cuda")
  caches = [
    [
      torch.randn(batch, heads, length, 128, dtype=kind, device="cuda")
      for _ in range(2)
    ]
    for _ in range(layers)
  ]

  new = torch.randn(batch, heads, 1, 128, dtype=kind, device="cuda")

  def attend():
    with torch.inference_mode():
      for k, v in caches:
        torch.nn.functional.scaled_dot_product_attention(
          q, k, v, enable_gqa=True
        )

  def step():
    with torch.inference_mode():
      for k, v in caches:
        k[:, :, -1:] = new
        v[:, :, -1:] = new
        torch.nn.functional.scaled_dot_product_attention(
          q, k, v, enable_gqa=True
        )

  def flash():
    from torch.nn import attention

    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
      step()

  return {"torch": step, "torch_flash": flash, "torch_alone": attend}


def _cudnn(cache_k, cache_v, q, new_k, new_v, index):
  """Attends with cuDNN, as jax offers it, after an update in place."""
  cache_k, cache_v = kv_cache.update(cache_k, cache_v, new_k, new_v, index)
  out = jax.nn.dot_product_attention(
    q, cache_k, cache_v,
    key_value_seq_lengths=index + 1, implementation="cudnn",
  )  # fmt: skip
  return cache_k, cache_v, out


def _attend_alone(scale, cache_k, cache_v, q, new_k, new_v, index):
  """Attends to all keys but the last, without an update."""
  del new_k, new_v
  out = decode_attention.attend(
    cache_k, cache_v, q, index, k_scale=scale, v_scale=scale
  )
  return cache_k, cache_v, out


def _decode_rows(tiny: bool) -> Iterator[Row]:
  for batch, length, heads, group, dtype, layers in (
    (8, 32768, 8, 4, "bfloat16", 1),
    (8, 32768, 8, 4, "float16", 1),
    (4, 32768, 8, 4, "float32", 1),
    (8, 32768, 8, 4, "int8", 1),
    (8, 32768, 8, 4, "float8_e4m3fn", 1),
    (1, 32768, 8, 4, "bfloat16", 8),
    (8, 32768, 8, 1, "bfloat16", 1),
    (64, 2048, 8, 4, "bfloat16", 4),
    (128, 256, 8, 8, "bfloat16", 8),
  ):
    name = f"decode/B{batch}_S{length}_N{heads}_G{group}_H128/{dtype}"
    if tiny:
      batch, length = 2, max(8, length // 1024)
    quantised = dtype in ("int8", "float8_e4m3fn")
    small = "bfloat16" if quantised else dtype
    cache = (batch, length, heads, 128)

    def arguments(
      implementation,
      cache=cache,
      dtype=dtype,
      small=small,
      heads=heads,
      group=group,
    ):
      batch, length = cache[:2]
      keys = (
        jnp.round(_normal(cache, "float32", seed) * 8).astype(dtype)
        if dtype == "int8"
        else _normal(cache, "bfloat16", seed).astype(dtype)
        for seed in (0, 1)
      )
      q = _normal((batch, 1, heads * group, 128), small, 2)
      new = (_normal((batch, 1, heads, 128), small, seed) for seed in (3, 4))
      return *keys, q, *new, jnp.full(batch, length - 1, jnp.int32)

    def call(implementation, *args, quantised=quantised):
      scale = jnp.float32(1 / 8) if quantised else None
      return decode_attention(
        *args, k_scale=scale, v_scale=scale, implementation=implementation
      )

    spec = (batch, length, heads, group, dtype)
    alone = functools.partial(
      _attend_alone, np.float32(1 / 8) if quantised else None
    )
    half = {"cudnn": _cudnn} if dtype in ("bfloat16", "float16") else {}
    yield Row(
      name,
      2 * int(np.prod(cache)) * jnp.dtype(dtype).itemsize,
      arguments,
      call,
      donated=(0, 1),
      layers=layers,
      baselines={"attend": alone} | half,
      torch=None if quantised else functools.partial(_torch_attention, *spec),
    )


def rows(tiny: bool = False) -> Iterator[Row]:
  """Yields everything that there is to measure.

  Args:
    tiny: Whether at sizes that are over at once, for a rehearsal. Names say
      the real ones.
  """
  for row in itertools.chain(
    _cache_rows(tiny), _decode_rows(tiny), _batch_rows(tiny)
  ):
    layers = min(row.layers, 2) if tiny else row.layers
    yield dataclasses.replace(row, layers=layers)


def main(arguments: Sequence[str] | None = None) -> None:
  """Writes records of the rows that are named, a line of JSON each."""
  global _COPY_BYTES, _SAMPLE_SECONDS
  parser = argparse.ArgumentParser(prog="tools.bench.gpu")
  parser.add_argument("--tiny", action="store_true")
  parser.add_argument("rows", nargs="+")
  options = parser.parse_args(arguments)
  if options.tiny:
    _COPY_BYTES, _SAMPLE_SECONDS = 2**16, 1e-4

  def say(**what):
    print(json.dumps(what), flush=True)

  say(device=device())
  for record in run(options.rows, options.tiny):
    say(**record)


if __name__ == "__main__":
  main()
