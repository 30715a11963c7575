"""Layers outside of traces: one compiled call each, if nobody can tell.

A layer is a few plain operations of jax. Inside a trace they run as they are
written. Outside, one compiled call in their place takes a tenth of the time,
but hides them from a program that replaces functions of jax for a while, by
their name in a module or by their `__code__`, to count, quantise or adapt. So
it is taken only while all functions of jax that the layer may come to call are
those that were there when this module was imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
import functools
import itertools
import operator
import types
from typing import Any, TypeVar, cast

import jax
from jax import lax, random
import jax.extend.core
import jax.numpy as jnp

from nnx.graph import tracing

F = TypeVar("F", bound=Callable[..., Any])

Namespace = Mapping[str, Any]

# Where programs look for functions of jax, and so where they replace them.
_PUBLIC = {id(vars(m)): vars(m) for m in (jnp, lax, jax.nn, random)}

# What stood there at import, and the code of it.
_STOOD = {key: dict(namespace) for key, namespace in _PUBLIC.items()}
_CODES: dict[Any, types.CodeType | None] = {}
_PLACES: dict[Any, tuple[Namespace, str]] = {}
for _key, _names in _STOOD.items():
  for _name, _value in _names.items():
    if callable(_value) and not isinstance(_value, type):
      _CODES[_value] = getattr(_value, "__code__", None)
      _PLACES.setdefault(_value, (_PUBLIC[_key], _name))

# Methods in which operations meet, whoever calls them.
_METHODS = [
  (vars(owner), name, vars(owner)[name])
  for owner, name in (
    (jax.extend.core.Primitive, "bind"),
    (jnp.ufunc, "__call__"),
  )
]
_METHOD_CODES = {
  method: method.__code__
  for _, _, method in _METHODS
  if isinstance(method, types.FunctionType)
}

_code_of = operator.attrgetter("__code__")


class _Watch:
  """Tells whether functions, and what stands under names, are as they were.

  Args:
    codes: functions, with their code.
    names: namespaces, each with a name and what it stood for.
  """

  def __init__(
    self,
    codes: Mapping[Any, types.CodeType],
    names: Iterable[tuple[Namespace, str, Any]],
  ):
    self._functions = tuple(codes)
    self._codes = tuple(codes.values())
    values: dict[int, tuple[Namespace, dict[str, Any]]] = {}
    for namespace, name, value in names:
      values.setdefault(id(namespace), (namespace, {}))[1][name] = value
    self._names = []
    for namespace, stood in values.values():
      get = operator.itemgetter(*stood)
      self._names.append((namespace, get, get(stood)))

  def holds(self) -> bool:
    # Equal tuples are compared by identity, which runs no Python.
    if tuple(map(_code_of, self._functions)) != self._codes:
      return False
    for namespace, get, stood in self._names:
      if get(namespace) != stood:
        return False
    return True


def _names_in(code: types.CodeType) -> set[str]:
  names = set(code.co_names)
  for constant in code.co_consts:
    if isinstance(constant, types.CodeType):
      names |= _names_in(constant)
  return names


def _members(
  namespace: Namespace, names: set[str], depth: int = 0
) -> Iterator[tuple[Namespace, str, Any]]:
  """What names may mean in a namespace, and in the modules among that."""
  stood = _STOOD.get(id(namespace), namespace)
  for name in names & stood.keys():
    value = stood[name]
    if not isinstance(value, types.ModuleType):
      yield namespace, name, value
    elif depth < 2 and value.__name__.startswith(("jax", "nnx.nn")):
      yield from _members(vars(value), names, depth + 1)


def _callees(function: types.FunctionType) -> Iterator[Any]:
  """The places of the functions that a function may call."""
  code = _CODES.get(function) or function.__code__
  yield from _members(function.__globals__, _names_in(code))
  # A default argument stands for what has its name; see `current`.
  defaults = (function.__defaults__, (function.__kwdefaults__ or {}).values())
  for value in itertools.chain(*(values or () for values in defaults)):
    if callable(value):
      yield *_PLACES.get(value, ({}, "")), value
  for cell in function.__closure__ or ():
    try:
      yield {}, "", cell.cell_contents
    except ValueError:  # There is nothing in it yet.
      continue


def _watch(function: types.FunctionType) -> _Watch:
  """Watches the public functions of jax that a function may come to call.

  Functions that jax compiles are watched, but not what they call: jax may have
  them in its own cache, whoever calls.
  """
  codes = dict(_METHOD_CODES)
  names = list(_METHODS)
  seen, found = {function}, [function]
  while found:
    for namespace, name, value in _callees(found.pop()):
      if not callable(value) or isinstance(value, type):
        continue
      if id(namespace) in _PUBLIC and value in _PLACES:
        names.append((namespace, name, value))
      if not isinstance(value, types.FunctionType) or value in seen:
        continue
      if not value.__module__.startswith(("jax", "nnx.nn")):
        continue
      seen.add(value)
      found.append(value)
      code = _CODES.get(value)
      if code is not None:
        codes[value] = code
  return _Watch(codes, names)


@functools.cache
def _watch_of_everything() -> _Watch:
  codes = {f: code for f, code in _CODES.items() if code is not None}
  names = [
    (_PUBLIC[key], name, value)
    for key, stood in _STOOD.items()
    for name, value in stood.items()
    if callable(value)
  ]
  return _Watch({**_METHOD_CODES, **codes}, [*_METHODS, *names])


def functions_are_as_imported() -> bool:
  """Whether all public functions of jax are those that were imported.

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
  return _watch_of_everything().holds()


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
  context, outside = tracing.trace_context(), tracing.eval_trace()
  compiled = jax.jit(function, **options)
  watches: list[_Watch] = []  # made at the first call, not at import

  def as_imported() -> bool:
    if not watches:
      watches.append(_watch(cast(types.FunctionType, function)))
    return watches[0].holds()

  @functools.wraps(function)
  def call(*args: Any, **kwargs: Any) -> Any:
    if context.trace is outside and as_imported():
      return compiled(*args, **kwargs)
    return function(*args, **kwargs)

  call.as_imported = as_imported  # type: ignore[attr-defined]
  return cast(F, call)


def as_imported(function: Callable[..., Any]) -> bool:
  """Whether functions of jax that a function calls are those of its import.

  Example:

    >>> from unittest import mock
    >>> import jax.numpy as jnp
    >>> from nnx import eager
    >>> double = eager.one_call(lambda x: jnp.multiply(x, 2.0))
    >>> with mock.patch.object(jnp, "multiply"):
    ...   eager.as_imported(double)
    False

  Args:
    function: what `one_call` returned.
  """
  return function.as_imported()  # type: ignore[attr-defined]
