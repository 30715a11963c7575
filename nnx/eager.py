"""Layers outside of traces: one compiled call each, if nobody can tell.

A layer is a few plain operations of jax. Inside a trace they run as they are
written. Outside, one compiled call in their place takes a fraction of the time,
but hides them from a program that replaces functions of jax for a while, by
their name in a module or by their `__code__`, to count, quantise or adapt. So
it is taken only while every public function of jax is the one that was there
when this module was imported.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import types
from typing import Any, TypeVar, cast

import jax
from jax import lax, random
import jax.numpy as jnp

from nnx.engine import _engine, jax_private

F = TypeVar("F", bound=Callable[..., Any])


class _Names:
  """What stands under the public names of a module that are functions."""

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
    # A module also gets names that it did not have; of those nothing is known.
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
  """Returns what has taken the place of a function of jax, or the function.

  A default argument is a function as it was imported; who replaces it by name
  means that as well.

  Example:

    >>> from unittest import mock
    >>> from jax import lax
    >>> from nnx import eager
    >>> imported = lax.dot_general
    >>> with mock.patch.object(lax, "dot_general") as other:
    ...   eager.current(imported) is other
    True

  Args:
    function: any function.
  """
  place = _PLACES.get(function)
  return function if place is None else place[0][place[1]]


def one_call(function: F, **options: Any) -> F:
  """Makes one compiled call of a function of arrays, where that is not seen.

  Example:

    >>> from unittest import mock
    >>> import jax.numpy as jnp
    >>> from nnx import eager
    >>> double = eager.one_call(lambda x: jnp.multiply(x, 2.0))
    >>> double(3.0)
    Array(6., dtype=float32, weak_type=True)
    >>> with mock.patch.object(jnp, "multiply", lambda x, y: "seen"):
    ...   double(3.0)
    'seen'

  Args:
    function: of arrays; pure, and made of functions of jax and of `nnx.nn`.
    **options: for `jax.jit`.

  Returns:
    A function that does the same. Inside a trace, and where functions of jax
    are not those that were imported, it runs the function as it is written.
  """
  context, outside = jax_private.trace_context(), jax_private.eval_trace()
  compiled = jax.jit(function, **options)

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    if context.trace is outside and functions_are_as_imported():
      return compiled(*args, **kwargs)
    return function(*args, **kwargs)

  return cast(F, call)
