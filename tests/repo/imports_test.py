"""Every module can be imported first, by a process that imported no other."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path.cwd()
PACKAGES = ("bridge", "kernels", "nnx")


def modules() -> list[str]:
  names = []
  for package in PACKAGES:
    for path in sorted((ROOT / package).rglob("*.py")):
      parts = path.relative_to(ROOT).with_suffix("").parts
      names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
  return names


# What is not ours is imported once; each module in a fork of that process.
PROGRAM = """
import importlib, os, sys, traceback
import flax.linen, jax.numpy, numpy
for name in sys.argv[1:]:
  assert name.split(".")[0] not in sys.modules, name
  sys.stdout.flush()
  child = os.fork()
  if not child:
    status = 1
    try:
      importlib.import_module(name)
      status = 0
    except BaseException:
      traceback.print_exc()
    finally:
      os._exit(status)
  if os.waitpid(child, 0)[1]:
    print(name)
"""


def imported_alone(names: list[str], path: list[str]) -> list[str]:
  """The modules of `names` that cannot be imported first."""
  done = subprocess.run(
    [sys.executable, "-W", "ignore", "-c", PROGRAM, *names],
    env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  return done.stdout.split()


def test_every_module_is_imported_alone():
  names = modules()
  assert len(names) > 80, names
  assert imported_alone(names, sys.path) == []


@pytest.fixture
def cycle(tmp_path):
  """A package that can be imported in one order only."""
  (tmp_path / "first.py").write_text("import second\nvalue = 1\n")
  (tmp_path / "second.py").write_text("from first import value\n")
  return tmp_path


def test_what_needs_an_order_is_seen(cycle):
  path = [str(cycle), *sys.path]
  assert imported_alone(["second", "first"], path) == ["first"]
