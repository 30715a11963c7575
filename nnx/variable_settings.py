"""What holds for new Variables of a thread, unless they say otherwise."""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator
import threading


class Settings(threading.local):
  """Whether Variables are placed at once, and hold mutable arrays."""

  eager_sharding = True
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

  Sets it from its making on, and as a context manager for a block.

  Example:

    >>> import nnx
    >>> dict(nnx.var_defaults())
    {'hijax': False, 'ref': False}
  """

  def __init__(self, ref: bool, before: bool):
    self.ref = ref
    self._before = before

  hijax = False

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
    settings.ref = self._before
