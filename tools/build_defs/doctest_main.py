"""Runs the examples in the docstrings of the modules named as arguments."""

import doctest
import importlib
import os
import sys
from typing import Any

_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Finder(doctest.DocTestFinder):
  """Finds also the methods of a class that says it is of another module.

  Such a class is written in one file and imported from another.
  """

  def _from_module(self, module: Any, object: Any) -> bool:
    # A method of doctest that its types leave out.
    parent: Any = super()
    if parent._from_module(module, object):
      return True
    owner, _, name = getattr(object, "__qualname__", "").rpartition(".")
    cls = vars(module).get(owner)
    return (
      isinstance(cls, type)
      and cls.__module__ == module.__name__
      and name in vars(cls)
    )


def main(names: list[str]) -> int:
  """Returns the exit status: 1 for a failed example or a module without any."""
  status = 0
  for name in names:
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=_OPTIONS)
    for test in Finder().find(module, name):
      runner.run(test)
    failed, attempted = runner.summarize()
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
