"""What holds for new Variables of a thread, unless they say otherwise."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Iterator, Mapping
import functools
import threading
from typing import Any, TypeVar

from nnx import environment

F = TypeVar("F", bound=Callable[..., Any])


class Settings(threading.local):
  """Whether Variables are placed at once, are hijax, hold mutable arrays."""

  eager_sharding = True
  hijax = environment.switch("NNX_HIJAX_VARIABLE", False)
  ref = False


settings = Settings()


def using_eager_sharding() -> bool:
  """Tells whether new Variables with a sharding annotation are placed at once.

  Example:

    >>> import nnx
    >>> nnx.using_eager_sharding()
    True
  """
  return settings.eager_sharding


class VarDefaults(environment.ForBlock, collections.abc.Mapping):
  """What new Variables are made with; see `var_defaults`.

  Sets it from its making on, and as a context manager or decorator for a block
  or function.

  Example:

    >>> import nnx
    >>> dict(nnx.var_defaults())
    {'hijax': False, 'ref': False}
    >>> nnx.var_defaults(ref=True)(nnx.var_defaults)().ref
    True

  Args:
    changes: what to set, by name.
  """

  hijax: bool
  ref: bool

  def __init__(self, changes: Mapping[str, bool]):
    self._changes = changes
    self._change = environment.Change(settings, changes)
    self.hijax, self.ref = settings.hijax, settings.ref

  def __getitem__(self, name: str) -> bool:
    if name not in ("hijax", "ref"):
      raise KeyError(name)
    return getattr(self, name)

  def __iter__(self) -> Iterator[str]:
    return iter(("hijax", "ref"))

  def __len__(self) -> int:
    return 2

  def __call__(self, fun: F, /) -> F:
    self._change.undo()

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
      with VarDefaults(self._changes):
        return fun(*args, **kwargs)

    return wrapped  # type: ignore[return-value]
