"""The `flax.nnx` whose place is taken: loaded under another name, on demand.

Its modules are called `_flax_nnx` and so on. What they import by the name
`flax.nnx`, while they are loaded or later, is each other.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from typing import Any

from nnx.as_flax import loaders

_THEIRS, _NAME = "flax.nnx", "_flax_nnx"


def flax_nnx() -> Any:
  """Returns the real `flax.nnx`, which `bridge.from_flax_nnx` converts from.

  Example:

    >>> import nnx.as_flax
    >>> theirs = nnx.as_flax.flax_nnx()
    >>> theirs.Linear is nnx.Linear, theirs.Linear.__module__
    (False, '_flax_nnx.nn.linear')

  Returns:
    The module. Programs under the switch need it for conversions alone.
  """
  if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())
  return importlib.import_module(_NAME)


class _Finder(importlib.abc.MetaPathFinder):
  def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
    if name == _NAME:
      folder = os.path.join(importlib.import_module("flax").__path__[0], "nnx")
      spec = importlib.util.spec_from_file_location(
        name,
        os.path.join(folder, "__init__.py"),
        submodule_search_locations=[folder],
      )
    elif name.startswith(f"{_NAME}."):
      spec = importlib.machinery.PathFinder.find_spec(name, path)
    else:
      return None
    if spec is not None and spec.loader is not None:
      spec.loader = _Loader(spec.loader)
    return spec


class _Loader(loaders.Wrapping):
  """Loads a module that imports in its own way."""

  def exec_module(self, module: types.ModuleType) -> None:
    vars(module)["__builtins__"] = {**vars(builtins), "__import__": _import}
    super().exec_module(module)


class _Flax(types.ModuleType):
  """What these modules take for `flax`: all of it, with its own `nnx`."""

  def __getattr__(self, name: str) -> Any:
    if name == "nnx":
      return sys.modules[_NAME]
    return getattr(sys.modules["flax"], name)


_FLAX = _Flax("flax")


def _import(
  name: str,
  globals: Mapping[str, Any] | None = None,
  locals: Mapping[str, Any] | None = None,
  fromlist: Sequence[str] | None = (),
  level: int = 0,
) -> Any:
  """Stands in for `__import__` in these modules."""
  is_theirs = name == _THEIRS or name.startswith(f"{_THEIRS}.")
  if not level and is_theirs:
    name = _NAME + name.removeprefix(_THEIRS)
  fromlist = fromlist or ()
  if level or name.partition(".")[0] != "flax":
    result = builtins.__import__(name, globals, locals, fromlist, level)
    return result if fromlist or not is_theirs else _FLAX
  items = [item for item in fromlist if item != "nnx"]
  result = builtins.__import__(name, globals, locals, items, 0)
  return _FLAX if name == "flax" or not fromlist else result
