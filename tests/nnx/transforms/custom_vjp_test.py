"""nnx.custom_vjp in both of its forms."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.transforms import both


def make_foo(lib):
  class Foo(lib.Module):
    def __init__(self, x, y):
      self.x = lib.Param(jnp.array(x))
      self.y = lib.Param(jnp.array(y))
      self.z = lib.BatchStat(jnp.array(0.0))

  return Foo


class SameAsFlaxTest(parameterized.TestCase):
  def test_states_stand_for_modules(self):
    def program(lib):
      @lib.custom_vjp(graph_updates=True)
      def f(m):
        m.z[...] += 1.0
        return jnp.sin(m.x[...]) * m.y[...]

      def fwd(m):
        return f(m), (jnp.cos(m.x[...]), jnp.sin(m.x[...]), m)

      def bwd(res, g):
        (m_g,), out_g = g
        cos_x, sin_x, m = res
        m_g = jax.tree.map(lambda x: x, m_g)
        m_g["x"][...] = 2 * cos_x * out_g * m.y[...]
        m_g["y"][...] = sin_x * out_g
        return (m_g,)

      f.defvjp(fwd, bwd)
      m = make_foo(lib)(1.0, 2.0)
      value = f(m)
      grads = lib.grad(f, argnums=lib.DiffState(0, ...))(m)
      return value, grads["x"], grads["y"], m

    both.same(program)

  def test_diff_state_selects_what_has_a_derivative(self):
    def program(lib):
      only_x = lib.DiffState(0, lib.PathContains("x"))

      @lib.custom_vjp(nondiff_argnums=(only_x,), graph_updates=True)
      def f(m):
        return jnp.sin(m.x[...]) * m.y[...]

      def fwd(m):
        return f(m), (jnp.cos(m.x[...]), m)

      def bwd(res, g):
        (m_g,), out_g = g
        cos_x, m = res
        m_g = jax.tree.map(lambda x: x, m_g)
        m_g["x"][...] = cos_x * out_g * m.y[...]
        del m_g["y"]
        del m_g["z"]
        return (m_g,)

      f.defvjp(fwd, bwd)
      return lib.grad(f, argnums=only_x)(make_foo(lib)(1.0, 2.0))

    both.same(program)

  def test_modules_stand_for_modules(self):
    def program(lib):
      @lib.custom_vjp(graph_updates=False)
      def f(m, x):
        m.z[...] = m.z[...] + 2.0 * m.x[...]
        return jnp.sin(m.x[...]) * m.y[...] * x

      def fwd(m, x):
        return f(m, x), (jnp.cos(m.x[...]), m, x)

      def bwd(res, g, *, updates_g):
        cos_x, m, x = res
        m_updates, x_updates = updates_g
        assert x_updates is None and m_updates.x is None
        m_g = lib.clone(m)
        m_g.x[...] = 3 * cos_x * g * m.y[...] * x + m_updates.z[...]
        m_g.y[...] = g * x
        return m_g, g

      f.defvjp(fwd, bwd)
      m = make_foo(lib)(1.0, 2.0)

      def loss(m, x):
        return f(m, x) + 5.0 * m.z[...]

      grads = lib.grad(loss, argnums=(0, 1), graph_updates=False)(m, 4.0)
      return lib.state(grads[0]), grads[1], m

    both.same(program)

  def test_arguments_without_a_derivative(self):
    def program(lib):
      def f(scale, x, name):
        return x * scale

      f = lib.custom_vjp(f, nondiff_argnums=(0, 2))
      f.defvjp(
        lambda scale, x, name: (f(scale, x, name), x),
        lambda scale, name, x, g: ((g[1] * 10 * len(name) * scale,)),
      )
      return f(2.0, 3.0, "ab"), lib.grad(lambda x: f(2.0, x, "ab"))(3.0)

    both.same(program)

  def test_variables_and_arrays_as_arguments(self):
    def program(lib):
      @lib.custom_vjp
      def f(v, x):
        return v[...] * x

      f.defvjp(
        lambda v, x: (f(v, x), (v, x)),
        lambda res, g: (
          jax.tree.map(lambda a: 7 * g[1] * res[1] + 0 * a, g[0][0]),
          g[1] * res[0][...],
        ),
      )
      v = lib.Param(jnp.array(2.0))
      return lib.grad(lambda v, x: f(v, x), argnums=(0, 1))(v, 3.0)

    both.same(program)


class RuleTest(parameterized.TestCase):
  def make(self, **options):
    @nnx.custom_vjp(**options)
    def f(m, x):
      m.z[...] += x
      return m.x * x

    def fwd(m, x):
      return f(m, x), (m, x)

    def bwd(res, g):
      m, x = res
      (m_g, _), out_g = g
      return nnx.State({"x": 5 * out_g * x, "y": 0.0, "z": 0.0}), out_g * m.x

    f.defvjp(fwd, bwd)
    return f

  @parameterized.parameters(False, True)
  def test_under_other_transforms(self, compiled):
    f = self.make()
    m = make_foo(nnx)(2.0, 1.0)
    run = nnx.grad(f, argnums=(0, 1))
    if compiled:
      run = nnx.jit(run)
    m_g, x_g = run(m, 3.0)
    self.assertEqual((float(m_g.x.value), float(x_g)), (15.0, 2.0))
    self.assertEqual(float(m.z.value), 3.0)
    pure = nnx.clone(m)

    @nnx.vmap(in_axes=0)
    def many(x):
      copy = nnx.clone(pure)
      return nnx.grad(f, argnums=1)(copy, x), copy.z.value

    slopes, z = many(jnp.arange(3.0))
    np.testing.assert_array_equal(slopes, [2.0, 2.0, 2.0])
    np.testing.assert_array_equal(z, [3.0, 4.0, 5.0])

  def test_inside_of_jit_then_grad(self):
    f = self.make()
    m = make_foo(nnx)(2.0, 1.0)
    m_g = nnx.grad(nnx.jit(f))(m, 3.0)
    self.assertEqual(float(m_g.x.value), 15.0)
    self.assertEqual(float(m.z.value), 3.0)

  def test_symbolic_zeros(self):
    seen = []

    @nnx.custom_vjp(graph_updates=False)
    def f(x, y):
      return x * y

    def fwd(x, y):
      seen.append((x.perturbed, y.perturbed))
      return x.value * y.value, (x.value, y.value)

    f.defvjp(fwd, lambda res, g: (g * res[1], g * res[0]), symbolic_zeros=True)
    self.assertEqual(float(nnx.grad(lambda x: f(x, 3.0))(2.0)), 3.0)
    self.assertEqual(seen, [(True, False)])

  def test_method(self):
    class Model(nnx.Module):
      def __init__(self):
        self.w = nnx.Param(jnp.array(2.0))

      @nnx.custom_vjp
      def scale(self, x):
        return self.w * x

    Model.scale.defvjp(
      lambda self, x: (self.w * x, x),
      lambda x, g: (nnx.State({"w": 9 * g[1] * x}), g[1]),
    )
    model = Model()
    self.assertEqual(float(model.scale(3.0)), 6.0)
    grads = nnx.grad(lambda m: m.scale(3.0))(model)
    self.assertEqual(float(grads.w.value), 27.0)

  def error(self, kind, function, *args, **kwargs):
    with self.assertRaises(kind) as caught:
      function(*args, **kwargs)
    return str(caught.exception)

  def test_errors(self):
    f = nnx.custom_vjp(lambda x: x)
    self.assertEndsWith(
      self.error(ValueError, f, 1.0),
      "must be given its derivative before it is called. Call `defvjp(fwd,"
      " bwd)`.",
    )
    f.defvjp(lambda x: x, lambda res, g: (g,))
    self.assertIn(
      "must return a pair of the result and a residual, but got a `",
      self.error(TypeError, nnx.grad(f), 1.0),
    )
    f.defvjp(lambda x: (x, ()), lambda res, g: g[1])
    self.assertIn(
      "must return a tuple of 1, one cotangent for each argument that has one,"
      " but it returned a",
      self.error(TypeError, nnx.grad(f), 1.0),
    )
    f.defvjp(lambda x: (x, ()), lambda res, g: ((g[1], g[1]),))
    self.assertIn(
      "The cotangent of `args[0]` must have the form of it, with 1 leaves, but",
      self.error(ValueError, nnx.grad(f), 1.0),
    )
    self.assertEqual(
      self.error(ValueError, nnx.custom_vjp, jnp.sin, nondiff_argnums=(0, 0)),
      "`nondiff_argnums` must name an argument once, but got 0 twice.",
    )
    self.assertStartsWith(
      self.error(
        ValueError,
        nnx.custom_vjp,
        jnp.sin,
        nondiff_argnums=(nnx.DiffState(0, ...),),
        graph=False,
      ),
      "With `graph=False` or `graph_updates=False` the derivative of a Module",
    )

    @nnx.custom_vjp
    def g(m):
      return m.x.value

    g.defvjp(lambda m: (m.x.value, ()), lambda res, g: (nnx.State({}),))
    self.assertIn(
      "must have everything that is differentiated, but the one that",
      self.error(ValueError, nnx.grad(g), make_foo(nnx)(1.0, 2.0)),
    )
    keyword = nnx.custom_vjp(lambda x, *, n: x)
    keyword.defvjp(lambda x: (x, ()), lambda res, g: (g[1],))
    self.assertEqual(
      self.error(TypeError, keyword, 1.0, n=2),
      "The arguments of a function with a custom derivative must be positional,"
      " but ['n'] are not.",
    )


if __name__ == "__main__":
  absltest.main()
