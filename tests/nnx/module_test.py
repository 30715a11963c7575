"""Modules: walking, modes, views, sowing, perturbing and capturing."""

import warnings

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
from flax.nnx import module as flax_module
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from nnx import module as nnx_module


def define(lib):
  """The same model for both libraries."""

  class Noise(lib.Module):
    def __init__(self, deterministic=False):
      self.deterministic = deterministic
      self.use_running_average = False

    def __call__(self, x):
      return x

    def set_view(self, deterministic: bool | None = None):
      """Sets the mode.

      Args:
        deterministic: if True, nothing
          is added.

      Returns:
        nothing.
      """
      if deterministic is not None:
        self.deterministic = deterministic

  class Scale(lib.Module):
    def __init__(self, factor):
      self.w = lib.Param(jnp.float32(factor))
      self.noise = Noise()

    def __call__(self, x):
      x = self.perturb("x", x)
      y = self.noise(self.helper(x))
      self.sow(lib.Intermediate, "y", y)
      return y

    def helper(self, x):
      return x * self.w[...]

  class Model(lib.Module):
    def __init__(self):
      self.second = Scale(3.0)
      self.first = Scale(2.0)
      self.blocks = lib.List([Scale(5.0)])
      self.size = 3

    def __call__(self, x):
      x = self.second(self.first(x))
      x = self.blocks[0](self.blocks[0](x))
      self.sow(
        lib.Intermediate,
        "total",
        x,
        init_fn=lambda: 0.0,
        reduce_fn=lambda a, b: a + b,
      )
      return x

  return Model, Scale, Noise


Model, Scale, Noise = define(nnx)
FlaxModel, FlaxScale, FlaxNoise = define(flax_nnx)


class Empty(nnx.Module):
  pass


def plain(state):
  if hasattr(state, "get_value"):
    return type(state).__name__, jax.tree.map(np.asarray, state.get_value())
  return {key: plain(value) for key, value in state.items()}


def assert_same_state(ours, theirs):
  jax.tree.map(
    np.testing.assert_array_equal,
    plain(ours),
    plain(theirs),
    is_leaf=lambda x: isinstance(x, str),
  )


class WalkTest(parameterized.TestCase):
  def test_iter_modules(self):
    ours = [(p, type(m).__name__) for p, m in nnx.iter_modules(Model())]
    theirs = [
      (p, type(m).__name__) for p, m in flax_nnx.iter_modules(FlaxModel())
    ]
    self.assertEqual(ours, theirs)
    self.assertEqual(
      ours, [(p, type(m).__name__) for p, m in Model().iter_modules()]
    )

  def test_plain_containers(self):
    model = Empty()
    model.layers = [Empty(), {"a": Empty()}]
    self.assertEqual(
      [path for path, _ in model.iter_modules()],
      [("layers", 0), ("layers", 1, "a"), ()],
    )

  def test_shared_modules_come_once(self):
    model = Empty()
    model.a = model.b = Empty()
    model.me = model
    self.assertLen(list(model.iter_modules()), 2)

  def test_iter_children(self):
    self.assertEqual(
      [key for key, _ in nnx.iter_children(Model())],
      [key for key, _ in flax_nnx.iter_children(FlaxModel())],
    )
    for function in ("iter_children", "iter_module_children"):
      self.assertEqual(
        [key for key, _ in getattr(nnx, function)(Scale(1.0))],
        [key for key, _ in getattr(flax_nnx, function)(FlaxScale(1.0))],
      )
    # The method is Flax 0.10's, which has modules alone.
    self.assertEqual([key for key, _ in Scale(1.0).iter_children()], ["noise"])
    with self.assertRaisesRegex(
      ValueError, "must be an object of nnx or a pytree node, but got"
    ):
      list(nnx.iter_children(3))


class FirstFromTest(parameterized.TestCase):
  @parameterized.parameters(nnx_module.first_from, flax_module.first_from)
  def test_as_flax(self, first_from):
    self.assertIs(first_from(None, False, True, error_msg="no"), False)
    with self.assertRaisesRegex(ValueError, "say it"):
      first_from(None, None, error_msg="say it")


class ModesTest(parameterized.TestCase):
  def test_train_and_eval(self):
    model = Model()
    model.eval()
    self.assertTrue(model.first.noise.deterministic)
    self.assertTrue(model.blocks[0].noise.use_running_average)
    model.train(size=4)
    self.assertFalse(model.first.noise.deterministic)
    self.assertEqual(model.size, 4)
    model.eval(deterministic=False)
    self.assertFalse(model.first.noise.deterministic)

  def test_set_attributes(self):
    model = Model()
    model.set_attributes(nnx.PathContains("first"), deterministic=True)
    self.assertTrue(model.first.noise.deterministic)
    self.assertFalse(model.second.noise.deterministic)
    model.set_attributes(Noise, deterministic=True)
    self.assertTrue(model.second.noise.deterministic)
    with self.assertRaisesRegex(
      ValueError,
      r"Could not find at least one instance of the following attributes:"
      r" \['nothing'\]",
    ):
      model.set_attributes(nothing=3, size=1)
    model.set_attributes(nothing=3, raise_if_not_found=False)

  def test_with_attributes(self):
    model = Model()
    other = nnx.with_attributes(model, deterministic=True)
    self.assertTrue(other.first.noise.deterministic)
    self.assertFalse(model.first.noise.deterministic)
    self.assertIs(other.first.w, model.first.w)
    other = nnx.with_attributes(
      model, only=nnx.PathContains("first"), deterministic=True
    )
    self.assertFalse(other.second.noise.deterministic)
    with self.assertRaisesRegex(ValueError, r"attributes: \['nothing'\]"):
      nnx.with_attributes(model, nothing=1)
    nnx.with_attributes(model, nothing=1, raise_if_not_found=False)

  def test_view(self):
    model = Model()
    other = nnx.view(model, deterministic=True)
    self.assertTrue(other.first.noise.deterministic)
    self.assertFalse(model.first.noise.deterministic)
    self.assertIs(other.first.w, model.first.w)
    other = nnx.view(model, only=nnx.PathContains("second"), deterministic=True)
    self.assertTrue(other.second.noise.deterministic)
    self.assertFalse(other.first.noise.deterministic)
    with self.assertRaisesRegex(
      ValueError, r"Unused keys found in nnx.view: \['nothing'\]"
    ):
      nnx.view(model, nothing=1)
    nnx.view(model, nothing=1, raise_if_not_found=False)

  def test_view_with_any_keyword(self):
    class Any(nnx.Module):
      def set_view(self, **kwargs):
        self.seen = tuple(kwargs)

    self.assertEqual(nnx.view(Any(), a=1, b=2).seen, ("a", "b"))

  def test_view_info(self):
    text = nnx.view_info(Model())
    self.assertEqual(
      text,
      f"{Noise.__qualname__}:\n"
      "  deterministic: bool | None = None\n"
      "    if True, nothing\n"
      "    is added.",
    )

    class Undocumented(nnx.Module):
      def set_view(self, a: int):
        pass

    self.assertEqual(
      nnx.view_info(Undocumented()),
      f"{Undocumented.__qualname__}:\n  set_view(self, a: int)",
    )


class SowTest(parameterized.TestCase):
  def test_sow_into_the_module(self):
    model = Scale(2.0)
    self.assertEqual(model(3.0), 6.0)
    model(4.0)
    self.assertIsInstance(model.y, nnx.Intermediate)
    self.assertEqual(model.y.value, (6.0, 8.0))
    popped = nnx.pop(model, nnx.Intermediate)
    self.assertEqual(popped.y.value, (6.0, 8.0))
    self.assertFalse(hasattr(model, "y"))

  def test_sow_under_jit(self):
    model = Scale(2.0)
    step = nnx.jit(lambda m, x: m(x))
    step(model, 3.0)
    step(model, 4.0)
    self.assertEqual(model.y.value, (6.0, 8.0))
    self.assertEqual(nnx.pop(model, nnx.Intermediate).y.value, (6.0, 8.0))

  def test_sow_as_flax_does(self):
    ours, theirs = Model(), FlaxModel()
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      theirs(2.0)
    ours(2.0)
    assert_same_state(nnx.state(ours), flax_nnx.state(theirs))

  def test_returns_whether_it_kept(self):
    model = Empty()
    self.assertTrue(model.sow(nnx.Intermediate, "a", 1))
    model.keep = lambda: None
    kept = nnx.capture(
      lambda m: m.sow(nnx.Intermediate, "a", 1), nnx.Perturbation
    )(Empty())
    self.assertFalse(kept[0])

  def test_sow_by_name(self):
    model = Empty()
    model.sow("metrics", "a", 1)
    self.assertIs(type(model.a), nnx.variable_type_from_name("metrics"))

  def test_taken_names(self):
    model = Empty()
    model.a = 3
    model.b = nnx.Param(1)
    with self.assertRaisesRegex(
      ValueError, "but `Empty.a` is a `int`. Sow by another name"
    ):
      model.sow(nnx.Intermediate, "a", 1)
    with self.assertRaisesRegex(ValueError, "but `Empty.b` is a `Param`"):
      model.sow(nnx.Intermediate, "b", 1)
    with self.assertRaisesRegex(ValueError, "`Empty.a` is a `int`. Perturb by"):
      model.perturb("a", 1)

  def test_perturb_in_the_module(self):
    model = Empty()
    x = jnp.ones(2)
    np.testing.assert_array_equal(model.perturb("a", x), x)
    self.assertIs(type(model.a), nnx.Perturbation)
    model.a.value = jnp.full(2, 3.0)
    np.testing.assert_array_equal(model.perturb("a", x), [4.0, 4.0])
    tree = model.perturb("b", {"u": x})
    np.testing.assert_array_equal(tree["u"], x)


class CaptureTest(parameterized.TestCase):
  @parameterized.parameters(
    (("Intermediate",),),
    (("Perturbation",),),
    (("Intermediate", "Perturbation"),),
    ((),),
  )
  def test_as_flax(self, names):
    def run(lib, model):
      return lib.capture(model, *(getattr(lib, name) for name in names))(2.0)

    ours, theirs = run(nnx, Model()), run(flax_nnx, FlaxModel())
    if not names:
      self.assertEqual(ours, theirs)
      return
    self.assertEqual(ours[0], theirs[0])
    for a, b in zip(ours[1:], theirs[1:], strict=True):
      assert_same_state(a, b)

  def test_gradients_of_perturbations(self):
    model = Model()
    _, zeros = nnx.capture(model, nnx.Perturbation)(2.0)
    theirs = FlaxModel()
    _, flax_zeros = flax_nnx.capture(theirs, flax_nnx.Perturbation)(2.0)

    def gradient(lib, model, zeros):
      def loss(zeros):
        # Flax refuses to capture from a model of another trace.
        m = lib.clone(model) if lib is flax_nnx else model
        return lib.capture(m, lib.Perturbation, init=zeros)(2.0)[0]

      return jax.grad(loss)(zeros)

    assert_same_state(
      gradient(nnx, model, zeros), gradient(flax_nnx, theirs, flax_zeros)
    )

  def test_intermediates_with_perturbations_given(self):
    _, zeros = nnx.capture(Model(), nnx.Perturbation)(2.0)
    result, kept = nnx.capture(Model(), nnx.Intermediate, init=zeros)(2.0)
    self.assertEqual(result, 300.0)
    self.assertEqual(set(kept), {"blocks", "first", "second", "total"})

  @parameterized.parameters("module", "method", "function", "decorator")
  def test_what_may_be_captured(self, how):
    model = Scale(2.0)
    if how == "module":
      run = nnx.capture(model, nnx.Intermediate)
    elif how == "method":
      run = nnx.capture(model.__call__, nnx.Intermediate)
    elif how == "function":
      f = nnx.capture(lambda m, x: m(x), nnx.Intermediate)

      def run(x):
        return f(model, x)
    else:
      f = nnx.capture(nnx.Intermediate)(lambda m, x: m(x))

      def run(x):
        return f(model, x)

    result, kept = run(3.0)
    self.assertEqual(result, 6.0)
    self.assertEqual(kept.y.value, (6.0,))
    self.assertEqual(set(vars(model)), {"w", "noise"})

  @parameterized.parameters(nnx, flax_nnx)
  def test_what_is_kept_so_far_is_seen(self, library):
    def forward(model):
      (kept,) = model.__captures__
      model.sow(library.Intermediate, "x", 1.0)
      return type(kept), kept.get_value()

    seen, _ = library.capture(library.Intermediate)(forward)(library.Module())
    self.assertEqual(seen, (library.Intermediate, {"x": (1.0,)}))

  def test_method_outputs(self):
    _, kept = nnx.capture(
      Model(), nnx.Intermediate, method_outputs=nnx.Intermediate
    )(2.0)
    theirs = flax_nnx.capture(
      FlaxModel(), flax_nnx.Intermediate, method_outputs=flax_nnx.Intermediate
    )(2.0)[1]
    ours, theirs = plain(kept), plain(theirs)
    self.assertEqual(ours["first"]["helper"][0], "Intermediate")
    self.assertEqual(ours["first"]["helper"][1], theirs["first"]["helper"][1])
    self.assertEqual(set(ours["first"]), set(theirs["first"]))
    self.assertNotIn("wrapper", Scale.helper.__qualname__)
    self.assertFalse(hasattr(Scale.helper, "__wrapped__"))

  def test_under_jit(self):
    model = Scale(2.0)
    inside = nnx.jit(lambda m, x: nnx.capture(m, nnx.Intermediate)(x))
    outside = nnx.capture(nnx.jit(lambda m, x: m(x)), nnx.Intermediate)
    for forward in (inside, outside, outside):
      result, kept = forward(model, 3.0)
      self.assertEqual(result, 6.0)
      self.assertEqual(kept.y.value, (6.0,))
      self.assertEqual(set(vars(model)), {"w", "noise"})

  def test_leaves_nothing_after_an_error(self):
    model = Scale(2.0)

    def fail(m):
      raise RuntimeError("no")

    with self.assertRaisesRegex(RuntimeError, "no"):
      nnx.capture(fail, nnx.Intermediate, method_outputs=nnx.Intermediate)(
        model
      )
    self.assertEqual(set(vars(model)), {"w", "noise"})
    self.assertFalse(hasattr(Scale.helper, "__wrapped__"))

  def test_nothing_to_capture_from(self):
    with self.assertRaisesRegex(
      TypeError, "or take one as its first argument, but got `int`"
    ):
      nnx.capture(lambda x: x, nnx.Intermediate)(3)

  def test_keeps_the_name(self):
    def forward(model):
      """Goes forward."""

    self.assertEqual(
      nnx.capture(forward, nnx.Intermediate).__doc__, "Goes forward."
    )


if __name__ == "__main__":
  absltest.main()
