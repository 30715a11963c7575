"""How `jax.export` writes what is static in trees of Variables and objects.

Names, numbers and tuples of them are JSON, which says the same tomorrow. All
else (classes, functions, dtypes) is pickled, and so found by its name where it
is read.
"""

from __future__ import annotations

from collections.abc import Callable
import json
import pickle
from typing import Any

from nnx.engine import jax_private

_JSON, _PICKLE = b"j", b"p"
_PLAIN = (type(None), bool, int, float, str)
_TUPLE = "tuple"


def _encode(value: Any) -> Any:
  """Writes a tuple as a dict, as JSON has none.

  Raises:
    TypeError: if JSON has no other way to write the value.
  """
  if type(value) in _PLAIN:
    return value
  if type(value) is tuple:
    return {_TUPLE: list(map(_encode, value))}
  raise TypeError(type(value).__name__)


def _decode(fields: dict[str, Any]) -> Any:
  return tuple(fields[_TUPLE])


def dump(value: Any) -> bytes:
  """Writes the static part of a node.

  Example:

    >>> from nnx.engine import serialization
    >>> serialization.dump(("kernel", 0))
    b'j{"tuple": ["kernel", 0]}'

  Raises:
    ValueError: if it holds what has no name in another process.
  """
  try:
    return _JSON + json.dumps(_encode(value)).encode()
  except TypeError:
    pass
  try:
    return _PICKLE + pickle.dumps(value)
  except Exception as error:  # each type has an error of its own
    raise ValueError(
      "What is static in the arguments and results of an exported function"
      f" must have a name, but some of it cannot be pickled: {error} Export a"
      " function of States alone, which has the graphdef from outside:"
      " `nnx.merge(graphdef, state)`."
    ) from error


def load(data: bytes) -> Any:
  """Reads what `dump` wrote.

  Example:

    >>> from nnx.engine import serialization
    >>> serialization.load(serialization.dump(("kernel", 0)))
    ('kernel', 0)
  """
  kind, body = data[:1], data[1:]
  if kind == _PICKLE:
    return pickle.loads(body)
  return json.loads(body, object_hook=_decode)


def register(cls: type, dump: Callable[[Any], bytes] = dump) -> None:
  """Lets `jax.export` write a type of pytree nodes, by the name of its class.

  Args:
    cls: the type, which is a pytree node already.
    dump: writes the static part of a node, so that `load` reads it.
  """
  name = f"{cls.__module__}.{cls.__qualname__}"
  jax_private.register_serialization(cls, name, dump, load)
