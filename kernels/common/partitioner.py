"""How the compiler is told to split an op over devices.

A program holds the op as one custom call with two notes: a rule by which Shardy
propagates shardings through it, and a text from which the call is split once
they are known. The text says all that the split depends on and nothing else, no
address of an object for instance: programs that read the same are the same, in
whichever process they were made. The persistent compilation cache and exported
artifacts rely on it.

A sharding arrives as an assignment of tiles to devices, without a mesh. The
mesh is read off the assignments, as coarse as they allow; its axes need not be
the user's, who may have reshaped an array or be inside a `shard_map` over some
other axes.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import dataclasses
import enum
import functools
import itertools
import json
import math
import typing
from typing import Any

import jax
from jax import core
import numpy as np

from . import jax_private

_CONFIG: Any = jax.config  # whose options have no types

# The custom call. What the text means is versioned with it.
TARGET = "fused_nnx_partitioned_1"


@dataclasses.dataclass(frozen=True)
class Part:
  """An operand as a partitioning function sees it.

  Attributes:
    shape: Of the whole.
    dtype: Of its elements.
    sharding: A NamedSharding.
  """

  shape: tuple[int, ...]
  dtype: Any
  sharding: jax.sharding.NamedSharding


def encode(value: Any) -> Any:
  """Returns what JSON can hold of a static parameter.

  Args:
    value: None, bool, int, float, str, an enum of strings, dtype, or tuples and
      dataclasses of them.

  Raises:
    TypeError: If it is something else.
  """
  if isinstance(value, enum.StrEnum):
    return value.value
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  if isinstance(value, tuple):
    return [encode(item) for item in value]
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {
      field.name: encode(getattr(value, field.name))
      for field in dataclasses.fields(value)
    }
  if isinstance(value, np.dtype):
    return {"dtype": value.name}
  raise TypeError(
    "A parameter of an op that is split over devices must be a number, a"
    " string, a dtype, None, or a tuple or dataclass of them, but got"
    f" `{value!r}`."
  )


def decode(value: Any, kind: type | None = None) -> Any:
  """Returns the parameter that `encode` made `value` of.

  Args:
    value: From JSON.
    kind: The dataclass or the enum to make of it, if it is one.
  """
  if isinstance(value, list):
    return tuple(decode(item) for item in value)
  if isinstance(value, dict):
    if kind is None:
      return jax.numpy.dtype(value["dtype"])
    kinds = typing.get_type_hints(kind)
    return kind(
      **{name: decode(item, kinds.get(name)) for name, item in value.items()}
    )
  if isinstance(kind, type) and issubclass(kind, enum.Enum):
    return kind(value)
  return value


def note(
  op: str,
  implementation: str,
  platform: str,
  params: Mapping[str, Any],
  around: Sequence[tuple[str, int, bool]],
) -> str:
  """Writes the text that a call is split from.

  Args:
    op: Name of the op.
    implementation: What runs on each device.
    platform: That it is lowered for.
    params: Static parameters of the op.
    around: See `jax_private.axes_around`.
  """
  fields = {
    "op": op,
    "implementation": implementation,
    "platform": platform,
    "params": {name: encode(value) for name, value in params.items()},
    "around": [(size, manual) for _, size, manual in around],
    "x64": bool(_CONFIG.jax_enable_x64),
  }
  return json.dumps(fields, sort_keys=True)


def _digits(tiles: np.ndarray, axis: int) -> list[tuple[int, int]]:
  """Writes who has tile i of an axis as a sum of i's digits times weights.

  Args:
    tiles: Numbers of the devices.
    axis: Of them.

  Returns:
    For each digit of i its weight and how many values it has; the most
    significant digit first.
  """
  line = np.moveaxis(tiles, axis, 0).reshape(tiles.shape[axis], -1)[:, 0]
  line = line - line[0]
  if not np.all(line[1:]):
    return []
  digits = []
  while len(line) > 1:
    weight, count = int(line[1]), 1
    while count < len(line) and line[count] == count * weight:
      count += 1
    digits.append((weight, count))
    line = line[::count]
  return digits[::-1]


def _weights(sizes: Sequence[int]) -> list[int]:
  """Returns how far apart neighbours along the axes of a mesh are."""
  return [math.prod(sizes[i + 1 :]) for i in range(len(sizes))]


def read_shardings(
  shapes: Sequence[tuple[int, ...]],
  shardings: Sequence[Any],
  sizes: Sequence[int] = (),
) -> list[jax.sharding.NamedSharding]:
  """Finds a mesh for shardings that have none.

  Args:
    shapes: Of the arrays.
    shardings: An HloSharding, or None, for each of them.
    sizes: Of a mesh whose axes the axes of the result must be parts of.

  Returns:
    A NamedSharding on a common abstract mesh for each array. An array that does
    not fit the mesh of those before it counts as not split.
  """
  tiles = [
    _holders(sharding, len(shape)) for shape, sharding in zip(shapes, shardings)
  ]
  arrays = [
    [_digits(array, axis) for axis in range(len(shape))]
    for array, shape in zip(tiles, shapes)
  ]
  # Products of the sizes of the last axes: of one, of two, and so on.
  devices = max(math.prod(sizes), *(array.size for array in tiles))
  cuts = {1, *_weights(sizes), devices}
  for digits in itertools.chain.from_iterable(arrays):
    more = {*cuts, *(w for w, _ in digits), *(w * n for w, n in digits)}
    if all(b % a == 0 for a, b in itertools.pairwise(sorted(more))):
      cuts = more
  ordered = sorted(cuts)
  weights = ordered[-2::-1]
  mesh = jax_private.auto_mesh(
    tuple(b // a for a, b in itertools.pairwise(ordered))[::-1],
    tuple(map(_name, weights)),
  )

  def entry(digits):
    names = [
      _name(weight)
      for low, count in digits
      for weight in weights
      if low <= weight < low * count
    ]
    return tuple(names) or None

  def place(axes, array):
    entries = [entry(digits) for digits in axes]
    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*entries)
    )
    back = jax_private.hlo_sharding(sharding, len(axes))
    if np.array_equal(_holders(back, len(axes)), array):
      return sharding
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

  return list(map(place, arrays, tiles))


def _holders(sharding: Any, rank: int) -> np.ndarray:
  """Returns the devices that hold each tile, in ascending order."""
  tiles = jax_private.tile_assignment(sharding, rank)
  return np.sort(tiles.reshape(*tiles.shape[:rank], -1))


def _name(weight: int) -> str:
  return f"d{weight}"


def _all_axes(
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  around: Sequence[tuple[int, bool]],
) -> list[tuple[str, int]]:
  """Returns the axes of the mesh of all devices.

  Args:
    mesh: Of the devices that a call is split over.
    around: Of the `shard_map` around it, the size of each axis and whether it
      is split by hand.
  """
  if not around:
    return list(mesh.shape.items())
  weights = _weights([1 if manual else size for size, manual in around])
  axes = []
  for i, ((size, manual), low) in enumerate(zip(around, weights)):
    if manual:
      axes.append((f"manual{i}", size))
      continue
    axes += [
      (name, count)
      for name, count in mesh.shape.items()
      if low <= int(name[1:]) < low * size
    ]
  return axes


class Partitioner:
  """Answers the compiler, which asks how calls of `TARGET` are split.

  Args:
    split: `split(parts, op, implementation, params) -> (fn, result_specs,
      arg_specs)`: a `Part` for each operand, and what `note` was given, the
      parameters as `encode` leaves them.
    scope: Makes a context in which the parts are traced and lowered.
  """

  def __init__(
    self,
    split: Callable[..., Any],
    scope: Callable[[], contextlib.AbstractContextManager[None]],
  ):
    self._split = split
    self._scope = scope
    jax_private.register_partitioner(TARGET, self._partition, self._infer)
    jax_private.promise([TARGET])

  def _infer(self, shapes, dtypes, shardings, text):
    fields = json.loads(text)
    return self._answer(shapes, dtypes, shardings, fields)[2]

  def _partition(self, shapes, dtypes, shardings, text):
    fields = json.loads(text)
    with self._scope(), jax.enable_x64(fields["x64"]):
      fn, args, results = self._answer(shapes, dtypes, shardings, fields)
      avals = [
        core.ShapedArray(sharding.shard_shape(shape), dtype)
        for sharding, shape, dtype in zip(args, shapes, dtypes)
      ]
      axes = _all_axes(args[0].mesh, fields["around"])
      module = jax_private.lower_part(fn, avals, axes, fields["platform"])
    return module, args, results

  def _answer(self, shapes, dtypes, shardings, fields):
    sizes = [size for size, manual in fields["around"] if not manual]
    named = read_shardings(shapes, shardings, sizes)
    mesh = named[0].mesh
    fn, result_specs, arg_specs = self._split(
      list(map(Part, shapes, dtypes, named)),
      *(fields[name] for name in ("op", "implementation", "params")),
    )
    place = functools.partial(jax.sharding.NamedSharding, mesh)
    results = list(map(place, result_specs))
    if not fields["around"]:
      return fn, list(map(place, arg_specs)), results
    # The result that numbers the devices; see `jax_private.partitioned_call`.
    numbering = place(jax.sharding.PartitionSpec(mesh.axis_names))
    return (
      lambda *args: (jax.numpy.zeros((1,), bool), *fn(*args)),
      list(map(place, arg_specs)),
      [numbering, *results],
    )
