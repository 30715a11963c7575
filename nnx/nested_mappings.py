"""Functions on nested dicts with leaves: what `statelib` is made of."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from nnx import filterlib, reprlib, restored
from nnx.engine import _engine, preorder

V = TypeVar("V")

PathParts = filterlib.PathParts
Filter = filterlib.Filter


def path_sort_key(path: PathParts) -> tuple[tuple[bool, Any], ...]:
  """Sorts paths of ints and strings: ints come first.

  Example:

    >>> from nnx.statelib import path_sort_key
    >>> sorted([("b",), (1,)], key=path_sort_key)
    [(1,), ('b',)]
  """
  return tuple((isinstance(key, str), key) for key in path)


def sorted_by_path(
  items: Sequence[tuple[PathParts, V]],
) -> list[tuple[PathParts, V]]:
  """Sorts pairs of path and leaf.

  Example:

    >>> from nnx.statelib import sorted_by_path
    >>> sorted_by_path([(("b",), 1), (("a", 0), 2)])
    [(('a', 0), 2), (('b',), 1)]
  """
  return sorted(items, key=lambda item: path_sort_key(item[0]))


def copy_mapping(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
  """Copies nested mappings as dicts, with the same leaves.

  Example:

    >>> import nnx
    >>> from nnx.statelib import copy_mapping
    >>> copy_mapping(nnx.State({"a": {"b": 1}}))
    {'a': {'b': 1}}
  """
  return {
    key: copy_mapping(value)
    if isinstance(value, collections.abc.Mapping)
    else value
    for key, value in mapping.items()
  }


def unflatten_mapping(
  flat: Mapping[PathParts, V] | Iterable[tuple[PathParts, V]],
) -> dict[Any, Any]:
  """Makes nested dicts of paths and leaves.

  Example:

    >>> from nnx.statelib import unflatten_mapping
    >>> unflatten_mapping([(("a", 0), 1), (("a", 1), 2)])
    {'a': {0: 1, 1: 2}}

  Raises:
    ValueError: if a path leads through a leaf.
  """
  items: Iterable[tuple[Any, Any]] = (
    flat.items() if isinstance(flat, collections.abc.Mapping) else flat
  )
  result: dict[Any, Any] = {}
  path: Any
  for path, leaf in items:
    *parents, last = path
    node = result
    for key in parents:
      node = node.setdefault(key, {})
      if type(node) is not dict:
        raise _through_leaf_error(path)
    node[last] = leaf
  return result


def restore_int_paths(pure_dict: Mapping[Any, Any]) -> dict[Any, Any]:
  """Turns the keys of nested dicts that are texts of ints back into ints.

  Example:

    >>> import nnx
    >>> nnx.restore_int_paths({"layers": {"0": 1, "1": 2}})
    {'layers': {0: 1, 1: 2}}

  Args:
    pure_dict: nested dicts, such as a checkpoint returns them.

  Returns:
    New nested dicts.
  """
  return {
    restored.int_key(key): restore_int_paths(value)
    if isinstance(value, collections.abc.Mapping)
    else value
    for key, value in pure_dict.items()
  }


def split_pairs(
  pairs: Iterable[tuple[PathParts, Any]], filters: Sequence[Filter]
) -> list[list[tuple[PathParts, Any]]]:
  """Splits pairs by filters: a list each, and one of the pairs that are left.

  Example:

    >>> from nnx.nested_mappings import split_pairs
    >>> split_pairs([(("a",), 1), (("b",), 2.0)], (int,))
    [[(('a',), 1)], [(('b',), 2.0)]]
  """
  predicates = filterlib.filters_to_predicates(filters)
  parts: list[list[Any]] = [[] for _ in range(len(predicates) + 1)]
  for path, leaf in pairs:
    for i, predicate in enumerate(predicates):
      if predicate(path, leaf):
        parts[i].append((path, leaf))
        break
    else:
      parts[-1].append((path, leaf))
  return parts


def replace_in(
  mapping: dict[Any, Any],
  pure_dict: Mapping[Any, Any],
  replace_fn: Callable[[Any, Any], Any] | None,
  prefix: PathParts,
) -> None:
  """Sets the leaves of a nested dict; see `replace_by_pure_dict`.

  Example:

    >>> from nnx.nested_mappings import replace_in
    >>> mapping = {"a": {0: 1}}
    >>> replace_in(mapping, {"a": {"0": 2}}, None, ())
    >>> mapping
    {'a': {0: 2}}
  """
  for given, value in pure_dict.items():
    key = given if given in mapping else restored.int_key(given)
    path = (*prefix, key)
    if key not in mapping:
      raise ValueError(
        "Every path of `pure_dict` must be one of the `State`, but got"
        f" `{(*prefix, given)}`. The keys there are"
        f" {restored.keys_text(mapping)}."
      )
    if key is not given and key in pure_dict:
      raise ValueError(
        f"`pure_dict` must have one value for `{path}`, but it has the keys"
        f" {key!r} and {given!r}."
      )
    old = mapping[key]
    if type(old) is dict:
      if not isinstance(value, collections.abc.Mapping):
        raise ValueError(
          f"`pure_dict` must hold a mapping at `{path}`, as the `State` does,"
          f" but got a `{type(value).__name__}`."
        )
      replace_in(old, value, replace_fn, path)
    elif replace_fn is None:
      mapping[key] = _leaf_with_value(old, value, path)
    else:
      mapping[key] = replace_fn(old, value)


def _leaf_with_value(leaf: Any, value: Any, path: PathParts) -> Any:
  if not isinstance(leaf, _engine.VariableBase):
    return value
  if not isinstance(value, _engine.VariableBase):
    value = restored.restored_value(
      leaf.raw_value, value, preorder.path_text(path), check_shapes=False
    )
  return leaf.replace(value)


def nested_items(mapping: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
  """Lists the items of a nested mapping as a display shows them."""
  return [
    (
      key,
      reprlib.Parts("", nested_items(value), start="{", end="}", separator=": ")
      if isinstance(value, collections.abc.Mapping)
      else value,
    )
    for key, value in list(mapping.items())
  ]


def one_or_tuple(parts: list[Any]) -> Any:
  """Returns the only part, or several as a tuple."""
  return parts[0] if len(parts) == 1 else tuple(parts)


def _through_leaf_error(path: PathParts) -> ValueError:
  return ValueError(
    f"A path must lead to a leaf or through mappings, but `{path}` does both."
  )
