"""Layers outside of traces: one compiled call each, if nobody can tell.

A layer is a few plain operations of jax. Inside a trace they run as written.
Outside, one compiled call takes a fraction of their time. But it hides them
from a program that temporarily replaces functions of jax, by their name in a
module or by their `__code__`, to count, quantise or adapt operations. So a
layer takes the compiled call only while every public function of jax is the one
that was there when this module was imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import types
from typing import Any, TypeVar, cast

import jax
from jax import lax, random
import jax.numpy as jnp

from nnx.engine import _engine, jax_private

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


class _Names:
  """The functions under the public names of a module."""

  def __init__(self, module: types.ModuleType):
    self.namespace = vars(module)
    self.stood = {
      name: value
      for name, value in self.namespace.items()
      if callable(value)
      and not isinstance(value, type)
      and not name.startswith("_")
    }
    self.values = tuple(self.namespace.values())

  def hold(self) -> bool:
    if _engine.same_values(self.namespace, self.values):
      return True
    # A name that is new in the module replaces nothing.
    now = dict(self.namespace)
    for name, value in self.stood.items():
      if now.get(name) is not value:
        return False
    self.values = tuple(now.values())
    return True


# Where programs look for functions of jax, and so where they replace them.
_NAMES = [_Names(module) for module in (jnp, lax, jax.nn, random)]
_PLACES = {
  function: (names.namespace, name)
  for names in reversed(_NAMES)
  for name, function in names.stood.items()
}
# The methods in which operations meet, whoever calls them.
_PRIMITIVE, _UFUNC = jax_private.primitive_type(), jnp.ufunc
_BIND, _CALL = _PRIMITIVE.bind, _UFUNC.__call__
_FUNCTIONS = tuple(
  function
  for function in (*_PLACES, _BIND, _CALL)
  if isinstance(function, types.FunctionType)
)
_CODES = tuple(function.__code__ for function in _FUNCTIONS)


def functions_are_as_imported() -> bool:
  """Tells whether jax's public functions are those that were imported.

  Example:

    >>> from unittest import mock
    >>> from jax import lax
    >>> from nnx import eager
    >>> eager.functions_are_as_imported()
    True
    >>> with mock.patch.object(lax, "dot_general"):
    ...   eager.functions_are_as_imported()
    False
  """
  if _PRIMITIVE.bind is not _BIND or _UFUNC.__call__ is not _CALL:
    return False
  if not _engine.same_codes(_FUNCTIONS, _CODES):
    return False
  for names in _NAMES:  # a loop, as this is asked at each eager call
    if not names.hold():
      return False
  return True


def current(function: F) -> F:
  """Returns what has replaced a function of jax, or the function itself.

  A default argument is bound to the function that was imported. A program that
  replaces the function by name means the default as well.

  Example:

    >>> from unittest import mock
    >>> from jax import lax
    >>> from nnx import eager
    >>> imported = lax.dot_general
    >>> with mock.patch.object(lax, "dot_general") as other:
    ...   eager.current(imported) is other
    True

  Args:
    function: Any function.
  """
  place = _PLACES.get(function)
  return function if place is None else place[0][place[1]]


def compiled(function: F, *, static: Sequence[str] = ()) -> F:
  """Makes one compiled call of a function of arrays, where that is not seen.

  Example:

    >>> from unittest import mock
    >>> import jax.numpy as jnp
    >>> from nnx import eager
    >>> def add(x, y, dtype):
    ...   return jnp.add(x, y).astype(dtype)
    >>> add = eager.compiled(add, static=("dtype",))
    >>> add(3.0, 4.0, jnp.bfloat16)
    Array(7, dtype=bfloat16)
    >>> with mock.patch.object(jnp, "add", lambda x, y: jnp.zeros(())):
    ...   add(3.0, 4.0, jnp.bfloat16)
    Array(0, dtype=bfloat16)

  Args:
    function: Of arrays; pure, and made of functions of jax and of `nnx.nn`.
    static: The names of its parameters that are hashable options, not arrays.
      The function is compiled for each value of them. They may be passed by
      position, which is faster than by keyword.

  Returns:
    A function that does the same. Inside a trace, and where functions of jax
    are not those that were imported, it runs `function` as it is written.

  Raises:
    ValueError: If `static` names no parameter.
  """
  context, outside = jax_private.trace_context(), jax_private.eval_trace()
  one_call = jax.jit(function, static_argnames=tuple(static))

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    if context.trace is outside and functions_are_as_imported():
      return one_call(*args, **kwargs)
    return function(*args, **kwargs)

  return cast(F, call)


def interned(cls: type[T]) -> Callable[..., T]:
  """Makes a constructor that returns one object for equal arguments.

  For classes of static options. Such an object may hash by its identity, so
  that an eager call pays little for it: a dataclass that hashes its fields does
  so in Python.

  Example:

    >>> import dataclasses
    >>> from nnx import eager
    >>> @dataclasses.dataclass(frozen=True, eq=False)
    ... class Options:
    ...   epsilon: float
    >>> options = eager.interned(Options)
    >>> options(1e-6) is options(1e-6), options(1e-6) == options(1e-5)
    (True, False)

  Args:
    cls: A frozen dataclass with `eq=False`.

  Returns:
    A function of positional arguments.
  """
  kept = functools.lru_cache(maxsize=1024, typed=True)(cls)

  def make(*args: Any) -> T:
    try:
      return kept(*args)
    except TypeError:  # an argument without a hash
      return cls(*args)

  return make
