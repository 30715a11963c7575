"""Errors that are nnx's own, and the text of the ones about traces."""

from __future__ import annotations

import collections
import gc
import types
from typing import Any

from nnx.graph import _engine

# How many objects the search for an attribute path may look at. It runs when
# an error is made, in programs of any size, and must end soon.
_MAX_VISITED = 20_000


class TraceContextError(Exception):
  """A Variable or an object was changed inside a trace that it is not part of.

  Example:

    >>> import jax, nnx
    >>> count = nnx.Variable(0)
    >>> @jax.jit
    ... def f():
    ...   count.value = 1
    >>> try:
    ...   f()
    ... except nnx.TraceContextError as e:
    ...   print(str(e).splitlines()[0])
    Cannot change `Variable` from a different trace level.
  """


def _step(owner: Any, child: Any) -> str | None:
  """How `child` is reached from `owner`: `.name` or `[key]`; None if not."""
  if isinstance(owner, _engine.ObjectBase):
    for name, value in vars(owner).items():
      if value is child:
        return f".{name}" if isinstance(name, str) else f"[{name}]"
  elif isinstance(owner, dict):
    for key, value in owner.items():
      if value is child:
        return f"[{key!r}]"
  elif isinstance(owner, (list, tuple)):
    for i, value in enumerate(owner):
      if value is child:
        return f"[{i}]"
  return None


def _owners(child: Any) -> list[tuple[Any, str]]:
  """The objects and containers that hold `child`, each with the step to it."""
  owners = []
  for referrer in gc.get_referrers(child):
    if isinstance(referrer, (types.FrameType, types.ModuleType)):
      continue
    step = _step(referrer, child)
    if step is None:
      continue
    if isinstance(referrer, dict):
      # An instance's attributes may live in a dict of their own, in which case
      # the object itself does not refer to `child`.
      for holder in gc.get_referrers(referrer):
        if (
          isinstance(holder, _engine.ObjectBase) and vars(holder) is referrer
        ):
          attribute = _step(holder, child)
          if attribute is not None:
            owners.append((holder, attribute))
          break
      else:
        owners.append((referrer, step))
    else:
      owners.append((referrer, step))
  return owners


def attribute_path(target: Any) -> tuple[Any, str] | None:
  """Finds the object that holds `target`, directly or not, and the path to it.

  Looks backwards through the references of the garbage collector, so it works
  without any record of who holds what.

  Example:

    >>> import nnx
    >>> class Model(nnx.Module):
    ...   def __init__(self):
    ...     self.layers = [nnx.Param(1)]
    >>> model = Model()
    >>> root, path = nnx.errors.attribute_path(model.layers[0])
    >>> root is model, path
    (True, '.layers[0]')

  Args:
    target: a Variable or an object.

  Returns:
    `(root, path)` where `root` is the outermost object on the way, or `None`
    if no object holds `target`.
  """
  best = None
  seen = {id(target)}
  queue = collections.deque([(target, "")])
  while queue and len(seen) < _MAX_VISITED:
    child, path = queue.popleft()
    for owner, step in _owners(child):
      if id(owner) in seen:
        continue
      seen.add(id(owner))
      here = step + path
      if isinstance(owner, _engine.ObjectBase):
        best = owner, here
      queue.append((owner, here))
  return best


def trace_error(target: Any) -> TraceContextError:
  """Makes the error for a change of `target` from a foreign trace level.

  Example:

    >>> import nnx
    >>> error = nnx.errors.trace_error(nnx.Param(1))
    >>> print(str(error).splitlines()[0])
    Cannot change `Param` from a different trace level.

  Args:
    target: the Variable or object that was to be changed.

  Returns:
    The error, whose text names the attribute path of `target`, the line where
    it was made, and the way out.
  """
  name = type(target).__name__
  lines = [f"Cannot change `{name}` from a different trace level."]
  found = attribute_path(target)
  if found is not None:
    root, path = found
    lines.append(f"It is `{path.lstrip('.')}` of a `{type(root).__name__}`.")
  origin = target._origin
  if origin is not None:
    filename, line = origin
    lines.append(f'It was made at "{filename}", line {line}.')
  lines.append(
    "A transform traces its function with values that must not leak out of the"
    " trace, so objects from outside of it cannot be written there. Pass the"
    " model as an argument of the jitted function (`nnx.jit`, `nnx.grad`, ...)"
    " instead of closing over it."
  )
  return TraceContextError("\n".join(lines))
