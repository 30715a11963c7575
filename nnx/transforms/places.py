"""Where transforms want the arrays of Variables to lie: on which devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
import contextlib
import threading
from typing import Any

import jax

from nnx.engine import _engine, jax_private


class _Noted(threading.local):
  # Numbers of leaves by identity, and the shardings that are wanted of them.
  notes: tuple[dict[int, int], dict[int, Any]] | None = None


_noted = _Noted()


def is_noting_places() -> bool:
  """Tells whether somebody traces who notes places."""
  return _noted.notes is not None


@contextlib.contextmanager
def noting_places(leaves: Sequence[Any]) -> Iterator[dict[int, Any]]:
  """Notes where transforms inside of a trace want Variables to lie.

  Args:
    leaves: of the arguments of the function that is traced.

  Yields:
    A dict from numbers of leaves to shardings, filled by `place_variables`.
  """
  before = _noted.notes
  shardings: dict[int, Any] = {}
  _noted.notes = {id(leaf): i for i, leaf in enumerate(leaves)}, shardings
  try:
    yield shardings
  finally:
    _noted.notes = before


def place_variables(
  structure: Any, objects: Sequence[Any], shardings: Sequence[Any]
) -> None:
  """Moves arrays of Variables to where a transform wants them.

  So what a function only reads is moved once, not at every call. Inside of a
  trace nothing can be moved, and it is noted for who traces; see
  `noting_places`.

  Args:
    structure: of the arguments.
    objects: the arguments' own objects.
    shardings: one a leaf; what is no `Sharding` asks for nothing.
  """
  outside, notes = jax_private.outside_of_traces(), _noted.notes
  if not outside and notes is None:
    return
  leaves, wanted = notes or ({}, {})
  for record in structure._records:
    if record.kind is not _engine.NodeKind.VARIABLE or record.leaf < 0:
      continue
    variable, sharding = objects[record.index], shardings[record.leaf]
    value = variable.raw_value
    if not isinstance(value, jax.Array):
      continue
    if not isinstance(sharding, jax.sharding.Sharding):
      continue  # of a mesh that only jax knows
    if not sharding.is_fully_addressable:
      continue  # other processes have parts of it
    if not outside:
      leaf = leaves.get(id(value))
      if leaf is not None:
        wanted.setdefault(leaf, sharding)
    elif not value.sharding.is_equivalent_to(sharding, value.ndim):
      variable.raw_value = jax.device_put(value, sharding)
