"""nnx.jit: what is seen outside, donation, options, lifetimes."""

import functools
import gc
import re
import weakref

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from nnx.transforms import lift
from tests.nnx.transforms.models import Dense, Tower, Traced


class SeenOutsideTest(parameterized.TestCase):
  def test_written_values_and_shared_references(self):
    tower = Tower()

    @nnx.jit
    def double(tower):
      tower.tied[...] *= 2
      return tower.layers[0].kernel.value

    result = double(tower)
    np.testing.assert_array_equal(result, 2 * np.ones((2, 3)))
    self.assertIs(tower.tied, tower.layers[0].kernel)
    np.testing.assert_array_equal(tower.tied.value, 2 * np.ones((2, 3)))

  def test_result_is_the_callers_object(self):
    tower = Tower()
    layer, same, kernel = nnx.jit(lambda t: (t.layers[1], t.root, t.tied))(
      tower
    )
    self.assertIs(layer, tower.layers[1])
    self.assertIs(same, tower)
    self.assertIs(kernel, tower.tied)

  def test_changes_of_structure(self):
    tower = Tower()
    removed = tower.layers[1]

    @nnx.jit
    def change(tower):
      tower.layers.append(Dense(5))
      tower.layers[1] = tower.layers[0]
      tower.config["names"].append("c")
      tower.config["depth"] += 1
      tower.noise = nnx.Intermediate(jnp.ones(2))
      tower.scale = 0.5
      del tower.tied
      return tower.layers[-1]

    made = change(tower)
    self.assertLen(tower.layers, 3)
    self.assertIs(made, tower.layers[2])
    self.assertIs(tower.layers[0], tower.layers[1])
    self.assertIsNot(removed, tower.layers[1])
    self.assertEqual(tower.config, {"depth": 3, "names": ["a", "b", "c"]})
    self.assertEqual(tower.scale, 0.5)
    self.assertFalse(hasattr(tower, "tied"))
    np.testing.assert_array_equal(tower.noise.value, np.ones(2))
    self.assertTrue(made._can_update)
    change_again = nnx.jit(lambda made: made(jnp.ones((1, 2))))
    self.assertEqual(change_again(made).shape, (1, 5))

  def test_arguments_that_are_containers_stay_as_they_are(self):
    batch = {"x": jnp.ones(2), "label": jnp.zeros(2)}

    @nnx.jit
    def take(batch):
      batch["extra"] = batch.pop("label")
      return batch

    result = take(batch)
    self.assertEqual(set(batch), {"x", "label"})
    self.assertEqual(set(result), {"x", "extra"})

  def test_array_attributes_and_arrays_in_lists(self):
    class Arrays(nnx.Module):
      def __init__(self):
        self.a = jnp.zeros(2)
        self.b = [np.ones(2), nnx.Param(jnp.ones(1))]

    @nnx.jit
    def step(arrays):
      arrays.a = arrays.a + 1
      arrays.b[0] = arrays.b[0] * 3

    arrays = Arrays()
    step(arrays)
    step(arrays)
    np.testing.assert_array_equal(arrays.a, [2, 2])
    np.testing.assert_array_equal(arrays.b[0], [9, 9])

  def test_values_that_are_pytrees(self):
    variable = nnx.Variable({"a": jnp.ones(2), "b": (1, None)})

    @nnx.jit
    def step(variable):
      value = dict(variable.value)
      value["a"] = value["a"] + value["b"][0]
      value["c"] = jnp.zeros(1)
      variable.value = value

    step(variable)
    np.testing.assert_array_equal(variable.value["a"], [2, 2])
    self.assertEqual(set(variable.value), {"a", "b", "c"})

  def test_metadata_written_inside(self):
    param = nnx.Param(jnp.ones(2), tag="a")

    @nnx.jit
    def rename(param):
      param.tag = "b"

    rename(param)
    self.assertEqual(param.tag, "b")

  def test_error_inside_changes_nothing(self):
    tower = Tower()

    @nnx.jit
    def fail(tower):
      tower.tied[...] *= 2
      tower.layers.append(3)
      raise KeyError("stop")

    with self.assertRaisesRegex(KeyError, "stop"):
      fail(tower)
    np.testing.assert_array_equal(tower.tied.value, np.ones((2, 3)))
    self.assertLen(tower.layers, 2)

  def test_nested_jits(self):
    tower = Tower()

    @nnx.jit
    def inner(layer, by):
      layer.bias[...] += by
      layer.steps = 1

    @nnx.jit
    def outer(tower, by):
      for layer in tower.layers:
        inner(layer, by)
      inner(tower.layers[0], by)
      return tower.layers[0].bias + 0

    np.testing.assert_array_equal(outer(tower, 1.0), [2, 2, 2])
    np.testing.assert_array_equal(tower.layers[1].bias.value, [1, 1, 1])
    self.assertEqual(tower.layers[1].steps, 1)

  def test_states_and_graphdefs_are_arguments(self):
    dense = Dense()
    graphdef, state = nnx.split(dense)

    @nnx.jit
    def apply(graphdef, state, x):
      model = nnx.merge(graphdef, state)
      model.bias[...] += 1
      return model(x), nnx.state(model)

    y, new_state = apply(graphdef, state, jnp.ones((1, 2)))
    np.testing.assert_array_equal(y, [[3, 3, 3]])
    self.assertIsInstance(new_state, nnx.State)
    np.testing.assert_array_equal(new_state.bias.value, np.ones(3))

  def test_same_results_as_flax(self):
    def program(lib):
      class Block(lib.Module):
        def __init__(self):
          self.w = lib.Param(jnp.full((2, 2), 0.5))
          self.calls = lib.Variable(jnp.zeros((), jnp.int32))

        def __call__(self, x):
          self.calls[...] += 1
          return jnp.tanh(x @ self.w[...])

      block = Block()

      @lib.jit
      def step(block, x):
        y = block(block(x))
        block.w[...] = block.w[...] - 0.1 * y.sum()
        return y

      outs = [step(block, jnp.arange(4.0).reshape(2, 2)) for _ in range(3)]
      return outs, block.w[...], block.calls[...]

    ours, theirs = program(nnx), program(flax_nnx)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


class DonationTest(parameterized.TestCase):
  def test_only_written_variables_are_donated(self):
    dense = Dense()
    kernel, bias = dense.kernel.value, dense.bias.value

    @functools.partial(nnx.jit, donate_argnums=0)
    def step(dense):
      dense.kernel[...] *= 2

    step(dense)
    self.assertTrue(kernel.is_deleted())
    self.assertFalse(bias.is_deleted())
    step(dense)
    np.testing.assert_array_equal(dense.kernel.value, np.full((2, 3), 4))

  def test_arrays_are_donated(self):
    x = jnp.ones(4)
    y = nnx.jit(lambda x: x + 1, donate_argnames="x")(x)
    self.assertTrue(x.is_deleted())
    np.testing.assert_array_equal(y, 2 * np.ones(4))

  def test_no_donation_without_asking(self):
    dense = Dense()
    kernel = dense.kernel.value

    @nnx.jit
    def step(dense):
      dense.kernel[...] *= 2

    step(dense)
    self.assertFalse(kernel.is_deleted())

  def test_one_array_in_two_variables(self):
    dense = Dense()
    dense.bias.value = dense.kernel.value
    target = nnx.clone(dense)

    @functools.partial(nnx.jit, donate_argnums=0)
    def step(dense, target):
      dense.kernel[...] += target.kernel
      dense.bias[...] += 2
      return target.kernel + 0

    np.testing.assert_array_equal(step(dense, target), np.ones((2, 3)))
    np.testing.assert_array_equal(dense.kernel.value, np.full((2, 3), 2))
    np.testing.assert_array_equal(dense.bias.value, np.full((2, 3), 3))
    np.testing.assert_array_equal(target.kernel.value, np.ones((2, 3)))

  def test_traced_once_a_shape(self):
    def double(param):
      param[...] *= 2

    fun = Traced(double)
    jitted = nnx.jit(fun, donate_argnums=0)
    small, large = nnx.Param(jnp.ones(2)), nnx.Param(jnp.ones(3))
    for _ in range(3):
      jitted(small)
      jitted(large)
    self.assertEqual(fun.count, 2)
    np.testing.assert_array_equal(large.value, np.full(3, 8))

  def test_written_for_one_shape_only(self):
    class Two(nnx.Module):
      def __init__(self):
        self.a = nnx.Param(jnp.ones(2))
        self.b = nnx.Param(jnp.ones(2))

    @functools.partial(nnx.jit, donate_argnums=0)
    def step(two, x):
      if x.ndim == 1:
        two.a[...] *= 2
      else:
        two.b[...] *= 3

    two = Two()
    step(two, jnp.ones(1))
    step(two, jnp.ones((1, 1)))
    step(two, jnp.ones(1))
    np.testing.assert_array_equal(two.a.value, [4, 4])
    np.testing.assert_array_equal(two.b.value, [3, 3])

  def test_alias_in_the_compiled_program(self):
    dense = Dense(64)

    @functools.partial(nnx.jit, donate_argnums=0)
    def step(dense, x):
      dense.kernel[...] -= x

    memory = step.lower(dense, 1.0).compile().memory_analysis()
    self.assertEqual(memory.alias_size_in_bytes, dense.kernel.value.nbytes)


class OptionsTest(parameterized.TestCase):
  def test_static_by_position_and_name(self):
    fun = Traced(lambda x, n: x * n)
    jitted = nnx.jit(fun.fun, static_argnames="n")
    self.assertEqual(jitted(2.0, 3), 6)
    self.assertEqual(jitted(2.0, n=4), 8)
    self.assertEqual(nnx.jit(fun.fun, static_argnums=-1)(2.0, n=5), 10)

  def test_decorators_and_methods(self):
    class Model(Dense):
      @nnx.jit
      def plain(self, x):
        self.bias[...] += 1
        return self(x)

      @nnx.jit(static_argnums=2)
      def with_options(self, x, n):
        return self(x) * n

    model = Model()
    x = jnp.ones((1, 2))
    np.testing.assert_array_equal(model.plain(x), [[3, 3, 3]])
    np.testing.assert_array_equal(model.with_options(x, 2), [[6, 6, 6]])
    np.testing.assert_array_equal(nnx.jit(model.__call__)(x), [[3, 3, 3]])
    bound = nnx.jit(
      model.with_options.__func__.__wrapped__.__get__(model), static_argnums=1
    )
    np.testing.assert_array_equal(bound(x, 3), [[9, 9, 9]])
    self.assertEqual(model.plain.__name__, "plain")

  def test_bound_method_changes_its_module(self):
    class Counter(nnx.Module):
      def __init__(self):
        self.count = nnx.Variable(jnp.zeros(()))

      def increment(self, by):
        self.count[...] += by

    counter = Counter()
    increment = nnx.jit(counter.increment)
    increment(2.0)
    increment(2.0)
    self.assertEqual(counter.count.value, 4)

  def test_jit_partial(self):
    dense = Dense()

    def step(dense, x, *, by):
      dense.bias[...] += by
      return dense(x)

    jitted = nnx.jit_partial(step, dense, donate_argnums=0)
    for _ in range(2):
      y = jitted(jnp.ones((1, 2)), by=1.0)
    np.testing.assert_array_equal(y, [[4, 4, 4]])
    self.assertEqual(jitted.eval_shape(jnp.ones((1, 2)), by=1.0).shape, (1, 3))

  def test_lower_compile_and_call(self):
    dense = Dense()

    @nnx.jit
    def step(dense, x):
      dense.bias[...] += 1
      return dense(x)

    compiled = step.lower(dense, jnp.ones((1, 2))).compile()
    np.testing.assert_array_equal(
      compiled(dense, jnp.ones((1, 2))), [[3, 3, 3]]
    )
    np.testing.assert_array_equal(dense.bias.value, np.ones(3))
    dense.size = 7
    with self.assertRaisesRegex(
      ValueError, "must be called with arguments of the structure"
    ):
      compiled(dense, jnp.ones((1, 2)))

  def test_arrays_of_the_outside_come_first_and_have_no_names(self):
    # Where jax passes them as arguments it puts names in front of ours.
    table = jnp.arange(3.0)
    jitted = nnx.jit(lambda m, x: m(x) + table)
    call = lift.Call(jitted.options.policy, jitted.__wrapped__, (Dense(), 1.0))
    names = call.lifted.leaf_names
    self.assertEqual(("", *names([1, 2])), ("",) + names([1, 2]))
    before = jax.config.jax_use_simplified_jaxpr_constants
    jax.config.update("jax_use_simplified_jaxpr_constants", True)
    try:
      lowered = jitted.lower(Dense(), jnp.ones((1, 2)))
      y = jitted(Dense(), jnp.ones((1, 2)))
    finally:
      jax.config.update("jax_use_simplified_jaxpr_constants", before)
    np.testing.assert_array_equal(y, [[2, 3, 4]])
    arguments = re.search(
      r"@main\((.*?)\) ->", lowered.as_text(debug_info=True)
    )
    self.assertEqual(
      re.findall(r'loc\("(.*?)"\)', arguments[1]), ["m.bias", "m.kernel", "x"]
    )

  def test_eval_shape_leaves_arguments_alone(self):
    dense = Dense()

    @nnx.jit
    def step(dense, x):
      dense.bias[...] += 1
      dense.extra = 1
      return dense(x)

    self.assertEqual(step.eval_shape(dense, jnp.ones((5, 2))).shape, (5, 3))
    self.assertFalse(hasattr(dense, "extra"))
    np.testing.assert_array_equal(dense.bias.value, np.zeros(3))

  def test_inline(self):
    # When a call is inlined, tracing or lowering, depends on jax's version.
    def jaxpr(jit, **options):
      inner = jit(lambda x: x + 1, **options)
      return str(jax.make_jaxpr(lambda x: inner(x))(1.0))

    self.assertEqual(
      jaxpr(nnx.jit, inline=True).count("jit["),
      jaxpr(jax.jit, inline=True).count("jit["),
    )
    text = (
      nnx.jit(lambda x: nnx.jit(lambda y: y + 1, inline=True)(x))
      .lower(1.0)
      .as_text()
    )
    self.assertNotIn("func.call", text)

  def test_disable_jit(self):
    dense = Dense()

    @nnx.jit
    def step(dense, x):
      if x > 0:  # only possible on values
        dense.bias[...] += x
      return dense

    with jax.disable_jit():
      self.assertIs(step(dense, 1.0), dense)
    np.testing.assert_array_equal(dense.bias.value, np.ones(3))

  def test_graph_options_are_accepted(self):
    dense = Dense()
    jitted = nnx.jit(lambda d: d.bias + 1, graph=False, graph_updates=False)
    np.testing.assert_array_equal(jitted(dense), np.ones(3))


class PartialTest(absltest.TestCase):
  def test_compiled_takes_the_remaining_arguments(self):
    partial = nnx.jit_partial(lambda m, x: x @ m.kernel, Dense())
    x = jnp.ones((4, 2))
    lowered = partial.lower(x)
    np.testing.assert_allclose(lowered.compile()(x), partial(x))
    self.assertIn("dot", lowered.as_text())


class LifetimeTest(absltest.TestCase):
  def test_models_are_collected(self):
    tower = Tower()
    step = nnx.jit(lambda t: t.tied + 1)
    step(tower)
    ref = weakref.ref(tower)
    del tower
    gc.collect()
    self.assertIsNone(ref())

  def test_function_in_a_cycle_is_collected(self):
    class Holder:
      pass

    holder = Holder()
    holder.step = nnx.jit(functools.partial(lambda own, x: x, [holder]))
    holder.step(jnp.ones(1))
    ref = weakref.ref(holder)
    del holder
    gc.collect()
    self.assertIsNone(ref())

  def test_no_tracer_leaks(self):
    with jax.checking_leaks():
      tower = Tower()

      @nnx.jit
      def step(tower, x):
        tower.layers.append(Dense())
        tower.tied[...] += x
        return tower.layers[0](x * jnp.ones((1, 2)))

      for _ in range(3):
        step(tower, 1.0)
    self.assertLen(tower.layers, 5)


if __name__ == "__main__":
  absltest.main()
