"""Runs the examples in the docstrings of the modules named as arguments."""

import doctest
import importlib
import os
import sys

_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def main(names: list[str]) -> int:
  """Returns the exit status: 1 for a failed example or a module without any."""
  status = 0
  for name in names:
    module = importlib.import_module(name)
    failed, attempted = doctest.testmod(module, optionflags=_OPTIONS)
    print(f"{name}: {attempted} examples, {failed} failed")
    if failed or not attempted:
      status = 1
  return status


if __name__ == "__main__":
  if os.environ.get("QUICK_XLA") == "1":
    from tools.build_defs import quick_xla

    quick_xla.use()
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  sys.exit(main(sys.argv[1:]))
