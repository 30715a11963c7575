"""Errors that are nnx's own, and the text of the ones about traces."""

from __future__ import annotations

import contextlib
import gc
from typing import Any, NamedTuple

from nnx.engine import _engine, preorder

# The search for an attribute path runs when an error is made, in programs of
# any size. Each level of it looks through all objects of the process once, for
# holders of at most this many others.
_MAX_LEVELS, _MAX_WIDTH = 32, 16


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


class _Held(NamedTuple):
  """An object on the way up, and the path from it down to the target.

  Attributes:
    holder: the object.
    path: the path if it is reached as a value.
    attributes: the path if it is the `__dict__` of an object.
  """

  holder: Any
  path: str
  attributes: str | None = None


def _hold(referrer: Any, known: dict[int, _Held]) -> _Held | None:
  """Finds how `referrer` holds one of the `known`, if we follow its kind."""
  if isinstance(referrer, _engine.ObjectBase):
    held = known.get(id(vars(referrer)))
    if held is not None and held.attributes is not None:
      return _Held(referrer, held.attributes)
  elif isinstance(referrer, dict):
    if "__builtins__" in referrer:  # the globals of a module
      return None
    for key, value in referrer.items():
      if id(value) in known:
        path = known[id(value)].path
        name = f".{key}" if isinstance(key, str) else f"[{key!r}]"
        return _Held(referrer, f"[{key!r}]{path}", name + path)
  elif isinstance(referrer, (list, tuple)) and not isinstance(referrer, _Held):
    for i, value in enumerate(referrer):
      if id(value) in known:
        return _Held(referrer, f"[{i}]{known[id(value)].path}")
  return None


def _rank(held: _Held) -> int:
  """Ranks holders: which to follow first where there are many."""
  if isinstance(held.holder, _engine.ObjectBase):
    return 0
  return 1 if isinstance(held.holder, dict) else 2


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
  found = None
  seen = {id(target)}
  level = {id(target): _Held(target, "")}
  if isinstance(target, _engine.ObjectBase):
    seen.add(id(vars(target)))
  for _ in range(_MAX_LEVELS):
    targets = [held.holder for held in level.values()]
    own = {id(targets), id(level)}
    holders = []
    for referrer in gc.get_referrers(*targets):
      if id(referrer) in own or id(referrer) in seen:
        continue
      held = _hold(referrer, level)
      if held is not None:
        seen.add(id(referrer))
        holders.append(held)
        if isinstance(referrer, _engine.ObjectBase):
          found = referrer, held.path
    if not holders:
      break
    holders.sort(key=_rank)
    level = {id(held.holder): held for held in holders[:_MAX_WIDTH]}
  return found


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
    lines.append(f'It was made at "{origin.filename}", line {origin.line}.')
  lines.append(
    "A transform traces its function with values that must not leak out of the"
    " trace, so objects from outside of it cannot be written there. Pass the"
    " model as an argument of the jitted function (`nnx.jit`, `nnx.grad`, ...)"
    " instead of closing over it."
  )
  return TraceContextError("\n".join(lines))


_RAISED = "Raised in "


def note_module(error: BaseException) -> None:
  """Adds to an error in which of the Modules of a model it was raised.

  They are found in the frames that it came through, so that calls which raise
  nothing pay nothing.
  """
  if any(n.startswith(_RAISED) for n in getattr(error, "__notes__", ())):
    return  # by a transform inside
  modules, traceback = [], error.__traceback__
  while traceback is not None:
    code = traceback.tb_frame.f_code
    if code.co_varnames[:1] == ("self",):
      owner = traceback.tb_frame.f_locals.get("self")
      if isinstance(owner, _engine.ObjectBase):
        modules.append(owner)
    traceback = traceback.tb_next
  if not modules or modules[0] is modules[-1]:
    return
  root, module = modules[0], modules[-1]
  with contextlib.suppress(Exception):  # such as a graph in an odd state
    structure, _, objects = _engine.flatten((root,))
    for position, path in preorder.walk(structure._records):
      kind, index = structure._records[position][:2]
      if index >= 0 and kind != "ref" and objects[index] is module:
        error.add_note(
          f"{_RAISED}`{preorder.path_text(path)}`, a {type(module).__name__},"
          f" of a `{type(root).__name__}`."
        )
