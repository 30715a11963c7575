"""nnx.vmap, pmap, StateAxes and transform_metadata."""

import functools

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.transforms import both

X = jnp.arange(12.0).reshape(4, 3)


def stack_axes(lib):
  return lib.StateAxes({(lib.Param, lib.BatchStat): 0, ...: None})


class SameAsFlaxTest(parameterized.TestCase):
  def test_overridden_add_axis_runs(self):
    def program(lib):
      calls = []

      class Named(lib.Param):
        def add_axis(self, axis_index, axis_name):
          calls.append(("add", axis_index, axis_name))
          super().add_axis(axis_index, axis_name)

        def remove_axis(self, axis_index, axis_name):
          calls.append(("remove", axis_index, axis_name))
          super().remove_axis(axis_index, axis_name)

      metadata = {lib.PARTITION_NAME: "layers"}
      kwargs = {"transform_metadata": metadata}
      v = lib.vmap(lambda _: Named(X, eager_sharding=False), **kwargs)(X)
      lib.vmap(lambda v: v[...] * 2, **kwargs)(v)
      return calls

    self.assertEqual(program(nnx), program(flax_nnx))

  def test_metadata_of_a_scan(self):
    def program(lib):
      v = lib.Param(X, out_sharding=("layers", "embed"), eager_sharding=False)
      seen = []

      @lib.scan(in_axes=(0, lib.Carry), out_axes=lib.Carry)
      @lib.transform_metadata(
        in_axes=(0, lib.Carry), out_axes=lib.Carry, partition="layers"
      )
      def f(v, total):
        seen.append(v.out_sharding)
        return total + v[...].sum()

      return f(v, 0.0), v, [str(names) for names in seen[-1]]

    both.same(program)

  def test_state_axes(self):
    def program(lib):
      stack = both.models(lib).Stack()

      @lib.vmap(in_axes=(stack_axes(lib), 0), out_axes=1)
      def f(stack, x):
        return stack(x)

      return f(stack, X), stack

    both.same(program)

  def test_axes_other_than_the_first(self):
    def program(lib):
      v = lib.Param(jnp.arange(24.0).reshape(2, 3, 4))

      @lib.vmap(in_axes=(2, -1), out_axes=(-1, 0))
      def f(v, x):
        v[...] = v[...] * x
        return v[...], {"x": x}

      return f(v, X.T), v

    both.same(program)

  def test_prefixes(self):
    def program(lib):
      v, w = lib.Param(X), lib.Param(X[0])

      @lib.vmap(in_axes=({"v": 0, "w": None}, (0, None)), out_axes=(0, (1, 0)))
      def f(params, xs):
        x, scale = xs
        return params["v"][...] * params["w"][...], (x * scale, x.sum())

      return f({"v": v, "w": w}, (X, 2.0))

    both.same(program)

  def test_models_made_inside(self):
    def program(lib):
      @lib.vmap(in_axes=0, out_axes=0)
      def make(key):
        model = both.models(lib).Dense()
        model.kernel[...] = jax.random.normal(key, (3, 3))
        return model

      stack = make(jax.random.split(jax.random.key(1), 4))
      run = lib.vmap(lambda model, x: model(x))
      return run(stack, X), stack

    both.same(program)

  def test_new_state_gets_the_axis_of_its_module(self):
    def program(lib):
      stack = both.models(lib).Stack()
      axes = lib.StateAxes(
        {lib.Intermediate: 1, (lib.Param, lib.BatchStat): 0, ...: None}
      )

      @lib.vmap(in_axes=(axes, 0))
      def f(stack, x):
        stack.seen = lib.Intermediate(2 * x)
        return stack(x)

      return f(stack, X), stack

    both.same(program)

  @parameterized.parameters(True, False)
  def test_split_rngs(self, split):
    def program(lib):
      rngs = lib.Rngs(params=0, dropout=1)
      axes = 0 if split else None

      def f(rngs, x):
        return jax.random.normal(rngs.params(), x.shape) + x

      f = lib.vmap(f, in_axes=(axes, 0))
      if split:
        f = lib.split_rngs(splits=4)(f)
      out = f(rngs, X)
      return out, rngs.params.count[...], rngs.dropout.count[...]

    both.same(program)

  def test_split_rngs_of_some_streams(self):
    def program(lib):
      rngs = lib.Rngs(params=0, dropout=1)
      axes = lib.StateAxes({"dropout": 0, ...: None})

      @lib.split_rngs(splits=4, only="dropout")
      @lib.vmap(in_axes=(axes, 0))
      def f(rngs, x):
        noise = jax.random.normal(rngs.dropout(), x.shape)
        return noise + jax.random.normal(rngs.params(), x.shape) + x

      return f(rngs, X), f(rngs, X), rngs.params.count[...]

    both.same(program)

  def test_collectives_and_axis_size(self):
    def program(lib):
      v = lib.Variable(jnp.array(0.0))

      @lib.vmap(in_axes=(None, 0), axis_name="i")
      def f(v, x):
        v[...] = jax.lax.psum(x, "i").sum()
        return x - jax.lax.pmean(x, "i")

      sized = lib.vmap(lambda v: v[...] + 1, in_axes=None, axis_size=3)
      return f(v, X), v, sized(v)

    both.same(program)

  def test_shared_references(self):
    def program(lib):
      tied = both.models(lib).Tied()

      @lib.vmap(in_axes=(None, None, 0), out_axes=0)
      def f(tied, first, x):
        assert tied.first is first and tied.again is first
        return first.bias[...] * x

      return f(tied, tied.first, X)

    both.same(program)

  def test_defaults_and_keywords_fill_positions(self):
    def program(lib):
      def f(v, x, scale=2.0):
        return v[...] * x * scale

      f = lib.vmap(f, in_axes=(None, 0, None))
      v = lib.Param(X[0])
      return f(v, X), f(v, x=X), f(v, scale=3.0, x=X)

    both.same(program)

  def test_transform_metadata_option(self):
    def program(lib):
      seen = []

      class Layer(lib.Module):
        def __init__(self):
          self.w = lib.Param(
            jnp.ones(3),
            sharding_names=("embed",) if lib is nnx else None,
            out_sharding=("embed",),
            on_add_axis=lambda v, i, name: seen.append(("add", i, name)),
            on_remove_axis=lambda v, i, name: seen.append(("remove", i, name)),
          )

      options = {"transform_metadata": {lib.PARTITION_NAME: "layers"}}

      @lib.vmap(in_axes=0, out_axes=0, **options)
      def make(x):
        return Layer()

      layers = make(X)
      inside = []

      @lib.vmap(in_axes=0, **options)
      def f(layers):
        inside.append(layers.w.out_sharding)
        return layers.w[...]

      f(layers)
      return layers.w.out_sharding, tuple(inside), tuple(map(tuple, seen))

    def ours(lib):
      return program(lib)

    out, inside, seen = ours(nnx)
    self.assertEqual(out, ("layers", "embed"))
    self.assertEqual(inside, (("embed",),))
    self.assertEqual(
      seen,
      (("add", 0, "layers"), ("remove", 0, "layers"), ("add", 0, "layers")),
    )

  def test_transform_metadata_decorator(self):
    def program(lib):
      p = lib.Param(X, out_sharding=(None, "layers"), eager_sharding=False)
      inside = []

      @functools.partial(jax.vmap, in_axes=1, out_axes=1)
      def f(x):
        return x

      @lib.transform_metadata(in_axes=1, out_axes=0, partition="layers")
      def g(p):
        inside.append(tuple(p.out_sharding))
        return lib.Param(p[...], out_sharding=("b",), eager_sharding=False)

      q = g(p)
      return tuple(p.out_sharding), tuple(q.out_sharding), inside, f(p[...])

    both.same(program)

  def test_pmap(self):
    def program(lib):
      stack = both.models(lib).Stack()

      @lib.pmap(in_axes=(stack_axes(lib), 0), axis_name="i")
      def f(stack, x):
        return stack(x) + jax.lax.psum(x, "i")

      first = f(stack, X)
      return first, f(stack, X), stack

    both.same(program)

  def test_pmap_options(self):
    def program(lib):
      f = lib.pmap(
        lambda v, power: v[...] ** power,
        in_axes=(0, None),
        out_axes=0,
        static_broadcasted_argnums=1,
        devices=jax.devices()[:4],
      )
      v = lib.Param(X)
      return f(v, 2), f(v, 3)

    ours = program(nnx)
    np.testing.assert_allclose(ours[0], X**2)
    np.testing.assert_allclose(ours[1], X**3)


class SeenOutsideTest(parameterized.TestCase):
  def test_variables_that_are_not_mapped_and_not_written_may_be_anything(self):
    calls = []
    f = nnx.vmap(
      lambda name, v, x: calls.append(name) or x, in_axes=(None, None, 0)
    )
    f("name", nnx.Variable("static"), X)
    self.assertEqual(calls, ["name"])

  def test_nested_vmaps_of_state(self):
    v = nnx.Param(jnp.arange(24.0).reshape(2, 3, 4))
    total = nnx.Variable(jnp.zeros(()))

    @nnx.vmap(in_axes=(1, None), out_axes=1)
    def outer(v, total):
      @nnx.vmap(in_axes=(0, None))
      def inner(v, total):
        v[...] = v * 2
        total[...] = total + 1
        return v.sum()

      return inner(v, total)

    y = outer(v, total)
    expected = 2 * np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(v.value, expected)
    np.testing.assert_array_equal(y, expected.sum(2))
    self.assertEqual(float(total.value), 1.0)

  def test_methods_and_decorators_with_options(self):
    class Model(nnx.Module):
      def __init__(self):
        self.w = nnx.Param(X)

      @nnx.vmap(in_axes=(0, None))
      def scale(self, by):
        self.w[...] = self.w * by
        return self.w.sum()

    model = Model()
    np.testing.assert_array_equal(model.scale(2.0), 2 * X.sum(1))
    np.testing.assert_array_equal(model.w.value, 2 * X)

  def test_a_moved_variable_keeps_its_axis(self):
    class Model(nnx.Module):
      def __init__(self):
        self.a, self.b = nnx.Param(X), nnx.Param(X.T)

    axes = nnx.StateAxes({nnx.PathContains("a"): 0, nnx.PathContains("b"): 1})
    model = Model()
    a, b = model.a, model.b

    @nnx.vmap(in_axes=(axes,))
    def swap(model):
      model.a.value, model.b.value = model.b.value * 2, model.a.value * 3

    swap(model)
    np.testing.assert_array_equal(a.value, 2 * X)
    np.testing.assert_array_equal(b.value, 3 * X.T)

    @nnx.vmap(in_axes=(axes,))
    def reorder(model):
      model.c = nnx.Variable(model.a.value)
      model.a.value, model.b.value = model.b.value, model.a.value
      del model.c

    reorder(model)
    np.testing.assert_array_equal(a.value, 3 * X)
    np.testing.assert_array_equal(b.value, 2 * X.T)

  def test_pmap_compiles_once_and_donates(self):
    traces = []

    @nnx.pmap(donate_argnums=(0, 1), in_axes=(0, 0))
    def f(v, x):
      traces.append(1)
      v.seen = nnx.Variable(x)
      return x + 1

    class Holder(nnx.Module):
      def __init__(self):
        self.v = nnx.Param(jnp.array(X))

    for _ in range(3):
      holder = Holder()
      y = f(holder, jnp.array(X))
      np.testing.assert_array_equal(holder.v.value, X)
      np.testing.assert_array_equal(holder.seen.value, X)
      np.testing.assert_array_equal(y, X + 1)
    self.assertLen(traces, 1)

  def test_pmap_sizes_and_backend(self):
    v = nnx.Param(X)
    f = nnx.pmap(
      lambda v, x: v + x + jax.lax.axis_index("i"),
      in_axes=(0, None),
      out_axes=0,
      axis_name="i",
      axis_size=4,
      backend="cpu",
    )
    np.testing.assert_array_equal(f(v, 1.0), X + 1 + np.arange(4.0)[:, None])

  def test_spmd_axis_name(self):
    f = nnx.vmap(lambda v, x: v * x, in_axes=(None, 0), spmd_axis_name="data")
    np.testing.assert_array_equal(f(nnx.Param(X[1]), X), X[1] * X)


class LeakTest(parameterized.TestCase):
  def test_no_tracer_outlives_its_transform(self):
    stack = both.models(nnx).Stack()
    axes = nnx.StateAxes({(nnx.Param, nnx.BatchStat): 0, ...: None})

    @nnx.jit
    def f(stack, x):
      @nnx.grad
      def loss(stack, x):
        run = nnx.scan(
          nnx.remat(lambda x, stack: stack(x)),
          in_axes=(nnx.Carry, axes),
          out_axes=nnx.Carry,
        )
        y = run(x, stack)
        many = nnx.vmap(lambda stack, x: stack(x), in_axes=(axes, None))
        z = nnx.cond(y.sum() > 0, many, lambda s, y: s.mean * y, stack, y)
        return nnx.fori_loop(0, 2, lambda i, z: z * 2, z).sum()

      return loss(stack, x)

    with jax.checking_leaks():
      f(stack, X[0])


class ErrorTest(parameterized.TestCase):
  def error(self, kind, function, *args, **kwargs):
    with self.assertRaises(kind) as caught:
      function(*args, **kwargs)
    return str(caught.exception)

  def test_what_is_captured_is_not_returned(self):
    model = nnx.Dict(w=nnx.Param(X))
    text = self.error(ValueError, nnx.vmap(lambda x: [model]), X)
    self.assertIn("`nnx.vmap` returns must hold no Variable that it was", text)
    self.assertIn("`result[0].w` is a `Param` from outside of it", text)
    self.assertIs(nnx.vmap(lambda model, x: model)(model, X), model)
    copy = nnx.vmap(lambda x: nnx.clone(model))(X)
    self.assertEqual(copy.w.shape, (4, 4, 3))

  def test_one_variable_with_two_axes(self):
    tied = both.models(nnx).Tied()
    f = nnx.vmap(lambda a, b: 0, in_axes=(None, 0))
    self.assertEqual(
      self.error(ValueError, f, tied.first, tied),
      "`in_axes` must give a shared node one entry, but the Param at"
      " `args[0].bias` and `args[1].again.bias` has both None and 0.",
    )
    axes = nnx.StateAxes(
      {nnx.PathContains("second"): 0, nnx.Param: 1, ...: None}
    )
    self.assertEqual(
      self.error(ValueError, nnx.vmap(lambda t: 0, in_axes=(axes,)), tied),
      "`in_axes` must give a shared node one entry, but the Param at"
      " `args[0].again.bias` and `args[0].second.bias` has both 1 and 0.",
    )
    f = nnx.vmap(lambda m, x: (m, x), in_axes=(None, 0))
    self.assertEqual(
      self.error(ValueError, f, tied.first, X),
      "`out_axes` must give a shared node one entry, but the Param at"
      " `args[0].bias` and `result[0].bias` has both None and 0.",
    )

  def test_values_that_differ_without_an_axis(self):
    stack = both.models(nnx).Stack()

    def f(stack, x):
      stack.calls[...] = x[0].astype(int)

    text = self.error(
      ValueError, nnx.vmap(f, in_axes=(stack_axes(nnx), 0)), stack, X
    )
    self.assertEqual(
      text,
      "What has the axis `None` must be the same for all elements of the mapped"
      " axis, but one of `args[0].calls` got values that differ. Give it an"
      " axis"
      " in `in_axes` or `out_axes`, or do not write it.",
    )
    self.assertEqual(int(stack.calls.value), 0)

  def test_axes_that_are_none(self):
    for option in ("in_axes", "out_axes"):
      self.assertEqual(
        self.error(TypeError, nnx.vmap, jnp.sin, **{option: ("a",)}),
        f"`{option}` must hold ints, `None`, `nnx.StateAxes` and containers of"
        " them, but got `'a'` of type `str`.",
      )
    self.assertEqual(
      self.error(TypeError, nnx.vmap, jnp.sin, in_axes={"x": 0}),
      "`in_axes` must be one entry for all arguments or a tuple with one for"
      " each, but got `{'x': 0}` of type `dict`.",
    )

  def test_axes_that_do_not_fit(self):
    def f(*args):
      return args

    self.assertEqual(
      self.error(ValueError, nnx.vmap(f, in_axes=(0, 0)), X),
      "`in_axes` must have one entry for each positional argument, but it has 2"
      " for 1.",
    )
    self.assertEqual(
      self.error(ValueError, nnx.vmap(f, in_axes=((0, 0),)), X),
      "`in_axes` must be a prefix of what it speaks of, but at `args[0]` there"
      " is a leaf where it has (0, 0).",
    )
    self.assertEqual(
      self.error(ValueError, nnx.vmap(f, in_axes=2), X),
      "`in_axes` must name axes that arrays have, but `args[0]` has shape (4,"
      " 3)"
      " and no axis 2. Use `None` for what is not mapped.",
    )
    self.assertEqual(
      self.error(ValueError, nnx.vmap(f), nnx.Param(X), "a"),
      "`in_axes` must name axes that arrays have, but `args[1]` has the value"
      " 'a' and no axis 0. Use `None` for what is not mapped.",
    )
    self.assertEqual(
      self.error(ValueError, nnx.vmap(f), nnx.Rngs(0)),
      "`in_axes` must name axes that arrays have, but `args[0].default.count`"
      " has shape () and no axis 0. Use `None` for what is not mapped."
      " `nnx.split_rngs` gives random streams an axis.",
    )
    self.assertEqual(
      self.error(ValueError, nnx.vmap(f), nnx.Param(X), X.T),
      "All axes that are mapped must have one size, but axis 0 of `args[0]` has"
      " 4 and axis 0 of `args[1]` has 3.",
    )
    self.assertEqual(
      self.error(ValueError, nnx.vmap(f, axis_size=5), X),
      "All axes that are mapped must have one size, but `axis_size` has 5 and"
      " axis 0 of `args[0]` has 4.",
    )
    stack = both.models(nnx).Stack()
    axes = nnx.StateAxes({nnx.Param: 0})
    self.assertEqual(
      self.error(ValueError, nnx.vmap(f, in_axes=(axes,)), stack),
      "The filters of `in_axes` must select every leaf, but none of"
      " [<class 'nnx.variablelib.Param'>] selects `args[0].calls` of type"
      " Variable:"
      " add `...` as the last filter.",
    )
    self.assertStartsWith(
      self.error(ValueError, nnx.vmap(f, in_axes=(axes,)), X),
      "`StateAxes` speaks of the Variables of Modules, but was given for",
    )

  def test_captured_state(self):
    stack = both.models(nnx).Stack()
    text = self.error(nnx.TraceContextError, nnx.vmap(lambda x: stack(x)), X)
    self.assertIn("It is `mean` of a `Stack`", text)


if __name__ == "__main__":
  absltest.main()
