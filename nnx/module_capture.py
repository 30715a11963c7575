"""capture: functions that also return what a model kept on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import functools
import inspect
import threading
from typing import Any

from nnx.module_base import CAPTURES, Module, PathParts, iter_modules
from nnx.statelib import State, split_state
from nnx.variablelib import Variable


def capture(
  fn: Callable[..., Any] | type[Variable[Any]],
  *var_types: type[Variable[Any]],
  init: Mapping[Any, Any] | None = None,
  method_outputs: type[Variable[Any]] | None = None,
) -> Any:
  """Wraps a function so that it also returns what the model kept on the way.

  In a call of it `Module.sow` and `Module.perturb` do not touch the model; what
  they keep is returned. Called with Variable types alone it is a decorator.

  Example:

    >>> import nnx
    >>> class Double(nnx.Module):
    ...   def __call__(self, x):
    ...     self.sow(nnx.Intermediate, "x", x)
    ...     return 2 * x
    >>> @nnx.capture(nnx.Intermediate)
    ... def forward(model, x):
    ...   return model(x)
    >>> y, kept = forward(Double(), 3)
    >>> y, kept.x.value
    (6, (3,))
    >>> _, outputs = nnx.capture(
    ...   Double(), nnx.Intermediate, method_outputs=nnx.Intermediate
    ... )(3)
    >>> outputs["__call__"].value
    (6,)

  Args:
    fn: a function of a module, a module, or a bound method of one.
    *var_types: the types of Variables to return.
    init: a State, of the zeros of `perturb` for instance, to begin with.
    method_outputs: a type of Variable to sow the outputs of all methods in,
      except the inherited and the private ones.

  Returns:
    A function that returns the result and a State for each of `var_types`, or
    just the result if there are none; a decorator if `fn` is a Variable type.

  Raises:
    TypeError: on call, if there is no module to capture from.
  """
  if isinstance(fn, type) and issubclass(fn, Variable):
    return functools.partial(
      _capture_swapped, (fn, *var_types), init, method_outputs
    )
  function: Any = fn
  bound = fn if isinstance(fn, Module) else getattr(fn, "__self__", None)
  owner = bound if isinstance(bound, Module) else None

  def wrapper(*args, **kwargs):
    module = owner if owner is not None else (args[0] if args else None)
    modules = list(iter_modules(module)) if module is not None else []
    if not modules:
      raise TypeError(
        "A captured function must be a module, a method of one, or take one as"
        f" its first argument, but got `{type(module).__name__}`."
      )
    _begin_capture(modules, var_types, init)
    try:
      with _captured_methods(modules, method_outputs):
        result = function(*args, **kwargs)
      kept = _collect_captures(modules, var_types)
    finally:
      for _, each in modules:
        vars(each).pop(CAPTURES, None)
    if not var_types:
      return result
    states = split_state(kept, *var_types)
    if len(var_types) == 1:
      states = (states,)
    return (result, *states)

  if not isinstance(fn, Module):
    functools.update_wrapper(wrapper, fn)
  return wrapper


def _capture_swapped(var_types, init, method_outputs, fn):
  return capture(fn, *var_types, init=init, method_outputs=method_outputs)


def _begin_capture(
  modules: list[tuple[PathParts, Module]],
  var_types: tuple[type[Variable[Any]], ...],
  init: Mapping[Any, Any] | None,
) -> None:
  """Gives each module the Variables that its calls of `sow` write to."""
  for path, module in modules:
    contents: dict[type[Variable[Any]], dict[str, Any]] = {
      variable_type: {} for variable_type in var_types
    }
    for name, variable in _entries_at(init or {}, path):
      contents.setdefault(type(variable), {})[name] = variable.value
    # No trace check: a model that is closed over may be captured from, since
    # what is kept is taken away before the trace ends.
    module._setattr_raw(
      CAPTURES, tuple(kind(values) for kind, values in contents.items())
    )


def _entries_at(
  state: Mapping[Any, Any], path: PathParts
) -> Iterator[tuple[Any, Variable[Any]]]:
  for key in path:
    if not isinstance(state, Mapping) or key not in state:
      return
    state = state[key]
  if isinstance(state, Mapping):
    for name, value in state.items():
      if isinstance(value, Variable):
        yield name, value


def _collect_captures(
  modules: list[tuple[PathParts, Module]],
  var_types: tuple[type[Variable[Any]], ...],
) -> State[Any, Any]:
  kept: dict[Any, Any] = {}
  for path, module in modules:
    for variable in vars(module).get(CAPTURES, ()):
      if type(variable) in var_types:
        for name, value in variable.raw_value.items():
          node = kept
          for key in path:
            node = node.setdefault(key, {})
          node[name] = type(variable)(value)
  return State(kept, _copy=False)


_method_lock = threading.RLock()


class _captured_methods:
  """While it is open, the methods of modules' classes sow their outputs."""

  def __init__(
    self,
    modules: list[tuple[PathParts, Module]],
    variable_type: type[Variable[Any]] | None,
  ):
    self._classes = {type(module) for _, module in modules}
    self._variable_type = variable_type
    self._originals: list[tuple[type, str, Any]] = []

  def __enter__(self) -> None:
    if self._variable_type is None:
      return
    _method_lock.acquire()
    for cls in self._classes:
      for name, method in list(vars(cls).items()):
        public = not name.startswith("_") or name == "__call__"
        if public and inspect.isfunction(method):
          self._originals.append((cls, name, method))
          setattr(cls, name, _sowing(name, method, self._variable_type))

  def __exit__(self, *exc_info) -> None:
    if self._variable_type is None:
      return
    for cls, name, method in self._originals:
      setattr(cls, name, method)
    _method_lock.release()


def _sowing(
  name: str, method: Callable[..., Any], variable_type: type[Variable[Any]]
) -> Callable[..., Any]:
  @functools.wraps(method)
  def wrapper(self, *args, **kwargs):
    result = method(self, *args, **kwargs)
    if CAPTURES in vars(self):
      self.sow(variable_type, name, result)
    return result

  return wrapper
