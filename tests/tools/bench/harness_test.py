"""Tests of how rows are checked, timed and recorded; none looks at a clock."""

import dataclasses
import itertools
import json
from unittest import mock

from absl.testing import absltest
import jax
from jax import numpy as jnp

from tools.bench import bandwidth, compare, harness, schema

_VERSIONS = {"python": "3", "jax": "0", "jaxlib": "0", "commit": "c"}


class FakeClock:
  """A clock that stands still until somebody says that time has passed."""

  def __init__(self, waits=harness.Waits.EVERY_CALL):
    self.nanoseconds = 0
    self.clock = harness.Clock("wall", lambda: self.nanoseconds, waits)

  def spend_ms(self, milliseconds):
    self.nanoseconds += int(milliseconds * 1e6)


def _settings(**changes):
  return harness.Settings(
    **{"repeats": 5, "sample_seconds": 0.0, "row_seconds": 600.0} | changes
  )


def _run(comparison, **changes):
  case = harness.Case("suite", "op", "case", "float32", lambda: comparison)
  return harness.run_case(
    case,
    _settings(**changes),
    device="cpu: test",
    versions=_VERSIONS,
  )


def _side(name, value=1.0, call=None):
  return harness.Side(
    name=name,
    fresh=lambda: jnp.float32(value),
    call=call or (lambda state: state),
  )


class InterleavingTest(absltest.TestCase):
  def test_rounds_alternate_direction(self):
    order = []
    sides = [
      harness.Side(name, lambda: None, lambda _, name=name: order.append(name))
      for name in "abc"
    ]
    harness.measure(sides, _settings(repeats=4))
    # The warm-up comes first and is not part of the rounds.
    self.assertEqual("".join(order[-12:]), "abccbaabccba")

  def test_each_side_gets_every_repeat(self):
    sides = [_side("a"), _side("b")]
    samples = harness.measure(sides, _settings(repeats=7))
    self.assertEqual([len(seconds) for seconds in samples], [7, 7])

  def test_row_out_of_time_keeps_the_least_repeats(self):
    (seconds,) = harness.measure(
      [_side("a")], _settings(repeats=50, row_seconds=0.0, min_repeats=3)
    )
    self.assertLen(seconds, 3)


class TimingTest(absltest.TestCase):
  def test_median_min_and_max_of_the_samples(self):
    fake = FakeClock()
    durations = itertools.chain([9, 9], [5, 1, 30, 2, 3])
    side = harness.Side(
      "a", lambda: None, lambda _: fake.spend_ms(next(durations))
    )
    (seconds,) = harness.measure([side], _settings(), fake.clock)
    summary = harness.Summary.of(seconds)
    self.assertEqual(summary, harness.Summary(3.0, 1.0, 30.0, 5))
    half = harness.Summary.of(seconds, in_a_call=2)
    self.assertEqual(half, harness.Summary(1.5, 0.5, 15.0, 5))

  def test_fresh_input_is_not_timed(self):
    fake = FakeClock()
    side = harness.Side(
      "a",
      fresh=lambda: fake.spend_ms(1000),
      call=lambda _: fake.spend_ms(2),
    )
    (seconds,) = harness.measure([side], _settings(), fake.clock)
    self.assertEqual(max(seconds), 2e-3)

  def test_time_is_for_one_call_of_many(self):
    fake = FakeClock()
    side = harness.Side("a", lambda: None, lambda _: fake.spend_ms(2))
    (seconds,) = harness.measure(
      [side], _settings(sample_seconds=0.001), fake.clock
    )
    self.assertEqual(set(seconds), {2e-3})

  def test_own_loop_replaces_the_calls(self):
    fake = FakeClock()

    def fail(_):
      raise AssertionError("`call` must not be timed")

    side = harness.Side(
      "a",
      lambda: None,
      call=fail,
      loop=lambda _, count: fake.spend_ms(3 * count),
    )
    (seconds,) = harness.measure([side], _settings(), fake.clock)
    self.assertEqual(set(seconds), {3e-3})

  def test_stopwatch_reports_its_own_time(self):
    side = harness.Side(
      "a", lambda: None, lambda _: None, stopwatch=lambda _: 0.25
    )
    (seconds,) = harness.measure([side], _settings())
    self.assertEqual(set(seconds), {0.25})

  def test_donated_input_is_made_anew_and_moved_on(self):
    made = []

    def fresh():
      made.append(jnp.zeros(1024))
      return made[-1]

    side = harness.Side(
      "a",
      fresh,
      call=jax.jit(lambda x: x + 1, donate_argnums=0),
      advance=lambda state, result: result,
    )
    # Using a donated array again raises, so running at all is the test.
    harness.measure([side], _settings(sample_seconds=1e-3))
    self.assertGreater(len(made), 5)
    self.assertTrue(all(array.is_deleted() for array in made))

  def test_clock_says_what_a_sample_waits_for(self):
    fake = FakeClock()
    with mock.patch.object(
      jax, "block_until_ready", lambda x: fake.spend_ms(1)
    ):
      for waits, milliseconds in (
        (harness.Waits.EVERY_CALL, 1.0),
        (harness.Waits.LAST_CALL, 0.25),
        (harness.Waits.NO_CALL, 0.0),
      ):
        clock = dataclasses.replace(fake.clock, waits=waits)
        seconds = harness._sample(_side("a"), 4, clock)
        self.assertAlmostEqual(seconds * 1e3, milliseconds)

  def test_kernels_are_waited_for_and_python_is_not(self):
    self.assertIs(harness.WALL.waits, harness.Waits.EVERY_CALL)
    self.assertIs(harness.QUEUED.waits, harness.Waits.LAST_CALL)
    self.assertIs(harness.THREAD_CPU.waits, harness.Waits.NO_CALL)


class CheckTest(absltest.TestCase):
  def test_wrong_result_is_refused_before_timing(self):
    calls = []

    def wrong(state):
      calls.append(1)
      return state * 1.01

    comparison = harness.Comparison(
      ours=_side("ours"), baselines=[_side("theirs", call=wrong)]
    )
    with self.assertRaisesRegex(
      compare.MismatchError, r"suite/op/case/float32: ours against theirs"
    ):
      _run(comparison)
    self.assertLen(calls, 1)

  def test_every_baseline_is_checked(self):
    comparison = harness.Comparison(
      ours=_side("ours"), baselines=[_side("good"), _side("bad", value=2.0)]
    )
    with self.assertRaisesRegex(compare.MismatchError, "ours against bad"):
      _run(comparison)

  def test_observe_chooses_what_is_compared(self):
    ours = harness.Side(
      "ours",
      fresh=lambda: {"x": 1.0},
      call=lambda state: state.update(x=2.0),
      observe=lambda state, result: state["x"],
    )
    self.assertLen(
      _run(harness.Comparison(ours, [_side("theirs", value=2.0)])), 1
    )

  def test_optional_side_that_does_not_run_is_left_out_with_the_reason(self):
    def broken(state):
      raise ValueError("no such library")

    def comparison(**options):
      side = dataclasses.replace(_side("broken", call=broken), **options)
      return harness.Comparison(_side("ours"), [side, _side("theirs")])

    for options in ({}, {"stopwatch": broken}):
      (record,) = _run(comparison(optional=True, **options))
      self.assertEqual(record["baseline"], "theirs")
      self.assertEqual(
        record["details"]["without"], {"broken": "no such library"}
      )
    with self.assertRaisesRegex(ValueError, "no such library"):
      _run(comparison())

  def test_optional_side_must_agree_like_any_other(self):
    side = dataclasses.replace(_side("bad", value=2.0), optional=True)
    with self.assertRaisesRegex(compare.MismatchError, "ours against bad"):
      _run(harness.Comparison(_side("ours"), [side]))

  def test_side_of_something_else_is_not_compared(self):
    side = dataclasses.replace(_side("other", value=2.0), observe=None)
    (record,) = _run(harness.Comparison(_side("ours"), [side]))
    self.assertEqual(record["baseline"], "other")

  def test_differences_are_reported(self):
    comparison = harness.Comparison(
      _side("ours"),
      [_side("same"), _side("near", value=2.0)],
      tolerance=compare.NormTolerance(0.5),
    )
    self.assertEqual(
      harness.check(comparison, "row").differences, {"same": 0.0, "near": 0.5}
    )


class RecordTest(absltest.TestCase):
  def _records(self, changes=None):
    fake = FakeClock()

    def side(name, milliseconds):
      def call(state):
        fake.spend_ms(milliseconds)
        return state

      return _side(name, call=call)

    return _run(
      harness.Comparison(
        ours=side("ours", 2),
        baselines=[side("slow", 8), side("fast", 1)],
        clock=fake.clock,
        **changes(side) if changes else {},
      )
    )

  def test_one_record_for_each_baseline(self):
    slow, fast = self._records()
    self.assertEqual(slow["ours_ms"], 2.0)
    self.assertEqual((slow["baseline"], slow["baseline_ms"]), ("slow", 8.0))
    self.assertEqual((fast["baseline"], fast["baseline_ms"]), ("fast", 1.0))

  def test_ratio_above_one_means_ours_is_faster(self):
    self.assertEqual([r["ratio"] for r in self._records()], [4.0, 0.5])

  def test_times_are_those_of_one_in_a_call(self):
    slow, _ = self._records(lambda side: {"in_a_call": 2})
    self.assertEqual((slow["ours_ms"], slow["baseline_ms"]), (1.0, 4.0))
    self.assertEqual((slow["ours_max_ms"], slow["ratio"]), (1.0, 4.0))

  def test_records_follow_the_schema(self):
    records = self._records()
    schema.validate(json.loads(json.dumps(records)))

  def test_row_without_floor(self):
    record = self._records()[0]
    self.assertIsNone(record["floor_ms"])
    self.assertIsNone(record["fraction_of_floor"])


class FloorTest(absltest.TestCase):
  def _moving_takes_ms(self, milliseconds):
    patch = mock.patch.object(bandwidth, "Mover", autospec=True)
    mover = patch.start()
    self.addCleanup(patch.stop)
    mover.return_value.seconds.return_value = milliseconds / 1e3
    return mover

  def _record(self, **floor):
    fake = FakeClock()

    def side(name, milliseconds):
      def call(state):
        fake.spend_ms(milliseconds)
        return state

      return _side(name, call=call)

    if floor.get("floor_side"):
      floor["floor_side"] = side("floor", floor["floor_side"])
    return _run(
      harness.Comparison(
        side("ours", 40), [side("theirs", 80)], clock=fake.clock, **floor
      )
    )[0]

  def test_bytes_take_their_turn_among_the_sides(self):
    mover = self._moving_takes_ms(20)
    record = self._record(floor_traffic=harness.Traffic(read=10, written=1))
    mover.assert_called_once_with(harness.Traffic(read=10, written=1))
    self.assertEqual(mover.return_value.seconds.call_count, 5)
    self.assertAlmostEqual(record["floor_ms"], 20.0)
    self.assertAlmostEqual(record["fraction_of_floor"], 0.5)

  def test_timed_side(self):
    record = self._record(floor_side=30)
    self.assertAlmostEqual(record["floor_ms"], 30.0)
    self.assertAlmostEqual(record["fraction_of_floor"], 0.75)

  def test_bytes_and_timed_side_add_up(self):
    self._moving_takes_ms(10)
    record = self._record(
      floor_traffic=harness.Traffic(read=10, written=0), floor_side=30
    )
    self.assertAlmostEqual(record["floor_ms"], 40.0)
    self.assertAlmostEqual(record["fraction_of_floor"], 1.0)


class SettingsTest(absltest.TestCase):
  def test_repeats_must_be_positive(self):
    with self.assertRaisesRegex(
      ValueError, "`repeats` must be at least 1, but got 0"
    ):
      harness.Settings.for_run(quick=True, repeats=0)

  def test_given_repeats_win(self):
    for quick in (False, True):
      settings = harness.Settings.for_run(quick=quick, repeats=2)
      self.assertEqual((settings.repeats, settings.quick), (2, quick))

  def test_label_leaves_out_an_empty_dtype(self):
    case = harness.Case("graph", "split", "10", "", lambda: None)
    self.assertEqual(case.label, "graph/split/10")


if __name__ == "__main__":
  absltest.main()
