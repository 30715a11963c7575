"""One mechanism for readable displays: as text, and as treescope trees.

A class says what it shows by a method `_display() -> Parts`; from that alone
`repr`, `str` and the notebook display (`nnx.display`) are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import sys
import threading
from typing import Any

import jax
import numpy as np

_INDENT = "  "


@dataclasses.dataclass
class Parts:
  """What one object shows.

  Example:

    >>> from nnx import reprlib
    >>> print(reprlib.to_text(reprlib.Parts("Point", [("x", 1), ("y", 2)])))
    Point(
      x=1,
      y=2
    )

  Attributes:
    head: the text before the opening bracket.
    items: pairs of label and value; a label of `None` shows the value alone.
    start: the opening bracket.
    end: the closing bracket.
    separator: stands between a label and its value; labels show as their
      `repr` unless it is `=`.
    comment: follows the opening bracket after a `#`.
    one_line: whether to keep everything on one line.
    type: the class that is shown, for treescope.
    nested: settings, see `showing`, for what is shown inside.
  """

  head: str
  items: list[tuple[Any, Any]]
  start: str = "("
  end: str = ")"
  separator: str = "="
  comment: str = ""
  one_line: bool = False
  type: type | None = None
  nested: dict[str, bool] = dataclasses.field(default_factory=dict)


class _Context(threading.local):
  def __init__(self) -> None:
    self.active: set[int] = set()
    self.memo: dict[Any, Any] = {}
    self.settings = {"summarize": False, "in_state": False}


_context = _Context()


@contextlib.contextmanager
def showing(**settings: bool) -> Iterator[None]:
  """Sets how objects nested in the one that is shown are shown.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx import reprlib
    >>> with reprlib.showing(summarize=True):
    ...   print(reprlib.value_text(jnp.ones((2, 3))))
    Array(shape=(2, 3), dtype=dtype('float32'))

  Args:
    **settings: `summarize`, whether arrays show as shape and dtype;
      `in_state`, whether Variables show as `VariableState(type=...)`.
  """
  before = _context.settings
  _context.settings = before | settings
  try:
    yield
  finally:
    _context.settings = before


def setting(name: str) -> bool:
  """Returns the present value of one of the settings of `showing`.

  Example:

    >>> from nnx import reprlib
    >>> reprlib.setting("in_state")
    False
  """
  return _context.settings[name]


def memo() -> dict[Any, Any]:
  """Returns what the display that is being made remembers.

  Example:

    >>> from nnx import reprlib
    >>> reprlib.memo()
    {}
  """
  return _context.memo if _context.active else {}


def in_notebook() -> bool:
  """Tells whether IPython runs, without importing it, which is slow.

  Example:

    >>> from nnx import reprlib
    >>> reprlib.in_notebook()
    False
  """
  ipython = sys.modules.get("IPython")
  return ipython is not None and ipython.get_ipython() is not None


# The functions that render for notebooks: `nnx.display` adds the one it has.
_notebook_renderers: list[Callable[[Any, Any, Any], Any]] = []


def set_notebook_renderer(
  renderer: Callable[[Any, Any, Any], Any],
) -> None:
  """Sets how objects are rendered for treescope.

  Example:

    >>> from nnx import reprlib
    >>> from nnx.visualization import to_treescope
    >>> reprlib.set_notebook_renderer(to_treescope)

  Args:
    renderer: takes an object, its path and treescope's renderer of what is
      inside; returns treescope's rendering.
  """
  _notebook_renderers[:] = [renderer]


class Displayable:
  """Gives a class that has `_display` its `repr`, `str` and notebook display.

  Example:

    >>> from nnx import reprlib
    >>> class Point(reprlib.Displayable):
    ...   def _display(self):
    ...     return reprlib.Parts("Point", [("x", 1)])
    >>> Point()
    Point(
      x=1
    )
  """

  __slots__ = ()

  def _display(self) -> Parts:
    raise NotImplementedError

  def __repr__(self) -> str:
    return to_text(self)

  def __str__(self) -> str:
    return to_text(self)

  def __treescope_repr__(self, path, subtree_renderer):
    return _notebook_renderers[-1](self, path, subtree_renderer)


@dataclasses.dataclass(frozen=True)
class Size:
  """Numbers of elements and of bytes.

  Example:

    >>> import numpy as np
    >>> from nnx import reprlib
    >>> reprlib.Size.of({"a": np.ones((2, 3), np.float32)})
    6 (24 B)
  """

  elements: int = 0
  bytes: int = 0

  @classmethod
  def of(cls, tree: Any) -> Size:
    """Sums over the arrays, abstract or not, of a pytree.

    Example:

      >>> import numpy as np
      >>> from nnx.reprlib import Size
      >>> Size.of([np.ones(3, np.int8), 1])
      3 (3 B)
    """
    total = cls()
    for leaf in jax.tree.leaves(tree):
      shape = getattr(leaf, "shape", None)
      itemsize = getattr(getattr(leaf, "dtype", None), "itemsize", None)
      if isinstance(shape, tuple) and itemsize is not None:
        elements = int(np.prod(shape))
        total += cls(elements, elements * itemsize)
    return total

  def __add__(self, other: Size) -> Size:
    return Size(self.elements + other.elements, self.bytes + other.bytes)

  def __bool__(self) -> bool:
    return bool(self.elements)

  def __repr__(self) -> str:
    text = f"{self.bytes} B"
    for factor, unit in ((1e3, "KB"), (1e6, "MB"), (1e9, "GB")):
      if self.bytes > factor:
        text = f"{self.bytes / factor:,.1f} {unit}"
    return f"{self.elements:,} ({text})"


def _is_large_array(value: Any) -> bool:
  return isinstance(value, (jax.Array, np.ndarray)) and value.size > 1


def value_text(value: Any) -> str:
  """Writes a value as it stands inside the display of another.

  Example:

    >>> from nnx import reprlib
    >>> reprlib.value_text((int, "a"))
    "(int, 'a')"

  Args:
    value: anything.

  Returns:
    The text, of one line or more.
  """
  if isinstance(value, (Parts, Displayable)):
    return to_text(value)
  if isinstance(value, type):
    return value.__name__
  if _context.settings["summarize"] and _is_large_array(value):
    return f"Array(shape={value.shape}, dtype={value.dtype!r})"
  if type(value) is dict:
    value = dict(value)  # a `__repr__` or another thread may change it
  if type(value) in (list, tuple, dict):
    members = value.values() if type(value) is dict else value
    if any(isinstance(member, Displayable) for member in members):
      return _parts_text(_container_parts(value))
  if type(value) is list:
    return f"[{', '.join(map(value_text, value))}]"
  if type(value) is tuple:
    comma = "," if len(value) == 1 else ""
    return f"({', '.join(map(value_text, value))}{comma})"
  if type(value) is dict:
    items = (f"{key!r}: {value_text(item)}" for key, item in value.items())
    return f"{{{', '.join(items)}}}"
  return repr(value)


def _container_parts(value: list | tuple | dict) -> Parts:
  """Lays out a plain container of displayable objects, one on each line."""
  if type(value) is dict:
    return Parts("", list(value.items()), start="{", end="}", separator=": ")
  start, end = "[]" if type(value) is list else "()"
  return Parts("", [(None, member) for member in value], start=start, end=end)


def to_text(target: Parts | Displayable) -> str:
  """Writes an object as text.

  Example:

    >>> from nnx import reprlib
    >>> reprlib.to_text(reprlib.Parts("Empty", []))
    'Empty()'

  Args:
    target: an object whose class has `_display`, or its `Parts`.

  Returns:
    The text. Where an object is part of itself it shows as `Name(...)`.
  """
  if id(target) in _context.active:
    return f"{type(target).__name__}(...)"
  outermost = not _context.active
  _context.active.add(id(target))
  try:
    parts = target if isinstance(target, Parts) else target._display()
    return _parts_text(parts)
  finally:
    _context.active.discard(id(target))
    if outermost:
      _context.memo = {}


def _parts_text(parts: Parts) -> str:
  comment = f" # {parts.comment}" if parts.comment else ""
  lines = []
  with showing(**parts.nested):
    for label, value in parts.items:
      if label is None:
        prefix = ""
      elif parts.separator == "=":
        prefix = f"{label}="
      else:
        prefix = f"{label!r}{parts.separator}"
      lines.append(prefix + value_text(value))
  if parts.one_line or not lines:
    return f"{parts.head}{parts.start}{', '.join(lines)}{parts.end}"
  body = ",\n".join(
    _INDENT + line.replace("\n", "\n" + _INDENT) for line in lines
  )
  return f"{parts.head}{parts.start}{comment}\n{body}\n{parts.end}"
