"""The one place that touches what JAX does not promise to keep.

Tried with jax 0.10.2 and 0.12.0.1.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax._src import dispatch as _dispatch


def require_devices(primitive) -> None:
  """Makes JAX tell the lowering rule of `primitive` which devices are used.

  JAX leaves the devices out while lowering, unless it finds a primitive in the
  program that is known to need them, such as `custom_partitioning`. A primitive
  whose lowering rule calls `custom_partitioning` has to be known as well.

  Args:
    primitive: A `jax.extend.core.Primitive`.
  """
  _dispatch.prim_requires_devices_during_lowering.add(primitive)


def varying_axes(aval: Any) -> frozenset[str]:
  """Returns the mesh axes that a value varies over inside `shard_map`.

  Args:
    aval: Its abstract value.
  """
  manual = getattr(aval, "manual_axis_type", None)
  return frozenset(getattr(manual, "varying", ()))


def varying_aval(
  shape: Sequence[Any],
  dtype: Any,
  varying: frozenset[str],
  inputs: Sequence[Any],
) -> Any:
  """Returns an abstract value that varies over mesh axes.

  Args:
    shape: Of the value.
    dtype: Of the value.
    varying: The mesh axes.
    inputs: Abstract values, of which one at least varies.
  """
  like = next(aval for aval in inputs if varying_axes(aval))
  spec = jax.sharding.PartitionSpec(*(None for _ in shape))
  return jax.core.ShapedArray(
    tuple(shape),
    dtype,
    sharding=jax.sharding.NamedSharding(like.sharding.mesh, spec),
    manual_axis_type=like.manual_axis_type.update(varying=varying),
  )
