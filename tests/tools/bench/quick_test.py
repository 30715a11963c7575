"""Runs real rows of every suite and checks their records."""

import json
import pathlib
import re

from absl.testing import absltest, parameterized

from tools.bench import harness, main, schema, suites, tour


def _rows():
  """Returns suite, label and kind of a row for each op and quantised data.

  Quick rows where there are; a row that a quick run leaves out is as small.
  """
  chosen = {}
  for quick in (True, False):
    settings = harness.Settings.for_run(quick=quick)
    for name in suites.NAMES:
      for case in suites.cases(name, settings):
        # Ops that are named after a number of layers have others if quick, and
        # so have models that are named after their size.
        op = re.sub(r"\d+$|_(s\d+|\d+m)$", "", case.op)
        chosen.setdefault((case.suite, op, case.dtype == "int8"), (case, quick))
  return [(case.suite, case.label, quick) for case, quick in chosen.values()]


class QuickTest(parameterized.TestCase):
  @parameterized.parameters(_rows())
  def test_records_follow_the_schema(self, suite, label, quick):
    path = pathlib.Path(self.create_tempdir().full_path, "run.json")
    status = main.main(
      [
        *(["--quick"] if quick else []),
        "--repeats=1",
        f"--suite={suite}",
        f"--filter=^{label}$",
        f"--json={path}",
      ]
    )
    self.assertEqual(status, 0, msg="see the row's error above")
    records = json.loads(path.read_text())
    schema.validate(records)
    self.assertNotEmpty(records)
    for record in records:
      self.assertEqual(record["suite"], suite)
      self.assertEqual(record["quick"], quick)


class TourTest(absltest.TestCase):
  def test_every_suite_has_rows_and_every_row_is_there(self):
    cases = tour.cases(tour.settings())
    self.assertEqual({case.suite for case in cases}, set(suites.NAMES))
    self.assertEqual(
      [case.suite for case in cases[: len(suites.NAMES)]], list(suites.NAMES)
    )

  def test_rows_are_of_full_size(self):
    self.assertFalse(tour.settings().quick)
    self.assertEqual(tour.settings(repeats=2).repeats, 2)


if __name__ == "__main__":
  absltest.main()
