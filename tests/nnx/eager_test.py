"""One compiled call, with static options by name."""

import dataclasses
from typing import Any

from absl.testing import absltest
import jax.numpy as jnp

from nnx import eager


@dataclasses.dataclass(frozen=True, eq=False)
class _Options:
  value: Any


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


class InternedTest(absltest.TestCase):
  def test_tells_types_apart(self):
    options = eager.interned(_Options)
    self.assertIs(options(1), options(1))
    self.assertIsNot(options(1), options(1.0))

  def test_takes_arguments_without_a_hash(self):
    options = eager.interned(_Options)
    self.assertEqual(options([1]).value, [1])
    self.assertIsNot(options([1]), options([1]))

  def test_is_compiled_for_once(self):
    traces = []

    def scale(x, options):
      traces.append(options.value)
      return x * options.value

    options = eager.interned(_Options)
    compiled = eager.compiled(scale, static=("options",))
    for value in (2, 3, 2, 3):
      compiled(jnp.ones(2), options(value))
    self.assertEqual(traces, [2, 3])


if __name__ == "__main__":
  absltest.main()
