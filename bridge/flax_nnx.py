"""`flax.nnx` for those who convert from it.

It is loaded when it is needed, and is the real one where `nnx.as_flax` has put
`nnx` in its place.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from nnx import runtime


class _FlaxNNX:
  """`flax.nnx`, loaded at the first access.

  Example:

    >>> from bridge.flax_nnx import flax_nnx
    >>> flax_nnx.Param.__name__
    'Param'
  """

  def __getattr__(self, name: str) -> Any:
    return getattr(_load(), name)

  def __dir__(self) -> list[str]:
    return dir(_load())


def _load() -> Any:
  switch = sys.modules.get("nnx.as_flax")
  if switch is None:
    return importlib.import_module("flax.nnx")
  return switch.flax_nnx()


flax_nnx: Any = _FlaxNNX()


def is_of_flax_nnx(value: Any) -> bool:
  """Tells whether a class, or an object's class, is of `flax.nnx`.

  Example:

    >>> import nnx
    >>> from bridge.flax_nnx import is_of_flax_nnx
    >>> is_of_flax_nnx(nnx.Linear)
    False

  Args:
    value: a class or an object.
  """
  cls = value if isinstance(value, type) else type(value)
  return runtime.is_of_flax_nnx(cls)
