"""Linen's layers through the bridge and back: values, gradients, state."""

import pathlib
import tempfile

from absl.testing import absltest, parameterized
from flax import linen as nn
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

import bridge
import nnx

X = jax.random.normal(jax.random.key(0), (2, 5, 4))
DROPOUT = jax.random.key(7)
KEY = jax.random.key(0)


class Net(nn.Module):
  """One with several collections, nested."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name="dense")(x)
    x = nn.BatchNorm(use_running_average=False, name="norm")(x)
    return nn.MultiHeadDotProductAttention(2, name="attention")(x)


# Module, arguments of its call, and the collections that a call writes.
ZOO = {
  "dense": (nn.Dense(3), (X,), ()),
  "conv": (nn.Conv(3, (3,)), (X,), ()),
  "batch_norm": (
    nn.BatchNorm(use_running_average=False),
    (X,),
    ("batch_stats",),
  ),
  "layer_norm": (nn.LayerNorm(), (X,), ()),
  "attention": (nn.MultiHeadDotProductAttention(2), (X,), ()),
  "decoding": (
    nn.MultiHeadDotProductAttention(2, decode=True),
    (X[:, :1],),
    ("cache",),
  ),
  "lstm": (nn.RNN(nn.LSTMCell(3)), (X,), ()),
  "dropout": (nn.Dropout(0.5, deterministic=False), (X,), ()),
  "net": (Net(), (X,), ("batch_stats",)),
}


def variables_of(name):
  module, args, _ = ZOO[name]
  sample = (X,) if name == "decoding" else args
  return module.init({"params": jax.random.key(1), "dropout": DROPOUT}, *sample)


def to_nnx(name, variables):
  """The bridged module with the given variables."""
  module, args, _ = ZOO[name]
  sample = (X,) if name == "decoding" else args
  rngs = nnx.Rngs(0, dropout=1)
  model = bridge.ToNNX(module, rngs=rngs).lazy_init(*sample)
  bridge.load_linen_variables(model, variables)
  return model


def assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), a, b
  )


class LinenToNNXTest(parameterized.TestCase):
  @parameterized.parameters(*ZOO)
  def test_values_gradients_and_state(self, name):
    module, args, written = ZOO[name]
    variables = variables_of(name)
    model = to_nnx(name, variables)
    assert_same(bridge.linen_variables(model), variables)
    rngs = {"dropout": DROPOUT}
    y, updates = module.apply(
      variables, *args, rngs=rngs, mutable=list(written)
    )
    assert_close(model(*args, rngs=rngs), y)
    self.assertCountEqual(updates, written)
    after = bridge.linen_variables(model)
    for collection in written:
      assert_close(after[collection], updates[collection])
    if not variables.get("params"):
      return

    def loss(params):
      result = module.apply(
        {**variables, "params": params}, *args, rngs=rngs, mutable=written
      )
      return (result[0] ** 2).sum()

    expected = jax.grad(loss)(variables["params"])
    model = to_nnx(name, variables)
    grads = nnx.grad(lambda m: (m(*args, rngs=rngs) ** 2).sum())(model)
    gradients = nnx.to_pure_dict(grads, lambda variable: variable)
    assert_close(
      bridge.nnx_attrs_to_linen_vars(gradients), {"params": expected}
    )

  def test_decoding_step_by_step(self):
    module, _, _ = ZOO["decoding"]
    variables = variables_of("decoding")
    model = to_nnx("decoding", variables)
    for i in range(4):
      y, updates = module.apply(variables, X[:, i : i + 1], mutable=["cache"])
      variables = {**variables, **updates}
      assert_close(model(X[:, i : i + 1]), y)
    assert_close(bridge.linen_variables(model), variables)


class ThereAndBackTest(parameterized.TestCase):
  """Linen -> NNX -> Linen, and NNX -> Linen -> NNX."""

  @parameterized.parameters("net", "decoding", "lstm", "dropout")
  def test_linen(self, name):
    module, args, written = ZOO[name]
    variables = variables_of(name)
    rngs = {"params": jax.random.key(1), "dropout": DROPOUT}
    sample = (X,) if name == "decoding" else args

    def wrapped(rngs):
      return bridge.ToNNX(module, rngs=rngs)

    twice = bridge.ToLinen(wrapped)
    made = twice.init(rngs, *sample)
    made = {k: v for k, v in made.items() if k != "nnx"}
    self.assertEqual(
      jax.tree.map(jnp.shape, made), jax.tree.map(jnp.shape, variables)
    )
    given = {**variables, "nnx": twice.init(rngs, *sample)["nnx"]}
    mutable = list(written) or False
    expected = module.apply(
      variables, *args, rngs={"dropout": DROPOUT}, mutable=mutable
    )
    if name == "dropout":  # keys go through a stream of nnx
      expected = twice.apply(given, *args, rngs=rngs, mutable=mutable)
    assert_close(
      twice.apply(given, *args, rngs=rngs, mutable=mutable), expected
    )

  @parameterized.parameters(
    lambda rngs: nnx.Linear(4, 3, rngs=rngs),
    lambda rngs: nnx.BatchNorm(4, rngs=rngs),
    lambda rngs: nnx.Sequential(
      nnx.Conv(4, 4, (3,), rngs=rngs), nnx.LayerNorm(4, rngs=rngs)
    ),
    lambda rngs: nnx.RNN(nn_cell(rngs)),
  )
  def test_nnx(self, new):
    inner = new(nnx.Rngs(0))
    state = nnx.state(inner, nnx.Not(nnx.RngState))
    linen = bridge.ToLinen(lambda rngs: new(rngs))
    model = bridge.ToNNX(linen, rngs=nnx.Rngs(1)).lazy_init(X)
    mine = {
      path: v
      for path, v in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState)))
      if "nnx" not in path and "graphdef" not in path
    }
    theirs = dict(nnx.to_flat_state(state))
    for path, variable in theirs.items():
      self.assertIs(type(mine[path]), type(variable))
      mine[path].value = variable.value
    expected, y = inner(X), model(X)
    assert_close(y, expected)
    for path, variable in theirs.items():
      assert_close(mine[path].value, variable.value)


def nn_cell(rngs):
  return nnx.GRUCell(4, 3, rngs=rngs)


class LoadTest(absltest.TestCase):
  def test_without_initialising(self):
    module, args, _ = ZOO["net"]
    variables = variables_of("net")
    model = bridge.ToNNX(module)
    bridge.load_linen_variables(model, variables)
    assert_same(bridge.linen_variables(model), variables)
    assert_close(
      model(*args), module.apply(variables, *args, mutable=["batch_stats"])[0]
    )

  def test_boxes_stay(self):
    init = nn.with_partitioning(nn.initializers.ones, ("a", "b"))
    model = bridge.ToNNX(
      nn.Dense(3, kernel_init=init), rngs=nnx.Rngs(0)
    ).lazy_init(X)
    bare = nn.meta.unbox(bridge.linen_variables(model))
    bridge.load_linen_variables(model, jax.tree.map(lambda x: x + 1, bare))
    box = bridge.linen_variables(model)["params"]["kernel"]
    self.assertEqual(box.names, ("a", "b"))
    np.testing.assert_array_equal(box.value, np.full((4, 3), 2))
    # Without a target, a checkpoint makes dicts of boxes.
    restored = serialization.msgpack_restore(
      serialization.to_bytes(nn.Dense(3, kernel_init=init).init(KEY, X))
    )
    self.assertEqual(list(restored["params"]["kernel"]), ["value"])
    bridge.load_linen_variables(model, restored)
    box = bridge.linen_variables(model)["params"]["kernel"]
    self.assertEqual(box.names, ("a", "b"))
    np.testing.assert_array_equal(box.value, np.ones((4, 3)))

  def test_errors(self):
    model = to_nnx("dense", variables_of("dense"))
    with self.assertRaisesRegex(
      ValueError,
      r"those of `ToNNX\(Dense\)`, but `params/bias`, `params/kernel` are"
      r" missing and `cache/kernel` are not its own",
    ):
      bridge.load_linen_variables(model, {"cache": {"kernel": X}})
    with self.assertRaisesRegex(
      ValueError,
      r"`params/kernel` of `ToNNX\(Dense\)` must have the shape \(4, 3\), but"
      r" got \(2, 5, 4\). Initialise the module with",
    ):
      bridge.load_linen_variables(
        model, {"params": {"kernel": X, "bias": jnp.ones(3)}}
      )


class CheckpointTest(absltest.TestCase):
  """A checkpoint of either side loads into the other."""

  def setUp(self):
    super().setUp()
    self.module, self.args, _ = ZOO["net"]
    self.variables = variables_of("net")
    # What `to_nnx` would have without the checkpoint.
    self.other = jax.tree.map(lambda x: x + 1, self.variables)

  def test_msgpack_of_linen_into_nnx(self):
    data = serialization.to_bytes(self.variables)
    restored = serialization.from_bytes(self.other, data)
    assert_same(bridge.linen_variables(to_nnx("net", restored)), self.variables)
    restored = serialization.msgpack_restore(data)
    assert_same(bridge.linen_variables(to_nnx("net", restored)), self.variables)

  def test_msgpack_of_nnx_into_linen(self):
    model = to_nnx("net", self.variables)
    data = serialization.to_bytes(bridge.linen_variables(model))
    restored = serialization.from_bytes(self.other, data)
    assert_same(restored, self.variables)
    self.module.apply(restored, *self.args, mutable=["batch_stats"])

  def test_orbax_of_linen_into_nnx(self):
    path = pathlib.Path(tempfile.mkdtemp(), "linen")
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, self.variables)
      checkpointer.wait_until_finished()
      model = to_nnx("net", self.other)
      restored = checkpointer.restore(path, bridge.linen_variables(model))
    bridge.load_linen_variables(model, restored)
    assert_same(bridge.linen_variables(model), self.variables)

  def test_orbax_of_nnx_into_linen(self):
    path = pathlib.Path(tempfile.mkdtemp(), "nnx")
    model = to_nnx("net", self.variables)
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, bridge.linen_variables(model))
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(path, self.other)
    assert_same(restored, self.variables)

  def test_orbax_of_the_state_into_linen(self):
    path = pathlib.Path(tempfile.mkdtemp(), "state")
    model = to_nnx("net", self.variables)
    state = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    with ocp.StandardCheckpointer() as checkpointer:
      checkpointer.save(path, state)
      checkpointer.wait_until_finished()
      restored = checkpointer.restore(path)
    fresh = to_nnx("net", self.other)
    target = nnx.state(fresh, nnx.Not(nnx.RngState))
    nnx.replace_by_pure_dict(target, restored)
    nnx.update(fresh, target)
    assert_same(bridge.linen_variables(fresh), self.variables)


if __name__ == "__main__":
  absltest.main()
