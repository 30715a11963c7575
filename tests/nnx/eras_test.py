"""Programs of Flax 0.10 and of 0.12 run side by side, without warnings."""

import warnings

from absl.testing import absltest
import jax
import jax.numpy as jnp
import numpy as np

import nnx


def _double(variable, value):
  del variable
  return value * 2


class Hooked(nnx.Variable):
  def on_get_value(self, value):
    return value + 1

  def on_set_value(self, value):
    return value - 1


class Counter(nnx.Module):
  def __init__(self):
    self.count = nnx.BatchStat(jnp.float32(0))
    self.hooked = Hooked(jnp.float32(10))
    self.doubled = nnx.Param(jnp.float32(1), get_value_hooks=_double)
    self.ref = nnx.Variable(jnp.float32(0), ref=True)
    self.layers = [nnx.Param(jnp.float32(2), sharding=("a",)), "static"]

  def __call__(self, x):
    self.count.value += 1
    self.ref[...] += 1
    return x * self.doubled + self.hooked


class HooksInGraphsTest(absltest.TestCase):
  """What the engine makes of Variables keeps hooks, metadata and kinds."""

  def check(self, model):
    self.assertEqual(model.hooked.raw_value, 10)
    self.assertEqual(model.hooked.value, 11)
    self.assertEqual(model.hooked[...], 11)
    model.hooked[...] = jnp.float32(5)
    self.assertEqual(model.hooked.raw_value, 4)
    self.assertEqual(model.doubled.value, 2)
    self.assertEqual(model.doubled[...], 2)
    self.assertEqual(model.layers[0].sharding_names, ("a",))
    self.assertEqual(model.ref.value, 0)
    model.ref.value = jnp.float32(7)
    self.assertIsInstance(model.ref.raw_value, jax.Ref)
    self.assertEqual(model.ref[...], 7)

  def test_merge(self):
    self.check(nnx.merge(*nnx.split(Counter())))

  def test_clone(self):
    self.check(nnx.clone(Counter()))

  def test_merge_takes_a_state_from_outside_of_the_trace(self):
    # As 0.10 did, whose States held copies: 0.12 refuses the write.
    model = Counter()
    del model.ref
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.grad
    def grad(params):
      merged = nnx.merge(graphdef, params, rest)
      merged.count.value += params.doubled.value
      return merged.count.value * 3

    self.assertEqual(grad(params).doubled.raw_value, 6)
    self.assertEqual(model.count.value, 0)
    self.assertIs(nnx.merge(graphdef, params, rest).count, model.count)

  def test_tree_map(self):
    model = Counter()
    del model.ref
    model = jax.tree.map(lambda x: x, model)
    model.ref = nnx.Variable(jnp.float32(0), ref=True)
    self.check(model)

  def test_update_carries_metadata(self):
    model = Counter()
    other = Counter()
    other.doubled.set_metadata({})
    nnx.update(model, nnx.state(other, nnx.Param))
    self.assertEqual(model.doubled.value, 1)
    nnx.update(other, nnx.state(Counter(), nnx.Param))
    self.assertEqual(other.doubled.value, 2)

  def test_state_shares_variables(self):
    model = Counter()
    state = nnx.state(model)
    self.assertIs(state.hooked, model.hooked)
    state.layers[0].value = jnp.float32(8)
    self.assertEqual(model.layers[0].value, 8)

  def test_hooks_under_jit(self):
    model = Counter()
    del model.ref
    model.ref = nnx.Variable(jnp.float32(0))

    @nnx.jit
    def step(model, x):
      y = model(x)
      model.hooked.value = jnp.float32(3)
      return y

    self.assertEqual(step(model, jnp.float32(3)), 17)
    self.assertEqual(model.count.value, 1)
    self.assertEqual(model.hooked.raw_value, 2)
    self.assertEqual(step(model, jnp.float32(3)), 9)


class ErasTest(absltest.TestCase):
  def test_flax_0_10(self):
    model = Counter()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    self.assertIsInstance(params["layers"][0], nnx.VariableState)
    self.assertIs(params.layers[0].type, nnx.Param)
    params = jax.tree.map(lambda x: x + 1, params)
    params.layers[0] = params.layers[0].replace(5.0)
    state = nnx.State.merge(params, rest)
    for path, leaf in state.flat_state():
      self.assertIsInstance(path, tuple)
      self.assertIsInstance(leaf, nnx.VariableState)
    model = nnx.merge(graphdef, state)
    self.assertEqual(model.layers[0].value, 5.0)
    flat = dict(nnx.state(model, nnx.Param).flat_state())
    self.assertEqual(set(flat), {("doubled",), ("layers", 0)})
    nnx.update(model, nnx.State.from_flat_path(flat))
    pure = nnx.state(model, nnx.Param).to_pure_dict()
    self.assertEqual(pure["layers"][0], 5.0)

  def test_flax_0_12(self):
    model = Counter()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = nnx.map_state(lambda path, p: p.replace(p.get_value() + 1), params)
    state = nnx.merge_state(params, rest)
    model = nnx.merge(graphdef, state)
    # The hook doubled what was read, and doubles it again.
    self.assertEqual(model.doubled.get_value(), 6)
    self.assertEqual(model.layers[0][...], 3)
    model.layers[0][...] = jnp.float32(4)
    model.layers[0].set_value(model.layers[0].get_value() + 1)
    np.testing.assert_array_equal(model.layers[0].get_raw_value(), 5)
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    self.assertEqual(paths, [("doubled",), ("layers", 0)])


class SpellingsOfFlax010Test(absltest.TestCase):
  def test_update_context_splits_and_merges(self):
    class Model(nnx.Module, experimental_pytree=True):
      def __init__(self):
        self.w = nnx.Param(jnp.ones(2))

    model = Model()
    with nnx.update_context("test") as ctx:
      copy = ctx.merge(*ctx.split(model))
      self.assertIsNot(copy, model)
      copy.size = 3
      self.assertIs(ctx.merge(*ctx.split(copy)), model)
    self.assertEqual(model.size, 3)

  def test_variable_states_are_made_of_a_type(self):
    for state in (
      nnx.VariableState(nnx.Param, 1, a=2),
      nnx.Param.state(1, a=2),
    ):
      self.assertIs(state.type, nnx.Param)
      self.assertEqual((state.value, state.a), (1, 2))
    with self.assertRaisesRegex(
      TypeError, "must be given one value, or a type"
    ):
      nnx.Param(1, 2)

  def test_sharding_constraint_under_a_mesh(self):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    spec = jax.sharding.PartitionSpec("data")
    x = nnx.with_sharding_constraint(
      {"a": jnp.ones(2), "b": 1}, {"a": spec, "b": None}, mesh
    )
    self.assertEqual(x["a"].sharding, jax.sharding.NamedSharding(mesh, spec))
    self.assertEqual(x["b"], 1)

  def test_sharding_constraint_in_the_old_statement(self):
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    spec = jax.sharding.PartitionSpec("data")
    with warnings.catch_warnings():
      warnings.simplefilter("ignore", DeprecationWarning)  # of jax
      with mesh:
        traced = jax.jit(lambda x: nnx.with_sharding_constraint(x, spec)).trace(
          jnp.ones(2)
        )
    self.assertIn("sharding_constraint", str(traced.jaxpr))
    sharding = traced.jaxpr.eqns[0].params["sharding"]
    self.assertEqual(sharding.spec, spec)


if __name__ == "__main__":
  absltest.main()
