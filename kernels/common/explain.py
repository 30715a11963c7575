"""What the ops of a program run on, and why."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax

from . import dispatch, jax_private


def explain(
  fn: Callable[..., Any],
  *args: Any,
  platform: str | None = None,
  **kwargs: Any,
) -> list[dispatch.Choice]:
  """Tells which implementation each op in a program gets, and why.

  Nothing is compiled or run. Arrays among the arguments may be
  `jax.ShapeDtypeStruct`s; everything else is passed to `fn` as it is.

  What the compiler cannot split over devices is chosen on one device, inside a
  `shard_map` over a whole mesh and on meshes with explicit axes. Shardings of
  the arguments, `jax.set_mesh` and meshes that `fn` names say which of these it
  is. If a `jax.ShapeDtypeStruct` has no sharding and that would make a
  difference, the reason says so.

  Args:
    fn: Any function that JAX can trace: an op of this package, or a whole
      training step.
    *args: Its arguments.
    platform: "cpu", "cuda", "rocm" or "tpu". The default backend's, if None.
    **kwargs: Its keyword arguments.

  Returns:
    One `Choice` for each use of an op, in order of appearance.

  Example:
    >>> import jax, kernels
    >>> x = jax.ShapeDtypeStruct((128, 256), "float32")
    >>> stat = jax.ShapeDtypeStruct((256,), "float32")
    >>> [choice] = kernels.explain(
    ...   kernels.batch_stat.update, x, stat, stat, implementation="xla"
    ... )
    >>> choice.implementation, choice.reason
    ('xla', 'It was asked for.')
    >>> choice.shapes
    ('f32[256]', 'f32[256]', 'f32[1]', 'f32[128,256]')
  """
  platform = platform or jax.default_backend()
  if platform == "gpu":
    platform = "cuda"
  leaves, treedef = jax.tree.flatten((args, kwargs))
  traced = [
    i
    for i, leaf in enumerate(leaves)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
  ]

  def call(arrays):
    full = list(leaves)
    for i, array in zip(traced, arrays):
      full[i] = array
    fn_args, fn_kwargs = jax.tree.unflatten(treedef, full)
    return fn(*fn_args, **fn_kwargs)

  arrays = [leaves[i] for i in traced]
  closed = jax.make_jaxpr(call)(arrays)
  devices = max(
    jax.sharding.get_abstract_mesh().size,
    *map(_devices, (*arrays, *closed.consts)),
    _devices_of(closed.jaxpr),
  )
  # Of a shape without a sharding, nobody knows where it will lie.
  known = devices > 1 or all(
    getattr(array, "sharding", True) is not None for array in arrays
  )
  explainer = _Explainer(platform, known)
  explainer.visit(closed.jaxpr, devices)
  return explainer.choices


class _Explainer:
  """Walks through a program as the compiler's lowering does.

  Attributes:
    choices: Of what has been walked through.
  """

  def __init__(self, platform: str, known: bool):
    self._platform = platform
    self._known = known
    self.choices: list[dispatch.Choice] = []

  def visit(
    self,
    jaxpr: Any,
    devices: int,
    manual: frozenset[str] = frozenset(),
    scope: tuple[str, ...] = (),
  ) -> None:
    """Notes down the ops.

    Args:
      jaxpr: To walk through.
      devices: Over how many the compiler splits it.
      manual: Mesh axes of the `shard_map`s around it.
      scope: Named scopes around it.
    """
    for eqn in jaxpr.eqns:
      op = dispatch.op_of(eqn.primitive)
      around = (*scope, *jax_private.named_scopes(eqn))
      if op is not None:
        choice = self._choose(op, eqn, devices, bool(manual))
        shapes = tuple(
          var.aval.str_short(short_dtypes=True) for var in eqn.invars
        )
        self.choices.append(
          dataclasses.replace(choice, shapes=shapes, scope="/".join(around))
        )
      inner_devices, inner = devices, manual
      if eqn.primitive.name == "shard_map":
        inner = manual | jax_private.newly_manual_axes(eqn)
        inner_devices = jax_private.free_devices(eqn.params["mesh"], inner)
      for inner_jaxpr in _inner_jaxprs(eqn.params.values()):
        self.visit(inner_jaxpr, inner_devices, inner, around)

  def _choose(self, op, eqn, devices, placed):
    avals = [var.aval for var in eqn.invars]
    placement = dispatch.Placement(
      self._platform, devices, jax_private.explicit_mesh(avals)
    )
    choice = op.choose(placement, avals, **eqn.params)
    if self._known or placed:
      return choice
    # Any number of devices would do.
    several = dispatch.Placement(self._platform, devices=2)
    try:
      other = op.choose(several, avals, **eqn.params)
      if other.implementation == choice.implementation:
        return choice
      depends = f"{other.implementation} runs: {other.reason}"
    except ValueError as error:
      depends = f"this is an error: {error}"
    return dataclasses.replace(
      choice,
      reason=f"{choice.reason} It depends on the arguments' shardings: where"
      f" the compiler splits the program over several devices, {depends}",
    )


def _devices(value: Any) -> int:
  """Returns over how many devices something is spread, as far as it says."""
  sharding = getattr(value, "sharding", value)
  if isinstance(sharding, jax.sharding.Sharding):
    return sharding.num_devices
  if isinstance(value, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
    return value.size
  if isinstance(value, (tuple, list)):
    return max(map(_devices, value), default=1)
  return 1


def _devices_of(jaxpr: Any) -> int:
  """Returns the same of the shardings and meshes that a program names."""
  count = 1
  for eqn in jaxpr.eqns:
    values = eqn.params.values()
    count = max(count, *map(_devices, values), 1)
    count = max(count, *map(_devices_of, _inner_jaxprs(values)), 1)
  return count


def _inner_jaxprs(values):
  from jax.extend import core as extend_core  # here, as it imports Pallas

  for value in values:
    if isinstance(value, extend_core.ClosedJaxpr):
      yield value.jaxpr
    elif isinstance(value, extend_core.Jaxpr):
      yield value
    elif isinstance(value, (tuple, list)):
      yield from _inner_jaxprs(value)
