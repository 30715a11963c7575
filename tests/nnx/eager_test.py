"""`eager.compiled`: one compiled call, with static options by name."""

from absl.testing import absltest
import jax.numpy as jnp

from nnx import eager


class CompiledTest(absltest.TestCase):
  def test_traces_once_for_each_value_of_a_static_option(self):
    traces = []

    def scale(x, factor, name="a"):
      traces.append((factor, name))
      return x * factor

    compiled = eager.compiled(scale, static=("factor", "name"))
    x = jnp.ones(2)
    for _ in range(2):
      compiled(x, 2.0)
      compiled(x, 3.0, "b")
      compiled(x, factor=3.0, name="b")
    self.assertEqual(sorted(set(traces)), [(2.0, "a"), (3.0, "b")])
    self.assertEqual(compiled(x, 3.0, "b").tolist(), [3.0, 3.0])

  def test_other_arguments_are_traced(self):
    traces = []

    def add(x, y):
      traces.append(x)
      return x + y

    compiled = eager.compiled(add)
    self.assertEqual([float(compiled(1.0, y)) for y in (2.0, 3.0)], [3.0, 4.0])
    self.assertLen(traces, 1)

  def test_refuses_a_static_name_that_is_no_parameter(self):
    with self.assertRaisesRegex(ValueError, "dtpye"):
      eager.compiled(lambda x, dtype: x.astype(dtype), static=("dtpye",))

  def test_keeps_the_name_and_the_docstring(self):
    def function(x):
      """Returns x."""
      return x

    compiled = eager.compiled(function)
    self.assertEqual(compiled.__name__, "function")
    self.assertEqual(compiled.__doc__, "Returns x.")


if __name__ == "__main__":
  absltest.main()
