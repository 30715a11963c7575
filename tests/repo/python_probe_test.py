"""Which interpreters are refused, and in what words."""

import sys
import sysconfig

import pytest

from tools.build_defs import python_probe

HEADERS = sysconfig.get_path("include")


def refusal(**changes):
  found = {
    "executable": "/usr/bin/python3",
    "implementation": "cpython",
    "version": (3, 12),
    "gil_disabled": False,
    "include": HEADERS,
  }
  return python_probe.refusal(**(found | changes))


def test_the_python_that_runs_this_is_accepted():
  assert refusal(version=sys.version_info[:2]) is None


@pytest.mark.parametrize(
  "changes, what",
  [
    ({"version": (3, 10)}, "is cpython 3.10:"),
    ({"version": (3, 15)}, "is cpython 3.15:"),
    ({"implementation": "pypy"}, "is pypy 3.12:"),
    ({"gil_disabled": True}, "is cpython 3.12 (free-threaded):"),
  ],
)
def test_an_unsupported_python_is_refused_in_one_sentence(changes, what):
  assert refusal(**changes) == (
    "CPython 3.11 to 3.14, with the global lock, is needed, but "
    f"`/usr/bin/python3` {what} install python3, python3-dev and python3-pip "
    "of such a version, or name another interpreter with "
    "--repo_env=NNX_PYTHON=..."
  )


def test_pip_is_told_what_else_to_do():
  said = refusal(gil_disabled=True, otherwise="or call another pip")
  assert said.endswith("of such a version, or call another pip")


def test_what_runs_this_is_described():
  found = python_probe.describe()
  assert found["version"] == sys.version_info[:2]
  assert python_probe.refusal(**found) is None


def test_a_python_without_headers_is_refused_in_one_sentence(tmp_path):
  assert refusal(include=str(tmp_path)) == (
    f"`/usr/bin/python3` has no headers (`{tmp_path}` holds no Python.h): "
    "install its development package, such as Debian's python3.12-dev, or "
    "name another interpreter with --repo_env=NNX_PYTHON=..."
  )
