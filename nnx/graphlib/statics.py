"""What static values are compared by, where their own equality says too little.

Python says that `1 == True == 1.0` and `0.0 == -0.0`, but a function computes
different things from them; and a value without a hash may be changed in place
after a function was compiled for it.
"""

from __future__ import annotations

from collections import abc
import dataclasses
from typing import Any

import jax
import numpy as np

from nnx.engine import _engine

_DATA = (
  _engine.VariableBase,
  jax.Array,
  np.ndarray,
  jax.Ref,
)


class _HoldsData(Exception):
  """A static value holds arrays or Variables."""


def freeze(value: Any) -> Any:
  """Makes a value with a hash of what a static value holds now.

  Keys of two values are equal if the values hold the same, types included.
  What has a hash is taken for immutable and compared by its own equality. The
  contents of numbers, tuples, slices, frozen sets, mappings and classes of
  `dataclasses` or `attrs` are compared as well, and of all that has no hash.

  Example:

    >>> from nnx.graphlib import statics
    >>> statics.freeze([1, 2]) == statics.freeze([1, 2])
    True
    >>> statics.freeze([1, 2]) == statics.freeze([1, True])
    False

  Args:
    value: a static value.

  Returns:
    The key, or None if the value holds arrays or Variables.

  Raises:
    TypeError: if what a value without a hash holds cannot be found out.
  """
  try:
    return _freeze(value, ())
  except _HoldsData:
    return None


def _freeze(value: Any, outer: tuple[int, ...]) -> Any:
  cls = type(value)
  if value is None or cls in (str, int, bytes):
    return value
  if cls is float:
    return cls, value.hex()  # tells zeros apart, and no NaN from another
  if cls is complex:
    return cls, value.real.hex(), value.imag.hex()
  if isinstance(value, np.generic):
    return cls, value.dtype, value.tobytes()
  if isinstance(value, _DATA):
    raise _HoldsData
  if id(value) in outer:
    return "cycle", outer.index(id(value))
  outer = (*outer, id(value))
  if isinstance(value, tuple):
    return cls, tuple(_freeze(item, outer) for item in value)
  if cls is slice:  # has a hash from Python 3.12 on
    return cls, _freeze((value.start, value.stop, value.step), outer)
  try:
    hash(value)
  except TypeError:
    return cls, *_contents(value, outer)
  if isinstance(value, frozenset):
    return cls, frozenset(_freeze(item, outer) for item in value)
  # Its own equality counts too, which may know of more than is seen here.
  return cls, _compared(value, outer), value


def _compared(value: Any, outer: tuple[int, ...]) -> Any:
  """Returns how a hashable value compares, where that is known."""
  cls = type(value)
  if isinstance(value, float):
    return float.hex(value)
  if isinstance(value, complex):
    return float.hex(value.real), float.hex(value.imag)
  if isinstance(value, abc.Mapping):
    return tuple(
      (_freeze(key, outer), _freeze(item, outer)) for key, item in value.items()
    )
  if cls.__eq__ is object.__eq__:
    return None
  if dataclasses.is_dataclass(cls):
    names = [f.name for f in dataclasses.fields(value) if f.compare]
  else:
    names = [a.name for a in getattr(cls, "__attrs_attrs__", ()) if a.eq]
  return tuple((n, _freeze(getattr(value, n, None), outer)) for n in names)


def _contents(value: Any, outer: tuple[int, ...]) -> tuple[Any, ...]:
  """Finds what a value without a hash holds, wherever it can hold it."""
  # Copied before it is walked: another thread may change it meanwhile.
  found: list[Any] = []
  if isinstance(value, abc.Set):
    found.append(frozenset(_freeze(item, outer) for item in list(value)))
  elif isinstance(value, dict):
    found.append(
      tuple(
        (_freeze(key, outer), _freeze(item, outer))
        for key, item in list(value.items())
      )
    )
  elif isinstance(value, abc.Sequence) and not isinstance(value, memoryview):
    found.append(tuple(_freeze(item, outer) for item in list(value)))
  attributes = dict(getattr(value, "__dict__", {}))
  for base in type(value).__mro__:
    slots = base.__dict__.get("__slots__", ())
    for name in (slots,) if isinstance(slots, str) else slots:
      if name.startswith("__") and not name.endswith("__"):
        name = f"_{base.__name__.lstrip('_')}{name}"
      if name not in ("__dict__", "__weakref__") and hasattr(value, name):
        attributes[name] = getattr(value, name)
  for name in sorted(attributes, key=str):
    found.append((name, _freeze(attributes[name], outer)))
  if not found:
    # A type written in C tells how to make it again.
    reduced = value.__reduce_ex__(4)
    if isinstance(reduced, str):
      raise TypeError(f"`{value!r}` is only known by its name.")
    function, arguments, *state = reduced
    found.append((function, _freeze(tuple(arguments), outer)))
    found.extend(
      _freeze(list(part) if isinstance(part, abc.Iterator) else part, outer)
      for part in state[:3]
    )
  return tuple(found)
