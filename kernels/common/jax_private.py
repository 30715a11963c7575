"""The one place that touches what JAX does not promise to keep.

Tried with jax 0.10.2 and 0.12.0.1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src import config as _config
from jax._src import core as _core
from jax._src import dispatch as _dispatch
from jax.interpreters import mlir


def require_devices(primitive) -> None:
  """Makes JAX tell the lowering rule of `primitive` which devices are used.

  JAX leaves the devices out while lowering, unless it finds a primitive in the
  program that is known to need them, such as `custom_partitioning`. A primitive
  whose lowering rule calls `custom_partitioning` has to be known as well.

  Args:
    primitive: A `jax.extend.core.Primitive`.
  """
  _dispatch.prim_requires_devices_during_lowering.add(primitive)


def split_by_compiler(ctx: Any) -> bool:
  """Returns whether the compiler splits the program over several devices.

  Not so for one device, or inside `shard_map`.

  Args:
    ctx: Of a lowering rule.
  """
  axes = ctx.module_context.axis_context
  manual = getattr(axes, "manual_axes", None)
  if manual is not None:
    return set(manual) != set(axes.mesh.axis_names)
  return getattr(axes, "num_devices", 1) not in (None, 1)


def explicit_mesh(avals: Sequence[Any]) -> Any:
  """Returns the mesh of values whose shardings are part of their types.

  Args:
    avals: Abstract values.

  Returns:
    An abstract mesh all axes of which are explicit, or None.
  """
  for aval in avals:
    mesh = aval.sharding.mesh
    if not mesh.empty and mesh.are_all_axes_explicit:
      return mesh
  return None


def lower_plainly(
  fn: Callable[..., Any], ctx: Any, *args: Any
) -> Sequence[Any]:
  """Lowers a function of plain arrays, also inside `shard_map`.

  There, values have mesh axes that they vary over, of which Pallas would have
  to be told. They mean nothing to what is lowered.

  Args:
    fn: Returns a sequence of arrays.
    ctx: Of the lowering rule.
    *args: Of the lowering rule.
  """
  plain = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
  rule = mlir.lower_fun(without_mesh(fn), multiple_results=True)
  with _config._check_vma(False):
    return rule(ctx.replace(avals_in=plain), *args)


def varying_axes(aval: Any) -> frozenset[str]:
  """Returns the mesh axes that a value varies over inside `shard_map`.

  Args:
    aval: Its abstract value.
  """
  manual = getattr(aval, "manual_axis_type", None)
  return frozenset(getattr(manual, "varying", ()))


def result_aval(
  shape: tuple[Any, ...], dtype: Any, inputs: Sequence[Any]
) -> Any:
  """Returns the abstract value of a result; see `dispatch.out_aval`.

  Args:
    shape: Of the result.
    dtype: Of the result.
    inputs: Abstract values that it depends on.
  """
  varying = frozenset().union(*map(varying_axes, inputs))
  like = next((aval for aval in inputs if varying_axes(aval)), inputs[0])
  mesh = like.sharding.mesh
  if mesh.empty:
    return jax.core.ShapedArray(shape, dtype)
  spec = jax.sharding.PartitionSpec(*(None for _ in shape))
  if inputs[0].shape == shape and not inputs[0].sharding.mesh.empty:
    spec = inputs[0].sharding.spec
  return jax.core.ShapedArray(
    shape,
    dtype,
    sharding=jax.sharding.NamedSharding(mesh, spec),
    manual_axis_type=like.manual_axis_type.update(varying=varying),
  )


def without_mesh(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a function forget the mesh that `jax.set_mesh` has set.

  Under a mesh with explicit axes, jax 0.12 annotates every value that is
  traced with its sharding. A device's part of a partitioned program has none,
  and cannot be compiled with such annotations.

  Args:
    fn: Any function.
  """

  def wrapped(*args: Any) -> Any:
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
      return fn(*args)

  return wrapped


# `jax.extend.core` has this class too, but its package imports Pallas, which
# takes a tenth of the time that importing jax takes.
Primitive = _core.Primitive
