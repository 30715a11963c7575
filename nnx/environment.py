"""Switches that the environment of the process sets."""

from __future__ import annotations

import os

_TRUTHS = {
  **dict.fromkeys(("y", "yes", "t", "true", "on", "1"), True),
  **dict.fromkeys(("n", "no", "f", "false", "off", "0"), False),
}


def switch(name: str, default: bool) -> bool:
  """Reads a switch from the environment.

  Example:

    >>> from nnx import environment
    >>> environment.switch("NNX_NOBODY_SETS_THIS", True)
    True

  Args:
    name: the variable of the environment.
    default: what it is if it is not set.

  Raises:
    ValueError: if it is neither true nor false.
  """
  text = os.environ.get(name, str(default))
  if text.lower() not in _TRUTHS:
    raise ValueError(
      f"The environment variable `{name}` must be `true` or `false`, but is"
      f" `{text}`."
    )
  return _TRUTHS[text.lower()]
