"""States behave as flax.nnx's, on random nested mappings."""

import copy
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

KINDS = ["Param", "BatchStat", "Cache", "Intermediate"]
KEYS = st.sampled_from(["a", "b", "kernel", "x1"])
LEAVES = st.tuples(st.sampled_from(KINDS), st.integers(0, 9))


def _nested(keys):
  return st.recursive(
    st.dictionaries(keys, LEAVES, max_size=3),
    lambda inner: st.dictionaries(keys, st.one_of(LEAVES, inner), max_size=3),
    max_leaves=8,
  )


# Flax cannot sort keys of both types; each level here has one.
NESTED = st.one_of(_nested(KEYS), _nested(st.integers(0, 12)))
SETTINGS = hypothesis.settings(
  derandomize=True, deadline=None, max_examples=100
)


def build(lib, nested):
  """The nested dict with Variables of a library as leaves."""
  if isinstance(nested, tuple):
    kind, value = nested
    return getattr(lib, kind)(value, tag=f"tag{value}")
  return {key: build(lib, value) for key, value in nested.items()}


def plain(state):
  """A State of either library as nested dicts of kinds and values."""
  if hasattr(state, "items") and not hasattr(state, "get_value"):
    return {key: plain(value) for key, value in state.items()}
  if hasattr(state, "get_value"):
    return type(state).__name__, state.get_value()
  return state


def pairs(flat):
  return [(path, plain(leaf)) for path, leaf in flat]


def quietly(f, *args):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return f(*args)


class OracleTest(parameterized.TestCase):
  @SETTINGS
  @hypothesis.given(NESTED)
  def test_flat_state(self, nested):
    ours = nnx.State(build(nnx, nested)).flat_state()
    theirs = flax_nnx.to_flat_state(flax_nnx.State(build(flax_nnx, nested)))
    self.assertEqual(ours.paths, theirs.paths)
    self.assertEqual(pairs(ours), pairs(theirs))

  @SETTINGS
  @hypothesis.given(
    NESTED,
    st.lists(st.sampled_from(KINDS + ["tag3", "odd"]), min_size=1, max_size=3),
    st.booleans(),
  )
  def test_filter_and_split(self, nested, names, rest):
    def filters(lib):
      named = {"tag3": "tag3", "odd": lambda path, v: v.get_value() % 2 == 1}
      result = [
        named[name] if name in named else getattr(lib, name) for name in names
      ]
      return result + [...] if rest else result

    ours = nnx.State(build(nnx, nested))
    theirs = flax_nnx.State(build(flax_nnx, nested))
    a = nnx.filter_state(ours, *filters(nnx))
    b = flax_nnx.filter_state(theirs, *filters(flax_nnx))
    if isinstance(b, tuple):
      self.assertEqual([plain(x) for x in a], [plain(x) for x in b])
    else:
      self.assertEqual(plain(a), plain(b))
    flat = ours.flat_state().filter(*filters(nnx))
    if isinstance(flat, tuple):
      self.assertEqual(
        [plain(x.to_nested_state()) for x in flat], [plain(x) for x in b]
      )

    try:
      b = flax_nnx.split_state(theirs, *filters(flax_nnx))
    except ValueError:
      with self.assertRaisesRegex(ValueError, "Filters must cover every"):
        ours.split(*filters(nnx))
      with self.assertRaisesRegex(ValueError, "Filters must cover every"):
        ours.flat_state().split(*filters(nnx))
      return
    a = ours.split(*filters(nnx))
    if isinstance(b, tuple):
      self.assertEqual([plain(x) for x in a], [plain(x) for x in b])
      merged = nnx.State.merge(*a)
      self.assertEqual(merged.flat_state().paths, ours.flat_state().paths)
    else:
      self.assertEqual(plain(a), plain(b))

  @SETTINGS
  @hypothesis.given(NESTED)
  def test_pure_dict_round_trip(self, nested):
    ours = nnx.State(build(nnx, nested))
    theirs = flax_nnx.State(build(flax_nnx, nested))
    pure = nnx.to_pure_dict(ours)
    self.assertEqual(pure, flax_nnx.to_pure_dict(theirs))
    changed = jax.tree.map(lambda x: x + 1, pure)
    as_text = _with_str_keys(changed)
    for new in (changed, as_text):
      state = nnx.State(build(nnx, nested))
      nnx.replace_by_pure_dict(state, new)
      self.assertEqual(nnx.to_pure_dict(state), changed)
    self.assertEqual(
      nnx.restore_int_paths(as_text),
      flax_nnx.restore_int_paths(as_text) if changed else {},
    )

  @SETTINGS
  @hypothesis.given(NESTED)
  def test_pytree(self, nested):
    ours = nnx.State(build(nnx, nested))
    theirs = flax_nnx.State(build(flax_nnx, nested))
    self.assertEqual(jax.tree.leaves(ours), jax.tree.leaves(theirs))
    doubled = jax.tree.map(lambda x: 2 * x, ours)
    self.assertIsInstance(doubled, nnx.State)
    self.assertEqual(
      plain(doubled), plain(jax.tree.map(lambda x: 2 * x, theirs))
    )
    a = [
      jax.tree_util.keystr(p)
      for p, _ in jax.tree_util.tree_leaves_with_path(ours)
    ]
    b = [
      jax.tree_util.keystr(p)
      for p, _ in jax.tree_util.tree_leaves_with_path(theirs)
    ]
    self.assertEqual(a, b)

  @SETTINGS
  @hypothesis.given(NESTED, NESTED)
  def test_merge(self, first, second):
    theirs = [flax_nnx.State(build(flax_nnx, x)) for x in (first, second)]
    ours = [nnx.State(build(nnx, x)) for x in (first, second)]
    a_paths = {path for path, _ in ours[0].flat_state()}
    b_paths = {path for path, _ in ours[1].flat_state()}
    if any(
      len(p) < len(q)
      and q[: len(p)] == p
      or len(q) < len(p)
      and p[: len(q)] == q
      for p in a_paths
      for q in b_paths
    ):
      with self.assertRaisesRegex(ValueError, "lead to a leaf or through map"):
        nnx.merge_state(*ours)
      return
    self.assertEqual(
      plain(_without_empty(nnx.merge_state(*ours))),
      plain(flax_nnx.merge_state(*theirs)),
    )
    self.assertEqual(
      plain(ours[0] - ours[1]),
      plain(quietly(lambda: theirs[0] - theirs[1]))
      if second
      else plain(ours[0]),
    )

  @SETTINGS
  @hypothesis.given(NESTED)
  def test_flat_round_trip(self, nested):
    state = nnx.State(build(nnx, nested))
    flat = state.flat_state()
    back = nnx.from_flat_state(flat)
    self.assertEqual(back.flat_state(), flat)
    self.assertEqual(nnx.State.from_flat_path(dict(flat)).flat_state(), flat)
    for (_, a), (_, b) in zip(flat, back.flat_state()):
      self.assertIs(a, b)


def _with_str_keys(nested):
  if isinstance(nested, dict):
    return {str(key): _with_str_keys(value) for key, value in nested.items()}
  return nested


def _without_empty(state):
  return state.flat_state().to_nested_state()


class StateTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.w = nnx.Param(1)
    self.state = nnx.State({"a": {0: self.w, "b": nnx.BatchStat(2)}, "c": 3})

  def test_access(self):
    s = self.state
    self.assertIs(s["a"][0], self.w)
    self.assertIs(s.a[0], self.w)
    self.assertIsInstance(s.a, nnx.State)
    self.assertEqual(s.c, 3)
    self.assertEqual(list(s), ["a", "c"])
    self.assertLen(s, 2)
    self.assertIn("a", s)
    self.assertNotIn("b", s)
    self.assertIn("a", dir(s))

  def test_missing(self):
    with self.assertRaisesRegex(
      AttributeError, r"`State` has no entry `d`. Its entries are \['a', 'c'\]"
    ):
      _ = self.state.d
    with self.assertRaises(KeyError):
      _ = self.state["d"]
    with self.assertRaisesRegex(AttributeError, "`State` has no entry `d`"):
      del self.state.d
    self.assertFalse(hasattr(self.state, "d"))

  def test_writing(self):
    s = self.state
    s.a[0].value = 5
    self.assertEqual(self.w.value, 5)
    s.a.b = nnx.State({"x": 1})
    s["a"]["e"] = 7
    s.f = 8
    self.assertEqual(s.a.b.x, 1)
    self.assertEqual(s.raw_mapping["a"]["b"], {"x": 1})
    self.assertEqual((s.a.e, s["f"]), (7, 8))
    del s.f
    del s["c"]
    self.assertEqual(list(s), ["a"])
    s.update({"z": 1})
    self.assertEqual(s.z, 1)

  def test_values_are_shared_with_slices(self):
    params = self.state.filter(nnx.Param)
    self.assertIs(params.a[0], self.w)

  def test_mixed_keys(self):
    s = nnx.State({"b": {"x": 1}, 2: 3, "a": 4, 1: {"y": 5}})
    self.assertEqual(s.flat_state().paths, ((1, "y"), (2,), ("a",), ("b", "x")))
    self.assertEqual(jax.tree.leaves(s), [5, 3, 4, 1])
    self.assertEqual(s.filter(int).raw_mapping, s.raw_mapping)

  def test_ints_sort_as_ints(self):
    s = nnx.State({i: i for i in (10, 9, 100)})
    self.assertEqual(s.flat_state().paths, ((9,), (10,), (100,)))
    self.assertEqual(jax.tree.leaves(s), [9, 10, 100])

  def test_constructor(self):
    inner = {"x": 1}
    s = nnx.State([("a", nnx.State(inner))])
    self.assertEqual(s.raw_mapping, {"a": {"x": 1}})
    mapping = {"a": 1}
    self.assertIs(nnx.State(mapping, _copy=False).raw_mapping, mapping)
    self.assertIsNot(nnx.State(mapping).raw_mapping, mapping)
    self.assertEmpty(nnx.State({}))
    with self.assertRaisesRegex(ValueError, "must be a dict, but got a `list`"):
      nnx.State([("a", 1)], _copy=False)
    self.assertEqual(nnx.State[str, int]({"a": 1}).a, 1)

  def test_map(self):
    s = self.state.map(lambda path, x: path)
    self.assertEqual(s.a.b, ("a", "b"))
    self.assertEqual(nnx.map_state(lambda path, x: 1, self.state).c, 1)

  def test_or(self):
    s = nnx.State({"a": 1}) | nnx.State({"b": 2})
    self.assertEqual(s.raw_mapping, {"a": 1, "b": 2})
    s = nnx.State({"a": 1})
    self.assertIs(s | nnx.State({}), s)

  def test_merge_of_one(self):
    self.assertIs(nnx.State.merge(self.state), self.state)
    self.assertIsInstance(nnx.merge_state({"a": 1}), nnx.State)
    merged = nnx.State.merge({"a": {"b": 1}}, {"a": {"b": 2, "c": 3}})
    self.assertEqual(merged.raw_mapping, {"a": {"b": 2, "c": 3}})

  def test_merge_does_not_write_to_its_arguments(self):
    a, b = nnx.State({"l": {"x": 1}}), nnx.State({"l": {"y": 2}})
    nnx.State.merge(a, b).l.z = 3
    self.assertEqual(a.raw_mapping, {"l": {"x": 1}})
    self.assertEqual(b.raw_mapping, {"l": {"y": 2}})

  def test_ellipsis_must_be_last(self):
    with self.assertRaisesRegex(ValueError, "must come last"):
      self.state.filter(..., nnx.Param)
    with self.assertRaisesRegex(ValueError, "must come last"):
      self.state.split(..., nnx.Param)

  def test_leaves_that_no_filter_selects(self):
    with self.assertRaisesRegex(
      ValueError,
      "Filters must cover every leaf, but none of them selects `a.b` of type"
      " BatchStat: add `...` as the last filter, or use the non-exhaustive"
      " `filter`.",
    ):
      self.state.split(nnx.Param)
    with self.assertRaisesRegex(
      ValueError, r"none of them selects those at \[\('a', 'b'\), \('c',\)\]:"
    ):
      self.state.flat_state().split(nnx.Param)

  def test_subclass_is_kept(self):
    class MyState(nnx.State):
      pass

    s = MyState({"a": {"b": nnx.Param(1)}})
    self.assertIsInstance(s.a, MyState)
    self.assertIsInstance(s.filter(nnx.Param), MyState)
    self.assertIsInstance(jax.tree.map(lambda x: x, s), MyState)
    self.assertIsInstance(MyState.from_flat_path({("a",): 1}), MyState)

  def test_pickle_and_copies(self):
    for other in (
      pickle.loads(pickle.dumps(self.state)),
      copy.deepcopy(self.state),
    ):
      self.assertEqual(plain(other), plain(self.state))
      self.assertIsNot(other.a[0], self.w)
    other = copy.copy(self.state)
    other.a.new = 1
    self.assertNotIn("new", self.state.a)
    self.assertIs(other.a[0], self.w)

  def test_through_leaf(self):
    with self.assertRaisesRegex(
      ValueError, r"lead to a leaf or through mappings, but `\('a', 'b'\)`"
    ):
      nnx.from_flat_state([(("a",), 1), (("a", "b"), 2)])

  def test_jit_over_a_state(self):
    s = nnx.State({"a": nnx.Param(jnp.ones(2)), "b": {0: jnp.zeros(3)}})

    @jax.jit
    def f(s):
      return jax.tree.map(lambda x: x + 1, s)

    out = f(s)
    np.testing.assert_array_equal(out.a.value, [2.0, 2.0])
    np.testing.assert_array_equal(out.b[0], [1.0, 1.0, 1.0])


class FlatStateTest(absltest.TestCase):
  def test_sequence(self):
    flat = nnx.FlatState([(("b",), 1), (("a", 0), 2), (("a", "x"), 3)])
    self.assertEqual(flat.paths, (("a", 0), ("a", "x"), ("b",)))
    self.assertEqual(flat.leaves, [2, 3, 1])
    self.assertEqual(flat[0], (("a", 0), 2))
    self.assertEqual(flat[1:].paths, (("a", "x"), ("b",)))
    self.assertLen(flat, 3)
    self.assertEqual(dict(flat)[("b",)], 1)

  def test_pytree(self):
    flat = nnx.FlatState([(("b",), 1), (("a",), 2)])
    self.assertEqual(jax.tree.leaves(flat), [2, 1])
    self.assertEqual(jax.tree.map(lambda x: x + 1, flat).leaves, [3, 2])

  def test_merge(self):
    a, b = nnx.FlatState([(("b",), 1)]), nnx.FlatState([(("a",), 2)])
    self.assertEqual(nnx.FlatState.merge(a, b).leaves, [2, 1])
    self.assertIs(nnx.FlatState.merge(a), a)


class PureDictTest(absltest.TestCase):
  def test_extract_fn(self):
    s = nnx.State({"a": nnx.Param(1)})
    self.assertEqual(s.to_pure_dict(lambda v: v.value + 1), {"a": 2})

  def test_replace_fn(self):
    s = nnx.State({"a": nnx.Param(1)})
    s.replace_by_pure_dict({"a": 2}, lambda v, x: v.replace(x * 10))
    self.assertEqual(s.a.value, 20)

  def test_replace_keeps_kind_and_metadata(self):
    p = nnx.Param(1, axis="embed")
    s = nnx.State({"a": p, "b": 2})
    nnx.replace_by_pure_dict(s, {"a": 5, "b": 6})
    self.assertEqual((s.a.value, s.a.axis, s.b), (5, "embed", 6))
    self.assertIsInstance(s.a, nnx.Param)
    self.assertEqual(p.value, 1)

  def test_unknown_path(self):
    s = nnx.State({"a": {"x": nnx.Param(1)}})
    with self.assertRaisesRegex(
      ValueError, r"got `\('a', 'y'\)`. The keys there are \['x'\]"
    ):
      nnx.replace_by_pure_dict(s, {"a": {"y": 1}})
    with self.assertRaisesRegex(
      ValueError, r"must hold a mapping at `\('a',\)`, .* but got a `int`"
    ):
      nnx.replace_by_pure_dict(s, {"a": 1})


if __name__ == "__main__":
  absltest.main()
