"""kernels.matmul on several devices: same numbers, and no gathered weights."""

import contextlib

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

import kernels
from kernels.matmul import ffi
from tests.testing import devices, hlo, op_contract

devices.use_cpu_devices(8)

ROWS, K, N = 24, 32, 64


def _inputs():
  rng = np.random.default_rng(0)
  return (
    op_contract.array(rng, (ROWS, K), "float32"),
    op_contract.array(rng, (K, N), "float32"),
    op_contract.array(rng, (N,), "float32"),
  )


def _want(x, w, bias):
  return np.asarray(x, np.float64) @ np.asarray(w, np.float64) + np.asarray(
    bias, np.float64
  )


class MatmulShardingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  @parameterized.product(
    specs=(
      (P("a"), P()),
      (P(("a", "b")), P()),
      (P(), P(None, "a")),
      (P(), P(None, ("a", "b"))),
      (P(), P("a")),
      (P(None, "a"), P("a")),
      (P("b"), P("a")),
      (P("b"), P(None, "a")),
      (P("a"), P("a")),  # rows and k want the same devices
      (P("a"), P(None, "a")),
      (P(None, "a"), P(None, "a")),
      (P(None, "b"), P("a", "b")),
      (P(), P("b", "a")),
      (P(), P(("a", "b"))),
      (P(), P()),
    ),
    implementation=("cpu", "xla"),
  )
  def test_jit_over_named_shardings(self, specs, implementation):
    mesh = devices.auto_mesh((4, 2), ("a", "b"))
    x, w, bias = _inputs()
    want = _want(x, w, bias)
    x = jax.device_put(x, NamedSharding(mesh, specs[0]))
    w = jax.device_put(w, NamedSharding(mesh, specs[1]))

    def run(x, w, bias):
      return kernels.matmul(x, w, bias, implementation=implementation)

    compiled = jax.jit(run).lower(x, w, bias).compile()
    np.testing.assert_allclose(compiled(x, w, bias), want, rtol=1e-4, atol=1e-4)
    if implementation != "cpu":
      return
    text = compiled.as_text()
    self.assertEqual(hlo.custom_calls(text, ffi.TARGET_MULTIPLY), 1)
    # x is smaller: it moves, and w does not.
    for rows in (K, K // 2, K // 4, K // 8):
      for columns in (N, N // 2, N // 4, N // 8):
        self.assertEmpty(hlo.instructions(text, "all-gather", (rows, columns)))

  @parameterized.product(
    specs=(
      (P("a"), P()),
      (P(), P("a")),
      (P(None, "b"), P("a", "b")),
      (P("b"), P(None, "a")),
      (P(), P("b", "a")),
    ),
    implementation=("cpu", "xla"),
    kind=(AxisType.Auto, AxisType.Explicit),
  )
  def test_a_transposed_matrix(self, specs, implementation, kind):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind, kind))
    x, w, bias = _inputs()
    want = _want(x, w, bias)

    def run(x, w, bias):
      return kernels.matmul(
        x, w, bias, transposed=True, implementation=implementation
      )

    with jax.set_mesh(mesh):
      x = jax.device_put(x, NamedSharding(mesh, specs[0]))
      w = jax.device_put(w.T, NamedSharding(mesh, specs[1]))
      bias = jax.device_put(bias, NamedSharding(mesh, P()))
      compiled = jax.jit(run).lower(x, w, bias).compile()
      got = compiled(x, w, bias)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    text = compiled.as_text()
    if implementation == "cpu":
      target = ffi.TARGET_MULTIPLY_TRANSPOSED
      self.assertEqual(hlo.custom_calls(text, target), 1)
      for columns in (N, N // 2, N // 4, N // 8):
        for rows in (K, K // 2, K // 4, K // 8):
          self.assertEmpty(
            hlo.instructions(text, "all-gather", (columns, rows))
          )

  @parameterized.product(
    specs=(
      (P(), P("a")),
      (P("b"), P(None, "a")),
      (P(None, "a"), P("a", "b")),
      (P(), P(("a", "b"))),  # more parts than groups
      (P("a"), P()),
    ),
    kind=({"bits": 8}, {"bits": 4}, {"bits": 8, "group": None}),
    implementation=("cpu", "xla"),
  )
  def test_packed_weights(self, specs, kind, implementation):
    mesh = devices.auto_mesh((4, 2), ("a", "b"))
    rng = np.random.default_rng(3)
    x = op_contract.array(rng, (ROWS, 128), "float32")
    bias = op_contract.array(rng, (N,), "float32")
    w = kernels.matmul.quantize(
      op_contract.array(rng, (128, N), "float32"), **{"group": 32} | kind
    )
    want = _want(x, kernels.matmul.dequantize(w), bias)
    x = jax.device_put(x, NamedSharding(mesh, specs[0]))
    values = jax.device_put(w.values, NamedSharding(mesh, specs[1]))
    w = kernels.matmul.QuantizedWeight(values, w.scale, w.minimum)
    run = jax.jit(
      lambda *args: kernels.matmul(*args, implementation=implementation)
    )
    compiled = run.lower(x, w, bias).compile()
    np.testing.assert_allclose(compiled(x, w, bias), want, rtol=1e-4, atol=1e-3)
    if implementation == "cpu":
      text = compiled.as_text()
      target = ffi.TARGET_MULTIPLY_PACKED
      self.assertEqual(hlo.custom_calls(text, target), 1)
      if specs[1] != P(("a", "b")):
        for line in hlo.instructions(text, "all-gather"):
          self.assertNotRegex(line.split("=")[1], "s8|u32")

  def test_many_rows_stay_and_the_weights_move(self):
    mesh = devices.auto_mesh((8,), ("a",))
    rng = np.random.default_rng(1)
    x = op_contract.array(rng, (512, K), "float32")
    _, w, bias = _inputs()
    want = _want(x, w, bias)
    x = jax.device_put(x, NamedSharding(mesh, P("a")))
    w = jax.device_put(w, NamedSharding(mesh, P("a")))
    run = jax.jit(lambda *a: kernels.matmul(*a, implementation="cpu"))
    compiled = run.lower(x, w, bias).compile()
    got = compiled(x, w, bias)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    self.assertEqual(got.addressable_shards[0].data.shape, (64, N))
    self.assertEmpty(hlo.instructions(compiled.as_text(), "all-reduce"))

  @parameterized.parameters("bfloat16", "float16")
  def test_sums_cross_devices_before_they_are_rounded(self, dtype):
    mesh = devices.auto_mesh((8,), ("a",))
    x, w, bias = (array.astype(dtype) for array in _inputs())
    want = kernels.matmul(
      x, w, bias, preferred_element_type="float32", implementation="xla"
    )
    w = jax.device_put(w, NamedSharding(mesh, P("a")))
    got = jax.jit(lambda *a: kernels.matmul(*a, implementation="cpu"))(
      x, w, bias
    )
    self.assertEqual(got.dtype, dtype)
    off = np.asarray(got, np.float32) - np.asarray(want)
    self.assertLess(
      np.abs(off).max(), {"bfloat16": 2**-8, "float16": 2**-11}[dtype] * 64
    )

  @parameterized.parameters(7, 12)
  def test_parts_that_are_not_even(self, size):
    mesh = devices.auto_mesh((8,), ("a",))
    x, w, bias = _inputs()
    sharding = NamedSharding(mesh, P("a"))

    @jax.jit
    def run(x, w, bias):
      part = jax.lax.with_sharding_constraint(x[:size], sharding)
      return kernels.matmul(part, w, bias, implementation="cpu")

    got = run(jax.device_put(jnp.tile(x, (2, 1)), sharding), w, bias)
    want = _want(jnp.tile(x, (2, 1))[:size], w, bias)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

  @parameterized.product(check_vma=(True, False), implementation=("cpu", "xla"))
  def test_shard_map(self, check_vma, implementation):
    mesh = devices.auto_mesh((8,), ("a",))
    x, w, bias = _inputs()

    def run(x, w, bias):
      y = kernels.matmul(x, w, implementation=implementation)
      return jax.lax.psum(y, "a") + bias

    mapped = jax.jit(
      jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(P(None, "a"), P("a"), P()),
        out_specs=P(),
        check_vma=check_vma,
      )
    )
    compiled = mapped.lower(x, w, bias).compile()
    np.testing.assert_allclose(
      compiled(x, w, bias), _want(x, w, bias), rtol=1e-4, atol=1e-4
    )
    self.assertEmpty(hlo.instructions(compiled.as_text(), "all-gather"))

  @parameterized.parameters("cpu", "xla")
  def test_shard_map_over_one_of_two_axes(self, implementation):
    mesh = devices.auto_mesh((4, 2), ("a", "b"))
    x, w, bias = _inputs()
    w = jax.device_put(w, NamedSharding(mesh, P("b", None)))
    run = jax.jit(
      jax.shard_map(
        lambda *args: kernels.matmul(*args, implementation=implementation),
        mesh=mesh,
        in_specs=(P("a"), P(), P()),
        out_specs=P("a"),
        axis_names={"a"},
      )
    )
    np.testing.assert_allclose(
      run(x, w, bias), _want(x, w, bias), rtol=1e-4, atol=1e-4
    )

  @parameterized.product(
    implementation=("cpu", "xla"),
    set_mesh=(False, True),
    specs=(
      (P("a"), P(None, "b"), P("a", "b")),
      (P(), P(None, "a"), P(None, "a")),
      (P(None, "a"), P("a", None), P(None, None)),
      (P("b", "a"), P("a", None), P("b", None)),
    ),
  )
  def test_explicit_mesh(self, implementation, set_mesh, specs):
    mesh = jax.make_mesh(
      (4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2
    )
    x, w, bias = _inputs()
    want = _want(x, w, bias)
    x = jax.device_put(x, NamedSharding(mesh, specs[0]))
    w = jax.device_put(w, NamedSharding(mesh, specs[1]))
    bias = jax.device_put(bias, NamedSharding(mesh, P()))

    @jax.jit
    def run(x, w, bias):
      out = kernels.matmul(x, w, bias, implementation=implementation)
      self.assertEqual(jax.typeof(out).sharding.spec, specs[2])
      return out

    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
      compiled = run.lower(x, w, bias).compile()
      np.testing.assert_allclose(
        compiled(x, w, bias), want, rtol=1e-4, atol=1e-4
      )
    self.assertEmpty(hlo.instructions(compiled.as_text(), "all-gather"))

  @parameterized.parameters("cpu", "xla")
  def test_gradients_of_sharded_arrays(self, implementation):
    mesh = devices.auto_mesh((4, 2), ("a", "b"))
    x, w, bias = _inputs()

    def loss(x, w, bias):
      return jnp.sum(
        jnp.sin(kernels.matmul(x, w, bias, implementation=implementation))
      )

    want = jax.grad(loss, (0, 1, 2))(x, w, bias)
    x = jax.device_put(x, NamedSharding(mesh, P("a")))
    w = jax.device_put(w, NamedSharding(mesh, P(None, "b")))
    got = jax.jit(jax.grad(loss, (0, 1, 2)))(x, w, bias)
    for a, b in zip(got, want):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)

  def test_vmapped_matrices_stay_apart(self):
    mesh = devices.auto_mesh((8,), ("a",))
    rng = np.random.default_rng(2)
    x = op_contract.array(rng, (8, 3, K), "float32")
    w = op_contract.array(rng, (8, K, N), "float32")
    want = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    x, w = jax.device_put((x, w), NamedSharding(mesh, P("a")))
    run = jax.jit(
      jax.vmap(lambda x, w: kernels.matmul(x, w, implementation="cpu"))
    )
    compiled = run.lower(x, w).compile()
    np.testing.assert_allclose(compiled(x, w), want, rtol=1e-4, atol=1e-4)
    self.assertEmpty(hlo.instructions(compiled.as_text(), "all-gather"))


if __name__ == "__main__":
  absltest.main()
