"""How test files are run under Bazel: shards, filters, reports, devices."""

import os
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from tools.build_defs import pytest_main

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


@pytest.fixture
def run(tmp_path):
  """Runs CASES with the environment given; returns status, names and output."""
  (tmp_path / "cases.py").write_text(CASES)
  report = tmp_path / "report.xml"

  def run(**env):
    env = (
      {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("TEST", "XML_", "REQUIRE_"))
      }
      | {"JAX_PLATFORMS": "cpu", "XML_OUTPUT_FILE": str(report)}
      | env
    )
    done = subprocess.run(
      [sys.executable, pytest_main.__file__, "cases.py"],
      cwd=tmp_path,
      env=env,
      capture_output=True,
      text=True,
    )
    cases = ElementTree.parse(report).iter("testcase")
    ran = {case.get("name") for case in cases if case.find("skipped") is None}
    return done.returncode, ran, done.stdout + done.stderr

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
