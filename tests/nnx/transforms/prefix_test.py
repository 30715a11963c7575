"""Prefixes in the shape of a Module: `nnx.prefix`, `jax.tree.map`."""

import copy
import pickle

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx


class Layer(nnx.Module):
  def __init__(self, rngs):
    self.w = nnx.Param(rngs.normal((4, 2, 3)))
    self.count = nnx.BatchStat(jnp.arange(4.0))
    self.norms = [nnx.Param(jnp.ones(4)), jnp.arange(4.0)]
    self.size = 7
    self.none = None

  def __call__(self, x):
    norm = self.norms[0] + self.norms[1]
    return (x @ self.w.value) * self.size + self.count.value + norm


AXES = {nnx.Param: 0, nnx.BatchStat: None, ...: 0}


class PrefixTest(parameterized.TestCase):
  def test_entries_take_the_place_of_variables_and_arrays(self):
    axes = nnx.prefix(Layer(nnx.Rngs(0)), AXES)
    self.assertIsInstance(axes, Layer)
    self.assertEqual(
      (axes.w, axes.count, axes.norms, axes.size), (0, None, [0, 0], 7)
    )
    self.assertEqual(jax.tree.leaves(axes), [0, 0, 0])

  def test_a_function_gets_the_paths(self):
    paths = nnx.prefix(Layer(nnx.Rngs(0)), lambda path, leaf: path)
    self.assertEqual(paths.norms[1], ("norms", 1))
    self.assertEqual(paths.w, ("w",))
    in_list = nnx.prefix([nnx.Param(1), {"a": nnx.Param(2)}], lambda p, _: p)
    self.assertEqual(in_list, [(0,), {"a": (1, "a")}])

  @parameterized.parameters(nnx.vmap, jax.vmap)
  def test_vmap_takes_them(self, vmap):
    layer = Layer(nnx.Rngs(0))
    layer.count = nnx.BatchStat(jnp.array(2.0))
    x = jnp.ones(2)
    got = vmap(lambda m, x: m(x), in_axes=(nnx.prefix(layer, AXES), None))(
      layer, x
    )
    want = np.stack(
      [
        np.ones(2) @ np.asarray(layer.w.value)[i] * 7 + 2 + 1 + i
        for i in range(4)
      ]
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)

  def test_so_does_what_jax_maps_over_all_leaves(self):
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    zeros = jax.tree.map(lambda _: 0, layer)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x + 1]), layer)
    got = nnx.vmap(lambda m, x: m(x), in_axes=(zeros, None))(
      stacked, jnp.ones((1, 2))
    )
    self.assertEqual(got.shape, (2, 1, 3))

  @parameterized.parameters(nnx, flax_nnx)
  def test_one_with_an_entry_for_all_is_that_of_flax(self, library):
    state = {
      "a": library.Param(jnp.array(2)),
      "b": library.BatchStat(jnp.ones(5)),
    }
    kwargs = {} if library is nnx else {"graph": False}
    axes = library.prefix(
      state, {library.Param: None, library.BatchStat: 0}, **kwargs
    )
    self.assertEqual(axes, {"a": None, "b": 0})

  def test_the_treedef_is_that_of_the_module(self):
    layer = Layer(nnx.Rngs(0))
    treedef = jax.tree.structure(layer)
    for stand_in in (0, "text", object()):
      mapped = jax.tree.unflatten(treedef, [stand_in] * treedef.num_leaves)
      self.assertEqual(jax.tree.structure(mapped), treedef)
      self.assertEqual(jax.tree.leaves(mapped), [stand_in] * 4)
      if stand_in == 0:
        for other in (
          copy.deepcopy(mapped),
          pickle.loads(pickle.dumps(mapped)),
        ):
          self.assertEqual(jax.tree.structure(other), treedef)

  def test_assigning_ends_the_standing_in(self):
    layer = Layer(nnx.Rngs(0))
    mapped = nnx.prefix(layer, AXES)
    mapped.w = 5  # an attribute like any other from here on
    self.assertEqual(jax.tree.leaves(mapped), [0, 0])
    mapped.w = nnx.Param(jnp.ones(2))
    self.assertLen(jax.tree.leaves(mapped), 3)
    self.assertLen(jax.tree.leaves(nnx.prefix(layer, {...: 1})), 4)

  def test_marks_of_the_user_stay(self):
    class Marked(nnx.Module):
      def __init__(self):
        self.kept = nnx.data(3)
        self.text = nnx.static("a")
        self.w = nnx.Param(jnp.ones(2))

    treedef = jax.tree.structure(Marked())
    mapped = jax.tree.unflatten(treedef, ["x", "y"])
    self.assertEqual((mapped.kept, mapped.text), ("x", "a"))
    self.assertEqual(jax.tree.structure(mapped), treedef)
    mapped.kept = 4
    self.assertIn(4, jax.tree.leaves(mapped))

  def test_errors(self):
    layer = Layer(nnx.Rngs(0))
    with self.assertRaisesRegex(
      ValueError, r"No filter matched.* selects `count` of type BatchStat. Add"
    ):
      nnx.prefix(layer, {nnx.Param: 0})
    other = nnx.prefix(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), {...: 0})
    with self.assertRaisesRegex(ValueError, "`in_axes` must be a prefix of"):
      nnx.vmap(lambda m: m.w, in_axes=(other,))(layer)


if __name__ == "__main__":
  absltest.main()
