"""Every op inside a `shard_map` over some of a mesh's axes.

The compiler splits over the others. The numbers are those of one device, and
nothing that is split is gathered.
"""

from absl.testing import absltest, parameterized
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from kernels import batch_stat, decode_attention, kv_cache
import nnx
from tests.testing import devices, hlo

devices.use_cpu_devices(8)


def _random(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), "float32")


class PartialShardMapTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  def run_on(self, mesh, fn, manual, in_specs, out_specs, placed, *args):
    """Runs `fn` by hand over `manual`; the arguments lie as `placed` says."""
    mapped = jax.shard_map(
      fn,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names=set(manual),
    )
    args = [
      jax.device_put(arg, NamedSharding(mesh, spec))
      for arg, spec in zip(args, placed, strict=True)
    ]
    compiled = hlo.compiled(jax.jit(mapped).lower(*args))
    text = compiled.as_text()
    self.assertEmpty(hlo.instructions(text, "all-gather"))
    self.assertEmpty(hlo.instructions(text, "all-to-all"))
    return compiled(*args), text

  @parameterized.parameters(
    (("a",), P(("a", "b", "c"))),
    (("a",), P(("a", "c", "b"))),
    (("b",), P(("b", "c", "a"))),
    (("b",), P("b", "c", None, "a")),
    (("c",), P("c", ("b", "a"))),
    (("c",), P("c", "a", None, "b")),
    (("a", "c"), P(("a", "c"), "b")),
    (("c", "b"), P(("c", "b", "a"))),
    (("b",), P("b")),
  )
  def test_batch_stat(self, manual, placed):
    mesh = devices.auto_mesh((2, 2, 2), ("a", "b", "c"))
    x = _random(16, 4, 6, 8) + jnp.arange(16.0)[:, None, None, None]
    mean, var = jnp.zeros(8), jnp.ones(8)

    def run(x, mean, var):
      return batch_stat.update(
        x, mean, var, 0.5, axis_name=manual, implementation="cpu"
      )

    got, text = self.run_on(
      mesh, run, manual, (P(manual), P(), P()), P(), (placed, P(), P()),
      x, mean, var,
    )  # fmt: skip
    wide = np.asarray(x, np.float64)
    self.assertEqual(
      hlo.custom_calls(text, "fused_nnx_batch_stat_moments_1"), 1
    )
    np.testing.assert_allclose(got.batch_mean, wide.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(got.batch_var, wide.var((0, 1, 2)), rtol=1e-5)
    local = NamedSharding(mesh, placed).shard_shape(x.shape)
    self.assertIn(f"f32[{','.join(map(str, local))}]", text)

  def test_batch_stat_of_each_part_by_itself(self):
    mesh = devices.auto_mesh((2, 4), ("a", "b"))
    x = _random(16, 6, 8) + jnp.arange(16.0)[:, None, None]

    def run(x):
      out = batch_stat.update(
        x, jnp.zeros(8), jnp.ones(8), implementation="cpu"
      )
      return out.batch_mean[None]

    got, _ = self.run_on(mesh, run, "b", P("b"), P("b"), [P(("b", "a"))], x)
    want = np.asarray(x, np.float64).reshape(4, 24, 8).mean(1)
    np.testing.assert_allclose(got, want, rtol=1e-5)

  @parameterized.parameters("a", "b")
  def test_batch_norm_and_its_gradient(self, manual):
    mesh = devices.auto_mesh((2, 4), ("a", "b"))
    other = "b" if manual == "a" else "a"
    x, dy = _random(16, 6, 8) * 2 + 1, _random(16, 6, 8, seed=1)
    scale, bias = _random(8, seed=2), _random(8, seed=3)

    def loss(x, dy, scale, bias, axis_name, implementation):
      out = batch_stat.batch_norm(
        x, scale, bias, jnp.zeros(8), jnp.ones(8), 0.5, activation="relu",
        axis_name=axis_name, implementation=implementation,
      )  # fmt: skip
      total = jnp.sum(out.y * dy)
      return lax.psum(total, axis_name) if axis_name else total

    def grads(x, dy, scale, bias):
      grad = jax.grad(loss, argnums=(0, 2, 3))
      return grad(x, dy, scale, bias, manual, "cpu")

    got, text = self.run_on(
      mesh, grads, manual, (P(manual), P(manual), P(), P()),
      (P(manual), P(), P()),
      (P((manual, other)), P((manual, other)), P(), P()), x, dy, scale, bias,
    )  # fmt: skip
    want = jax.grad(loss, argnums=(0, 2, 3))(x, dy, scale, bias, None, "xla")
    for g, w in zip(got, want):
      np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4)
    self.assertEqual(
      hlo.custom_calls(text, "fused_nnx_batch_stat_grad_sums_1"), 1
    )

  @parameterized.parameters("a", "b")
  def test_module_with_batch_norm(self, manual):
    mesh = devices.auto_mesh((2, 4), ("a", "b"))
    x = _random(16, 6, 8) * 2 + 1

    def run(x, axis_name):
      norm = nnx.BatchNorm(
        8, use_running_average=False, axis_name=axis_name, rngs=nnx.Rngs(0)
      )
      y = norm(x)
      return y, norm.mean[...], norm.var[...]

    other = "b" if manual == "a" else "a"
    got, _ = self.run_on(
      mesh, lambda x: run(x, manual), manual, P(manual),
      (P(manual), P(), P()), [P((manual, other))], x,
    )  # fmt: skip
    for g, w in zip(got, run(x, None)):
      np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-5)

  # By hand over rows, heads or length; the compiler over what is left.
  @parameterized.product(
    spec=(
      ("a", "b", "c", "a"),
      ("a", "c", "b", "a"),
      ("a", "b", "c", "c"),
      ("c", "b", "a", "a"),
      (("a", "b"), None, "c", ("a", "b")),
      (("a", "b"), None, "c", "c"),
      (("c", "a"), "b", None, ("c", "a")),
      (None, ("b", "c"), "a", "a"),
    ),
    op=("update", "decode", "attend"),
  )
  def test_caches(self, spec, op):
    rows, slots, heads, by_hand = spec
    mesh = devices.auto_mesh((2, 2, 2), ("a", "b", "c"))
    b, s, t, n, g, h = 4, 16, 2, 4, 2, 8
    k, v = _random(b, s, n, h), _random(b, s, n, h, seed=1)
    q = _random(b, t, n * g, h, seed=2)
    new_k, new_v = (_random(b, t, n, h, seed=3 + i) for i in range(2))
    index = jnp.array([0, 3, 14, 9], jnp.int32)
    cache, new, each = P(rows, slots, heads), P(rows, None, heads), P(rows)

    def hand(spec):
      return P(*(entry if entry == by_hand else None for entry in spec))

    def run(k, v, q, new_k, new_v, index, implementation="cpu"):
      if op == "update":
        return kv_cache.update(
          k, v, new_k, new_v, index, implementation=implementation
        )
      if op == "decode":
        return decode_attention.decode_attention(
          k, v, q, new_k, new_v, index, implementation=implementation
        )
      return decode_attention.attend(
        k, v, q, index + t, return_lse=True, implementation=implementation
      )

    out = {
      "update": (cache,) * 2,
      "decode": (cache, cache, new),
      "attend": (new, P(rows, heads)),
    }[op]
    specs = (cache, cache, new, new, new, each)
    names = by_hand if isinstance(by_hand, tuple) else (by_hand,)
    got, text = self.run_on(
      mesh, run, names, tuple(map(hand, specs)), tuple(map(hand, out)),
      specs, k, v, q, new_k, new_v, index,
    )  # fmt: skip
    want = run(k, v, q, new_k, new_v, index, implementation="xla")
    for g, w in zip(got, want):
      np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6)
    local = NamedSharding(mesh, cache).shard_shape(k.shape)
    self.assertIn(f"f32[{','.join(map(str, local))}]", text)

  def test_explicit_axes_are_left(self):
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=kinds)
    x = _random(16, 6, 8) * 2 + 1

    def run(x):
      x = jax.reshard(x, P("b"))
      out = batch_stat.update(
        x, jnp.zeros(8), jnp.ones(8), axis_name="a", implementation="cpu"
      )
      return out.batch_mean, out.batch_var

    with jax.set_mesh(mesh):
      got, text = self.run_on(mesh, run, "a", P("a"), P(), [P("a")], x)
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(got[0], wide.mean((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(got[1], wide.var((0, 1)), rtol=1e-5)
    self.assertIn("f32[2,6,8]", text)


if __name__ == "__main__":
  absltest.main()
