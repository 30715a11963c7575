"""Times two or more ways to compute one thing, fairly, in one process.

A `Case` names a row before anything is allocated. Building it gives a
`Comparison`: our `Side`, the baselines a user would otherwise run, and a floor.
`run_case` checks that every side computes the same thing, and only then times
them, interleaved, and returns one record for each baseline.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import gc
import statistics
import time
from typing import Any

import jax

from tools.bench import bandwidth, compare

Traffic = bandwidth.Traffic


@dataclasses.dataclass(frozen=True)
class Clock:
  """A named source of nanoseconds.

  Attributes:
    name: what the `clock` field of a record says.
    now_ns: the current reading in nanoseconds.
    blocks: whether a call ends when its arrays are ready (elapsed time) or when
      Python has control again (the thread's own CPU time).
  """

  name: str
  now_ns: Callable[[], int]
  blocks: bool


WALL = Clock("wall", time.perf_counter_ns, blocks=True)
THREAD_CPU = Clock("thread_cpu", time.thread_time_ns, blocks=False)


def _keep_state(state: Any, result: Any) -> Any:
  del result
  return state


def _observe_result(state: Any, result: Any) -> Any:
  del state
  return result


@dataclasses.dataclass(frozen=True)
class Side:
  """One way to compute what a row measures.

  Attributes:
    name: how the report calls it.
    fresh: makes the input of one sample; never timed. A side that donates or
      aliases must return new buffers at every call.
    call: the timed call, `state -> result`.
    advance: the state of the next call in the same sample,
      `(state, result) -> state`. A donating side moves its result here.
    observe: what the check compares, `(state, result) -> pytree of arrays`.
    loop: the timed loop, `(state, count) -> None`, for calls so short that the
      generic loop would show. It replaces `call` in the timing only.
    stopwatch: `state -> seconds` for a side that times itself (a subprocess);
      such a side is not compared and `call` is never used.
  """

  name: str
  fresh: Callable[[], Any]
  call: Callable[[Any], Any]
  advance: Callable[[Any, Any], Any] = _keep_state
  observe: Callable[[Any, Any], Any] = _observe_result
  loop: Callable[[Any, int], None] | None = None
  stopwatch: Callable[[Any], float] | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Everything that a row needs; holds the arrays while the row runs.

  Attributes:
    ours: the side that this repository offers.
    baselines: what a user would otherwise run; one record is made for each.
    floor_traffic: bytes that must move between memory and the cores; moving
      them is timed along with the sides.
    floor_side: what cannot be avoided either, such as the dispatch of a call;
      timed along with the others. Where both are given the floor is their sum.
    floor_name: what the floor is, in words.
    clock: `WALL` or `THREAD_CPU`.
    tolerance: overrides the tolerance of the arrays' dtypes.
    details: extra fields for the records, such as the implementation chosen.
  """

  ours: Side
  baselines: Sequence[Side]
  floor_traffic: Traffic | None = None
  floor_side: Side | None = None
  floor_name: str = ""
  clock: Clock = WALL
  tolerance: compare.Tolerance | None = None
  details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Case:
  """A row's name, and how to build it.

  Attributes:
    suite: suite name, as in `--suite`.
    op: operation.
    case: shape or size.
    dtype: dtype of the data, or "" where there is none.
    build: allocates and compiles; called when the row's turn comes.
  """

  suite: str
  op: str
  case: str
  dtype: str
  build: Callable[[], Comparison]

  @property
  def label(self) -> str:
    """The row's name in one string: what `--filter` is matched against."""
    return "/".join(
      part for part in (self.suite, self.op, self.case, self.dtype) if part
    )


@dataclasses.dataclass(frozen=True)
class Settings:
  """How long to measure.

  Attributes:
    quick: small shapes and short samples: the whole run within a minute.
    repeats: samples of each side.
    sample_seconds: a sample repeats a short call until it lasts about this.
    row_seconds: after this long a row stops early, with at least `min_repeats`.
    min_repeats: samples that a row always gets.
  """

  quick: bool = False
  repeats: int = 9
  sample_seconds: float = 0.05
  row_seconds: float = 20.0
  min_repeats: int = 3

  @classmethod
  def for_run(cls, *, quick: bool, repeats: int | None = None) -> "Settings":
    """Returns the settings of a quick or a full run.

    Args:
      quick: whether `--quick` was given.
      repeats: samples of each side; None for the default of the kind of run.

    Raises:
      ValueError: if `repeats` is less than 1.
    """
    if repeats is not None and repeats < 1:
      raise ValueError(
        f"`repeats` must be at least 1, but got {repeats}: give --repeats a "
        "positive number."
      )
    if quick:
      return cls(
        quick=True,
        repeats=repeats or 3,
        sample_seconds=0.004,
        row_seconds=0.5,
        min_repeats=1,
      )
    return cls(repeats=repeats or 9)


@dataclasses.dataclass(frozen=True)
class Summary:
  """Median, smallest and largest of the samples, in milliseconds a call."""

  median_ms: float
  min_ms: float
  max_ms: float
  repeats: int

  @classmethod
  def of(cls, seconds: Sequence[float]) -> "Summary":
    """Summarises `seconds`, one value a sample.

    >>> Summary.of([0.003, 0.001, 0.002])
    Summary(median_ms=2.0, min_ms=1.0, max_ms=3.0, repeats=3)
    """
    return cls(
      statistics.median(seconds) * 1e3,
      min(seconds) * 1e3,
      max(seconds) * 1e3,
      len(seconds),
    )


def interleaved_order(sides: int, round_index: int) -> list[int]:
  """Returns the order in which the sides take their turn in one round.

  Every second round runs backwards, so that no side always follows the same
  neighbour and a slow drift of the machine falls on all sides alike.

  >>> interleaved_order(3, 0), interleaved_order(3, 1)
  ([0, 1, 2], [2, 1, 0])
  """
  order = list(range(sides))
  return order[::-1] if round_index % 2 else order


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
  """Keeps the cyclic collector out of the samples, of every side alike."""
  was_enabled = gc.isenabled()
  gc.disable()
  try:
    yield
  finally:
    if was_enabled:
      gc.enable()


def _sample(side: Side, count: int, clock: Clock) -> float:
  """Returns the seconds a call, over `count` calls on a fresh input."""
  state = jax.block_until_ready(side.fresh())
  if side.stopwatch is not None:
    return side.stopwatch(state)
  call, advance, now_ns = side.call, side.advance, clock.now_ns
  if side.loop is not None:
    start = now_ns()
    side.loop(state, count)
    stop = now_ns()
  elif clock.blocks:
    start = now_ns()
    for _ in range(count):
      result = jax.block_until_ready(call(state))
      state = advance(state, result)
    stop = now_ns()
  else:
    start = now_ns()
    for _ in range(count):
      result = call(state)
      state = advance(state, result)
    stop = now_ns()
    jax.block_until_ready(result)
  return (stop - start) / count / 1e9


def _calls_per_sample(side: Side, settings: Settings, clock: Clock) -> int:
  """Warms `side` up and returns how many calls make a sample long enough."""
  if side.stopwatch is not None:
    return 1
  _sample(side, 1, clock)  # Compiles.
  # Timed by the wall: the thread's clock may stand still while others work.
  wall = dataclasses.replace(clock, now_ns=time.perf_counter_ns)

  def fitting(calls: int) -> int:
    seconds = max(_sample(side, calls, wall), 1e-8)
    if seconds >= settings.sample_seconds:
      return 1
    # The first call of a sample finds its input cold: only where it is as long
    # as a sample may a side have that call alone.
    return min(100_000, max(4, round(settings.sample_seconds / seconds)))

  count = fitting(1)
  if count > 1:
    # The single call paid for cold caches: estimate again from some more.
    count = fitting(min(count, 10))
  return count


def measure(
  sides: Sequence[Side], settings: Settings, clock: Clock = WALL
) -> list[Summary]:
  """Times `sides`, interleaved.

  Args:
    sides: what to time.
    settings: how long.
    clock: what to time with.

  Returns:
    One summary a side, in the order given.
  """
  counts = [_calls_per_sample(side, settings, clock) for side in sides]
  seconds: list[list[float]] = [[] for _ in sides]
  deadline = time.perf_counter() + settings.row_seconds
  for round_index in range(settings.repeats):
    late = time.perf_counter() > deadline
    if late and round_index >= settings.min_repeats:
      break
    for index in interleaved_order(len(sides), round_index):
      if gc.isenabled():
        gc.collect(1)
      with _collector_paused():
        sample = _sample(sides[index], counts[index], clock)
      seconds[index].append(sample)
  return [Summary.of(samples) for samples in seconds]


def check(comparison: Comparison, label: str) -> None:
  """Runs every side once and compares it with ours.

  Args:
    comparison: the row.
    label: the row's name, for the message.

  Raises:
    compare.MismatchError: if a baseline and ours differ by more than the
      tolerance of their dtypes.
  """
  if comparison.ours.stopwatch is not None:
    return

  def observe(side: Side) -> Any:
    state = side.fresh()
    return side.observe(state, side.call(state))

  ours = observe(comparison.ours)
  for baseline in comparison.baselines:
    compare.check_same(
      ours,
      observe(baseline),
      label=f"{label}: ours against {baseline.name}",
      tolerance=comparison.tolerance,
    )


def _floor_sides(comparison: Comparison) -> Iterator[Side]:
  """Yields the sides whose times add up to the floor."""
  if comparison.floor_side is not None:
    yield comparison.floor_side
  if comparison.floor_traffic is not None:
    mover = bandwidth.Mover(comparison.floor_traffic)
    yield Side(
      name="memory traffic",
      fresh=lambda: None,
      call=lambda state: state,
      stopwatch=lambda state: mover.seconds(),
    )


def run_case(
  case: Case,
  settings: Settings,
  *,
  device: str,
  versions: dict[str, str],
) -> list[dict[str, Any]]:
  """Builds, checks and times one row.

  Args:
    case: the row.
    settings: how long to measure.
    device: description of the device, for the records.
    versions: library versions, for the records.

  Returns:
    One record for each baseline, as `schema.json` describes it.

  Raises:
    compare.MismatchError: if the sides disagree; nothing is timed then.
  """
  comparison = case.build()
  check(comparison, case.label)
  sides = [comparison.ours, *comparison.baselines]
  floors = list(_floor_sides(comparison))
  summaries = measure([*sides, *floors], settings, comparison.clock)
  ours, floor_summaries = summaries[0], summaries[len(sides) :]
  floor_ms = (
    sum(summary.median_ms for summary in floor_summaries) if floors else None
  )
  records = []
  for baseline, theirs in zip(
    comparison.baselines, summaries[1 : len(sides)], strict=True
  ):
    records.append(
      {
        "suite": case.suite,
        "op": case.op,
        "case": case.case,
        "dtype": case.dtype,
        "ours_ms": ours.median_ms,
        "ours_min_ms": ours.min_ms,
        "ours_max_ms": ours.max_ms,
        "baseline": baseline.name,
        "baseline_ms": theirs.median_ms,
        "baseline_min_ms": theirs.min_ms,
        "baseline_max_ms": theirs.max_ms,
        "ratio": theirs.median_ms / ours.median_ms,
        "floor": comparison.floor_name,
        "floor_ms": floor_ms,
        "fraction_of_floor": (
          None if floor_ms is None else floor_ms / ours.median_ms
        ),
        "clock": comparison.clock.name,
        "repeats": ours.repeats,
        "quick": settings.quick,
        "details": dict(comparison.details),
        "device": device,
        "versions": dict(versions),
      }
    )
  return records
