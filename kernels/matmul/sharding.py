"""How a product is split over devices.

Rows, columns and the axis that is summed over may each be split. Where x and w
want the same devices for different axes, or have k split differently, the
larger of the two stays where it is: with few rows that is w, and weights are
never gathered.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from ..common import arrays, jax_private

Entry = tuple[str, ...]


class Split(NamedTuple):
  """Mesh axes that split each axis of a product."""

  batch: tuple[Entry, ...]
  rows: tuple[Entry, ...]
  k: Entry
  n: Entry

  def spec(self, *entries: Entry) -> PartitionSpec:
    return PartitionSpec(*(entry or None for entry in entries))

  def x(self) -> PartitionSpec:
    return self.spec(*self.batch, *self.rows, self.k)

  def w(self) -> PartitionSpec:
    return self.spec(*self.batch, self.k, self.n)

  def bias(self) -> PartitionSpec:
    return self.spec(*self.batch, self.n)

  def y(self) -> PartitionSpec:
    return self.spec(*self.batch, *self.rows, self.n)


def _entries(info: Any) -> list[Entry]:
  """Returns the mesh axes of each axis of an array, where they are even."""
  spec = tuple(info.sharding.spec)
  spec += (None,) * (len(info.shape) - len(spec))
  sizes = info.sharding.mesh.shape
  entries = []
  for size, entry in zip(info.shape, spec):
    entry = entry if isinstance(entry, tuple) else (entry,)
    entry = tuple(name for name in entry if isinstance(name, str))
    # XLA pads uneven parts.
    parts = int(np.prod([sizes[name] for name in entry]))
    even = isinstance(size, int) and size % parts == 0
    entries.append(entry if even else ())
  return entries


def split(x: Any, w: Any, batch_axes: int) -> Split:
  """Decides how a product is split.

  Args:
    x: Has the shape and the sharding of x.
    w: The same of w.
    batch_axes: Number of leading axes that are independent products.
  """
  of_x, of_w = _entries(x), _entries(w)
  x_size, w_size = arrays.static_size(x.shape), arrays.static_size(w.shape)
  x_first = x_size is not None and w_size is not None and x_size > w_size
  used: set[str] = set()

  def take(*wanted: Entry) -> Entry:
    """Takes the first entry that splits by anything that is not used."""
    for entry in wanted:
      free = tuple(name for name in entry if name not in used)
      # A part of an entry would be another order of the devices.
      if free and free == entry:
        used.update(free)
        return free
    return ()

  firsts = (of_x, of_w) if x_first else (of_w, of_x)
  batch = tuple(take(*both) for both in zip(*(e[:batch_axes] for e in firsts)))
  if x_first:
    rows = tuple(take(e) for e in of_x[batch_axes:-1])
    k = take(of_x[-1], of_w[batch_axes])
    n = take(of_w[-1])
  else:
    k = take(of_w[batch_axes])
    n = take(of_w[-1])
    rows = tuple(take(e) for e in of_x[batch_axes:-1])
    k = k or take(of_x[-1])
  return Split(batch, rows, k, n)


def of_result(x: Any, w: Any, batch_axes: int) -> NamedSharding | None:
  """Returns the sharding of a product whose operands' types have one.

  Args:
    x: Abstract value of x.
    w: Abstract value of w.
    batch_axes: Number of leading axes that are independent products.

  Returns:
    None where the compiler decides.
  """
  mesh = jax_private.explicit_mesh((x, w))
  if mesh is None or w.sharding.mesh.empty or x.sharding.mesh.empty:
    return None
  return NamedSharding(mesh, split(x, w, batch_axes).y())


def rule(
  avals: Sequence[Any], *, batch_axes: int, **params: Any
) -> tuple[str, Sequence[str]]:
  """Writes the Shardy rule of the op."""
  del params
  batch = [f"b{i}" for i in range(batch_axes)]
  rows = [f"r{i}" for i in range(len(avals[0].shape) - batch_axes - 1)]
  operands = [[*batch, *rows, "k"], [*batch, "k", "n"], [*batch, "n"]]
  left = ", ".join(" ".join(names) for names in operands[: len(avals)])
  return f"{left} -> {' '.join([*batch, *rows, 'n'])}", ()


def partition(mesh, infos, outs, call, *, batch_axes, dtype, **params):
  """Splits a call; see `dispatch.Partitioning`."""
  del mesh, outs
  parts = split(infos[0], infos[1], batch_axes)
  params["batch_axes"] = batch_axes

  def local(x, w, *bias):
    if not parts.k:
      return call(x, w, *bias, dtype=dtype, **params)
    # Sums cross devices before they are rounded.
    wide = jnp.promote_types(dtype, jnp.float32)
    (y,) = call(x, w, dtype=wide, **params)
    y = lax.psum(y, parts.k)
    if bias:
      one = jnp.expand_dims(bias[0], tuple(range(batch_axes, y.ndim - 1)))
      y += one.astype(wide)
    return (y.astype(dtype),)

  specs = (parts.x(), parts.w(), parts.bias())
  return local, (parts.y(),), specs[: len(infos)]
