"""Reads off a plan what a function of leaves has done and returns.

`_engine.Plan` describes a `Packed` without its arrays: which outputs are new
values of which leaves of the arguments, and how the result is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nnx.engine import _engine, preorder


def leaf_values(
  plan: _engine.Plan, outputs: Sequence[Any], inputs: Sequence[Any]
) -> tuple[Any, ...]:
  """Finds the value of each leaf of the plan's structure.

  Args:
    plan: what the function did.
    outputs: one value an output.
    inputs: one value an input leaf.
  """
  matches = plan.matches
  return tuple(
    outputs[output] if output >= 0 else inputs[matches[leaf]]
    for leaf, output in enumerate(plan.output_of)
  )


def written(plan: _engine.Plan) -> dict[int, int]:
  """Maps each input leaf that the function has replaced to its output."""
  return {
    match: output
    for match, output in zip(plan.matches, plan.output_of)
    if match >= 0 and output >= 0
  }


def result_of(plan: Any, outputs: Sequence[Any], inputs: Sequence[Any]) -> Any:
  """Builds a result without doing anything to the arguments.

  Args:
    plan: what the function did.
    outputs: one value an output.
    inputs: one value an input leaf.

  Returns:
    The result of the function; nodes of the arguments in it are copies.
  """
  leaves = leaf_values(plan, outputs, inputs)
  return _engine.unflatten(plan.structure, leaves).values[-1]


def result_leaves(plan: Any) -> range:
  """Returns the leaves of the plan's structure that are the result's."""
  return range(len(plan.matches), len(plan.output_of))


def result_position(plan: Any) -> int:
  """Returns where the result is in the records of the plan's structure."""
  return preorder.roots(plan.structure)[-1][0]
