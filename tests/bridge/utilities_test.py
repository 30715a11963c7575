"""Variables of ToLinen, graphdef and all, in the utilities of Flax and jax."""

import copy
import pathlib
import tempfile

from absl.testing import absltest, parameterized
from flax import core, serialization, traverse_util
from flax import linen as nn
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import bridge
import nnx

X = jnp.arange(6.0).reshape(3, 2)
KEY = jax.random.key(0)
WRITTEN = ["batch_stats", "cache"]


class Layer(nnx.Module):
  def __init__(self, *, rngs):
    kernel = jax.random.normal(rngs.params(), (2, 2))
    self.kernel = nnx.Param(kernel, sharding=("a", "b"))
    self.scales = [nnx.Param(jnp.full(2, 3.0)), nnx.Param(jnp.ones(2))]
    self.cache = nnx.Cache({"k": jnp.zeros(2), "v": jnp.ones(2)})
    self.calls = nnx.BatchStat(jnp.zeros(()))
    self.offset = jnp.full((2,), 0.5)

  def __call__(self, x):
    self.calls[...] += 1
    cache = self.cache.get_value()
    self.cache.set_value({**cache, "k": cache["k"] + 1})
    scale, bias = self.scales
    return x @ self.kernel[...] * scale[...] + bias[...] + self.offset


class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(2, kernel_init=nn.initializers.ones)(x)
    return bridge.to_linen(Layer, name="layer")(x)


def apply(variables):
  return Net().apply(variables, X, mutable=WRITTEN)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  jax.tree.map(np.testing.assert_array_equal, a, b)


class UtilitiesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.variables = Net().init(KEY, X)
    self.other = jax.tree.map(lambda x: x + 1, self.variables)
    self.expected = apply(self.variables)
    params = self.variables["params"]["layer"]
    self.assertIsInstance(params["kernel"], bridge.NNXMeta)
    y = (
      nn.Dense(2).apply({"params": self.variables["params"]["Dense_0"]}, X)
      @ params["kernel"].value
    )
    np.testing.assert_allclose(self.expected[0], y * 3 + 1.5, rtol=1e-5)

  def test_state_dict(self):
    state = serialization.to_state_dict(self.variables)
    restored = serialization.from_state_dict(self.other, state)
    assert_same(restored, self.variables)
    assert_same(apply(restored), self.expected)

  def test_bytes(self):
    data = serialization.to_bytes(self.variables)
    restored = serialization.from_bytes(self.other, data)
    assert_same(restored, self.variables)
    assert_same(apply(restored), self.expected)

  def test_bytes_without_a_target(self):
    restored = serialization.msgpack_restore(
      serialization.to_bytes(self.variables)
    )
    self.assertIn("1", restored["params"]["layer"]["scales"])
    self.assertEqual(list(restored["params"]["layer"]["kernel"]), ["value"])
    np.testing.assert_array_equal(apply(restored)[0], self.expected[0])

  def test_orbax(self):
    path = pathlib.Path(tempfile.mkdtemp(), "variables")
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, self.variables)
      checkpointer.wait_until_finished()
      for target in (self.other, jax.eval_shape(lambda: self.other)):
        restored = checkpointer.restore(path, target)
        assert_same(restored, self.variables)
        assert_same(apply(restored), self.expected)

  @parameterized.parameters(
    core.freeze,
    nn.meta.unbox,
    jax.device_put,
    jax.device_get,
    jax.block_until_ready,
    copy.deepcopy,
    lambda v: jax.tree.map(np.asarray, v),
    lambda v: jax.jit(lambda v: v)(v),
    lambda v: jax.tree.unflatten(*jax.tree.flatten(v)[::-1]),
    lambda v: traverse_util.unflatten_dict(traverse_util.flatten_dict(v)),
  )
  def test_trees(self, change):
    np.testing.assert_array_equal(
      apply(change(self.variables))[0], self.expected[0]
    )

  def test_partition_specs(self):
    specs = nn.get_partition_spec(self.variables)
    self.assertEqual(
      specs["params"]["layer"]["kernel"], jax.sharding.PartitionSpec("a", "b")
    )
    self.assertIs(type(specs["nnx"]["layer"]["graphdef"]), nnx.graph.NodeDef)


class TabulateTest(absltest.TestCase):
  """The tables are those that flax.nnx's bridge has."""

  def tables(self, library, wrap):
    class Block(library.Module):
      def __init__(self, *, rngs):
        self.linear = library.Linear(2, 4, rngs=rngs)
        self.norm = library.LayerNorm(4, rngs=rngs)

      def __call__(self, x):
        return self.norm(self.linear(x))

    class Outer(nn.Module):
      def setup(self):
        self.first = nn.Dense(2)
        self.block = wrap.ToLinen(Block)

      def __call__(self, x):
        return self.block(self.first(x))

    width = {"width": 120}
    return (
      nn.tabulate(Outer(), KEY, console_kwargs=width)(X),
      wrap.ToLinen(Block).tabulate(KEY, X, console_kwargs=width),
    )

  def test_same_tables(self):
    self.assertEqual(
      self.tables(nnx, bridge), self.tables(flax_nnx, flax_nnx.bridge)
    )

  def test_boxes_and_arrays(self):
    table = Net().tabulate(KEY, X, console_kwargs={"width": 120})
    self.assertIn("Total Parameters: 19 ", table)
    self.assertNotIn("graphdef", table)

  def test_a_linen_module_inside(self):
    def inner(rngs):
      return bridge.ToNNX(nn.Dense(4), rngs=rngs)

    table = bridge.ToLinen(inner).tabulate(KEY, X)
    self.assertIn("Total Parameters: 12 ", table)


class LiftedTest(parameterized.TestCase):
  """Classes of ToLinen under a transform, beside other Linen modules."""

  def check(self, layer, shape, call):
    class Outer(nn.Module):
      @nn.compact
      def __call__(self, x):
        x = nn.Dense(2, name="before")(x)
        x = layer()(x)
        return nn.Dense(2, name="after")(x)

    for init in (Outer().init, jax.jit(Outer().init)):
      variables = init(KEY, X)
      params = variables["params"]
      kernel = params["layer"]["kernel"]
      self.assertEqual(kernel.shape, shape)
      y = Outer().apply(variables, X)
      jitted = jax.jit(Outer().apply)(variables, X)
      np.testing.assert_allclose(jitted, y, rtol=1e-5, atol=1e-6)
      x = call(nn.Dense(2).apply({"params": params["before"]}, X), kernel)
      expected = nn.Dense(2).apply({"params": params["after"]}, x)
      np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)

  @parameterized.parameters(nn.jit, nn.remat, nn.checkpoint)
  def test_no_axis(self, transform):
    self.check(
      lambda: transform(bridge.ToLinen)(
        nnx.Linear, args=(2, 2), kwargs={"use_bias": False}, name="layer"
      ),
      (2, 2),
      lambda x, kernel: x @ kernel,
    )

  @parameterized.parameters({"params": 0}, {"params": 0, "nnx": 0})
  def test_vmap(self, **axes):
    def layer():
      return nn.vmap(
        bridge.ToLinen,
        variable_axes=axes,
        split_rngs={"params": True},
        in_axes=None,
        axis_size=3,
      )(nnx.Linear, args=(2, 2), kwargs={"use_bias": False}, name="layer")

    self.check(layer, (3, 2, 2), lambda x, kernel: x @ kernel)

  @parameterized.parameters(
    {"variable_axes": {"params": 0}},
    {"variable_axes": {"params": 0, "nnx": 0}},
    {"variable_axes": {"params": 0}, "variable_broadcast": "nnx"},
  )
  def test_scan(self, **options):
    class Step(nnx.Module):
      def __init__(self, *, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (2, 2)))

      def __call__(self, x):
        return x @ self.kernel[...], None

    def layer():
      scanned = nn.scan(
        bridge.ToLinen, split_rngs={"params": True}, length=3, **options
      )(Step, name="layer")
      return lambda x: scanned(x)[0]

    self.check(layer, (3, 2, 2), lambda x, k: x @ k[0] @ k[1] @ k[2])

  def test_cond_while_map_variables_and_share_scope(self):
    def linear():
      return bridge.to_linen(nnx.Linear, 2, 2, name="linear")

    class Cond(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.cond(
          False, lambda m, x: m(x), lambda m, x: 2 * m(x), linear(), x
        )

    class Doubled(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.map_variables(
          bridge.ToLinen,
          "params",
          trans_in_fn=lambda p: jax.tree.map(lambda a: 2 * a, p),
          init=True,
        )(nnx.Linear, args=(2, 2), name="linear")(x)

    for model in (Cond(), Doubled()):
      variables = model.init(KEY, X)
      p = variables["params"]["linear"]
      expected = 2 * (X @ p["kernel"] + p["bias"])
      np.testing.assert_allclose(model.apply(variables, X), expected, rtol=1e-5)

    class Shared(nn.Module):
      def setup(self):
        self.linear = bridge.to_linen(nnx.Linear, 2, 2)
        nn.share_scope(self, self.linear)

      @nn.compact
      def __call__(self, x):
        return self.linear(x) + self.param("own", nn.initializers.ones, (2,))

    variables = Shared().init(KEY, X)
    p = variables["params"]
    self.assertCountEqual(p, ["bias", "kernel", "own"])
    np.testing.assert_allclose(
      Shared().apply(variables, X), X @ p["kernel"] + 1, rtol=1e-5
    )


if __name__ == "__main__":
  absltest.main()
