"""Extensions and other modules that are loaded when they are needed."""

from collections.abc import Callable, Mapping
import importlib
import re
import sysconfig
import threading
import types
from typing import Any

import jax

from . import jax_private

_LIBRARIES: list["Library"] = []
_VERSIONED = re.compile(r"_\d+$")


class Library:
  """A compiled extension module with XLA FFI handlers, loaded on first use.

  Args:
    module: Dotted name of the extension module, for example
      `kernels.my_op.cpu._my_op_cpu`.
    targets: Maps the FFI target name to the name of the function in the module
      that returns the handler's capsule. A name that ends in a version, as in
      `my_op_1`, promises that operands, results and attributes mean the same
      for ever: `jax.export` writes programs with these and no others.
    platform: The platform to register the handlers for.

  Attributes:
    module: As given.
    platform: As given.
    targets: As given.
  """

  def __init__(
    self, module: str, targets: Mapping[str, str], platform: str = "cpu"
  ):
    self.module = module
    self.platform = platform
    self.targets = dict(targets)
    jax_private.promise(filter(_VERSIONED.search, self.targets))
    self._lock = threading.Lock()
    self._loaded: types.ModuleType | None = None
    _LIBRARIES.append(self)

  def load(self) -> types.ModuleType:
    """Imports the module and registers its handlers, once.

    Returns:
      The extension module.

    Raises:
      ImportError: If the extension has not been built, or Python is
        free-threaded.
    """
    # An extension for one kind of Python would crash in the other.
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
      raise ImportError(
        "extensions need a Python with the global lock, but this one is"
        " free-threaded"
      )
    with self._lock:
      if self._loaded is None:
        module = importlib.import_module(self.module)
        for target, getter in self.targets.items():
          jax.ffi.register_ffi_target(
            target, getattr(module, getter)(), platform=self.platform
          )
        self._loaded = module
      return self._loaded

  def missing(self) -> str | None:
    """Returns why the library cannot be used, or None if it can."""
    try:
      self.load()
    except ImportError as error:
      return f"the extension {self.module} could not be imported ({error})"
    return None


def lazily(module: str, name: str) -> Callable[..., Any]:
  """Returns a function of a module that is imported when it is first called.

  For what is slow to import, as Pallas is, and only used by programs that are
  lowered for its platform.

  Args:
    module: Dotted name of the module.
    name: Of the function in it.
  """

  def call(*args: Any, **kwargs: Any) -> Any:
    return getattr(importlib.import_module(module), name)(*args, **kwargs)

  return call


def targets() -> set[str]:
  """Returns the names of all FFI targets, of all platforms."""
  return {target for library in _LIBRARIES for target in library.targets}


def register() -> None:
  """Loads every extension that is built and registers its FFI handlers.

  Ops do this by themselves. Call it in a process that runs an artifact of
  `jax.export` without having traced the op.

  Example:
    >>> import kernels
    >>> kernels.register()
  """
  for library in _LIBRARIES:
    library.missing()
