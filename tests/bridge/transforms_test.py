"""Bridged modules under the transforms of both sides."""

import re

from absl.testing import absltest, parameterized
from flax import linen as nn
from flax import struct
from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np

import bridge
import nnx

X = jax.random.normal(jax.random.key(0), (3, 4))


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train=True):
    x = nn.Dense(4, name="dense")(x)
    return nn.BatchNorm(use_running_average=not train, name="norm")(x)


def make(module=None):
  model = bridge.ToNNX(module or Net(), rngs=nnx.Rngs(0)).lazy_init(X)
  model.to_nnx__rngs = None  # nothing in it is random
  return model


def assert_close(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b
  )


def once(model, x):
  """What one call in training returns and leaves, by Linen."""
  y, updates = Net().apply(
    bridge.linen_variables(model), x, mutable=["batch_stats"]
  )
  return y, updates["batch_stats"]["norm"]["mean"]


class NNXTransformsTest(parameterized.TestCase):
  """ToNNX under every transform of nnx; batch statistics come back."""

  def check(self, transformed, traces=1):
    model = make()
    y, mean = once(model, X)
    count = []

    def call(model, x):
      count.append(1)
      return model(x)

    function = transformed(call)
    assert_close(function(model, X), y)
    assert_close(model.norm["mean"].value, mean)
    if traces is not None:
      function(model, X)
      self.assertLen(count, traces)

  def test_jit(self):
    self.check(nnx.jit)

  def test_remat(self):
    self.check(lambda f: nnx.jit(nnx.remat(f)))

  def test_jit_partial(self):
    model = make()
    y, mean = once(model, X)
    step = nnx.jit_partial(lambda model, x: model(x), model)
    assert_close(step(X), y)
    assert_close(model.norm["mean"].value, mean)

  def test_cond_and_switch(self):
    def cond(f):
      return lambda m, x: nnx.cond(True, f, lambda m, x: 0 * f(m, x), m, x)

    def switch(f):
      return lambda m, x: nnx.switch(1, [lambda m, x: x, f], m, x)

    self.check(cond, traces=None)
    self.check(switch, traces=None)

  def test_while_and_fori(self):
    def repeat(f):
      def body(i, state):
        m, x = state
        f(m, X)
        return m, x

      return lambda m, x: f(nnx.fori_loop(0, 0, body, (m, x))[0], x)

    self.check(repeat, traces=None)
    model = make()
    expected = make()
    for _ in range(3):
      expected(X)

    def condition(state):
      return state[1] < 3

    def body(state):
      model, n = state
      model(X)
      return model, n + 1

    nnx.while_loop(condition, body, (model, jnp.int32(0)))
    assert_close(model.norm["mean"].value, expected.norm["mean"].value)

  def test_grad_and_value_and_grad(self):
    model = make()
    variables = bridge.linen_variables(model)

    def pure(params):
      y, updates = Net().apply(
        {**variables, "params": params}, X, mutable=["batch_stats"]
      )
      return (y**3).sum(), updates

    (loss, updates), grads = jax.value_and_grad(pure, has_aux=True)(
      variables["params"]
    )
    value, mine = nnx.value_and_grad(lambda m: (m(X) ** 3).sum())(model)
    assert_close(value, loss)
    assert_close(mine["dense"]["kernel"].value, grads["dense"]["kernel"])
    assert_close(
      model.norm["mean"].value, updates["batch_stats"]["norm"]["mean"]
    )

  def test_vmap(self):
    model = make(nn.Dense(4))
    xs = jnp.stack([X, 2 * X])
    axes = nnx.StateAxes({nnx.Param: None})
    mapped = nnx.vmap(lambda m, x: m(x), in_axes=(axes, 0))
    assert_close(mapped(model, xs), jnp.stack([model(x) for x in xs]))

  def test_vmap_over_models(self):
    @nnx.vmap
    def new(key):
      return bridge.ToNNX(nn.Dense(4), rngs=nnx.Rngs(key)).lazy_init(X)

    models = new(jax.random.split(jax.random.key(0), 2))
    self.assertEqual(models.kernel.shape, (2, 4, 4))
    ys = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(models, X)
    assert_close(ys[1], X @ models.kernel[...][1] + models.bias[...][1])

  def test_scan(self):
    model, expected = make(), make()
    xs = jnp.stack([X, 2 * X, 3 * X])

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
    def run(model, x):
      return model, model(x)

    _, ys = run(model, xs)
    assert_close(ys, jnp.stack([expected(x) for x in xs]))
    assert_close(model.norm["mean"].value, expected.norm["mean"].value)

  def test_scan_over_layers(self):
    @nnx.vmap
    def new(key):
      model = bridge.ToNNX(nn.Dense(4), rngs=nnx.Rngs(key)).lazy_init(X)
      model.to_nnx__rngs = None
      return model

    layers = new(jax.random.split(jax.random.key(0), 3))
    run = nnx.scan(
      lambda x, layer: layer(x),
      in_axes=(nnx.Carry, 0),
      out_axes=nnx.Carry,
    )
    expected = X
    for i in range(3):
      expected = expected @ layers.kernel[...][i] + layers.bias[...][i]
    assert_close(run(X, layers), expected)

  def test_custom_vjp_and_eval_shape(self):
    model = make(nn.Dense(4))

    @nnx.custom_vjp
    def call(model, x):
      return model(x)

    call.defvjp(
      lambda m, x: (call(m, x), (m, x)),
      lambda residual, g: (nnx.state(residual[0]), 2 * g[1]),
    )
    grad = nnx.grad(lambda x: call(model, x).sum())(X)
    np.testing.assert_array_equal(grad, np.full_like(X, 2))
    shape = nnx.eval_shape(lambda m, x: m(x), model, X)
    self.assertEqual(shape.shape, (3, 4))

  def test_clone_split_and_merge(self):
    model = make()
    y, mean = once(model, X)
    copy = nnx.merge(*nnx.split(nnx.clone(model)))
    assert_close(copy(X), y)
    assert_close(copy.norm["mean"].value, mean)
    self.assertFalse(np.array_equal(model.norm["mean"].value, mean))

  def test_randomness_goes_on_under_jit(self):
    model = bridge.ToNNX(
      nn.Dropout(0.5, deterministic=False), rngs=nnx.Rngs(dropout=0)
    )
    call = nnx.jit(lambda m: m(jnp.ones(64)))
    first, second = call(model), call(model)
    self.assertFalse(np.array_equal(first, second))


class Step(nnx.Module):
  """Writes state, so that collections travel."""

  def __init__(self, *, rngs):
    init = jax.random.normal(rngs.params(), (4, 4)) / 2
    self.w = nnx.Param(init, out_sharding=("a", "b"))
    self.calls = nnx.BatchStat(jnp.zeros(()))
    self.drop = nnx.Dropout(0.5, rngs=rngs)

  def __call__(self, x):
    assert self.w.out_sharding == ("a", "b"), self.w.out_sharding
    assert self.w.shape == (4, 4)
    self.calls[...] += 1
    return self.drop(x @ self.w[...])


AXES = {"params": 0, "batch_stats": 0}
SPLIT = {"params": True, "dropout": True}


class LinenTransformsTest(parameterized.TestCase):
  """ToLinen under the lifted transforms of Linen."""

  def run_stack(self, lift, **options):
    class Stack(nn.Module):
      @nn.compact
      def __call__(self, x):
        return lift(**options)(bridge.to_linen(Step, name="step"), x)

    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = Stack().init(rngs, X)
    y, updates = Stack().apply(variables, X, rngs=rngs, mutable=["batch_stats"])
    return variables, y, updates

  def check_axes(self, variables, updates, index):
    w = variables["params"]["step"]["w"]
    shape, names = [4, 4], ["a", "b"]
    shape.insert(index, 3)
    names.insert(index, "layers")
    self.assertIsInstance(w, bridge.NNXMeta)
    self.assertEqual(list(w.value.shape), shape)
    self.assertEqual(w.metadata["out_sharding"], tuple(names))
    self.assertFalse(
      np.array_equal(w.value.take(0, index), w.value.take(1, index))
    )
    np.testing.assert_array_equal(
      updates["batch_stats"]["step"]["calls"], np.ones(3)
    )

  @parameterized.parameters(0, 1, 2)
  def test_scan(self, index):
    def lift():
      body = nn.scan(
        lambda module, carry, _: (module(carry), None),
        variable_axes={"params": index, "batch_stats": 0},
        variable_broadcast="nnx",
        split_rngs=SPLIT,
        length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )
      return lambda module, x: body(module, x, None)[0]

    variables, y, updates = self.run_stack(lift)
    self.check_axes(variables, updates, index)
    self.assertEqual(y.shape, X.shape)

  def test_vmap(self):
    def lift():
      return nn.vmap(
        lambda module, x: module(x),
        variable_axes={**AXES, "nnx": None},
        split_rngs=SPLIT,
        in_axes=None,
        axis_size=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )

    variables, y, updates = self.run_stack(lift)
    self.check_axes(variables, updates, 0)
    self.assertEqual(y.shape, (3, *X.shape))

  @parameterized.parameters(nn.remat, nn.jit, nn.checkpoint)
  def test_transforms_that_add_no_axis(self, transform):
    variables, y, updates = self.run_stack(
      lambda: transform(lambda module, x: module(x))
    )
    w = variables["params"]["step"]["w"]
    self.assertEqual(w.metadata["out_sharding"], ("a", "b"))
    self.assertEqual(updates["batch_stats"]["step"]["calls"], 1)
    expected = X @ w.value * 2
    kept = np.asarray(y) != 0
    assert_close(np.asarray(y)[kept], np.asarray(expected)[kept])

  def test_grad_of_a_scan(self):
    class Stack(nn.Module):
      @nn.compact
      def __call__(self, x):
        body = nn.scan(
          lambda module, carry, _: (module(carry), None),
          variable_axes={"params": 0},
          variable_broadcast="nnx",
          split_rngs={"params": True},
          length=3,
        )
        linear = bridge.to_linen(nnx.Linear, 4, 4, name="linear")
        return body(linear, x, None)[0]

    variables = Stack().init(jax.random.key(0), X)

    def loss(params):
      return Stack().apply({**variables, "params": params}, X).sum()

    def plain(params):
      x = X
      for i in range(3):
        x = x @ params["linear"]["kernel"][i] + params["linear"]["bias"][i]
      return x.sum()

    params = variables["params"]
    assert_close(jax.grad(loss)(params), jax.grad(plain)(params))


class Tagged(struct.PyTreeNode, meta.AxisMetadata):
  """A metadata box of a user's, which knows nothing of nnx."""

  value: jax.Array
  tags: tuple = struct.field(pytree_node=False, default=())

  def unbox(self):
    return self.value

  def replace_boxed(self, val):
    return self.replace(value=val)

  def add_axis(self, index, params):
    tags = list(self.tags)
    tags.insert(index, params.get(meta.PARTITION_NAME))
    return self.replace(tags=tuple(tags))

  def remove_axis(self, index, params):
    tags = list(self.tags)
    del tags[index]
    return self.replace(tags=tuple(tags))


BOXES = {
  "partitioned": nn.with_partitioning(nn.initializers.ones, ("a", "b")),
  "logical": nn.with_logical_partitioning(nn.initializers.ones, ("a", "b")),
  "custom": lambda key, shape, dtype=None: Tagged(
    jnp.ones(shape, dtype), ("a", "b")
  ),
  "nnx": lambda key, shape, dtype=None: bridge.NNXMeta(
    nnx.Param, jnp.ones(shape, dtype), {"out_sharding": ("a", "b")}
  ),
}


class BoxesTest(parameterized.TestCase):
  @parameterized.parameters(*BOXES)
  def test_there_and_back_with_names(self, name):
    module = nn.Dense(4, kernel_init=BOXES[name])
    variables = module.init(jax.random.key(0), X)
    box = variables["params"]["kernel"]
    model = bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(X)
    back = bridge.linen_variables(model)["params"]["kernel"]
    self.assertIs(type(back), type(box))
    self.assertEqual(vars(back).keys(), vars(box).keys())
    for field, value in vars(box).items():
      if field != "value":
        self.assertEqual(getattr(back, field), value)
    assert_close(model(X), module.apply(variables, X))
    assert_close(nnx.jit(lambda m: m(X))(model), module.apply(variables, X))
    if name in ("partitioned", "logical", "nnx"):
      self.assertEqual(model.kernel.get_metadata("out_sharding"), ("a", "b"))
    else:
      self.assertEqual(model.kernel.tags, ("a", "b"))


class HloTest(absltest.TestCase):
  """Compiled programs are those of the native side."""

  def text(self, function, *args):
    text = jax.jit(function).lower(*args).compile().as_text()
    # Names of functions and source lines are no part of the computation.
    text = re.sub(r", metadata=\{[^}]*\}|HloModule.*|//.*", "", text)
    text = re.sub(r"^(File|Function|Stack).*|^\d+ .*", "", text, flags=re.M)
    opcodes = re.findall(r"= \S+ ([\w\-]+)\(", text)
    self.assertNotEmpty(opcodes)
    return sorted(opcodes)

  def test_to_nnx(self):
    model = make()
    variables = bridge.linen_variables(model)
    graphdef, state = nnx.split(model)

    def bridged(state, x):
      model = nnx.merge(graphdef, state)
      y = model(x)
      return y, model.norm["mean"].value, model.norm["var"].value

    def native(variables, x):
      y, updates = Net().apply(variables, x, mutable=["batch_stats"])
      stats = updates["batch_stats"]["norm"]
      return y, stats["mean"], stats["var"]

    self.assertEqual(
      self.text(bridged, state, X), self.text(native, variables, X)
    )
    self.assertEqual(
      str(jax.make_jaxpr(bridged)(state, X)).count(" = "),
      str(jax.make_jaxpr(native)(variables, X)).count(" = "),
    )

  def test_to_linen(self):
    def new(rngs):
      return nnx.Sequential(
        nnx.Linear(4, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
      )

    model = bridge.to_linen(new)
    variables = model.init(jax.random.key(0), X)
    graphdef, state = nnx.split(new(nnx.Rngs(0)))
    rest = {"nnx": variables["nnx"]}

    def bridged(params, x):
      return model.apply({**rest, "params": params}, x)

    def native(state, x):
      return nnx.merge(graphdef, state)(x)

    self.assertEqual(
      self.text(bridged, variables["params"], X), self.text(native, state, X)
    )
    self.assertEqual(
      str(jax.make_jaxpr(bridged)(variables["params"], X)).count(" = "),
      str(jax.make_jaxpr(native)(state, X)).count(" = "),
    )


if __name__ == "__main__":
  absltest.main()
