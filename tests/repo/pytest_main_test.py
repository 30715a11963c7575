"""How test files are run under Bazel: shards, filters, reports, devices."""

import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from tools.build_defs import alone, pytest_main

CASES = """
import os
import unittest

import pytest


def test_one():
  pass


class GroupTest(unittest.TestCase):

  def test_two(self):
    pass

  def test_three(self):
    pass


@pytest.mark.deviceless
def test_four():
  pass
"""
ALL = {"test_one", "test_two", "test_three", "test_four"}


# Each of these passes only after, or only before, another one.
IN_ORDER = """
import os
import signal
import threading
import unittest

import pytest

seen = []


class OrderTest(unittest.TestCase):

  def test_a_makes(self):
    seen.append(1)

  def test_b_needs(self):
    self.assertTrue(seen, "nobody was here")


@pytest.mark.parametrize("name", ["x", "y"])
def test_is_first(name):
  assert not seen
  seen.append(name)


def test_dies():
  if os.environ.get("DIE"):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.skipif(True, reason="on purpose")
def test_is_skipped():
  pass
"""

WITH_A_THREAD = (
  IN_ORDER + "threading.Thread(target=threading.Event().wait, daemon=True)"
  ".start()\n"
)


@pytest.fixture
def run(tmp_path):
  """Runs CASES with the environment given; returns status, names and output."""

  def write(text):
    (tmp_path / "cases.py").write_text(text)

  write(CASES)
  report = tmp_path / "report.xml"

  def run(**env):
    env = (
      {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("TEST", "XML_", "REQUIRE_", "NNX_ALONE"))
      }
      | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "XML_OUTPUT_FILE": str(report),
      }
      | env
    )
    # Not a pipe, which a process that a case leaves would keep open.
    with open(tmp_path / "output", "wb") as output:
      done = subprocess.run(
        [sys.executable, pytest_main.__file__, "cases.py"],
        cwd=tmp_path,
        env=env,
        stdout=output,
        stderr=subprocess.STDOUT,
      )
    cases = ElementTree.parse(report).iter("testcase")
    ran = {case.get("name") for case in cases if case.find("skipped") is None}
    return done.returncode, ran, (tmp_path / "output").read_text()

  run.write = write
  return run


def test_all_are_run_and_reported(run):
  status, ran, _ = run()
  assert (status, ran) == (0, ALL)


def test_shards_split_the_cases(run, tmp_path):
  shards = []
  for index in range(5):
    marker = tmp_path / f"shard{index}"
    status, ran, _ = run(
      TEST_TOTAL_SHARDS="5",
      TEST_SHARD_INDEX=str(index),
      TEST_SHARD_STATUS_FILE=str(marker),
    )
    assert status == 0
    assert marker.exists()
    shards.append(ran)
  assert sum(map(len, shards)) == 4
  assert set.union(*shards) == ALL


@pytest.mark.parametrize(
  "pattern, expected",
  [
    ("GroupTest", {"test_two", "test_three"}),
    ("GroupTest.test_two", {"test_two"}),
    ("test_t*", {"test_two", "test_three"}),
  ],
)
def test_filter(run, pattern, expected):
  status, ran, _ = run(TESTBRIDGE_TEST_ONLY=pattern)
  assert (status, ran) == (0, expected)


def test_a_filter_that_names_nothing_fails(run):
  status, ran, _ = run(TESTBRIDGE_TEST_ONLY="no_such_test")
  assert status != 0
  assert not ran


def test_without_its_device_a_test_is_skipped_in_words(run):
  status, ran, output = run(TEST_PLATFORM="tpu")
  assert (status, ran) == (0, {"test_four"})
  assert "no tpu device: numerics NOT run" in output


def test_without_a_required_device_it_fails(run):
  status, _, output = run(TEST_PLATFORM="tpu", REQUIRE_DEVICE="1")
  assert status != 0
  assert "no tpu device: numerics NOT run" in output


@pytest.mark.parametrize("text", [IN_ORDER, WITH_A_THREAD])
def test_alone_no_case_sees_another(run, text):
  run.write(text)
  status, _, output = run(NNX_ALONE="1")
  assert status == 1
  assert "nobody was here" in output
  assert "test_b_needs" in output
  assert "1 failed, 4 passed, 1 skipped" in output, output


def test_together_they_do(run):
  run.write(IN_ORDER)
  status, _, output = run()
  assert status == 1
  assert "test_is_first" in output
  assert "nobody was here" not in output


def test_alone_skips_and_reports_are_kept(run):
  run.write(IN_ORDER)
  _, ran, output = run(NNX_ALONE="1")
  assert "test_is_skipped" not in ran
  assert "SKIPPED" in output
  assert {"test_a_makes", "test_is_first[x]", "test_is_first[y]"} <= ran


@pytest.mark.parametrize("text", [IN_ORDER, WITH_A_THREAD])
def test_alone_a_case_that_dies_fails(run, text):
  run.write(text)
  status, _, output = run(NNX_ALONE="1", DIE="1")
  assert status == 1
  assert "2 failed" in output, output
  assert "test_dies" in output


_WAITING = """
threading.Thread(target=time.sleep, args=[9], daemon=True).start()
"""

STOPS = """
import threading
import time

import pytest


def test_stops():
  pytest.exit("enough", returncode=0)
"""


@pytest.mark.parametrize("alone", ["", "1"])
@pytest.mark.parametrize("thread", ["", _WAITING])
def test_a_case_that_ends_pytest_fails(run, alone, thread):
  run.write(STOPS + thread)
  assert run(NNX_ALONE=alone)[0] != 0


# None of these says how it went.
WITHOUT_A_WORD = """
import os
import sys
import threading
import time

import pytest


def test_ends_well():
  os._exit(0)


def test_ends_in_a_signal_without_a_name():
  os.kill(os.getpid(), 40)


def test_leaves_a_process():
  sleeping = [sys.executable, "-c", "import time; time.sleep(60)"]
  os.posix_spawn(sys.executable, sleeping, os.environ)
  if os.fork() == 0:
    time.sleep(60)
    os._exit(0)


def test_is_skipped():
  import atexit

  atexit.register(print, "a last word")
  pytest.skip("on purpose")
"""


@pytest.mark.parametrize("thread", ["", _WAITING])
def test_alone_a_case_that_ends_without_a_word_fails(run, thread):
  run.write(WITHOUT_A_WORD + thread)
  status, ran, output = run(NNX_ALONE="1")
  assert status == 1
  assert "2 failed, 1 passed, 1 skipped" in output, output
  assert "the process of the test ended with status 0" in output
  assert "the process of the test ended with signal 40" in output
  assert "on purpose" in output
  assert "test_leaves_a_process" in ran


def test_alone_one_of_some_is_always_the_same(run):
  names = [f"cases.py::test_{i}" for i in range(2000)]
  kept = alone.sample(names, 20)
  assert kept == alone.sample(names, 20)
  assert 50 < sum(kept) < 200
  [chosen] = [name for name in ALL if alone.sample([_node(name)], 3)[0]]
  assert run(NNX_ALONE="3")[1] == {chosen}


def _node(name):
  group = "GroupTest::" if name in ("test_two", "test_three") else ""
  return f"cases.py::{group}{name}"


def test_alone_a_sample_may_be_empty(run):
  status, ran, _ = run(NNX_ALONE="1000000")
  assert (status, ran) == (0, set())


def test_alone_goes_with_shards(run, tmp_path):
  ran = set()
  for index in range(3):
    marker = str(tmp_path / f"shard{index}")
    status, part, _ = run(
      NNX_ALONE="1",
      TEST_TOTAL_SHARDS="3",
      TEST_SHARD_INDEX=str(index),
      TEST_SHARD_STATUS_FILE=marker,
    )
    assert status == 0
    ran |= part
  assert ran == ALL
