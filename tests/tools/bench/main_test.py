"""Tests of the command line, on rows that take no time."""

import contextlib
import importlib.util
import io
import json
import os
import pathlib
from unittest import mock

from absl.testing import absltest, parameterized
from jax import numpy as jnp

from tools.bench import harness, main, schema, suites, tour


def _case(suite, op, theirs=1.0, build=None):
  def side(name, value):
    return harness.Side(name, lambda: jnp.float32(value), lambda state: state)

  def comparison():
    return harness.Comparison(side("ours", 1.0), [side("theirs", theirs)])

  return harness.Case(suite, op, "case", "float32", build or comparison)


def _explode():
  raise RuntimeError("no such kernel")


_CASES = {
  "kv_cache": [_case("kv_cache", "update"), _case("kv_cache", "other")],
  "batch_stat": [_case("batch_stat", "update")],
}


def _main(*flags):
  """Returns the exit status, what was printed, and what went to stderr."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
      status = main.main(flags)
    except SystemExit as exit_:
      status = exit_.code
  return status, out.getvalue(), err.getvalue()


class MainTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.cases = dict(_CASES)
    self.enter_context(
      mock.patch.object(
        suites, "cases", lambda name, settings: self.cases.get(name, [])
      )
    )
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def _run(self, *flags):
    return _main("--quick", "--repeats=1", *flags)

  def _records(self, *flags):
    path = self.folder / "run.json"
    self._run(f"--json={path}", *flags)
    records = json.loads(path.read_text())
    schema.validate(records)
    return [(record["suite"], record["op"]) for record in records]

  def test_all_suites_by_default(self):
    self.assertCountEqual(
      self._records(),
      [("kv_cache", "update"), ("kv_cache", "other"), ("batch_stat", "update")],
    )

  def test_chosen_suites(self):
    self.assertEqual(
      self._records("--suite=batch_stat"), [("batch_stat", "update")]
    )

  def test_filter_matches_anywhere_in_the_name(self):
    self.assertEqual(
      self._records("--filter=cache/oth.*float32"), [("kv_cache", "other")]
    )

  def test_prints_table_and_succeeds(self):
    status, out, err = self._run("--suite=kv_cache,batch_stat")
    self.assertEqual(status, 0)
    self.assertRegex(out, r"kv_cache +update +case +float32")
    self.assertRegex(out, r"batch_stat/update against theirs: geometric mean")
    self.assertIn("100%", err)

  def test_plot_is_a_png(self):
    path = self.folder / "run.png"
    self._run(f"--plot={path}")
    self.assertEqual(path.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

  def test_files_are_relative_to_where_bazel_was_called(self):
    with mock.patch.dict(
      os.environ, {"BUILD_WORKING_DIRECTORY": str(self.folder)}
    ):
      self._run("--json=here.json")
    self.assertTrue((self.folder / "here.json").exists())

  def test_disagreeing_row_fails_and_the_others_run(self):
    self.cases["kv_cache"] = [
      _case("kv_cache", "wrong", theirs=2.0),
      _case("kv_cache", "right"),
    ]
    status, out, err = self._run("--suite=kv_cache")
    self.assertEqual(status, 1)
    self.assertIn("right", out)
    self.assertNotIn("wrong", out)
    self.assertRegex(err, "FAILED kv_cache/wrong/case/float32(.|\n)*agree")

  def test_broken_row_fails_and_the_others_run(self):
    self.cases["kv_cache"] = [
      _case("kv_cache", "broken", build=_explode),
      _case("kv_cache", "right"),
    ]
    status, out, err = self._run("--suite=kv_cache")
    self.assertEqual(status, 1)
    self.assertIn("right", out)
    self.assertRegex(err, "FAILED kv_cache/broken(.|\n)*no such kernel")

  def test_suite_whose_packages_are_not_there(self):
    with mock.patch.object(importlib.util, "find_spec", return_value=None):
      status, _, err = self._run("--suite=kv_cache,ecosystem")
    self.assertEqual(status, 2)
    self.assertIn("bazel run --config=ecosystem //tools:bench_ecosystem", err)

  def test_suite_whose_model_is_not_there(self):
    def cases(name, settings):
      raise ModuleNotFoundError("install it")

    with mock.patch.object(suites, "cases", cases):
      status, _, err = self._run("--suite=kv_cache")
    self.assertEqual(status, 2)
    self.assertIn("--suite=kv_cache: install it", err)

  @parameterized.parameters(
    ("--suite=nonsense", "--suite must name some of .*but got nonsense"),
    ("--suite=,", "--suite must name some of .*but got none"),
    ("--filter=(", "--filter must be a regular expression"),
    ("--repeats=0", "--repeats must be at least 1, but got 0"),
    ("--full", "--full: not allowed with argument --quick"),
    ("--plot=run.jpg", "--plot must end in .png, but got run.jpg"),
    ("--json=/no/such/folder/x", "folder /no/such/folder does not exist"),
  )
  def test_bad_flag_is_refused(self, flag, message):
    status, _, err = self._run(flag)
    self.assertEqual(status, 2)
    self.assertRegex(err, message)

  def test_no_matching_row(self):
    status, _, err = self._run("--filter=nothing")
    self.assertEqual(status, 2)
    self.assertIn("no row matches --suite and --filter", err)


class TourTest(absltest.TestCase):
  """Of a run without options, on rows that take no time."""

  def setUp(self):
    super().setUp()
    self.folder = self.create_tempdir().full_path
    self.enter_context(
      mock.patch.object(main.tempfile, "mkdtemp", lambda **_: self.folder)
    )
    self.enter_context(
      mock.patch.object(harness, "_calls_per_sample", return_value=1)
    )
    self.labels = []

    def cases(name, settings):
      del settings
      return [self._case(name, op) for op in ("a", "b", "not in the tour")]

    self.enter_context(mock.patch.object(suites, "cases", cases))
    self.enter_context(
      mock.patch.object(
        tour,
        "_ROWS",
        {
          "batch_stat": ("b/case/float32", "a/case/float32"),
          "graph": ("a/case/float32",),
        },
      )
    )

  def _case(self, suite, op):
    def build():
      self.labels.append(f"{suite}/{op}")
      return _case(suite, op).build()

    return _case(suite, op, build=build)

  def test_measures_the_first_row_of_each_suite_and_then_the_second(self):
    status, out, err = _main()
    self.assertEqual(status, 0)
    self.assertEqual(self.labels, ["batch_stat/b", "graph/a", "batch_stat/a"])
    self.assertRegex(err, r"about \d:\d\d left: batch_stat/a")
    # The table has the rows of a suite together.
    self.assertRegex(out, r"(?s)batch_stat +b .*batch_stat +a .*graph +a ")
    self.assertRegex(out, "batch_stat: geometric mean .* 2 rows")
    self.assertNotIn("Left out", out)

  def test_draws_a_plot_and_says_where(self):
    _, out, _ = _main()
    path = pathlib.Path(self.folder, "tour.png")
    self.assertIn(f"wrote {path}", out)
    self.assertEqual(path.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

  def test_begins_no_row_that_may_end_late_and_names_those_left(self):
    seconds = {"now": 0.0}
    takes = iter([10.0, 80.0, 30.0, 30.0])

    def build():
      seconds["now"] += next(takes)
      return self._case("batch_stat", "b").build()

    rows = [_case("batch_stat", op, build=build) for op in "abcdef"]
    with (
      mock.patch.object(tour, "cases", lambda settings: rows),
      mock.patch.object(
        main, "time", mock.Mock(monotonic=lambda: seconds["now"])
      ),
    ):
      status, out, _ = _main()
    self.assertEqual(status, 0)
    # The fifth could take from 2:30 to 3:50, as long as the second.
    self.assertLen(self.labels, 4)
    self.assertRegex(
      out, "Left out, .*4 minutes: batch_stat/e/case/float32, batch_stat/f/case"
    )

  def test_options_that_choose_rows_make_no_tour(self):
    for flags in (
      ("--full",), ("--suite=graph",), ("--filter=graph",), ("--quick",)
    ):  # fmt: skip
      with self.subTest(flags), mock.patch.object(tour, "cases") as cases:
        self.assertEqual(_main("--repeats=1", *flags)[0], 0)
        cases.assert_not_called()
    self.assertIn("graph/not in the tour", self.labels)


if __name__ == "__main__":
  absltest.main()
