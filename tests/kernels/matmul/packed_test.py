"""Contract of `kernels.matmul` with packed weights, and of packing them."""

import itertools

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import kernels
from kernels.matmul import ffi
from tests.testing import op_contract, tolerances

matmul = kernels.matmul

_KINDS = (
  {"bits": 8, "group": 32},
  {"bits": 8, "group": 64},
  {"bits": 8, "group": None},
  {"bits": 4, "group": 32},
  {"bits": 4, "group": 128},
  {"bits": 4, "group": None},
  {"dtype": "float8_e4m3fn", "group": 64},
  {"dtype": "float8_e4m3fn", "group": None},
)
_SHAPES = ((1, 128, 64), (1, 256, 53), (2, 128, 1), (33, 128, 200))


def _weights(rng, k, n, kind, lead=()):
  w = op_contract.array(rng, (*lead, k, n), "float32") + 0.5
  return matmul.quantize(w, **kind)


def _layer(packed, i):
  return matmul.QuantizedWeight(
    packed.values[i],
    packed.scale[i],
    None if packed.minimum is None else packed.minimum[i],
  )


def _matrix(packed):
  """Unpacks weights, in float64, as the README says that they lie."""
  values = np.asarray(packed.values)
  if packed.minimum is not None:
    k8, n = values.shape
    values = np.stack([(values >> (4 * i)) & 15 for i in range(8)], 1)
    values = values.reshape(8 * k8, n)
  scale = np.repeat(np.float64(packed.scale), packed.group, 0)
  out = values.astype(np.float64) * scale
  if packed.minimum is not None:
    out += np.repeat(np.float64(packed.minimum), packed.group, 0)
  return out


class PackedContract(op_contract.OpContract):
  """What every implementation promises."""

  def make_case(self):
    rng = np.random.default_rng(0)
    return (
      op_contract.array(rng, (3, 2, 64), "float32"),
      _weights(rng, 64, 50, {"bits": 4, "group": 32}),
      op_contract.array(rng, (50,), "float32"),
    )

  def call(self, *args, **options):
    return matmul(*args, implementation=self.implementation, **options)

  def check(self, x, packed, bias=None):
    got = self.call(x, packed, bias)
    self.assertEqual(got.dtype, x.dtype)
    w = _matrix(packed)
    want = np.float64(x) @ w
    if bias is not None:
      want = want + np.float64(bias)
    # What is added to numbers of 4 bits to read them, 16 steps of the scale.
    offset = 16 * np.repeat(np.float64(packed.scale), packed.group, 0)
    offset *= packed.bits == 4
    tolerances.assert_close(
      got,
      want,
      x.dtype,
      reduced=x.shape[-1],
      factor=1.0,
      scale=float((np.abs(np.float64(x)) @ (np.abs(w) + offset)).max()),
    )

  @parameterized.parameters(*_KINDS)
  def test_matches_the_oracle(self, **kind):
    rng = np.random.default_rng(1)
    dtypes = itertools.cycle(("float32", "bfloat16", "float16"))
    for (rows, k, n), dtype in zip(_SHAPES, dtypes):
      x = op_contract.array(rng, (rows, k), dtype)
      packed = _weights(rng, k, n, kind)
      self.check(x, packed)
      self.check(x, packed, op_contract.array(rng, (n,), dtype))

  @parameterized.parameters(*_KINDS)
  def test_vmap_over_x_and_over_weights(self, **kind):
    rng = np.random.default_rng(2)
    packed = _weights(rng, 128, 20, kind, lead=(3,))
    x = op_contract.array(rng, (3, 2, 128), "float32")
    got = jax.vmap(self.call)(x, packed)
    shared = _layer(packed, 0)
    rows = jax.vmap(self.call, (0, None))(x, shared)
    for i in range(3):
      one = _layer(packed, i)
      want = np.float64(x[i]) @ _matrix(one)
      np.testing.assert_allclose(got[i], want, rtol=1e-4, atol=1e-3)
      want = np.float64(x[i]) @ _matrix(shared)
      np.testing.assert_allclose(rows[i], want, rtol=1e-4, atol=1e-3)

  @parameterized.parameters(*_KINDS)
  def test_gradients(self, **kind):
    rng = np.random.default_rng(3)
    packed = _weights(rng, 128, 20, kind)
    x = op_contract.array(rng, (2, 128), "float32")
    bias = op_contract.array(rng, (20,), "float32")
    weight = op_contract.array(rng, (2, 20), "float32")

    def loss(x, bias):
      return jnp.vdot(weight, self.call(x, packed, bias))

    dx, dbias = jax.jit(jax.grad(loss, (0, 1)))(x, bias)
    want = np.float64(weight) @ _matrix(packed).T
    np.testing.assert_allclose(dx, want, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(dbias, np.float64(weight).sum(0), rtol=1e-5)

  def test_gradient_for_the_scale(self):
    rng = np.random.default_rng(4)
    packed = _weights(rng, 64, 20, {"bits": 8})
    x = op_contract.array(rng, (2, 64), "float32")

    def loss(scale):
      w = matmul.QuantizedWeight(packed.values, scale)
      return jnp.sum(self.call(x, w))

    got = jax.grad(loss)(packed.scale)
    want = (np.float64(x) @ np.float64(packed.values)).sum(0)
    tolerances.assert_close(got[0], want, "bfloat16")

  def test_scan_over_packed_layers(self):
    rng = np.random.default_rng(5)
    packed = _weights(rng, 64, 64, {"bits": 8}, lead=(4,))
    x = op_contract.array(rng, (2, 64), "float32") / 8

    @jax.jit
    def run(x, packed):
      return jax.lax.scan(lambda x, w: (self.call(x, w) / 16, None), x, packed)[
        0
      ]

    want = np.float64(x)
    for i in range(4):
      want = want @ _matrix(_layer(packed, i)) / 16
    np.testing.assert_allclose(run(x, packed), want, rtol=1e-4, atol=1e-5)


class PackedXlaTest(PackedContract):
  implementation = "xla"


class PackedCpuTest(PackedContract):
  implementation = "cpu"
  target = ffi.TARGET_MULTIPLY_PACKED

  def setUp(self):
    op_contract.only_on("cpu")
    super().setUp()

  def test_every_instruction_set(self):
    module = ffi.LIBRARY.load()
    rng = np.random.default_rng(6)
    levels = ["baseline", "avx2", "avx512", "avx512_bf16"]
    try:
      for level, kind in itertools.product(levels, _KINDS):
        try:
          module.set_simd_level(level)
        except ValueError:
          print(f"no {level} on this machine: NOT run")
          continue
        for (rows, k, n), dtype in itertools.product(
          _SHAPES, ("float32", "bfloat16")
        ):
          x = op_contract.array(rng, (rows, k), dtype)
          self.check(x, _weights(rng, k, n, kind))
    finally:
      module.set_simd_level("auto")

  def test_every_code_of_float8(self):
    codes = np.arange(256, dtype=np.uint8)
    values = jax.lax.bitcast_convert_type(codes, "float8_e4m3fn")[None]
    packed = matmul.QuantizedWeight(values, jnp.ones((1, 256), "bfloat16"))
    got = self.call(jnp.ones((1, 1)), packed)
    np.testing.assert_array_equal(got, np.asarray(values, np.float32))

  def test_auto_takes_it_for_few_rows(self):
    rng = np.random.default_rng(7)
    packed = _weights(rng, 128, 64, {"bits": 4})
    for rows, name in ((1, "cpu"), (4096, "xla")):
      (choice,) = kernels.explain(matmul, jnp.ones((rows, 128)), packed)
      self.assertEqual(choice.implementation, name)


class QuantizeTest(parameterized.TestCase):
  @parameterized.parameters(*_KINDS)
  def test_error_is_within_half_a_step(self, **kind):
    rng = np.random.default_rng(8)
    w = op_contract.array(rng, (256, 40), "float32") * 3 + 1
    packed = matmul.quantize(w, **kind)
    self.assertEqual(packed.shape, (256, 40))
    self.assertEqual(packed.group, kind["group"] or 256)
    back = np.asarray(matmul.dequantize(packed))
    np.testing.assert_allclose(back, _matrix(packed), rtol=1e-6, atol=1e-6)
    step = np.repeat(np.float32(packed.scale), packed.group, 0)
    off = np.abs(back - w)
    if "dtype" in kind:
      step = np.maximum(step * 2.0**-9, np.abs(w) * 2.0**-3)
    self.assertLess((off / step).max(), 0.501)
    error = float(matmul.quantization_error(w, packed))
    want = np.sqrt(np.mean(off**2) / np.mean(np.square(w)))
    self.assertAlmostEqual(error, want, places=5)

  def test_errors_of_normal_numbers(self):
    w = op_contract.array(np.random.default_rng(9), (4096, 64), "float32")

    def error(**kind):
      return float(matmul.quantization_error(w, matmul.quantize(w, **kind)))

    self.assertLess(error(bits=8), 0.007)
    self.assertLess(error(dtype="float8_e4m3fn"), 0.03)
    self.assertLess(error(bits=4, group=32), 0.081)
    self.assertLess(error(bits=4, group=32), error(bits=4, group=128))

  def test_packing_what_was_packed_changes_nothing(self):
    w = op_contract.array(np.random.default_rng(10), (64, 9), "float32")
    once = matmul.dequantize(matmul.quantize(w))
    twice = matmul.dequantize(matmul.quantize(once))
    np.testing.assert_allclose(twice, once, atol=0.02)

  @parameterized.parameters(*_KINDS)
  def test_constant_groups(self, **kind):
    for value in (0.0, 1.5, -1.5):
      packed = matmul.quantize(jnp.full((128, 3), value), **kind)
      back = matmul.dequantize(packed)
      np.testing.assert_allclose(back, value, rtol=0.01)

  def test_bytes(self):
    w = jnp.zeros((256, 64))
    sizes = {
      "int8": matmul.quantize(w).nbytes,
      "int4": matmul.quantize(w, bits=4, group=32).nbytes,
    }
    self.assertEqual(sizes, {"int8": 256 * 64 + 512, "int4": 128 * 64 + 2048})

  def test_it_is_a_pytree(self):
    packed = matmul.quantize(jnp.ones((64, 3)), bits=4)
    leaves, treedef = jax.tree.flatten(packed)
    self.assertLen(leaves, 3)
    again = jax.jit(lambda w: w)(jax.tree.unflatten(treedef, leaves))
    self.assertEqual(op_contract.bits(again), op_contract.bits(packed))
    self.assertLen(jax.tree.leaves(matmul.quantize(jnp.ones((64, 3)))), 2)
    self.assertEqual((packed.bits, packed.ndim), (4, 2))

  @parameterized.parameters(
    ({"w": np.ones((64, 2), int)}, TypeError, "`w` must be floating"),
    ({"w": np.ones(64, "f4")}, ValueError, r"at least 2 axes \[k, n\]"),
    ({"bits": 5}, ValueError, "`bits` must be 8 or 4"),
    ({"group": 16}, ValueError, "`group` must be 32 or 64 or 128"),
    ({"w": np.ones((65, 2), "f4")}, ValueError, "a multiple of 64 rows"),
    (
      {"w": np.ones((60, 2), "f4"), "bits": 4, "group": None},
      ValueError,
      "a multiple of 8 rows for 4 bits",
    ),
    ({"dtype": "int4"}, ValueError, "`dtype` must be float8_e4m3fn"),
    ({"dtype": "float8_e4m3fn", "bits": 4}, ValueError, "None for 4 bits"),
    ({"dtype": "nothing"}, TypeError, "`dtype` must be a dtype"),
  )
  def test_wrong_options_are_refused(self, change, error, message):
    options = {"w": np.ones((64, 2), "f4")} | change
    with self.assertRaisesRegex(error, message):
      matmul.quantize(options.pop("w"), **options)

  @parameterized.parameters(
    ({"values": jnp.ones((64, 2), "int16")}, TypeError, "must be int8 or"),
    ({"minimum": jnp.ones((1, 2), "bfloat16")}, TypeError, "must be uint32"),
    ({"scale": jnp.ones((1, 2))}, TypeError, "`w.scale` must be bfloat16"),
    ({"scale": jnp.ones((3, 2), "bfloat16")}, ValueError, "a row for each"),
    ({"scale": jnp.ones((1, 3), "bfloat16")}, ValueError, "a row for each"),
    ({"values": jnp.ones((2, 64, 2), "int8")}, ValueError, "a row for each"),
  )
  def test_wrong_arrays_are_refused(self, change, error, message):
    right = matmul.quantize(jnp.ones((64, 2)))
    arrays = {"values": right.values, "scale": right.scale} | change
    with self.assertRaisesRegex(error, message):
      matmul(jnp.ones((1, 64)), matmul.QuantizedWeight(**arrays))

  @parameterized.parameters(1, 2, 3, 6, 33)
  def test_groups_that_the_kernel_would_not_see_are_refused(self, group):
    weights = matmul.QuantizedWeight(
      jnp.ones((66, 2), jnp.int8), jnp.ones((66 // group, 2), jnp.bfloat16)
    )
    with self.assertRaisesRegex(ValueError, f"of a multiple of 4.*of {group}"):
      matmul(jnp.ones((2, 66)), weights)

  def test_one_group_may_have_any_size(self):
    values = np.arange(-66, 66).astype(np.int8).reshape(66, 2)
    weights = matmul.QuantizedWeight(
      jnp.asarray(values), jnp.ones((1, 2), jnp.bfloat16)
    )
    x = np.arange(132.0, dtype=np.float32).reshape(2, 66)
    np.testing.assert_allclose(matmul(x, weights), x @ values, 1e-5)

  def test_other_things_are_not_packed_weights(self):
    with self.assertRaisesRegex(TypeError, "must be a QuantizedWeight"):
      matmul.dequantize(jnp.ones((3, 3)))


if __name__ == "__main__":
  absltest.main()
