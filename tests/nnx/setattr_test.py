"""Attributes stored past `Module.__setattr__`, and classes with their own."""

import copy
import dataclasses
import pickle
from typing import Any

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx


def frozen(lib):
  @dataclasses.dataclass(frozen=True)
  class Frozen(lib.Module):
    w: Any
    factor: int = 3
    count: Any = lib.data(default=5)
    sizes: Any = lib.static(default=(1, 2))

    def __post_init__(self):
      object.__setattr__(self, "bias", lib.Param(jnp.zeros(2)))

    def __call__(self, x):
      return x * self.w[...] * self.factor + self.bias[...]

  return Frozen


@dataclasses.dataclass(frozen=True)
class Point(nnx.Module):
  w: nnx.Param
  factor: int = 3
  count: int = nnx.data(default=5)


class Tracked:
  """A mixin that looks at what is stored."""

  def __setattr__(self, name, value):
    self.__dict__.setdefault("names", []).append(name)
    super().__setattr__(name, value)

  def __delattr__(self, name):
    self.names.append(f"-{name}")
    super().__delattr__(name)


class PastAll:
  def __setattr__(self, name, value):
    object.__setattr__(self, name, value)

  def __delattr__(self, name):
    object.__delattr__(self, name)


def paths(state):
  return sorted(".".join(map(str, path)) for path, _ in state.flat_state())


def flax_paths(state):
  return sorted(
    ".".join(map(str, path)) for path, _ in flax_nnx.to_flat_state(state)
  )


class PastTheChecksTest(parameterized.TestCase):
  def test_stored_as_if_set(self):
    module = nnx.Module()
    object.__setattr__(module, "w", nnx.Param(jnp.ones(2)))
    object.__setattr__(module, "items", [nnx.Param(1.0), jnp.ones(3)])
    object.__setattr__(module, "size", 3)
    self.assertEqual(paths(nnx.state(module)), ["items.0", "items.1", "w"])
    merged = nnx.merge(*nnx.split(module))
    self.assertEqual(merged.size, 3)
    gradient = nnx.grad(lambda m: (m.w[...] ** 2).sum())(module)
    np.testing.assert_array_equal(gradient.w[...], [2, 2])
    object.__delattr__(module, "items")
    self.assertEqual(paths(nnx.state(module)), ["w"])
    with self.assertRaises(AttributeError):
      object.__delattr__(module, "items")

  def test_passes_the_trace_check(self):
    module = nnx.Module()
    jax.jit(lambda: object.__setattr__(module, "built", True))()
    self.assertTrue(module.built)
    with self.assertRaises(nnx.TraceContextError):
      jax.jit(lambda: setattr(module, "built", False))()
    with self.assertRaises(nnx.TraceContextError):
      jax.jit(lambda: delattr(module, "built"))()
    jax.jit(lambda: object.__delattr__(module, "built"))()
    self.assertFalse(hasattr(module, "built"))

  def test_under_a_transform_comes_back(self):
    @nnx.jit
    def add(module):
      object.__setattr__(module, "new", nnx.Param(1.0))
      object.__setattr__(module, "size", 7)
      object.__delattr__(module, "old")

    module = nnx.Module()
    module.size, module.old = 3, nnx.Param(2.0)
    add(module)
    self.assertEqual(sorted(vars(module)), ["new", "size"])
    self.assertEqual((module.size, module.new.value), (7, 1))

  def test_declared_attribute(self):
    class Declared(nnx.Pytree):
      a: nnx.Data[int]
      b: nnx.Static[tuple]

      def __init__(self):
        object.__setattr__(self, "a", 1)
        object.__setattr__(self, "b", (2,))

    node = Declared()
    self.assertEqual(jax.tree.leaves(node), [1])
    del node.a
    node.a = 3
    self.assertEqual(jax.tree.leaves(node), [3])

  def test_mark_that_was_not_assigned_is_refused(self):
    module = nnx.Module()
    object.__setattr__(module, "a", nnx.data(3))
    for function in (nnx.state, nnx.split, nnx.jit(lambda m: None)):
      with self.assertRaisesRegex(
        ValueError, r"assigned to attributes, but `.*a` was stored as nnx.data"
      ):
        function(module)

  def test_wrong_calls(self):
    with self.assertRaisesRegex(
      TypeError, "`__setattr__` takes a name and a value, but got 1"
    ):
      nnx.Module().__setattr__("a")
    with self.assertRaises(TypeError):
      nnx.Module.__setattr__(3, "a", 1)
    with self.assertRaises(AttributeError):
      del nnx.Module().a


class FrozenTest(parameterized.TestCase):
  def test_state_as_in_flax(self):
    ours = frozen(nnx)(nnx.Param(jnp.ones(2)))
    theirs = frozen(flax_nnx)(flax_nnx.Param(jnp.ones(2)))
    self.assertEqual(paths(nnx.state(ours)), ["bias", "count", "w"])
    self.assertEqual(flax_paths(flax_nnx.state(theirs)), ["bias", "count", "w"])
    np.testing.assert_array_equal(
      nnx.jit(lambda m, x: m(x))(ours, 2.0), theirs(2.0)
    )

  def test_is_frozen(self):
    module = frozen(nnx)(nnx.Param(jnp.ones(2)))
    with self.assertRaises(dataclasses.FrozenInstanceError):
      module.factor = 4
    with self.assertRaises(dataclasses.FrozenInstanceError):
      del module.factor

  def test_training_step_as_in_flax(self):
    results = []
    for lib in (nnx, flax_nnx):
      module = frozen(lib)(lib.Param(jnp.ones(2)))

      @lib.jit
      def step(module, lib=lib):
        gradient = lib.grad(lambda m: (m(2.0) ** 2).sum())(module)
        module.w[...] -= 0.1 * gradient["w"][...]

      step(module)
      step(module)
      results.append(np.asarray(module.w[...]))
    np.testing.assert_allclose(*results, rtol=1e-6)

  def test_replace(self):
    module = frozen(nnx)(nnx.Param(jnp.ones(2)))
    other = dataclasses.replace(module, factor=5)
    self.assertIs(other.w, module.w)
    apply = nnx.jit(lambda m, x: m(x))
    np.testing.assert_array_equal(apply(module, 1.0), [3, 3])
    np.testing.assert_array_equal(apply(other, 1.0), [5, 5])

  @parameterized.parameters(
    copy.copy,
    copy.deepcopy,
    nnx.clone,
    lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: jax.tree.map(lambda x: x, m),
    lambda m: nnx.merge(*nnx.split(m)),
  )
  def test_copies(self, make):
    made = make(Point(nnx.Param(jnp.ones(2)), 4))
    self.assertEqual(paths(nnx.state(made)), ["count", "w"])
    self.assertEqual((made.factor, made.count), (4, 5))

  def test_update_and_transforms(self):
    module = Point(nnx.Param(jnp.ones(2)))
    state = jax.tree.map(lambda x: x + 1, nnx.state(module))
    nnx.update(module, state)
    np.testing.assert_array_equal(module.w[...], [2, 2])
    self.assertEqual(module.count, 6)
    result = nnx.vmap(lambda m, x: m.w.sum() + x, in_axes=(None, 0))(
      module, jnp.arange(2.0)
    )
    np.testing.assert_array_equal(result, [4, 5])


class OwnSetAttrTest(parameterized.TestCase):
  @parameterized.parameters(Tracked, PastAll)
  def test_mixin_before(self, mixin):
    class Layer(mixin, nnx.Module):
      def __init__(self):
        self.w, self.b = nnx.Param(jnp.ones(2)), nnx.Param(1.0)

    layer = Layer()
    if mixin is Tracked:
      self.assertEqual(layer.names, ["w", "b"])
    self.assertEqual(paths(nnx.state(layer)), ["b", "w"])
    del layer.b
    self.assertEqual(paths(nnx.state(layer)), ["w"])

  def test_mixin_after(self):
    class Layer(nnx.Module, Tracked):
      def __init__(self):
        self.w = nnx.Param(jnp.ones(2))

    # As in Flax, the Module's own way is the last word.
    self.assertNotIn("names", vars(Layer()))
    self.assertEqual(paths(nnx.state(Layer())), ["w"])

  def test_class_that_goes_past_some_names(self):
    class Layer(nnx.Module):
      """As the layers of Keras do it."""

      def __init__(self):
        self.built = False
        self.w = nnx.Param(jnp.ones(2))

      def __setattr__(self, name, value):
        if name != "tracker" and not hasattr(self, "tracker"):
          self.tracker = "tracker"
        if name == "built":
          object.__setattr__(self, name, value)
          return
        super().__setattr__(name, value)

      def __call__(self, x):
        self.built = True
        return x * self.w

    layer = Layer()
    np.testing.assert_array_equal(jax.jit(lambda x: layer(x))(2.0), [2, 2])
    self.assertTrue(layer.built)
    layer = Layer()
    nnx.jit(lambda layer, x: layer(x))(layer, 2.0)
    self.assertTrue(layer.built)


if __name__ == "__main__":
  absltest.main()
