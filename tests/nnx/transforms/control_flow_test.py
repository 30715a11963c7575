"""nnx.cond, switch, while_loop and fori_loop."""

from absl.testing import absltest, parameterized
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.transforms import both

X = jnp.arange(3.0)


class SameAsFlaxTest(parameterized.TestCase):
  @parameterized.product(pred=(True, False), compiled=(True, False))
  def test_cond_where_both_branches_write(self, pred, compiled):
    def program(lib):
      model = both.models(lib).Dense()

      def on_true(model, x):
        return model(x)

      def on_false(model, x):
        model.bias[...] = model.bias[...] * 2
        model.calls[...] = model.calls[...] + 10
        return x

      def run(model, pred, x):
        return lib.cond(pred, on_true, on_false, model, x)

      run = lib.jit(run) if compiled else run
      return run(model, pred, X), model

    both.same(program)

  @parameterized.parameters(0, 1, 2, 7, -1)
  def test_switch(self, index):
    def program(lib):
      v, w = lib.Param(X), lib.Variable(jnp.array(0))

      def make(k):
        def branch(v, w):
          v[...] = v[...] * k
          w[...] = w[...] + k
          return {"k": jnp.array(k), "v": v[...] + 1}

        return branch

      out = lib.switch(jnp.array(index), [make(k) for k in range(3)], v, w)
      return out, v, w

    both.same(program)

  def test_cond_returns_its_operands(self):
    def program(lib):
      model = both.models(lib).Tied()

      def f(model):
        model.first.bias[...] = model.first.bias[...] + 1
        return model, model.second.bias

      same, bias = lib.cond(True, f, lambda m: (m, m.second.bias), model)
      assert same is model and bias is model.first.bias
      return model

    both.same(program)

  def test_cond_that_makes_state_in_both_branches(self):
    def program(lib):
      model = both.models(lib).Dense()

      def make(k):
        def f(model, x):
          model.new = lib.Intermediate(k * x)
          return None

        return f

      lib.cond(False, make(1.0), make(2.0), model, X)
      return model

    both.same(program)

  def test_while_loop(self):
    def program(lib):
      model = both.models(lib).Dense()

      def body(val):
        model, x, n = val
        return model, model(x), n - 1.0

      same, x, n = lib.while_loop(
        lambda val: val[-1] > 0, body, (model, X, 3.0)
      )
      assert same is model
      return x, n, model

    both.same(program)

  @parameterized.parameters(None, 2, True)
  def test_fori_loop(self, unroll):
    def program(lib):
      model = both.models(lib).Tied()

      def body(i, val):
        model, x = val
        model.first.bias[...] = model.first.bias[...] * i
        return model, model(x)

      same, x = lib.fori_loop(2, 5, body, (model, X), unroll=unroll)
      assert same is model and model.second.bias is model.first.bias
      return x, model

    both.same(program)

  def test_variables_as_the_value(self):
    def program(lib):
      v = lib.Variable(jnp.array(1))

      def body(v):
        v[...] = v[...] * 3
        return v

      return lib.while_loop(lambda v: v[...] < 50, body, v), v

    both.same(program)

  def test_gradient_through_cond_and_fori_loop(self):
    def program(lib):
      model = both.models(lib).Dense()

      def loss(model, x, pred):
        def body(i, val):
          model, x = val
          return model, model(x)

        _, y = lib.fori_loop(0, 3, body, (model, x))

        def twice(m, y):
          return (m(y) * 2).sum()

        return lib.cond(pred, twice, lambda m, y: m.bias[...].sum(), model, y)

      return lib.grad(loss)(model, X, True), lib.grad(loss)(model, X, False)

    both.same(program)


class SeenOutsideTest(parameterized.TestCase):
  @parameterized.parameters(True, False)
  def test_a_branch_need_not_write_what_the_other_does(self, pred):
    model = both.models(nnx).Dense()

    def f(model, x):
      model.mean[...] = x
      return 1.0

    def g(model, x):
      model.bias[...] = x
      return 2.0

    kernel = model.kernel.value
    before = model.mean.value, model.bias.value
    out = nnx.cond(pred, f, g, model, X)
    after = model.mean.value, model.bias.value
    self.assertEqual(float(out), 1.0 if pred else 2.0)
    np.testing.assert_array_equal(after[not pred], X)
    np.testing.assert_array_equal(after[pred], before[pred])
    self.assertIs(model.kernel.value, kernel)

  def test_state_that_is_only_read_does_not_go_through_the_conditional(self):
    model = both.models(nnx).Dense()

    def run(model, pred):
      return nnx.cond(
        pred, lambda m: m.kernel.sum(), lambda m: m.bias.sum(), model
      )

    jaxpr = nnx.make_jaxpr(run, graph_updates=True)(model, True)
    (equation,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    self.assertLen(equation.outvars, 1)

  def test_branches_run_once_in_python(self):
    runs = []
    v = nnx.Variable(jnp.array(0))

    def make(k):
      def branch(v):
        runs.append(k)
        v[...] = v + k

      return branch

    nnx.cond(True, make(1), make(2), v)
    self.assertEqual(runs, [1, 2])

  def test_variables_as_predicate_and_bounds(self):
    flag, n = nnx.Variable(jnp.array(True)), nnx.Variable(jnp.array(3))
    self.assertEqual(nnx.cond(flag, lambda: 1, lambda: 2), 1)
    self.assertEqual(nnx.switch(n, [lambda: 1, lambda: 2]), 2)
    self.assertEqual(nnx.fori_loop(0, n, lambda i, x: x + i, 0), 3)

  def test_nested_control_flow_writes(self):
    v = nnx.Variable(jnp.array(0))

    @nnx.jit
    def run(v, n):
      def body(i, v):
        def even(v):
          v[...] += 1

        def odd(v):
          nnx.cond(i > 2, lambda v: v.set_value(v + 100), even, v)

        nnx.cond(i % 2 == 0, even, odd, v)
        return v

      return nnx.fori_loop(0, n, body, v)

    self.assertIs(run(v, 5), v)
    self.assertEqual(int(v.value), 104)

  def test_arrays_as_attributes(self):
    class Model(nnx.Module):
      def __init__(self):
        self.a = jnp.array(1.0)
        self.items = [jnp.array(2.0), nnx.Param(jnp.array(3.0))]

    model = Model()

    def body(i, model):
      model.a = model.a * 2
      model.items[0] = model.items[0] + model.items[1].value
      return model

    nnx.fori_loop(0, 3, body, model)
    self.assertEqual(float(model.a), 8.0)
    self.assertEqual(float(model.items[0]), 11.0)

    def change(model):
      model.a = model.a + 1

    def other(model):
      model.items[1][...] *= 2

    nnx.cond(True, change, other, model)
    nnx.cond(False, change, other, model)
    self.assertEqual(float(model.a), 9.0)
    self.assertEqual(float(model.items[1].value), 6.0)


class ErrorTest(parameterized.TestCase):
  def error(self, kind, function, *args, **kwargs):
    with self.assertRaises(kind) as caught:
      function(*args, **kwargs)
    return str(caught.exception)

  def test_branches_that_differ(self):
    model = both.models(nnx).Dense()
    self.assertEqual(
      self.error(
        ValueError, nnx.cond, True, lambda: {"a": 1}, lambda: {"a": (1, 2)}
      ),
      "The functions given to `nnx.cond` must return, and leave behind, the"
      " same"
      " structure, but `result.a` is an array after `true_fun` and a tuple of 2"
      " after `false_fun`.",
    )

    def grow(model):
      model.new = nnx.Param(X)

    self.assertEqual(
      self.error(ValueError, nnx.switch, 0, [grow, lambda model: None], model),
      "The functions given to `nnx.switch` must return, and leave behind, the"
      " same structure, but `operands[0]` is a Dense with ['bias', 'calls',"
      " 'kernel', 'mean', 'new', 'size'] after `branches[0]` and a Dense with"
      " ['bias', 'calls', 'kernel', 'mean', 'size'] after `branches[1]`.",
    )

    def resize(model):
      model.size = 4

    self.assertIn(
      "`operands[0].size` is `3` after `true_fun` and `4` after `false_fun`",
      self.error(ValueError, nnx.cond, True, lambda model: None, resize, model),
    )
    self.assertEqual(
      self.error(
        TypeError, nnx.cond, True, lambda: jnp.ones(2), lambda: jnp.ones(3)
      ),
      "The functions given to `nnx.cond` must give the same shapes and dtypes,"
      " but `result` is float32[2] after `true_fun` and float32[3] after"
      " `false_fun`.",
    )

    def widen(model):
      model.bias.value = jnp.ones(5)

    self.assertEqual(
      self.error(TypeError, nnx.switch, 0, [lambda m: None, widen], model),
      "The functions given to `nnx.switch` must give the same shapes and"
      " dtypes,"
      " but `operands[0].bias` is float32[3] after `branches[0]` and float32[5]"
      " after `branches[1]`.",
    )

  def test_functions_that_are_none(self):
    self.assertEqual(
      self.error(TypeError, nnx.cond, True, 1, 2),
      "`nnx.cond` must be given functions, but got `1`.",
    )
    self.assertEqual(
      self.error(ValueError, nnx.switch, 0, []),
      "`branches` must hold a function, but got none.",
    )
    self.assertEqual(
      self.error(TypeError, nnx.while_loop, 1, lambda v: v, 0),
      "`nnx.while_loop` must be given a function, but got `1` of type `int`.",
    )

  def test_loops_that_change_their_value(self):
    model = both.models(nnx).Dense()

    def swap(i, val):
      return val[1], val[0]

    self.assertEqual(
      self.error(
        ValueError, nnx.fori_loop, 0, 2, swap, (model, nnx.clone(model))
      ),
      "The carry of `nnx.fori_loop` must hold the same objects in all"
      " iterations, but at `init_val[0]` there is another Dense. Change the"
      " object that came in, and return it.",
    )

    def retype(val):
      val[0].calls.value = 1.5
      return val

    self.assertEqual(
      self.error(
        TypeError,
        nnx.while_loop,
        lambda val: val[1] > 0,
        lambda val: (retype(val)[0], val[1].astype(int)),
        (model, 3.0),
      ),
      "The carry of `nnx.while_loop` must keep shapes and dtypes, but"
      " `init_val[1]` was float32[] and became int32[].",
    )

    def rename(i, model):
      model.size = i if isinstance(i, int) else 5
      return model

    self.assertEqual(
      self.error(ValueError, nnx.fori_loop, 0, 2, rename, model),
      "The carry of `nnx.fori_loop` must have one structure in all iterations,"
      " but `init_val.size` was `3` and became `5`. Make what the loop needs"
      " before it.",
    )

  def test_a_condition_that_writes(self):
    model = both.models(nnx).Dense()

    def condition(model):
      return model(X).sum() > 0

    self.assertEqual(
      self.error(ValueError, nnx.while_loop, condition, lambda m: m, model),
      "`cond_fun` of `nnx.while_loop` must not change its argument, but it"
      " changes `init_val.calls`. Change it in `body_fun`.",
    )

  def test_captured_state(self):
    model = both.models(nnx).Dense()
    for run in (
      lambda: nnx.cond(True, lambda: model(X), lambda: X),
      lambda: nnx.fori_loop(0, 2, lambda i, x: model(x), X),
    ):
      text = self.error(nnx.TraceContextError, run)
      self.assertIn("It is `mean` of a `Dense`", text)


if __name__ == "__main__":
  absltest.main()
