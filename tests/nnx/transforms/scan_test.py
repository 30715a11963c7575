"""nnx.scan and Carry."""

import sys
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.transforms import both

# `nnx.transforms.scan` is the function.
scan_lib = sys.modules[nnx.scan.__module__]
X = jnp.arange(12.0).reshape(4, 3)


class SameAsFlaxTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_stacked_layers(self, reverse):
    def program(lib):
      stack = both.models(lib).Stack()
      axes = lib.StateAxes(
        {(lib.Param, lib.BatchStat): 0, lib.Variable: lib.Carry}
      )

      @lib.scan(
        in_axes=(lib.Carry, axes), out_axes=(lib.Carry, 0), reverse=reverse
      )
      def forward(x, stack):
        y = stack(x)
        return y, x

      return forward(X[0], stack), stack

    both.same(program)

  def test_broadcast_streams_are_the_same_in_all_iterations(self):
    def program(lib):
      rngs = lib.Rngs(params=jax.random.split(jax.random.key(0), 3), dropout=1)

      @lib.scan(
        in_axes=(lib.Carry, lib.StateAxes({"params": 0, ...: None})), length=3
      )
      def f(carry, rngs):
        return carry, tuple(
          jax.random.uniform(stream()) for stream in (rngs.params, rngs.dropout)
        )

      return f((), rngs)[1]

    both.same(program)
    rngs = nnx.Rngs(0)
    keys = nnx.scan(lambda rngs, x: rngs(), in_axes=(None, 0), out_axes=0)
    drawn = jax.random.key_data(keys(rngs, jnp.arange(3)))
    self.assertLen(np.unique(drawn, axis=0), 1)
    # Outside it is as if the stream had been used once: no key comes twice.
    self.assertEqual(int(rngs.default.count.value), 1)

  def test_layers_made_by_vmap(self):
    def program(lib):
      @lib.split_rngs(splits=4)
      @lib.vmap(in_axes=0, out_axes=0)
      def make(rngs):
        model = both.models(lib).Dense()
        model.kernel[...] = jax.random.normal(rngs.params(), (3, 3))
        return model

      layers = make(lib.Rngs(0))
      forward = lib.scan(
        lambda x, layer: layer(x), in_axes=(lib.Carry, 0), out_axes=lib.Carry
      )
      return forward(X[0], layers), layers

    both.same(program)

  def test_default_axes(self):
    def program(lib):
      return lib.scan(lambda c, x: (c + x.sum(), c * x))(1.0, X)

    both.same(program)

  def test_no_carry(self):
    def program(lib):
      stack = both.models(lib).Stack()
      f = lib.scan(
        lambda stack, x, y: {"a": stack.w[...] @ x, "b": y * x},
        in_axes=(lib.StateAxes({(lib.Param, lib.BatchStat): 0, ...: None}),)
        + (0, None),
        out_axes=0,
      )
      return f(stack, X, 2.0)

    both.same(program)

  def test_all_is_carry(self):
    def program(lib):
      f = lib.scan(
        lambda c: (c[0] + 1, c[1] * 2),
        in_axes=lib.Carry,
        out_axes=lib.Carry,
        length=3,
      )
      return f((jnp.array(0.0), jnp.array(1.0)))

    both.same(program)

  def test_module_as_carry(self):
    def program(lib):
      model = both.models(lib).Dense()

      @lib.scan(in_axes=(lib.Carry, 0), out_axes=(lib.Carry, 1))
      def f(carry, x):
        model, total = carry
        y = model(x)
        return (model, total + y.sum()), y

      (same_model, total), ys = f((model, 0.0), X)
      assert same_model is model
      return total, ys, model

    both.same(program)

  def test_axes_other_than_the_first(self):
    def program(lib):
      v = lib.Param(jnp.arange(24.0).reshape(2, 4, 3))

      @lib.scan(in_axes=(1, lib.Carry, -1), out_axes=(lib.Carry, (2, 0)))
      def f(v, c, x):
        v[...] = v[...] * x.sum()
        return c + v[...].sum(), (v[...], {"x": x})

      return f(v, 0.0, X.T), v

    both.same(program)

  def test_new_state_is_stacked(self):
    def program(lib):
      stack = both.models(lib).Stack()
      axes = lib.StateAxes(
        {
          lib.Intermediate: 1,
          (lib.Param, lib.BatchStat): 0,
          ...: lib.Carry,
        }
      )

      @lib.scan(in_axes=(lib.Carry, axes), out_axes=lib.Carry)
      def f(x, stack):
        stack.seen = lib.Intermediate(x)
        return stack(x)

      return f(X[0], stack), stack

    both.same(program)

  def test_modules_made_inside(self):
    def program(lib):
      @lib.scan(in_axes=(lib.Carry, 0), out_axes=(lib.Carry, 0))
      def make(key, i):
        key, use = jax.random.split(key)
        model = both.models(lib).Dense()
        model.kernel[...] = jax.random.normal(use, (3, 3)) * i
        return key, model

      _, models = make(jax.random.key(0), jnp.arange(3))
      return models

    both.same(program)

  def test_rngs(self):
    def program(lib):
      rngs = lib.Rngs(0)
      axes = lib.StateAxes({lib.RngState: lib.Carry})
      f = lib.scan(
        lambda rngs, x: x + jax.random.normal(rngs(), x.shape),
        in_axes=(axes, 0),
        out_axes=0,
      )
      carried = f(rngs, X)
      split = lib.split_rngs(splits=4)(
        lib.scan(
          lambda rngs, x: x + jax.random.normal(rngs(), x.shape),
          in_axes=(0, 0),
          out_axes=0,
        )
      )
      return carried, split(rngs, X), rngs.default.count[...]

    both.same(program)

  def test_transform_metadata(self):
    def program(lib):
      p = lib.Param(X, out_sharding=("layers", "embed"), eager_sharding=False)
      inside = []
      options = {"transform_metadata": {lib.PARTITION_NAME: "layers"}}

      class Model(lib.Module):
        def __init__(self):
          self.p = p

      model = Model()

      @lib.scan(in_axes=(lib.Carry, 0), out_axes=(lib.Carry, 0), **options)
      def f(c, model):
        inside.append(tuple(model.p.out_sharding))
        new = lib.Param(c, out_sharding=("x",), eager_sharding=False)
        return c + model.p[...], new

      _, new = f(X[0], model)
      return inside[0], tuple(p.out_sharding), tuple(new.out_sharding)

    both.same(program)

  def test_gradient(self):
    def program(lib):
      stack = both.models(lib).Stack()
      axes = lib.StateAxes(
        {(lib.Param, lib.BatchStat): 0, lib.Variable: lib.Carry}
      )
      forward = lib.scan(
        lambda x, stack: stack(x),
        in_axes=(lib.Carry, axes),
        out_axes=lib.Carry,
      )

      @lib.grad(argnums=(0, 1))
      def loss(stack, x):
        return (forward(x, stack) ** 2).sum()

      return loss(stack, X[0]), stack

    both.same(program)


class SeenOutsideTest(parameterized.TestCase):
  def test_state_written_without_an_axis_is_carried(self):
    stack = both.models(nnx).Stack()
    outside = nnx.Variable(jnp.array(0.0))
    traces = []
    axes = nnx.StateAxes({(nnx.Param, nnx.BatchStat): 0, ...: None})

    @nnx.scan(in_axes=(nnx.Carry, axes, None), out_axes=nnx.Carry)
    def forward(x, stack, outside):
      traces.append(1)
      y = stack(x)
      outside[...] = outside * 2 + 1
      return y

    forward(X[0], stack, outside)
    self.assertEqual(int(stack.calls.value), 4)
    self.assertEqual(float(outside.value), 15.0)
    self.assertLen(traces, 1)

  @parameterized.parameters(1, 2, True)
  def test_unroll_and_split_transpose(self, unroll):
    v = nnx.Param(X)
    f = nnx.scan(
      lambda c, v: (c + v, c),
      unroll=unroll,
      _split_transpose=True,
    )
    c, ys = f(jnp.zeros(3), v)
    np.testing.assert_array_equal(c, X.sum(0))
    np.testing.assert_array_equal(ys[1], X[0])

  def test_length_without_arrays_to_scan(self):
    v = nnx.Variable(jnp.array(1.0))

    def f(v):
      v[...] = v * 2

    nnx.scan(f, in_axes=None, out_axes=0, length=5)(v)
    self.assertEqual(float(v.value), 32.0)

  def test_the_body_is_traced_once_and_appears_once(self):
    traces = []
    axes = nnx.StateAxes(
      {(nnx.Param, nnx.BatchStat): 0, nnx.Variable: nnx.Carry}
    )

    @nnx.scan(in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)
    def forward(x, stack):
      traces.append(1)
      return stack(x)

    stack = both.models(nnx).Stack()
    text = str(nnx.make_jaxpr(lambda x, stack: forward(x, stack))(X[0], stack))
    self.assertLen(traces, 1)
    self.assertEqual(text.count("scan["), 1)
    self.assertEqual(text.count("tanh"), 1)

  def test_nested_scans_write_at_every_level(self):
    total = nnx.Variable(jnp.array(0.0))
    rows = nnx.Variable(X)

    @nnx.scan(in_axes=(0, None), out_axes=0)
    def outer(row, total):
      @nnx.scan(in_axes=(0, None), out_axes=0)
      def inner(x, total):
        total[...] = total + x
        return total.value

      row[...] = row * 2
      return inner(row.value, total)

    ys = outer(rows, total)
    np.testing.assert_array_equal(rows.value, 2 * X)
    np.testing.assert_array_equal(ys.ravel(), np.cumsum(2 * np.arange(12.0)))
    self.assertEqual(float(total.value), 132.0)

  def test_methods(self):
    class Model(nnx.Module):
      def __init__(self):
        self.w = nnx.Param(X)

      @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
      def forward(self, x):
        return x * self.w

    np.testing.assert_array_equal(Model().forward(jnp.ones(3)), X.prod(0))


class KeptTest(parameterized.TestCase):
  """Outside of traces a scan is compiled once, and never out of date."""

  def setUp(self):
    super().setUp()
    self.traces = 0

  def counting(self, f, **options):
    def counted(*args):
      self.traces += 1
      return f(*args)

    return nnx.scan(counted, **options)

  def test_it_is_traced_once_for_each_structure_and_shape(self):
    layer = both.models(nnx).Dense()
    forward = self.counting(
      lambda c, layer, x: (c + layer(x), x), in_axes=(nnx.Carry, None, 0)
    )
    zero = jnp.zeros(3)
    once, _ = forward(zero, layer, X)
    self.assertGreater(self.traces, 0)
    self.traces, mean = 0, layer.mean.value
    again, _ = forward(zero, layer, X)
    np.testing.assert_allclose(once, again)
    # State is read and written at every call.
    self.assertGreater(np.abs(layer.mean.value - mean).max(), 0)
    layer.kernel.value = 2 * layer.kernel.value
    doubled, _ = forward(zero, layer, X)
    self.assertGreater(np.abs(doubled - again).max(), 1e-3)
    self.assertEqual(self.traces, 0)
    forward(zero, layer, X[:2])
    self.assertGreater(self.traces, 0)
    self.traces = 0
    layer.another = "attribute"
    forward(zero, layer, X)
    self.assertGreater(self.traces, 0)

  def test_no_more_than_some_structures_are_kept(self):
    add = self.counting(lambda c, x: (c + x["x"], None))
    with mock.patch.object(scan_lib, "_MOST_KEPT", 2):
      for name in ("a", "b", "c", "d"):
        xs = {"x": X, name: X}
        for _ in range(2):
          total, _ = add(jnp.zeros(3), xs)
          np.testing.assert_allclose(total, X.sum(0))
      self.traces = 0
      add(jnp.zeros(3), {"x": X, "a": X})
    self.assertGreater(self.traces, 0)

  def test_numbers_may_be_carried(self):
    add = self.counting(lambda c, x: (c + x, c))
    for start in (1.0, 2.0, np.float32(3)):
      total, before = add(start, np.arange(3.0, dtype="float32"))
      self.assertEqual(float(total), start + 3)
      self.assertEqual(float(before[0]), start)
    self.assertLess(self.traces, 4)

  def test_what_comes_from_outside_is_not_out_of_date(self):
    outside = jnp.ones(())
    variable = nnx.Variable(jnp.ones(()))
    add = self.counting(lambda c, x: (c + outside * variable[...], x))
    self.assertEqual(float(add(0.0, X)[0]), 4)
    outside = 2 * outside
    self.assertEqual(float(add(0.0, X)[0]), 8)
    variable.value = jnp.array(3.0)
    self.assertEqual(float(add(0.0, X)[0]), 24)

  def test_numbers_that_all_iterations_share_stay_numbers(self):
    def f(c, flag, x):
      return (c + x if flag else c), x

    add = self.counting(f, in_axes=(nnx.Carry, None, 0))
    x = jnp.arange(3.0)
    self.assertEqual(float(add(0.0, True, x)[0]), 3)
    self.assertEqual(float(add(0.0, False, x)[0]), 0)

  def test_an_error_leaves_nothing_behind(self):
    refuse = True

    def f(c, x):
      if refuse:
        raise RuntimeError("not now")
      return c + x, x

    add = nnx.scan(f)
    with self.assertRaisesRegex(RuntimeError, "not now"):
      add(0.0, X[:, 0])
    refuse = False
    self.assertEqual(float(add(0.0, X[:, 0])[0]), 18)

  def test_without_jit_iterations_see_numbers(self):
    seen = []

    def f(c, x):
      seen.append(float(x))
      return c + x, x

    with jax.disable_jit():
      nnx.scan(f)(0.0, X[:, 0])
    self.assertEqual(seen, [0.0, 3.0, 6.0, 9.0])


class ErrorTest(parameterized.TestCase):
  def error(self, kind, function, *args, **kwargs):
    with self.assertRaises(kind) as caught:
      function(*args, **kwargs)
    return str(caught.exception)

  def test_where_carry_may_be(self):
    carry, f = nnx.Carry, lambda *args: args
    self.assertStartsWith(
      self.error(ValueError, nnx.scan, f, in_axes=(carry, 0), out_axes=0),
      "`nnx.Carry` must be both in `in_axes` and in `out_axes`, or in neither,",
    )
    self.assertEqual(
      self.error(ValueError, nnx.scan, f, in_axes=(carry, 0, carry)),
      "`in_axes` must have one `nnx.Carry`, but got it at positions [0, 2]."
      " Carry"
      " a tuple.",
    )
    self.assertStartsWith(
      self.error(ValueError, nnx.scan, f, out_axes=((carry, 0), 0)),
      "`nnx.Carry` must stand for a whole argument or result in `out_axes`,"
      " but",
    )
    scanned = nnx.scan(f, in_axes=carry, out_axes=carry, length=2)
    self.assertEqual(
      self.error(ValueError, scanned, 1, 2),
      "With `in_axes=nnx.Carry` the function must have one argument, but got"
      " 2.",
    )

  def test_out_axes_that_are_none(self):
    def f(c, x):
      return (c, x)

    self.assertStartsWith(
      self.error(ValueError, nnx.scan, f, out_axes=(nnx.Carry, None)),
      "`out_axes` must have an axis for every result that is not the carry,",
    )
    axes = nnx.StateAxes({...: None})
    self.assertStartsWith(
      self.error(ValueError, nnx.scan, f, out_axes=(nnx.Carry, axes)),
      "`out_axes` must have an axis for every result that is not the carry,",
    )
    axes = nnx.StateAxes({...: nnx.Carry})
    self.assertStartsWith(
      self.error(ValueError, nnx.scan, f, out_axes=(nnx.Carry, axes)),
      "`nnx.StateAxes` in `out_axes` must hold axes, but got `nnx.Carry` in",
    )
    self.assertEqual(
      self.error(TypeError, nnx.scan, f, in_axes=("a", 0)),
      "`in_axes` must hold ints, `None`, `nnx.StateAxes` and containers of"
      " them,"
      " but got `'a'` of type `str`.",
    )

  def test_a_carry_that_changes(self):
    model = both.models(nnx).Dense()

    def grow(model, x):
      model.new = nnx.Param(x)
      return model, x

    self.assertEqual(
      self.error(ValueError, nnx.scan(grow), model, X),
      "The carry of `nnx.scan` must have one structure in all iterations, but"
      " `args[0]` was a Dense with ['bias', 'calls', 'kernel', 'mean', 'size']"
      " and became a Dense with ['bias', 'calls', 'kernel', 'mean', 'new',"
      " 'size']. Make what the loop needs before it.",
    )
    self.assertEqual(
      self.error(
        ValueError, nnx.scan(lambda c, x: ({"a": x}, x)), {"a": (1.0, 2.0)}, X
      ),
      "The carry of `nnx.scan` must have one structure in all iterations, but"
      " `args[0].a` was a tuple of 2 and became an array. Make what the loop"
      " needs before it.",
    )
    self.assertEqual(
      self.error(
        ValueError, nnx.scan(lambda c, x: (nnx.clone(c), x)), model, X
      ),
      "The carry of `nnx.scan` must hold the same objects in all iterations,"
      " but"
      " at `args[0]` there is another Dense. Change the object that came in,"
      " and"
      " return it.",
    )

    def widen(model, x):
      model.bias.value = jnp.ones((2, 3))
      return model, x

    self.assertEqual(
      self.error(TypeError, nnx.scan(widen), model, X),
      "The carry of `nnx.scan` must keep shapes and dtypes, but `args[0].bias`"
      " was float32[3] and became float32[2,3].",
    )
    self.assertEqual(
      self.error(TypeError, nnx.scan(lambda c, x: ("a", x)), 1.0, X),
      "The carry of `nnx.scan` must hold arrays where it did, but `args[0]`"
      " became `'a'`.",
    )
    self.assertIn(
      "must return a tuple of 2, one for each entry of `out_axes`, but it"
      " returned a `tuple` of 3.",
      self.error(ValueError, nnx.scan(lambda c, x: (c, x, x)), 1.0, X),
    )

  def test_state_made_where_it_is_not_scanned(self):
    model = both.models(nnx).Dense()

    def grow(model, x):
      model.new = nnx.Param(x)

    f = nnx.scan(grow, in_axes=(None, 0), out_axes=0)
    self.assertEqual(
      self.error(ValueError, f, model, X),
      "State that a scanned function makes must be scanned, but `args[0].new`"
      " is"
      " made inside and has the axis None. Make it before the loop, or give it"
      " an axis with `nnx.StateAxes`.",
    )

  def test_arguments(self):
    f = nnx.scan(lambda c, x, *, k: (c, x))
    self.assertEqual(
      self.error(TypeError, f, 1.0, X, k=2),
      "The arguments of a scanned function must be positional, but ['k'] are"
      " not.",
    )
    tied = both.models(nnx).Tied()
    f = nnx.scan(lambda a, b: (a, b))
    self.assertEqual(
      self.error(ValueError, f, tied, tied.first),
      "`in_axes` must give a shared node one entry, but the Param at"
      " `args[0].again.bias` and `args[1].bias` has both"
      " <class 'nnx.transforms.carry.Carry'> and 0.",
    )
    self.assertEqual(
      self.error(ValueError, nnx.scan(lambda c, x: (c, x)), 1.0, (X, X.T)),
      "All axes that are mapped must have one size, but axis 0 of `args[1][0]`"
      " has 4 and axis 0 of `args[1][1]` has 3.",
    )

  def test_captured_state(self):
    model = both.models(nnx).Dense()
    text = self.error(
      nnx.TraceContextError,
      nnx.scan(lambda c, x: (c, model(x))),
      1.0,
      X,
    )
    self.assertIn("It is `mean` of a `Dense`", text)


if __name__ == "__main__":
  absltest.main()
