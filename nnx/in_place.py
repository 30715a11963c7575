"""Updates in place: whether a program may have what it will replace."""

from __future__ import annotations

from collections.abc import Iterable
import threading
from typing import Any

import jax
from jax import core

from nnx import environment
from nnx.engine import _engine, jax_private

# Where it is known how a call fails.
_PLATFORMS = ("cpu",)


class Settings(threading.local):
  """Whether compiled functions update Variables in place."""

  in_place = environment.switch("NNX_UPDATES_IN_PLACE", True)


settings = Settings()


class use_updates_in_place(environment.ForBlock):
  """Sets whether `nnx.jit` updates Variables in place where nobody can tell.

  A compiled function that replaces the array of a Variable may then write the
  new one where the old one was, which saves memory and copies. It does so only
  while nobody else can have the old array: a call of `nnx.jit` has made it for
  the Variable, and no one has read it since. Programs differ in nothing else.

  This is for arrays of 64 KiB or more, of a megabyte together, on one device of
  the CPU; not for functions with callbacks, with calls of libraries that are
  not known, with shardings or with donation of their own; not while jax looks
  for NaNs. Arrays that were not read from a Variable, but found with
  `jax.live_arrays` or `gc`, are safe as long as they are held; other arrays
  made of them that have the same memory are not, nor is what another thread
  finds so while a call runs.

  It holds for functions that are compiled and called while it is on, as it is
  by default; the variable `NNX_UPDATES_IN_PLACE` of the environment says
  otherwise for the process.

  Works from the call on, and as a context manager for a block, in this thread.

  Example:

    >>> import nnx
    >>> with nnx.use_updates_in_place(False):
    ...   nnx.using_updates_in_place()
    False
    >>> nnx.using_updates_in_place()
    True

  Args:
    value: whether it may.

  Raises:
    TypeError: if it is neither True nor False.
  """

  def __init__(self, value: bool, /):
    self._change = environment.Change(settings, {"in_place": value})


def using_updates_in_place() -> bool:
  """Tells whether `nnx.jit` updates Variables in place where nobody can tell.

  Example:

    >>> import nnx
    >>> nnx.using_updates_in_place()
    True
  """
  return settings.in_place


def may_lend() -> bool:
  """Tells whether a compiled call, here and now, runs what was compiled alone.

  Under a trace it is an operation of that; and jax can be told to run functions
  as they are written, or to do so after a NaN. Then arrays go to places that
  the engine does not know.

  Example:

    >>> import jax
    >>> from nnx import in_place
    >>> in_place.may_lend()
    True
    >>> with jax.disable_jit():
    ...   in_place.may_lend()
    False
  """
  return (
    settings.in_place
    and jax_private.outside_of_traces()
    and jax_private.runs_compiled()
  )


def copied(array: Any) -> Any:
  """Copies a concrete array to where it is, also under a trace.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx import in_place
    >>> in_place.copied(jnp.ones(2))
    Array([1., 1.], dtype=float32)

  Args:
    array: an array.
  """
  # It is no transfer of the user's, and stays on the device.
  with (
    jax.ensure_compile_time_eval(),
    jax.transfer_guard_device_to_device("allow"),
  ):
    if _has_own_layout(array):
      return array.copy()  # in the usual one
    return jax.device_put(array, may_alias=False)


def _has_own_layout(array: jax.Array) -> bool:
  """Tells whether jax loses the order of the dimensions in a copy.

  A program that is given what `jax.device_put` copies takes it for the usual
  one, and reads another array.
  """
  if array.is_deleted():
    return False
  layout = array.format.layout  # pyright: ignore[reportAttributeAccessIssue]
  return layout is not None and (
    layout.major_to_minor != tuple(range(array.ndim))
  )


def are_together(leaves: Iterable[Any]) -> bool:
  """Tells whether arrays lie together where updates in place work.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx import in_place
    >>> in_place.are_together([jnp.ones(2), 1.0])
    True

  Args:
    leaves: arrays, and scalars, which lie anywhere.
  """
  places = set()
  for leaf in leaves:
    if isinstance(leaf, core.Tracer):
      return False
    if isinstance(leaf, jax.Array):
      if not isinstance(leaf.sharding, jax.sharding.SingleDeviceSharding):
        return False
      (device,) = leaf.sharding.device_set
      places.add((device, leaf.sharding.memory_kind))
  return all(
    device.platform in _PLATFORMS
    and memory == device.default_memory().kind
    and len(places) == 1
    for device, memory in places
  )


def check_loan(kept: tuple[Any, ...], given: tuple[Any, ...]) -> None:
  """Refuses arguments of a program in place that are in other places.

  Args:
    kept: those that stay.
    given: those that it may overwrite.

  Raises:
    NotInPlace: if they are.
  """
  if not are_together((*kept, *given)):
    raise _engine.NotInPlace()
