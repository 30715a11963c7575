"""Tests of the command line, on rows that take no time."""

import contextlib
import io
import json
import os
import pathlib
from unittest import mock

from absl.testing import absltest, parameterized
from jax import numpy as jnp

from tools.bench import harness, main, schema, suites


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
    """Returns the exit status, what was printed, and what went to stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      try:
        status = main.main(["--quick", "--repeats=1", *flags])
      except SystemExit as exit_:
        status = exit_.code
    return status, out.getvalue(), err.getvalue()

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

  @parameterized.parameters(
    ("--suite=nonsense", "--suite must name some of .*but got nonsense"),
    ("--suite=,", "--suite must name some of .*but got none"),
    ("--filter=(", "--filter must be a regular expression"),
    ("--repeats=0", "--repeats must be at least 1, but got 0"),
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


if __name__ == "__main__":
  absltest.main()
