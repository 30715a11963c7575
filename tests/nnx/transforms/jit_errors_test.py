"""nnx.jit: what its errors say."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.transforms.models import Dense, Tower


class ErrorsTest(parameterized.TestCase):
  def test_write_to_a_captured_variable(self):
    tower = Tower()

    @nnx.jit
    def step(x):
      tower.layers[1].bias[...] = x
      return x

    with self.assertRaises(nnx.TraceContextError) as caught:
      step(jnp.ones(3))
    text = str(caught.exception)
    self.assertIn("`layers[1].bias` of a `Tower`", text)
    self.assertRegex(text, r'made at ".*models\.py", line \d+')
    self.assertIn("Pass the model as an argument of the jitted function", text)
    np.testing.assert_array_equal(tower.layers[1].bias.value, np.zeros(3))

  def test_attribute_of_a_captured_module(self):
    dense = Dense()

    @nnx.jit
    def step(x):
      dense.cache = x
      return x

    with self.assertRaisesRegex(nnx.TraceContextError, "Cannot change `Dense`"):
      step(jnp.ones(3))
    self.assertFalse(hasattr(dense, "cache"))

  def test_an_array_that_was_donated_is_named(self):
    one, other = Dense(), Dense()
    other.kernel.value = one.kernel.value

    @nnx.jit(donate_argnums=0)
    def step(dense, x):
      dense.kernel[...] += x

    step(one, 1.0)
    for jitted in (nnx.jit(lambda dense, x: dense.kernel + x), step):
      with self.assertRaises((RuntimeError, ValueError)) as caught:
        jitted(other, x=1.0)
      (note,) = [n for n in caught.exception.__notes__ if "donates" in n]
      self.assertIn("no array is left of `dense.kernel`: it", note)

  def test_an_error_of_a_function_has_no_such_note(self):
    def fails(x):
      raise ValueError("the file was deleted")

    with self.assertRaisesRegex(ValueError, "the file") as caught:
      nnx.jit(fails)(jnp.ones(1))
    notes = getattr(caught.exception, "__notes__", [])
    self.assertNotIn("donates", "".join(notes))

  def test_a_static_argument_with_state(self):
    def total(dense, n):
      return dense.kernel.value.sum() * n

    message = "must hold no data, .* but `dense` is a `Dense` with Variables"
    for jitted in (
      nnx.jit(total, static_argnums=0),
      nnx.jit(total, static_argnames="dense"),
      nnx.pmap(total, in_axes=None, static_broadcasted_argnums=0, axis_size=1),
    ):
      with self.assertRaisesRegex(TypeError, message):
        jitted(Dense(), 1)

    class Options(nnx.Module):
      size = 3

    jitted = nnx.jit(lambda options: options.size, static_argnums=0)
    self.assertEqual(int(jitted(Options())), 3)

  def test_unhashable_static_argument(self):
    with self.assertRaisesRegex(
      TypeError, r"must be hashable, but got \[1\] of type list"
    ):
      nnx.jit(lambda x, n: x, static_argnums=1)(1.0, [1])

  def test_not_an_array(self):
    with self.assertRaisesRegex(
      TypeError,
      "must be arrays, numbers or static, but `options.mode` is 'fast' of type"
      " str",
    ):
      nnx.jit(lambda x, options: x)(1.0, options={"mode": "fast"})
    with self.assertRaisesRegex(TypeError, "but `x` is 'text'"):
      nnx.jit(lambda x: x)(nnx.Variable("text"))

  @parameterized.parameters(
    ({"static_argnums": 3}, "`static_argnums` must name positional parameters"),
    ({"static_argnames": "z"}, "`static_argnames` must name parameters"),
    ({"donate_argnums": -4}, "`donate_argnums` must name positional"),
    (
      {"static_argnums": 0, "donate_argnames": "x"},
      "must be static or donated, not both",
    ),
  )
  def test_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      nnx.jit(lambda x, y: x, **options)

  def test_not_a_function(self):
    with self.assertRaisesRegex(TypeError, "`fun` must be callable"):
      nnx.jit(3)
    with self.assertRaisesRegex(TypeError, "`fun` must be callable"):
      nnx.jit(nnx.Dict(a=1))  # a Module that cannot be called

  def test_write_back_from_a_foreign_trace(self):
    dense = Dense()
    step = nnx.jit(lambda d, x: d.bias.set_value(x))

    def outer(x):
      step(dense, x)
      return x

    with self.assertRaisesRegex(nnx.TraceContextError, "Cannot change `Param`"):
      jax.vmap(outer)(jnp.ones((2, 3)))
    np.testing.assert_array_equal(dense.bias.value, np.zeros(3))


if __name__ == "__main__":
  absltest.main()
