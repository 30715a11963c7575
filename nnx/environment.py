"""Switches: what the environment says, changes of them, what may be given."""

from __future__ import annotations

from collections.abc import Mapping
import os
import threading
from typing import Any, Self

import numpy as np

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


def check_flags(**flags: Any) -> None:
  """Refuses what is neither True nor False, whatever its truth value is.

  Example:

    >>> from nnx import environment
    >>> environment.check_flags(graph=True)
    >>> try:
    ...   environment.check_flags(graph="no")
    ... except TypeError as error:
    ...   print(error)
    `graph` must be True or False, but got 'no'.

  Args:
    **flags: what was given, by the names of the arguments.

  Raises:
    TypeError: if a value is not a bool, of Python or of NumPy.
  """
  for name, value in flags.items():
    if not isinstance(value, (bool, np.bool_)):
      raise TypeError(f"`{name}` must be True or False, but got {value!r}.")


class Change:
  """A change of settings of this thread, from its making until `undo`.

  Example:

    >>> import threading
    >>> from nnx import environment
    >>> class Settings(threading.local):
    ...   loud = False
    >>> settings = Settings()
    >>> change = environment.Change(settings, {"loud": True})
    >>> settings.loud
    True
    >>> change.undo()
    >>> settings.loud
    False

  Args:
    settings: an object whose class has the defaults.
    values: what to set, by name.

  Raises:
    TypeError: if a value is neither True nor False.
  """

  def __init__(self, settings: threading.local, values: Mapping[str, bool]):
    check_flags(**values)
    self._settings = settings
    self._before = {name: vars(settings).get(name) for name in values}
    vars(settings).update({name: bool(values[name]) for name in values})

  def undo(self) -> None:
    """Sets what was set before; may be called again after other changes."""
    for name, value in self._before.items():
      if value is None:  # the default, whatever it is by now
        vars(self._settings).pop(name, None)
      else:
        vars(self._settings)[name] = value


class ForBlock:
  """What has changed settings, and undoes that at the end of a `with` block.

  Example:

    >>> import threading
    >>> from nnx import environment
    >>> class Settings(threading.local):
    ...   loud = False
    >>> settings = Settings()
    >>> class Loud(environment.ForBlock):
    ...   def __init__(self):
    ...     self._change = environment.Change(settings, {"loud": True})
    >>> with Loud():
    ...   settings.loud
    True
    >>> settings.loud
    False
  """

  _change: Change

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *exc_info: object) -> None:
    self._change.undo()
