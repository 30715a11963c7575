"""Measures the ops on a GPU: beside memory's speed, XLA, cuDNN and PyTorch.

A row is checked and timed by `harness`, as the rows of the suites are, but for
one thing: calls are queued, as a training or decoding loop queues them, and
only the last is waited for. At a GPU's speed the suites would measure the wait.
The floor is a plain copy of the bytes that must move, measured along with the
row.

Run by tools/gpu_check.py, a process for as many rows as go well:

    python3 -m tools.bench.gpu update/65536x1024/float32

writes what the first device is called, then a record for each row, a line each.
After a row that fails the process ends: its device may be of no more use.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import functools
import importlib.util
import json
import traceback
from typing import Any

import jax

from tools.bench import compare, gpu_rows, harness

# Another program, which sees of the bench this module alone, asks for these.
rows = gpu_rows.rows

_SETTINGS = harness.Settings(repeats=7, sample_seconds=0.04)
_TINY_SETTINGS = harness.Settings(quick=True, repeats=7, sample_seconds=1e-4)

# Rounding is 1e-3 at most.
_TOLERANCE = compare.NormTolerance(1e-2)


def device() -> str:
  """Returns what the first device calls itself."""
  return jax.devices()[0].device_kind


def _stepping(call: Callable[..., gpu_rows.Arrays], donated: tuple[int, ...]):
  """Returns `state -> (state, results)`; donated arrays are replaced.

  Args:
    call: what a layer does.
    donated: which of its arrays it donates, in order; it returns those anew,
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


def _side(
  row: gpu_rows.Row,
  name: str,
  call: Callable[..., gpu_rows.Arrays],
  *,
  made_for: str = "auto",
  compared: bool = True,
  optional: bool = True,
) -> harness.Side:
  """Makes a side whose arrays, some gigabytes, are made once and stay with it.

  Args:
    row: what to measure.
    name: of the side.
    call: what a layer does.
    made_for: the implementation that the arrays are made for.
    compared: whether it computes what the row does.
    optional: whether it may fail to run.
  """
  step = _stepping(call, row.donated)
  state: Any = None

  def fresh() -> Any:
    nonlocal state
    if state is None:
      state = [row.arguments(made_for) for _ in range(row.layers)]
    return state

  def run(given: Any) -> Any:
    nonlocal state
    state, results = step(given)
    return results

  def first_layer(_: Any, results: Any) -> Any:
    return [part[0] for part in results]

  return harness.Side(
    name,
    fresh,
    run,
    advance=lambda *_: state,
    observe=first_layer if compared else None,
    optional=optional,
  )


def _torch_side(name: str, run: Callable[[], Any]) -> harness.Side:
  """Makes a side that replays a CUDA graph, timed by CUDA's events.

  Args:
    name: of the side.
    run: what to capture.
  """
  replays = 20

  @functools.cache
  def captured() -> Any:
    import torch  # pyright: ignore[reportMissingImports]

    for _ in range(3):
      run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
      run()
    return graph

  def seconds(graph: Any) -> float:
    import torch  # pyright: ignore[reportMissingImports]

    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(replays):
      graph.replay()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1e3 / replays

  return harness.Side(
    name,
    fresh=captured,
    call=lambda graph: graph.replay(),
    stopwatch=seconds,
    optional=True,
  )


def build(row: gpu_rows.Row) -> harness.Comparison:
  """Returns the sides of a row: ours, XLA's, and what else runs here."""

  def of(implementation: str) -> Callable[..., gpu_rows.Arrays]:
    return functools.partial(row.call, implementation)

  baselines = [_side(row, "xla", of("xla"), made_for="xla", optional=False)]
  for name, call in row.baselines.items():
    made_for = "cuda" if name == "cuda" else "auto"
    baselines.append(_side(row, name, call, made_for=made_for))
  for name, call in row.others.items():
    baselines.append(_side(row, name, call, compared=False))
  if row.torch is not None and importlib.util.find_spec("torch") is not None:
    baselines += [
      _torch_side(name, run) for name, run in row.torch(row.layers).items()
    ]
  return harness.Comparison(
    ours=_side(row, "ours", of("auto"), optional=False),
    baselines=baselines,
    # As many bytes each way as a copy has.
    floor_traffic=harness.Traffic(row.moved - row.moved // 2, row.moved // 2),
    floor_name="a plain copy of as many bytes",
    clock=harness.QUEUED,
    in_a_call=row.layers * row.steps,
    tolerance=_TOLERANCE,
  )


def measure(
  row: gpu_rows.Row, settings: harness.Settings = _SETTINGS
) -> dict[str, Any]:
  """Measures one row.

  Args:
    row: what.
    settings: how long.

  Returns:
    Milliseconds of every side, the difference between ours and XLA's results,
    and what part of a copy's bandwidth ours has.

  Raises:
    compare.MismatchError: if results differ by more than rounding.
  """
  measured = harness.measure_row(build(row), row.name, settings)
  assert measured.floor_ms is not None
  sides = {"ours": measured.ours} | measured.baselines
  ours_ms = measured.ours.median_ms
  return {
    "row": row.name,
    "bytes": row.moved,
    "layers": row.layers,
    "steps": row.steps,
    "ms": {name: side.median_ms for name, side in sides.items()},
    "spread_ms": {
      name: [side.min_ms, side.max_ms] for name, side in sides.items()
    },
    "difference": measured.differences["xla"],
    "gigabytes_per_second": row.moved / ours_ms / 1e6,
    "copy_gigabytes_per_second": row.moved / measured.floor_ms / 1e6,
    "fraction_of_copy": measured.floor_ms / ours_ms,
  } | ({"without": measured.without} if measured.without else {})


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
    names: of the rows.
    tiny: whether to take sizes that are over at once: a rehearsal.
  """
  table = {row.name: row for row in rows(tiny)}
  for name in names:
    try:
      yield measure(table[name], _TINY_SETTINGS if tiny else _SETTINGS)
    except Exception:
      yield {"row": name, "error": traceback.format_exc()[-3000:]}
      return


def main(arguments: Sequence[str] | None = None) -> None:
  """Writes records of the rows that are named, a line of JSON each."""
  parser = argparse.ArgumentParser(prog="tools.bench.gpu")
  parser.add_argument("--tiny", action="store_true")
  parser.add_argument("rows", nargs="+")
  options = parser.parse_args(arguments)

  def say(**what):
    print(json.dumps(what), flush=True)

  say(device=device())
  for record in run(options.rows, options.tiny):
    say(**record)


if __name__ == "__main__":
  main()
