"""nnx.jit on 8 devices: what it places where, and what it leaves there."""

import os

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)


from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

import nnx
from tests.nnx.transforms.models import Dense


class ShardingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.assertLen(jax.devices(), 8)
    self.mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))

  def named(self, *names):
    return NamedSharding(self.mesh, P(*names))

  def test_state_sharding(self):
    dense = Dense(4)
    sharding = nnx.StateSharding(
      {
        nnx.PathContains("kernel"): self.named(None, "model"),
        ...: self.named(),
      }
    )

    @nnx.jit(
      in_shardings=(sharding, self.named("data")),
      out_shardings=self.named("data"),
    )
    def step(dense, x):
      dense.kernel[...] *= 2
      return dense(x)

    y = step(dense, jnp.ones((8, 2)))
    np.testing.assert_array_equal(y, np.full((8, 4), 4))
    self.assertEqual(y.sharding.spec, P("data"))
    self.assertEqual(dense.kernel.value.sharding.spec, P(None, "model"))
    np.testing.assert_array_equal(
      step(dense, jnp.ones((8, 2))), np.full((8, 4), 8)
    )

  def test_state_that_is_made_lies_where_its_place_does(self):
    kernel = self.named(None, "model")
    sharding = nnx.StateSharding(
      {nnx.PathContains("kernel"): kernel, ...: self.named()}
    )
    for donated in ((), (0,)):
      dense = Dense(4)

      @nnx.jit(in_shardings=(sharding,), donate_argnums=donated)
      def step(dense):
        other = self.named("data")
        dense.bias = nnx.Param(
          jax.lax.with_sharding_constraint(dense.bias[...], other)
        )
        dense.kernel = nnx.Param(2 * dense.kernel)

      step(dense)
      self.assertEqual(dense.kernel.value.sharding.spec, kernel.spec)
      self.assertEqual(dense.bias.value.sharding.spec, P())
      np.testing.assert_array_equal(dense.kernel, np.full((2, 4), 2))

  def test_out_shardings_of_new_modules(self):
    @nnx.jit(
      out_shardings=nnx.StateSharding({nnx.Param: self.named(None, "model")})
    )
    def make():
      dense = Dense(4)
      del dense.bias
      return dense

    self.assertEqual(make().kernel.value.sharding.spec, P(None, "model"))

  def test_prefixes(self):
    batch = {"x": jnp.ones((8, 2)), "y": jnp.ones(8)}
    f = nnx.jit(
      lambda n, batch: batch,
      static_argnums=0,
      in_shardings=(
        {"x": self.named("data", "model"), "y": self.named("data")},
      ),
      out_shardings={"x": None, "y": self.named()},
    )
    result = f(3, batch)
    self.assertEqual(result["y"].sharding.spec, P())

  def test_donation_with_shardings(self):
    dense = Dense(4)

    @nnx.jit(in_shardings=(self.named(),), donate_argnums=0)
    def step(dense):
      dense.kernel[...] *= 2

    step(dense)
    step(dense)
    np.testing.assert_array_equal(dense.kernel.value, np.full((2, 4), 4))

  def test_errors(self):
    dense = Dense(4)
    with self.assertRaisesRegex(ValueError, "must have one entry for each"):
      nnx.jit(lambda d: d, in_shardings=(None, None))(dense)
    with self.assertRaisesRegex(
      ValueError, r"none of \[.*\] selects `args\[0\]\.\w+`"
    ):
      nnx.jit(
        lambda d: d.bias + 0,
        in_shardings=(nnx.StateSharding({nnx.BatchStat: self.named()}),),
      )(dense)
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    for kind, options, text in (
      (TypeError, {"in_shardings": 3}, "must be one entry .* but got `3`"),
      (
        ValueError,
        {"in_shardings": (3,)},
        r"at `args\[0\]` there is an object",
      ),
      (ValueError, {"out_shardings": 3}, "at `result` there is a leaf where"),
    ):
      with self.assertRaisesRegex(kind, text):
        nnx.jit(lambda model: model.kernel[...], **options)(model)
    with self.assertRaisesRegex(ValueError, "`in_shardings` must be a prefix"):
      nnx.jit(lambda b: b["x"], in_shardings=({"y": None},))({"x": jnp.ones(2)})
    with self.assertRaisesRegex(
      ValueError, "must give a shared node one entry"
    ):
      nnx.jit(lambda a, b: a.bias + b.bias, in_shardings=(self.named(), None))(
        dense, dense
      )

  def test_what_is_only_read_is_placed_once(self):
    model = Dense(4)
    x = jnp.ones((4, 2))
    wanted = self.named(None, "model")
    axes = nnx.StateSharding({nnx.PathContains("kernel"): wanted, ...: None})
    run = nnx.jit(lambda m, x: x @ m.kernel, in_shardings=(axes, None))
    before = np.asarray(model.kernel.value)
    run(model, x)
    placed = model.kernel.value
    self.assertTrue(placed.sharding.is_equivalent_to(wanted, 2))
    np.testing.assert_array_equal(placed, before)
    run(model, x)
    self.assertIs(model.kernel.value, placed)

  def test_shard_map_places_what_it_reads(self):
    model = Dense(4)
    axes = {nnx.PathContains("kernel"): P(None, "model"), ...: P()}
    run = nnx.shard_map(
      lambda m: m.kernel.value.sum(keepdims=True),
      mesh=self.mesh,
      in_specs=(nnx.StateSharding(axes),),
      out_specs=P(None, "model"),
    )
    np.testing.assert_array_equal(run(model), [[4.0, 4.0]])
    wanted = self.named(None, "model")
    self.assertTrue(model.kernel.value.sharding.is_equivalent_to(wanted, 2))

  @parameterized.product(
    nested=(False, True), donated=(False, True), lowered=(False, True)
  )
  def test_shard_map_inside_places_what_it_reads(
    self, nested, donated, lowered
  ):
    model, x, traces = Dense(4), jnp.ones((4, 2)), []
    axes = {nnx.PathContains("kernel"): P(None, "model"), ...: P()}
    options = {"donate_argnums": 0} if donated else {}

    def run(model, x):
      traces.append(0)
      y = nnx.shard_map(
        lambda m, x: x @ m.kernel,
        mesh=self.mesh,
        in_specs=(nnx.StateSharding(axes), P("data")),
        out_specs=P("data", "model"),
      )(model, x)
      model.bias[...] += 1
      return y

    step = nnx.jit(run, **options)
    if nested:
      inner = step
      step = nnx.jit(lambda model, x: inner(model, x), **options)
    if lowered:
      step.lower(model, x)
    want = np.asarray(x @ model.kernel.value)
    np.testing.assert_allclose(step(model, x), want)
    placed = model.kernel.value
    wanted = self.named(None, "model")
    self.assertTrue(placed.sharding.is_equivalent_to(wanted, 2))
    count = len(traces)
    np.testing.assert_allclose(step(model, x), want)
    self.assertLen(traces, count)
    self.assertIs(model.kernel.value, placed)

  def test_what_has_a_place_is_left_there(self):
    model, x = Dense(4), jnp.ones((4, 2))
    model.kernel.value = jax.device_put(
      model.kernel.value, self.named(None, "data")
    )
    before = model.kernel.value
    run = nnx.shard_map(
      lambda m, x: x @ m.kernel,
      mesh=self.mesh, in_specs=(P(), P()), out_specs=P(),
    )  # fmt: skip
    nnx.jit(run)(model, x)
    self.assertIs(model.kernel.value, before)


if __name__ == "__main__":
  absltest.main()
