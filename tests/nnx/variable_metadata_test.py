"""Metadata of Variables and hooks, against flax.nnx and Flax 0.10."""

import copy
import pickle
import warnings

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx


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
      set(v.get_metadata(exclude_required=True)),
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
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        v = lib.Param(jnp.arange(3.0), on_get_value=lambda v, x: x - x.max())
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
    self.assertEqual(
      p.get_metadata(exclude_required=True), {"axis": "heads", "other": 3}
    )
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
    self.assertEqual(
      p.get_metadata(exclude_required=True), {"a": 1, "b": 2, "c": 3}
    )
    p.set_metadata({"d": 4})
    self.assertEqual(p.get_metadata(exclude_required=True), {"d": 4})
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
    self.assertEqual(p.get_metadata(exclude_required=True), {})

  def test_metadata_of_initializer(self):
    init = nnx.with_metadata(lambda: 1, axis="embed", b=2)
    p = nnx.Param(init(), b=3, c=4)
    theirs = flax_nnx.Param(
      flax_nnx.with_metadata(lambda: 1, axis="embed", b=2)(), b=3, c=4
    )
    self.assertEqual(
      p.get_metadata(exclude_required=True),
      theirs.get_metadata(exclude_required=True),
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
    self.assertEqual(
      p.get_metadata(exclude_required=True), {"out_sharding": ("b",)}
    )
    self.assertEqual(
      p.to_state().get_metadata(exclude_required=True), {"out_sharding": ("b",)}
    )
    self.assertEqual(p.get_metadata(exclude_required=True)[name], ("b",))
    p.sharding_names = ("c",)
    self.assertEqual(
      p.get_metadata(exclude_required=True), {"out_sharding": ("c",)}
    )
    p.del_metadata("out_sharding")
    self.assertEqual(p.get_metadata(exclude_required=True), {})

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
    self.assertEqual(
      p.get_metadata(exclude_required=True), {"out_sharding": ("a",)}
    )

  def test_dunder_is_no_metadata(self):
    p = nnx.Param(1)
    with self.assertRaisesRegex(AttributeError, "cannot be set on a Variable"):
      p.__foo__ = 3

  def test_generic_alias(self):
    self.assertEqual(nnx.Param[jax.Array](3).value, 3)
    self.assertEqual(
      nnx.Param[jax.Array](3).get_metadata(exclude_required=True), {}
    )


if __name__ == "__main__":
  absltest.main()
