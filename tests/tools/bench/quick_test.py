"""Runs real rows of every suite the quick way and checks their records."""

import json
import pathlib

from absl.testing import absltest, parameterized

from tools.bench import harness, main, schema, suites


def _labels():
  """Returns suite and a quick row for each op, and one of quantised data."""
  settings = harness.Settings.for_run(quick=True)
  chosen = {}
  for name in suites.NAMES:
    for case in suites.cases(name, settings):
      quantised = case.dtype == "int8"
      chosen.setdefault((case.suite, case.op, quantised), case)
  return [(case.suite, case.label) for case in chosen.values()]


class QuickTest(parameterized.TestCase):
  @parameterized.parameters(_labels())
  def test_records_follow_the_schema(self, suite, label):
    path = pathlib.Path(self.create_tempdir().full_path, "run.json")
    status = main.main(
      [
        "--quick",
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
      self.assertTrue(record["quick"])


if __name__ == "__main__":
  absltest.main()
