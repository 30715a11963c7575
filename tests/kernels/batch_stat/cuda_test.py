"""What batch_stat compiles to for GPUs; no GPU is needed, and nothing runs."""

import functools

from absl.testing import parameterized
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import kernels
from kernels import batch_stat
from kernels.batch_stat import ffi
from tests.testing import deviceless, hlo

SHAPE = (32, 56, 56, 256)
STAT = jax.ShapeDtypeStruct((256,), "float32")
TARGETS = (
  ffi.TARGET_TRAIN,
  ffi.TARGET_NORMALIZE,
  ffi.TARGET_GRAD_SUMS,
  ffi.TARGET_GRAD_INPUT,
)


def batch(dtype="bfloat16", shape=SHAPE, sharding=None):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def size(shape):
  return int(np.prod(shape))


def forward(x, scale, bias, mean, var, activation="relu", **options):
  """Batch norm; the running averages first, so that donation pairs."""
  return batch_stat.batch_norm(
    x, scale, bias, mean, var, activation=activation, **options
  )


def train(x, dy, scale, bias, mean, var, **options):
  """Batch norm, its gradients and its running averages."""

  def run(x, scale, bias):
    out = forward(x, scale, bias, mean, var, **options)
    return out.y, (out.mean, out.var)

  y, pull, stats = jax.vjp(run, x, scale, bias, has_aux=True)
  return stats, y, pull(dy)


def four_gpus(spec):
  mesh = jax.sharding.Mesh(np.array(deviceless.gpu_devices(4)), ("x",))
  return NamedSharding(mesh, P()), NamedSharding(mesh, spec)


@pytest.mark.deviceless
class CompiledTest(parameterized.TestCase):
  @parameterized.parameters(
    ("float32", SHAPE, -1),
    ("bfloat16", SHAPE, -1),
    ("float16", (32, 256, 28, 28), 1),
  )
  def test_update_is_one_kernel_in_place(self, dtype, shape, feature_axis):
    update = functools.partial(
      batch_stat.update, feature_axis=feature_axis, implementation="cuda"
    )
    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0],
      update, batch(dtype, shape), STAT, STAT, donate=(1, 2),
    )  # fmt: skip
    deviceless.assert_calls(compiled, ffi.TARGET_UPDATE)
    deviceless.assert_in_place(compiled, 2 * 256 * 4)
    deviceless.assert_nothing_moves(compiled, size(shape))
    # The parts of the sums, which are a fraction of the batch.
    deviceless.assert_small_temporaries(
      compiled, size(shape) * np.dtype(dtype).itemsize // 16
    )

  @parameterized.product(
    dtype=("float32", "bfloat16"),
    momentum=(0.9, jax.ShapeDtypeStruct((), "float32")),
  )
  def test_an_update_is_all_that_runs(self, dtype, momentum):
    def update(mean, var, x, *traced):
      return batch_stat.update(
        x, mean, var, *(traced or (momentum,)), implementation="cuda"
      )

    traced = () if isinstance(momentum, float) else (momentum,)
    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0],
      update, STAT, STAT, batch(dtype), *traced, donate=(0, 1),
    )  # fmt: skip
    deviceless.assert_one_launch(compiled)

  def test_nothing_runs_between_the_kernels_of_training(self):
    for fn in (forward, train):
      for dtype in ("bfloat16", "float16", "float32"):
        x = [batch(dtype)] * (2 if fn is train else 1)
        args = [*x, *[STAT] * 4]
        compiled = deviceless.compile_for(
          deviceless.gpu_devices()[0],
          functools.partial(fn, implementation="cuda"),
          *args, donate=(len(args) - 2, len(args) - 1),
        )  # fmt: skip
        deviceless.assert_one_launch(compiled)
        self.assertEmpty(hlo.instructions(compiled.as_text(), "copy"))

  @parameterized.product(
    mask_shape=(None, (32, 1, 1, 1), SHAPE), use_fast_variance=(True, False)
  )
  def test_update_takes_masks_and_two_passes(
    self, mask_shape, use_fast_variance
  ):
    def update(x, mean, var, mask):
      return batch_stat.update(
        x, mean, var, mask=mask, use_fast_variance=use_fast_variance,
        implementation="cuda",
      )  # fmt: skip

    mask = None if mask_shape is None else batch("bool", mask_shape)
    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0],
      update, batch(), STAT, STAT, mask, donate=(1, 2),
    )  # fmt: skip
    deviceless.assert_calls(compiled, ffi.TARGET_UPDATE)
    deviceless.assert_in_place(compiled, 2 * 256 * 4)
    deviceless.assert_nothing_moves(compiled, size(SHAPE))

  def test_training_copies_nothing(self):
    for dtype in ("float32", "bfloat16", "float16"):
      compiled = deviceless.compile_for(
        deviceless.gpu_devices()[0],
        functools.partial(train, implementation="cuda"),
        batch(dtype), batch(dtype), *[STAT] * 4, donate=(4, 5),
      )  # fmt: skip
      for target in TARGETS:
        deviceless.assert_calls(compiled, target)
      deviceless.assert_nothing_moves(compiled, size(SHAPE))
      deviceless.assert_in_place(compiled, 2 * 256 * 4)

  def test_what_follows_is_in_the_fusion_that_normalises(self):
    def layer(x, residual, *args):
      mean, var, y = forward(x, *args, activation=None)[:3]
      return mean, var, jax.nn.relu(y + residual)

    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0],
      layer, batch(), batch(), *[STAT] * 4, donate=(4, 5),
    )  # fmt: skip
    deviceless.assert_calls(compiled, ffi.TARGET_TRAIN)
    fusions = hlo.instructions(compiled.as_text(), "fusion")
    self.assertLen(fusions, 1)
    self.assertIn("maximum", fusions[0])

  def test_float64(self):
    with jax.enable_x64(True):
      x, stat = batch("float64"), jax.ShapeDtypeStruct((256,), "float64")
      compiled = deviceless.compile_for(
        deviceless.gpu_devices()[0],
        functools.partial(train, implementation="cuda"),
        x, x, *[stat] * 4,
      )  # fmt: skip
      for target in TARGETS:
        deviceless.assert_calls(compiled, target)
      deviceless.assert_nothing_moves(compiled, size(SHAPE))

  @parameterized.parameters(0, 1, 3)
  def test_four_gpus_exchange_sums_alone(self, axis):
    whole, parts = four_gpus(P(*[None] * axis, "x"))
    x = batch(sharding=parts)
    compiled = deviceless.compile_for(
      whole, functools.partial(train, implementation="cuda"),
      x, x, *[STAT] * 4,
    )  # fmt: skip
    # Where the sums have to cross, they are not whole where the kernel ends.
    own = TARGETS[0] if axis == 3 else ffi.TARGET_MOMENTS
    for target in (own, *TARGETS[1:]):
      deviceless.assert_calls(compiled, target)
    deviceless.assert_nothing_moves(compiled, size(SHAPE) // 4)
    sums = hlo.instructions(compiled.as_text(), "all-reduce")
    self.assertEqual(bool(sums), axis != 3)

  def test_inside_shard_map(self):
    whole, parts = four_gpus(P("x"))
    update = jax.shard_map(
      functools.partial(batch_stat.update, axis_name="x"),
      mesh=parts.mesh,
      in_specs=(P("x"), P(), P()),
      out_specs=P(),
    )
    compiled = deviceless.compile_for(
      whole, update, batch(sharding=parts), STAT, STAT
    )
    deviceless.assert_calls(compiled, ffi.TARGET_MOMENTS)
    deviceless.assert_nothing_moves(compiled, size(SHAPE) // 4)

  @parameterized.named_parameters(
    ("half", "bfloat16", SHAPE, -1, "relu", "train normalize grad_sums"),
    ("half_alone", "float16", SHAPE, -1, None, "train"),
    ("single", "float32", SHAPE, -1, "relu", ""),
    ("double", "float64", SHAPE, -1, "relu", "train grad_sums"),
    ("features_first", "bfloat16", (32, 256, 56, 56), 1, "relu", "normalize"),
    ("small", "bfloat16", (64, 7, 7, 256), -1, "relu", ""),
  )
  def test_auto_takes_the_kernels_but_where_xla_is_as_fast(
    self, dtype, shape, feature_axis, activation, want
  ):
    with jax.enable_x64(dtype == "float64"):
      x = batch(dtype, shape)
      choices = kernels.explain(
        functools.partial(
          train, activation=activation, feature_axis=feature_axis
        ),
        x, x, *[STAT] * 4, platform="cuda",
      )  # fmt: skip
    self.assertLen(choices, 4)
    got = [c.op for c in choices if c.implementation == "cuda"]
    self.assertEqual(got, [f"batch_stat_{name}" for name in want.split()])
    for choice in choices:
      if choice.implementation == "xla":
        self.assertRegex(
          choice.reason, "XLA (makes one fusion|sums|is as fast)"
        )

  @parameterized.parameters(
    (True, False, "cuda", "written for cuda"),
    (False, False, "xla", "faster in two passes"),
    (True, True, "xla", "faster under a mask"),
  )
  def test_auto_takes_the_kernel_for_one_pass_without_a_mask(
    self, use_fast_variance, masked, want, reason
  ):
    def update(x, mean, var, *mask):
      return batch_stat.update(
        x, mean, var,
        use_fast_variance=use_fast_variance, mask=mask[0] if mask else None,
      )  # fmt: skip

    mask = [batch("bool", (32, 1, 1, 1))] * masked
    (choice,) = kernels.explain(
      update, batch(), STAT, STAT, *mask, platform="cuda"
    )
    self.assertEqual(choice.implementation, want)
    self.assertIn(reason, choice.reason)

  def test_one_artifact_serves_every_platform(self):
    (n,) = export.symbolic_shape("n")
    exported = export.export(
      jax.jit(batch_stat.update),
      platforms=("cpu", "cuda", "tpu"),
    )(jax.ShapeDtypeStruct((n, 256), "bfloat16"), STAT, STAT)
    restored = export.deserialize(exported.serialize())
    self.assertEqual(restored.platforms, ("cpu", "cuda", "tpu"))
    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0],
      restored.call, batch("bfloat16", (640, 256)), STAT, STAT,
    )  # fmt: skip
    deviceless.assert_calls(compiled, ffi.TARGET_UPDATE)


@pytest.mark.deviceless
class BrokenProgramTest(parameterized.TestCase):
  """What the checks above catch."""

  def compile(self, fn, donate=(1, 2)):
    return deviceless.compile_for(
      deviceless.gpu_devices()[0], fn, batch(), STAT, STAT, donate=donate
    )

  def test_handler_that_is_not_registered_does_not_compile(self):
    def call(x, mean, var):
      return jax.ffi.ffi_call("fused_nnx_nowhere", mean)(x, mean, var)

    with self.assertRaisesRegex(Exception, "fused_nnx_nowhere"):
      self.compile(call, donate=())

  def test_missing_donation_is_seen(self):
    compiled = self.compile(batch_stat.update, donate=())
    with self.assertRaisesRegex(AssertionError, "0 bytes of the arguments"):
      deviceless.assert_in_place(compiled, 2 * 256 * 4)

  def test_fallback_is_seen(self):
    compiled = self.compile(
      functools.partial(batch_stat.update, implementation="xla")
    )
    with self.assertRaisesRegex(AssertionError, "does not call fused_nnx"):
      deviceless.assert_calls(compiled, ffi.TARGET_UPDATE)

  def test_copied_batch_is_seen(self):
    def update(x, mean, var):
      return batch_stat.update(jnp.swapaxes(x, 1, 2) * 2, mean, var)

    with self.assertRaisesRegex(AssertionError, "moves data"):
      deviceless.assert_nothing_moves(self.compile(update), size(SHAPE))

  def test_handler_without_partitioning_gathers_and_is_seen(self):
    whole, parts = four_gpus(P("x"))
    ffi.CUDA_LIBRARY.load()

    def normalize(x, stat):
      return jax.ffi.ffi_call(ffi.TARGET_NORMALIZE, x)(
        x, stat, stat, stat,
        feature_axis=np.int64(3), batch_axes=np.int64(0), relu=np.int64(0),
      )  # fmt: skip

    compiled = deviceless.compile_for(
      whole, normalize, batch(sharding=parts), STAT
    )
    with self.assertRaisesRegex(AssertionError, "all-gather"):
      deviceless.assert_nothing_moves(compiled, size(SHAPE))
