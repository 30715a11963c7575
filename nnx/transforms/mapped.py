"""Outputs in groups: what vmap, pmap and shard_map have in common.

These transforms of jax want to know how each output is mapped before the
function has run. What it writes is not known then, but the axes or shardings
that can occur are: those of the options. So the flat function returns one tuple
of outputs for each of them, and which output is where travels beside the
arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from nnx import spmd
from nnx.engine import _engine
from nnx.transforms import lift, outcomes, prefix


def entries_in(
  options: Iterable[Any], is_entry: Callable[[Any], bool]
) -> tuple[Any, ...]:
  """Returns all entries that occur in some options, each once."""
  found: dict[Any, None] = {}
  leaves = jax.tree.leaves(
    list(options),
    is_leaf=lambda x: is_entry(x) or isinstance(x, prefix.FilterMap),
  )
  for leaf in leaves:
    inner = leaf.entries if isinstance(leaf, prefix.FilterMap) else (leaf,)
    found.update(dict.fromkeys(inner))
  return tuple(found)


class Mapped:
  """A lifted function whose outputs are grouped by their entries.

  Args:
    lifted: the function.
    walk: over its arguments, with the entry of each leaf.
    out_root: what the option for results says of the result.
    entries: all entries that can occur.
    metadata: the `transform_metadata` of the transform; where it names an axis,
      that is taken out of the Variables' annotations for the function, and
      entered again afterwards.
    written: leaves that count as written in any case.
  """

  def __init__(
    self,
    lifted: lift.Lifted,
    walk: prefix.Walk,
    out_root: prefix.Root,
    entries: tuple[Any, ...],
    metadata: Mapping[str, Any] | None = None,
    written: frozenset[int] = frozenset(),
  ):
    self.lifted = lifted
    self.walk = walk
    self.out_root = out_root
    self.groups = entries
    self.metadata = metadata
    self.written = written

  def __call__(self, leaves: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns the plan with each output's entry, then a tuple a group."""
    values, objects = self.lifted.open(leaves)
    if self.metadata and spmd.PARTITION_NAME in self.metadata:
      remove_axes(self.walk, objects, self.metadata)
      result = self.lifted.call(values)
      policy, metadata = self.lifted.policy, self.metadata
      add_axes(policy, self.walk, objects, result, self.out_root, metadata)
    else:
      result = self.lifted.call(values)
    if self.lifted.policy.mode.updates:
      # What comes from outside has no axis that could be mapped.
      self.lifted.check_new(objects, result)
    packed = self.lifted.pack(objects, leaves, result, written=self.written)
    plan, outputs = packed.plan, packed.outputs
    entry_of = output_entries(plan, outputs, self.walk, self.out_root)
    groups: dict[Any, list[Any]] = {entry: [] for entry in self.groups}
    for output, entry in zip(outputs, entry_of):
      groups[entry].append(output)
    return lift.Static((plan, entry_of)), *map(tuple, groups.values())

  def packed(self, grouped: Sequence[Any]) -> Any:
    """Returns the outputs of the transformed function, in order again."""
    (plan, entry_of), groups = grouped[0].value, grouped[1:]
    streams = dict(zip(self.groups, map(iter, groups)))
    outputs = tuple(next(streams[entry]) for entry in entry_of)
    return _engine.packed_unflatten(plan, outputs)


def output_entries(
  plan: Any, outputs: Sequence[Any], walk: prefix.Walk, out_root: prefix.Root
) -> list[Any]:
  """Returns the entry of each output.

  State has that of the input in whose place it stands; state made inside has
  what the option for the arguments says of its place; the result has what the
  option for results says.
  """
  structure = plan.structure
  records = structure._records
  start = outcomes.result_position(plan)
  full = -1 in plan.matches or any(
    record.kind is _engine.NodeKind.REF for record in records[start:]
  )
  leaves = outcomes.leaf_values(plan, outputs, walk.leaves)
  objects = _engine.unflatten(structure, leaves).objects
  after = prefix.Walk(structure, leaves, objects, walk.is_entry)
  if full:
    for root in walk.tops:
      after.visit_root(root)
  else:
    after.skip(len(walk.tops))
  after.visit_root(out_root)
  entries: list[Any] = [None] * len(outputs)
  for output, entry in zip(plan.output_of, after.entries):
    if output >= 0:
      entries[output] = entry
  for leaf, output in outcomes.written(plan).items():
    entries[output] = walk.entries[leaf]
  return entries


def output_paths(plan: Any, walk: prefix.Walk, out_root: prefix.Root):
  """Returns the path of each output, for errors."""
  leaves = [None] * plan.structure.num_leaves
  objects = _engine.unflatten(plan.structure, tuple(leaves)).objects
  after = prefix.Walk(plan.structure, leaves, objects, lambda entry: True)
  for root in (*walk.tops, out_root):
    after.visit_root(root._replace(entry=None))
  paths = [""] * (1 + max(plan.output_of, default=-1))
  for output, place in zip(plan.output_of, after.places):
    if output >= 0 and place is not None:
      paths[output] = place.text
  return paths


def remove_axes(
  walk: prefix.Walk, objects: Sequence[Any], metadata: Mapping[str, Any]
) -> None:
  """Takes the axes of a transform out of the annotations of Variables."""
  for variable, axis in _axes_of_variables(walk, objects):
    spmd.remove_axis(variable, axis, metadata)


def add_axes(
  policy: lift.Policy,
  walk: prefix.Walk,
  objects: Sequence[Any],
  result: Any,
  out_root: prefix.Root,
  metadata: Mapping[str, Any],
) -> None:
  """Enters the axes of a transform into the annotations of Variables.

  Also of those that the function made.
  """
  if not policy.mode.updates:
    result = _engine.clone(result, False)  # its objects will be others
  tops = tuple(objects[index] for index in walk.top_indices)
  structure, leaves, nodes = _engine.flatten((*tops, result))
  after = prefix.Walk(structure, leaves, nodes, walk.is_entry)
  for root in (*walk.tops, out_root):
    after.visit_root(root)
  for variable, axis in _axes_of_variables(after, nodes):
    spmd.add_axis(variable, axis, metadata)


def _axes_of_variables(walk: prefix.Walk, objects: Sequence[Any]):
  axes = {
    place.variable: entry
    for place, entry in zip(walk.places, walk.entries)
    if place is not None and place.variable >= 0 and isinstance(entry, int)
  }
  return [(objects[index], axis) for index, axis in axes.items()]
