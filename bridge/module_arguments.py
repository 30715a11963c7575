"""What `init`, `apply` and `bind` are given, and errors where it is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import inspect
from typing import Any

import nnx


def streams(rngs: Any) -> nnx.Rngs:
  """Returns the streams that `rngs` stands for, in Linen or here.

  Example:

    >>> from bridge import module_arguments
    >>> list(module_arguments.streams({"params": 0, "dropout": 1}))
    ['params', 'dropout']

  Args:
    rngs: `Rngs`, a key or seed, a dict of them, or None.
  """
  if isinstance(rngs, nnx.Rngs):
    return rngs
  if rngs is None:
    return nnx.Rngs()
  if isinstance(rngs, Mapping):
    return nnx.Rngs(**rngs)
  return nnx.Rngs(rngs)


def method_of(module: nnx.Module, method: Any) -> Callable[..., Any]:
  """Returns a function to call with the Module as its first argument.

  Example:

    >>> import nnx
    >>> from bridge import module_arguments
    >>> dropout = nnx.Dropout(0.5)
    >>> module_arguments.method_of(dropout, "__call__").__name__
    '<lambda>'

  Args:
    module: The Module.
    method: A function of it, or the name of a method or submodule.

  Raises:
    TypeError: If it is neither.
  """
  if isinstance(method, str):
    found = getattr(module, method, None)
    if not callable(found):
      raise TypeError(
        f"`method` must name a method or submodule of `{type(module).__name__}`"
        f" that can be called, but `{method}` is `{found!r}`."
      )
    return lambda module, *args, **kwargs: getattr(module, method)(
      *args, **kwargs
    )
  method = getattr(method, "__func__", method)
  if not callable(method) or not inspect.signature(method).parameters:
    raise TypeError(
      "`method` must be a function of the Module, or the name of a method, but"
      f" got {method!r}."
    )
  return method


def clash(
  owner: str, path: tuple[Any, ...], current: Any, value: Any
) -> ValueError:
  """Returns the error for a variable where an attribute is something else.

  Example:

    >>> from bridge import module_arguments
    >>> print(module_arguments.clash("apply", ("a",), {}, 1.0))
    The variables given to `apply` must have the form of its attributes, but \
`a` is a mapping there, and a `float` is given. Rename one of them.

  Args:
    owner: What was given the variables.
    path: Of the variable.
    current: The attribute.
    value: What was given.
  """

  def name(x: Any) -> str:
    return "a mapping" if isinstance(x, Mapping) else f"a `{type(x).__name__}`"

  return ValueError(
    f"The variables given to `{owner}` must have the form of its attributes,"
    f" but `{'/'.join(map(str, path))}` is {name(current)} there, and"
    f" {name(value)} is given. Rename one of them."
  )
