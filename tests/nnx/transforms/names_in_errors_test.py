"""Errors of jax name the user's function, its line and its arguments."""

import functools
import inspect
import os
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx


class Block(nnx.Module):
  def __init__(self):
    self.kernel = nnx.Param(jnp.ones((2, 3)))


class Model(nnx.Module):
  def __init__(self):
    self.blocks = [Block(), Block()]


def branches(model, x):
  if model.blocks[1].kernel.sum() > 0:
    return x
  return x + 1


def branches_in_a_loop(x, model):
  return branches(model, x), x


def branches_in_a_body(value):
  return value[0], branches(*value)


def as_number(model, x):
  return x * int(model.blocks[1].kernel[0, 0])


def as_index(model, x):
  return [x][model.blocks[1].kernel[0, 0].astype(int)]


def as_array(model, x):
  return x + np.asarray(model.blocks[1].kernel[...])


def place_of(function):
  file = inspect.getsourcefile(function)
  return f"{function.__name__} at {file}:{function.__code__.co_firstlineno}"


X = jnp.ones(3)

# Each calls a function of a model and an array under a transform.
TRANSFORMS = {
  "jit": lambda f, m: nnx.jit(f)(m, X),
  "jit_keywords": lambda f, m: nnx.jit(f)(x=X, model=m),
  "jit_donated": lambda f, m: nnx.jit(f, donate_argnums=0)(m, X),
  "jit_partial": lambda f, m: nnx.jit_partial(f, m)(X),
  "lower": lambda f, m: nnx.jit(f).lower(m, X),
  "remat": lambda f, m: nnx.remat(f)(m, X),
  "cond": lambda f, m: nnx.cond(True, f, f, m, X),
  "switch": lambda f, m: nnx.switch(0, [f, f], m, X),
  "eval_shape": lambda f, m: nnx.eval_shape(f, m, X),
  "make_jaxpr": lambda f, m: nnx.make_jaxpr(f)(m, X),
  "grad_of_remat": lambda f, m: nnx.grad(lambda m: nnx.remat(f)(m, X).sum())(m),
}


class ArgumentsTest(parameterized.TestCase):
  @parameterized.named_parameters((name, name) for name in TRANSFORMS)
  def test_a_value_that_is_not_known_is_named(self, name):
    for function in (branches, as_number, as_index, as_array):
      with self.assertRaises(jax.errors.JAXTypeError) as caught:
        TRANSFORMS[name](function, Model())
      text = str(caught.exception)
      self.assertIn(place_of(function), text)
      self.assertIn("model.blocks[1].kernel", text)
      self.assertNotIn("leaves", text)
      self.assertNotIn("values[", text)

  @parameterized.parameters(False, True)
  def test_in_scan(self, carried):
    axes = nnx.StateAxes({...: nnx.Carry}) if carried else None
    with self.assertRaises(jax.errors.TracerBoolConversionError) as caught:
      nnx.scan(
        branches_in_a_loop,
        length=2,
        in_axes=(nnx.Carry, axes),
        out_axes=(nnx.Carry, 0),
      )(X, Model())
    text = str(caught.exception)
    self.assertIn(place_of(branches_in_a_loop), text)
    self.assertIn("model.blocks[1].kernel", text)

  def test_in_loops(self):
    with self.assertRaises(jax.errors.TracerBoolConversionError) as caught:
      nnx.while_loop(lambda value: True, branches_in_a_body, (Model(), X))
    text = str(caught.exception)
    self.assertIn(place_of(branches_in_a_body), text)
    self.assertIn("value[0].blocks[1].kernel", text)

    def test(value):
      return bool(value[1].sum() > 0)

    with self.assertRaises(jax.errors.TracerBoolConversionError) as caught:
      nnx.while_loop(test, lambda value: value, (Model(), X))
    self.assertIn(place_of(test), str(caught.exception))
    self.assertIn("value[1]", str(caught.exception))

  @parameterized.parameters(False, True)
  def test_in_a_loop_over_a_range(self, traced):
    def body(i, value):
      return value[0], branches(*value) + i

    def loop(upper):
      nnx.fori_loop(0, upper, body, (Model(), X))

    with self.assertRaises(jax.errors.TracerBoolConversionError) as caught:
      (jax.jit(loop) if traced else loop)(2)
    self.assertIn(place_of(body), str(caught.exception))
    self.assertIn("value[0].blocks[1].kernel", str(caught.exception))

    def branches_on_index(i, value):
      return value if i > 1 else value

    with self.assertRaisesRegex(
      jax.errors.TracerBoolConversionError, "of the argument i"
    ):
      nnx.fori_loop(0, 2, branches_on_index, (Model(), X))

  def test_in_a_rule_of_a_derivative(self):
    function = nnx.custom_vjp(lambda model, x: x.sum())
    function.defvjp(
      lambda model, x: (branches(model, x).sum(), None), lambda _, g: g
    )
    with self.assertRaises(jax.errors.TracerBoolConversionError) as caught:
      jax.jit(lambda model: nnx.grad(function)(model, X))(Model())
    self.assertNotIn("leaves", str(caught.exception))
    self.assertNotIn("diff", str(caught.exception))

  def test_more_arguments_than_parameters_have_names(self):
    def function(*args, **options):
      return 1 if args[1].kernel.sum() > 0 else options["x"]

    with self.assertRaises(jax.errors.TracerBoolConversionError) as caught:
      nnx.jit(function)(X, Block(), x=X)
    self.assertIn("args[1].kernel", str(caught.exception))

  def test_an_array_that_does_not_fit_its_sharding_is_named(self):
    mesh = jax.make_mesh((1,), ("a",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P("a", None, None))
    with self.assertRaisesRegex(ValueError, r"model\.blocks\[0\]\.kernel"):
      nnx.jit(branches, in_shardings=(sharding, None))(Model(), X)

  def test_an_argument_that_cannot_be_traced_is_named(self):
    with self.assertRaisesRegex(
      TypeError, r"must be arrays, numbers or static, but `x` is 'abc'"
    ):
      nnx.jit(branches)(Model(), "abc")

  def test_a_result_that_is_no_array_names_the_function(self):
    def function(model):
      return object()

    with self.assertRaises(TypeError) as caught:
      nnx.jit(function)(Model())
    self.assertIn(place_of(function), str(caught.exception))

  def test_a_tracer_that_leaked_names_the_function(self):
    leaked = []

    def leak(model):
      leaked.append(model.blocks[0].kernel * 2)

    nnx.jit(leak)(Model())
    with self.assertRaises(jax.errors.UnexpectedTracerError) as caught:
      leaked[0] + 1
    self.assertIn(place_of(leak), str(caught.exception))

  def test_a_carry_that_changes_names_the_variable(self):
    def body(x, model):
      kernel = model.blocks[0].kernel
      kernel.value = kernel.value.astype(jnp.float16)
      return x, x

    with self.assertRaisesRegex(TypeError, r"args\[1\]\.blocks\[0\]\.kernel"):
      nnx.scan(
        body, length=2, in_axes=(nnx.Carry, None), out_axes=(nnx.Carry, 0)
      )(X, Model())

  def test_names_are_not_made_by_repeated_calls(self):
    def function(model):
      return model.blocks[0].kernel * 2

    jitted, model = nnx.jit(function), Model()
    jitted(model)
    with mock.patch.object(nnx.transforms.lift.Lifted, "root_names") as names:
      jitted(model)
    names.assert_not_called()


def with_integer():
  model = Model()
  model.blocks[0].kernel.value = jnp.ones((2, 3), int)
  return model


def unlike():
  model = Model()
  model.blocks[0].kernel.value = jnp.ones(2)
  return model


def no_array(model, x):
  return object()


def returns_x(model, x):
  return x


def zero(model, x):
  return 0.0


MESH = jax.sharding.AbstractMesh((2,), ("a",))

# Errors that jax raises outside of the user's function.
OUTSIDE = {
  "vmap": (lambda f: nnx.vmap(f, in_axes=(0, None))(Model(), X), no_array),
  "vmap_out_axes": (
    lambda f: nnx.vmap(f, in_axes=(0, None), out_axes=3)(Model(), X),
    returns_x,
  ),
  "grad": (lambda f: nnx.grad(f)(Model(), X), returns_x),
  "value_and_grad": (lambda f: nnx.value_and_grad(f)(Model(), X), no_array),
  "integers": (lambda f: nnx.grad(f)(with_integer(), X), zero),
  "vjp": (lambda f: nnx.vjp(f, Model(), X), no_array),
  "jvp": (
    lambda f: nnx.jvp(f, (Model(), X), (Model(), X.astype(jnp.float16))),
    returns_x,
  ),
  "scan": (
    lambda f: nnx.scan(f, in_axes=(None, 0), out_axes=0, length=3, unroll=-1)(
      Model(), X
    ),
    returns_x,
  ),
  "fori_loop": (
    lambda f: nnx.fori_loop(0, jnp.array(2.0), f, X),
    returns_x,
  ),
  "shard_map": (
    lambda f: jax.eval_shape(
      nnx.shard_map(
        f, mesh=MESH, in_specs=(None, jax.P("a")), out_specs=jax.P()
      ),
      Model(),
      X,
    ),
    returns_x,
  ),
}


def notes_of(error):
  return "\n".join(getattr(error, "__notes__", []))


class NotesTest(parameterized.TestCase):
  @parameterized.named_parameters((name, name) for name in OUTSIDE)
  def test_an_error_outside_of_the_function_names_it(self, name):
    run, function = OUTSIDE[name]
    with self.assertRaises((TypeError, ValueError)) as caught:
      run(function)
    self.assertIn(f"was given {place_of(function)}", notes_of(caught.exception))

  def test_an_error_inside_of_the_function_is_left_alone(self):
    def fails(model, x):
      raise ValueError("of the user")

    for transform in (nnx.grad, nnx.vmap, nnx.remat):
      with self.assertRaisesRegex(ValueError, "of the user") as caught:
        transform(fails)(Model(), X[:2])
      self.assertNotIn("was given", notes_of(caught.exception))

  def test_the_module_that_raised_is_named(self):
    class Tower(nnx.Module):
      def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = [nnx.Linear(3, 3, rngs=rngs) for _ in range(3)]
        self.layers[1] = nnx.Linear(4, 3, rngs=rngs)

      def __call__(self, x):
        for layer in self.layers:
          x = layer(x)
        return x

    def loss(tower, x):
      return nnx.remat(tower)(x).sum()

    for run in (
      nnx.jit(Tower()),
      functools.partial(nnx.jit(loss, donate_argnums=0), Tower()),
      functools.partial(nnx.jit(nnx.grad(loss)), Tower()),
      functools.partial(nnx.vmap(loss, in_axes=(None, 0)), Tower()),
    ):
      with self.assertRaises((TypeError, ValueError)) as caught:
        run(jnp.ones((2, 3)))
      notes = notes_of(caught.exception)
      self.assertIn("Raised in `layers[1]`, a Linear, of a `Tower`.", notes)
      self.assertEqual(notes.count("Raised in"), 1)

  def test_what_has_no_derivative_is_named(self):
    with self.assertRaises(TypeError) as caught:
      nnx.grad(zero)(with_integer(), X)
    self.assertIn(
      "`model.blocks[0].kernel` is to be differentiated and has the dtype int",
      notes_of(caught.exception),
    )
    self.assertNotIn("blocks[1]", notes_of(caught.exception))

  def test_a_tangent_that_does_not_fit_is_named(self):
    with self.assertRaises(ValueError) as caught:
      nnx.jvp(zero, (Model(), X), (unlike(), X))
    self.assertIn(
      "tangent of `model.blocks[0].kernel` must be float32[2,3], but is"
      " float32[2]",
      notes_of(caught.exception),
    )

  def test_a_cotangent_of_a_rule_that_does_not_fit_is_named(self):
    function = nnx.custom_vjp(lambda x, y: x.sum())

    def rule(_, g):
      return X, X[:2]

    function.defvjp(lambda x, y: (x.sum(), None), rule)
    with self.assertRaisesRegex(
      ValueError,
      r"cotangent of `y` must have its shape \(3,\), but `.*rule` returned one"
      r" of shape \(2,\)",
    ):
      nnx.grad(function)(X, X)

  def test_nothing_to_map_over(self):
    with self.assertRaisesRegex(
      ValueError, "an array to map over, but no argument of `returns_x`"
    ):
      nnx.vmap(returns_x, in_axes=None)(Model(), X)

  def test_an_array_that_does_not_fit_a_mesh_is_named(self):
    with self.assertRaises(ValueError) as caught:
      OUTSIDE["shard_map"][0](returns_x)
    self.assertIn("'returns_x'", str(caught.exception))
    self.assertIn("`args[0][2]` is `x`", notes_of(caught.exception))


class LinesTest(absltest.TestCase):
  def test_what_is_computed_is_computed_on_the_users_line(self):
    def function(model):
      return model.blocks[0].kernel * 2

    line = function.__code__.co_firstlineno + 1
    for transform in (nnx.jit, nnx.remat, jax.jit):
      text = (
        jax.jit(transform(function)).lower(Model()).as_text(debug_info=True)
      )
      self.assertIn(f'names_in_errors_test.py":{line}', text)
      self.assertNotIn(os.path.dirname(nnx.__file__) + os.sep, text)


class OriginTest(absltest.TestCase):
  def test_what_jax_makes_for_the_user_was_made_on_the_users_line(self):
    param = jax.tree.map(nnx.Param, [jnp.ones(2)])[0]
    line = inspect.currentframe().f_lineno - 1
    self.assertEqual(param._origin, (__file__, line))

    @jax.jit
    def write():
      param.value = jnp.zeros(2)

    with self.assertRaises(nnx.TraceContextError) as caught:
      write()
    self.assertIn(
      f'It was made at "{__file__}", line {line}.', str(caught.exception)
    )

  def test_inside_of_transforms_of_jax(self):
    made = []

    def make(x):
      made.append(nnx.Param(x))
      return x

    line = make.__code__.co_firstlineno + 1
    jax.jit(make)(X)
    jax.vmap(make)(X)
    for param in made:
      self.assertEqual(param._origin, (__file__, line))


if __name__ == "__main__":
  absltest.main()
