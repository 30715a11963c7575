"""nnx.grad, value_and_grad, vjp and jvp."""

import functools

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.transforms import both

X = jnp.arange(3.0)


class SameAsFlaxTest(parameterized.TestCase):
  def test_params_of_a_module_and_state_written(self):
    def program(lib):
      model = both.models(lib).Dense()
      grads = lib.grad(lambda model, x: model(x).sum())(model, X)
      return grads, model

    both.same(program)

  def test_the_gradient_of_a_shared_variable_is_where_it_is_first(self):
    def program(lib):
      p, q = lib.Param(jnp.array(10.0)), lib.Param(jnp.array(20.0))
      f = lib.grad(lambda m: m["a"][0] + m["a"][1] * m["b"])
      grads = f({"a": [p, q], "b": p})
      both_grads = lib.grad(lambda a, b: a * b, argnums=(0, 1))(p, p)
      return [
        grads["a"][0][...],
        grads["a"][1][...],
        isinstance(grads["b"], lib.State),
        len(jax.tree.leaves(grads)),
        both_grads[0][...],
        len(jax.tree.leaves(both_grads)),
      ]

    both.same(program)

  def test_value_and_grad_with_aux(self):
    def program(lib):
      model = both.models(lib).Dense()

      @lib.value_and_grad(has_aux=True)
      def loss(model, x):
        y = model(x)
        return y.sum(), {"y": y, "twice": 2 * y}

      return loss(model, X), model

    both.same(program)

  def test_grad_with_aux(self):
    def program(lib):
      model = both.models(lib).Dense()

      def loss(model, x):
        return (model(x).sum(), x)

      return lib.grad(loss, has_aux=True)(model, X), model

    both.same(program)

  def test_shared_references(self):
    def program(lib):
      model = both.models(lib).Tied()
      grads = lib.grad(lambda model, x: model(x).sum())(model, X)
      assert model.again is model.first
      assert model.second.bias is model.first.bias
      return grads, model

    both.same(program)

  @parameterized.named_parameters(
    ("type", lambda lib: lib.BatchStat),
    ("path", lambda lib: lib.PathContains("kernel")),
    ("several", lambda lib: (lib.BatchStat, lib.PathContains("bias"))),
    ("predicate", lambda lib: lambda path, v: path == ("first", "kernel")),
  )
  def test_diff_state(self, make_filter):
    def program(lib):
      model = both.models(lib).Tied()
      argnums = lib.DiffState(1, make_filter(lib))

      @lib.grad(argnums=argnums)
      def loss(x, model):
        return (model(x) * model.first.mean[...]).sum()

      return loss(X, model), model

    both.same(program)

  def test_several_argnums(self):
    def program(lib):
      one, two = both.models(lib).Dense(), both.models(lib).Dense(seed=5)
      argnums = (0, lib.DiffState(2, lib.PathContains("bias")), 1)

      def loss(one, x, two):
        return (one(x) * two(x)).sum()

      return lib.grad(loss, argnums=argnums)(one, X, two), one, two

    both.same(program)

  def test_containers_variables_and_states_as_arguments(self):
    def program(lib):
      model = both.models(lib).Dense()
      extra = {"v": lib.BatchStat(X), "a": X, "m": model}
      state = lib.State({"p": lib.Param(X), "q": {"r": lib.Variable(2 * X)}})

      def loss(extra, state):
        y = extra["m"](extra["a"] * extra["v"][...])
        return (y * state["p"][...] * state["q"]["r"][...]).sum()

      return lib.grad(loss, argnums=(0, 1))(extra, state), model

    both.same(program)

  def test_keyword_arguments(self):
    def program(lib):
      model = both.models(lib).Dense()

      def loss(model, x, scale=1.0):
        return (model(x) * scale).sum()

      return lib.grad(loss)(model, scale=3.0, x=X)

    both.same(program)

  def test_modules_as_gradients_in_tree_mode(self):
    def program(lib):
      class Line(lib.Module):
        def __init__(self):
          self.a, self.b = lib.Param(X), lib.Variable(X + 1)

      model = Line()

      def loss(m):
        return (m.a[...] * m.b[...]).sum()

      grads = lib.grad(loss, graph=False)(model)
      again = lib.grad(loss, graph_updates=False)(model)
      assert isinstance(grads, Line) and isinstance(again, Line)
      return lib.state(grads), lib.state(again)

    both.same(program)

  def test_holomorphic_and_allow_int(self):
    def program(lib):
      p = lib.Param(X.astype("complex64"))
      holomorphic = lib.grad(lambda p: (p[...] ** 2).sum(), holomorphic=True)(p)
      ints = lib.grad(
        lambda p, n: (p[...] * n).sum(), argnums=1, allow_int=True
      )(lib.Param(X), jnp.arange(3))
      return holomorphic, ints.dtype == jax.dtypes.float0

    both.same(program)

  def test_nested_grads_that_write_at_both_levels(self):
    def program(lib):
      model = both.models(lib).Dense()

      def outer(model, x):
        inner = lib.grad(lambda model, x: (model(x) ** 2).sum(), argnums=1)
        return (inner(model, x) * model(x)).sum()

      return lib.grad(outer, argnums=(0, 1))(model, X), model

    both.same(program)

  def test_vjp(self):
    def program(lib):
      model = lib.clone(both.models(lib).Dense())
      del model.calls

      def f(model, x):
        return jnp.tanh(x @ model.kernel[...] + model.bias[...])

      y, pull_back = lib.vjp(f, model, X, graph=False)
      return y, pull_back(jnp.ones_like(y))

    both.same(program)

  def test_vjp_with_aux_that_writes(self):
    def program(lib):
      v = lib.Param(X)

      @lib.vjp(has_aux=True, graph=False)
      def f(v, x):
        v[...] = v[...] * 2
        return {"a": v[...] * x}, x + 1

      y, pull_back, aux = f(v, 2 * X)
      return y, pull_back({"a": jnp.ones(3)}), aux, v

    both.same(program)

  def test_jvp(self):
    def program(lib):
      model = both.models(lib).Dense()
      del model.calls

      def f(model, x):
        return jnp.tanh(x @ model.kernel[...] + model.bias[...])

      tangent = jax.tree.map(jnp.ones_like, model)
      return lib.jvp(f, (model, X), (tangent, 2 * X), graph=False)

    both.same(program)

  def test_jvp_with_aux_that_writes(self):
    def program(lib):
      v = lib.Param(X)

      @lib.jvp(has_aux=True, graph=False)
      def f(v, x):
        v[...] = v[...] * 2
        return v[...] * x, x + 1

      return f((v, 2 * X), (lib.Param(X), X)), v

    both.same(program)


class SeenOutsideTest(parameterized.TestCase):
  def test_new_state_modules_and_static_attributes_appear(self):
    model = both.models(nnx).Dense()

    def loss(model, x):
      model.size = 7
      model.seen = nnx.Intermediate(x)
      model.inner = both.models(nnx).Dense()
      model.alias = model.kernel
      del model.mean
      return (x @ model.kernel).sum()

    nnx.grad(loss)(model, X)
    self.assertEqual(model.size, 7)
    self.assertIs(model.alias, model.kernel)
    self.assertFalse(hasattr(model, "mean"))
    np.testing.assert_array_equal(model.seen.value, X)
    self.assertIsInstance(model.inner.kernel.value, jax.Array)

  def test_an_exception_leaves_the_arguments_as_they_were(self):
    model = both.models(nnx).Dense()
    before = nnx.to_pure_dict(nnx.state(model))

    def loss(model, x):
      model(x)
      raise RuntimeError("stop")

    with self.assertRaisesRegex(RuntimeError, "stop"):
      nnx.grad(loss)(model, X)
    both.assert_same(nnx.to_pure_dict(nnx.state(model)), before)

  def test_vjp_and_jvp_handle_modules_with_ints_and_shared_references(self):
    model = both.models(nnx).Tied()
    y, pull_back = nnx.vjp(lambda model, x: model(x), model, X)
    model_grad, x_grad = pull_back(jnp.ones(3))
    expected = nnx.grad(lambda model, x: model(x).sum(), argnums=(0, 1))(
      both.models(nnx).Tied(), X
    )
    self.assertIs(model_grad.again, model_grad.first)
    both.assert_same(
      nnx.to_pure_dict(nnx.state(model_grad, nnx.Param)),
      nnx.to_pure_dict(expected[0]),
    )
    np.testing.assert_allclose(x_grad, expected[1], rtol=1e-6)
    self.assertEqual(model.first.calls.value, 2)
    self.assertEqual(y.shape, (3,))

  def test_vjp_of_a_module_as_the_output(self):
    model = both.models(nnx).Dense()
    del model.calls

    def f(model, x):
      model.bias[...] = model.bias * x
      return model

    out, pull_back = nnx.vjp(f, model, X)
    self.assertIs(out, model)
    _, x_grad = pull_back(jax.tree.map(jnp.ones_like, model))
    np.testing.assert_allclose(x_grad, np.linspace(0, 1, 3))

  def test_methods_and_partial(self):
    class Model(nnx.Module):
      def __init__(self):
        self.w = nnx.Param(X)

      @nnx.grad
      def slope(self, x):
        return (self.w * x).sum()

      @functools.partial(nnx.value_and_grad, has_aux=True)
      def both(self, x, *, scale):
        return (self.w * x).sum() * scale, "note"

    model = Model()
    np.testing.assert_array_equal(model.slope(2 * X).w.value, 2 * X)
    (loss, note), grads = model.both(X, scale=2.0)
    self.assertEqual((float(loss), note), (10.0, "note"))
    np.testing.assert_array_equal(grads.w.value, 2 * X)
    partial = functools.partial(lambda scale, m: (m.w * scale).sum(), 3.0)
    np.testing.assert_array_equal(nnx.grad(partial)(model).w.value, [3, 3, 3])

  def test_arguments_that_are_no_arrays(self):
    p = nnx.Param(X)
    grads = nnx.grad(lambda p, f, name: f(p.value).sum() * len(name))(
      p, jnp.sin, "ab"
    )
    np.testing.assert_allclose(grads.value, 2 * jnp.cos(X))

  def test_state_that_is_only_read_is_no_output(self):
    model = both.models(nnx).Dense()
    text = str(
      jax.make_jaxpr(
        lambda k: nnx.value_and_grad(lambda model: (X @ model.kernel).sum())(
          model
        )[0]
      )(0.0)
    )
    self.assertNotIn("copy", text)

  def test_variables_that_hold_pytrees(self):
    v = nnx.Param({"a": X, "b": (X, X + 1)})
    grads = nnx.grad(lambda v: (v.value["a"] * v.value["b"][1]).sum())(v)
    np.testing.assert_array_equal(grads.value["a"], X + 1)
    np.testing.assert_array_equal(grads.value["b"][0], 0 * X)


class ErrorTest(parameterized.TestCase):
  def error(self, kind, function, *args, **kwargs):
    with self.assertRaises(kind) as caught:
      function(*args, **kwargs)
    return str(caught.exception)

  def test_a_variable_that_is_differentiated_and_is_not(self):
    model = both.models(nnx).Tied()
    text = self.error(
      ValueError,
      nnx.grad(lambda a, b: a.bias.sum(), argnums=1),
      model.first,
      model,
    )
    self.assertEqual(
      text,
      "`argnums` must give a shared node one entry, but the Param at"
      " `args[0].bias` and `args[1].again.bias` has both False and True.",
    )

  def test_argnums_out_of_range_or_twice_or_no_int(self):
    def f(a, b):
      return a * b

    self.assertEqual(
      self.error(ValueError, nnx.grad(f, argnums=2), 1.0, 2.0),
      "`argnums` must name positional arguments, of which there are 2 in this"
      " call, but got 2.",
    )
    self.assertEqual(
      self.error(ValueError, nnx.grad(f, argnums=(0, -2)), 1.0, 2.0),
      "`argnums` must name an argument once, but names argument 0 twice.",
    )
    self.assertEqual(
      self.error(TypeError, lambda: nnx.grad(f, argnums=nnx.Param)),
      "`argnums` must be an int, an `nnx.DiffState` or several, but got `<class"
      " 'nnx.variablelib.Param'>` of type `type`. To differentiate by what a"
      " filter selects, pass `nnx.DiffState(0, filter)`.",
    )

  @parameterized.parameters(
    ("a",), (["a"],), (0.5,), ((0, 0.5),), (True,), ((None,),)
  )
  def test_argnums_that_are_none_are_refused_at_once(self, argnums):
    for transform in (nnx.grad, nnx.value_and_grad):
      with self.assertRaisesRegex(TypeError, "`argnums` must be an int, an"):
        transform(lambda a, b: a * b, argnums=argnums)
    with self.assertRaisesRegex(TypeError, "`nondiff_argnums` must be an int"):
      nnx.custom_vjp(lambda a, b: a * b, nondiff_argnums=argnums)

  def test_an_object_as_argnums(self):
    with self.assertRaisesRegex(TypeError, "of type `List`"):
      nnx.grad(lambda a, b: a * b, argnums=nnx.List([0, 1]))

  def test_argnums_of_numpy(self):
    def f(a, b):
      return a * b

    self.assertEqual(nnx.grad(f, argnums=np.int64(1))(2.0, 3.0), 2.0)

  def test_aux_that_is_missing(self):
    text = self.error(TypeError, nnx.grad(jnp.sin, has_aux=True), 1.0)
    self.assertStartsWith(
      text,
      "With `has_aux=True`, `sin` must return a pair of the output and"
      " auxiliary data, but got",
    )

  @parameterized.parameters("grad", "value_and_grad", "vjp", "jvp")
  def test_what_is_no_function(self, name):
    transform = getattr(nnx, name)
    self.assertEqual(
      self.error(TypeError, transform, 3),
      f"`nnx.{name}` must be given a function, but got `3` of type `int`.",
    )

  @parameterized.parameters("grad", "value_and_grad", "vjp")
  def test_reduce_axes(self, name):
    text = (
      self.error(
        NotImplementedError,
        getattr(nnx, name),
        jnp.sin,
        1.0,
        reduce_axes=("a",),
      )
      if name == "vjp"
      else self.error(
        NotImplementedError, getattr(nnx, name), jnp.sin, reduce_axes=("a",)
      )
    )
    self.assertEqual(
      text,
      "`reduce_axes` must be empty, since jax no longer has it, but got"
      " `('a',)`. Use `jax.lax.psum` inside of the function.",
    )

  def test_diff_state_in_tree_mode(self):
    text = self.error(
      ValueError,
      nnx.grad,
      jnp.sin,
      argnums=nnx.DiffState(0, nnx.Param),
      graph=False,
    )
    self.assertStartsWith(
      text,
      "With `graph=False` or `graph_updates=False` the derivative of a Module"
      " is"
      " a whole Module, but got",
    )

  def test_tangents_and_cotangents_of_another_form(self):
    self.assertEqual(
      self.error(ValueError, nnx.jvp, jnp.sin, (1.0,), ((1.0, 2.0),)),
      "`tangents` must have the form of `primals`, which has 1 items with 1"
      " leaves, but got 1 items with 2 leaves.",
    )
    self.assertEqual(
      self.error(TypeError, nnx.jvp, jnp.sin, 1.0, (1.0,)),
      "`primals` must be a tuple or list with one item for each argument, but"
      " got a `float`.",
    )
    _, pull_back = nnx.vjp(jnp.sin, 1.0)
    self.assertEqual(
      self.error(ValueError, pull_back, (1.0, 2.0)),
      "The cotangent must have the form of the output, which has 1 leaves, but"
      " got one that has 2: `(1.0, 2.0)`.",
    )

  def test_a_module_from_outside_is_refused_with_path_origin_and_fix(self):
    model = both.models(nnx).Tied()

    def loss(x):
      return model.second(x).sum()

    text = self.error(nnx.TraceContextError, nnx.grad(loss), X)
    self.assertIn(
      "Cannot change `BatchStat` from a different trace level", text
    )
    self.assertIn("`second.mean` of a `Tied`", text)
    self.assertIn("both.py", text)
    self.assertIn("as an argument", text)

  def test_a_copy_from_an_outer_grad_knows_where_it_was_made(self):
    model = both.models(nnx).Dense()

    def outer(model, x):
      return nnx.grad(lambda x: model(x).sum())(x).sum()

    text = self.error(nnx.TraceContextError, nnx.grad(outer), model, X)
    self.assertIn("both.py", text)


if __name__ == "__main__":
  absltest.main()
