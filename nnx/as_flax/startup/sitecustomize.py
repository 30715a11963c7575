"""Runs `import nnx.as_flax` in a program that has no line for it.

For the target `//nnx:as_flax`, which puts this folder on the PYTHONPATH of the
programs that depend on it: Python imports `sitecustomize` as it starts. It does
so in their child processes too. To keep the start of programs short, nothing is
imported before Flax is.
"""

import importlib.machinery
import os
import sys


class _BeforeFlax:
  """A finder that finds nothing, but hears of `import flax`."""

  def find_spec(self, name, path=None, target=None):
    if name.partition(".")[0] != "flax":
      return None
    sys.meta_path.remove(self)
    import nnx.as_flax  # noqa: F401

    # The search that is under way has passed the front of the list.
    return sys.meta_path[0].find_spec(name, path, target)


def _run_hidden() -> None:
  """Runs the `sitecustomize` of the host that this one hides."""
  here = os.path.dirname(os.path.abspath(__file__))
  others = [p for p in sys.path if os.path.abspath(p or ".") != here]
  spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
  if spec is not None and spec.loader is not None:
    spec.loader.exec_module(sys.modules[__name__])


sys.meta_path.insert(0, _BeforeFlax())
_run_hidden()
