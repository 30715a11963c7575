"""Times two or more ways to compute one thing, fairly, in one process.

A `Case` names a row before anything is allocated. Building it gives a
`Comparison`: our `Side`, the baselines a user would otherwise run, and a floor.
`measure_row` checks that the sides compute the same thing, and only then times
them, interleaved. `run_case` makes of it one record for each baseline.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import enum
import gc
import statistics
import time
from typing import Any

import jax

from tools.bench import bandwidth, compare

Traffic = bandwidth.Traffic

# Threads of another framework spin for a while after its calls, on cores that
# the next side wants.
_REST_SECONDS = 0.02


class Waits(enum.Enum):
  """What a sample waits for before its clock stops."""

  EVERY_CALL = enum.auto()  # the arrays of a call, before the next one
  LAST_CALL = enum.auto()  # those of the last: calls are queued, as in a loop
  NO_CALL = enum.auto()  # Python has control again


@dataclasses.dataclass(frozen=True)
class Clock:
  """A named source of nanoseconds.

  Attributes:
    name: what the `clock` field of a record says.
    now_ns: the current reading in nanoseconds.
    waits: what a sample waits for.
  """

  name: str
  now_ns: Callable[[], int]
  waits: Waits


WALL = Clock("wall", time.perf_counter_ns, Waits.EVERY_CALL)
# Where waiting for a call takes longer than the call: on an accelerator.
QUEUED = Clock("queued", time.perf_counter_ns, Waits.LAST_CALL)
# Of the calling thread alone: what Python costs.
THREAD_CPU = Clock("thread_cpu", time.thread_time_ns, Waits.NO_CALL)


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
      aliases must return buffers that no call has used up.
    call: the timed call, `state -> result`.
    advance: the state of the next call in the same sample,
      `(state, result) -> state`. A donating side moves its result here.
    observe: what the check compares, `(state, result) -> pytree of arrays`;
      None for a side that computes something else.
    loop: the timed loop, `(state, count) -> None`, for calls so short that the
      generic loop would show. It replaces `call` in the timing only.
    stopwatch: `state -> seconds` for a side that times itself (a subprocess);
      such a side is not compared and `call` is never used.
    optional: whether the row does without this side, and says why, where it
      does not run.
  """

  name: str
  fresh: Callable[[], Any]
  call: Callable[[Any], Any]
  advance: Callable[[Any, Any], Any] = _keep_state
  observe: Callable[[Any, Any], Any] | None = _observe_result
  loop: Callable[[Any, int], None] | None = None
  stopwatch: Callable[[Any], float] | None = None
  optional: bool = False


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
    clock: `WALL`, `QUEUED` or `THREAD_CPU`.
    in_a_call: how often one call of a side does what the row measures; its
      times are those of one. The floor is of one as it stands.
    tolerance: overrides the tolerance of the arrays' dtypes.
    details: extra fields for the records, such as the implementation chosen.
  """

  ours: Side
  baselines: Sequence[Side]
  floor_traffic: Traffic | None = None
  floor_side: Side | None = None
  floor_name: str = ""
  clock: Clock = WALL
  in_a_call: int = 1
  tolerance: compare.Tolerance | compare.NormTolerance | None = None
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
  def of(cls, seconds: Sequence[float], in_a_call: int = 1) -> "Summary":
    """Summarises `seconds` of a call, one value a sample.

    >>> Summary.of([0.003, 0.001, 0.002])
    Summary(median_ms=2.0, min_ms=1.0, max_ms=3.0, repeats=3)
    """
    each = 1e3 / in_a_call
    return cls(
      statistics.median(seconds) * each,
      min(seconds) * each,
      max(seconds) * each,
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
  elif clock.waits is Waits.EVERY_CALL:
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
    if clock.waits is Waits.LAST_CALL:
      jax.block_until_ready(result)
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
) -> list[list[float]]:
  """Times `sides`, interleaved.

  Args:
    sides: what to time.
    settings: how long.
    clock: what to time with.

  Returns:
    The seconds of a call, of each side in the order given: one value a sample.
  """
  counts = [_calls_per_sample(side, settings, clock) for side in sides]
  seconds: list[list[float]] = [[] for _ in sides]
  rest = _REST_SECONDS if any(side.optional for side in sides) else 0
  deadline = time.perf_counter() + settings.row_seconds
  for round_index in range(settings.repeats):
    late = time.perf_counter() > deadline
    if late and round_index >= settings.min_repeats:
      break
    for index in interleaved_order(len(sides), round_index):
      if gc.isenabled():
        gc.collect(1)
      time.sleep(rest)
      with _collector_paused():
        sample = _sample(sides[index], counts[index], clock)
      seconds[index].append(sample)
  return seconds


def _observe(side: Side) -> Any:
  """Runs a side once; returns what to compare, None if there is nothing."""
  state = side.fresh()
  if side.stopwatch is not None:
    if side.optional:
      side.stopwatch(state)
    return None
  result = jax.block_until_ready(side.call(state))
  return side.observe(state, result) if side.observe is not None else None


@dataclasses.dataclass(frozen=True)
class Checked:
  """What is known of a row's baselines before any is timed.

  Attributes:
    baselines: those that run.
    differences: by name, how far the results of those that are compared are
      from ours, as the tolerance measures it.
    without: by name, why the others do not run.
  """

  baselines: list[Side] = dataclasses.field(default_factory=list)
  differences: dict[str, float] = dataclasses.field(default_factory=dict)
  without: dict[str, str] = dataclasses.field(default_factory=dict)


def check(comparison: Comparison, label: str) -> Checked:
  """Runs every side once and compares it with ours.

  Args:
    comparison: the row.
    label: the row's name, for the message.

  Returns:
    The baselines to time.

  Raises:
    compare.MismatchError: if a baseline and ours differ by more than the
      tolerance.
  """
  checked = Checked()
  ours = _observe(comparison.ours)
  for baseline in comparison.baselines:
    try:
      theirs = _observe(baseline)
    except Exception as error:
      if not baseline.optional:
        raise
      checked.without[baseline.name] = str(error)[:300]
      continue
    if ours is not None and theirs is not None:
      checked.differences[baseline.name] = compare.check_same(
        ours,
        theirs,
        label=f"{label}: ours against {baseline.name}",
        tolerance=comparison.tolerance,
      )
    checked.baselines.append(baseline)
  return checked


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


@dataclasses.dataclass(frozen=True)
class Measurement:
  """What a row came to; times are of one of what the row measures.

  Attributes:
    ours: our side.
    baselines: those that run, by name.
    floor_ms: the floor, None if there is none.
    differences: see `Checked`.
    without: see `Checked`.
  """

  ours: Summary
  baselines: dict[str, Summary]
  floor_ms: float | None
  differences: dict[str, float]
  without: dict[str, str]


def measure_row(
  comparison: Comparison, label: str, settings: Settings
) -> Measurement:
  """Checks and times one row.

  Args:
    comparison: the row.
    label: its name, for messages.
    settings: how long to measure.

  Raises:
    compare.MismatchError: if the sides disagree; nothing is timed then.
  """
  checked = check(comparison, label)
  sides = [comparison.ours, *checked.baselines]
  floors = list(_floor_sides(comparison))
  samples = measure([*sides, *floors], settings, comparison.clock)
  ours, *theirs = (
    Summary.of(seconds, comparison.in_a_call)
    for seconds in samples[: len(sides)]
  )
  floor_ms = None
  if floors:
    floor_ms = sum(
      Summary.of(seconds).median_ms for seconds in samples[len(sides) :]
    )
  names = [baseline.name for baseline in checked.baselines]
  return Measurement(
    ours,
    dict(zip(names, theirs, strict=True)),
    floor_ms,
    checked.differences,
    checked.without,
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
  measured = measure_row(comparison, case.label, settings)
  ours, floor_ms = measured.ours, measured.floor_ms
  details = dict(comparison.details)
  if measured.without:
    details["without"] = measured.without
  return [
    {
      "suite": case.suite,
      "op": case.op,
      "case": case.case,
      "dtype": case.dtype,
      "ours_ms": ours.median_ms,
      "ours_min_ms": ours.min_ms,
      "ours_max_ms": ours.max_ms,
      "baseline": name,
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
      "details": details,
      "device": device,
      "versions": dict(versions),
    }
    for name, theirs in measured.baselines.items()
  ]
