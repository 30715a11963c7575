"""Runs a program with `nnx` in the place of `flax.nnx`.

python -m nnx.as_flax program.py args...
python -m nnx.as_flax -m package.module args...
"""

import os
import runpy
import sys

_USAGE = "usage: python -m nnx.as_flax (program.py | -m module) [argument ...]"


def main(argv: list[str]) -> None:
  """Runs what `argv` names, as Python itself would.

  Args:
    argv: the words after `python -m nnx.as_flax`.
  """
  if not argv or argv[0].startswith("-") and argv[0] != "-m" or argv == ["-m"]:
    sys.exit(_USAGE)
  import nnx.as_flax  # noqa: F401

  if argv[0] == "-m":
    sys.argv = argv[1:]
    runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
  else:
    sys.argv = argv
    # As of a program that Python runs: its folder in place of the current one.
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
  main(sys.argv[1:])
