"""The default of arguments for which None is a value."""

from typing import Any


class _Missing:
  def __repr__(self) -> str:
    return "<missing>"


# Of any type, so that it can be the default of an argument of any.
MISSING: Any = _Missing()
