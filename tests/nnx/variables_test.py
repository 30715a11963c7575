"""Variables behave as flax.nnx's, or as Flax 0.10's where those differ."""

import copy
import inspect
import operator
import pickle
import warnings

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import nnx

BINARY = [
  operator.add,
  operator.sub,
  operator.mul,
  operator.truediv,
  operator.floordiv,
  operator.mod,
  operator.pow,
  operator.eq,
]
INTEGER_BINARY = [
  operator.and_,
  operator.or_,
  operator.xor,
  operator.lshift,
  operator.rshift,
]
UNARY = [operator.neg, operator.pos, abs]


class Doubled(nnx.Variable):
  def on_get_value(self, value):
    return 2 * value

  def on_set_value(self, value):
    return value + 1

  def on_create_value(self, value):
    return value + 100


class Overriding(nnx.Variable):
  def get_value(self, **kwargs):
    return super().get_value(**kwargs) + 1

  def set_value(self, value, **kwargs):
    super().set_value(value * 10, **kwargs)

  def create_value(self, value):
    return value + 100


class Plain(nnx.Variable):
  pass


def quietly(f, *args, **kwargs):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return f(*args, **kwargs)


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


class OperatorsTest(parameterized.TestCase):
  @hypothesis.settings(derandomize=True, deadline=None, max_examples=60)
  @hypothesis.given(
    st.sampled_from(BINARY),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
  )
  def test_binary(self, op, xs, ys):
    x, y = jnp.array(xs, jnp.float32), jnp.array(ys, jnp.float32)
    expected = quietly(op, flax_nnx.Param(x), y)
    np.testing.assert_array_equal(op(nnx.Param(x), y), expected)
    np.testing.assert_array_equal(op(x, nnx.Param(y)), expected)
    np.testing.assert_array_equal(op(nnx.Param(x), nnx.BatchStat(y)), expected)
    np.testing.assert_array_equal(op(np.asarray(x), nnx.Param(y)), expected)
    np.testing.assert_array_equal(op(nnx.Param(x), 2), op(x, 2))
    np.testing.assert_array_equal(op(2, nnx.Param(x)), op(2, x))

  @parameterized.parameters(*INTEGER_BINARY)
  def test_integer_binary(self, op):
    x, y = jnp.array([5, 6]), jnp.array([1, 3])
    np.testing.assert_array_equal(op(nnx.Param(x), y), op(x, y))
    np.testing.assert_array_equal(op(x, nnx.Param(y)), op(x, y))

  @parameterized.parameters(
    operator.lt, operator.le, operator.gt, operator.ge, operator.ne
  )
  def test_comparison(self, op):
    x, y = jnp.array([1, 2, 3]), jnp.array([2, 2, 2])
    np.testing.assert_array_equal(op(nnx.Param(x), nnx.Param(y)), op(x, y))

  def test_matmul_and_divmod(self):
    x = jnp.arange(4.0).reshape(2, 2)
    np.testing.assert_array_equal(nnx.Param(x) @ x, x @ x)
    np.testing.assert_array_equal(x @ nnx.Param(x), x @ x)
    self.assertEqual(divmod(nnx.Param(7), 2), (3, 1))
    self.assertEqual(divmod(7, nnx.Param(2)), (3, 1))

  @parameterized.parameters(*UNARY)
  def test_unary(self, op):
    x = jnp.array([-1.0, 2.0])
    np.testing.assert_array_equal(op(nnx.Param(x)), op(x))

  def test_invert(self):
    self.assertEqual(~nnx.Param(5), ~5)

  @parameterized.parameters(
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.imatmul,
    operator.ilshift,
    operator.irshift,
    operator.iand,
    operator.ixor,
    operator.ior,
  )
  def test_in_place_writes_the_value_as_in_flax_0_10(self, op):
    # 0.12 refuses it.
    matrix = op is operator.imatmul
    x = jnp.ones((2, 2)) if matrix else jnp.array([6, 7])
    y = jnp.full((2, 2), 2.0) if matrix else jnp.array([1, 2])
    if op is operator.itruediv:
      x, y = x.astype(float), y.astype(float)
    for other in (y, nnx.Param(y)):
      module = nnx.Dict(p=nnx.Param(x))
      before = module.p
      before = op(before, other)
      self.assertIs(before, module.p)
      self.assertIsInstance(module.p, nnx.Param)
      np.testing.assert_array_equal(module.p.value, op(x, y))

  def test_in_place_runs_hooks_and_writes_refs(self):
    p = nnx.Param(
      jnp.float32(1),
      get_value_hooks=lambda _, x: x + 1,
      set_value_hooks=lambda _, x: x * 2,
    )
    p += 3
    self.assertEqual(p.raw_value, 10)
    ref = nnx.Param(jnp.float32(1), ref=True)
    kept = ref.raw_value
    ref += 2
    self.assertIs(ref.raw_value, kept)
    self.assertEqual(ref.value, 3)

  def test_in_place_leaves_arrays_of_numpy_alone(self):
    array = np.ones(2)
    p = nnx.Param(array)
    p += 1
    np.testing.assert_array_equal(array, 1)
    np.testing.assert_array_equal(p.value, 2)

  def test_in_place_on_an_attribute(self):
    class Counter(nnx.Module):
      def __init__(self):
        self.count = nnx.Variable(jnp.array(0))

      def __call__(self):
        self.count += 1

    counter = Counter()
    count = counter.count
    nnx.jit(Counter.__call__)(counter)
    counter()
    self.assertIs(counter.count, count)
    self.assertEqual(count.value, 2)

  def test_unhashable_as_in_flax(self):
    for lib in (nnx, flax_nnx):
      with self.assertRaises(TypeError):
        hash(lib.Param(1))


class HooksTest(parameterized.TestCase):
  @parameterized.product(
    names=[
      ("on_get_value", "on_set_value", "on_create_value"),
      ("get_value_hooks", "set_value_hooks", "create_value_hooks"),
    ],
    as_tuple=[True, False],
    how=["variable", "metadata", "with_metadata", "in_metadata"],
  )
  def test_both_spellings_run(self, names, as_tuple, how):
    hooks = (
      lambda v, x: x * 2,
      lambda v, x: x + 1,
      lambda v, x: x + 100,
    )
    keywords = dict(
      zip(names, [(hook,) for hook in hooks] if as_tuple else hooks)
    )
    if how == "variable":
      v = nnx.Param(1, **keywords)
    elif how == "metadata":
      v = nnx.Param(nnx.VariableMetadata(1, **keywords))
    elif how == "in_metadata":
      v = nnx.Param(nnx.VariableMetadata(1, metadata=keywords))
    else:
      v = nnx.Param(nnx.with_metadata(lambda: 1, **keywords)())
    self.assertEqual(v.raw_value, 101)
    self.assertEqual(v.value, 202)
    v.value = 5
    self.assertEqual(v.raw_value, 6)
    self.assertEqual(v.value, 12)
    # Stored by one name, and never as plain metadata by the other.
    self.assertEqual(
      set(v.get_metadata()),
      {"on_get_value", "on_set_value", "on_create_value"},
    )
    self.assertEqual(v.get_value_hooks, (hooks[0],))
    self.assertEqual(v.on_get_value, (hooks[0],))

  def test_hooks_run_on_array_access(self):
    v = nnx.Param(
      jnp.arange(3.0),
      on_get_value=lambda v, x: x * 2,
      on_set_value=lambda v, x: x + 1,
    )
    np.testing.assert_array_equal(v[...], [0.0, 2.0, 4.0])
    self.assertEqual(v[1], 2.0)
    v[...] = jnp.zeros(3)
    np.testing.assert_array_equal(v.raw_value, [1.0, 1.0, 1.0])
    v[0] = 5.0
    np.testing.assert_array_equal(v.raw_value, [6.0, 1.0, 1.0])

  def test_hooks_run_in_order(self):
    v = nnx.Param(1, on_get_value=(lambda v, x: x + 1, lambda v, x: x * 10))
    self.assertEqual(v.value, 20)

  def test_hooks_get_the_variable(self):
    v = nnx.Param(1, scale=5, on_get_value=lambda v, x: x * v.scale)
    self.assertEqual(v.value, 5)
    seen = []
    nnx.Param(3, on_create_value=lambda v, x: seen.append(v.raw_value) or x)
    self.assertEqual(seen, [3])

  def test_index_before_hooks_as_in_flax(self):
    for lib in (nnx, flax_nnx):
      v = quietly(
        lib.Param, jnp.arange(3.0), on_get_value=lambda v, x: x - x.max()
      )
      self.assertEqual(v[1], 0.0)

  def test_both_spellings_at_once(self):
    with self.assertRaisesRegex(ValueError, "Hooks must be given by one name"):
      nnx.Param(1, on_get_value=lambda v, x: x, get_value_hooks=lambda v, x: x)

  def test_class_hooks(self):
    v = Doubled(1)
    self.assertEqual(v.raw_value, 101)
    self.assertEqual(v.value, 202)
    v.value = 5
    self.assertEqual(v.raw_value, 6)
    w = v.replace(7)  # copies do not run hooks
    self.assertEqual((w.raw_value, w.value), (7, 14))

  def test_metadata_hooks_win_over_class_hooks(self):
    v = Doubled(1, on_get_value=lambda v, x: x * 3)
    self.assertEqual(v.value, 303)

  def test_overridden_access(self):
    v = Overriding(jnp.float32(1))
    self.assertEqual(v.raw_value, 101)
    self.assertEqual(v.value, 102)
    self.assertEqual(v[...], 102)
    v.value = jnp.float32(2)
    self.assertEqual(v.raw_value, 20)
    v[...] = jnp.float32(3)
    self.assertEqual(v.raw_value, 30)

  def test_hooks_set_later_run(self):
    v = nnx.Param(1)
    v.on_get_value = lambda v, x: x + 1
    self.assertEqual(v.value, 2)
    v.set_metadata(get_value_hooks=lambda v, x: x + 5)
    self.assertEqual(v.value, 6)
    v.del_metadata("on_get_value")
    self.assertEqual(v.value, 1)
    v.set_metadata("set_value_hooks", lambda v, x: -x)
    v.value = 3
    self.assertEqual(v.raw_value, -3)
    v.set_metadata({})
    v.value = 3
    self.assertEqual(v.raw_value, 3)

  def test_hooks_survive_copies(self):
    v = nnx.Param(1, get_value_hooks=_plus_one)
    for w in (
      v.copy(),
      v.replace(1),
      copy.copy(v),
      copy.deepcopy(v),
      pickle.loads(pickle.dumps(v)),
      nnx.Param.from_metadata(1, v.get_metadata()),
      jax.tree.map(lambda x: x, v),
    ):
      self.assertEqual(w.value, 2)
      self.assertEqual(w.raw_value, 1)

  @parameterized.parameters("on_add_axis", "add_axis_hooks")
  def test_axis_hooks(self, name):
    seen = []
    v = nnx.Param(1, **{name: lambda v, i, n: seen.append((i, n))})
    v.add_axis(0, "layers")
    v.remove_axis(0, "layers")
    self.assertEqual(seen, [(0, "layers")])

  @parameterized.parameters("on_remove_axis", "remove_axis_hooks")
  def test_remove_axis_hooks(self, name):
    seen = []
    v = nnx.Param(1, **{name: lambda v, i, n: seen.append((i, n))})
    v.add_axis(0, "layers")
    v.remove_axis(1, "layers")
    self.assertEqual(seen, [(1, "layers")])


def _plus_one(variable, value):
  del variable
  return value + 1


class MetadataTest(parameterized.TestCase):
  def test_attributes(self):
    p = nnx.Param(1, axis="embed")
    self.assertEqual(p.axis, "embed")
    p.axis = "heads"
    p.other = 3
    self.assertEqual(p.get_metadata(), {"axis": "heads", "other": 3})
    del p.other
    self.assertFalse(p.has_metadata("other"))
    with self.assertRaisesRegex(
      AttributeError, r"`Param` has no metadata `other` to delete"
    ):
      del p.other

  def test_get_metadata(self):
    p = nnx.Param(1, axis="embed")
    self.assertEqual(p.get_metadata("axis"), "embed")
    self.assertEqual(p.get_metadata("b", 3), 3)
    with self.assertRaises(KeyError):
      p.get_metadata("b")
    with self.assertRaisesRegex(TypeError, "`default` must come with a `name`"):
      p.get_metadata(default=3)
    with self.assertRaisesRegex(TypeError, "is about all of the metadata"):
      p.get_metadata("axis", exclude_required=True)
    theirs = flax_nnx.Param(1, axis="embed")
    self.assertEqual(
      p.get_metadata(exclude_required=True),
      theirs.get_metadata(exclude_required=True),
    )
    for name in ("hijax", "ref", "eager_sharding"):
      self.assertEqual(p.get_metadata(name), theirs.get_metadata(name))
      self.assertEqual(getattr(p, name), getattr(theirs, name))

  def test_metadata_dict_is_a_copy(self):
    p = nnx.Param(1, axis="embed")
    p.get_metadata()["axis"] = 3
    self.assertEqual(p.axis, "embed")

  def test_set_metadata(self):
    p = nnx.Param(1, a=1)
    p.set_metadata("b", 2)
    p.set_metadata(c=3)
    self.assertEqual(p.get_metadata(), {"a": 1, "b": 2, "c": 3})
    p.set_metadata({"d": 4})
    self.assertEqual(p.get_metadata(), {"d": 4})
    with self.assertRaisesRegex(TypeError, "must be called with a dict, with"):
      p.set_metadata()
    with self.assertRaisesRegex(TypeError, "must be called with a dict, with"):
      p.set_metadata("a", 1, b=2)
    with self.assertRaisesRegex(ValueError, "`ref` must stay"):
      p.set_metadata(ref=True)
    with self.assertRaisesRegex(ValueError, "it was to be deleted"):
      p.del_metadata("ref")

  def test_no_switches_in_metadata(self):
    p = nnx.Param(1, ref=False, hijax=False, eager_sharding=None)
    self.assertEqual(p.get_metadata(), {})

  def test_metadata_of_initializer(self):
    init = nnx.with_metadata(lambda: 1, axis="embed", b=2)
    p = nnx.Param(init(), b=3, c=4)
    theirs = flax_nnx.Param(
      flax_nnx.with_metadata(lambda: 1, axis="embed", b=2)(), b=3, c=4
    )
    self.assertEqual(
      p.get_metadata(), theirs.get_metadata(exclude_required=True)
    )

  def test_metadata_positional_hooks(self):
    # The order of the documents.
    box = nnx.VariableMetadata(1, (_plus_one,), (), (), (), (), {"a": 1})
    self.assertEqual(box.set_value_hooks, (_plus_one,))
    self.assertEqual(box.on_set_value, (_plus_one,))
    self.assertEqual(box.get_value_hooks, ())
    self.assertEqual(box.metadata, {"a": 1})
    with self.assertRaisesRegex(TypeError, "Other metadata goes into"):
      nnx.VariableMetadata(1, axis=3)
    with self.assertRaisesRegex(AttributeError, "has no attribute `axis`"):
      _ = box.axis

  def test_initializer_keeps_its_signature(self):
    init = nnx.with_metadata(jax.nn.initializers.zeros, axis=1)
    box = init(jax.random.key(0), (2,), dtype=jnp.bfloat16)
    self.assertEqual(box.raw_value.dtype, jnp.bfloat16)

  @parameterized.parameters("out_sharding", "sharding", "sharding_names")
  def test_sharding_by_any_name(self, name):
    p = nnx.Param(jnp.zeros((2, 2)), **{name: ("a", None)})
    self.assertEqual(p.get_metadata("out_sharding"), ("a", None))
    self.assertEqual(p.get_metadata("sharding"), ("a", None))
    self.assertTrue(p.has_metadata("out_sharding"))
    self.assertEqual(p.out_sharding, ("a", None))
    self.assertEqual(p.sharding_names, ("a", None))
    p.set_metadata(out_sharding=("b",))
    self.assertEqual(p.get_metadata(), {"out_sharding": ("b",)})
    self.assertEqual(p.to_state().get_metadata(), {"out_sharding": ("b",)})
    self.assertEqual(p.get_metadata()[name], ("b",))
    p.sharding_names = ("c",)
    self.assertEqual(p.get_metadata(), {"out_sharding": ("c",)})
    p.del_metadata("out_sharding")
    self.assertEqual(p.get_metadata(), {})

  def test_sharding_attribute(self):
    # Flax 0.10's programs read their names back, those of 0.12 the array's.
    x = jnp.zeros((2, 2))
    self.assertEqual(nnx.Param(x, sharding=("a",)).sharding, ("a",))
    self.assertEqual(nnx.Param(x, out_sharding=("a",)).sharding, x.sharding)
    self.assertEqual(nnx.Param((2, 2), out_sharding=("a",)).sharding, ("a",))

  def test_sharding_names_that_differ(self):
    with self.assertRaisesRegex(ValueError, "must be given by one name"):
      nnx.Param(1, sharding=("a",), out_sharding=("b",))
    p = nnx.Param(1, sharding=("a",), out_sharding=("a",))
    self.assertEqual(p.get_metadata(), {"out_sharding": ("a",)})

  def test_dunder_is_no_metadata(self):
    p = nnx.Param(1)
    with self.assertRaisesRegex(AttributeError, "cannot be set on a Variable"):
      p.__foo__ = 3

  def test_generic_alias(self):
    self.assertEqual(nnx.Param[jax.Array](3).value, 3)
    self.assertEqual(nnx.Param[jax.Array](3).get_metadata(), {})


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
    self.assertEqual((p.value, p.get_metadata()), (2, {"b": 2}))
    with self.assertRaisesRegex(
      ValueError, r"of the same kind, `Param`, but got a `BatchStat`"
    ):
      p.copy_from(nnx.BatchStat(1))
    p.update_from_state(nnx.BatchStat(3, c=3))
    self.assertEqual((p.value, p.get_metadata()), (3, {"c": 3}))

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
