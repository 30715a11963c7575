"""Operators of Variables, against those of flax.nnx and of Flax 0.10."""

import operator
import warnings

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np

import nnx

BINARY = [
  operator.add,
  operator.sub,
  operator.mul,
  operator.truediv,
  operator.floordiv,
  operator.mod,
  operator.pow,
  operator.eq,
]


INTEGER_BINARY = [
  operator.and_,
  operator.or_,
  operator.xor,
  operator.lshift,
  operator.rshift,
]


UNARY = [operator.neg, operator.pos, abs]


def quietly(f, *args, **kwargs):
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    return f(*args, **kwargs)


class OperatorsTest(parameterized.TestCase):
  @hypothesis.settings(derandomize=True, deadline=None, max_examples=60)
  @hypothesis.given(
    st.sampled_from(BINARY),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
    st.lists(st.integers(1, 5), min_size=3, max_size=3),
  )
  def test_binary(self, op, xs, ys):
    x, y = jnp.array(xs, jnp.float32), jnp.array(ys, jnp.float32)
    expected = quietly(op, flax_nnx.Param(x), y)
    np.testing.assert_array_equal(op(nnx.Param(x), y), expected)
    np.testing.assert_array_equal(op(x, nnx.Param(y)), expected)
    np.testing.assert_array_equal(op(nnx.Param(x), nnx.BatchStat(y)), expected)
    np.testing.assert_array_equal(op(np.asarray(x), nnx.Param(y)), expected)
    np.testing.assert_array_equal(op(nnx.Param(x), 2), op(x, 2))
    np.testing.assert_array_equal(op(2, nnx.Param(x)), op(2, x))

  @parameterized.parameters(*INTEGER_BINARY)
  def test_integer_binary(self, op):
    x, y = jnp.array([5, 6]), jnp.array([1, 3])
    np.testing.assert_array_equal(op(nnx.Param(x), y), op(x, y))
    np.testing.assert_array_equal(op(x, nnx.Param(y)), op(x, y))

  @parameterized.parameters(
    operator.lt, operator.le, operator.gt, operator.ge, operator.ne
  )
  def test_comparison(self, op):
    x, y = jnp.array([1, 2, 3]), jnp.array([2, 2, 2])
    np.testing.assert_array_equal(op(nnx.Param(x), nnx.Param(y)), op(x, y))

  def test_matmul_and_divmod(self):
    x = jnp.arange(4.0).reshape(2, 2)
    np.testing.assert_array_equal(nnx.Param(x) @ x, x @ x)
    np.testing.assert_array_equal(x @ nnx.Param(x), x @ x)
    self.assertEqual(divmod(nnx.Param(7), 2), (3, 1))
    self.assertEqual(divmod(7, nnx.Param(2)), (3, 1))

  @parameterized.parameters(*UNARY)
  def test_unary(self, op):
    x = jnp.array([-1.0, 2.0])
    np.testing.assert_array_equal(op(nnx.Param(x)), op(x))

  def test_invert(self):
    self.assertEqual(~nnx.Param(5), ~5)

  @parameterized.parameters(
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.imatmul,
    operator.ilshift,
    operator.irshift,
    operator.iand,
    operator.ixor,
    operator.ior,
  )
  def test_in_place_writes_the_value_as_in_flax_0_10(self, op):
    # 0.12 refuses it.
    matrix = op is operator.imatmul
    x = jnp.ones((2, 2)) if matrix else jnp.array([6, 7])
    y = jnp.full((2, 2), 2.0) if matrix else jnp.array([1, 2])
    if op is operator.itruediv:
      x, y = x.astype(float), y.astype(float)
    for other in (y, nnx.Param(y)):
      module = nnx.Dict(p=nnx.Param(x))
      before = module.p
      before = op(before, other)
      self.assertIs(before, module.p)
      self.assertIsInstance(module.p, nnx.Param)
      np.testing.assert_array_equal(module.p.value, op(x, y))

  def test_in_place_runs_hooks_and_writes_refs(self):
    p = nnx.Param(
      jnp.float32(1),
      get_value_hooks=lambda _, x: x + 1,
      set_value_hooks=lambda _, x: x * 2,
    )
    p += 3
    self.assertEqual(p.raw_value, 10)
    ref = nnx.Param(jnp.float32(1), ref=True)
    kept = ref.raw_value
    ref += 2
    self.assertIs(ref.raw_value, kept)
    self.assertEqual(ref.value, 3)

  def test_in_place_leaves_arrays_of_numpy_alone(self):
    array = np.ones(2)
    p = nnx.Param(array)
    p += 1
    np.testing.assert_array_equal(array, 1)
    np.testing.assert_array_equal(p.value, 2)

  def test_in_place_on_an_attribute(self):
    class Counter(nnx.Module):
      def __init__(self):
        self.count = nnx.Variable(jnp.array(0))

      def __call__(self):
        self.count += 1

    counter = Counter()
    count = counter.count
    nnx.jit(Counter.__call__)(counter)
    counter()
    self.assertIs(counter.count, count)
    self.assertEqual(count.value, 2)

  def test_unhashable_as_in_flax(self):
    for lib in (nnx, flax_nnx):
      with self.assertRaises(TypeError):
        hash(lib.Param(1))


if __name__ == "__main__":
  absltest.main()
