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


class use_eager_sharding:
  """Sets whether new Variables with a sharding annotation are placed at once.

  Works from the call on, and as a context manager for a block.

  Example:

    >>> import nnx
    >>> with nnx.use_eager_sharding(False):
    ...   nnx.using_eager_sharding()
    False
    >>> nnx.using_eager_sharding()
    True

  Args:
    value: whether arrays are placed when there is a mesh to place them on.
  """

  def __init__(self, value: bool, /):
    self._before = vars(settings).get("eager_sharding")
    settings.eager_sharding = bool(value)

  def __enter__(self) -> use_eager_sharding:
    return self

  def __exit__(self, *exc_info) -> None:
    if self._before is None:  # the default, whatever it is by now
      vars(settings).pop("eager_sharding", None)
    else:
      settings.eager_sharding = self._before


def using_eager_sharding() -> bool:
  """Tells whether new Variables with a sharding annotation are placed at once.

  Example:

    >>> import nnx
    >>> nnx.using_eager_sharding()
    True
  """
  return settings.eager_sharding


class VarDefaults(collections.abc.Mapping):
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
    self._before = {name: vars(settings).get(name) for name in changes}
    for name, value in changes.items():
      setattr(settings, name, value)
    self.hijax, self.ref = settings.hijax, settings.ref

  def __getitem__(self, name: str) -> bool:
    if name not in ("hijax", "ref"):
      raise KeyError(name)
    return getattr(self, name)

  def __iter__(self) -> Iterator[str]:
    return iter(("hijax", "ref"))

  def __len__(self) -> int:
    return 2

  def __enter__(self) -> VarDefaults:
    return self

  def __exit__(self, *exc_info) -> None:
    for name, value in self._before.items():
      if value is None:  # the default, whatever it is by now
        vars(settings).pop(name, None)
      else:
        setattr(settings, name, value)

  def __call__(self, fun: F, /) -> F:
    self.__exit__()

    @functools.wraps(fun)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
      with VarDefaults(self._changes):
        return fun(*args, **kwargs)

    return wrapped  # type: ignore[return-value]
