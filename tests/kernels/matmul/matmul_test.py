"""Contract of `kernels.matmul`, for each implementation."""

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
from kernels.matmul import arg_specs, ffi
from tests.testing import hlo, op_contract, tolerances

_DTYPES = ("float32", "bfloat16", "float16")
_SHAPES = (
  (1, 64, 64),
  (1, 37, 53),
  (2, 1, 9),
  (3, 300, 1),
  (5, 7, 33),
  (31, 130, 70),
  (33, 64, 200),
  (70, 513, 3000),
  (1, 4096, 300),
)


def _levels() -> list[str]:
  module = ffi.LIBRARY.load()
  names = []
  for name in ("baseline", "avx2", "avx512", "avx512_bf16"):
    try:
      module.set_simd_level(name)
      names.append(name)
    except ValueError:
      print(f"no {name} on this machine: NOT run")
  module.set_simd_level("auto")
  return names


def _oracle(x, w, bias=None):
  out = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
  return out if bias is None else out + np.asarray(bias, np.float64)


class ProductContract(op_contract.OpContract):
  """What every implementation promises.

  Attributes:
    transposed: Whether w is handed over as its transpose.
  """

  transposed = False

  def make_case(self):
    rng = np.random.default_rng(0)
    return (
      op_contract.array(rng, (3, 2, 70), "float32"),
      op_contract.array(rng, (70, 50), "float32"),
      op_contract.array(rng, (50,), "float32"),
    )

  def call(self, x, w, *rest, **options):
    return kernels.matmul(
      x,
      w.T if self.transposed else w,
      *rest,
      transposed=self.transposed,
      implementation=self.implementation,
      **options,
    )

  def check(self, x, w, bias=None, **options):
    """Compares a call with the oracle."""
    got = self.call(x, w, bias, **options)
    arrays = [a for a in (x, w, bias) if a is not None]
    preferred = options.get("preferred_element_type")
    dtype = jnp.dtype(preferred or jnp.result_type(*arrays))
    self.assertEqual(got.dtype, dtype)
    self.assertEqual(got.shape, (*x.shape[:-1], w.shape[1]))
    coarsest = max(
      ("float32" if preferred else dtype, dtype), key=tolerances.eps
    )
    tolerances.assert_close(
      got, _oracle(x, w, bias), coarsest, reduced=x.shape[-1], factor=1.0
    )

  @parameterized.product(dtype=_DTYPES, shape=_SHAPES, biased=(False, True))
  def test_matches_the_oracle(self, dtype, shape, biased):
    rows, k, n = shape
    rng = np.random.default_rng(1)
    self.check(
      op_contract.array(rng, (rows, k), dtype),
      op_contract.array(rng, (k, n), dtype),
      op_contract.array(rng, (n,), dtype) if biased else None,
    )

  @parameterized.parameters(*itertools.product(_DTYPES, _DTYPES, _DTYPES))
  def test_dtypes_may_differ(self, x_dtype, w_dtype, bias_dtype):
    rng = np.random.default_rng(2)
    x = op_contract.array(rng, (2, 3, 90), x_dtype)
    w = op_contract.array(rng, (90, 40), w_dtype)
    bias = op_contract.array(rng, (40,), bias_dtype)
    self.check(x, w)
    self.check(x, w, bias)
    for preferred in _DTYPES:
      self.check(x, w, bias, preferred_element_type=preferred)

  def test_the_result_is_rounded_to_its_own_dtype(self):
    rng = np.random.default_rng(2)
    x = op_contract.array(rng, (200, 10), "bfloat16")
    w = op_contract.array(rng, (10, 58), "bfloat16")
    got = self.call(x, w, preferred_element_type="float16")
    want = _oracle(x, w)
    error = np.abs(np.asarray(got, np.float64) - want)
    most = np.abs(np.float64(x)) @ np.abs(np.float64(w))
    self.assertTrue((error <= 2.0**-11 * np.abs(want) + 1e-6 * most).all())

  def test_layers_of_a_real_model(self):
    for k, n in arg_specs.TEST_SHAPES:
      for dtype in _DTYPES:
        rng = np.random.default_rng(3)
        x = op_contract.array(rng, (1, k), dtype)
        self.check(x, op_contract.array(rng, (k, n), dtype))

  def test_a_vector_and_no_rows(self):
    rng = np.random.default_rng(4)
    w = op_contract.array(rng, (30, 20), "float32")
    self.check(op_contract.array(rng, (30,), "float32"), w)
    options: dict[str, Any] = {"transposed": self.transposed}
    if self.target:
      options["implementation"] = "auto"
    given = w.T if self.transposed else w
    for shape in ((0, 30), (2, 0, 30)):
      got = kernels.matmul(jnp.ones(shape), given, **options)
      self.assertEqual(got.shape, (*shape[:-1], 20))
    got = kernels.matmul(jnp.ones((2, 0)), jnp.ones((0, 3)), jnp.ones(3))
    np.testing.assert_array_equal(got, np.ones((2, 3)))

  def test_what_is_not_finite_stays_in_its_column(self):
    rng = np.random.default_rng(5)
    w = np.array(op_contract.array(rng, (30, 37), "float32"))
    w[3, 36] = np.inf
    w[5, 20] = np.nan
    got = self.call(jnp.ones((2, 30)), w)
    want = np.ones((2, 30)) @ w.astype(np.float64)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_array_equal(np.isinf(got), np.isinf(want))

  @hypothesis.given(
    lead=st.lists(st.integers(1, 5), max_size=3),
    k=st.integers(1, 40),
    n=st.integers(1, 70),
    data=st.data(),
  )
  @hypothesis.settings(
    derandomize=True,
    deadline=None,
    max_examples=15,
    # The method is inherited: one executor for each implementation.
    suppress_health_check=[hypothesis.HealthCheck.differing_executors],
  )
  def test_any_shape(self, lead, k, n, data):
    dtypes = data.draw(st.tuples(*[st.sampled_from(_DTYPES)] * 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    self.check(
      op_contract.array(rng, (*lead, k), dtypes[0]),
      op_contract.array(rng, (k, n), dtypes[1]),
      op_contract.array(rng, (n,), dtypes[2])
      if data.draw(st.booleans())
      else None,
    )

  @parameterized.product(
    axes=(
      (0, None, None),
      (1, None, 0),
      (None, 0, None),
      (None, 0, 0),
      (None, None, 0),
      (2, 1, 1),
      (0, 2, None),
    ),
    biased=(False, True),
  )
  def test_vmap(self, axes, biased):
    rng = np.random.default_rng(6)
    arrays = [
      op_contract.array(rng, shape, "float32")
      for shape in ((4, 30), (30, 20), (20,))
    ][: 2 + biased]
    axes = axes[: len(arrays)]
    if not any(axis is not None for axis in axes):
      self.skipTest("nothing is mapped over")
    args = [
      array if axis is None else jnp.stack([array, 2 * array, -array], axis)
      for array, axis in zip(arrays, axes)
    ]
    run = jax.vmap(self.call, in_axes=axes)
    if self.target is not None:
      text = jax.jit(run).lower(*args).as_text()
      self.assertEqual(hlo.custom_calls(text, self.target), 1)
    got = run(*args)
    for i in range(3):
      one = [
        arg if axis is None else jnp.take(arg, i, axis)
        for arg, axis in zip(args, axes)
      ]
      np.testing.assert_allclose(got[i], _oracle(*one), rtol=1e-4, atol=1e-4)

  def test_vmap_twice(self):
    rng = np.random.default_rng(7)
    x = op_contract.array(rng, (5, 3, 2, 30), "float32")
    w = op_contract.array(rng, (5, 3, 30, 20), "float32")
    got = jax.vmap(jax.vmap(self.call))(x, w)
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    got = jax.vmap(jax.vmap(self.call, (0, None)), (1, 0))(x[:, :, 0], w[0])
    want = np.einsum("ijk,jkn->jin", np.float64(x[:, :, 0]), np.float64(w[0]))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

  def test_scan_over_layers(self):
    rng = np.random.default_rng(8)
    ws = op_contract.array(rng, (6, 16, 16), "float32") / 4
    x = op_contract.array(rng, (2, 16), "float32")

    @jax.jit
    def run(x, ws):
      return lax.scan(lambda x, w: (self.call(x, w), None), x, ws)[0]

    want = np.asarray(x, np.float64)
    for w in np.asarray(ws, np.float64):
      want = want @ w
    np.testing.assert_allclose(run(x, ws), want, rtol=1e-4, atol=1e-5)

  def test_derivatives_match_differences(self):
    rng = np.random.default_rng(9)
    args = (
      op_contract.array(rng, (3, 6), "float32"),
      op_contract.array(rng, (6, 5), "float32"),
      op_contract.array(rng, (5,), "float32"),
    )

    def loss(*args):
      return jnp.sum(jnp.sin(self.call(*args)))

    test_util.check_grads(loss, args, order=2, atol=2e-2, rtol=2e-2)
    for wanted in (0, 1, 2):
      jax.grad(loss, wanted)(*args)

  @parameterized.parameters(*_DTYPES)
  def test_gradients_have_the_dtypes_of_the_arguments(self, dtype):
    rng = np.random.default_rng(10)
    x = op_contract.array(rng, (4, 30), dtype)
    w = op_contract.array(rng, (30, 20), "bfloat16")
    bias = op_contract.array(rng, (20,), "float32")

    def loss(*args):
      return jnp.vdot(
        self.call(*args), jnp.cos(jnp.arange(80.0).reshape(4, 20))
      )

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(x, w, bias)
    self.assertEqual([g.dtype for g in grads], [dtype, "bfloat16", "float32"])
    dy = np.cos(np.arange(80.0).reshape(4, 20))
    for got, want in zip(
      grads, (dy @ np.float64(w).T, np.float64(x).T @ dy, dy.sum(0))
    ):
      tolerances.assert_close(got, want, "bfloat16")

  def test_the_kernel_runs_under_a_gradient(self):
    x, w, bias = self.make_case()
    if self.target is None:
      self.skipTest("of a kernel")
    run = jax.jit(jax.value_and_grad(lambda w: self.call(x, w, bias).sum()))
    self.assertEqual(hlo.custom_calls(run.lower(w).as_text(), self.target), 1)

  def test_export_with_symbolic_rows(self):
    (rows,) = export.symbolic_shape("rows")
    exported = export.export(jax.jit(self.call))(
      jax.ShapeDtypeStruct((rows, 8), "float32"),
      jax.ShapeDtypeStruct((8, 5), "bfloat16"),
    )
    restored = export.deserialize(exported.serialize())
    rng = np.random.default_rng(11)
    w = op_contract.array(rng, (8, 5), "bfloat16")
    for size in (3, 64):
      x = op_contract.array(rng, (size, 8), "float32")
      np.testing.assert_allclose(
        restored.call(x, w), _oracle(x, w), rtol=1e-5, atol=1e-5
      )

  @parameterized.parameters(
    None, "highest", lax.Precision.HIGH, (("default", "highest"),)
  )
  def test_precision(self, precision):
    rng = np.random.default_rng(12)
    x = op_contract.array(rng, (2, 30), "float32")
    self.check(
      x, op_contract.array(rng, (30, 20), "float32"), precision=precision
    )


class MatmulContract(ProductContract):
  """And of a matrix as it is."""

  @parameterized.parameters(
    ({"x": np.ones((4, 3), np.int32)}, TypeError, "`x` must be floating, but"),
    ({"w": np.ones((3, 3), np.int8)}, TypeError, "`w` must be floating, but"),
    ({"bias": np.ones(2, bool)}, TypeError, "`bias` must be floating, but"),
    ({"x": print}, TypeError, "`x` must be an array, but got `builtin_func"),
    ({"x": np.float32(1)}, ValueError, "must have an axis of k numbers"),
    ({"w": np.ones(3, "f4")}, ValueError, r"must have 2 axes \[k, n\], but"),
    ({"w": np.ones((2, 3, 2), "f4")}, ValueError, "Use `jax.vmap`"),
    (
      {"w": np.ones((4, 2), "f4")},
      ValueError,
      r"shapes are \(4, 3\) and \(4, 2\)",
    ),
    ({"bias": np.ones(3, "f4")}, ValueError, r"must have the shape \(2,\)"),
    ({"bias": np.ones((1, 2), "f4")}, ValueError, r"but got \(1, 2\)"),
    ({"precision": "best"}, ValueError, "`precision` must be None, one of"),
    (
      {"preferred_element_type": "int32"},
      TypeError,
      "`preferred_element_type` must be floating, but got int32",
    ),
    (
      {"preferred_element_type": 3},
      TypeError,
      "`preferred_element_type` must be a dtype, but got 3",
    ),
  )
  def test_wrong_input_is_refused(self, change, error, message):
    arguments: dict[str, Any] = {
      "x": np.ones((4, 3), "f4"),
      "w": np.ones((3, 2), "f4"),
      "bias": np.ones(2, "f4"),
    } | change
    args = [arguments.pop(name) for name in ("x", "w", "bias")]
    with self.assertRaisesRegex(error, message):
      self.call(*args, **arguments)


class MatmulXlaTest(MatmulContract):
  implementation = "xla"


class TransposedXlaTest(ProductContract):
  implementation = "xla"
  transposed = True


class CpuContract(ProductContract):
  """What the kernels promise besides."""

  def setUp(self):
    op_contract.only_on("cpu")
    super().setUp()

  def test_every_instruction_set(self):
    module = ffi.LIBRARY.load()
    rng = np.random.default_rng(13)
    try:
      for level, dtype in itertools.product(_levels(), _DTYPES):
        module.set_simd_level(level)
        self.assertEqual(module.simd_level(), level)
        for rows, k, n in _SHAPES:
          self.check(
            op_contract.array(rng, (rows, k), "float32"),
            op_contract.array(rng, (k, n), dtype),
          )
          self.check(
            op_contract.array(rng, (rows, k), dtype),
            op_contract.array(rng, (k, n), dtype),
            op_contract.array(rng, (n,), dtype),
          )
    finally:
      module.set_simd_level("auto")
    with self.assertRaisesRegex(ValueError, "`name` must be auto, baseline"):
      module.set_simd_level("mmx")

  def test_half_precision_is_rounded_once(self):
    rng = np.random.default_rng(14)
    x = op_contract.array(rng, (3, 200), "bfloat16")
    w = op_contract.array(rng, (200, 64), "bfloat16")
    bias = op_contract.array(rng, (64,), "bfloat16")
    wide = self.call(x, w, bias, preferred_element_type="float32")
    np.testing.assert_array_equal(
      self.call(x, w, bias), wide.astype("bfloat16")
    )

  def test_subnormal_numbers_count(self):
    tiny = np.float32(2.0**-130)
    w = jnp.full((4, 33), tiny)
    for dtype in ("float32", "bfloat16"):
      got = self.call(jnp.ones((1, 4)), w.astype(dtype))
      np.testing.assert_array_equal(np.asarray(got), 4 * tiny)
      got = self.call(jnp.full((2, 4), tiny, dtype), jnp.ones((4, 33), dtype))
      np.testing.assert_array_equal(np.asarray(got, np.float32), 4 * tiny)
    small = jnp.full((4, 33), 2.0**-24, "float16")
    for x in (jnp.ones((1, 4)), jnp.ones((3, 4), "float16")):
      got = self.call(x, small)
      np.testing.assert_array_equal(np.asarray(got, np.float32), 2.0**-22)

  def test_subnormal_numbers_count_among_many_rows_of_bfloat16(self):
    rng = np.random.default_rng(20)
    # Tiny numbers, and products and sums that are tiny where no number is.
    sizes = [(-130, 0), (0, -130), (-60, -68), (-57, -60), (-56, -56), (20, 4)]
    module = ffi.LIBRARY.load()
    try:
      for level, (of_x, of_w) in itertools.product(_levels(), sizes):
        module.set_simd_level(level)
        # The second half takes the first away, but for a little.
        x = op_contract.array(rng, (13, 40), "float32") * 2.0**of_x
        w = op_contract.array(rng, (40, 70), "float32") * 2.0**of_w
        x = np.concatenate([x, -x], 1).astype(jnp.bfloat16)
        w = np.concatenate([w, w + 2.0 ** (of_w - 8)], 0).astype(jnp.bfloat16)
        got = self.call(x, w, preferred_element_type="float32")
        most = np.abs(np.float64(x)) @ np.abs(np.float64(w))
        off = np.abs(np.asarray(got, np.float64) - _oracle(x, w))
        bound = 2.0**-22 * most + 80 * 2.0**-149
        self.assertLess((off / bound).max(), 1.0, (level, of_x, of_w))
    finally:
      module.set_simd_level("auto")

  def test_auto_takes_it_for_any_number_of_rows_where_pairs_are_multiplied(
    self,
  ):
    module = ffi.LIBRARY.load()
    x, w = jnp.ones((4096, 70), "bfloat16"), jnp.ones((70, 90), "bfloat16")
    table = w.T
    try:
      for level in _levels():
        module.set_simd_level(level)
        (choice,) = kernels.explain(kernels.matmul, x, w)
        want = "cpu" if level == "avx512_bf16" else "xla"
        self.assertEqual(choice.implementation, want, level)
        for operands, options in (
          ((x.astype("float32"), w), {}),
          ((x, w.astype("float16")), {}),
          ((x, table), {"transposed": True}),
        ):
          product = functools.partial(kernels.matmul, **options)
          (choice,) = kernels.explain(product, *operands)
          self.assertEqual(choice.implementation, "xla", level)
    finally:
      module.set_simd_level("auto")

  def test_results_do_not_depend_on_what_other_rows_there_are(self):
    rng = np.random.default_rng(15)
    x = op_contract.array(rng, (32, 64), "float32")
    w = op_contract.array(rng, (64, 96), "bfloat16")
    want = self.call(x, w)
    for rows in (1, 2, 8):
      np.testing.assert_array_equal(self.call(x[:rows], w), want[:rows])

  @parameterized.parameters(
    ({"dtype": "float64"}, "`x` is float64"),
    ({"rows": 0}, r"`x` of shape \(0, 8\) is empty"),
  )
  def test_explain_says_why_not(self, change, message):
    with jax.enable_x64(True):
      x = jnp.ones((change.get("rows", 1), 8), change.get("dtype", "float32"))
      (choice,) = kernels.explain(kernels.matmul, x, jnp.ones((8, 4)))
      self.assertEqual(choice.implementation, "xla")
      with self.assertRaisesRegex(ValueError, message):
        self.call(x, jnp.ones((8, 4), "float32"))

  def test_other_platforms_have_xla(self):
    x, w = jnp.ones((1, 8)), jnp.ones((8, 4))
    for platform in ("cuda", "tpu"):
      (choice,) = kernels.explain(kernels.matmul, x, w, platform=platform)
      self.assertEqual(choice.implementation, "xla")
      self.assertIn("Nothing else is written", choice.reason)


class MatmulCpuTest(CpuContract, MatmulContract):
  implementation = "cpu"
  target = ffi.TARGET_MULTIPLY


class TransposedCpuTest(CpuContract):
  implementation = "cpu"
  target = ffi.TARGET_MULTIPLY_TRANSPOSED
  transposed = True


class TransposedTest(parameterized.TestCase):
  @parameterized.parameters(
    ({"transposed": 1}, TypeError, "`transposed` must be"),
    ({"w": np.ones(3, "f4")}, ValueError, r"must have 2 axes \[n, k\], but"),
    (
      {"w": np.ones((3, 2), "f4")},
      ValueError,
      r"as the last of `w`, but their shapes are \(4, 3\) and \(3, 2\)",
    ),
    ({"bias": np.ones(3, "f4")}, ValueError, "for each row of `w`"),
  )
  def test_wrong_input_is_refused(self, change, error, message):
    arguments: dict[str, Any] = {
      "x": np.ones((4, 3), "f4"),
      "w": np.ones((2, 3), "f4"),
      "bias": np.ones(2, "f4"),
      "transposed": True,
    } | change
    with self.assertRaisesRegex(error, message):
      kernels.matmul(**arguments)

  def test_packed_weights_are_refused(self):
    packed = kernels.matmul.quantize(np.ones((64, 64), "f4"))
    with self.assertRaisesRegex(ValueError, "Pack the transpose"):
      kernels.matmul(np.ones((1, 64), "f4"), packed, transposed=True)


class AutoTest(parameterized.TestCase):
  """What "auto" takes on the CPU."""

  def setUp(self):
    op_contract.only_on("cpu")
    super().setUp()

  @parameterized.product(dtype=("bfloat16", "float16"), rows=(1, 4, 8, 32))
  def test_half_precision_of_a_real_model_is_the_kernels(self, dtype, rows):
    for k, n in arg_specs.BENCH_SHAPES:
      w = jax.ShapeDtypeStruct((k, n), dtype)
      x = jax.ShapeDtypeStruct((rows, k), dtype)
      (choice,) = kernels.explain(kernels.matmul, x, w)
      self.assertEqual(choice.implementation, "cpu", (k, n))

  def test_few_rows_of_float32_too_where_reading_takes_long(self):
    for rows, shape, name in (
      (1, (576, 1536), "cpu"),
      (4, arg_specs.LLAMA_1B, "cpu"),
      (1, arg_specs.LLAMA_1B, "xla"),
      (5, (576, 1536), "xla"),
      (32, arg_specs.LLAMA_1B, "cpu"),
      (33, arg_specs.LLAMA_1B, "xla"),
      (1, (8, 8), "xla"),
    ):
      w = jax.ShapeDtypeStruct(shape, "float32")
      x = jax.ShapeDtypeStruct((rows, shape[0]), "float32")
      (choice,) = kernels.explain(kernels.matmul, x, w)
      self.assertEqual(choice.implementation, name, (rows, shape))

  @parameterized.parameters(
    (1, "bfloat16", "cpu"),
    (1, "float16", "cpu"),
    (1, "float32", "xla"),
    (32, "bfloat16", "cpu"),
    (33, "bfloat16", "xla"),
    (8, "float32", "cpu"),
    (9, "float32", "xla"),
  )
  def test_tables_of_real_models(self, rows, dtype, name):
    run = functools.partial(kernels.matmul, transposed=True)
    for n, k in arg_specs.TABLES:
      x = jax.ShapeDtypeStruct((rows, k), dtype)
      (choice,) = kernels.explain(run, x, jax.ShapeDtypeStruct((n, k), dtype))
      self.assertEqual(choice.implementation, name, (n, k))

  @parameterized.parameters((16, "cpu"), (17, "xla"))
  def test_small_weights_of_4_bits(self, rows, name):
    packed = kernels.matmul.quantize(jnp.ones((576, 192)), bits=4)
    (choice,) = kernels.explain(kernels.matmul, jnp.ones((rows, 576)), packed)
    self.assertEqual(choice.implementation, name)

  def test_no_path_is_hidden(self):
    # Whichever runs, the numbers are those of the oracle.
    rng = np.random.default_rng(0)
    for rows, k, n in ((1, 4, 4), (64, 64, 64), (300, 128, 256)):
      x = op_contract.array(rng, (rows, k), "float32")
      w = op_contract.array(rng, (k, n), "float32")
      np.testing.assert_allclose(
        kernels.matmul(x, w), _oracle(x, w), rtol=1e-4, atol=1e-4
      )


if __name__ == "__main__":
  absltest.main()
