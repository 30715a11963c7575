"""The one mechanism under all transforms: functions of graphs as flat functions.

A transform of jax takes and returns arrays. A function of Modules reads and
writes objects. `flatten_call` opens the arguments into a structure and a flat
tuple of arrays; `Lifted` is the function of those arrays: it builds copies of
the arguments, runs the user's function on the copies, and packs what changed.
Applying the packed result does to the originals what was done to the copies.

So nothing the function does under a trace touches the originals, and an
exception leaves them as they were.
"""

from __future__ import annotations

from typing import Any, Callable, Sequence

from nnx.graph import _engine


class Lifted:
  """A user's function as a function of the leaves of one structure."""

  __slots__ = ("fun", "structure", "names", "__weakref__")

  def __init__(self, fun: Callable[..., Any], structure: Any, names: Sequence[str]):
    self.fun = fun
    self.structure = structure
    self.names = names

  def __repr__(self) -> str:
    return repr(self.fun)

  def __call__(self, leaves: tuple[Any, ...]) -> Any:
    """Runs the function on copies; returns the engine's `Packed`."""
    values, objects = _engine.unflatten(self.structure, leaves)
    result = self.call(values)
    return _engine.pack(self.structure, objects, leaves, result)

  def call(self, values: Sequence[Any]) -> Any:
    """Runs the user's function on the roots of the structure."""
    count = len(values) - len(self.names)
    kwargs = dict(zip(self.names, values[count:]))
    return self.fun(*values[:count], **kwargs)
