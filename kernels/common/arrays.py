"""What rules of ops ask of arrays and of their types, and do to them."""

from collections.abc import Sequence
import functools
import math
import operator
from typing import Any

import jax

from . import jax_private

varying_axes = jax_private.varying_axes


def out_aval(shape: Sequence[Any], dtype: Any, *inputs: Any) -> Any:
  """Returns the abstract value of a result computed from `inputs`.

  Inside `shard_map`, a result varies over every mesh axis that one of its
  inputs varies over. On a mesh with explicit axes, an op's `partitioning` says
  how its results are sharded. Those of an op without it are sharded like the
  first input if they have that one's shape, and not sharded otherwise.

  Args:
    shape: Of the result.
    dtype: Of the result.
    *inputs: Abstract values it depends on.
  """
  return jax_private.result_aval(tuple(shape), dtype, inputs)


def static_size(shape: Sequence[Any]) -> int | None:
  """Returns the number of elements, or None if a dimension is symbolic."""
  if not all(isinstance(size, int) for size in shape):
    return None
  return functools.reduce(operator.mul, shape, 1)


def mesh_axes(entry: Any) -> tuple[str, ...]:
  """Returns the mesh axes of one entry of a PartitionSpec."""
  if entry is None:
    return ()
  return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def even_split(x: Any) -> list[tuple[str, ...]]:
  """Returns the mesh axes by which each axis of an array is split evenly.

  Of parts that differ XLA pads the last, and a kernel would take the padding
  for data: an axis that has such does not count as split.

  Args:
    x: Has a shape and a NamedSharding.
  """
  spec = tuple(x.sharding.spec)
  spec += (None,) * (len(x.shape) - len(spec))
  sizes = x.sharding.mesh.shape
  axes = []
  for size, names in zip(x.shape, map(mesh_axes, spec)):
    parts = math.prod(sizes[name] for name in names)
    axes.append(names if size % parts == 0 else ())
  return axes


def vary_like(x: Any, *arrays: Any) -> list[Any]:
  """Marks `arrays` as varying over the mesh axes that `x` varies over.

  Inside `shard_map`, an argument that all devices share must be marked so
  before it enters a `jax.custom_vjp` together with one that they do not; its
  gradient is then summed over the devices. Elsewhere this does nothing.

  Args:
    x: The array to follow.
    *arrays: Arrays or None.
  """
  varying = varying_axes(jax.typeof(x))
  out = []
  for array in arrays:
    if array is not None and varying:
      missing = varying - varying_axes(jax.typeof(array))
      if missing:
        array = jax.lax.pcast(array, tuple(sorted(missing)), to="varying")
    out.append(array)
  return out


def move_batch_to_front(
  args: Sequence[Any], dims: Sequence[int | None]
) -> tuple[list[Any], Any]:
  """Gives every argument of a batching rule a leading batch axis.

  Args:
    args: Arguments of the batching rule.
    dims: Their batch dimensions, None for those without.

  Returns:
    The arguments, each `[batch, ...]`, and the batch size.
  """
  size = next(arg.shape[dim] for arg, dim in zip(args, dims) if dim is not None)
  moved = [
    jax.numpy.broadcast_to(arg, (size, *arg.shape))
    if dim is None
    else jax.numpy.moveaxis(arg, dim, 0)
    for arg, dim in zip(args, dims)
  ]
  return moved, size
