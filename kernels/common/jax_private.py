"""The one place that touches what JAX does not promise to keep.

Tried with jax 0.10.2 and 0.12.0.1.
"""

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
