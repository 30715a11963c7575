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
