"""What of Flax stays Flax's, and must mean the same as here.

Exceptions become one class for both, and the options of `flax.config` say what
is the default here as they do in `flax.nnx`.
"""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

import nnx
from nnx import errors, variable_settings, variablelib
from nnx.graphlib import modes

# Options of `flax.config`, and the setting whose default each says.
OPTIONS = {
  "nnx_graph_mode": (modes._Settings, "graph_mode"),
  "nnx_graph_updates": (modes._Settings, "graph_updates"),
  "flax_always_shard_variable": (variable_settings.Settings, "eager_sharding"),
  "flax_hijax_variable": (variable_settings.Settings, "hijax"),
}

# Those that have no counterpart here, and what they are in Flax.
FIXED = {"flax_pytree_module": True, "flax_max_repr_depth": None}


class _Option:
  """The default of a setting, as `flax.config` has it at the time."""

  def __init__(self, config: Any, name: str):
    self._config = config
    self._name = name

  def __get__(self, instance: Any, owner: type) -> Any:
    return getattr(self._config, self._name)


def agree() -> None:
  """Has the Flax that is loaded agree with `nnx`; more than once, if need be.

  Example:

    >>> import flax, nnx
    >>> import nnx.as_flax
    >>> flax.errors.TraceContextError is nnx.TraceContextError
    True
  """
  flax = sys.modules["flax"]
  _share_errors(flax.errors)
  for option, (settings, name) in OPTIONS.items():
    if hasattr(flax.config, option) and hasattr(settings, name):
      setattr(settings, name, _Option(flax.config, option))
  _heed(flax.config)


def _heed(config: Any) -> None:
  hijax = getattr(config, "flax_hijax_variable", False)
  if hijax or not getattr(config, "flax_always_shard_variable", True):
    variablelib.heed_defaults()


def hold_options() -> None:
  """Refuses options that nothing here would heed, now and later.

  Example:

    >>> import flax
    >>> from nnx.as_flax import agreement
    >>> agreement.hold_options()
    >>> try:
    ...   flax.config.update("flax_max_repr_depth", 2)
    ... except ValueError as error:
    ...   str(error).partition(" where")[0]
    '`flax.config.flax_max_repr_depth` must be `None`'

  Raises:
    ValueError: if one of them is not what it is by default.
  """
  config = importlib.import_module("flax").config
  for name, value in FIXED.items():
    _check_option(name, getattr(config, name, value))
  if "update" in vars(config):
    return
  update = config.update

  @functools.wraps(update)
  def checked(name_or_holder: Any, value: Any, /) -> None:
    _check_option(getattr(name_or_holder, "name", name_or_holder), value)
    update(name_or_holder, value)
    _heed(config)

  config.update = checked


def _check_option(name: str, given: Any) -> None:
  if name in FIXED and given != FIXED[name]:
    raise ValueError(
      f"`flax.config.{name}` must be `{FIXED[name]}` where `nnx.as_flax` puts"
      f" `nnx` in the place of `flax.nnx`, but is `{given}`. Leave the option"
      " out."
    )


def _share_errors(theirs: Any) -> None:
  if isinstance(theirs.TraceContextError, type) and issubclass(
    theirs.TraceContextError, _OurTraceContextError
  ):
    return

  class TraceContextError(_OurTraceContextError, theirs.FlaxError):
    __doc__ = _OurTraceContextError.__doc__

    def __init__(self, *args: Any):
      # Past Flax's, which would add the address of a page of its own.
      Exception.__init__(self, *args)

    def __reduce__(self) -> Any:
      return Exception.__reduce__(self)

  TraceContextError.__module__ = errors.__name__
  TraceContextError.__qualname__ = "TraceContextError"
  modules: tuple[Any, ...] = theirs, errors, nnx
  for module in modules:
    module.TraceContextError = TraceContextError


_OurTraceContextError = errors.TraceContextError
