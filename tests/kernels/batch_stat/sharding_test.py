"""batch_stat on several devices: same numbers, and no gathered batch."""

import contextlib
import functools

from absl.testing import absltest, parameterized
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from kernels import batch_stat
from kernels.batch_stat import ffi
from tests.testing import devices, hlo, op_contract, oracles

devices.use_cpu_devices(8)

SHAPE = (16, 4, 6, 8)


def _inputs(dtype="float32"):
  rng = np.random.default_rng(0)
  x = op_contract.array(rng, SHAPE, dtype) + 5
  return x, jnp.full(8, 4.0), jnp.ones(8)


class UpdateShardingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  @parameterized.product(
    spec=(
      P("a"),
      P(("a", "b")),
      P("a", None, None, "b"),
      P(None, "a"),
      P("b", "a"),
      P(None, None, None, ("a", "b")),
      P(),
    ),
    implementation=("cpu", "xla"),
    masked=(False, True),
  )
  def test_jit_over_named_shardings(self, spec, implementation, masked):
    mesh = devices.auto_mesh((4, 2), ("a", "b"))
    x, mean, var = _inputs()
    mask = np.random.default_rng(1).random((16, 4, 6, 1)) < 0.6
    mask = mask if masked else None
    x = jax.device_put(x, NamedSharding(mesh, spec))

    def run(x, mean, var):
      return batch_stat.update(
        x, mean, var, 0.5, mask=mask, implementation=implementation
      )

    step = jax.jit(run, donate_argnums=(1, 2))
    compiled = step.lower(x, mean, var).compile()
    text = compiled.as_text()
    self.assertEmpty(hlo.instructions(text, "all-gather", SHAPE))
    if spec and implementation == "cpu":
      local = x.addressable_shards[0].data.shape
      for line in hlo.instructions(text, "all-gather"):
        self.assertNotIn(f"{local[1]},{local[2]}", line)
    got = compiled(x, mean, var)
    want = oracles.batch_norm(x, mask=mask)
    np.testing.assert_allclose(got.batch_mean, want.mean, rtol=1e-5)
    np.testing.assert_allclose(got.batch_var, want.var, rtol=1e-4)
    np.testing.assert_allclose(got.mean, 2 + want.mean / 2, rtol=1e-5)

  def test_the_kernel_runs_on_every_part(self):
    mesh = devices.auto_mesh((8,), ("a",))
    x, mean, var = _inputs()
    x = jax.device_put(x, NamedSharding(mesh, P("a")))
    run = jax.jit(lambda *args: batch_stat.update(*args, implementation="cpu"))
    text = run.lower(x, mean, var).compile().as_text()
    self.assertEqual(hlo.custom_calls(text, ffi.TARGET_MOMENTS), 1)
    self.assertLen(hlo.instructions(text, "all-reduce"), 1)
    self.assertEmpty(hlo.instructions(text, "all-gather"))

  @parameterized.product(
    masked=(False, True), route=("compiler", "shard_map", "vmap")
  )
  def test_nothing_cancels(self, masked, route):
    mesh = devices.auto_mesh((8,), ("a",))
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(1000, 0.01, (16, 4, 6, 8)), "float32")
    mask = np.ones((16, 4, 6, 1), bool)
    if masked:
      mask = rng.random(mask.shape) < 0.6
      mask[:4] = False  # two devices without values

    def run(x, mask, axis_name=None):
      out = batch_stat.update(
        x, jnp.zeros(8), jnp.ones(8), mask=mask, axis_name=axis_name,
        implementation="cpu",
      )  # fmt: skip
      return out.batch_mean, out.batch_var

    by_hand = functools.partial(run, axis_name="a")
    if route == "compiler":
      args = jax.device_put((x, mask), NamedSharding(mesh, P("a")))
      got = jax.jit(run)(*args)
    elif route == "shard_map":
      split = (P("a"), P("a"))
      mapped = jax.shard_map(by_hand, mesh=mesh, in_specs=split, out_specs=P())
      got = jax.jit(mapped)(x, mask)
    else:
      parts = (a.reshape(8, 2, *a.shape[1:]) for a in (x, mask))
      got = jax.jit(jax.vmap(by_hand, axis_name="a"))(*parts)
      got = [a[0] for a in got]
    want = oracles.batch_norm(np.asarray(x, np.float64), mask=mask)
    np.testing.assert_allclose(got[0], want.mean, rtol=1e-7)
    np.testing.assert_allclose(got[1], want.var, rtol=1e-3)

  def test_more_parts_than_are_sent_at_once(self):
    x = op_contract.array(np.random.default_rng(4), (80, 3, 4), "float32") + 9

    def run(x):
      return batch_stat.update(
        x, jnp.zeros(4), jnp.ones(4), axis_name="a", implementation="cpu"
      )

    got = jax.jit(jax.vmap(run, axis_name="a"))(x)
    wide = np.asarray(x, np.float64).reshape(-1, 4)
    np.testing.assert_allclose(got.batch_mean[7], wide.mean(0), rtol=1e-5)
    np.testing.assert_allclose(got.batch_var[7], wide.var(0), rtol=1e-4)

  def test_parts_that_are_not_even(self):
    mesh = devices.auto_mesh((8,), ("a",))
    x, mean, var = _inputs()

    @jax.jit
    def run(x):
      x = lax.with_sharding_constraint(x * 2, NamedSharding(mesh, P("a")))
      part = lax.with_sharding_constraint(x[:13], NamedSharding(mesh, P("a")))
      return batch_stat.update(part, mean, var, implementation="cpu")

    got = run(jax.device_put(x, NamedSharding(mesh, P("a"))))
    want = oracles.batch_norm(2 * np.asarray(x)[:13])
    np.testing.assert_allclose(got.batch_mean, want.mean, rtol=1e-5)
    np.testing.assert_allclose(got.batch_var, want.var, rtol=1e-4)

  @parameterized.product(
    implementation=("cpu", "xla"), masked=(False, True), check_vma=(True, False)
  )
  def test_shard_map_joins_over_the_axis_name(
    self, implementation, masked, check_vma
  ):
    mesh = devices.auto_mesh((8,), ("a",))
    x, mean, var = _inputs()
    mask = np.ones((16, 1, 1, 1), bool)
    if masked:
      mask = np.random.default_rng(2).random((16, 1, 1, 1)) < 0.5
      mask[:2] = False  # a device without values

    def run(x, mask, mean, var):
      return batch_stat.update(
        x,
        mean,
        var,
        mask=mask if masked else None,
        axis_name="a",
        implementation=implementation,
      )

    mapped = jax.jit(
      jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(P("a"), P("a"), P(), P()),
        out_specs=P(),
        check_vma=check_vma,
      )
    )
    compiled = mapped.lower(x, mask, mean, var).compile()
    got = compiled(x, mask, mean, var)
    want = oracles.batch_norm(x, mask=mask)
    np.testing.assert_allclose(got.batch_mean, want.mean, rtol=1e-5)
    np.testing.assert_allclose(got.batch_var, want.var, rtol=1e-4)
    self.assertEmpty(hlo.instructions(compiled.as_text(), "all-gather"))

  def test_shard_map_without_a_name_stays_local(self):
    mesh = devices.auto_mesh((8,), ("a",))
    x, mean, var = _inputs()
    got = jax.shard_map(
      lambda x: batch_stat.update(
        x, mean, var, implementation="cpu"
      ).batch_mean[None],
      mesh=mesh,
      in_specs=P("a"),
      out_specs=P("a"),
    )(x)
    want = np.asarray(x, np.float64).reshape(8, -1, 8).mean(1)
    np.testing.assert_allclose(got, want, rtol=1e-5)

  @parameterized.parameters("cpu", "xla")
  def test_groups_are_apart(self, implementation):
    mesh = devices.auto_mesh((8,), ("a",))
    x, mean, var = _inputs()
    mapped = jax.shard_map(
      lambda x: batch_stat.update(
        x,
        mean,
        var,
        axis_name="a",
        axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]],
        implementation=implementation,
      ).batch_var[None],
      mesh=mesh,
      in_specs=P("a"),
      out_specs=P("a"),
      check_vma=False,
    )
    got = jax.jit(mapped)(x)
    halves = np.asarray(x, np.float64).reshape(2, -1, 8)
    np.testing.assert_allclose(got[0], halves[0].var(0), rtol=1e-4)
    np.testing.assert_allclose(got[7], halves[1].var(0), rtol=1e-4)

  def test_gradient_crosses_devices(self):
    mesh = devices.auto_mesh((8,), ("a",))
    x, mean, var = _inputs()
    weight = jnp.arange(8.0)

    def loss(x, axis_name=None):
      out = batch_stat.update(
        x, mean, var, axis_name=axis_name, implementation="cpu"
      )
      return jnp.vdot(weight, out.batch_var + out.mean)

    mapped = jax.shard_map(
      lambda x: loss(x, "a"), mesh=mesh, in_specs=P("a"), out_specs=P()
    )
    want = jax.jit(jax.grad(loss))(x)
    got = jax.jit(jax.grad(mapped))(x)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
    sharded = jax.device_put(x, NamedSharding(mesh, P("a")))
    got = jax.jit(jax.grad(loss))(sharded)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)


def _train_case():
  rng = np.random.default_rng(5)
  x = op_contract.array(rng, SHAPE, "float32") + 1
  dy = op_contract.array(rng, SHAPE, "float32")
  scale = op_contract.array(rng, (8,), "float32")
  bias = op_contract.array(rng, (8,), "float32")
  mask = rng.random((16, 4, 6, 1)) < 0.6
  mask[:2] = False  # a device without values
  return x, dy, scale, bias, mask


def _grads(x, dy, scale, bias, mask, implementation, axis_name=None, **options):
  """Returns y, running mean, and gradients of a loss that uses both."""

  def loss(x, scale, bias):
    out = batch_stat.batch_norm(
      x,
      scale,
      bias,
      jnp.zeros(8),
      jnp.ones(8),
      0.5,
      mask=mask,
      activation="relu",
      axis_name=axis_name,
      implementation=implementation,
      **options,
    )
    total = jnp.sum(out.y * dy)
    if axis_name is not None:
      total = lax.psum(total, axis_name)
    return total + jnp.vdot(jnp.arange(8.0), out.var), out

  grads, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)
  return out.y, out.mean, *grads


def _plain(x, scale, bias, axis_name):
  """Normalises x in plain JAX."""

  def mean(a):
    a = a.mean((0, 1, 2))
    return a if axis_name is None else lax.pmean(a, axis_name)

  centre = mean(x)
  var = mean(jnp.square(x - centre))
  y = (x - centre) * lax.rsqrt(var + 1e-5) * scale + bias
  return y, (0.5 * centre, 0.5 + 0.5 * var)


class BatchNormShardingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  @parameterized.parameters("jit", "shard_map")
  def test_one_message_forward_and_no_more_than_plain_back(self, route):
    mesh = devices.auto_mesh((4, 2), ("a", "b"))
    x, dy, scale, bias, _ = _train_case()
    split = P(("a", "b"))
    x, dy = jax.device_put((x, dy), NamedSharding(mesh, split))
    name = None if route == "jit" else ("a", "b")

    def ours(x, scale, bias):
      out = batch_stat.batch_norm(
        x, scale, bias, jnp.zeros(8), jnp.ones(8), 0.5, axis_name=name,
        implementation="cpu",
      )  # fmt: skip
      return out.y, (out.mean, out.var)

    def mapped(fn):
      if route == "jit":
        return fn
      return jax.shard_map(
        fn, mesh=mesh, in_specs=(split, P(), P()), out_specs=(split, P())
      )

    def sums(fn, *args):
      text = jax.jit(fn).lower(*args).compile().as_text()
      self.assertEmpty(hlo.instructions(text, "all-gather"))
      return len(hlo.instructions(text, "all-reduce"))

    def there_and_back(fn, x, scale, bias, dy):
      y, back, averages = jax.vjp(fn, x, scale, bias, has_aux=True)
      return y, averages, back(dy)

    plain = mapped(functools.partial(_plain, axis_name=name))
    fused = mapped(ours)
    forward = sums(fused, x, scale, bias)
    both = sums(functools.partial(there_and_back, fused), x, scale, bias, dy)
    self.assertEqual(forward, 1)
    self.assertLessEqual(
      both - forward,
      sums(functools.partial(there_and_back, plain), x, scale, bias, dy)
      - sums(plain, x, scale, bias),
    )

  def check(self, got, want):
    for g, w, tolerance in zip(got, want, (1e-5, 1e-5, 1e-4, 1e-4, 1e-4)):
      np.testing.assert_allclose(
        g, w, rtol=tolerance, atol=tolerance * float(np.abs(w).max())
      )

  @parameterized.product(
    spec=(P("a"), P(("a", "b")), P("a", None, None, "b"), P("b", "a")),
    implementation=("cpu", "xla"),
    masked=(False, True),
  )
  def test_jit_over_named_shardings(self, spec, implementation, masked):
    mesh = devices.auto_mesh((4, 2), ("a", "b"))
    x, dy, scale, bias, mask = _train_case()
    mask = mask if masked else None
    want = _grads(x, dy, scale, bias, mask, "xla")
    sharding = NamedSharding(mesh, spec)
    x, dy = jax.device_put((x, dy), sharding)
    run = jax.jit(lambda *args: _grads(*args, mask, implementation))
    compiled = run.lower(x, dy, scale, bias).compile()
    got = compiled(x, dy, scale, bias)
    self.check(got, want)
    self.assertTrue(got[0].sharding.is_equivalent_to(sharding, 4))
    self.assertTrue(got[2].sharding.is_equivalent_to(sharding, 4))
    text = compiled.as_text()
    local = x.addressable_shards[0].data.shape
    for shape in (SHAPE, (SHAPE[0], *local[1:]), (local[0], *SHAPE[1:])):
      self.assertEmpty(hlo.instructions(text, "all-gather", shape))
    if implementation == "cpu":
      for target in (
        ffi.TARGET_MOMENTS,
        ffi.TARGET_NORMALIZE,
        ffi.TARGET_GRAD_SUMS,
        ffi.TARGET_GRAD_INPUT,
      ):
        self.assertEqual(hlo.custom_calls(text, target), 1, target)

  @parameterized.product(
    implementation=("cpu", "xla"), masked=(False, True), check_vma=(True, False)
  )
  def test_shard_map_joins_over_the_axis_name(
    self, implementation, masked, check_vma
  ):
    mesh = devices.auto_mesh((8,), ("a",))
    x, dy, scale, bias, mask = _train_case()
    want = _grads(x, dy, scale, bias, mask if masked else None, "xla")

    def run(x, dy, scale, bias, mask):
      out = batch_stat.batch_norm(
        x,
        scale,
        bias,
        jnp.zeros(8),
        jnp.ones(8),
        0.5,
        mask=mask if masked else None,
        activation="relu",
        axis_name="a",
        implementation=implementation,
      )
      return lax.psum(jnp.sum(out.y * dy), "a"), out.var, out.mean, out.y

    mapped = jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(P("a"), P("a"), P(), P(), P("a")),
      out_specs=(P(), P(), P(), P("a")),
      check_vma=check_vma,
    )

    @jax.jit
    def grads(x, dy, scale, bias, mask):
      def loss(x, scale, bias):
        total, var, mean, y = mapped(x, dy, scale, bias, mask)
        return total + jnp.vdot(jnp.arange(8.0), var), (y, mean)

      out, aux = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(x, scale, bias)
      return *aux, *out

    compiled = grads.lower(x, dy, scale, bias, mask).compile()
    self.check(compiled(x, dy, scale, bias, mask), want)
    self.assertEmpty(hlo.instructions(compiled.as_text(), "all-gather"))

  @parameterized.product(implementation=("cpu", "xla"), set_mesh=(False, True))
  def test_explicit_mesh(self, implementation, set_mesh):
    mesh = jax.make_mesh(
      (8,), ("a",), axis_types=(jax.sharding.AxisType.Explicit,)
    )
    x, dy, scale, bias, _ = _train_case()
    want = _grads(x, dy, scale, bias, None, "xla")
    x, dy = jax.device_put((x, dy), NamedSharding(mesh, P("a")))

    @jax.jit
    def run(x, dy, scale, bias):
      out = _grads(x, dy, scale, bias, None, implementation)
      self.assertEqual(jax.typeof(out[0]).sharding.spec[0], "a")
      return out

    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
      compiled = run.lower(x, dy, scale, bias).compile()
      self.check(compiled(x, dy, scale, bias), want)
    self.assertEmpty(hlo.instructions(compiled.as_text(), "all-gather"))

  @parameterized.product(
    implementation=("cpu", "xla"),
    spec=(P("a", None, None, "b"), P("a", "b")),
    relu=(False, True),
  )
  def test_vectors_that_are_not_split_as_channels_are(
    self, implementation, spec, relu
  ):
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    x, dy, scale, bias, _ = _train_case()
    mean, var = jnp.linspace(-1, 1, 8), jnp.linspace(1, 2, 8)

    def run(x, dy, scale, bias, mean, var):
      def loss(x, scale, bias):
        out = batch_stat.batch_norm(
          x,
          scale,
          bias,
          mean,
          var,
          0.5,
          activation="relu" if relu else None,
          implementation=implementation,
        )
        return jnp.sum(out.y * dy), (out.mean, out.var)

      return jax.grad(loss, (0, 1, 2), has_aux=True)(x, scale, bias)

    want, averages = run(x, dy, scale, bias, mean, var)
    specs = (spec, spec, P(), P("b"), P(), P("b"))
    with jax.set_mesh(mesh):
      args = jax.device_put(
        (x, dy, scale, bias, mean, var),
        tuple(NamedSharding(mesh, spec) for spec in specs),
      )
      got, new = jax.jit(run)(*args)
    for gradient, arg in zip(got, (args[0], *args[2:4]), strict=True):
      self.assertTrue(
        gradient.sharding.is_equivalent_to(arg.sharding, arg.ndim)
      )
    # In the order of `check`'s tolerances.
    self.check((*new, *got), (*averages, *want))

  @parameterized.parameters("cpu", "xla")
  def test_channels_on_an_explicit_mesh(self, implementation):
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)
    x, dy, scale, bias, _ = _train_case()
    want = _grads(x, dy, scale, bias, None, "xla")
    split = NamedSharding(mesh, P("a", None, None, "b"))
    x, dy = jax.device_put((x, dy), split)
    scale, bias = jax.device_put((scale, bias), NamedSharding(mesh, P("b")))

    @jax.jit
    def run(x, dy, scale, bias):
      out = _grads(x, dy, scale, bias, None, implementation)
      specs = [jax.typeof(a).sharding.spec for a in out]
      whole = split.spec
      self.assertEqual(specs, [whole, P("b"), whole, P("b"), P("b")])
      return out

    with jax.set_mesh(mesh):
      compiled = run.lower(x, dy, scale, bias).compile()
      self.check(compiled(x, dy, scale, bias), want)
    self.assertEmpty(hlo.instructions(compiled.as_text(), "all-gather"))

  @parameterized.parameters("cpu", "xla")
  def test_groups_are_apart(self, implementation):
    mesh = devices.auto_mesh((8,), ("a",))
    x, dy, scale, bias, _ = _train_case()
    halves = [slice(0, 8), slice(8, 16)]
    want = [
      _grads(x[half], dy[half], scale, bias, None, "xla")[2] for half in halves
    ]

    def run(x, dy):
      def loss(x):
        out = batch_stat.batch_norm(
          x,
          scale,
          bias,
          jnp.zeros(8),
          jnp.ones(8),
          0.5,
          activation="relu",
          axis_name="a",
          axis_index_groups=[[0, 1, 2, 3], [4, 5, 6, 7]],
          implementation=implementation,
        )
        # Each of the four members of a group has a copy of the variance.
        share = jnp.vdot(jnp.arange(8.0), out.var) / 4
        return jnp.sum(out.y * dy) + share

      return jax.grad(loss)(x)

    mapped = jax.shard_map(
      run, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False
    )
    got = jax.jit(mapped)(x, dy)
    for half, one in zip(halves, want):
      np.testing.assert_allclose(got[half], one, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
  absltest.main()
