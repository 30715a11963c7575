"""Nested mappings as flat ones, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

# What stands for an empty mapping in a flat one. Compared by identity.
empty_node: Any = type("empty_node", (), {"__repr__": lambda _: "{}"})()


def flatten_to_sequence(
  xs: Mapping[Any, Any],
  /,
  *,
  is_leaf: Callable[[tuple[Any, ...], Any], bool] | None = None,
) -> list[tuple[tuple[Any, ...], Any]]:
  """Lists the leaves of a nested mapping with their paths.

  Example:

    >>> import nnx
    >>> nnx.traversals.flatten_to_sequence({"a": 1, "b": {"c": 2, "d": {}}})
    [(('a',), 1), (('b', 'c'), 2)]

  Args:
    xs: the mapping; anything in it that is not a mapping is a leaf.
    is_leaf: `is_leaf(path, mapping)` says of a mapping that it is a leaf too.

  Returns:
    Pairs of a path and a leaf, in the order of the mappings.

  Raises:
    TypeError: if `xs` is not a mapping.
  """
  return [
    (path, leaf)
    for path, leaf in _leaves(xs, is_leaf)
    if leaf is not empty_node
  ]


def flatten_mapping(
  xs: Mapping[Any, Any],
  /,
  *,
  keep_empty_nodes: bool = False,
  is_leaf: Callable[[tuple[Any, ...], Any], bool] | None = None,
  sep: str | None = None,
) -> dict[Any, Any]:
  """Makes a nested mapping flat: its keys are paths.

  Example:

    >>> import nnx
    >>> nnx.traversals.flatten_mapping({"a": 1, "b": {"c": 2}}, sep="/")
    {'a': 1, 'b/c': 2}

  Args:
    xs: the mapping; anything in it that is not a mapping is a leaf.
    keep_empty_nodes: whether empty mappings stay, as `empty_node`.
    is_leaf: `is_leaf(path, mapping)` says of a mapping that it is a leaf too.
    sep: joins the keys, which are strings then; None for tuples of keys.

  Returns:
    A dict from paths to leaves. `unflatten_mapping` undoes it.

  Raises:
    TypeError: if `xs` is not a mapping.
  """
  return {
    path if sep is None else sep.join(path): leaf
    for path, leaf in _leaves(xs, is_leaf)
    if keep_empty_nodes or leaf is not empty_node
  }


def unflatten_mapping(
  xs: Mapping[Any, Any], /, *, sep: str | None = None
) -> dict[Any, Any]:
  """Makes a nested dict of a flat mapping; the inverse of `flatten_mapping`.

  Example:

    >>> import nnx
    >>> nnx.traversals.unflatten_mapping({("a",): 1, ("b", "c"): 2})
    {'a': 1, 'b': {'c': 2}}

  Args:
    xs: a mapping from paths to leaves.
    sep: what joins the keys of a path; None for tuples of keys.

  Raises:
    TypeError: if `xs` is not a mapping.
  """
  _check_mapping(xs)
  nested: dict[Any, Any] = {}
  for path, leaf in xs.items():
    *parents, last = path if sep is None else path.split(sep)
    inner = nested
    for key in parents:
      inner = inner.setdefault(key, {})
    inner[last] = {} if leaf is empty_node else leaf
  return nested


def _leaves(xs, is_leaf, path=()):
  if not path:
    _check_mapping(xs)
  if not isinstance(xs, Mapping) or (is_leaf is not None and is_leaf(path, xs)):
    yield path, xs
  elif xs:
    for key, value in xs.items():
      yield from _leaves(value, is_leaf, (*path, key))
  elif path:
    yield path, empty_node


def _check_mapping(xs: Any) -> None:
  if not isinstance(xs, Mapping):
    raise TypeError(
      f"`xs` must be a mapping, but got {xs!r} of type {type(xs).__name__}."
    )
