"""Tests of the table, the files and the plot that a run leaves behind."""

import json
import pathlib

from absl.testing import absltest

from tools.bench import render_results, report

_PNG = b"\x89PNG\r\n\x1a\n"


def _record(**changes):
  return {
    "suite": "kv_cache",
    "op": "update",
    "case": "B8",
    "dtype": "bfloat16",
    "ours_ms": 0.05,
    "ours_min_ms": 0.04,
    "ours_max_ms": 0.06,
    "baseline": "scatter, jit",
    "baseline_ms": 5.0,
    "baseline_min_ms": 4.0,
    "baseline_max_ms": 6.0,
    "ratio": 100.0,
    "floor": "copy of the new rows",
    "floor_ms": 0.04,
    "fraction_of_floor": 0.8,
    "clock": "wall",
    "repeats": 9,
    "quick": False,
    "details": {},
    "device": "cpu: test",
    "versions": {"python": "3", "jax": "0", "jaxlib": "0", "commit": "c"},
  } | changes


def _records():
  return [
    _record(),
    _record(case="B1", baseline_ms=0.025, ratio=0.5),
    _record(suite="graph", dtype="", floor_ms=None, fraction_of_floor=None),
  ]


class TableTest(absltest.TestCase):
  def test_columns_line_up(self):
    lines = report.text_table(_records()).splitlines()
    header, rows = lines[0], [lines[2], lines[3], lines[5]]
    for column in ("case", "dtype", "baseline"):
      start = header.index(column)
      for row in rows:
        self.assertEqual(row[start - 1], " ")
        self.assertNotEqual(row[start], " ")

  def test_losing_row_is_shown_like_any_other(self):
    table = report.text_table(_records())
    self.assertIn("0.50x", table)
    self.assertIn("100x", table)

  def test_missing_values_are_dashes(self):
    row = report.text_table(_records()[2:]).splitlines()[2].split()
    self.assertEqual(row[-2:], ["-", "-"])

  def test_summary_gives_mean_and_worst(self):
    self.assertEqual(
      report.summary_lines(_records()[:2]),
      [
        "kv_cache/update against scatter, jit: geometric mean 7.07x, "
        "worst 0.50x, 2 rows"
      ],
    )

  def test_text_names_device_and_versions(self):
    text = report.full_text(_records())
    self.assertIn("cpu: test; commit c, jax 0", text)

  def test_no_rows(self):
    self.assertEqual(report.full_text([]), "no rows")


class FilesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir().full_path)

  def test_json_round_trip(self):
    path = self.folder / "run.json"
    report.write_json(_records(), path)
    self.assertEqual(report.read_json(path), _records())

  def test_record_against_the_schema_is_not_written(self):
    path = self.folder / "run.json"
    with self.assertRaisesRegex(ValueError, "ratio"):
      report.write_json([_record(ratio=None)], path)
    self.assertFalse(path.exists())

  def test_plot_is_a_png(self):
    path = self.folder / "run.png"
    report.write_plot(_records(), path)
    self.assertEqual(path.read_bytes()[:8], _PNG)

  def test_plot_of_nothing_is_refused(self):
    with self.assertRaisesRegex(ValueError, "`records` must hold at least"):
      report.write_plot([], self.folder / "run.png")


class ResultsTest(absltest.TestCase):
  def test_markdown_holds_every_row(self):
    text = report.markdown([("run.json", _records())])
    self.assertIn("## run.json", text)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    self.assertLen(rows, 2 + 3)  # Two lines of header.
    self.assertIn("| kv_cache | update | B1 |", text)

  def test_command_writes_the_file(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    report.write_json(_records(), folder / "run.json")
    render_results.main([f"--folder={folder}"])
    self.assertEqual(
      (folder / "RESULTS.md").read_text(),
      report.markdown([("run.json", _records())]),
    )

  def test_results_of_gpus_follow(self):
    folder = pathlib.Path(self.create_tempdir().full_path)
    report.write_json(_records(), folder / "run.json")
    (folder / "gpu").mkdir()
    bench = [
      {"row": "decode/B1/float16", "ms": ms, "fraction_of_copy": 0.5}
      for ms in (
        {"ours": 2.0, "xla": 4.0, "torch": 1.0, "torch_flash": 6.0},
        {"ours": 1, "xla": 1, "attend": 2.0, "torch_alone": 5.0},
      )
    ]
    result = {
      "device": "a GPU",
      "versions": {"jax": "1.2"},
      "tests": [{"passed": 3, "failed": 1}, {"passed": 4, "failed": 0}],
      "bench": bench,
    }
    (folder / "gpu" / "card.json").write_text(json.dumps(result))
    (folder / "gpu" / "card_again.json").write_text(
      json.dumps(result | {"tests": []})
    )
    text = render_results.render(folder)
    self.assertTrue(
      text.startswith(report.markdown([("run.json", _records())]))
    )
    self.assertIn("### gpu/card.json\n\na GPU; jax 1.2. Of the op tests", text)
    self.assertIn("7 passed and 1 failed", text)
    self.assertIn("jax 1.2. Measured only: no tests ran.", text)
    self.assertIn(
      "| decode/B1/float16 | 2.00 | 2.00x | - | 0.50x | 3.00x | - | 0.50 |\n"
      "| decode/B1/float16 | 1.00 | 1.00x | - | - | - | 2.50x | 0.50 |\n",
      text,
    )

  def test_committed_results_are_rendered(self):
    folder = pathlib.Path(render_results.__file__).with_name("results")
    self.assertEqual(
      (folder / "RESULTS.md").read_text(),
      render_results.render(folder),
      msg="regenerate: bazel run //tools/bench:render_results",
    )


if __name__ == "__main__":
  absltest.main()
