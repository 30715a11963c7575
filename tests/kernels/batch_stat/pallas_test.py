"""The TPU's batch statistics: their numbers, and their compiled programs.

Numbers come from the interpreter on the CPU, and from the device where there is
one; programs from libtpu, which wants no device.
"""

import functools

from absl.testing import parameterized
import jax
from jax import export, lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import kernels
from kernels import batch_stat
from kernels.batch_stat import ffi, pallas_tpu, primitive
from tests.testing import (
  deviceless,
  hlo,
  interpreted,
  op_contract,
  oracles,
  tolerances,
)

PLATFORM = op_contract.PLATFORM
interpreted.allow(primitive, "UPDATE", "TRAIN", "MOMENTS")
IMPLEMENTATION = interpreted.NAME if PLATFORM == "cpu" else "pallas"
KERNEL = deviceless.TPU_KERNEL
# Those of a block of 128 features.
ROWS = pallas_tpu._BLOCK // 128


def check(got, x, mean, var, momentum):
  want = oracles.batch_norm(x)
  spread = np.abs(np.asarray(x, np.float64)).max()
  close = functools.partial(
    tolerances.assert_close, dtype="float32", reduced=x.size // x.shape[-1]
  )
  close(got.batch_mean, want.mean, scale=spread, what="batch_mean")
  close(got.batch_var, want.var, what="batch_var")
  blend = momentum * mean + (1 - momentum) * want.mean
  close(got.mean, blend, scale=spread, what="mean")
  close(got.var, momentum * var + (1 - momentum) * want.var, what="var")
  assert not interpreted.races_found()


class NumbersTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if PLATFORM != "cpu":
      op_contract.need_device(PLATFORM)
    interpreted.reset()

  @parameterized.product(
    dtype=("float32", "bfloat16"),
    # One block; several of features, and of rows, the last one short or whole;
    # merged axes; one value.
    shape=(
      (7, 16), (1100, 640), (2 * ROWS + 1, 128), (2 * ROWS, 128), (5, 16, 130),
      (1, 8),
    ),
  )  # fmt: skip
  def test_matches_the_oracle(self, dtype, shape):
    rng = np.random.default_rng(0)
    x = op_contract.array(rng, shape, dtype)
    mean, var = rng.random((2, shape[-1])).astype(np.float32)
    got = batch_stat.update(x, mean, var, 0.75, implementation=IMPLEMENTATION)
    check(got, x, mean, var, 0.75)

  def test_blocks_of_different_means_are_merged(self):
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2 * ROWS + 9, 128)).astype(np.float32)
    x[ROWS:] += 3
    x[2 * ROWS :] -= 40
    mean, var = rng.random((2, 128)).astype(np.float32)
    got = batch_stat.update(x, mean, var, 0.75, implementation=IMPLEMENTATION)
    check(got, x, mean, var, 0.75)

  def test_what_batch_norm_wants_besides(self):
    rng = np.random.default_rng(5)
    x = op_contract.array(rng, (33, 128), "float32")
    mean, var, scale = rng.random((3, 128)).astype(np.float32)
    momentum = np.float32([0.75])
    params = {"feature_axis": 1, "batch_axes": 0, "accurate": False}
    params["implementation"] = IMPLEMENTATION
    *update, count, rstd, mul = primitive.TRAIN(
      mean, var, momentum, scale, x, epsilon=0.1, **params
    )
    check(batch_stat.Update(*update), x, mean, var, 0.75)
    want = oracles.batch_norm(x)
    np.testing.assert_allclose(rstd, (want.var + 0.1) ** -0.5, rtol=1e-4)
    np.testing.assert_allclose(mul, scale * np.asarray(rstd), rtol=1e-6)
    own_mean, own_var, own_count = primitive.MOMENTS(x, **params)
    np.testing.assert_array_equal(own_mean, update[2])
    np.testing.assert_array_equal(own_var, update[3])
    for each in (count, own_count):
      np.testing.assert_array_equal(each, np.full(128, 33, np.float32))

  def test_one_pass_loses_nothing_to_a_large_mean(self):
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(2 * ROWS, 128)) + 3e3).astype(np.float32)
    got = batch_stat.update(
      x, np.zeros(128), np.ones(128), implementation=IMPLEMENTATION
    )
    np.testing.assert_allclose(
      got.batch_var, x.astype(np.float64).var(0), rtol=1e-4
    )

  def test_what_vmap_makes_of_it(self):
    rng = np.random.default_rng(2)
    x = op_contract.array(rng, (2, 3, 24, 128), "float32") + 3
    mean, var = rng.random((2, 2, 3, 128)).astype(np.float32)
    momentum = np.full((2, 3, 1), 0.75, np.float32)
    got = primitive.UPDATE(
      mean, var, momentum, x, feature_axis=3, batch_axes=2,
      accurate=False, implementation=IMPLEMENTATION,
    )  # fmt: skip
    for i in np.ndindex(2, 3):
      out = batch_stat.Update(*(a[i] for a in got))
      check(out, x[i], mean[i], var[i], 0.75)


class ChoiceTest(parameterized.TestCase):
  """What the rule says; nothing is compiled."""

  def setUp(self):
    super().setUp()
    if PLATFORM != "cpu":
      self.skipTest("the same on every platform")

  @parameterized.parameters(
    ((4, 3), "float16", {}, "`x` is float16"),
    ((4, 3), "float32", {"mask": np.ones((4, 1), bool)}, "there is a mask"),
    ((4, 3), "float32", {"feature_axis": 0}, "features are axis 0 of 2 axes"),
    (
      (4, 9001),
      "float32",
      {},
      "`x` has 9001 features, which are not a multiple",
    ),
    (
      (4, 3, 8),
      "float32",
      {},
      "cannot be read as a matrix in place: 3 is not a",
    ),
    ((4, 8, 8, 8), "float32", {}, "the axes of an image"),
  )
  def test_what_is_left_to_xla(self, shape, dtype, kwargs, reason):
    x = jax.ShapeDtypeStruct(shape, dtype)
    stat = jax.ShapeDtypeStruct((shape[kwargs.get("feature_axis", -1)],), "f4")
    update = functools.partial(batch_stat.update, **kwargs)
    [choice] = kernels.explain(update, x, stat, stat, platform="tpu")
    self.assertEqual(choice.implementation, "xla")
    self.assertIn(reason, choice.reason)

  def test_batch_norm_takes_its_moments_from_the_kernel(self):
    x = jax.ShapeDtypeStruct((64, 128), "float32")
    stat = jax.ShapeDtypeStruct((128,), "float32")
    choices = kernels.explain(
      batch_stat.batch_norm, x, stat, stat, stat, stat, platform="tpu"
    )
    self.assertEqual(
      {choice.op: choice.implementation for choice in choices},
      {"batch_stat_train": "pallas", "batch_stat_normalize": "xla"},
    )

  def test_one_artifact_serves_every_platform(self):
    rng = np.random.default_rng(3)
    x = op_contract.array(rng, (64, 128), "float32")
    mean, var = rng.random((2, 128)).astype(np.float32)
    exported = export.export(
      jax.jit(batch_stat.update),
      platforms=("cpu", "cuda", "tpu"),
    )(x, mean, var, 0.75)
    text = exported.mlir_module()
    self.assertIn(KERNEL, text)
    self.assertIn(ffi.TARGET_UPDATE, text)
    loaded = export.deserialize(exported.serialize())
    check(loaded.call(x, mean, var, 0.75), x, mean, var, 0.75)


CHIPS = tuple(deviceless.TPU_TOPOLOGIES)


@pytest.mark.deviceless
class CompiledTest(deviceless.TpuTest):
  def check(self, compiled, x, stat):
    num_bytes = stat.size * stat.dtype.itemsize
    deviceless.assert_calls(compiled, KERNEL)
    deviceless.assert_in_place(compiled, 2 * num_bytes)
    deviceless.assert_small_temporaries(compiled, 64 * num_bytes)
    deviceless.assert_nothing_moves(compiled, x.size)
    # Donation alone would have the averages copied back.
    self.assertEmpty(hlo.instructions(compiled.as_text(), "copy"))

  @parameterized.product(
    chip=CHIPS,
    dtype=("float32", "bfloat16"),
    shape=((65536, 512), (100000, 256), (16, 4096, 1024)),
  )
  def test_update(self, chip, dtype, shape):
    x = jax.ShapeDtypeStruct(shape, dtype)
    stat = jax.ShapeDtypeStruct((shape[-1],), "float32")
    compiled = deviceless.compile_for(
      deviceless.tpu_devices(chip)[0], batch_stat.update, x, stat, stat,
      donate=(1, 2),
    )  # fmt: skip
    self.check(compiled, x, stat)

  @parameterized.parameters(
    ((4096, 512), -1, "float16", False),
    ((4096, 512), -1, "float32", True),
    ((64, 256, 28, 28), 1, "bfloat16", False),
    ((64, 28, 28, 256), -1, "float32", False),
  )
  def test_what_is_left_to_xla(self, shape, axis, dtype, masked):
    x = jax.ShapeDtypeStruct(shape, dtype)
    stat = jax.ShapeDtypeStruct((shape[axis],), "float32")
    mask = jax.ShapeDtypeStruct((shape[0], 1), "bool") if masked else None

    def step(mean, var, x, scale, bias, mask):
      def loss(x, scale, bias):
        out = batch_stat.batch_norm(
          x, scale, bias, mean, var, mask=mask, feature_axis=axis
        )
        return jnp.sum(out.y.astype(jnp.float32) ** 3), (out.mean, out.var)

      grads, stats = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
        x, scale, bias
      )
      return *stats, grads

    compiled = deviceless.compile_for(
      deviceless.tpu_devices("v5e")[0], step, stat, stat, x, stat, stat, mask,
      donate=(0, 1),
    )  # fmt: skip
    self.assertEqual(hlo.custom_calls(compiled.as_text(), KERNEL), 0)
    deviceless.assert_in_place(compiled, 2 * 4 * stat.size)

  @parameterized.parameters(*CHIPS)
  def test_update_in_a_scan(self, chip):
    xs = jax.ShapeDtypeStruct((4, 1024, 512), "float32")
    stat = jax.ShapeDtypeStruct((512,), "float32")

    def run(xs, mean, var):
      def step(stats, x):
        return batch_stat.update(x, *stats)[:2], None

      return lax.scan(step, (mean, var), xs)[0]

    compiled = deviceless.compile_for(
      deviceless.tpu_devices(chip)[0], run, xs, stat, stat, donate=(1, 2)
    )
    deviceless.assert_calls(compiled, KERNEL)
    deviceless.assert_in_place(compiled, 2 * 4 * 512)

  @parameterized.parameters(*CHIPS)
  def test_training_step(self, chip):
    x = jax.ShapeDtypeStruct((4096, 512), "bfloat16")
    stat = jax.ShapeDtypeStruct((512,), "float32")

    def step(mean, var, x, scale, bias):
      def loss(x, scale, bias):
        out = batch_stat.batch_norm(x, scale, bias, mean, var)
        return jnp.sum(out.y.astype(jnp.float32) ** 3), (out.mean, out.var)

      grads, stats = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
        x, scale, bias
      )
      return *stats, grads

    compiled = deviceless.compile_for(
      deviceless.tpu_devices(chip)[0], step, stat, stat, x, stat, stat,
      donate=(0, 1),
    )  # fmt: skip
    deviceless.assert_calls(compiled, KERNEL)
    deviceless.assert_in_place(compiled, 2 * 4 * 512)

  @parameterized.parameters(*CHIPS)
  def test_four_chips_of_an_explicit_mesh(self, chip):
    mesh = deviceless.tpu_mesh(chip, jax.sharding.AxisType.Explicit)
    x = jax.ShapeDtypeStruct((1 << 18, 512), "float32")
    stat = jax.ShapeDtypeStruct((512,), "float32")
    args = deviceless.sharded(mesh, (x, stat, stat), (P("x"), P(), P()))
    with jax.set_mesh(mesh):
      compiled = deviceless.compile_for(
        NamedSharding(mesh, P()), batch_stat.update, *args, donate=(1, 2)
      )
    deviceless.assert_calls(compiled, KERNEL)
    deviceless.assert_nothing_moves(compiled, x.size // 4)

  @parameterized.parameters(
    ((1 << 18, 512), -1), ((64, 56, 56, 256), -1), ((64, 256, 56, 56), 1)
  )
  def test_plain_xla_splits_what_the_compiler_has_to(self, shape, axis):
    x = jax.ShapeDtypeStruct(shape, "bfloat16")
    stat = jax.ShapeDtypeStruct((shape[axis],), "float32")
    mesh = deviceless.tpu_mesh("v5e")
    args = deviceless.sharded(mesh, (x, stat, stat), (P("x"), P(), P()))
    compiled = deviceless.compile_for(
      NamedSharding(mesh, P()),
      functools.partial(batch_stat.update, feature_axis=axis), *args,
      donate=(1, 2),
    )  # fmt: skip
    num_bytes = stat.size * stat.dtype.itemsize
    deviceless.assert_in_place(compiled, 2 * num_bytes)
    deviceless.assert_small_temporaries(compiled, 64 * num_bytes)
    deviceless.assert_nothing_gathered(compiled)
