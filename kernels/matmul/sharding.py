"""How a product is split over devices.

Rows, columns and the axis that is summed over may each be split. Where x and w
want the same devices for different axes, or have k split differently, the
larger of the two stays where it is: with few rows that is w, and weights are
never gathered.
"""

from collections.abc import Sequence
import math
from typing import Any, NamedTuple

from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..common import arrays, jax_private
from . import operands

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

  def w(self, form: operands.Form) -> PartitionSpec:
    return self.spec(*self.batch, *form.axes(self.k, self.n))

  def scale(self) -> PartitionSpec:
    return self.spec(*self.batch, (), self.n)

  def bias(self) -> PartitionSpec:
    return self.spec(*self.batch, self.n)

  def y(self) -> PartitionSpec:
    return self.spec(*self.batch, *self.rows, self.n)


def split(
  x: Any, w: Any, batch_axes: int, form: operands.Form, groups: int = 1
) -> Split:
  """Decides how a product is split.

  Args:
    x: Has the shape and the sharding of x.
    w: The same of w, or of its packed values.
    batch_axes: Number of leading axes that are independent products.
    form: Of the weights.
    groups: Of packed weights, how many groups of rows there are. Parts must be
      whole groups, or of one.
  """
  of_x, of_w = arrays.even_split(x), arrays.even_split(w)
  sizes = w.sharding.mesh.shape

  def fits(entry: Entry) -> bool:
    count = math.prod(sizes[name] for name in entry)
    rows, _ = form.matrix(w.shape)
    return not entry or (
      isinstance(rows, int)
      and rows % count == 0
      and (groups == 1 or groups % count == 0)
    )

  k_of_w, n_of_w = form.matrix(of_w)
  k_of_w, k_of_x = (
    entry if fits(entry) else () for entry in (k_of_w, of_x[-1])
  )
  x_size, w_size = arrays.static_size(x.shape), arrays.static_size(w.shape)
  x_first = x_size is not None and w_size is not None and x_size > w_size
  used: set[str] = set()

  def take(*wanted: Entry) -> Entry:
    """Takes the first entry of which nothing is used."""
    for entry in wanted:
      if entry and used.isdisjoint(entry):
        used.update(entry)
        return entry
    return ()

  firsts = (of_x, of_w) if x_first else (of_w, of_x)
  batch = tuple(take(*both) for both in zip(*(e[:batch_axes] for e in firsts)))
  if x_first:
    rows = tuple(take(e) for e in of_x[batch_axes:-1])
    k = take(k_of_x, k_of_w)
    n = take(n_of_w)
  else:
    k = take(k_of_w)
    n = take(n_of_w)
    rows = tuple(take(e) for e in of_x[batch_axes:-1])
    k = k or take(k_of_x)
  return Split(batch, rows, k, n)


def of_result(
  x: Any, w: Any, batch_axes: int, form: operands.Form
) -> NamedSharding | None:
  """Returns the sharding of a product whose operands' types have one.

  Args:
    x: Abstract value of x.
    w: Abstract value of w.
    batch_axes: Number of leading axes that are independent products.
    form: Of the weights.

  Returns:
    None where the compiler decides.
  """
  mesh = jax_private.explicit_mesh((x, w))
  if mesh is None or w.sharding.mesh.empty or x.sharding.mesh.empty:
    return None
  return NamedSharding(mesh, split(x, w, batch_axes, form).y())


def rule(
  avals: Sequence[Any],
  *,
  form: operands.Form,
  batch_axes: int,
  **params: Any,
) -> tuple[str, Sequence[str]]:
  """Writes the Shardy rule of the op."""
  del params
  x, weights, bias = form.parts(avals)
  batch = [f"b{i}" for i in range(batch_axes)]
  rows = [f"r{i}" for i in range(len(x.shape) - batch_axes - 1)]
  # The rows of packed weights, of their scale and of x are of different
  # numbers: `partition` sees to it that they go together.
  firsts = ("v", "s", "m") if form is operands.Form.PACKED else ("k",)
  factors = [[*batch, *rows, "k"]]
  factors += [
    [*batch, *form.axes(name, "n")] for name in firsts[: len(weights)]
  ]
  if bias is not None:
    factors.append([*batch, "n"])
  left = ", ".join(" ".join(names) for names in factors)
  return f"{left} -> {' '.join([*batch, *rows, 'n'])}", ()


def partition(
  mesh: Any,
  infos: Sequence[Any],
  outs: Any,
  call: Any,
  *,
  form: operands.Form,
  batch_axes: int,
  dtype: Any,
  **params: Any,
) -> tuple[Any, Any, Any]:
  """Splits a call; see `dispatch.Partitioning`."""
  del mesh, outs
  x, weights, bias = form.parts(infos)
  packed = form is operands.Form.PACKED
  groups = weights[1].shape[batch_axes] if packed else 1
  split_by = split(x, weights[0], batch_axes, form, groups)
  params["batch_axes"] = batch_axes

  def local(*args):
    if not split_by.k:
      return call(*args, dtype=dtype, **params)
    # Sums cross devices before they are rounded.
    wide = jnp.promote_types(dtype, jnp.float32)
    x, weights, bias = form.parts(args)
    (y,) = call(x, *weights, dtype=wide, **params)
    y = lax.psum(y, split_by.k)
    if bias is not None:
      y += operands.expand_bias(bias, y.ndim, batch_axes).astype(wide)
    return (y.astype(dtype),)

  specs = [split_by.x(), split_by.w(form)]
  for _ in weights[1:]:
    specs.append(split_by.scale() if groups == 1 else split_by.w(form))
  if bias is not None:
    specs.append(split_by.bias())
  return local, (split_by.y(),), tuple(specs)
