"""Contract of `batch_stat.batch_norm`, for each implementation."""

import itertools

from absl.testing import absltest, parameterized
import hypothesis
from hypothesis import strategies as st
import jax
from jax import export, lax, test_util
import jax.numpy as jnp
import numpy as np

import kernels
from kernels import batch_stat
from kernels.batch_stat import arg_specs, ffi
from tests.testing import hlo, op_contract, oracles, tolerances

_DTYPES = ("float32", "bfloat16", "float16")


class BatchNormContract(op_contract.OpContract):
  """What every implementation of `batch_norm` promises."""

  def make_case(self):
    rng = np.random.default_rng(0)
    x = op_contract.array(rng, (6, 5, 3, 24), "float32") * 3 + 1
    scale, bias, mean = (
      op_contract.array(rng, (24,), "float32") for _ in range(3)
    )
    return x, scale, bias, mean, jnp.ones(24)

  def call(self, x, scale, bias, mean, var, momentum=0.9, **options):
    return batch_stat.batch_norm(
      x,
      scale,
      bias,
      mean,
      var,
      momentum,
      implementation=self.implementation,
      **options,
    )

  def check(
    self, x, *, feature_axis=-1, mask=None, relu=False, dtype=None, affine=True
  ):
    """Compares results and gradients with the oracle."""
    rng = np.random.default_rng(1)
    channels = x.shape[feature_axis]
    scale, bias = None, None
    if affine:
      scale = jnp.asarray(rng.normal(size=channels), "float32")
      bias = jnp.asarray(rng.normal(size=channels), "float32")
    zeros, ones = jnp.zeros(channels), jnp.ones(channels)
    out_dtype = np.dtype(dtype or x.dtype)
    dy = op_contract.array(rng, x.shape, out_dtype)

    def run(x, scale, bias):
      out = self.call(
        x,
        scale,
        bias,
        zeros,
        ones,
        feature_axis=feature_axis,
        mask=mask,
        activation="relu" if relu else None,
        dtype=dtype,
      )
      return out.y, out

    @jax.jit
    def both(x, scale, bias):
      y, pull, out = jax.vjp(run, x, scale, bias, has_aux=True)
      return y, out, pull(dy)

    y, out, (dx, dscale, dbias) = both(x, scale, bias)
    options = {"feature_axis": feature_axis, "mask": mask, "relu": relu}
    want = oracles.batch_norm(x, scale, bias, **options)
    grad = oracles.batch_norm_grad(x, dy, scale, bias, **options)
    self.assertEqual((y.dtype, y.shape), (out_dtype, x.shape))
    self.assertEqual(dx.dtype, x.dtype)
    n = max(x.size // channels, 1)

    def close(got, want, dtype, what):
      tolerances.assert_close(
        got, want, dtype, reduced=n, factor=8, scale=None, what=what
      )

    # A value on the edge of relu may fall on either side of it.
    edge = np.zeros(x.shape, bool)
    if relu:
      plain = oracles.batch_norm(
        x, scale, bias, feature_axis=feature_axis, mask=mask
      ).y
      edge = np.abs(plain) < 1e-5
    tolerances.assert_close(y, want.y, out_dtype, factor=8, what="y")
    tolerances.assert_close(
      np.where(edge, 0, np.asarray(dx, np.float64)),
      np.where(edge, 0, grad.dx),
      x.dtype if out_dtype != x.dtype else out_dtype,
      reduced=4,
      factor=8,
      what="dx",
    )
    close(out.batch_mean, want.mean, "float32", "batch_mean")
    close(out.batch_var, want.var, "float32", "batch_var")
    close(out.mean, 0.1 * want.mean, "float32", "mean")
    close(out.var, 0.9 + 0.1 * want.var, "float32", "var")
    if affine:
      close(dscale, grad.dscale, "float32", "dscale")
      close(dbias, grad.dbias, "float32", "dbias")

  @parameterized.product(
    dtype=_DTYPES,
    shape_and_axis=(
      ((9, 16), -1),
      ((300, 37), 1),
      ((4, 9, 11, 130), 3),
      ((4, 13, 9, 11), 1),
      ((2, 3, 70), 1),
      ((5, 40), 0),
      ((2000, 1), 1),
    ),
  )
  def test_matches_the_oracle(self, dtype, shape_and_axis):
    shape, feature_axis = shape_and_axis
    relu = dtype != "bfloat16"
    x = op_contract.array(np.random.default_rng(2), shape, dtype) + 1
    self.check(x, feature_axis=feature_axis, relu=relu)

  @parameterized.product(
    dtype=_DTYPES,
    case=(
      ((40, 12), -1, (40, 1)),
      ((40, 12), -1, (40, 12)),
      ((6, 10, 7), 1, (6, 1, 7)),
      ((6, 10, 7), 1, (6, 10, 7)),
    ),
  )
  def test_mask_shapes_statistics_and_gradients(self, dtype, case):
    shape, feature_axis, mask_shape = case
    relu = dtype == "float16"
    rng = np.random.default_rng(3)
    mask = rng.random(mask_shape) < 0.7
    self.check(
      op_contract.array(rng, shape, dtype),
      feature_axis=feature_axis,
      mask=mask,
      relu=relu,
    )

  @parameterized.parameters("bfloat16", "float16")
  def test_half_precision_in_and_float32_out(self, dtype):
    x = op_contract.array(np.random.default_rng(4), (50, 33), dtype)
    self.check(x, dtype="float32")

  def test_scale_and_bias_may_be_left_out(self):
    x = op_contract.array(np.random.default_rng(5), (50, 33), "float32")
    self.check(x, affine=False)

  def test_layers_of_a_real_model(self):
    for layer, dtype in itertools.product(arg_specs.TEST_LAYERS, _DTYPES):
      x = op_contract.array(np.random.default_rng(6), layer.shape, dtype)
      self.check(x, relu=True)

  @hypothesis.given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4), data=st.data()
  )
  @hypothesis.settings(
    derandomize=True,
    deadline=None,
    max_examples=10,
    # The method is inherited: one executor for each implementation.
    suppress_health_check=[hypothesis.HealthCheck.differing_executors],
  )
  def test_any_shape_axis_and_mask(self, shape, data):
    feature_axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = op_contract.array(rng, (5, *shape), "float32")
    feature_axis = feature_axis if feature_axis < 0 else feature_axis + 1
    mask = None
    if data.draw(st.booleans()):
      mask_shape = [n if data.draw(st.booleans()) else 1 for n in x.shape]
      mask = rng.random(mask_shape) < 0.8
      mask[:3] = True  # few values make a variance that rounding rules
    self.check(x, feature_axis=feature_axis, mask=mask)

  def test_float64(self):
    with jax.enable_x64(True):
      rng = np.random.default_rng(7)
      x = jnp.asarray(rng.normal(size=(30, 11)))
      dy = jnp.asarray(rng.normal(size=(30, 11)))
      stat = jnp.zeros(11)

      def run(x):
        return self.call(x, None, None, stat, stat + 1).y

      y, pull = jax.vjp(run, x)
      np.testing.assert_allclose(y, oracles.batch_norm(x).y, rtol=1e-11)
      want = oracles.batch_norm_grad(x, dy).dx
      np.testing.assert_allclose(pull(dy)[0], want, rtol=1e-9, atol=1e-12)

  def test_gradient_goes_through_every_result(self):
    rng = np.random.default_rng(8)
    x = op_contract.array(rng, (6, 3), "float32")
    mask = np.array([[True], [True], [False], [True], [True], [True]])
    weights = [
      op_contract.array(rng, shape, "float32")
      for shape in ((3,), (3,), (6, 3), (3,), (3,))
    ]

    def loss(*args):
      out = self.call(*args, mask=mask)
      return sum(jnp.vdot(w, o) for w, o in zip(weights, out))

    args = (x, jnp.ones(3), jnp.ones(3), jnp.ones(3), jnp.full(3, 2.0), 0.7)
    args = (*args[:5], jnp.float32(args[5]))
    test_util.check_grads(loss, args, 1, ["rev"], atol=2e-2, rtol=2e-2)

  @parameterized.parameters("batch_mean", "batch_var", "mean", "var")
  def test_gradient_goes_through_a_statistic_alone(self, name):
    x = op_contract.array(np.random.default_rng(16), (5, 3), "float32")
    weight = jnp.array([1.0, 2.0, 3.0])

    def loss(x):
      out = self.call(x, *[jnp.ones(3)] * 4)
      return jnp.vdot(getattr(out, name), weight)

    share = 1 if name.startswith("batch") else 0.1
    want = jnp.broadcast_to(weight / 5, x.shape)
    if name.endswith("var"):
      want = 2 * want * (x - x.mean(0))
    np.testing.assert_allclose(
      jax.jit(jax.grad(loss))(x), share * want, rtol=1e-5, atol=1e-6
    )

  def test_second_derivatives(self):
    rng = np.random.default_rng(9)
    x = op_contract.array(rng, (7, 3), "float32")
    weight = op_contract.array(rng, (7, 3), "float32")

    def loss(x):
      y = self.call(x, jnp.ones(3), jnp.ones(3), jnp.zeros(3), jnp.ones(3)).y
      return jnp.vdot(weight, jnp.sin(y))

    def plain(x):
      y = (x - x.mean(0)) * lax.rsqrt(x.var(0) + 1e-5) + 1
      return jnp.vdot(weight, jnp.sin(y))

    def penalty(loss):
      return jax.jit(jax.grad(lambda x: jnp.sum(jax.grad(loss)(x) ** 2)))(x)

    np.testing.assert_allclose(
      penalty(loss), penalty(plain), rtol=1e-3, atol=1e-4
    )

  @parameterized.parameters(0, 1)
  def test_relu_passes_no_gradient_on_where_it_is_zero(self, feature_axis):
    x = jnp.full((24, 24), 3.0)
    scale, zeros, ones = jnp.ones(24) * 2, jnp.zeros(24), jnp.ones(24)

    def loss(x, scale, bias):
      y = self.call(
        x, scale, bias, zeros, ones, feature_axis=feature_axis,
        activation="relu",
      ).y  # fmt: skip
      return jnp.sum(y)

    for grad in jax.jit(jax.grad(loss, (0, 1, 2)))(x, scale, zeros):
      np.testing.assert_array_equal(grad, jnp.zeros_like(grad))

  @parameterized.product(dtype=_DTYPES, relu=(False, True))
  def test_inference_uses_the_running_averages(self, dtype, relu):
    rng = np.random.default_rng(10)
    x = op_contract.array(rng, (5, 7, 19), dtype)
    scale, bias, mean = (
      op_contract.array(rng, (19,), "float32") for _ in range(3)
    )
    var = jnp.abs(op_contract.array(rng, (19,), "float32")) + 0.1
    dy = op_contract.array(rng, x.shape, dtype)

    def run(x, scale, bias, mean, var):
      return self.call(
        x,
        scale,
        bias,
        mean,
        var,
        use_running_average=True,
        activation="relu" if relu else None,
      )

    def plain(x, scale, bias, mean, var):
      y = (x.astype("float32") - mean) * (lax.rsqrt(var + 1e-5) * scale) + bias
      return (jnp.maximum(y, 0) if relu else y).astype(dtype)

    args = (x, scale, bias, mean, var)
    out = run(*args)
    np.testing.assert_array_equal(out.mean, mean)
    np.testing.assert_array_equal(out.var, var)
    tolerances.assert_close(out.y, plain(*args), dtype)
    got = jax.vjp(lambda *a: run(*a).y, *args)[1](dy)
    want = jax.vjp(plain, *args)[1](dy)
    for g, w in zip(got, want):
      tolerances.assert_close(g, w, dtype, reduced=35)

  def test_inference_takes_an_empty_batch(self):
    if self.implementation != "xla":
      self.skipTest("kernels leave empty batches to XLA")
    stat = jnp.ones(3)
    out = self.call(
      jnp.zeros((0, 3)), stat, stat, stat, stat, use_running_average=True
    )
    self.assertEqual(out.y.shape, (0, 3))

  def test_vmap_matches_a_loop(self):
    rng = np.random.default_rng(11)
    x = op_contract.array(rng, (3, 10, 4, 6), "float32")
    scale = op_contract.array(rng, (3, 6), "float32")
    zeros, ones = jnp.zeros(6), jnp.ones(6)

    def loss(x, scale):
      out = self.call(x, scale, zeros, zeros, ones, activation="relu")
      return jnp.sum(jnp.sin(out.y)), out

    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    got = jax.jit(jax.vmap(grad))(x, scale)
    for i in range(3):
      want = jax.jit(grad)(x[i], scale[i])
      for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        np.testing.assert_allclose(g[i], w, rtol=1e-4, atol=1e-5)

  def test_vmap_axis_name_is_one_batch(self):
    rng = np.random.default_rng(12)
    x = op_contract.array(rng, (4, 8, 6), "float32") + 2
    mask = rng.random((4, 8, 1)) < 0.6
    mask[2] = False  # a part without values
    dy = op_contract.array(rng, (4, 8, 6), "float32")
    scale, bias = jnp.arange(1.0, 7.0), jnp.ones(6)

    def loss(x, mask, dy):
      out = self.call(
        x, scale, bias, jnp.zeros(6), jnp.ones(6), mask=mask, axis_name="parts"
      )
      return jnp.vdot(out.y, dy), out

    def total(x):
      losses, out = jax.vmap(loss, axis_name="parts")(x, mask, dy)
      return losses.sum(), out

    dx, out = jax.jit(jax.grad(total, has_aux=True))(x)
    options = {"mask": mask, "feature_axis": -1}
    want = oracles.batch_norm(x, scale, bias, **options)
    np.testing.assert_allclose(out.y, want.y, rtol=1e-4, atol=1e-4)
    want = oracles.batch_norm_grad(x, dy, scale, bias, **options)
    np.testing.assert_allclose(dx, want.dx, rtol=1e-3, atol=1e-4)

  def test_trains_inside_scan_and_checkpoint(self):
    rng = np.random.default_rng(13)
    xs = op_contract.array(rng, (4, 20, 8), "float32")

    def loss(scale, wrap):
      @wrap
      def step(stats, x):
        out = self.call(x, scale, scale, *stats, activation="relu")
        return out[:2], jnp.sum(out.y**2)

      stats, losses = lax.scan(step, (jnp.zeros(8), jnp.ones(8)), xs)
      return losses.sum(), stats

    grad = jax.jit(jax.grad(loss, has_aux=True), static_argnames="wrap")
    scale = jnp.ones(8)
    plain = grad(scale, lambda step: step)
    again = grad(scale, jax.checkpoint)
    np.testing.assert_allclose(plain[0], again[0], rtol=1e-5)
    mean = np.zeros(8)
    for x in np.asarray(xs, np.float64):
      mean = 0.9 * mean + 0.1 * x.mean(0)
    np.testing.assert_allclose(plain[1][0], mean, rtol=1e-5, atol=1e-6)

  def test_export_of_a_gradient_with_a_symbolic_batch(self):
    zeros, ones = jnp.zeros(8), jnp.ones(8)

    def grad(x):
      return jax.grad(
        lambda x: jnp.sum(jnp.sin(self.call(x, ones, zeros, zeros, ones).y))
      )(x)

    (batch,) = export.symbolic_shape("batch")
    exported = export.export(jax.jit(grad))(
      jax.ShapeDtypeStruct((batch, 8), "float32")
    )
    restored = export.deserialize(exported.serialize())
    x = op_contract.array(np.random.default_rng(14), (11, 8), "float32")
    np.testing.assert_allclose(restored.call(x), grad(x), rtol=1e-4, atol=1e-6)

  @parameterized.parameters(
    ({"x": np.ones((4, 3), np.int32)}, TypeError, "`x` must be floating, but"),
    ({"x": np.ones((0, 3), "f4")}, ValueError, "at least one value for each"),
    ({"scale": np.ones(2, "f4")}, ValueError, "`scale` must have the shape"),
    ({"bias": np.ones((3, 1), "f4")}, ValueError, "`bias` must have the shape"),
    ({"mean": np.zeros(3, "i4")}, TypeError, "`mean` must be floating"),
    ({"epsilon": -1.0}, ValueError, "`epsilon` must not be negative"),
    (
      {"dtype": "floaty"},
      TypeError,
      "`dtype` must be floating, but got 'floaty'",
    ),
    ({"scale": "x"}, TypeError, "`scale` must be an array, but got `str`"),
    ({"bias": {}}, TypeError, "`bias` must be an array, but got `dict`"),
    ({"x": None}, TypeError, "`x` must be an array, but got `NoneType`"),
    ({"activation": "gelu"}, ValueError, "`activation` must be None or 'relu'"),
    ({"dtype": "int8"}, TypeError, "`dtype` must be floating, but got int8"),
    ({"momentum": -0.1}, ValueError, r"`momentum` must lie in \[0, 1\]"),
    ({"feature_axis": -3}, ValueError, r"must lie in \[-2, 2\)"),
    ({"mask": np.ones((5, 1))}, ValueError, "`mask` must broadcast"),
  )
  def test_wrong_input_is_refused(self, change, error, message):
    arguments = {
      "x": np.ones((4, 3), "f4"),
      "scale": np.ones(3, "f4"),
      "bias": np.ones(3, "f4"),
      "mean": np.zeros(3, "f4"),
      "var": np.ones(3, "f4"),
    }
    with self.assertRaisesRegex(error, message):
      self.call(**(arguments | change))


class BatchNormXlaTest(BatchNormContract):
  implementation = "xla"
  # Plain JAX does not depend on the size as kernels do, and compiles for long.
  test_layers_of_a_real_model = None


class BatchNormCpuTest(BatchNormContract):
  implementation = "cpu"
  target = ffi.TARGET_NORMALIZE
  targets = (ffi.TARGET_TRAIN, ffi.TARGET_NORMALIZE)

  def setUp(self):
    op_contract.only_on("cpu")
    super().setUp()

  def test_every_instruction_set(self):
    module = ffi.CPU_LIBRARY.load()
    rng = np.random.default_rng(15)
    try:
      for level, dtype in itertools.product(
        ("baseline", "avx2", "avx512"), _DTYPES
      ):
        try:
          module.set_simd_level(level)
        except ValueError:
          continue
        self.check(op_contract.array(rng, (90, 70), dtype), relu=True)
        x = op_contract.array(rng, (3, 5, 90), dtype)
        self.check(x, feature_axis=1, relu=True)
    finally:
      module.set_simd_level("auto")

  def test_forward_and_backward_are_two_passes_each(self):
    args = self.make_case()

    def loss(*args):
      return jnp.sum(self.call(*args, activation="relu").y ** 2)

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    text = hlo.compiled(grads.lower(*args)).as_text()
    for target in (
      ffi.TARGET_TRAIN,
      ffi.TARGET_NORMALIZE,
      ffi.TARGET_GRAD_SUMS,
      ffi.TARGET_GRAD_INPUT,
    ):
      self.assertEqual(hlo.custom_calls(text, target), 1, target)
    self.assertEmpty(hlo.instructions(text, "copy", args[0].shape))

  def test_nan_stays_where_it_is(self):
    x = np.ones((8, 3), np.float32) * np.arange(8)[:, None]
    x[2, 1] = np.nan
    zeros, ones = jnp.zeros(3), jnp.ones(3)
    out = self.call(x, ones, zeros, zeros, ones, activation="relu")
    np.testing.assert_array_equal(np.isnan(out.y).any(0), [False, True, False])


class BatchNormCudaTest(BatchNormContract):
  implementation = "cuda"
  target = ffi.TARGET_NORMALIZE
  targets = (ffi.TARGET_TRAIN, ffi.TARGET_NORMALIZE)

  def setUp(self):
    op_contract.only_on("gpu")
    super().setUp()


class ChoiceTest(parameterized.TestCase):
  @parameterized.parameters(
    ("bfloat16", 64, None, "cpu", "cpu"),
    ("bfloat16", 1024, None, "xla", "cpu"),
    ("bfloat16", 1024, "relu", "cpu", "cpu"),
    ("float32", 64, None, "cpu", "cpu"),
    ("float32", 512, None, "xla", "xla"),
    ("float32", 512, "relu", "xla", "xla"),
    ("float64", 256, None, "xla", "xla"),
  )
  def test_a_training_step_explains_itself(
    self, dtype, rows, activation, forward, back
  ):
    with jax.enable_x64(dtype == "float64"):
      x = jax.ShapeDtypeStruct((rows, 64), dtype)
      stat = jnp.ones(64, "float32")

      def loss(x):
        y = batch_stat.batch_norm(
          x, stat, stat, stat, stat, activation=activation
        ).y
        return jnp.sum(jax.nn.relu(y))

      choices = kernels.explain(jax.grad(loss), x, platform="cpu")
    self.assertEqual(
      [(choice.op, choice.implementation) for choice in choices],
      [
        ("batch_stat_train", "cpu"),
        ("batch_stat_normalize", forward),
        ("batch_stat_grad_sums", "cpu"),
        ("batch_stat_grad_input", back),
      ],
    )
    for choice in choices:
      if choice.implementation == "xla":
        self.assertIn("one fusion of it and what follows", choice.reason)


if __name__ == "__main__":
  absltest.main()
