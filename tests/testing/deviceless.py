"""Programs compiled for devices that are not here, and what they must show.

A compiler needs no device: `jax.jit(f).lower(...).compile()` for the devices of
a topology gives the program that the device would run. What is read off it here
is the same for every accelerator: is the cache updated in place, is anything of
its size copied or gathered, are temporaries small, is the kernel called at all.
A compiled program is never a run: numbers want the device.
"""

from collections.abc import Callable, Sequence
import functools
import math
import os
import pathlib
import re
from typing import Any

from absl.testing import parameterized
import jax
from jax.experimental import topologies
import numpy as np

from tests.testing import hlo, op_contract

# Name of a chip: the topology to ask libtpu for, four chips each.
TPU_TOPOLOGIES = {
  "v5e": "v5e:2x2",
  "v6e": "v6e:2x2",
  "tpu7x": "tpu7x:2x2x1",
}

# What libtpu calls every kernel.
TPU_KERNEL = "tpu_custom_call"

# XLA's description of the GPU to compile for.
_GPU = pathlib.Path(__file__).with_name("h100.txtpb")

# What libtpu must find to compile where there is no TPU.
_TPU_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # or parallel tests want one lock
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_LOG_DIR": "disabled",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
}

# Results of these opcodes own no memory, or are the operand's.
_WITHOUT_MEMORY = frozenset(
  (
    "parameter", "tuple", "get-tuple-element", "bitcast", "while", "call",
    "conditional", "custom-call", "opt-barrier", "copy-done", "async-done",
    "async-start",
  )
)  # fmt: skip


@functools.cache
def tpu_devices(chip: str) -> tuple[Any, ...]:
  """Returns devices to compile for, as libtpu describes them.

  Args:
    chip: A key of `TPU_TOPOLOGIES`.
  """
  for name, value in _TPU_ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  topology = topologies.get_topology_desc(
    platform="tpu", topology_name=TPU_TOPOLOGIES[chip]
  )
  return tuple(topology.devices)


@functools.cache
def gpu_devices(count: int = 1) -> tuple[Any, ...]:
  """Returns H100s of one host to compile for; needs JAX's CUDA plugin.

  Args:
    count: How many.
  """
  topology = topologies.get_topology_desc(
    platform="cuda",
    topology_name="",
    target_config=_GPU.read_text(),
    topology=f"1x1x{count}",
  )
  return tuple(topology.devices)


def tpu_mesh(
  chip: str, kind: jax.sharding.AxisType = jax.sharding.AxisType.Auto
) -> jax.sharding.Mesh:
  """Returns a mesh of four devices with the axis "x".

  Args:
    chip: A key of `TPU_TOPOLOGIES`.
    kind: Of the axis.
  """
  devices = np.array(tpu_devices(chip)[:4])
  return jax.sharding.Mesh(devices, ("x",), axis_types=(kind,))


def sharded(
  mesh: jax.sharding.Mesh, structs: Sequence[Any], specs: Sequence[Any]
) -> list[jax.ShapeDtypeStruct]:
  """Returns types of arrays with shardings.

  Args:
    mesh: To shard over.
    structs: The types.
    specs: A PartitionSpec for each.
  """
  return [
    jax.ShapeDtypeStruct(
      a.shape, a.dtype, sharding=jax.sharding.NamedSharding(mesh, spec)
    )
    for a, spec in zip(structs, specs, strict=True)
  ]


def compile_for(
  placement: Any,
  fn: Callable[..., Any],
  *args: Any,
  donate: Sequence[int] = (),
) -> Any:
  """Compiles `fn` for devices that are not here.

  Args:
    placement: A device of a topology, for a program of one device; or a
      sharding for every array in `args` that has none of its own.
    fn: What to compile.
    *args: Trees with `jax.ShapeDtypeStruct`s in place of arrays.
    donate: Which arguments are donated.

  Returns:
    The compiled program.
  """
  if not isinstance(placement, jax.sharding.Sharding):
    placement = jax.sharding.SingleDeviceSharding(placement)

  def place(struct):
    sharding = struct.sharding or placement
    return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=sharding)

  placed = jax.tree.map(place, args)
  return jax.jit(fn, donate_argnums=tuple(donate)).lower(*placed).compile()


def large_results(text: str, elements: int) -> list[str]:
  """Lists HLO instructions that write `elements` numbers or more.

  Whatever its opcode is: a copy, its asynchronous form, a transposition, a
  conversion, or a fusion of them.

  Args:
    text: `compiled.as_text()`.
    elements: For example those of a cache, or of a device's part of it.
  """
  found = []
  for line in text.splitlines():
    match = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\(", line)
    if match is None or match[2] in _WITHOUT_MEMORY:
      continue
    sizes = [
      math.prod(map(int, dims.split(",")))
      for dims in re.findall(r"\b[a-z]\w*\[([\d,]+)\]", match[1])
    ]
    if sizes and max(sizes) >= elements:
      found.append(line.strip())
  return found


def assert_calls(compiled: Any, target: str) -> None:
  """Fails unless the program calls `target`: the kernel, not a fallback."""
  if not hlo.custom_calls(compiled.as_text(), target):
    raise AssertionError(f"the program does not call {target}")


def assert_one_launch(compiled: Any) -> None:
  """Fails if XLA has programs of its own in a GPU's: each is a launch."""
  launches = r"%(\S+) = .*\b(?:fusion|copy|copy-start)\("
  if found := re.findall(launches, compiled.as_text()):
    raise AssertionError(f"XLA launches {', '.join(found)}")


def assert_in_place(compiled: Any, num_bytes: int) -> None:
  """Fails unless the program reuses that many bytes of its arguments."""
  got = hlo.aliased_bytes(compiled)
  if got != num_bytes:
    raise AssertionError(
      f"{got} bytes of the arguments are reused, not {num_bytes}"
    )


def assert_small_temporaries(compiled: Any, num_bytes: int) -> None:
  """Fails if the program wants more than `num_bytes` of scratch memory."""
  got = compiled.memory_analysis().temp_size_in_bytes
  if got > num_bytes:
    raise AssertionError(f"{got} bytes of temporaries, more than {num_bytes}")


def assert_nothing_gathered(compiled: Any) -> None:
  """Fails if devices send one another what they have, but for sums of it."""
  text = compiled.as_text()
  gathers = [
    line
    for opcode in ("all-gather", "all-to-all", "collective-permute")
    for line in hlo.instructions(text, opcode)
  ]
  if gathers:
    raise AssertionError("the program moves data:\n" + "\n".join(gathers[:8]))


def assert_nothing_moves(compiled: Any, elements: int) -> None:
  """Fails if something as large as `elements` is copied or gathered."""
  assert_nothing_gathered(compiled)
  if moved := large_results(compiled.as_text(), elements):
    raise AssertionError("the program moves data:\n" + "\n".join(moved[:8]))


def assert_only_the_kernel_writes(
  compiled: Any, cache: Any, parts: int = 1
) -> None:
  """Holds a TPU's program to an update of caches in place and nothing else.

  Args:
    compiled: It takes two caches, donated.
    cache: Type of one of them.
    parts: Over how many devices they are split.
  """
  num_bytes = cache.size * cache.dtype.itemsize // parts
  assert_calls(compiled, TPU_KERNEL)
  assert_in_place(compiled, 2 * num_bytes)
  assert_small_temporaries(compiled, num_bytes // 8)
  assert_nothing_moves(compiled, cache.size // parts // 8)


class TpuTest(parameterized.TestCase):
  """Tests of programs that libtpu compiles."""

  def setUp(self):
    super().setUp()
    if op_contract.PLATFORM != "tpu":
      self.skipTest("needs libtpu, which --config=tpu brings")

  def compile_for_one(
    self, chip: str, fn: Callable[..., Any], *args: Any
  ) -> Any:
    """Compiles `fn`, which is given its first two arguments, for one chip."""
    return compile_for(tpu_devices(chip)[0], fn, *args, donate=(0, 1))

  def compile_for_four(
    self,
    mesh: jax.sharding.Mesh,
    fn: Callable[..., Any],
    structs: Sequence[Any],
    specs: Sequence[Any],
  ) -> Any:
    """Compiles `fn`, which is given its first two arguments, for a mesh."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = sharded(mesh, structs, specs)
    return compile_for(whole, fn, *args, donate=(0, 1))
