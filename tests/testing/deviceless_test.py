"""What the checks of compiled programs catch: broken kernels, one each."""

import functools
import types

from absl.testing import parameterized
import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from kernels import kv_cache
from tests.testing import deviceless, interpreted, op_contract

CACHE = jax.ShapeDtypeStruct((4, 1024, 8, 128), jnp.bfloat16)
NEW = jax.ShapeDtypeStruct((4, 1, 8, 128), jnp.bfloat16)
INDEX = jax.ShapeDtypeStruct((4,), jnp.int32)
NUM_BYTES = 2 * 4 * 1024 * 8 * 128
CHIPS = tuple(deviceless.TPU_TOPOLOGIES)

HLO = """
ENTRY %main {
  %p.1 = bf16[4,1024]{1,0} parameter(0)
  %copy.2 = bf16[4,1024]{0,1} copy(%p.1)
  %t = (f32[2,2]{1,0}, s32[8192]{0}) fusion(%p.1)
  ROOT %copy-start.1 = (bf16[4,1024]{1,0}, bf16[4,1024]) copy-start(%p)
  %w = (bf16[4,1024]{1,0}) while(%p.1), body=%b
  %small = f32[4,4]{1,0} copy(%q)
  %k = bf16[4,1024]{1,0} custom-call(%p.1), custom_call_target="kernel"
}
"""


def fake(text=HLO, alias=0, temporaries=0):
  memory = types.SimpleNamespace(
    alias_size_in_bytes=alias, temp_size_in_bytes=temporaries
  )
  return types.SimpleNamespace(
    as_text=lambda: text, memory_analysis=lambda: memory
  )


class TextTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if op_contract.PLATFORM != "cpu":
      self.skipTest("the same on every platform")

  def test_large_results_are_what_owns_memory(self):
    found = deviceless.large_results(HLO, 4096)
    self.assertEqual(
      [line.split(" = ")[0] for line in found],
      ["%copy.2", "%t", "ROOT %copy-start.1"],
    )
    self.assertLen(deviceless.large_results(HLO, 8192), 1)
    self.assertEmpty(deviceless.large_results(HLO, 8193))

  def test_each_check_says_what_is_wrong(self):
    deviceless.assert_calls(fake(), "kernel")
    deviceless.assert_in_place(fake(alias=5), 5)
    deviceless.assert_small_temporaries(fake(temporaries=5), 5)
    deviceless.assert_nothing_moves(fake(), 10000)
    for check, match in (
      (lambda: deviceless.assert_calls(fake(), "other"), "not call other"),
      (lambda: deviceless.assert_in_place(fake(alias=4), 5), "4 bytes"),
      (
        lambda: deviceless.assert_small_temporaries(fake(temporaries=6), 5),
        "6 bytes of temporaries, more than 5",
      ),
      (lambda: deviceless.assert_nothing_moves(fake(), 4096), "%copy.2"),
      (
        lambda: deviceless.assert_nothing_moves(
          fake("  %g = f32[2]{0} all-gather(%p)"), 99
        ),
        "all-gather",
      ),
    ):
      with self.assertRaisesRegex(AssertionError, match):
        check()


def write_one_row(cache, new, index, *, wait=True, interpret=False):
  """A broken update: one row of a packed tile, where a DMA cannot begin."""

  def kernel(index, new, _, out, sem):
    copy = pltpu.make_async_copy(
      new.at[0, pl.ds(0, 1)], out.at[0, pl.ds(index[0], 1)], sem
    )
    copy.start()
    if wait:
      copy.wait()

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1,
      grid=(),
      in_specs=[anywhere] * 2,
      out_specs=anywhere,
      scratch_shapes=[pltpu.SemaphoreType.DMA],
    ),
    out_shape=jax.ShapeDtypeStruct(cache.shape, cache.dtype),
    input_output_aliases={2: 0},
    interpret=interpret,
  )(index, new, cache)


def read_tile(x, *, early):
  """Copies x through fast memory; broken if it reads what is being copied."""

  def kernel(x, out, tile, sem):
    copy = pltpu.make_async_copy(x, tile, sem)
    copy.start()
    if early:
      out[...] = tile[...]
    copy.wait()
    if not early:
      out[...] = tile[...]

  return pl.pallas_call(
    kernel,
    in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
    interpret=interpreted.PARAMS,
  )(x)


class BrokenOnTheCpuTest(parameterized.TestCase):
  """What the checks catch on the CPU."""

  def setUp(self):
    super().setUp()
    op_contract.only_on("cpu")

  def test_handler_that_is_not_registered_does_not_compile(self):
    def call(x):
      return jax.ffi.ffi_call("fused_nnx_nowhere", x)(x)

    with self.assertRaisesRegex(Exception, "fused_nnx_nowhere"):
      jax.jit(call).lower(np.zeros(3, np.float32)).compile()

  @parameterized.parameters("auto", "xla")
  def test_missing_donation_is_seen(self, implementation):
    update = functools.partial(kv_cache.update, implementation=implementation)
    args = CACHE, CACHE, NEW, NEW, INDEX
    compiled = jax.jit(update).lower(*args).compile()
    with self.assertRaisesRegex(AssertionError, "0 bytes of the arguments"):
      deviceless.assert_in_place(compiled, 2 * NUM_BYTES)

  @parameterized.parameters(True, False)
  def test_interpreter_sees_a_dma_that_nobody_waits_for(self, wait):
    self.addCleanup(interpreted.reset)
    cache, new = np.zeros((1, 16, 128), np.float32), np.ones((1, 1, 128), "f4")
    index = np.int32([3])
    got = write_one_row(
      cache, new, index, wait=wait, interpret=interpreted.PARAMS
    )
    self.assertEqual(np.asarray(got)[0, 3].sum() == 128, wait)

  @parameterized.parameters(True, False)
  def test_interpreter_finds_races_and_memory_that_was_not_written(self, early):
    interpreted.reset()
    self.addCleanup(interpreted.reset)
    got = read_tile(np.ones((8, 128), np.float32), early=early)
    self.assertEqual(np.isnan(np.asarray(got)).all(), early)
    self.assertEqual(interpreted.races_found(), early)


@pytest.mark.deviceless
class BrokenProgramTest(deviceless.TpuTest):
  @parameterized.parameters(*CHIPS)
  def test_misaligned_dma_does_not_compile(self, chip):
    matrix = jax.ShapeDtypeStruct((4, 1024, 128), jnp.bfloat16)
    with self.assertRaisesRegex(Exception, "(?i)align|divisible|tiling"):
      deviceless.compile_for(
        deviceless.tpu_devices(chip)[0],
        write_one_row,
        matrix,
        jax.ShapeDtypeStruct((4, 1, 128), jnp.bfloat16),
        INDEX,
        donate=(0,),
      )

  def test_handler_that_tpus_do_not_have_does_not_compile(self):
    def call(cache):
      return jax.ffi.ffi_call("fused_nnx_nowhere", cache)(cache)

    with self.assertRaisesRegex(Exception, "fused_nnx_nowhere"):
      deviceless.compile_for(deviceless.tpu_devices("v5e")[0], call, CACHE)

  def test_missing_donation_is_seen(self):
    compiled = deviceless.compile_for(
      deviceless.tpu_devices("v5e")[0],
      kv_cache.update, CACHE, CACHE, NEW, NEW, INDEX,
    )  # fmt: skip
    with self.assertRaisesRegex(AssertionError, "0 bytes of the arguments"):
      deviceless.assert_in_place(compiled, 2 * NUM_BYTES)
    with self.assertRaisesRegex(AssertionError, "moves data"):
      deviceless.assert_nothing_moves(compiled, NUM_BYTES // 2)

  def test_reading_before_writing_is_seen(self):
    def read_late(k, v, *rest):
      out = kv_cache.update(k, v, *rest)
      return (*out, jnp.sum(k.astype(jnp.float32) * out[1]))

    compiled = deviceless.compile_for(
      deviceless.tpu_devices("v5e")[0],
      read_late, CACHE, CACHE, NEW, NEW, INDEX, donate=(0, 1),
    )  # fmt: skip
    with self.assertRaisesRegex(AssertionError, "moves data"):
      deviceless.assert_nothing_moves(compiled, NUM_BYTES // 2)

  def test_fallback_is_seen(self):
    compiled = deviceless.compile_for(
      deviceless.tpu_devices("v5e")[0],
      functools.partial(kv_cache.update, implementation="xla"),
      CACHE, CACHE, NEW, NEW, INDEX, donate=(0, 1),
    )  # fmt: skip
    with self.assertRaisesRegex(AssertionError, "does not call tpu_custom"):
      deviceless.assert_calls(compiled, "tpu_custom_call")

  def test_gathered_cache_is_seen(self):
    mesh = jax.sharding.Mesh(
      np.array(deviceless.tpu_devices("v5e")[:4]), ("x",)
    )
    cache = jax.ShapeDtypeStruct(
      CACHE.shape, CACHE.dtype, sharding=NamedSharding(mesh, P("x"))
    )

    def whole(cache):
      return jax.lax.with_sharding_constraint(
        cache * 2, NamedSharding(mesh, P())
      )

    compiled = deviceless.compile_for(NamedSharding(mesh, P()), whole, cache)
    with self.assertRaisesRegex(AssertionError, "all-gather"):
      deviceless.assert_nothing_moves(compiled, NUM_BYTES)
