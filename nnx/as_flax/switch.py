"""The switch itself: a finder that answers `flax.nnx` with `nnx`."""

from __future__ import annotations

from collections.abc import Iterator
import importlib.abc
import importlib.machinery
import sys
import types
from typing import Any

from nnx import neighbours
from nnx.as_flax import agreement, loaders, places

_NAME = "flax.nnx"


class _AfterFlax(loaders.Wrapping):
  """Loads Flax by its own loader, and has it agree with `nnx` at once."""

  def exec_module(self, module: types.ModuleType) -> None:
    assert module.__spec__ is not None
    module.__spec__.loader = module.__loader__ = self._loader
    super().exec_module(module)
    agreement.agree()


class _Finder(importlib.abc.MetaPathFinder):
  def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
    if name == "flax":
      for finder in sys.meta_path:
        if finder is not self:
          spec = finder.find_spec(name, path, target)
          if spec is not None:
            spec.loader = _AfterFlax(spec.loader)
            return spec
    elif places.place(name) is not None:
      return importlib.machinery.ModuleSpec(
        name, neighbours.SecondName(places.module)
      )
    return None


def install() -> None:
  """Turns the switch; once it is turned, does nothing.

  Example:

    >>> from nnx.as_flax import switch
    >>> switch.install()
    >>> import flax.nnx, nnx
    >>> flax.nnx is nnx
    True

  Raises:
    ImportError: if the real `flax.nnx` is loaded.
  """
  if any(isinstance(finder, _Finder) for finder in sys.meta_path):
    return
  if _NAME in sys.modules:
    raise ImportError(_too_late())
  sys.meta_path.insert(0, _Finder())
  if "flax" in sys.modules:
    agreement.agree()


def _too_late() -> str:
  users = list(_users())
  if users:
    shown = "; ".join(
      f"`{name}` holds {', '.join(f'`{n}`' for n in names[:3])}"
      for name, names in users[:5]
    )
    if len(users) > 5:
      shown += f"; and {len(users) - 5} other modules"
    by_whom = f"was loaded already: {shown}"
  else:
    by_whom = "was loaded already, though no module holds it"
  return (
    f"`nnx.as_flax` must come before `flax.nnx` is loaded, but it {by_whom}."
    " Write `import nnx.as_flax` above every other import of the program, or"
    " run it as `python -m nnx.as_flax program.py`, tests as `pytest -p"
    " nnx.as_flax.pytest_plugin`."
  )


def _users() -> Iterator[tuple[str, list[str]]]:
  """Finds modules with something of `flax.nnx` among their globals."""
  for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] in ("flax", "nnx"):
      continue
    held = [
      key
      for key, value in list(getattr(module, "__dict__", {}).items())
      if _is_of_flax(value)
    ]
    if held:
      yield name, held


def _is_of_flax(value: Any) -> bool:
  if isinstance(value, types.ModuleType):
    # `import flax.nnx` leaves `flax` itself in the hands of a program.
    home = _NAME if value is sys.modules.get("flax") else value.__name__
  elif isinstance(value, type):
    home = " ".join(str(base.__module__) for base in value.__mro__)
  else:
    home = str(vars(type(value)).get("__module__"))
    if isinstance(value, types.FunctionType):
      home = str(value.__module__)
  return any(
    part == _NAME or part.startswith(f"{_NAME}.") for part in home.split()
  )
