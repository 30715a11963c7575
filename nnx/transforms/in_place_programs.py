"""Programs of `nnx.jit` that update Variables in place; see `nnx.in_place`.

Which leaves such a program may take over is decided when it is traced. The
rest, whether somebody else has an array, the engine decides at each call.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax

from nnx import in_place
from nnx.engine import _engine, jax_private

# Smaller ones are not worth looking at each time.
LEAST_ARRAY = 1 << 16
LEAST_TOTAL = 1 << 20

# Far above what jaxlib's CPU client takes for next to nothing, a thousand.
# The functions of libraries that a program calls count for none.
LEAST_FLOPS = 1e4

# What programs may call: it neither fails nor runs Python code. Jax's own and
# those of `nnx.kernels`.
_KNOWN_CALLS = ("Sharding", "annotate_", "mhlo.", "lapack_", "fused_nnx_")


def variables(structure: _engine.StructureBase) -> list[_engine.NodeRecord]:
  """Lists the records of the Variables that are one leaf each."""
  return [
    record
    for record in structure._records
    if record.kind is _engine.NodeKind.VARIABLE and record.leaf >= 0
  ]


def _candidates(structure: Any, leaves: tuple) -> list[int]:
  """Returns the large arrays of Variables, if all leaves are in one place."""
  found = []
  for record in variables(structure):
    leaf: Any = leaves[record.leaf]
    if (
      getattr(leaf, "nbytes", 0) >= LEAST_ARRAY
      and type(leaf) is jax_private.array_type()
      and not record.hook_flags & _engine.HookFlags.BOXED
    ):
      found.append(record.leaf)
  if not found or sum(leaves[i].nbytes for i in found) < LEAST_TOTAL:
    return []
  return found if in_place.are_together(leaves) else []


def _replaced(structure: Any, plan: Any, jaxpr: Any) -> set[int]:
  """Returns the leaves of Variables that get a new array of the same kind."""
  variables_of = jaxpr.jaxpr.invars
  if (
    plan.writes is None
    or jaxpr.effects
    or len(variables_of) != structure.num_leaves
  ):
    return set()
  outputs = jaxpr.jaxpr.outvars
  uses = collections.Counter(map(id, outputs))
  inputs = set(map(id, (*variables_of, *jaxpr.jaxpr.constvars)))
  leaf_of = {record.index: record.leaf for record in variables(structure)}
  result = set()
  for write in plan.writes:
    leaf = leaf_of[write.index]
    old, new = variables_of[leaf], outputs[write.output]
    if (
      uses[id(new)] == 1
      and id(new) not in inputs
      and id(old) not in uses
      and old.aval.shape == new.aval.shape
      and old.aval.dtype == new.aval.dtype
      and old.aval.weak_type == new.aval.weak_type
    ):
      result.add(leaf)
  return result


def _is_safe(lowered: Any) -> bool:
  """Tells whether a call of a program cannot fail once it has begun.

  It must run on one device, and no code but what is known. On the CPU, programs
  that compute next to nothing run before the call returns, which then raises if
  there is no memory left; by then the arrays are gone. Any others run later,
  and what they return tells of the failure, in place or not.
  """
  module = lowered.compiler_ir("stablehlo").operation
  harmless = True

  def visit(operation: Any) -> Any:
    nonlocal harmless
    if operation.name == "stablehlo.custom_call":
      target = operation.attributes["call_target_name"].value
      harmless &= target.startswith(_KNOWN_CALLS)
    elif operation.name in ("stablehlo.infeed", "stablehlo.outfeed"):
      harmless = False
    return jax_private.CONTINUE_WALK

  module.walk(visit)
  partitions = module.attributes["mhlo.num_partitions"].value
  replicas = module.attributes["mhlo.num_replicas"].value
  if not harmless or partitions * replicas != 1:
    return False
  return lowered.cost_analysis().get("flops", 0) >= LEAST_FLOPS


@functools.cache
def _works(platform: str) -> bool:
  """Tells whether jax opens a Loan as the engine needs it; see `loan.h`."""
  call = jax.jit(lambda loan: tuple(x + 1 for x in loan), donate_argnums=0)
  array = jax.device_put(jax.numpy.zeros(3), jax.devices(platform)[0])
  states = []
  for _ in range(3):
    given = in_place.copied(array)
    call(_engine.loan((given,), True))
    states.append(given.is_deleted())
  # Not where it compiles; later.
  return states == [False, True, True]


class Program(NamedTuple):
  """A program that updates in place.

  Attributes:
    function: takes the leaves that stay, and a Loan of the others.
    donated: the numbers of these.
  """

  function: Callable[..., Any]
  donated: list[int]


def make(
  flat: Any, compiled: Any, leaves: tuple, options: Mapping[str, Any]
) -> Program | None:
  """Makes the program that updates in place, where there is one to make.

  Args:
    flat: the flat function.
    compiled: the plain program.
    leaves: those of the first call.
    options: those of `jax.jit`.

  Returns:
    The program, or None.
  """
  structure = flat.structure
  candidates = _candidates(structure, leaves)
  if not candidates or not in_place.may_lend():
    return None
  if not jax_private.dispatches_asynchronously():
    return None
  traced = compiled.trace(leaves)
  jaxpr, plan = traced.jaxpr, traced.out_info.plan
  replaced = _replaced(structure, plan, jaxpr)
  given = [i for i in candidates if i in replaced]
  size = sum(leaves[i].nbytes for i in given)
  if not given or size < LEAST_TOTAL or flat.places:
    return None
  (device,) = leaves[given[0]].sharding.device_set
  if not _works(device.platform):
    return None
  count = structure.num_leaves  # and not the leaves, which it would hold
  kept = sorted(set(range(count)).difference(given))

  def update(kept_leaves, given_leaves):
    values: list[Any] = [None] * count
    for i, value in zip((*kept, *given), (*kept_leaves, *given_leaves)):
      values[i] = value
    # Jax keeps the first. Arrays of other shapes may make another program.
    traced = compiled.trace(tuple(values))
    jaxpr, plan = traced.jaxpr, traced.out_info.plan
    replaced = _replaced(structure, plan, jaxpr)
    if not replaced.issuperset(given) or not _is_safe(traced.lower()):
      raise _engine.NotInPlace()
    return _engine.packed_unflatten(plan, jax_private.run_jaxpr(jaxpr, values))

  update.__name__ = update.__qualname__ = flat.__name__
  info = flat.debug_info("jit", [*kept, *given])
  setattr(update, jax_private.DEBUG_INFO, info)
  return Program(jax.jit(update, donate_argnums=1, **options), given)
