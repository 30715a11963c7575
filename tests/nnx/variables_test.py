"""Variables behave as flax.nnx's, or as Flax 0.10's where those differ."""

import copy
import inspect
import pickle

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx


class Plain(nnx.Variable):
  pass


class ValueTest(parameterized.TestCase):
  def test_reads_agree(self):
    x = jnp.arange(3.0)
    p = nnx.Param(x)
    self.assertIs(p.value, x)
    self.assertIs(p[...], x)
    self.assertIs(p.raw_value, x)
    self.assertIs(p.get_value(), x)
    self.assertIs(p.get_raw_value(), x)
    self.assertEqual(p[1], 1.0)

  def test_writes(self):
    p = nnx.Param(jnp.zeros(3))
    p.value = jnp.ones(2)
    self.assertEqual(p.shape, (2,))
    p[...] = jnp.full(2, 5.0)
    np.testing.assert_array_equal(p.value, [5.0, 5.0])
    p[0] = 7
    np.testing.assert_array_equal(p.value, [7.0, 5.0])
    p.set_value(jnp.zeros(1))
    self.assertEqual(p.shape, (1,))
    p.set_raw_value(3)
    self.assertEqual(p.value, 3)
    p.raw_value = 4
    self.assertEqual(p.value, 4)

  @parameterized.parameters(
    (1,), (2.5,), (True,), (np.float64(3),), (np.ones((1, 2)),), (jnp.ones(2),)
  )
  def test_assigning_all_keeps_shape_and_dtype_as_in_flax(self, new):
    ours = nnx.Param(jnp.zeros((3, 2), jnp.float32))
    theirs = flax_nnx.Param(jnp.zeros((3, 2), jnp.float32))
    ours[...] = new
    theirs[...] = new
    self.assertEqual(ours.dtype, theirs[...].dtype)
    np.testing.assert_array_equal(ours[...], theirs[...])

  @parameterized.parameters(nnx, flax_nnx)
  def test_value_by_name(self, library):
    class Positive(library.Param):
      def __init__(self, value, **metadata):
        super().__init__(value=value, kind="positive", **metadata)

    p = Positive(jnp.ones(2), axis="embed")
    self.assertEqual((p.shape, p.kind, p.axis), ((2,), "positive", "embed"))

  @parameterized.parameters(nnx, flax_nnx)
  def test_one_value_must_be_given(self, library):
    with self.assertRaises(TypeError):
      library.Param(axis="embed")
    with self.assertRaises(TypeError):
      library.Param(1, value=2)

  def test_how_many_values_were_given(self):
    with self.assertRaisesRegex(TypeError, "one value, .* but got none"):
      nnx.Param()
    with self.assertRaisesRegex(TypeError, "one value, .* but got both"):
      nnx.Param(1, value=2)

  def test_augmented_assignment(self):
    p = nnx.Param(jnp.ones(2))
    p[...] += 1
    p.value *= 3
    p[0] -= 1
    np.testing.assert_array_equal(p.value, [5.0, 6.0])

  def test_value_is_a_container(self):
    v = nnx.Variable({"a": 1})
    v["b"] = 2
    self.assertEqual(v.value, {"a": 1, "b": 2})
    self.assertIn("b", v)
    del v["a"]
    self.assertEqual(v.value, {"b": 2})
    self.assertLen(v, 1)
    self.assertEqual(list(v), ["b"])

  def test_value_is_a_numpy_array(self):
    array = np.zeros(3)
    v = nnx.Variable(array)
    v[0] = 1
    v[...] = v[...] + 1
    np.testing.assert_array_equal(array, [2, 1, 1])

  def test_value_of_a_variable(self):
    p = nnx.Param(nnx.Param(3))
    self.assertEqual(p.value, 3)

  def test_forwards_to_the_value(self):
    p = nnx.Param(jnp.ones((2, 3), jnp.bfloat16))
    self.assertEqual(p.shape, (2, 3))
    self.assertEqual(p.ndim, 2)
    self.assertEqual(p.size, 6)
    self.assertEqual(p.dtype, jnp.bfloat16)
    self.assertEqual(p.T.shape, (3, 2))
    self.assertEqual(p.at[0, 0].set(5)[0, 0], 5)
    self.assertEqual(p.astype(jnp.float32).dtype, jnp.float32)
    self.assertEqual(p.sum(), 6)

  def test_missing_attribute(self):
    p = nnx.Param(jnp.ones(2), axis=1)
    with self.assertRaisesRegex(
      AttributeError,
      r"`Param` has no attribute or metadata `shap`, and neither has its value"
      r" of type `ArrayImpl`. Its metadata are \['axis'\]",
    ):
      _ = p.shap
    self.assertFalse(hasattr(p, "shap"))
    self.assertEqual(getattr(p, "shap", 3), 3)

  def test_callable_value(self):
    self.assertEqual(nnx.Variable(lambda x, y=1: x + y)(2, y=5), 7)

  def test_conversions(self):
    p = nnx.Param(jnp.float32(2.5))
    self.assertEqual(float(p), 2.5)
    self.assertEqual(int(p), 2)
    self.assertEqual(complex(p), 2.5 + 0j)
    self.assertEqual(round(nnx.Param(2.6)), 3)
    self.assertEqual(f"{p:.2f}", "2.50")
    self.assertEqual([10, 20, 30][nnx.Variable(jnp.int32(1))], 20)
    self.assertTrue(nnx.Param(True))
    self.assertFalse(nnx.Param(jnp.bool_(False)))
    # As in Flax, whether there is anything, for arrays with axes.
    self.assertTrue(nnx.Param(jnp.zeros(2)))

  def test_is_an_array_to_jax_and_numpy(self):
    p = nnx.Param(jnp.arange(3.0))
    np.testing.assert_array_equal(jnp.sin(p), jnp.sin(p.value))
    np.testing.assert_array_equal(jnp.asarray(p), p.value)
    self.assertIsInstance(np.asarray(p), np.ndarray)
    self.assertEqual(np.asarray(p, dtype=np.float64).dtype, np.float64)
    self.assertIsInstance(np.ones(3) * p, jax.Array)
    np.testing.assert_array_equal(np.ones(3) + p, [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(jax.jit(lambda x: x * 2)(p.value), p * 2)


class SignatureTest(absltest.TestCase):
  def test_that_of_the_engine_is_known(self):
    text = str(inspect.signature(nnx.Param))
    self.assertEqual(text, "(value, /, **metadata)")

  def test_that_of_a_subclass_is_its_own(self):
    class Named(nnx.Variable):
      def __init__(self, name, size=1):
        super().__init__(jnp.zeros(size), name=name)

    self.assertEqual(
      list(inspect.signature(Named).parameters), ["name", "size"]
    )


class CopiesTest(parameterized.TestCase):
  @parameterized.parameters("copy", "replace", "to_state", "to_variable")
  def test_copy(self, name):
    p = nnx.Param(jnp.ones(2), axis=1)
    q = getattr(p, name)()
    self.assertIsNot(p, q)
    self.assertIs(type(q), nnx.Param)
    self.assertIs(q.raw_value, p.raw_value)
    q.axis = 2
    q.value = 3
    self.assertEqual(p.axis, 1)
    self.assertEqual(p.shape, (2,))

  def test_replace(self):
    p = nnx.Param(1, axis=1)
    q = p.replace(2, axis=3, b=4)
    self.assertEqual((q.value, q.axis, q.b), (2, 3, 4))
    self.assertEqual(p.replace(value=7).value, 7)
    self.assertEqual(p.replace(None).value, None)

  def test_copy_of_containers(self):
    v = nnx.Variable({"a": [1]})
    w = v.copy()
    w.value["a"].append(2)
    self.assertEqual(v.value, {"a": [1]})

  def test_copy_from(self):
    p = nnx.Param(1, a=1)
    p.copy_from(nnx.Param(2, b=2))
    self.assertEqual(
      (p.value, p.get_metadata(exclude_required=True)), (2, {"b": 2})
    )
    with self.assertRaisesRegex(
      ValueError, r"of the same kind, `Param`, but got a `BatchStat`"
    ):
      p.copy_from(nnx.BatchStat(1))
    p.update_from_state(nnx.BatchStat(3, c=3))
    self.assertEqual(
      (p.value, p.get_metadata(exclude_required=True)), (3, {"c": 3})
    )

  def test_deepcopy_shares_within(self):
    p = nnx.Param(np.ones(2))
    a, b = copy.deepcopy([p, p])
    self.assertIs(a, b)
    self.assertIsNot(a.value, p.value)

  def test_pickle(self):
    p = pickle.loads(pickle.dumps(Plain(jnp.arange(3), axis="embed")))
    self.assertIsInstance(p, Plain)
    np.testing.assert_array_equal(p.value, [0, 1, 2])
    self.assertEqual(p.axis, "embed")

  def test_type(self):
    p = nnx.Param(1)
    self.assertIs(p.type, nnx.Param)
    self.assertIs(p.var_type, nnx.Param)
    self.assertIs(nnx.VariableState, nnx.Variable)
    with self.assertRaises(AttributeError):
      p.type = int

  def test_pytree(self):
    p = nnx.Param({"a": jnp.ones(2), "b": 3}, axis=1)
    leaves, treedef = jax.tree.flatten(p)
    self.assertLen(leaves, 2)
    q = jax.tree.unflatten(treedef, leaves)
    self.assertIsInstance(q, nnx.Param)
    self.assertEqual(q.axis, 1)
    self.assertEqual(q.value["b"], 3)
    [(path, _), _] = jax.tree_util.tree_leaves_with_path(p)
    self.assertEqual(jax.tree_util.keystr(path), ".value['a']")

  def test_pytree_structure_has_type_and_metadata(self):
    structure = jax.tree.structure
    self.assertEqual(structure(nnx.Param(1, a=1)), structure(nnx.Param(2, a=1)))
    self.assertNotEqual(structure(nnx.Param(1)), structure(nnx.BatchStat(1)))
    self.assertNotEqual(structure(nnx.Param(1, a=1)), structure(nnx.Param(1)))


class RefTest(absltest.TestCase):
  def test_ref(self):
    v = nnx.Variable(jnp.zeros(2), ref=True)
    self.assertTrue(v.ref)
    self.assertIsInstance(v.raw_value, jax.Ref)
    raw = v.raw_value
    v[...] = jnp.ones(2)
    v[0] = 5
    self.assertIs(v.raw_value, raw)
    np.testing.assert_array_equal(v.value, [5.0, 1.0])
    np.testing.assert_array_equal(v[...] + 1, [6.0, 2.0])
    self.assertEqual(v[1], 1.0)

  def test_written_by_plain_jit(self):
    v = nnx.Variable(jnp.zeros(2), ref=True)

    @jax.jit
    def f(v):
      v[...] += 1

    f(v)
    np.testing.assert_array_equal(v.value, [1.0, 1.0])

  def test_copies_do_not_share(self):
    v = nnx.Variable(jnp.zeros(2), ref=True)
    for w in (v.copy(), copy.deepcopy(v), pickle.loads(pickle.dumps(v))):
      w[...] = jnp.ones(2)
      np.testing.assert_array_equal(v.value, [0.0, 0.0])
      self.assertTrue(w.ref)

  def test_defaults(self):
    self.assertEqual(dict(nnx.var_defaults()), dict(flax_nnx.var_defaults()))
    with nnx.var_defaults(ref=True) as defaults:
      self.assertTrue(defaults.ref)
      self.assertTrue(nnx.Param(jnp.zeros(2)).ref)
      self.assertFalse(nnx.Param(jnp.zeros(2), ref=False).ref)
      self.assertTrue(Plain(jnp.zeros(2), a=1).ref)
      with nnx.var_defaults(ref=False):
        self.assertFalse(nnx.Param(jnp.zeros(2)).ref)
      self.assertTrue(nnx.var_defaults()["ref"])
    p = nnx.Param(jnp.zeros(2))
    self.assertFalse(p.ref)
    p[...] = jnp.ones(2)
    np.testing.assert_array_equal(p.value, [1.0, 1.0])

  def test_ref_as_value(self):
    with self.assertRaisesRegex(ValueError, "must hold no mutable arrays"):
      nnx.Variable({"a": jax.new_ref(1.0)}, a=1)


class ShardingTest(absltest.TestCase):
  def test_no_mesh_is_no_error(self):
    x = jnp.zeros((2, 2))
    self.assertIs(nnx.Param(x, out_sharding=("data", "model")).value, x)

  def test_placed_on_the_active_mesh(self):
    mesh = jax.make_mesh((1, 1), ("data", "model"))
    with jax.set_mesh(mesh):
      p = nnx.Param(jnp.zeros((2, 2)), out_sharding=("data", None))
      with nnx.use_eager_sharding(False):
        q = nnx.Param(jnp.zeros((2, 2)), out_sharding=("data", None))
      r = nnx.Param(
        jnp.zeros((2, 2)), out_sharding=("data", None), eager_sharding=False
      )
    self.assertEqual(
      p.value.sharding.spec, jax.sharding.PartitionSpec("data", None)
    )
    for other in (q, r):
      self.assertNotEqual(p.value.sharding, other.value.sharding)

  def test_placed_on_its_own_mesh(self):
    mesh = jax.make_mesh((1,), ("data",))
    p = nnx.Param(jnp.zeros(2), sharding=("data",), mesh=mesh)
    self.assertEqual(p.value.sharding.spec, jax.sharding.PartitionSpec("data"))

  def test_logical_names(self):
    mesh = jax.make_mesh((1,), ("data",))
    with jax.set_mesh(mesh), nnx.logical_axis_rules([("batch", "data")]):
      p = nnx.Param(jnp.zeros(2), out_sharding=("batch",))
      q = nnx.Param(
        jnp.zeros(2), out_sharding=("b",), sharding_rules=[("b", "data")]
      )
    self.assertEqual(p.value.sharding.spec, jax.sharding.PartitionSpec("data"))
    self.assertEqual(q.value.sharding.spec, jax.sharding.PartitionSpec("data"))

  def test_placed_under_jit(self):
    mesh = jax.make_mesh((1,), ("data",))

    @jax.jit
    def f(x):
      return nnx.Param(x, out_sharding=("data",)).value

    with jax.set_mesh(mesh):
      self.assertEqual(f(jnp.zeros(2)).shape, (2,))


class NamesTest(absltest.TestCase):
  def test_known_names_are_those_of_flax(self):
    for name in (
      "params",
      "batch_stats",
      "cache",
      "intermediates",
      "perturbations",
    ):
      ours = nnx.variable_type_from_name(name)
      theirs = flax_nnx.variable_type_from_name(name)
      self.assertEqual(ours.__name__, theirs.__name__)
      self.assertEqual(nnx.variable_name_from_type(ours), name)

  def test_register(self):
    made = nnx.variable_type_from_name("custom", allow_register=True)
    self.assertTrue(issubclass(made, nnx.Variable))
    self.assertIs(nnx.variable_type_from_name("custom"), made)

    class Unknown(nnx.Variable):
      pass

    with self.assertRaisesRegex(
      ValueError, "must be a registered kind of Variable, but got `Unknown`"
    ):
      nnx.variable_name_from_type(Unknown)
    self.assertEqual(
      nnx.variable_name_from_type(Unknown, allow_register=True), "Unknown"
    )
    with self.assertRaisesRegex(
      ValueError, "must be that of a registered kind"
    ):
      nnx.variable_type_from_name("nobody")
    with self.assertRaisesRegex(ValueError, "`name` must be new, but `params`"):
      nnx.register_variable_name("params", Unknown)

    class params(nnx.Variable):
      pass

    with self.assertRaisesRegex(ValueError, "must be its own, but `params`"):
      nnx.variable_name_from_type(params, allow_register=True)


if __name__ == "__main__":
  absltest.main()
