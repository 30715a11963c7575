"""The cells of the table that `nnx.tabulate` draws: values as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from nnx import reprlib
from nnx.engine import pytrees
from nnx.pytreelib import Pytree
from nnx.variablelib import Variable


def is_array(value: Any) -> bool:
  """Tells whether a value is an array, or stands for one.

  Example:

    >>> import numpy as np
    >>> from nnx.summary_cells import is_array
    >>> is_array(np.zeros(1)), is_array(1.0)
    (True, False)
  """
  """Tells whether a value has a shape and a dtype.

  Example:

    >>> import numpy as np
    >>> from nnx.summary_cells import is_array
    >>> is_array(np.zeros(1)), is_array(1.0)
    (True, False)
  """
  return isinstance(value, (jax.Array, np.ndarray, jax.ShapeDtypeStruct))


def _array_text(value: Any) -> str:
  shape = ",".join(map(str, value.shape))
  return f"[dim]{value.dtype}[/dim][{shape}]"


def _scalar_text(value: Any) -> str:
  from rich import markup

  if is_array(value):
    return _array_text(value)
  if isinstance(value, Variable):
    return _scalar_text(value.raw_value)
  if isinstance(value, type):
    return f"type\\[{value.__name__}]"
  if isinstance(value, Pytree):
    return f"{type(value).__name__}(...)"
  return markup.escape(repr(value).replace("'", ""))


def _children(value: Any) -> dict[Any, Any] | list[Any] | None:
  """Opens a value, by name or in order; None for a scalar."""
  if isinstance(value, (Pytree, Variable)) or is_array(value):
    return None
  if isinstance(value, Mapping):
    if all(isinstance(key, str) for key in value):
      return dict(sorted(value.items()))
    return dict(value)
  if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
    return list(value)
  opened = pytrees.flatten_pytree(value)
  if opened is None or value is None:
    return None
  children, _, keys = opened
  return dict(zip(keys, children, strict=True))


def _lines(value: Any) -> list[str]:
  """Writes nested values as lines: `name: value`, and `- value` in lists."""
  children = _children(value)
  if children is None:
    return _scalar_text(value).split("\n")
  if not children:
    return ["{}" if isinstance(children, dict) else "[]"]
  lines = []
  if isinstance(children, list):
    for child in children:
      first, *rest = _lines(child)
      lines += [f"- {first}", *(f"  {line}" for line in rest)]
    return lines
  for name, child in children.items():
    inner = _children(child)
    if inner:
      margin = "" if isinstance(inner, list) else "  "
      lines.append(f"{name}:")
      lines += [margin + line for line in _lines(child)]
    else:
      first, *rest = _lines(child)
      lines += [f"{name}: {first}", *(f"  {line}" for line in rest)]
  return lines


def text(value: Any) -> str:
  """Writes a value, nested ones on several lines.

  Example:

    >>> import numpy as np
    >>> from nnx.summary_cells import text
    >>> print(text({"a": 1, "b": [np.zeros(2)]}))
    a: 1
    b:
    - [dim]float64[/dim][2]
  """
  """Writes a value, nested ones on several lines.

  Example:

    >>> import numpy as np
    >>> from nnx.summary_cells import text
    >>> print(text({"a": 1, "b": [np.zeros(2)]}))
    a: 1
    b:
    - [dim]float64[/dim][2]
  """
  children = _children(value)
  if value is None or (children is not None and not children):
    return ""
  return "\n".join(_lines(value))


def arguments_text(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
  """Writes the arguments of a call."""
  parts = []
  if len(args) == 1 and not kwargs:
    parts.append(text(args[0]))
  elif args:
    parts.append(text(args))
  if kwargs:
    parts.append(text(kwargs))
  return "\n".join(parts)


def size_text(size: reprlib.Size) -> str:
  """Writes a size, what follows the number of elements dimly."""
  elements, rest = repr(size).split(" ", 1)
  return f"{elements} [dim]{rest}[/dim]"
