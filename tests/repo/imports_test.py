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


# What is not ours is imported once, each module in a fork of that process, or
# of one that has imported the module's package, which always comes first: what
# is there by then is found, and not imported again.
PROGRAM = """
import gc, importlib, os, sys, traceback
import flax.linen, jax.numpy, numpy
gc.freeze()  # a collection in a fork would copy all of it

def passes(function, *args):
  sys.stdout.flush()
  child = os.fork()
  if not child:
    status = 1
    try:
      function(*args)
      status = 0
    except BaseException:
      traceback.print_exc()
    finally:
      sys.stdout.flush()
      os._exit(status)
  return os.waitpid(child, 0)[1] == 0

def import_members(package, names):
  if package:
    importlib.import_module(package)
  for name in names:
    if name not in sys.modules and not passes(importlib.import_module, name):
      print(name)

packages = {}
for name in sys.argv[1:]:
  assert name.split(".")[0] not in sys.modules, name
  packages.setdefault(name.rpartition(".")[0], []).append(name)
for package, names in packages.items():
  if not passes(import_members, package, names):
    print(*names)
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


@pytest.mark.parametrize("package", ["", "package."])
def test_what_needs_an_order_is_seen(package, tmp_path):
  folder = tmp_path / package.rstrip(".")
  folder.mkdir(exist_ok=True)
  (folder / "__init__.py").touch()
  (folder / "first.py").write_text(f"import {package}second\nvalue = 1\n")
  (folder / "second.py").write_text(f"from {package}first import value\n")
  names = [f"{package}{name}" for name in ("second", "first")]
  assert imported_alone(names, [str(tmp_path), *sys.path]) == [names[1]]


def test_a_package_that_cannot_be_imported_is_seen_in_all_of_it(tmp_path):
  (tmp_path / "package").mkdir()
  (tmp_path / "package" / "__init__.py").write_text("import nothing_of_this\n")
  (tmp_path / "package" / "first.py").touch()
  path = [str(tmp_path), *sys.path]
  names = ["package", "package.first"]
  assert imported_alone(names, path) == names
