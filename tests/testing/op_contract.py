"""What every op promises, whatever runs it.

A test of an implementation subclasses `OpContract`, says how to call the op and
with what, and gets the tests of this file on top of its own:

    class UpdateCpuTest(op_contract.OpContract):
      implementation = "cpu"
      target = ops.TARGET_UPDATE

      def make_case(self): ...
      def call(self, *arrays): ...
"""

from concurrent import futures
import os
from typing import Any
import unittest

from absl.testing import parameterized
import jax
from jax import export
import jax.numpy as jnp
import numpy as np

from tests.testing import hlo

# Which of cpu, gpu and tpu this run is about.
PLATFORM = os.environ.get("TEST_PLATFORM", "cpu")

# What must run there, by name, so that nothing else can take its place. The
# kernels for TPUs take some shapes alone, and have tests of their own: there,
# "auto" may mean the reference.
OURS = {"cpu": "cpu", "gpu": "cuda", "tpu": "auto"}[PLATFORM]


def need_device(kind: str) -> None:
  """Skips a test whose numbers need a device that is not here.

  Args:
    kind: "cpu", "gpu" or "tpu".

  Raises:
    unittest.SkipTest: Without the device.
    RuntimeError: Instead, where the environment has REQUIRE_DEVICE=1.
  """
  backend = jax.default_backend()
  if {"cuda": "gpu", "rocm": "gpu"}.get(backend, backend) == kind:
    return
  message = f"no {kind} device: numerics NOT run"
  if os.environ.get("REQUIRE_DEVICE") == "1":
    raise RuntimeError(message)
  raise unittest.SkipTest(message)


def only_on(*kinds: str) -> None:
  """Skips a test of what other platforms do not have.

  Args:
    *kinds: Of "cpu", "gpu" and "tpu".

  Raises:
    unittest.SkipTest: If this run is about another platform.
  """
  if PLATFORM not in kinds:
    raise unittest.SkipTest(f"for the {' and '.join(kinds)} alone")


class PlatformTest(parameterized.TestCase):
  """Runs where the device of TEST_PLATFORM is."""

  def setUp(self):
    super().setUp()
    if PLATFORM != "cpu":
      need_device(PLATFORM)


class CpuOnlyTest(parameterized.TestCase):
  """About the CPU's handler and the programs around it."""

  def setUp(self):
    super().setUp()
    only_on("cpu")


def bits(tree: Any) -> list[bytes]:
  """Returns the exact contents of a tree's arrays."""
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


class OpContract(parameterized.TestCase):
  """Promises that hold for every op and implementation.

  Subclasses set `implementation` and `target` (the FFI target that must be seen
  in the lowered program, or None for the reference; `targets`, if there are
  several) and define `make_case` and
  `call`. A class without an implementation runs nothing: it is the contract
  that its subclasses share.
  """

  implementation: str | None = None
  target: str | None = None
  targets: tuple[str, ...] = ()

  def setUp(self):
    super().setUp()
    if self.implementation is None:
      self.skipTest("the contract itself: its subclasses run it")
    if PLATFORM != "cpu":
      need_device(PLATFORM)

  def make_case(self) -> tuple[Any, ...]:
    """Returns arrays to call the op with."""
    raise NotImplementedError

  def call(self, *arrays: Any) -> Any:
    """Calls the op with `self.implementation`."""
    raise NotImplementedError

  def test_the_named_implementation_ran(self):
    text = jax.jit(self.call).lower(*self.make_case()).as_text()
    if self.target is None:
      self.assertNotIn("custom_call", text)
    else:
      self.assertGreater(hlo.custom_calls(text, self.target), 0, text[:2000])

  def test_jit_and_eager_agree(self):
    case = self.make_case()
    for a, b in zip(
      jax.tree.leaves(self.call(*case)),
      jax.tree.leaves(jax.jit(self.call)(*case)),
    ):
      self.assertEqual(a.dtype, b.dtype)
      np.testing.assert_allclose(
        np.asarray(a, np.float64),
        np.asarray(b, np.float64),
        rtol=1e-5,
        atol=1e-5,
      )

  def test_shapes_are_known_before_running(self):
    case = self.make_case()
    want = jax.tree.map(lambda a: (a.shape, a.dtype), self.call(*case))
    got = jax.tree.map(
      lambda a: (a.shape, a.dtype), jax.eval_shape(self.call, *case)
    )
    self.assertEqual(got, want)

  def test_repeated_runs_are_equal_to_the_bit(self):
    case = self.make_case()
    compiled = jax.jit(self.call)
    want = bits(compiled(*case))
    for _ in range(5):
      self.assertEqual(bits(compiled(*case)), want)

  def test_threads_may_call_at_once(self):
    case = self.make_case()
    compiled = jax.jit(self.call)
    want = bits(compiled(*case))
    with futures.ThreadPoolExecutor(4) as pool:
      runs = [pool.submit(lambda: bits(compiled(*case))) for _ in range(16)]
      for run in runs:
        self.assertEqual(run.result(), want)

  def test_export_round_trip(self):
    case = self.make_case()
    exported = export.export(jax.jit(self.call))(*case)
    restored = export.deserialize(exported.serialize())
    self.assertEqual(
      bits(restored.call(*case)), bits(jax.jit(self.call)(*case))
    )

  def test_checkpoint_keeps_the_result(self):
    case = self.make_case()
    self.assertEqual(
      bits(jax.jit(jax.checkpoint(self.call))(*case)),
      bits(jax.jit(self.call)(*case)),
    )

  def test_unknown_implementation_is_named(self):
    self.implementation = "fastest"
    with self.assertRaisesRegex(ValueError, "must be one of auto, xla"):
      self.call(*self.make_case())


def array(rng: np.random.Generator, shape: Any, dtype: Any) -> jax.Array:
  """Returns normal random numbers."""
  return jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype)
