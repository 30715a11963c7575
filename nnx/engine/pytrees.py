"""Registers Variables, States, objects and graphdefs as pytrees of jax.

The flatten and unflatten functions that jax calls most are those of the engine;
only the ones that also give key paths are Python.
"""

from __future__ import annotations

from typing import Any

import jax

from nnx.engine import _engine, serialization

_VALUE = jax.tree_util.GetAttrKey("value")


def _variable_with_keys(variable: Any):
  (value,), metadata = _engine.variable_flatten(variable)
  return ((_VALUE, value),), metadata


def _object_with_keys(node: Any):
  children, aux = _engine.object_flatten(node)
  return tuple(zip(map(_attribute_key, aux[0]), children)), aux


def _attribute_key(name: str | int) -> Any:
  if isinstance(name, int):  # an element of a container
    return jax.tree_util.SequenceKey(name)
  return jax.tree_util.GetAttrKey(name)


def _state_with_keys(state: Any):
  values, keys = _engine.state_flatten(state)
  return tuple(zip(map(jax.tree_util.DictKey, keys), values)), keys


def register_variable_type(cls: type) -> None:
  """Makes a Variable type a pytree node with its value as the only child."""
  jax.tree_util.register_pytree_with_keys(
    cls,
    _variable_with_keys,
    _engine.make_variable_unflatten(cls),
    _engine.variable_flatten,
  )
  serialization.register(cls)


def register_object_type(cls: type) -> None:
  """Makes a Pytree type a pytree node whose children are its data."""
  jax.tree_util.register_pytree_with_keys(
    cls,
    _object_with_keys,
    _engine.make_object_unflatten(cls),
    _engine.object_flatten,
  )
  serialization.register(cls)


def register_state_type(cls: type) -> None:
  """Makes a State type a pytree node whose children are its entries."""
  jax.tree_util.register_pytree_with_keys(
    cls,
    _state_with_keys,
    _engine.make_state_unflatten(cls),
    _engine.state_flatten,
  )
  serialization.register(cls)


def register_static_type(cls: type) -> None:
  """Makes a hashable type a pytree node without children."""
  jax.tree_util.register_static(cls)
  serialization.register(cls)


def flatten_pytree(value: Any) -> _engine.OpenedPytree | None:
  """Opens a registered pytree node by one level, for the engine.

  Returns:
    The node, or None for a leaf.
  """
  if jax.tree_util.default_registry.flatten_one_level(value) is None:
    return None
  pairs, treedef = jax.tree_util.tree_flatten_with_path(
    value, is_leaf=lambda x: x is not value
  )
  keys = tuple(plain_key(path[0]) for path, _ in pairs)
  children = tuple(child for _, child in pairs)
  return _engine.OpenedPytree((children, treedef, keys))


def plain_key(key: Any) -> Any:
  """Turns a key of one of jax's paths into one of ours.

  Example:

    >>> import jax
    >>> from nnx.engine import pytrees
    >>> pytrees.plain_key(jax.tree_util.GetAttrKey("kernel"))
    'kernel'
  """
  for attribute in ("key", "name", "idx"):
    if hasattr(key, attribute):
      return getattr(key, attribute)
  return str(key)
