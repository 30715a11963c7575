"""ToLinen: Modules as Linen modules, made once, merged ever after."""

from absl.testing import absltest, parameterized
from flax import linen as nn
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np

import bridge
import nnx

X = jnp.arange(6.0).reshape(3, 2)


class Block(nnx.Module):
  made = 0

  def __init__(self, din, dout, *, rngs):
    Block.made += 1
    kernel = jax.random.normal(rngs.params(), (din, dout))
    self.kernel = nnx.Param(kernel, out_sharding=("in", "out"))
    self.layers = [nnx.Param(jnp.zeros(dout)), nnx.Param(jnp.ones(dout))]
    self.calls = nnx.BatchStat(jnp.zeros(()))
    self.offset = jnp.full((dout,), 0.5)
    self.noise = nnx.RngStream(rngs.dropout(), tag="dropout")

  def __call__(self, x, noisy=False):
    self.calls[...] += 1
    y = x @ self.kernel[...] * self.layers[1] + self.layers[0] + self.offset
    if noisy:
      y += jax.random.normal(self.noise(), y.shape)
    self.sow(nnx.Intermediate, "out", y)
    return y

  def doubled(self, x):
    return 2 * self(x)


def unbox(tree):
  return jax.tree.map(
    lambda x: x.unbox() if isinstance(x, nn.meta.AxisMetadata) else x,
    tree,
    is_leaf=lambda x: isinstance(x, nn.meta.AxisMetadata),
  )


class ToLinenTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.model = bridge.to_linen(Block, 2, 4)
    Block.made = 0
    self.y, self.variables = self.model.init_with_output(jax.random.key(0), X)

  def expected(self, calls=0.0):
    p = unbox(self.variables["params"])
    return X @ p["kernel"] * p["layers"][1] + p["layers"][0] + 0.5

  def test_variables(self):
    self.assertEqual(list(self.variables), ["nnx", "batch_stats", "params"])
    self.assertIs(type(self.variables["nnx"]["graphdef"]), nnx.graph.NodeDef)
    kernel = self.variables["params"]["kernel"]
    self.assertIsInstance(kernel, bridge.NNXMeta)
    self.assertEqual(kernel.metadata, {"out_sharding": ("in", "out")})
    self.assertEqual(self.variables["batch_stats"]["calls"], 0)
    np.testing.assert_allclose(self.y, self.expected(), rtol=1e-6)

  def test_made_once(self):
    self.assertEqual(Block.made, 1)
    for _ in range(3):
      y = self.model.apply(self.variables, X)
    jax.jit(self.model.apply)(self.variables, X)
    self.assertEqual(Block.made, 1)
    np.testing.assert_allclose(y, self.expected(), rtol=1e-6)

  def test_mutable_collections(self):
    _, updates = self.model.apply(self.variables, X, mutable=["batch_stats"])
    self.assertEqual(list(updates), ["batch_stats"])
    self.assertEqual(updates["batch_stats"]["calls"], 1)
    y, updates = self.model.apply(self.variables, X, mutable=["intermediates"])
    np.testing.assert_array_equal(updates["intermediates"]["out"][0], y)

  def test_variables_that_init_did_not_make(self):
    _, sown = self.model.apply(self.variables, X, mutable=["intermediates"])
    _, again = self.model.apply(
      {**self.variables, **sown}, X, mutable=["intermediates"]
    )
    self.assertLen(again["intermediates"]["out"], 2)

  def test_methods(self):
    doubled = self.model.apply(self.variables, X, nnx_method="doubled")
    np.testing.assert_allclose(doubled, 2 * self.expected(), rtol=1e-6)
    np.testing.assert_array_equal(
      self.model.apply(self.variables, X, nnx_method=Block.doubled), doubled
    )

  def test_randomness(self):
    def draw(seed):
      rngs = {"dropout": jax.random.key(seed)}
      return self.model.apply(self.variables, X, noisy=True, rngs=rngs)

    np.testing.assert_array_equal(draw(0), draw(0))
    self.assertFalse(np.array_equal(draw(0), draw(1)))
    old_style = self.model.apply(
      self.variables, X, noisy=True, rngs={"dropout": jax.random.PRNGKey(0)}
    )
    np.testing.assert_array_equal(old_style, draw(0))
    with self.assertRaisesRegex(
      ValueError, "drew random numbers from the stream `dropout`, but no key"
    ):
      self.model.apply(self.variables, X, noisy=True)

  def test_without_graphdef(self):
    model = self.model.clone(store_graphdef=False, abstract_init=False)
    variables = model.init(jax.random.key(0), X)
    self.assertEqual(list(variables), ["batch_stats", "params"])
    y = model.apply(variables, X)
    np.testing.assert_array_equal(y, self.model.apply(self.variables, X))

  def test_abstract_init_needs_no_arrays(self):
    class Plain(nnx.Module):
      def __init__(self, *, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (2,)))

      def __call__(self, x):
        return x * self.w

    model = bridge.ToLinen(Plain, store_graphdef=False)
    variables = model.init(jax.random.key(0), X)
    np.testing.assert_array_equal(
      model.apply(variables, X), X * variables["params"]["w"]
    )
    with self.assertRaisesRegex(ValueError, "arrays that are not in Variables"):
      self.model.clone(store_graphdef=False).apply(
        {k: v for k, v in self.variables.items() if k != "nnx"}, X
      )

  def test_metadata_options(self):
    bare = self.model.clone(metadata_type=None).init(jax.random.key(0), X)
    self.assertIsInstance(bare["params"]["kernel"], jax.Array)
    tagged = self.model.clone(
      metadata_fn=lambda v: nn.Partitioned(v.value, ("a", "b"))
    ).init(jax.random.key(0), X)
    self.assertEqual(tagged["params"]["kernel"].names, ("a", "b"))
    y = self.model.apply({**self.variables, "params": tagged["params"]}, X)
    np.testing.assert_allclose(y, self.expected(), rtol=1e-6)

  def test_submodule_of_a_compact_module(self):
    class Outer(nn.Module):
      @nn.compact
      def __call__(self, x):
        x = nn.Dense(2)(x)
        return bridge.to_linen(Block, 2, 4, name="block")(x)

    variables = Outer().init(jax.random.key(0), X)
    self.assertIn("kernel", variables["params"]["block"])
    made = Block.made
    self.assertEqual(Outer().apply(variables, X).shape, (3, 4))
    self.assertEqual(Block.made, made)

  def test_scan_adds_and_removes_axes(self):
    class Step(nnx.Module):
      def __init__(self, *, rngs):
        self.w = nnx.Param(
          jax.random.normal(rngs.params(), (2, 2)), out_sharding=("a", "b")
        )

      def __call__(self, x):
        assert self.w.out_sharding == ("a", "b"), self.w.out_sharding
        return x @ self.w[...]

    class Stack(nn.Module):
      @nn.compact
      def __call__(self, x):
        body = nn.scan(
          lambda module, carry, _: (module(carry), None),
          variable_axes={"params": 0},
          variable_broadcast="nnx",
          split_rngs={"params": True},
          length=3,
          metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return body(bridge.to_linen(Step, name="step"), x, None)[0]

    variables = Stack().init(jax.random.key(0), X)
    w = variables["params"]["step"]["w"]
    self.assertEqual(w.value.shape, (3, 2, 2))
    self.assertEqual(w.metadata["out_sharding"], ("layers", "a", "b"))
    y = Stack().apply(variables, X)
    expected = X
    for i in range(3):
      expected = expected @ w.value[i]
    np.testing.assert_allclose(y, expected, rtol=1e-5)

  @parameterized.parameters(nn.jit, nn.remat)
  def test_other_lifted_transforms(self, transform):
    class Outer(nn.Module):
      @nn.compact
      def __call__(self, x):
        return transform(bridge.ToLinen)(Block, args=(2, 4), name="block")(x)

    variables = Outer().init(jax.random.key(0), X)
    y = Outer().apply(variables, X)
    p = unbox(variables["params"]["block"])
    np.testing.assert_allclose(
      y, X @ p["kernel"] * p["layers"][1] + p["layers"][0] + 0.5, rtol=1e-6
    )

  def test_a_shared_layer_is_made_once(self):
    class Shared(nn.Module):
      def setup(self):
        self.linear = bridge.to_linen(nnx.Linear, 2, 2)
        self.norm = bridge.to_linen(nnx.BatchNorm, 2)

      def __call__(self, x):
        x = self.norm(self.linear(self.linear(x)))
        return self.norm(x)

    y, variables = Shared().init_with_output(jax.random.key(0), X)
    again, updates = Shared().apply(variables, X, mutable=["batch_stats"])
    np.testing.assert_array_equal(y, again)
    # As of Linen, what calls write is no part of `init`.
    np.testing.assert_array_equal(
      variables["batch_stats"]["norm"]["mean"], np.zeros(2)
    )
    self.assertTrue(np.any(updates["batch_stats"]["norm"]["mean"] != 0))

  def test_structure_that_a_call_changes(self):
    class Changes(nnx.Module):
      def __init__(self, *, rngs):
        self.n = 0
        self.steps = jnp.zeros(())
        self.w = nnx.Param(jnp.ones(()))

      def __call__(self, x):
        self.n += 1
        self.steps = self.steps + 1
        self.sow(nnx.Intermediate, "seen", x)
        if not hasattr(self, "last"):
          self.last = nnx.Cache(x)
        return self.n * self.w + self.steps

    model = bridge.ToLinen(Changes)
    variables = model.init(jax.random.key(0), X)
    for mutable in ("nnx", ["nnx"], ["nnx", "cache"], True):
      given = variables
      for i in range(1, 4):
        y, updates = model.apply(given, X, mutable=mutable)
        self.assertEqual(y, 2 * i)
        given = {**given, **updates}
        given.pop("intermediates", None)  # of one call
      self.assertEqual("cache" in given, mutable not in ("nnx", ["nnx"]))
      self.assertEqual(model.apply(given, X), 8)
    for mutable in (False, ["cache"], []):
      y = model.apply(variables, X, mutable=mutable)
      self.assertEqual(y if mutable is False else y[0], 2)
    step = jax.jit(lambda v: model.apply(v, X, mutable=["nnx"]))
    self.assertEqual(step({**variables, **step(variables)[1]})[0], 4)

  def test_unchanged_structure_is_returned_as_it_was(self):
    _, updates = self.model.apply(self.variables, X, mutable=True)
    self.assertEqual(
      updates["nnx"]["graphdef"], self.variables["nnx"]["graphdef"]
    )

  def test_methods_by_the_name_of_apply(self):
    expected = self.model.apply(self.variables, X, nnx_method="doubled")
    for method in ("doubled", self.model.doubled):
      np.testing.assert_array_equal(
        self.model.apply(self.variables, X, method=method), expected
      )
    np.testing.assert_array_equal(
      self.model.bind(self.variables).doubled(X), expected
    )

  def test_streams_of_several_layers(self):
    class Layers(nnx.Module):
      def __init__(self, *, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def make(rngs):
          return nnx.Dropout(0.5, rngs=rngs)

        self.drop = make(rngs)

      def __call__(self, x):
        axes = (0, None)
        return nnx.vmap(lambda layer, x: layer(x), in_axes=axes)(self.drop, x)

    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    for store in (True, False):
      model = bridge.ToLinen(Layers, store_graphdef=store)
      variables = model.init(rngs, X)
      y = model.apply(variables, jnp.ones(64), rngs=rngs)
      self.assertEqual(y.shape, (3, 64))
      self.assertLen({tuple(np.asarray(row)) for row in y}, 3)

  def test_streams_are_the_same_without_a_graphdef(self):
    model = bridge.to_linen(nnx.Dropout, 0.5)
    params, one, two = jax.random.split(jax.random.key(0), 3)
    x = jnp.ones(64)
    variables = model.init({"params": params, "dropout": one}, x)

    def drop(variables, key):
      rngs = {"params": params, "dropout": key}
      return np.asarray(model.apply(variables, x, rngs=rngs))

    # As of a checkpoint that was read without a target.
    for key in (one, two):
      np.testing.assert_array_equal(drop({}, key), drop(variables, key))
    self.assertFalse(np.array_equal(drop({}, one), drop({}, two)))

  def test_equal_arguments_of_other_types(self):
    class Scaled(nnx.Module):
      def __init__(self, scale):
        self.scale = scale

      def __call__(self, x):
        return x * self.scale

    x = jnp.arange(3)
    for scale in (2, 2.0, True, 2):
      model = bridge.ToLinen(
        Scaled, args=(scale,), skip_rng=True, store_graphdef=False
      )
      self.assertEqual(model.apply({}, x).dtype, (x * scale).dtype)

  def test_without_graphdef_under_a_trace_first(self):
    model = bridge.to_linen(
      Block, 2, 4, store_graphdef=False, abstract_init=False
    )
    variables = {k: v for k, v in self.variables.items() if k != "nnx"}
    jitted = jax.jit(model.apply)(variables, X)
    np.testing.assert_allclose(jitted, model.apply(variables, X), rtol=1e-6)
    np.testing.assert_allclose(jitted, self.expected(), rtol=1e-6)

  def test_arguments_without_a_hash(self):
    class Listed(nnx.Module):
      def __init__(self, sizes, table, *, rngs):
        self.sizes, self.table = sizes["a"], nnx.Variable(table)

      def __call__(self, x):
        return x * len(self.sizes) + self.table

    model = bridge.to_linen(
      Listed, {"a": [1, 2]}, table=jnp.ones(2), store_graphdef=False
    )
    variables = model.init(jax.random.key(0), X)
    np.testing.assert_array_equal(model.apply(variables, X), X * 2 + 1)

  def test_options_of_the_shortcut(self):
    model = bridge.to_linen(Block, 2, 4, metadata_type=None, skip_rng=False)
    variables = model.init(jax.random.key(0), X)
    self.assertIsInstance(variables["params"]["kernel"], jax.Array)

  def test_class(self):
    Dense = bridge.to_linen_class(nnx.Linear, use_bias=False)

    class Derived(Dense):
      pass

    class Outer(nn.Module):
      @nn.compact
      def __call__(self, x):
        x = Dense(2, 3, name="a")(x)
        x = Derived(in_features=3, out_features=2, name="b")(x)
        x = Dense(args=(2, 2), kwargs={"use_bias": True}, name="c")(x)
        return nn.remat(Dense)(2, 4, name="d")(x)

    variables = Outer().init(jax.random.key(0), X)
    self.assertEqual(
      jax.tree.map(jnp.shape, variables["params"]),
      {
        "a": {"kernel": (2, 3)},
        "b": {"kernel": (3, 2)},
        "c": {"bias": (2,), "kernel": (2, 2)},
        "d": {"kernel": (2, 4)},
      },
    )
    p = variables["params"]
    expected = X
    for name in "abcd":
      expected = expected @ p[name]["kernel"] + p[name].get("bias", 0)
    np.testing.assert_allclose(
      Outer().apply(variables, X), expected, rtol=1e-5, atol=1e-6
    )
    self.assertEqual(Dense(2, 3).clone().args, (2, 3))
    bare = bridge.to_linen_class(Block, lambda v: v.value)(2, 4)
    kernel = bare.init(jax.random.key(0), X)["params"]["kernel"]
    self.assertIsInstance(kernel, jax.Array)

  def test_bind(self):
    bound = self.model.bind(self.variables)
    np.testing.assert_allclose(bound(X), self.expected(), rtol=1e-6)

  def test_linen_inside_nnx_inside_linen(self):
    class Middle(nnx.Module):
      def __init__(self, *, rngs):
        self.dense = bridge.ToNNX(nn.Dense(4), rngs=rngs)

      def __call__(self, x):
        return self.dense(x)

    model = bridge.ToLinen(Middle)
    y, variables = model.init_with_output(jax.random.key(0), X)
    self.assertEqual(variables["params"]["dense"]["kernel"].shape, (2, 4))
    np.testing.assert_allclose(model.apply(variables, X), y, rtol=1e-6)

  def test_checkpoint(self):
    target = {k: v for k, v in self.variables.items() if k != "nnx"}
    restored = serialization.msgpack_restore(
      serialization.to_bytes(unbox(target))
    )
    self.assertIn("1", restored["params"]["layers"])
    y = self.model.apply({**restored, "nnx": self.variables["nnx"]}, X)
    np.testing.assert_array_equal(y, self.model.apply(self.variables, X))

  def test_missing_variable(self):
    with self.assertRaisesRegex(
      ValueError,
      r"`ToLinen\(Block\)` needs the variable `calls` in the collection"
      r" `batch_stats`, but the variables given have \['params'\]",
    ):
      self.model.apply({k: self.variables[k] for k in ("nnx", "params")}, X)

  def test_wrong_method(self):
    with self.assertRaisesRegex(AttributeError, "but it has no `other`"):
      self.model.apply(self.variables, X, nnx_method="other")
    with self.assertRaisesRegex(TypeError, "must be a function or the name"):
      self.model.apply(self.variables, X, nnx_method=3)


if __name__ == "__main__":
  absltest.main()
