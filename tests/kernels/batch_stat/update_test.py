"""Contract of `batch_stat.update`, for each implementation."""

import functools
import itertools
from typing import Any

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


def _levels() -> list[str]:
  module = ffi.CPU_LIBRARY.load()
  names = []
  for name in ("baseline", "avx2", "avx512"):
    try:
      module.set_simd_level(name)
      names.append(name)
    except ValueError:
      print(f"no {name} on this machine: NOT run")
  module.set_simd_level("auto")
  return names


class UpdateContract(op_contract.OpContract):
  """What every implementation of `update` promises."""

  def make_case(self):
    rng = np.random.default_rng(0)
    x = op_contract.array(rng, (6, 5, 3, 24), "float32") * 3 + 7
    mean = op_contract.array(rng, (24,), "float32")
    var = jnp.abs(op_contract.array(rng, (24,), "float32"))
    return x, mean, var

  def call(self, x, mean, var, momentum=0.9, **options):
    return batch_stat.update(
      x, mean, var, momentum, implementation=self.implementation, **options
    )

  def check(self, x, *, feature_axis=-1, mask=None, **options):
    """Compares a call with the oracle."""
    channels = x.shape[feature_axis]
    rng = np.random.default_rng(1)
    mean = rng.normal(size=channels).astype(np.float32)
    var = rng.random(channels).astype(np.float32)
    got = self.call(
      x, mean, var, 0.75, feature_axis=feature_axis, mask=mask, **options
    )
    want = oracles.batch_norm(x, feature_axis=feature_axis, mask=mask)
    stat_dtype = "float64" if x.dtype == np.float64 else "float32"
    self.assertEqual(got.batch_mean.dtype, stat_dtype)
    self.assertEqual(got.mean.dtype, "float32")
    close = functools.partial(
      tolerances.assert_close,
      dtype=stat_dtype,
      reduced=max(x.size // channels, 1),
    )
    spread = np.nanmax(np.abs(np.asarray(x, np.float64)), initial=0)
    close(got.batch_mean, want.mean, scale=spread, what="batch_mean")
    close(got.batch_var, want.var, what="batch_var")
    close = functools.partial(
      tolerances.assert_close,
      dtype="float32",
      reduced=max(x.size // channels, 1),
    )
    close(got.mean, 0.75 * mean + 0.25 * want.mean, scale=spread, what="mean")
    close(got.var, 0.75 * var + 0.25 * want.var, what="var")

  @parameterized.product(
    dtype=_DTYPES,
    shape_and_axis=(
      ((7, 16), -1),
      ((300, 37), 1),
      ((4, 9, 11, 130), 3),
      ((4, 13, 9, 11), 1),
      ((2, 3, 70), 1),
      ((5, 3), 0),
      ((2000, 1), 1),
      ((3, 1, 500), 1),
      ((1, 8), 1),
      ((8,), 0),
    ),
    use_fast_variance=(True, False),
  )
  def test_matches_the_oracle(self, dtype, shape_and_axis, use_fast_variance):
    shape, feature_axis = shape_and_axis
    x = op_contract.array(np.random.default_rng(2), shape, dtype)
    self.check(
      x, feature_axis=feature_axis, use_fast_variance=use_fast_variance
    )

  @parameterized.product(
    dtype=_DTYPES,
    case=(
      ((40, 12), -1, (40, 1)),
      ((40, 12), -1, (40, 12)),
      ((40, 12), -1, (12,)),
      ((6, 10, 7), 1, (6, 1, 7)),
      ((6, 10, 7), 1, (6, 1, 1)),
      ((6, 10, 7), 1, (6, 10, 7)),
      ((6, 10, 7), 1, (7,)),
    ),
    use_fast_variance=(True, False),
  )
  def test_mask_keeps_what_it_says(self, dtype, case, use_fast_variance):
    shape, feature_axis, mask_shape = case
    rng = np.random.default_rng(3)
    x = np.asarray(op_contract.array(rng, shape, "float32"))
    mask = rng.random(mask_shape) < 0.7
    mask.flat[0] = True
    if len(mask_shape) == 1 and mask_shape[0] == x.shape[feature_axis]:
      mask[:] = True  # a feature without values is another test
    x = np.where(np.broadcast_to(mask, shape), x, np.nan)
    self.check(
      jnp.asarray(x, dtype),
      feature_axis=feature_axis,
      mask=mask,
      use_fast_variance=use_fast_variance,
    )

  def test_feature_that_the_mask_empties_is_nan(self):
    x = jnp.ones((4, 3))
    mask = np.array([[True, False, True]] * 4)
    got = self.call(x, jnp.zeros(3), jnp.ones(3), mask=mask)
    for stat in got:
      np.testing.assert_array_equal(np.isnan(stat), [False, True, False])

  @parameterized.product(
    row=(0, 7, 63), value=(np.inf, -np.inf, np.nan), accurate=(False, True)
  )
  def test_what_is_not_finite_stays_in_its_feature(self, row, value, accurate):
    rng = np.random.default_rng(6)
    x = rng.normal(size=(64, 3)).astype(np.float32)
    clean = self.call(x, jnp.zeros(3), jnp.ones(3))
    x[row, 1] = value
    got = self.call(
      x, jnp.zeros(3), jnp.ones(3), use_fast_variance=not accurate
    )
    for stat, other in zip(got, clean):
      np.testing.assert_array_equal(np.isfinite(stat), [True, False, True])
      np.testing.assert_allclose(stat[::2], other[::2], rtol=1e-5, atol=1e-6)

  def test_layers_of_a_real_model(self):
    for layer, dtype in itertools.product(arg_specs.TEST_LAYERS, _DTYPES):
      x = op_contract.array(np.random.default_rng(4), layer.shape, dtype)
      self.check(x)

  def test_two_passes_lose_nothing_to_a_large_mean(self):
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(4096, 16)) + 3e4).astype(np.float32)
    got = self.call(x, jnp.full(16, 3e4), jnp.ones(16), use_fast_variance=False)
    want = x.astype(np.float64).var(0)
    np.testing.assert_allclose(got.batch_var, want, rtol=1e-4)

  def test_zero_variance_is_not_negative(self):
    x = jnp.full((1000, 8), 0.1, "float32")
    got = self.call(x, jnp.full(8, 0.1), jnp.ones(8))
    np.testing.assert_allclose(got.batch_var, 0, atol=1e-8)
    self.assertTrue(np.all(np.asarray(got.batch_var) >= 0))

  @hypothesis.given(
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    data=st.data(),
  )
  @hypothesis.settings(
    derandomize=True,
    deadline=None,
    max_examples=15,
    # The method is inherited: one executor for each implementation.
    suppress_health_check=[hypothesis.HealthCheck.differing_executors],
  )
  def test_any_shape_axis_and_mask(self, shape, data):
    feature_axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    dtype = data.draw(st.sampled_from(_DTYPES))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    x = op_contract.array(rng, shape, dtype)
    mask = None
    if data.draw(st.booleans()):
      mask_shape = [n if data.draw(st.booleans()) else 1 for n in shape]
      mask = rng.random(mask_shape) < 0.8
    self.check(x, feature_axis=feature_axis, mask=mask)

  def test_float64(self):
    with jax.enable_x64(True):
      rng = np.random.default_rng(6)
      x = jnp.asarray(rng.normal(size=(50, 20)) + 1e6)
      got = self.call(
        x, jnp.full(20, 1e6), jnp.ones(20), use_fast_variance=False
      )
      want = oracles.batch_norm(x)
      np.testing.assert_allclose(got.batch_mean, want.mean, rtol=1e-14)
      np.testing.assert_allclose(got.batch_var, want.var, rtol=1e-9)

  def test_vmap_is_one_call(self):
    rng = np.random.default_rng(7)
    x = op_contract.array(rng, (3, 10, 4, 6), "float32")
    mean = op_contract.array(rng, (3, 6), "float32")
    var = jnp.ones(6)
    run = jax.vmap(self.call, in_axes=(0, 0, None))
    text = jax.jit(run).lower(x, mean, var).as_text()
    if self.target is not None:
      self.assertEqual(hlo.custom_calls(text, self.target), 1)
    got = run(x, mean, var)
    for i in range(3):
      want = self.call(x[i], mean[i], var)
      for a, b in zip(got, want):
        np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)

  def test_vmap_over_a_middle_axis_twice(self):
    rng = np.random.default_rng(8)
    x = op_contract.array(rng, (5, 2, 7, 3), "float32")
    got = jax.vmap(
      jax.vmap(lambda x: self.call(x, jnp.zeros(3), jnp.ones(3)), in_axes=1),
      in_axes=2,
    )(x)
    want = np.asarray(x, np.float64).mean(0).transpose(1, 0, 2)
    np.testing.assert_allclose(got.batch_mean, want, rtol=1e-5, atol=1e-6)

  def test_vmap_axis_name_joins_the_parts(self):
    rng = np.random.default_rng(9)
    x = op_contract.array(rng, (4, 10, 6), "float32") + 3
    mask = rng.random((4, 10, 1)) < 0.5
    mask[3] = False  # a part without values
    got = jax.vmap(
      lambda x, m: self.call(
        x, jnp.zeros(6), jnp.ones(6), mask=m, axis_name="parts"
      ),
      axis_name="parts",
    )(x, mask)
    want = oracles.batch_norm(x, mask=mask)
    for i in range(4):
      np.testing.assert_allclose(got.batch_mean[i], want.mean, rtol=1e-5)
      np.testing.assert_allclose(got.batch_var[i], want.var, rtol=1e-4)

  def test_vmap_axis_name_on_single_rows(self):
    x = op_contract.array(np.random.default_rng(10), (32, 6), "float32")
    got = jax.vmap(
      lambda x: self.call(x, jnp.zeros(6), jnp.ones(6), axis_name="batch"),
      axis_name="batch",
    )(x)
    want = oracles.batch_norm(x)
    np.testing.assert_allclose(got.batch_var[0], want.var, rtol=1e-5, atol=1e-6)

  def test_scan_and_while_carry_the_averages(self):
    rng = np.random.default_rng(11)
    xs = op_contract.array(rng, (6, 20, 8), "float32")

    @jax.jit
    def scanned(xs):
      def step(stats, x):
        out = self.call(x, *stats)
        return out[:2], out.batch_mean

      return lax.scan(step, (jnp.zeros(8), jnp.ones(8)), xs)[0]

    @jax.jit
    def looped(xs):
      def step(carry):
        i, mean, var = carry
        out = self.call(xs[i], mean, var)
        return i + 1, out.mean, out.var

      start = (0, jnp.zeros(8), jnp.ones(8))
      return lax.while_loop(lambda c: c[0] < 6, step, start)[1:]

    mean, var = np.zeros(8), np.ones(8)
    for x in np.asarray(xs, np.float64):
      mean = 0.9 * mean + 0.1 * x.mean(0)
      var = 0.9 * var + 0.1 * x.var(0)
    for got in (scanned(xs), looped(xs)):
      np.testing.assert_allclose(got[0], mean, rtol=1e-5, atol=1e-6)
      np.testing.assert_allclose(got[1], var, rtol=1e-5)

  def test_momentum_may_be_traced(self):
    x, mean, var = self.make_case()
    got = jax.jit(self.call)(x, mean, var, jnp.float32(0.25))
    want = self.call(x, mean, var, 0.25)
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-6)

  def test_derivatives_match_differences(self):
    rng = np.random.default_rng(12)
    x = op_contract.array(rng, (6, 3), "float32")
    mask = np.array([[True], [True], [False], [True], [True], [True]])
    weights = [op_contract.array(rng, (3,), "float32") for _ in range(4)]

    def loss(x, mean, var, momentum):
      out = self.call(x, mean, var, momentum, mask=mask)
      return sum(jnp.vdot(w, o) for w, o in zip(weights, out))

    args = (x, jnp.ones(3), jnp.full(3, 2.0), jnp.float32(0.7))
    test_util.check_grads(loss, args, order=1, atol=2e-2, rtol=2e-2)

  def test_running_averages_may_have_another_dtype(self):
    x, mean, var = self.make_case()
    got = self.call(x, mean.astype("bfloat16"), var.astype("float16"))
    self.assertEqual(
      [out.dtype for out in got], ["bfloat16", "float16", "float32", "float32"]
    )

  def test_export_with_a_symbolic_batch(self):
    (batch,) = export.symbolic_shape("batch")
    exported = export.export(jax.jit(self.call))(
      jax.ShapeDtypeStruct((batch, 8), "float32"),
      jax.ShapeDtypeStruct((8,), "float32"),
      jax.ShapeDtypeStruct((8,), "float32"),
    )
    restored = export.deserialize(exported.serialize())
    for size in (3, 64):
      x = op_contract.array(np.random.default_rng(size), (size, 8), "float32")
      got = restored.call(x, jnp.zeros(8), jnp.ones(8))
      want = self.call(x, jnp.zeros(8), jnp.ones(8))
      np.testing.assert_allclose(got.mean, want.mean, rtol=1e-5, atol=1e-7)
      np.testing.assert_allclose(got.var, want.var, rtol=1e-5)

  @parameterized.parameters(
    ({"x": np.ones((4, 3), np.int32)}, TypeError, "`x` must be floating, but"),
    ({"x": np.ones((0, 3), "f4")}, ValueError, "at least one value for each"),
    (
      {"mean": np.zeros(4, "f4")},
      ValueError,
      r"`mean` must have the shape \(3",
    ),
    (
      {"var": np.zeros((1, 3), "f4")},
      ValueError,
      r"`var` must have the shape",
    ),
    ({"var": np.zeros(3, "i4")}, TypeError, "`var` must be floating"),
    ({"momentum": 1.5}, ValueError, r"`momentum` must lie in \[0, 1\]"),
    ({"momentum": np.ones(3)}, ValueError, "`momentum` must be a scalar"),
    ({"x": print}, TypeError, "`x` must be an array, but got `builtin_func"),
    ({"mean": None}, TypeError, "`mean` must be an array, but got `NoneType`"),
    ({"mask": "x"}, TypeError, "`mask` must be an array, but got `str`"),
    ({"x": np.float32(1)}, ValueError, "must have an axis of features"),
    ({"feature_axis": 2}, ValueError, r"`feature_axis` must lie in \[-2, 2\)"),
    ({"feature_axis": (0, 1)}, TypeError, "must be one integer"),
    ({"mask": np.ones(4, bool)}, ValueError, "`mask` must broadcast to the"),
    (
      {"mask": np.ones((1, 4, 3), bool)},
      ValueError,
      "`mask` must broadcast to the",
    ),
    (
      {"axis_index_groups": [[0]]},
      ValueError,
      "must come with an `axis_name`",
    ),
  )
  def test_wrong_input_is_refused(self, change, error, message):
    arguments: dict[str, Any] = {
      "x": np.ones((4, 3), "f4"),
      "mean": np.zeros(3, "f4"),
      "var": np.ones(3, "f4"),
      "momentum": 0.9,
    }
    with self.assertRaisesRegex(error, message):
      self.call(**(arguments | change))


class UpdateXlaTest(UpdateContract):
  implementation = "xla"


class UpdateCpuTest(UpdateContract):
  implementation = "cpu"
  target = ffi.TARGET_UPDATE

  def setUp(self):
    op_contract.only_on("cpu")
    super().setUp()

  def test_every_instruction_set(self):
    module = ffi.CPU_LIBRARY.load()
    rng = np.random.default_rng(13)
    try:
      for level, dtype in itertools.product(_levels(), _DTYPES):
        module.set_simd_level(level)
        self.assertEqual(module.simd_level(), level)
        self.check(op_contract.array(rng, (90, 70), dtype))
        self.check(op_contract.array(rng, (3, 5, 90), dtype), feature_axis=1)
        mask = rng.random((90, 1)) < 0.6
        self.check(op_contract.array(rng, (90, 70), dtype), mask=mask)
    finally:
      module.set_simd_level("auto")
    with self.assertRaisesRegex(ValueError, "`name` must be auto, baseline"):
      module.set_simd_level("mmx")

  def test_one_pass_loses_nothing_to_a_large_mean(self):
    rng = np.random.default_rng(14)
    for x in (
      rng.normal(size=(5000, 8)) + 1e4,
      rng.normal(size=(5000, 8)) * 1e-3 + np.arange(8) * 100,
      np.sort(rng.normal(size=(5000, 8)) + 1e4, 0),
      np.concatenate([np.full((9, 8), 1e5), rng.normal(size=(4991, 8))]),
    ):
      x = x.astype(np.float32)
      want = x.astype(np.float64).var(0)
      for shaped, axis in ((x, 1), (x.T.copy(), 0)):
        got = self.call(shaped, jnp.zeros(8), jnp.ones(8), feature_axis=axis)
        np.testing.assert_allclose(got.batch_var, want, rtol=3e-5)

  def test_one_pass_loses_little_under_a_mask_of_elements(self):
    rng = np.random.default_rng(15)
    rows, channels = 5000, 8
    x = (rng.normal(size=(rows, channels)) + 1e4).astype(np.float32)
    x[0] = 0  # far from all others, so a bad value to measure them from
    some = rng.random(x.shape) < 0.7
    row = np.arange(rows)[:, None]
    start = np.asarray([0, 1, 7, 100, 129, 4000, 4998, 0])
    for name, mask in (
      ("any", some),
      ("late", row >= start),
      ("any, late", some & (row >= start)),
      ("one, then late", (row == 0) | (row >= start)),
      ("early", row < np.asarray([2, 3, 8, 9, 100, 130, 4999, 5000])),
    ):
      for shaped, axis in ((x, 1), (x.T.copy(), 0)):
        got = self.call(
          shaped,
          jnp.zeros(channels),
          jnp.ones(channels),
          feature_axis=axis,
          mask=mask if axis else mask.T.copy(),
        )
        wide = x.astype(np.float64)
        for stat, want in (
          (got.batch_mean, wide.mean(0, where=mask)),
          (got.batch_var, wide.var(0, where=mask)),
        ):
          np.testing.assert_allclose(stat, want, rtol=3e-5, err_msg=name)

  def test_donated_averages_are_updated_in_place(self):
    x, mean, var = self.make_case()
    step = jax.jit(self.call, donate_argnums=(1, 2))
    compiled = hlo.compiled(step.lower(x, mean, var))
    self.assertEqual(hlo.aliased_bytes(compiled), mean.nbytes + var.nbytes)
    self.assertEmpty(hlo.instructions(compiled.as_text(), "copy", mean.shape))

  def test_wrong_operands_of_the_handler_are_sentences(self):
    x = jnp.ones((4, 3))
    stat, one = jnp.zeros(3), jnp.zeros(1)
    out = (jax.ShapeDtypeStruct((3,), "float32"),) * 4
    attributes = {
      name: np.int64(value)
      for name, value in {
        "feature_axis": 1,
        "batch_axes": 0,
        "accurate": 0,
      }.items()
    }

    def run(*args, out=out, **changes):
      call = jax.ffi.ffi_call(ffi.TARGET_UPDATE, out)
      return jax.block_until_ready(
        call(
          *args, **(attributes | {k: np.int64(v) for k, v in changes.items()})
        )
      )

    ffi.CPU_LIBRARY.load()
    for args, changes, message in (
      ((stat, stat, one, x), {"feature_axis": 7}, "`feature_axis` must lie"),
      ((stat, stat, one, x), {"batch_axes": 2}, "`feature_axis` must lie"),
      ((jnp.zeros(2), stat, one, x), {}, "`mean` must be float32 with 3"),
      ((stat, jnp.zeros(3, "bfloat16"), one, x), {}, "`var` must be float32"),
      ((stat, stat, stat, x), {}, "`momentum` must be float32 with 1 elements"),
      ((stat, stat, one, x.astype("int32")), {}, "`x` must be float64, fl"),
      ((stat, stat, one, x, x), {}, "`mask` must be bool with 4 or 12"),
      ((stat, stat, one, x, x > 0, x > 0), {}, "At most one `mask`"),
    ):
      with self.assertRaisesRegex(Exception, message):
        run(*args, **changes)


class UpdateCudaTest(UpdateContract):
  implementation = "cuda"
  target = ffi.TARGET_UPDATE

  def setUp(self):
    op_contract.only_on("gpu")
    super().setUp()


class UpdateChoiceTest(absltest.TestCase):
  def test_explain_names_the_implementation(self):
    x = jax.ShapeDtypeStruct((64, 56, 56, 64), "float32")
    stat = jax.ShapeDtypeStruct((64,), "float32")
    (choice,) = kernels.explain(
      batch_stat.update, x, stat, stat, platform="rocm"
    )
    self.assertEqual(choice.implementation, "xla")
    self.assertIn("Nothing else is written for rocm", choice.reason)

  def test_auto_takes_the_kernel_whatever_the_mask_depends_on(self):
    x, stat = jnp.ones((64, 32)), jnp.ones(32)
    for mask in (None, np.ones((64, 1), bool), np.ones((64, 32), bool)):
      (choice,) = kernels.explain(
        lambda x, mask=mask: batch_stat.update(x, stat, stat, mask=mask),
        x,
        platform="cpu",
      )
      self.assertEqual(choice.implementation, "cpu", choice.reason)

  def test_unsupported_dtype_falls_back_and_says_so(self):
    args = jnp.ones((4, 3), jnp.float8_e4m3fn), jnp.zeros(3), jnp.ones(3)
    (choice,) = kernels.explain(batch_stat.update, *args)
    self.assertEqual(choice.implementation, "xla")
    self.assertIn("`x` is float8_e4m3fn", choice.reason)
    op_contract.only_on("cpu", "gpu")
    with self.assertRaisesRegex(ValueError, "cannot be used here: `x` is flo"):
      batch_stat.update(*args, implementation=op_contract.OURS)


if __name__ == "__main__":
  absltest.main()
