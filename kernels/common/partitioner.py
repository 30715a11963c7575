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

from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import functools
import itertools
import json
from typing import Any

import jax
import numpy as np

from kernels.common import jax_private

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
    value: None, bool, int, float, str, dtype, or tuples and dataclasses of
      them.

  Raises:
    TypeError: If it is something else.
  """
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
    kind: The dataclass to make of a dict.
  """
  if isinstance(value, list):
    return tuple(decode(item) for item in value)
  if isinstance(value, dict):
    if kind is None:
      return jax.numpy.dtype(value["dtype"])
    return kind(**{name: decode(item) for name, item in value.items()})
  return value


def note(
  op: str, implementation: str, platform: str, params: dict[str, Any]
) -> str:
  """Writes the text that a call is split from.

  Args:
    op: Name of the op.
    implementation: What runs on each device.
    platform: That it is lowered for.
    params: Static parameters of the op.
  """
  return json.dumps(
    {
      "op": op,
      "implementation": implementation,
      "platform": platform,
      "params": {name: encode(value) for name, value in params.items()},
      "x64": jax.config.jax_enable_x64,
    },
    sort_keys=True,
  )


def _digits(line: np.ndarray) -> list[tuple[int, int]]:
  """Writes `line[i]` as a sum of the digits of i, each times a weight.

  Args:
    line: Numbers of the devices that hold the tiles along an axis, less the
      first one's.

  Returns:
    For each digit of i its weight and how many values it has; the most
    significant digit first.
  """
  digits = []
  while len(line) > 1:
    weight, count = int(line[1]), 1
    while count < len(line) and line[count] == count * weight:
      count += 1
    digits.append((weight, count))
    line = line[::count]
  return digits[::-1]


class _Tiles:
  """How an array lies on devices, as digits of their numbers.

  Attributes:
    axes: For each axis of the array, digits as of `_digits`.
    manual: Digits that `shard_map` has split by.
    devices: How many there are, or 1 if the array is not split.
  """

  def __init__(self, sharding: Any, rank: int):
    tiles, manual = jax_private.tile_assignment(sharding, rank)
    lines = [
      np.moveaxis(tiles, axis, 0).reshape(size, -1)[:, 0]
      for axis, size in enumerate(tiles.shape)
    ]
    digits = [_digits(line - line[0]) for line in lines]
    self.axes = digits[:rank]
    self.manual = [digit for axis in manual for digit in digits[axis]]
    self.devices = tiles.size

  def cuts(self) -> set[int]:
    """Returns the weights between which mesh axes lie."""
    digits = [*itertools.chain.from_iterable(self.axes), *self.manual]
    return {w * n for w, n in digits} | {w for w, _ in digits}


def _chain(cuts: set[int]) -> bool:
  """Returns whether each divides the next."""
  ordered = sorted(cuts)
  return all(b % a == 0 for a, b in itertools.pairwise(ordered))


def read_shardings(
  shapes: Sequence[tuple[int, ...]], shardings: Sequence[Any]
) -> list[jax.sharding.NamedSharding]:
  """Finds a mesh for shardings that have none.

  Args:
    shapes: Of the arrays.
    shardings: An HloSharding, or None, for each of them.

  Returns:
    A NamedSharding on a common abstract mesh for each array. Where no mesh fits
    all, later arrays count as not split.
  """
  tiles = [_Tiles(s, len(shape)) for shape, s in zip(shapes, shardings)]
  cuts = {1, max(one.devices for one in tiles)}
  known = []
  for one in tiles:
    known.append(_chain(cuts | one.cuts()))
    if known[-1]:
      cuts |= one.cuts()
  weights = sorted(cuts, reverse=True)[1:]
  sizes = [b // a for b, a in zip(sorted(cuts, reverse=True), weights)]

  def names(digits):
    return tuple(
      f"d{weight}"
      for low, count in digits
      for weight in weights
      if low <= weight < low * count
    )

  manual = {name for one in tiles for name in names(one.manual)}
  kinds = jax.sharding.AxisType
  mesh = jax.sharding.AbstractMesh(
    tuple(sizes),
    tuple(f"d{weight}" for weight in weights),
    axis_types=tuple(
      kinds.Manual if f"d{weight}" in manual else kinds.Auto
      for weight in weights
    ),
  )
  return [
    jax.sharding.NamedSharding(
      mesh,
      jax.sharding.PartitionSpec(
        *(names(digits) or None if fits else None for digits in one.axes)
      ),
    )
    for one, fits in zip(tiles, known)
  ]


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

  def _infer(self, shapes, dtypes, shardings, text):
    fields = json.loads(text)
    del fields["platform"], fields["x64"]
    return self._answer(shapes, dtypes, shardings, **fields)[2]

  def _partition(self, shapes, dtypes, shardings, text):
    fields = json.loads(text)
    platform = fields.pop("platform")
    with self._scope(), jax.enable_x64(fields.pop("x64")):
      fn, args, results = self._answer(shapes, dtypes, shardings, **fields)
      avals = [
        jax.core.ShapedArray(sharding.shard_shape(shape), dtype)
        for sharding, shape, dtype in zip(args, shapes, dtypes)
      ]
      module = jax_private.lower_part(fn, avals, args[0].mesh, platform)
    return module, args, results

  def _answer(self, shapes, dtypes, shardings, **fields):
    named = read_shardings(shapes, shardings)
    parts = list(map(Part, shapes, dtypes, named))
    fn, result_specs, arg_specs = self._split(parts, **fields)
    place = functools.partial(jax.sharding.NamedSharding, named[0].mesh)
    return fn, list(map(place, arg_specs)), list(map(place, result_specs))
