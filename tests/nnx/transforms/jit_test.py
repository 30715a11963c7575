"""nnx.jit: what is seen outside, recompilation, donation, placement."""

import os

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import dataclasses
import functools
import gc
import re
import weakref

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

import nnx
from nnx.transforms import lift


class Dense(nnx.Module):
  def __init__(self, size=3):
    self.kernel = nnx.Param(jnp.ones((2, size)))
    self.bias = nnx.Param(jnp.zeros(size))
    self.size = size

  def __call__(self, x):
    return x @ self.kernel + self.bias


class Tower(nnx.Module):
  def __init__(self):
    self.layers = [Dense(), Dense()]
    self.tied = self.layers[0].kernel
    self.config = {"depth": 2, "names": ["a", "b"]}
    self.root = self


@dataclasses.dataclass
class Unfrozen:
  """Has no hash."""

  depth: int = 2
  names: list[str] = dataclasses.field(default_factory=lambda: ["a"])


class Traced:
  """A function that counts how often it is traced."""

  def __init__(self, fun):
    self.fun = fun
    self.count = 0

  def __call__(self, *args, **kwargs):
    self.count += 1
    return self.fun(*args, **kwargs)


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


@dataclasses.dataclass(frozen=True)
class Config:
  rate: float


class HashByValue:
  def __init__(self, value):
    self.value = value

  def __hash__(self):
    return hash(self.value)

  def __eq__(self, other):
    return type(self) is type(other) and self.value == other.value


class CompilesAgainTest(parameterized.TestCase):
  """A changed structure compiles again and an equal one does not."""

  def check(self, model, change, recompiles=True):
    fun = Traced(lambda model: jax.tree.leaves(nnx.state(model)))
    jitted = nnx.jit(fun)
    jitted(model)
    jitted(model)
    self.assertEqual(fun.count, 1)
    change(model)
    jitted(model)
    self.assertEqual(fun.count, 2 if recompiles else 1)
    jitted(model)
    self.assertEqual(fun.count, 2 if recompiles else 1)

  @parameterized.named_parameters(
    ("static_attribute", lambda t: setattr(t.layers[0], "size", 4)),
    ("nested_dict", lambda t: t.config.update(depth=3)),
    ("nested_list", lambda t: t.config["names"].append("c")),
    ("list_grows", lambda t: t.layers.append(Dense())),
    ("list_shrinks", lambda t: t.layers.pop()),
    ("list_of_statics_grows", lambda t: t.layers.append(1)),
    ("unshared", lambda t: setattr(t, "tied", nnx.Param(jnp.ones((2, 3))))),
    ("shared_elsewhere", lambda t: setattr(t, "tied", t.layers[1].kernel)),
    ("layers_shared", lambda t: t.layers.__setitem__(1, t.layers[0])),
    ("new_attribute", lambda t: setattr(t, "extra", None)),
    ("dict_write", lambda t: t.__dict__.__setitem__("extra", 1)),
    ("dict_overwrite", lambda t: t.layers[0].__dict__.__setitem__("size", 9)),
    ("dict_delete", lambda t: t.__dict__.pop("config")),
    ("deleted_attribute", lambda t: delattr(t, "tied")),
    ("metadata", lambda t: setattr(t.tied, "tag", "x")),
    (
      "variable_type",
      lambda t: setattr(t.layers[1], "bias", nnx.BatchStat(jnp.zeros(3))),
    ),
    (
      "module_class",
      lambda t: setattr(t.layers[1], "__class__", type("Other", (Dense,), {})),
    ),
    ("array_for_static", lambda t: setattr(t.layers[0], "size", jnp.ones(1))),
    ("marked_static", lambda t: setattr(t, "config", nnx.static((1, 2)))),
    ("tuple_for_list", lambda t: setattr(t, "layers", tuple(t.layers))),
  )
  def test_change(self, change):
    self.check(Tower(), change)

  @parameterized.named_parameters(
    ("equal", lambda t: setattr(t, "config", Unfrozen()), False),
    ("other", lambda t: setattr(t, "config", Unfrozen(3)), True),
    ("in_place", lambda t: setattr(t.config, "depth", 3), True),
    ("deep_in_place", lambda t: t.config.names.append("b"), True),
    ("other_slice", lambda t: setattr(t, "part", slice(0, 2)), True),
    ("equal_slice", lambda t: setattr(t, "part", slice(0, 1)), False),
    ("set_in_place", lambda t: t.kinds.add("b"), True),
  )
  def test_change_of_what_has_no_hash(self, change, recompiles):
    tower = Tower()
    tower.config = Unfrozen()
    tower.part = slice(0, 1)
    tower.kinds = {"a"}
    self.check(tower, change, recompiles)

  def test_graphdef_of_what_has_no_hash_is_static(self):
    dense = Dense()
    dense.config = Unfrozen()
    fun = Traced(lambda graphdef, state: nnx.merge(graphdef, state).bias + 0)
    jitted = jax.jit(fun, static_argnums=0)
    for config in (dense.config, Unfrozen()):
      dense.config = config
      jitted(*nnx.split(dense))
    self.assertEqual(fun.count, 1)
    dense.config.depth = 3
    jitted(*nnx.split(dense))
    self.assertEqual(fun.count, 2)

  @parameterized.parameters(
    (1, True),
    (1, 1.0),
    (0.0, -0.0),
    ((1,), (True,)),
    ("a", b"a"),
    (None, False),
  )
  def test_equal_statics_of_other_types(self, before, after):
    dense = Dense()
    dense.size = before
    self.check(dense, lambda dense: setattr(dense, "size", after))

  def test_static_argument_types(self):
    fun = Traced(lambda x, n: x)
    jitted = nnx.jit(fun, static_argnums=1)
    for n in (1, True, 1.0, (1,), (1.0,), "1"):
      jitted(jnp.ones(1), n)
    self.assertEqual(fun.count, 6)

  def test_values_do_not_matter(self):
    def change(tower):
      tower.tied[...] = tower.tied[...] + 1
      tower.layers[0].bias.value = jnp.full(3, 7.0, jnp.float32)

    self.check(Tower(), change, recompiles=False)

  def test_equal_objects_do_not_matter(self):
    def change(tower):
      tower.layers[1] = Dense()
      tower.config = {"names": ["a", "b"], "depth": 2}
      tower.__dict__["root"] = tower.__dict__.pop("root")

    self.check(Tower(), change, recompiles=False)

  def test_nan_is_equal_to_itself(self):
    dense = Dense()
    dense.size = float("nan")
    self.check(
      dense,
      lambda dense: setattr(dense, "size", float("nan")),
      recompiles=False,
    )

  def test_attribute_order_does_not_matter(self):
    fun = Traced(lambda model: model.bias + 0)
    jitted = nnx.jit(fun)
    jitted(Dense())
    other = Dense()
    vars(other).update({"bias": vars(other).pop("bias")})
    jitted(other)
    jitted(nnx.clone(other))
    self.assertEqual(fun.count, 1)

  def test_hashable_object_changed_in_place(self):
    dense = Dense()
    dense.config = HashByValue(1)
    self.check(dense, lambda dense: setattr(dense.config, "value", 2))

  def test_frozen_dataclass(self):
    dense = Dense()
    dense.config = Config(0.1)
    self.check(
      dense,
      lambda dense: setattr(dense, "config", Config(0.1)),
      recompiles=False,
    )
    self.check(dense, lambda dense: setattr(dense, "config", Config(0.2)))

  def test_state_of_a_subclass(self):
    class Counting(Dense):
      pass

    self.check(Counting(), lambda model: setattr(model, "seen", 1))

  def test_returns_to_a_known_structure(self):
    dense = Dense()
    fun = Traced(lambda model: model.size)
    jitted = nnx.jit(fun)
    for size in (3, 4, 3, 4, 3):
      dense.size = size
      self.assertEqual(int(jitted(dense)), size)
    self.assertEqual(fun.count, 2)

  def test_keyword_order_does_not_matter(self):
    fun = Traced(lambda *, a, b: a - b)
    jitted = nnx.jit(fun)
    self.assertEqual(jitted(a=3.0, b=1.0), 2)
    self.assertEqual(jitted(b=1.0, a=3.0), 2)
    self.assertEqual(fun.count, 1)

  def test_shapes_compile_again_with_their_own_plan(self):
    class Rows(nnx.Module):
      def __init__(self):
        self.rows = nnx.Variable(jnp.zeros(()))
        self.columns = nnx.Variable(jnp.zeros(()))

    @nnx.jit
    def note(model, x):
      if x.ndim == 1:
        model.rows[...] += 1
      else:
        model.columns[...] += 1

    model = Rows()
    for shape in ((2,), (2, 2), (2,), (2, 2), (2, 2)):
      note(model, jnp.ones(shape))
    self.assertEqual((model.rows.value, model.columns.value), (2, 3))

  def test_clear_cache(self):
    fun = Traced(lambda x: x)
    jitted = nnx.jit(fun)
    jitted(1.0)
    jitted.clear_cache()
    jitted(1.0)
    self.assertEqual(fun.count, 2)

  def test_equal_layers_inside_are_traced_once(self):
    traces = []

    @nnx.jit
    def layer(dense, x):
      traces.append(0)
      dense.bias[...] += 1
      return x @ dense.kernel

    @nnx.jit
    def run(layers, x):
      for dense in layers:
        x = layer(dense, x)
      return x

    layers = nnx.List([Dense(2) for _ in range(5)])
    layers[3].kernel.value *= 3
    y = run(layers, jnp.ones((1, 2)))
    self.assertLen(traces, 1)
    np.testing.assert_array_equal(y, [[3 * 2.0**5] * 2])
    for dense in layers:
      np.testing.assert_array_equal(dense.bias.value, 1)


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
      (TypeError, {"in_shardings": 3}, "argument, but got 3"),
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


class PartialTest(absltest.TestCase):
  def test_compiled_takes_the_remaining_arguments(self):
    partial = nnx.jit_partial(lambda m, x: x @ m.kernel, Dense())
    x = jnp.ones((4, 2))
    lowered = partial.lower(x)
    np.testing.assert_allclose(lowered.compile()(x), partial(x))
    self.assertIn("dot", lowered.as_text())


class ErrorsTest(parameterized.TestCase):
  def test_write_to_a_captured_variable(self):
    tower = Tower()

    @nnx.jit
    def step(x):
      tower.layers[1].bias[...] = x
      return x

    with self.assertRaises(nnx.TraceContextError) as caught:
      step(jnp.ones(3))
    text = str(caught.exception)
    self.assertIn("`layers[1].bias` of a `Tower`", text)
    self.assertRegex(text, r'made at ".*jit_test\.py", line \d+')
    self.assertIn("Pass the model as an argument of the jitted function", text)
    np.testing.assert_array_equal(tower.layers[1].bias.value, np.zeros(3))

  def test_attribute_of_a_captured_module(self):
    dense = Dense()

    @nnx.jit
    def step(x):
      dense.cache = x
      return x

    with self.assertRaisesRegex(nnx.TraceContextError, "Cannot change `Dense`"):
      step(jnp.ones(3))
    self.assertFalse(hasattr(dense, "cache"))

  def test_an_array_that_was_donated_is_named(self):
    one, other = Dense(), Dense()
    other.kernel.value = one.kernel.value

    @nnx.jit(donate_argnums=0)
    def step(dense, x):
      dense.kernel[...] += x

    step(one, 1.0)
    for jitted in (nnx.jit(lambda dense, x: dense.kernel + x), step):
      with self.assertRaises((RuntimeError, ValueError)) as caught:
        jitted(other, x=1.0)
      (note,) = [n for n in caught.exception.__notes__ if "donates" in n]
      self.assertIn("no array is left of `dense.kernel`: it", note)

  def test_an_error_of_a_function_has_no_such_note(self):
    def fails(x):
      raise ValueError("the file was deleted")

    with self.assertRaisesRegex(ValueError, "the file") as caught:
      nnx.jit(fails)(jnp.ones(1))
    notes = getattr(caught.exception, "__notes__", [])
    self.assertNotIn("donates", "".join(notes))

  def test_a_static_argument_with_state(self):
    def total(dense, n):
      return dense.kernel.value.sum() * n

    message = "must hold no data, .* but `dense` is a `Dense` with Variables"
    for jitted in (
      nnx.jit(total, static_argnums=0),
      nnx.jit(total, static_argnames="dense"),
      nnx.pmap(total, in_axes=None, static_broadcasted_argnums=0, axis_size=1),
    ):
      with self.assertRaisesRegex(TypeError, message):
        jitted(Dense(), 1)

    class Options(nnx.Module):
      size = 3

    jitted = nnx.jit(lambda options: options.size, static_argnums=0)
    self.assertEqual(int(jitted(Options())), 3)

  def test_unhashable_static_argument(self):
    with self.assertRaisesRegex(
      TypeError, r"must be hashable, but got \[1\] of type list"
    ):
      nnx.jit(lambda x, n: x, static_argnums=1)(1.0, [1])

  def test_not_an_array(self):
    with self.assertRaisesRegex(
      TypeError,
      "must be arrays, numbers or static, but `options.mode` is 'fast' of type"
      " str",
    ):
      nnx.jit(lambda x, options: x)(1.0, options={"mode": "fast"})
    with self.assertRaisesRegex(TypeError, "but `x` is 'text'"):
      nnx.jit(lambda x: x)(nnx.Variable("text"))

  @parameterized.parameters(
    ({"static_argnums": 3}, "`static_argnums` must name positional parameters"),
    ({"static_argnames": "z"}, "`static_argnames` must name parameters"),
    ({"donate_argnums": -4}, "`donate_argnums` must name positional"),
    (
      {"static_argnums": 0, "donate_argnames": "x"},
      "must be static or donated, not both",
    ),
  )
  def test_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      nnx.jit(lambda x, y: x, **options)

  def test_not_a_function(self):
    with self.assertRaisesRegex(TypeError, "`fun` must be callable"):
      nnx.jit(3)
    with self.assertRaisesRegex(TypeError, "`fun` must be callable"):
      nnx.jit(nnx.Dict(a=1))  # a Module that cannot be called

  def test_write_back_from_a_foreign_trace(self):
    dense = Dense()
    step = nnx.jit(lambda d, x: d.bias.set_value(x))

    def outer(x):
      step(dense, x)
      return x

    with self.assertRaisesRegex(nnx.TraceContextError, "Cannot change `Param`"):
      jax.vmap(outer)(jnp.ones((2, 3)))
    np.testing.assert_array_equal(dense.bias.value, np.zeros(3))


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
