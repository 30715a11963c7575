"""`nnx.kernels` and `nnx.bridge` in a checkout, where they lie beside `nnx`.

`kernels` and `bridge` are other people's names too; under `nnx` nothing else
can be meant. A wheel has the two packages there. In a checkout they are folders
beside `nnx` and are found by their place: where the short name means them, as
it does in this workspace, the long one is a second name of the same modules;
where it means something else, they are loaded by the long one alone.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import pathlib
import sys
import types


class _SecondName(importlib.abc.MetaPathFinder, importlib.abc.Loader):
  """Finds `nnx.kernels.x` as `kernels.x`, so that there is one of it."""

  def __init__(self, name: str):
    self._prefix = f"nnx.{name}."

  def find_spec(self, fullname, path=None, target=None):
    if not fullname.startswith(self._prefix):
      return None
    if importlib.util.find_spec(fullname.removeprefix("nnx.")) is None:
      return None
    return importlib.machinery.ModuleSpec(fullname, self)

  def create_module(self, spec):
    module = importlib.import_module(spec.name.removeprefix("nnx."))
    spec.loader_state = module.__spec__
    return module

  def exec_module(self, module):
    module.__spec__ = module.__spec__.loader_state


def _meaning(name: str) -> str | None:
  """Returns the file that `import name` would run, if any."""
  try:
    spec = importlib.util.find_spec(name)
  except ValueError:  # a module without a spec has been put in its place
    return None
  return spec.origin if spec is not None else None


def package(name: str) -> types.ModuleType:
  """Imports a package that lies beside `nnx`, as `nnx.<name>`.

  Example:

    >>> import nnx
    >>> nnx.kernels.kv_cache.update.__name__
    'update'

  Args:
    name: the short name of the package.
  """
  folder = pathlib.Path(__file__).parent.parent / name
  long = f"nnx.{name}"
  meaning = _meaning(name)
  if meaning and (folder / "__init__.py").samefile(meaning):
    sys.meta_path.insert(0, _SecondName(name))
    sys.modules[long] = importlib.import_module(name)
  else:
    spec = importlib.util.spec_from_file_location(
      long, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[long] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[long])
  return sys.modules[long]
