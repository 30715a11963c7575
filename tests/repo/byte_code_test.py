"""The byte code that builds make: whole, trusted, and the same each time."""

import importlib.util
import os
import subprocess
import sys

import pytest

import nnx
from tools.build_defs import byte_code

# Bits of the second word: by hash, and not to be checked against the source.
UNCHECKED_HASH = (0b01).to_bytes(4, "little")


def compiled(directory, text):
  source, target = directory / "a.py", directory / "a.pyc"
  source.write_text(text)
  byte_code.main([str(source), str(target)])
  return target.read_bytes()


def test_it_is_never_checked_and_always_the_same(tmp_path):
  text = "X = {'a', 'b', 'c'}\ndef f(x: int) -> int:\n  return x in {1, 2, 3}\n"
  data = compiled(tmp_path, text)
  assert data[:4] == importlib.util.MAGIC_NUMBER
  assert data[4:8] == UNCHECKED_HASH
  assert compiled(tmp_path, text) == data


def test_what_the_compiler_warns_of_is_an_error(tmp_path):
  source = tmp_path / "a.py"
  source.write_text("x = 1 is 1\n")
  done = subprocess.run(
    [sys.executable, "-ISWerror", byte_code.__file__, source, tmp_path / "pyc"],
    capture_output=True,
    check=False,
    text=True,
  )
  assert done.returncode != 0
  assert '"is" with ' in done.stderr  # a literal, or which one


@pytest.mark.skipif("TEST_SRCDIR" not in os.environ, reason="not under Bazel")
def test_our_libraries_bring_it():
  path = importlib.util.cache_from_source(nnx.__file__)
  with open(path, "rb") as file:
    assert file.read(8)[4:] == UNCHECKED_HASH
