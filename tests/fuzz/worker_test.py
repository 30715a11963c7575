"""What the fuzzers' workers find, and how they tell of it."""

import os
import subprocess
import sys

from absl.testing import parameterized

from tests.fuzz import worker

MODULE = "tests.fuzz.worker_families"


def _run(*names, **plan):
  plan = worker.Plan(only=names, **plan)
  return worker.run(MODULE, plan, tell=lambda text: None)


class WorkerTest(parameterized.TestCase):
  def test_counts_the_cases_of_all_families(self):
    report = _run("good", cases=250)
    self.assertEqual(report.cases, {"good": 250})
    self.assertEqual(report.findings, [])
    self.assertIn("250 cases (good 250) in", str(report))

  def test_workers_share_the_work(self):
    report = _run("good", cases=1000, workers=2, renew=2)
    self.assertEqual(report.cases, {"good": 1000})

  def test_stops_when_the_time_is_over(self):
    report = _run("good", seconds=0.0)
    self.assertEqual(report.cases, {"good": 0})

  @parameterized.parameters(
    ("raises", "ValueError: this case was a seven"),
    ("dies", "the worker died of SIGABRT"),
    ("leaves", "the worker ended with status 3"),
    ("hangs", "did not end within 3 s"),
  )
  def test_a_fault_is_a_finding_of_one_case(self, name, words):
    report = _run(name, cases=200, each=200, patience=3.0)
    [finding] = report.findings
    again, said = finding.split("\n", 1)
    self.assertRegex(again, rf"^python -m {MODULE} --case={name}:0:\d+$")
    self.assertIn(words, said)
    self.assertLess(report.cases[name], 200)

  def test_a_worker_that_died_is_replaced(self):
    report = _run("dies", "good", cases=800, each=200)
    self.assertLen(report.findings, 2)
    self.assertEqual(report.cases["good"], 400)

  def test_a_program_that_cannot_be_made_is_a_finding(self):
    report = _run("no_program", cases=10)
    self.assertIn("--case=no_program:0:-1\n", report.findings[0])
    self.assertIn("ValueError: no program for", report.findings[0])

  def test_the_line_makes_the_finding_again(self):
    [finding] = _run("raises", cases=200, each=200).findings
    case = finding.split("\n")[0].split("--case=")[1]
    code = (
      "import sys; from tests.fuzz import worker;"
      f" sys.exit(worker.main({MODULE!r}))"
    )
    path = os.pathsep.join(path for path in sys.path if path)
    ran = subprocess.run(
      [sys.executable, "-c", code, f"--case={case}"],
      env=os.environ | {"PYTHONPATH": path},
      capture_output=True,
      text=True,
    )
    self.assertEqual(ran.returncode, 1, ran.stderr)
    self.assertIn("this case was a seven", ran.stdout)

  def test_check_fails_with_the_findings(self):
    plan = worker.Plan(cases=200, each=200, only=("raises",))
    with self.assertRaisesRegex(AssertionError, "this case was a seven"):
      worker.check(MODULE, plan)
