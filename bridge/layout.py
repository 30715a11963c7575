"""Where the leaves of a graphdef are among Linen's variables."""

from __future__ import annotations

import collections
from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import nnx

from . import to_nnx
from . import variables as variables_lib

# The collection of what is not a variable of the nnx Module: its graphdef, and
# arrays that are plain attributes.
COLLECTION = "nnx"
GRAPHDEF = "graphdef"
ARRAYS = "arrays"
# Metadata of the key of several random streams in one: how many.
_SHAPE = "stream_shape"

MISSING = object()


@dataclasses.dataclass(frozen=True)
class Slot:
  """Where a Variable or array of a graphdef is among the Linen variables."""

  collection: str | None  # None: an array that is a plain attribute
  path: tuple[Any, ...]
  boxed: bool = False  # whether it has metadata


@dataclasses.dataclass(frozen=True)
class Layout:
  """The leaves of a graphdef: stored ones, and random streams by name."""

  slots: tuple[Slot, ...]
  streams: Mapping[str, list[tuple[Any, Any]]]  # paths and shapes
  known: frozenset[tuple[str, ...]]  # collections and paths, as strings
  sizes: Mapping[str, int]  # how many slots a collection has


@functools.lru_cache(maxsize=128)
def layout_of(graphdef: nnx.GraphDef) -> Layout:
  slots: list[Slot] = []
  streams: dict[str, list[tuple[Any, Any]]] = {}
  for path, type_, metadata in graphdef.leaf_records():
    if type_ is None:
      slots.append(Slot(None, path))
    elif issubclass(type_, nnx.RngKey):
      stream = (path[:-1], metadata.get(_SHAPE, ()))
      streams.setdefault(metadata["tag"], []).append(stream)
    elif not issubclass(type_, nnx.RngState):
      name = nnx.variable_name_from_type(type_, allow_register=True)
      slots.append(Slot(name, path, variables_lib.needs_box(metadata)))
  known = frozenset(
    (slot.collection, *map(str, slot.path)) for slot in slots if slot.collection
  )
  sizes = collections.Counter(
    slot.collection for slot in slots if slot.collection is not None
  )
  return Layout(tuple(slots), streams, known, sizes)


def structure_of(module: nnx.Module) -> tuple[nnx.GraphDef, dict[Any, Any]]:
  """Splits a Module: its graphdef, and its arrays that are not in Variables."""
  for _, key in nnx.to_flat_state(nnx.state(module, nnx.RngKey)):
    if key.has_metadata(to_nnx.NO_KEY):
      key.del_metadata(to_nnx.NO_KEY)
    if key.shape:  # of several layers; no value says so when it is seeded anew
      key.set_metadata(_SHAPE, key.shape)
  graphdef, _, arrays = nnx.split(module, nnx.Variable, ...)
  return graphdef, arrays.raw_mapping


def lookup(tree: Any, path: tuple[Any, ...]) -> Any:
  for key in path:
    if not isinstance(tree, Mapping):
      return MISSING
    if key in tree:
      tree = tree[key]
    elif str(key) in tree:  # a checkpoint makes strings of ints
      tree = tree[str(key)]
    else:
      return MISSING
  return tree


def size(tree: Any) -> int:
  """Counts the leaves of nested mappings."""
  return sum(
    size(value) if isinstance(value, (dict, Mapping)) else 1
    for value in tree.values()
  )


def unplaced(tree: Any, path: tuple[Any, ...], known: frozenset[Any]):
  """Yields the leaves of nested mappings that are at or below no known path."""
  for key, value in tree.items():
    here = (*path, key)
    if tuple(map(str, here)) in known:
      continue
    if isinstance(value, Mapping):
      yield from unplaced(value, here, known)
    else:
      yield here, value


def add(module: nnx.Module, path: tuple[Any, ...], value: Any) -> bool:
  """Adds a Variable that the graphdef does not have, such as a sown one.

  Returns:
    Whether there is a module for it, with the name free.
  """
  owner: Any = module
  for key in path[:-1]:
    if isinstance(owner, (list, tuple, nnx.List)) and str(key).isdigit():
      owner = owner[int(key)] if int(key) < len(owner) else None
    elif isinstance(owner, Mapping):
      owner = owner.get(key)
    else:
      owner = getattr(owner, str(key), None)
  if not isinstance(owner, nnx.Module) or path[-1] in vars(owner):
    return False
  setattr(owner, path[-1], value)
  return True
