"""Containers behave as Python's, and are laid out as flax.nnx's."""

import pickle

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp

import nnx

OPERATIONS = st.lists(
  st.one_of(
    st.tuples(st.just("append"), st.integers(0, 9)),
    st.tuples(st.just("insert"), st.integers(-6, 6), st.integers(0, 9)),
    st.tuples(st.just("pop"), st.integers(-3, 3)),
    st.tuples(st.just("set"), st.integers(-3, 3), st.integers(0, 9)),
    st.tuples(st.just("del"), st.integers(-3, 3)),
    st.tuples(st.just("extend"), st.lists(st.integers(0, 9), max_size=3)),
    st.tuples(st.just("reverse")),
    st.tuples(st.just("slice"), st.integers(0, 3), st.lists(st.integers(0, 9))),
    st.tuples(st.just("delslice"), st.integers(0, 3), st.integers(1, 2)),
    st.tuples(st.just("clear")),
  ),
  max_size=12,
)


def apply(x, operation):
  name, *args = operation
  if name == "set":
    x[args[0]] = args[1]
  elif name == "del":
    del x[args[0]]
  elif name == "slice":
    x[args[0] :] = args[1]
  elif name == "delslice":
    del x[args[0] :: args[1]]
  else:
    return getattr(x, name)(*args)


class ListTest(parameterized.TestCase):
  @hypothesis.settings(derandomize=True, deadline=None, max_examples=200)
  @hypothesis.given(st.lists(st.integers(0, 9), max_size=4), OPERATIONS)
  def test_is_a_list(self, first, operations):
    ours, plain = nnx.List(first), list(first)
    for operation in operations:
      try:
        expected = apply(plain, operation)
      except IndexError:
        with self.assertRaises(IndexError):
          apply(ours, operation)
        continue
      self.assertEqual(apply(ours, operation), expected)
      self.assertEqual(list(ours), plain)
      self.assertLen(ours, len(plain))
      self.assertEqual(ours[:], plain)
      self.assertEqual(list(vars(ours)), list(range(len(plain))))
    self.assertEqual(list(reversed(ours)), plain[::-1])
    self.assertEqual(3 in ours, 3 in plain)

  def test_bounds(self):
    with self.assertRaisesRegex(
      IndexError, r"`index` must lie in \[-1, 1\), but got 2"
    ):
      _ = nnx.List([1])[2]

  def test_state_as_in_flax(self):
    def build(lib):
      return lib.List([lib.Param(i) for i in range(11)] + ["a", lib.List([])])

    ours, theirs = nnx.state(build(nnx)), flax_nnx.state(build(flax_nnx))
    self.assertEqual(
      ours.flat_state().paths, flax_nnx.to_flat_state(theirs).paths
    )
    self.assertEqual(list(nnx.to_pure_dict(ours)), list(range(11)))

  def test_split_and_merge(self):
    layers = nnx.List([nnx.Param(1), "a", nnx.Param(2)])
    graphdef, state = nnx.split(layers)
    other = nnx.merge(graphdef, state)
    self.assertEqual(other[1], "a")
    self.assertEqual(other[2].value, 2)
    self.assertLen(other, 3)
    other.append(3)
    self.assertLen(other, 4)

  def test_pytree(self):
    layers = nnx.List([jnp.zeros(1), "a", nnx.Param(2)])
    other = jax.tree.map(lambda x: x + 1, layers)
    self.assertIsInstance(other, nnx.List)
    self.assertEqual(other[1], "a")
    self.assertEqual(other[2].value, 3)
    [(path, _), _] = jax.tree_util.tree_leaves_with_path(layers)
    self.assertEqual(jax.tree_util.keystr(path), "[0]")

  def test_marks_move_with_their_elements(self):
    layers = nnx.List([nnx.data(1), 2, 3])
    self.assertEqual(jax.tree.leaves(layers), [1])
    layers.insert(0, 5)
    self.assertEqual(jax.tree.leaves(layers), [1])
    layers.append(nnx.data(7))
    layers[0] = nnx.data(6)
    self.assertEqual(jax.tree.leaves(layers), [6, 1, 7])
    del layers[0]
    self.assertEqual(jax.tree.leaves(layers), [1, 7])
    self.assertEqual(list(layers), [1, 2, 3, 7])

  def test_subclass_with_attributes(self):
    class Named(nnx.List):
      def __init__(self, elements, name):
        super().__init__(elements)
        self.name = name

    x = Named([1, 2], "n")
    x.append(3)
    self.assertEqual((list(x), x.name), ([1, 2, 3], "n"))
    self.assertLen(x, 3)
    self.assertIn("name", dir(x))

  def test_texts_of_ints_are_elements_as_in_flax(self):
    for lib in (nnx, flax_nnx):
      x = lib.List([lib.Param(jnp.zeros(1)), lib.Param(jnp.zeros(1))])
      x.note = lib.Param(jnp.ones(2))
      setattr(x, "0", lib.Param(jnp.ones(1)))
      self.assertEqual(float(x[0][...].sum()), 1.0)
      self.assertIs(getattr(x, "1"), x[1])
      self.assertLen(x, 2)
      self.assertEqual(set(lib.state(x)), {0, 1, "note"})
    for name in ("2", "01x", "other"):
      self.assertFalse(hasattr(x, name))
    x = nnx.List([1])
    with self.assertRaisesRegex(IndexError, "must lie in"):
      setattr(x, "1", 2)
    with self.assertRaisesRegex(AttributeError, "no attribute '1'"):
      getattr(x, "1")

  def test_an_update_brings_no_words(self):
    for lib, error in ((nnx, ValueError), (flax_nnx, KeyError)):
      x = lib.List([lib.Param(jnp.zeros(1))])
      new = {0: lib.Param(jnp.ones(1)), "word": lib.Param(jnp.ones(1))}
      with self.assertRaisesRegex(error, "word"):
        lib.update(x, new)
      self.assertEqual(set(lib.state(x)), {0})
    x = nnx.List([nnx.Param(jnp.zeros(1))])
    with self.assertRaises(ValueError):
      nnx.update(x, {0: jnp.ones(1), "word": nnx.Param(1)})
    self.assertEqual(float(x[0][...].sum()), 0.0)

  def test_under_another_trace(self):
    layers = nnx.List([1])
    for change in (
      lambda: layers.append(2),
      lambda: layers.insert(0, 2),
      lambda: layers.pop(),
      lambda: layers.__setitem__(0, 5),
    ):
      with self.assertRaises(nnx.TraceContextError):
        jax.jit(change)()
    self.assertEqual(list(layers), [1])

  def test_pickle(self):
    self.assertEqual(list(pickle.loads(pickle.dumps(nnx.List([1, 2])))), [1, 2])

  def test_none_is_empty(self):
    self.assertEmpty(nnx.List(None))

  def test_identity(self):
    x = nnx.List([1])
    self.assertNotEqual(x, nnx.List([1]))
    self.assertLen({x, nnx.List([1])}, 2)


class DictTest(parameterized.TestCase):
  def test_is_a_dict(self):
    d = nnx.Dict({"b": 1}, a=nnx.Param(2))
    self.assertEqual(list(d), ["b", "a"])
    self.assertEqual(d["b"], 1)
    self.assertEqual(d.a.value, 2)
    d.c = 3
    d["d"] = 4
    del d["b"]
    del d.c
    self.assertEqual(list(d.items())[1:], [("d", 4)])
    self.assertLen(d, 2)
    self.assertIn("a", d)
    self.assertEqual(d.get("x", 5), 5)
    self.assertEqual(d.pop("d"), 4)
    d.update({"e": 6})
    self.assertEqual(list(d.keys()), ["a", "e"])
    self.assertEmpty(nnx.Dict())
    self.assertEqual(list(nnx.Dict([("x", 1)])), ["x"])

  def test_errors(self):
    d = nnx.Dict()
    with self.assertRaises(KeyError):
      _ = d["a"]
    with self.assertRaises(KeyError):
      del d["a"]
    with self.assertRaisesRegex(TypeError, "must be strings, .* but got `0`"):
      d[0] = 1
    with self.assertRaises(AttributeError):
      _ = d.a

  def test_state_as_in_flax(self):
    def build(lib):
      return lib.Dict(b=lib.Param(1), a=lib.Dict(c=lib.Param(2)), d="x")

    ours, theirs = nnx.state(build(nnx)), flax_nnx.state(build(flax_nnx))
    self.assertEqual(
      ours.flat_state().paths, flax_nnx.to_flat_state(theirs).paths
    )

  def test_marks(self):
    d = nnx.Dict(a=nnx.data(1), b=2)
    self.assertEqual(jax.tree.leaves(d), [1])

  def test_hashable(self):
    self.assertLen({nnx.Dict(), nnx.Dict()}, 2)


class SequentialTest(parameterized.TestCase):
  @parameterized.parameters(
    ((), (), {}),
    ((), (1,), {}),
    ((), (1, 2), {}),
    ((), (), {"a": 1}),
    ((lambda x: x + 1, lambda x: x * 2), (3,), {}),
    ((lambda x, y: (y, x), lambda a, b: a - b), (3, 5), {}),
    ((lambda x: {"a": x}, lambda a: a + 1), (3,), {}),
    ((lambda *, a: a,), (), {"a": 4}),
  )
  def test_calls_as_flax_does(self, fns, args, kwargs):
    self.assertEqual(
      nnx.Sequential(*fns)(*args, **kwargs),
      flax_nnx.Sequential(*fns)(*args, **kwargs),
    )

  def test_rngs(self):
    def with_rngs(x, *, rngs):
      return x + rngs

    model = nnx.Sequential(lambda x: x, with_rngs, abs, with_rngs)
    self.assertEqual(model(1, rngs=10), 21)

  def test_not_callable(self):
    with self.assertRaisesRegex(
      TypeError, "must be callable, but layer 1 is a `int`"
    ):
      nnx.Sequential(abs, 3)(1)

  def test_layers(self):
    model = nnx.Sequential(abs, nnx.Sequential(abs))
    self.assertIs(model.layers[0], abs)
    self.assertLen(model.layers, 2)


if __name__ == "__main__":
  absltest.main()
