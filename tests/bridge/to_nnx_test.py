"""ToNNX: Linen modules as Modules, against Linen itself."""

from absl.testing import absltest
from flax import core
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bridge
import nnx


class Net(nn.Module):
  rate: float = 0.0

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.Dense(4, name="dense")(x)
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    self.sow("intermediates", "hidden", x)
    return nn.Dropout(self.rate, deterministic=not train)(x)

  def twice(self, x):
    return 2 * x


X = jnp.arange(6.0).reshape(3, 2)


class ToNNXTest(absltest.TestCase):
  def make(self, **fields):
    return bridge.ToNNX(Net(**fields), rngs=nnx.Rngs(0)).lazy_init(X)

  def test_same_variables_and_values_as_linen(self):
    model = self.make()
    variables = bridge.nnx_attrs_to_linen_vars(
      {"dense": model.dense, "norm": model.norm}
    )
    key = nnx.Rngs(0).fork().params()
    expected = Net().init(key, X)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    np.testing.assert_array_equal(model(X), Net().apply(expected, X))

  def test_types_of_variables(self):
    model = self.make()
    self.assertIs(type(model.dense["kernel"]), nnx.Param)
    self.assertIs(type(model.norm["mean"]), nnx.BatchStat)

  def test_batch_stats_come_back(self):
    model = self.make()
    mean = model.norm["mean"]
    y = model(X, train=True)
    self.assertEqual(y.shape, (3, 4))
    self.assertIs(model.norm["mean"], mean)
    _, expected = Net().apply(
      bridge.nnx_attrs_to_linen_vars(
        vars(self.make()) | {"to_nnx__module": {}, "to_nnx__rngs": {}}
      ),
      X,
      train=True,
      mutable=["batch_stats"],
    )
    np.testing.assert_array_equal(
      mean.value, expected["batch_stats"]["norm"]["mean"]
    )

  def test_sown_values_on_demand(self):
    model = self.make()
    model(X)
    self.assertNotIn("hidden", vars(model))
    model(X, mutable=["intermediates"])
    self.assertIs(type(model.hidden), nnx.Intermediate)
    self.assertLen(model.hidden.value, 1)

  def test_methods(self):
    model = self.make()
    np.testing.assert_array_equal(model(X, method="twice"), 2 * X)
    np.testing.assert_array_equal(model(X, method=Net.twice), 2 * X)
    np.testing.assert_array_equal(model.twice(X), 2 * X)

  def test_train_and_eval_reach_fields(self):
    norm = bridge.ToNNX(
      nn.BatchNorm(use_running_average=False), rngs=nnx.Rngs(0)
    ).lazy_init(X)
    norm.eval()
    self.assertTrue(norm.module.use_running_average)
    before = norm.mean.value
    norm(X)
    np.testing.assert_array_equal(norm.mean.value, before)
    norm.train()
    norm(X)
    self.assertFalse(np.array_equal(norm.mean.value, before))

  def test_randomness(self):
    model = bridge.ToNNX(
      Net(rate=0.5), rngs=nnx.Rngs(params=0, dropout=1)
    ).lazy_init(X)
    first, second = model(X, train=True), model(X, train=True)
    self.assertFalse(np.array_equal(first, second))
    key = jax.random.key(3)
    np.testing.assert_array_equal(
      model(X, train=True, rngs={"dropout": key}) == 0,
      model(X, train=True, rngs={"dropout": key}) == 0,
    )

  def test_submodule_under_jit_traces_once(self):
    class Outer(nnx.Module):
      def __init__(self, rngs):
        self.net = bridge.ToNNX(Net(), rngs=rngs)
        self.scale = nnx.Param(jnp.array(2.0))

      def __call__(self, x, train):
        return self.scale * self.net(x, train=train)

    model = Outer(nnx.Rngs(0))
    bridge.lazy_init(model, X, False)
    count = []

    @nnx.jit(static_argnames="train")
    def step(model, x, train):
      count.append(1)
      return model(x, train)

    before = model.net.norm["mean"].value
    for _ in range(3):
      step(model, X, train=True)
    self.assertLen(count, 1)
    self.assertFalse(np.array_equal(model.net.norm["mean"].value, before))

  def test_partitioned_boxes(self):
    init = nn.with_partitioning(nn.initializers.ones, ("embed", "mlp"))
    model = bridge.ToNNX(
      nn.Dense(4, kernel_init=init), rngs=nnx.Rngs(0)
    ).lazy_init(X)
    self.assertEqual(
      model.kernel.get_metadata("out_sharding"), ("embed", "mlp")
    )
    back = bridge.to_linen_var(model.kernel)
    self.assertIsInstance(back, nn.Partitioned)
    self.assertEqual(back.names, ("embed", "mlp"))
    self.assertEqual(model(X).shape, (3, 4))

  def test_decoding_attention_cache(self):
    attention = nn.MultiHeadDotProductAttention(
      num_heads=2, qkv_features=8, decode=True
    )
    x = jnp.ones((1, 5, 8))
    model = bridge.ToNNX(attention, rngs=nnx.Rngs(0)).lazy_init(x, x)
    self.assertIs(type(model.cached_key), nnx.Cache)
    for i in range(3):
      self.assertEqual(int(model.cache_index.value), i)
      model(x[:, i : i + 1], x[:, i : i + 1])
    self.assertEqual(int(model.cache_index.value), 3)

  def test_errors(self):
    with self.assertRaisesRegex(TypeError, "must be an instance of a Linen"):
      bridge.ToNNX(nn.Dense)
    model = bridge.ToNNX(nn.Dense(4), rngs=nnx.Rngs(0))
    with self.assertRaisesRegex(
      ValueError, r"`ToNNX\(Dense\)` must be initialised before it is called"
    ):
      model(X)
    with self.assertRaisesRegex(AttributeError, "has no variables yet"):
      _ = model.kernel
    with self.assertRaisesRegex(ValueError, "must have random streams"):
      bridge.ToNNX(nn.Dense(4)).lazy_init(X)
    with self.assertRaisesRegex(
      ValueError, "must be a Module that can be called"
    ):
      bridge.lazy_init(nn.Dense(4), X)

  def test_modules_that_differ_in_the_type_of_a_number(self):
    class Scale(nn.Module):
      by: object

      def __call__(self, x):
        return x * (self.by if isinstance(self.by, float | int) else self.by[0])

    x = jnp.array([3])
    for make in (lambda n: n, lambda n: core.freeze({0: n})):
      apply = nnx.jit(lambda model, x: model(x))
      for number in (1, 1.0, True):
        want = (x * number).dtype
        self.assertEqual(
          apply(bridge.ToNNX(Scale(make(number))), x).dtype, want
        )

  def test_clash_of_two_collections(self):
    class Clash(nn.Module):
      @nn.compact
      def __call__(self, x):
        self.param("w", nn.initializers.ones, ())
        self.variable("stats", "w", jnp.zeros, ())
        return x

    with self.assertRaises((ValueError, nn.module.errors.NameInUseError)):
      bridge.ToNNX(Clash(), rngs=nnx.Rngs(0)).lazy_init(X)


if __name__ == "__main__":
  absltest.main()
