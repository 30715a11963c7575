"""Which `bridge.Module` is being run, and what it is bound to."""

from __future__ import annotations

import collections
import dataclasses
import enum
import threading
from typing import Any

import nnx


class AttrPriority(enum.IntEnum):
  """Which attribute gives a Module its place, where several hold it.

  Example:

    >>> import bridge
    >>> bridge.AttrPriority.INIT_PARENT < bridge.AttrPriority.DEFAULT
    True
  """

  HIGH = 0
  INIT_PARENT = 20  # the name under which `compact` made it
  DEFAULT = 50
  LOW = 100


class Scope(nnx.Pytree):
  """What a `bridge.Module` is bound to during `init` and `apply`.

  Example:

    >>> import bridge, nnx
    >>> scope = bridge.Scope(nnx.Rngs(0), mutable=False)
    >>> scope.copy().rngs is scope.rngs
    True

  Args:
    rngs: the random streams, shared by all Modules that are bound.
    mutable: the collections that the caller asked for.
  """

  def __init__(self, rngs: nnx.Rngs, mutable: Any):
    self.rngs = rngs
    self.mutable = tuple(mutable) if isinstance(mutable, list) else mutable

  def copy(self) -> Scope:
    """Returns a scope for another Module, with the same streams."""
    return Scope(self.rngs, self.mutable)


@dataclasses.dataclass
class ModuleStackEntry:
  """A Module that is being run.

  Attributes:
    module: the `bridge.Module`.
    in_compact: whether Modules made now are its submodules by name.
    type_counter: how many of each name were made.
  """

  module: Any
  in_compact: bool
  type_counter: collections.Counter[str] = dataclasses.field(
    default_factory=collections.Counter
  )

  def new_name(self, cls: type) -> str:
    """Returns the next name for a submodule of a class."""
    index = self.type_counter[cls.__name__]
    self.type_counter[cls.__name__] += 1
    return f"{cls.__name__}_{index}"


class ModuleContext(threading.local):
  """The Modules that are being run in a thread, the innermost last.

  Example:

    >>> from bridge import module
    >>> module.MODULE_CONTEXT.module_stack
    [None]

  Attributes:
    module_stack: an entry for each, or None where there is no Module around.
  """

  def __init__(self) -> None:
    self.module_stack: list[ModuleStackEntry | None] = [None]


MODULE_CONTEXT = ModuleContext()


class Running:
  """Makes a Module the current one, for a block."""

  def __init__(self, module: Any, in_compact: bool):
    self._entry = ModuleStackEntry(module, in_compact)

  def __enter__(self) -> None:
    MODULE_CONTEXT.module_stack.append(self._entry)

  def __exit__(self, *exc_info) -> None:
    MODULE_CONTEXT.module_stack.pop()


def current_context() -> ModuleStackEntry | None:
  """Returns the innermost `bridge.Module` that is being run, and how.

  Example:

    >>> import bridge
    >>> class Model(bridge.Module):
    ...   @bridge.compact
    ...   def __call__(self):
    ...     return bridge.current_context().in_compact
    >>> Model().apply({}), bridge.current_context()
    (True, None)
  """
  return MODULE_CONTEXT.module_stack[-1]
