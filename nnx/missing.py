"""The default of arguments for which None is a value."""


class _Missing:
  def __repr__(self) -> str:
    return "<missing>"


MISSING = _Missing()
