"""nnx.jit: which changes compile a function again, and which do not."""

import dataclasses

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.transforms.models import Dense, Tower, Traced


@dataclasses.dataclass
class Unfrozen:
  """Has no hash."""

  depth: int = 2
  names: list[str] = dataclasses.field(default_factory=lambda: ["a"])


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


if __name__ == "__main__":
  absltest.main()
