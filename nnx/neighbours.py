"""`nnx.kernels` and `nnx.bridge` in a checkout, where they lie beside `nnx`.

`kernels` and `bridge` are other people's names too; under `nnx` nothing else
can be meant. A wheel has the two packages there. In a checkout they are folders
beside `nnx`, and Python is told where: where the short name means them, as it
does in this workspace, the long one is a second name of the same modules; where
it means something else, they are loaded by the long one alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import types
from typing import Any

_BESIDE = pathlib.Path(__file__).parent.parent
_NAMES = ("bridge", "kernels")


class SecondName(importlib.abc.Loader):
  """Loads a module by giving one that has a name already.

  Example:

    >>> import importlib.util
    >>> import math
    >>> from nnx import neighbours
    >>> loader = neighbours.SecondName(lambda name: math)
    >>> spec = importlib.util.spec_from_loader("nnx.sums", loader)
    >>> module = importlib.util.module_from_spec(spec)
    >>> spec.loader.exec_module(module)
    >>> module is math, module.__spec__.name
    (True, 'math')

  Args:
    find: given the second name, returns the module.
  """

  def __init__(self, find: Callable[[str], types.ModuleType]):
    self._find = find

  def create_module(
    self, spec: importlib.machinery.ModuleSpec
  ) -> types.ModuleType:
    """Returns the module that is there."""
    module = self._find(spec.name)
    spec.loader_state = module.__spec__
    return module

  def exec_module(self, module: types.ModuleType) -> None:
    """Gives the module the name back by which it was loaded first."""
    assert module.__spec__ is not None
    module.__spec__ = module.__spec__.loader_state


def _by_short_name(name: str) -> types.ModuleType:
  return importlib.import_module(name.removeprefix("nnx."))


@functools.cache
def _is_meant_by(name: str) -> bool:
  """Tells whether `import name` is the folder beside `nnx`."""
  try:
    spec = importlib.util.find_spec(name)
  except ValueError:  # a module without a spec has been put in its place
    return False
  if spec is None or not spec.origin:
    return False
  source = pathlib.Path(spec.origin)
  return source.exists() and source.samefile(_BESIDE / name / "__init__.py")


class _Finder(importlib.abc.MetaPathFinder):
  def find_spec(
    self,
    fullname: str,
    path: Sequence[str] | None = None,
    target: types.ModuleType | None = None,
  ) -> Any:
    # It is asked for every module that is imported from now on.
    top, _, short = fullname.partition(".")
    name, _, within = short.partition(".")
    if top != "nnx" or name not in _NAMES:
      return None
    source = _BESIDE / name / "__init__.py"
    if not source.exists():
      return None
    if _is_meant_by(name):
      if importlib.util.find_spec(short) is None:
        return None
      return importlib.machinery.ModuleSpec(
        fullname, SecondName(_by_short_name)
      )
    if within:  # found by the `__path__` of the package, like any module
      return None
    return importlib.util.spec_from_file_location(
      fullname, source, submodule_search_locations=[str(source.parent)]
    )


def find() -> None:
  """Tells Python where `nnx.kernels` and `nnx.bridge` are.

  A finder knows one way only in which a name is found, so telling twice adds
  nothing.

  Example:

    >>> from nnx import neighbours
    >>> neighbours.find()
    >>> import nnx.kernels
    >>> nnx.kernels.kv_cache.update.__name__
    'update'
  """
  if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())
