"""What a transform is given: functions, methods, numbers of their arguments.

A method is lifted as a function of the object that it is bound to, so that a
transform sees what it reads of the object and does to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import contextlib
import functools
import inspect
import types
from typing import Any

import numpy as np

from nnx import runtime
from nnx.engine import _engine


def name_of(fun: Callable[..., Any]) -> str:
  """Says how to call a function in an error."""
  return getattr(fun, "__qualname__", None) or type(fun).__name__


def refuse_foreign(fun: Any, transform: str) -> None:
  """Refuses a Module of `flax.nnx`, and its methods, as a function.

  Raises:
    TypeError: if it is one: its state would be taken for constants.
  """
  inner = fun
  while isinstance(inner, functools.partial):
    inner = inner.func
  owner = getattr(inner, "__self__", inner)
  if runtime.is_of_flax_nnx(type(owner)):
    raise TypeError(
      f"`nnx.{transform}` must be given a function of objects of `nnx`, but got"
      f" a `{type(owner).__name__}` of `flax.nnx`. Make it with `nnx`, which"
      " has the same names, or convert it: `nnx.bridge.from_flax_nnx(...)`."
      " `import nnx.as_flax`, first in a program, puts `nnx` in the place of"
      " `flax.nnx`."
    )


# What a method calls the object that it is bound to.
SELF = "self"


class Method:
  """A function bound to an object of a graph, which is an argument of it.

  Its callers bind the object to the keyword `self`, so that a transform sees
  what the function reads of it and does to it.

  Attributes:
    function: takes the object first.
    owner: the object.
  """

  __slots__ = ("function", "owner", "__dict__")

  def __init__(self, function: Callable[..., Any], owner: Any):
    functools.update_wrapper(self, function)
    self.function = function
    self.owner = owner
    with contextlib.suppress(TypeError, ValueError):
      own, *rest = inspect.signature(function).parameters.values()
      if own.kind != own.VAR_POSITIONAL:
        vars(self)["__signature__"] = inspect.Signature(rest)

  def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
    owner = kwargs.pop(SELF)
    if callable(owner) and type(owner).__call__ is self.function:
      return owner(*args, **kwargs)  # through the object, which names the call
    return self.function(owner, *args, **kwargs)


def method_of(fun: Any) -> Method | None:
  """Returns a callable Module, or a method bound to a Module, as a `Method`.

  Args:
    fun: a function; may be a `functools.partial` of such a one.

  Returns:
    None for any other function.
  """
  inner, given = fun, ()
  named: dict[str, Any] = {}
  owner: _engine.ObjectBase
  while isinstance(inner, functools.partial):
    given, named = (*inner.args, *given), {**inner.keywords, **named}
    inner = inner.func
  if isinstance(inner, _engine.ObjectBase) and callable(inner):
    owner, function = inner, type(inner).__call__
  elif isinstance(inner, types.MethodType) and isinstance(
    inner.__self__, _engine.ObjectBase
  ):
    owner, function = inner.__self__, inner.__func__
  else:
    return None
  if inner is fun:
    return Method(function, owner)

  @functools.wraps(function)
  def partial(owner, /, *args, **kwargs):
    return function(owner, *given, *args, **{**named, **kwargs})

  with contextlib.suppress(TypeError, ValueError):
    own = inspect.Parameter(SELF, inspect.Parameter.POSITIONAL_ONLY)
    rest = inspect.signature(fun).parameters.values()
    vars(partial)["__signature__"] = inspect.Signature([own, *rest])
  return Method(partial, owner)


def function_of(fun: Any, transform: str) -> Callable[..., Any]:
  """Returns the function that a transform lifts: `fun`, or a `Method`.

  Raises:
    TypeError: if `fun` is not callable, or is an object of `flax.nnx`.
  """
  refuse_foreign(fun, transform)
  if not callable(fun):
    raise TypeError(
      f"`nnx.{transform}` must be given a function, but got `{fun!r}` of type"
      f" `{type(fun).__name__}`."
    )
  return method_of(fun) or fun


def with_owner(
  fun: Callable[..., Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns keyword arguments with the object that a `Method` is bound to.

  Raises:
    TypeError: if the object has been given as well.
  """
  if not isinstance(fun, Method):
    return dict(kwargs)
  if SELF in kwargs:
    raise TypeError(
      f"`{name_of(fun)}` must not be given `{SELF}`, as it is bound to a"
      f" `{type(fun.owner).__name__}` already."
    )
  return {**kwargs, SELF: fun.owner}


def bind(
  fun: Callable[..., Any],
  args: Sequence[Any],
  kwargs: Mapping[str, Any],
  option: Any = None,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
  """Makes keyword arguments positional where the signature allows it.

  The object that a `Method` is bound to comes as a keyword argument.

  Args:
    fun: the function.
    args: its positional arguments.
    kwargs: its keyword arguments.
    option: a tuple with an entry for each positional argument, or anything
      else; defaults of the function fill arguments that it has entries for.
  """
  count = len(option) if isinstance(option, (tuple, list)) else 0
  defaults = count > len(args)
  if isinstance(fun, functools.partial) or not (kwargs or defaults):
    return tuple(args), with_owner(fun, kwargs)
  try:
    bound = inspect.signature(fun).bind(*args, **kwargs)
  except (TypeError, ValueError):
    # The call itself gives the better error.
    return tuple(args), with_owner(fun, kwargs)
  if defaults and len(bound.args) < count:
    bound.apply_defaults()
  return bound.args, with_owner(fun, bound.kwargs)


def as_tuple(value: int | Iterable[int]) -> tuple[int, ...]:
  """Returns one int or several as a tuple."""
  return (value,) if isinstance(value, int) else tuple(value)


def positions(
  argnums: int | Iterable[int], count: int, option: str
) -> tuple[int, ...]:
  """Converts argument numbers to positions, counted from the end if negative.

  Raises:
    TypeError: if one of them is not an int.
    ValueError: if one of them is out of range or given twice.
  """
  nums = (argnums,) if isinstance(argnums, int) else tuple(argnums)
  result = []
  for num in nums:
    if isinstance(num, bool) or not isinstance(num, (int, np.integer)):
      raise TypeError(
        f"`{option}` must be an int or several, but got `{num!r}` of type"
        f" `{type(num).__name__}`."
      )
    if not -count <= num < count:
      raise ValueError(
        f"`{option}` must name positional arguments, of which there are {count}"
        f" in this call, but got {num}."
      )
    position = int(num) % count
    if position in result:
      raise ValueError(
        f"`{option}` must name an argument once, but names argument {position}"
        " twice."
      )
    result.append(position)
  return tuple(result)


def pair(result: Any, fun: Callable[..., Any]) -> tuple[Any, Any]:
  """Returns what a function with `has_aux` must return."""
  if not isinstance(result, (tuple, list)) or len(result) != 2:
    raise TypeError(
      f"With `has_aux=True`, `{name_of(fun)}` must return a pair of the"
      f" output and auxiliary data, but got `{result!r}`."
    )
  return result[0], result[1]
