"""The carry of a loop: its structure, types and references must not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from nnx.engine import _engine, preorder
from nnx.transforms import lift, outcomes, prefix
from nnx.variablelib import is_ref


class Carry:
  """Marks, in the axes of `nnx.scan`, what is carried between iterations.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    ... def add(total, x):
    ...   return total + x
    >>> add(0.0, jnp.arange(4.0))
    Array(6., dtype=float32)
  """


class Opened:
  """A value opened: its structure, leaves and objects."""

  def __init__(self, value: Any):
    self.structure, self.leaves, self.objects = _engine.flatten((value,))
    self.records = self.structure._records

  def plain_leaves(self) -> list[int]:
    """Returns the leaves that are in no graph node."""
    result, position = [], 0
    while position < len(self.records):
      record = self.records[position]
      if preorder.is_graph_node(record):
        position = preorder.subtree_end(self.records, position)
        continue
      if record.leaf >= 0:
        result.append(record.leaf)
      position += 1
    return result


Difference = tuple[str, str, str]


def difference(before: Any, after: Any, names: Sequence[str]) -> Difference:
  """Says where two structures first differ.

  Args:
    before: a structure.
    after: another one.
    names: how to call the roots.

  Returns:
    The path, and what is there in each. The path is "" if they are equal.
  """
  # As far as they are equal, both have the same positions.
  a, b = before._records, after._records
  for position, path in preorder.walk_roots(before, names):
    one, two = a[position], b[position]
    if _described(one) != _described(two):
      return prefix.text("", path), _describe(one), _describe(two)
  return "", "", ""


def _described(record: _engine.NodeRecord) -> tuple[Any, ...]:
  return (
    record.kind,
    record.index,
    record.leaf >= 0,
    record.children,
    record.type,
    record.keys,
    type(record.aux),
    record.aux,
  )


def _describe(record: _engine.NodeRecord) -> str:
  if record.kind is _engine.NodeKind.STATIC:
    return f"`{record.aux!r}`"
  if record.kind is _engine.NodeKind.LEAF:
    return "an array"
  if record.type is None:
    return "a node that is also elsewhere"
  name = f"a {record.type.__name__}"
  if record.kind is _engine.NodeKind.VARIABLE:
    return f"{name} with metadata {record.aux or {}}"
  if record.keys is not None:
    return f"{name} with {list(record.keys)}"
  return (
    f"{name} of {record.children}" if record.type in (list, tuple) else name
  )


def returned_leaves(
  call: lift.Call, walk: prefix.Walk, leaves: Sequence[int]
) -> list[int]:
  """Lists the leaves of a carry whose next values are those returned.

  The others belong to objects that are the same in all iterations, or are
  mutable arrays. Without updates only Variables are the same; other objects are
  returned anew.

  Args:
    call: the call.
    walk: over its arguments.
    leaves: those of the carry.
  """
  updates = call.lifted.policy.mode.updates
  places = ((leaf, walk.places[leaf]) for leaf in leaves)
  return [
    leaf
    for leaf, place in places
    if place is not None
    and (place.top if updates else place.variable) < 0
    and not is_ref(call.leaves[leaf])
  ]


def check_same(
  policy: lift.Policy, before: Opened, after: Opened, where: str
) -> None:
  """Refuses a carry that comes out of an iteration changed.

  Raises:
    ValueError: if its structure is another, or if it holds other objects.
  """
  if before.structure != after.structure:
    path, old, new = difference(before.structure, after.structure, [where])
    raise ValueError(
      f"The carry of `nnx.{policy.transform}` must have one structure in all"
      f" iterations, but `{path}` was {old} and became {new}. Make what the"
      " loop needs before it."
    )
  for index, (old, new) in enumerate(zip(before.objects, after.objects)):
    if not policy.mode.updates and not isinstance(old, _engine.VariableBase):
      continue
    if old is not new:
      at = node_path(after.records, index)
      raise ValueError(
        f"The carry of `nnx.{policy.transform}` must hold the same objects in"
        f" all iterations, but at `{prefix.text(where, at)}` there is another"
        f" {type(new).__name__}. Change the object that came in, and return it."
      )


def node_path(records: preorder.Records, index: int) -> preorder.Path:
  """Returns the path to a node of the only root."""
  for position, path in preorder.walk(records):
    record = records[position]
    if record.index == index and preorder.is_graph_node(record):
      return path
  raise AssertionError(index)


def check_type(old: Any, new: Any, transform: str, path: str) -> None:
  """Refuses a leaf of a carry that changes its shape or dtype.

  Raises:
    TypeError: if it does.
  """
  if not lift.is_array(new):
    raise TypeError(
      f"The carry of `nnx.{transform}` must hold arrays where it did, but"
      f" `{path}` became `{new!r}`."
    )
  old_type, new_type = jax.typeof(old), jax.typeof(new)
  if same_type(old_type, new_type):
    return
  raise TypeError(
    f"The carry of `nnx.{transform}` must keep shapes and dtypes, but"
    f" `{path}` was {old_type.str_short()} and became {new_type.str_short()}."
  )


def same_type(one: Any, two: Any) -> bool:
  """Tells whether two types of arrays are one, but for weak dtypes."""
  return one.shape == two.shape and (
    one.dtype == two.dtype or one.weak_type or two.weak_type
  )


def next_values(
  carried: Sequence[int],
  leaves: Sequence[Any],
  plan: Any,
  outputs: Sequence[Any],
  plain: Sequence[int],
  first: int,
) -> list[Any]:
  """Returns the values of the carried leaves after an iteration.

  Args:
    carried: the leaves that are carried.
    leaves: all leaves as they were before.
    plan: what the function did.
    outputs: the values of its outputs.
    plain: the leaves of the carry whose next values are those returned.
    first: the leaf of the plan that is the first of these in the result.
  """
  new = {
    leaf: outputs[output] for leaf, output in outcomes.written(plan).items()
  }
  for leaf, output in zip(plain, plan.output_of[first:]):
    new[leaf] = outputs[output]
  return [new.get(leaf, leaves[leaf]) for leaf in carried]
