"""The trace that an object belongs to, as programs of Flax ask for it.

The engine compares traces where objects are changed, without any of this. What
is here is asked when it is about to refuse a change, and by programs.
"""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import threading
from typing import Any
import weakref

from nnx.engine import _engine, jax_private


class _Context(threading.local):
  unchecked = False


_context = _Context()


def current_jax_trace() -> Any:
  """Returns the current trace of jax: an object that compares by identity.

  Example:

    >>> import jax
    >>> from nnx.tracers import current_jax_trace
    >>> outside = current_jax_trace()
    >>> current_jax_trace() == outside
    True
    >>> int(jax.jit(lambda: current_jax_trace() == outside)())
    0
  """
  return jax_private.opaque_trace(jax_private.trace_context().trace)


class Attached:
  """What is known of objects besides what they hold; goes when they do.

  Example:

    >>> import nnx
    >>> from nnx.tracers import Attached
    >>> notes, model = Attached(), nnx.Module()
    >>> notes.set(model, "made today")
    >>> notes.get(model), notes.get(nnx.Module())
    ('made today', None)
  """

  def __init__(self) -> None:
    # By identity: an object may compare by value, or have no hash.
    self._entries: dict[int, tuple[Any, Any]] = {}

  def get(self, target: Any) -> Any:
    """Returns what is attached to an object, or None."""
    entry = self._entries.get(id(target))
    return None if entry is None else entry[1]

  def set(self, target: Any, value: Any) -> None:
    """Attaches a value to an object in place of the one that it has."""
    key, entries = id(target), self._entries
    entries[key] = (
      weakref.ref(target, lambda _: entries.pop(key, None)),
      value,
    )


# Traces that a program has said objects belong to.
_adopted = Attached()


class TraceState:
  """A trace, and whether it is the current one.

  That of an object, `variable._trace_state`, is a view: to set its
  `_jax_trace` is to say from which trace the object may be changed.

  Example:

    >>> import jax, nnx
    >>> from nnx.tracers import TraceState
    >>> p = nnx.Param(1)
    >>> p._trace_state == TraceState(), p._trace_state.is_valid()
    (True, True)
    >>> int(jax.jit(lambda: p._trace_state.is_valid())())
    0
  """

  __slots__ = ("_own", "_target", "__weakref__")

  def __init__(self):
    self._own = current_jax_trace()
    self._target = None

  @classmethod
  def of(cls, target: Any) -> TraceState:
    """Returns the view of an object's, which does not keep it alive."""
    result = object.__new__(cls)
    result._own, result._target = None, weakref.ref(target)
    return result

  @property
  def _jax_trace(self) -> Any:
    target = None if self._target is None else self._target()
    if target is None:
      return self._own
    adopted = _adopted.get(target)
    if adopted is not None:
      return adopted
    ref = target._trace_ref
    return jax_private.opaque_trace(
      jax_private.eval_trace() if ref is None else ref()
    )

  @_jax_trace.setter
  def _jax_trace(self, trace: Any) -> None:
    target = None if self._target is None else self._target()
    if target is None:
      self._own = trace
    else:
      _adopted.set(target, trace)

  @property
  def jax_trace(self) -> Any:
    """The trace, as `current_jax_trace` tells it."""
    return self._jax_trace

  def is_valid(self) -> bool:
    """Tells whether it is the current trace."""
    return self._jax_trace == current_jax_trace()

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, TraceState) and bool(
      self._jax_trace == other._jax_trace
    )

  def __repr__(self) -> str:
    return f"TraceState(jax_trace={self._jax_trace!r})"

  def __copy__(self) -> TraceState:
    return TraceState()

  def __deepcopy__(self, memo: Any) -> TraceState:
    return TraceState()

  def __reduce__(self):
    # What is loaded belongs to the trace that loads it.
    return TraceState, ()

  def __setstate__(self, state: Any) -> None:
    # Flax pickles an empty state after an object made without `__init__`.
    self._own, self._target = current_jax_trace(), None


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
  """Lets objects be changed from any trace, for a block.

  Example:

    >>> import jax, nnx
    >>> from nnx import tracers
    >>> p = nnx.Param(1)
    >>> def f():
    ...   with tracers.unchecked():
    ...     p.raw_value = 2
    >>> _ = jax.jit(f)()
    >>> p.value
    2
  """
  before, _context.unchecked = _context.unchecked, True
  try:
    yield
  finally:
    _context.unchecked = before


def may_change(target: Any) -> bool:
  """Tells whether an object of another trace may be changed all the same.

  Example:

    >>> import nnx
    >>> from nnx import tracers
    >>> tracers.may_change(nnx.Param(1))
    False

  Args:
    target: an object or a Variable that does not belong to the current trace.
  """
  if _context.unchecked:
    return True
  if isinstance(target, _engine.VariableBase) and target._metadata.get("hijax"):
    return True
  adopted = _adopted.get(target)
  if adopted is not None and adopted == current_jax_trace():
    return True
  if isinstance(target, _engine.ObjectBase):
    state = getattr(target, "_pytree__state", None)
    trace = getattr(state, "_trace_state", None)
    # One that a program has put there has a trace of its own.
    return isinstance(trace, TraceState) and trace.is_valid()
  return False
