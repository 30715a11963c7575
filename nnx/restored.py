"""What checkpoints make of a state, and the way back.

A checkpoint that is read without a target consists of dicts, lists and arrays:
keys that were ints are strings, tuples are lists or dicts, and the value of a
Variable may be in a dict under `value`. What these once were is told by the
values that they are to replace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


class _Leaf:
  """An array or number of unknown shape."""

  shape = None


LEAF = _Leaf()

_NUMBERS = (bool, int, float, complex, np.generic)


def int_key(key: Any) -> Any:
  """Turns a key that is the text of an int into the int.

  Example:

    >>> from nnx.restored import int_key
    >>> int_key("10"), int_key("01"), int_key("a"), int_key(2)
    (10, '01', 'a', 2)
  """
  if isinstance(key, str) and key.removeprefix("-").isdecimal():
    number = int(key)
    if str(number) == key:
      return number
  return key


def keys_text(keys: Any) -> str:
  """Writes some keys for an error, not all of a great many.

  Example:

    >>> from nnx.restored import keys_text
    >>> keys_text(["a", 0])
    "['a', 0]"
  """
  keys = list(keys)
  shown = ", ".join(map(repr, keys[:12]))
  return f"[{shown}{', ...' if len(keys) > 12 else ''}]"


def restored_value(
  old: Any, value: Any, path: str, check_shapes: bool = True
) -> Any:
  """Makes the value of a Variable of what a checkpoint holds for it.

  Example:

    >>> import numpy as np
    >>> from nnx.restored import restored_value
    >>> restored_value(np.zeros(2), {"value": np.ones(2)}, "w")
    array([1., 1.])
    >>> restored_value((1, 2), {"0": 3, "1": 4}, "w")
    (3, 4)

  Args:
    old: the value that the Variable has; in place of arrays there may be
      `LEAF`.
    value: what the checkpoint holds.
    path: the path of the Variable, for errors.
    check_shapes: whether arrays must have the shapes of those they replace.

  Returns:
    The value, out of the dict that it may be in, with the containers of `old`.

  Raises:
    ValueError: if it does not fit `old`.
  """
  if _is_boxed(old, value):
    value = value["value"]
  return _like(old, value, path, check_shapes)


def _is_boxed(old: Any, value: Any) -> bool:
  """Tells whether a value is in a dict under `value`, unlike `old`."""
  if not isinstance(value, Mapping) or list(value) != ["value"]:
    return False
  if not isinstance(old, Mapping) or "value" not in old:
    return True
  inner = value["value"]
  return (
    isinstance(inner, Mapping)
    and "value" in inner
    and not isinstance(old["value"], Mapping)
  )


def _like(old: Any, value: Any, path: str, check_shapes: bool) -> Any:
  given_mapping = isinstance(value, Mapping)
  if isinstance(old, Mapping):
    if not given_mapping:
      return value
    return {
      (name := _key_in(old, key)): _like(
        old[name], item, f"{path}[{name!r}]", check_shapes
      )
      if name in old
      else item
      for key, item in value.items()
    }
  if isinstance(old, (list, tuple)):
    if given_mapping:
      items = _items_of(old, value, path)
    elif type(value) in (list, tuple):
      items = list(value)
    else:
      return value
    if len(items) == len(old):
      items = [
        _like(before, item, f"{path}[{i}]", check_shapes)
        for i, (before, item) in enumerate(zip(old, items))
      ]
    if hasattr(old, "_fields"):
      return type(old)(*items) if len(items) == len(old) else value
    return type(old)(items) if type(old) in (list, tuple) else items
  shape = getattr(old, "shape", None)
  if shape is None and old is not LEAF:
    return value
  if given_mapping or type(value) in (list, tuple):
    given = f"a {type(value).__name__}"
    if given_mapping:
      given += f" with the keys {keys_text(value)}"
    raise ValueError(
      f"The state must hold an array at `{path}`, as the graph does, but got"
      f" {given}."
    )
  given_shape = getattr(value, "shape", None)
  if given_shape is None and isinstance(value, _NUMBERS):
    given_shape = ()
  if check_shapes and None not in (given_shape, shape) and given_shape != shape:
    raise ValueError(shape_message(path, given_shape, shape))
  return value


def shape_message(path: str, given: Any, wanted: Any) -> str:
  """Writes the error for an array of another shape.

  Example:

    >>> from nnx.restored import shape_message
    >>> shape_message("w", (1,), (2,)).split(". ")[0]
    'The state must hold an array of shape (2,) at `w`, but got one of (1,)'
  """
  return (
    f"The state must hold an array of shape {tuple(wanted)} at `{path}`, but"
    f" got one of {tuple(given)}. Pass `check_shapes=False` if it is to change."
  )


def _key_in(mapping: Mapping[Any, Any], key: Any) -> Any:
  """Finds the key of `mapping` that a checkpoint's key stands for."""
  return key if key in mapping or int_key(key) not in mapping else int_key(key)


def _items_of(old: Any, value: Mapping[Any, Any], path: str) -> list[Any]:
  """Lists the items of a sequence that a checkpoint has made a dict of."""
  names = getattr(old, "_fields", None)
  by_key = {int_key(key): item for key, item in value.items()}
  wanted = list(range(len(value)) if names is None else names)
  if set(by_key) != set(wanted) or len(by_key) != len(value):
    raise ValueError(
      f"The state must hold a {type(old).__name__} at `{path}`, as the graph"
      f" does, or a dict with the keys {keys_text(wanted)}, but got one with"
      f" {keys_text(value)}."
    )
  return [by_key[name] for name in wanted]
