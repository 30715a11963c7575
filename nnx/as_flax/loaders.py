"""Loaders that do something more than the one that finds the source."""

from __future__ import annotations

import importlib.abc
import types
from typing import Any


class Wrapping(importlib.abc.Loader):
  """Loads a module by another loader; the base of those that do more.

  Args:
    loader: the other loader.
  """

  def __init__(self, loader: Any):
    self._loader = loader

  def __getattr__(self, name: str) -> Any:
    return getattr(self._loader, name)

  def create_module(self, spec: Any) -> types.ModuleType | None:
    """Makes the module, as the other loader does."""
    return self._loader.create_module(spec)

  def exec_module(self, module: types.ModuleType) -> None:
    """Runs the module, as the other loader does."""
    self._loader.exec_module(module)
