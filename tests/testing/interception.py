"""Functions of jax replaced for a time, as tools for quantisation do it."""

import contextlib
import importlib
import sys
import types
from typing import Any

# By the name of a code object, what is to be done in its place.
_handlers: dict[str, Any] = {}
sys.modules.setdefault(
  "interception_handlers", types.ModuleType("interception_handlers")
)
sys.modules["interception_handlers"].handlers = _handlers  # type: ignore[attr-defined]


def _template(*args, **kwargs):
  # It runs with the globals of the function whose code it replaces.
  import sys

  import interception_handlers

  name = sys._getframe().f_code.co_name
  return interception_handlers.handlers[name](*args, **kwargs)


def _copy(function: types.FunctionType) -> types.FunctionType:
  copy = types.FunctionType(
    function.__code__,
    function.__globals__,
    function.__name__,
    function.__defaults__,
    function.__closure__,
  )
  copy.__kwdefaults__ = function.__kwdefaults__
  return copy


@contextlib.contextmanager
def replaced(names, handle, by="code"):
  """Replaces functions by calls of `handle(name, original, *args, **kwargs)`.

  While one of them runs none is replaced, so that each call counts once.

  Args:
    names: such as `jax.lax.dot_general`.
    handle: what runs in place of the functions.
    by: "code" or "attribute": what of a function is replaced.
  """
  busy = [False]
  undo = []

  def stand_in(name, original):
    def run(*args, **kwargs):
      if busy[0]:
        return original(*args, **kwargs)
      busy[0] = True
      try:
        return handle(name, original, *args, **kwargs)
      finally:
        busy[0] = False

    return run

  try:
    for name in names:
      path, attribute = name.rsplit(".", 1)
      owner = importlib.import_module(path)
      function = getattr(owner, attribute)
      if by == "code" and isinstance(function, types.FunctionType):
        code = function.__code__
        _handlers[name] = stand_in(name, _copy(function))
        undo.append((function, "__code__", code))
        function.__code__ = _template.__code__.replace(co_name=name)
      else:
        undo.append((owner, attribute, function))
        setattr(owner, attribute, stand_in(name, function))
    yield
  finally:
    for owner, attribute, value in reversed(undo):
      setattr(owner, attribute, value)
