"""Sharding metadata: which axis of an array goes where, in names.

A Variable may carry one sharding annotation: a tuple of axis names (or `None`),
a `PartitionSpec`, or a `NamedSharding`. It is plain metadata until a mesh is
active; only then are arrays placed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
import contextlib
import threading
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

# The annotation's names, in the order in which they are looked for: that of
# Flax 0.12, then the two of Flax 0.10. It is stored under the name given, since
# `variable.sharding` is the annotation only where it was called so, and shown
# under the first one.
SHARDING_KEYS = ("out_sharding", "sharding", "sharding_names")

AxisRules = Iterable[tuple[str, Any]]


class _Rules(threading.local):
  rules: tuple[tuple[str, Any], ...] = ()


_rules = _Rules()


def get_logical_axis_rules() -> tuple[tuple[str, Any], ...]:
  """Returns the rules in force from logical to mesh axis names.

  Example:

    >>> import nnx
    >>> nnx.spmd.get_logical_axis_rules()
    ()
  """
  return _rules.rules


def set_logical_axis_rules(rules: AxisRules) -> None:
  """Sets the rules from logical axis names to mesh axis names.

  Example:

    >>> import nnx
    >>> nnx.spmd.set_logical_axis_rules([("embed", "model")])
    >>> nnx.spmd.get_logical_axis_rules()
    (('embed', 'model'),)
    >>> nnx.spmd.set_logical_axis_rules(())

  Args:
    rules: pairs of a logical name and a mesh axis, or `None` for no axis.
  """
  _rules.rules = tuple(rules)


@contextlib.contextmanager
def logical_axis_rules(rules: AxisRules) -> Iterator[None]:
  """Puts rules from logical axis names to mesh axis names in force for a block.

  Example:

    >>> import nnx
    >>> with nnx.logical_axis_rules([("embed", "model")]):
    ...   nnx.spmd.get_logical_axis_rules()
    (('embed', 'model'),)

  Args:
    rules: pairs of a logical name and a mesh axis, or `None` for no axis.
  """
  before = _rules.rules
  _rules.rules = tuple(rules)
  try:
    yield
  finally:
    _rules.rules = before


def composite_rules(first: AxisRules, second: AxisRules) -> dict[str, Any]:
  """Joins two sets of rules.

  Example:

    >>> from nnx import partitioning
    >>> partitioning.composite_rules([("a", "x")], [("b", None)])
    {'a': 'x', 'b': None}

  Args:
    first: pairs of a logical name and a mesh axis.
    second: the same.

  Returns:
    All of them as a dict.

  Raises:
    ValueError: if the two send one name to different axes.
  """
  rules = dict(first)
  for name, axis in second:
    if name in rules and rules[name] != axis:
      raise ValueError(
        f"Rules for one logical axis must agree, but `{name}` is sent to"
        f" `{rules[name]}` and to `{axis}`. Drop one of the two rules."
      )
    rules[name] = axis
  return rules


def sharding_key(metadata: Mapping[str, Any]) -> str | None:
  """Finds the name under which metadata hold a sharding annotation.

  Example:

    >>> from nnx import partitioning
    >>> partitioning.sharding_key({"sharding": ("a", None)})
    'sharding'
  """
  for key in SHARDING_KEYS:
    if key in metadata:
      return key
  return None


class Metadata(dict[str, Any]):
  """Metadata to look at: the annotation is found by each of its names.

  Example:

    >>> from nnx import partitioning
    >>> metadata = partitioning.Metadata({"sharding": ("a", None)})
    >>> metadata
    {'out_sharding': ('a', None)}
    >>> metadata["sharding_names"]
    ('a', None)

  Args:
    metadata: as a Variable stores them.
  """

  def __init__(self, metadata: Mapping[str, Any]):
    super().__init__(metadata)
    key = sharding_key(self)
    if key is not None:
      self[SHARDING_KEYS[0]] = self.pop(key)

  def __missing__(self, name: str) -> Any:
    stored = sharding_key(self)
    if stored is None or name not in SHARDING_KEYS:
      raise KeyError(name)
    return self[stored]


def partition_spec(
  annotation: Sequence[Any] | PartitionSpec, local_rules: AxisRules = ()
) -> PartitionSpec:
  """Turns axis names into mesh axes by the rules in force and local ones.

  Example:

    >>> import jax
    >>> from nnx.partitioning import partition_spec
    >>> spec = partition_spec(("embed", None), [("embed", "model")])
    >>> spec == jax.P("model", None)
    True

  Args:
    annotation: a name, a tuple of names, or `None` for each array axis.
    local_rules: rules in addition to those of `logical_axis_rules`.

  Returns:
    The `PartitionSpec`; names without a rule stay as they are.
  """
  rules = composite_rules(_rules.rules, local_rules or ())

  def translate(name):
    if isinstance(name, tuple):
      return tuple(map(translate, name))
    return rules.get(name, name)

  return PartitionSpec(*map(translate, annotation))


def active_mesh() -> jax.sharding.AbstractMesh | None:
  """Returns the mesh set by `jax.set_mesh`, or `None`.

  Example:

    >>> from nnx import partitioning
    >>> partitioning.active_mesh() is None
    True
  """
  mesh = jax.sharding.get_abstract_mesh()
  return None if mesh.empty else mesh


def place(value: Any, metadata: Mapping[str, Any]) -> Any:
  """Places a Variable's value as its sharding annotation says.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx import partitioning
    >>> partitioning.place(jnp.ones(2), {"out_sharding": ("data",)}).shape
    (2,)

  Args:
    value: `[...]`, an array; anything else is returned as it is.
    metadata: the Variable's metadata, of which the sharding annotation, `mesh`
      and `sharding_rules` are read.

  Returns:
    The array, placed if there is an annotation and a mesh (an active one, or
    that of the metadata or of a `NamedSharding`), otherwise as it was.

  Raises:
    ValueError: by jax, if the annotation does not fit the mesh or the shape.
  """
  key = sharding_key(metadata)
  annotation = metadata[key] if key is not None else None
  if not annotation or not isinstance(value, jax.Array):
    return value
  if isinstance(annotation, (tuple, list, PartitionSpec)):
    mesh = metadata.get("mesh") or active_mesh()
    if mesh is None:
      return value
    rules = metadata.get("sharding_rules") or ()
    sharding = NamedSharding(mesh, partition_spec(annotation, rules))
  else:
    sharding = annotation
    mesh = getattr(annotation, "mesh", None)
  if mesh is not None and mesh.are_all_axes_explicit:
    return jax.sharding.reshard(value, sharding)
  return jax.lax.with_sharding_constraint(value, sharding)
