"""Flax 0.12's switches between its graph and tree modes.

Here there is one mode: shared references are always handled, and cost nothing
where there are none. The switches keep the value that they are given, so that
programs that set and read them run.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import threading
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class _Settings(threading.local):
  graph_mode = True
  graph_updates = True


_settings = _Settings()


class _Switch:
  """Sets a setting from the call on; for a block or function, as it is used."""

  _name: str

  def __init__(self, value: bool, /):
    self._value = bool(value)
    self._before = getattr(_settings, self._name)
    setattr(_settings, self._name, self._value)

  def __call__(self, fun: Callable[P, R], /) -> Callable[P, R]:
    setattr(_settings, self._name, self._before)

    @functools.wraps(fun)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
      with type(self)(self._value):
        return fun(*args, **kwargs)

    return wrapped

  def __enter__(self):
    return self

  def __exit__(self, *exc_info) -> None:
    setattr(_settings, self._name, self._before)

  @classmethod
  def current_value(cls) -> bool:
    """The value that was set last in this thread."""
    return getattr(_settings, cls._name)


class set_graph_mode(_Switch):
  """Accepted for programs of Flax 0.12; shared references are always handled.

  Example:

    >>> import nnx
    >>> with nnx.set_graph_mode(False):
    ...   nnx.set_graph_mode.current_value()
    False
    >>> nnx.set_graph_mode.current_value()
    True

  Args:
    value: whether programs of Flax would use the graph mode.
  """

  _name = "graph_mode"


class set_graph_updates(_Switch):
  """Accepted for programs of Flax 0.12; changes of objects always come back.

  Example:

    >>> import nnx
    >>> with nnx.set_graph_updates(False):
    ...   nnx.set_graph_updates.current_value()
    False

  Args:
    value: whether programs of Flax would propagate changes of the graph.
  """

  _name = "graph_updates"
