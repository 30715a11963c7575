"""Runs each test case of a file alone, in a process that ran no other one.

With NNX_ALONE=1 in the environment every case is run so, with NNX_ALONE=20 one
of 20, always the same ones: tests that pass only after others are found.

The process is a fork of the one that has collected the tests, which is what a
fresh one is when its first test begins: it has imported the file, and nothing
more. A fork takes along one thread alone, so where importing the file started
any, as using jax does, a fresh process is started instead.
"""

from collections.abc import Sequence
import os
import pathlib
import pickle
import signal
import subprocess
import sys
import tempfile
from typing import IO, Any
from xml.etree import ElementTree
import zlib

import pytest

# Of the case's own environment: it must be run, and by nobody else.
_NOT_ALONE = (
  "NNX_ALONE",
  "TESTBRIDGE_TEST_ONLY",
  "TEST_SHARD_INDEX",
  "TEST_SHARD_STATUS_FILE",
  "TEST_TOTAL_SHARDS",
)


def sample(names: Sequence[str], one_of: int) -> list[bool]:
  """Says which of the cases are in the sample.

  Args:
    names: of the cases.
    one_of: about how many cases there are for one of the sample.
  """
  return [zlib.crc32(name.encode()) % one_of == 0 for name in names]


class AlonePlugin:
  """Runs the cases of a pytest session in processes of their own.

  Args:
    program: what runs one case in a fresh process, given its name.
  """

  def __init__(self, program: Sequence[str]):
    self._program = list(program)
    self._reports: list[dict[str, Any]] | None = None

  @pytest.hookimpl(tryfirst=True)
  def pytest_runtest_protocol(self, item: pytest.Item) -> bool:
    item.ihook.pytest_runtest_logstart(
      nodeid=item.nodeid, location=item.location
    )
    run = self._forked if _threads() == 1 else self._fresh
    for report in run(item):
      item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(
      nodeid=item.nodeid, location=item.location
    )
    return True

  def pytest_runtest_logreport(self, report: Any) -> None:
    """Keeps a report, in the fork, for the process that waits for it."""
    if self._reports is not None:
      config = self._config
      data = config.hook.pytest_report_to_serializable(
        config=config, report=report
      )
      self._reports.append(data)

  def pytest_configure(self, config: pytest.Config) -> None:
    self._config = config

  def _forked(self, item: pytest.Item) -> list[Any]:
    sys.stdout.flush()
    sys.stderr.flush()
    # A file, as what the case leaves running would keep a pipe open.
    with tempfile.TemporaryFile() as told:
      child = os.fork()
      if child == 0:
        self._in_the_fork(item, told)
      _, status = os.waitpid(child, 0)
      told.seek(0)
      reports = told.read()
    code = os.waitstatus_to_exitcode(status)
    if code != 0 or not reports:
      return [_failure(item, _end(code))]
    hook = item.config.hook
    return [
      hook.pytest_report_from_serializable(config=item.config, data=data)
      for data in pickle.loads(reports)
    ]

  def _in_the_fork(self, item: pytest.Item, told: IO[bytes]) -> None:
    """Runs the case, tells of it, and ends the process."""
    status = 1
    try:
      # What the reporter of this process has to say is said by the other one.
      nowhere = os.open(os.devnull, os.O_WRONLY)
      os.dup2(nowhere, 1)
      self._reports = []
      from _pytest import runner

      runner.runtestprotocol(item, nextitem=None)
      pickle.dump(self._reports, told)
      told.flush()
      status = 0
    finally:
      sys.stderr.flush()
      os._exit(status)

  def _fresh(self, item: pytest.Item) -> list[Any]:
    environment = {k: v for k, v in os.environ.items() if k not in _NOT_ALONE}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    with tempfile.TemporaryDirectory() as directory:
      report = pathlib.Path(directory, "report.xml")
      output = pathlib.Path(directory, "output")
      with open(output, "wb") as written:
        ran = subprocess.run(
          [*self._program, item.nodeid],
          env={**environment, "XML_OUTPUT_FILE": str(report)},
          stdout=written,
          stderr=subprocess.STDOUT,
        )
      text = output.read_text(errors="replace")
      # A process that ends well may have ended in the middle of the case.
      cases = []
      if report.exists():
        cases = list(ElementTree.parse(report).iter("testcase"))
    if ran.returncode != 0 or not cases:
      return [_failure(item, f"{_end(ran.returncode)}\n{text}")]
    skipped = [case.find("skipped") for case in cases]
    for why in skipped:
      if why is not None and why.get("type") == "pytest.skip":
        where = (*item.location[:2], f"Skipped: {why.get('message')}")
        return [_report(item, "skipped", where)]
    return [_report(item, "passed", None)]


def _end(code: int) -> str:
  """Says how the process of a case ended that has not told of it."""
  how = f"status {code}"
  if code < 0:
    names = {s.value: s.name for s in signal.Signals}
    how = names.get(-code, f"signal {-code}")
  return f"the process of the test ended with {how}"


def _threads() -> int:
  return len(os.listdir("/proc/self/task"))


def _report(item: pytest.Item, outcome: Any, words: Any) -> pytest.TestReport:
  return pytest.TestReport(
    item.nodeid, item.location, dict.fromkeys(item.keywords, 1), outcome,
    words, "call",
  )  # fmt: skip


def _failure(item: pytest.Item, words: str) -> pytest.TestReport:
  return _report(item, "failed", f"{item.nodeid}, run alone: {words}")
