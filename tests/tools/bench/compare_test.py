"""Tests of when two results count as the same."""

from absl.testing import absltest, parameterized
from jax import numpy as jnp
import numpy as np

from tools.bench import compare


class CheckSameTest(parameterized.TestCase):
  @parameterized.parameters("float32", "bfloat16", "float16", "float8_e4m3fn")
  def test_allows_rounding_and_refuses_more(self, dtype):
    allowed = compare.tolerance_of(dtype).relative
    ours = jnp.full(4, 8.0, dtype)
    near = (8 * (1 + allowed / 4) * jnp.ones(4)).astype(dtype)
    far = (8 * (1 + 4 * allowed) * jnp.ones(4)).astype(dtype)
    compare.check_same(ours, near, label="near")
    with self.assertRaises(compare.MismatchError):
      compare.check_same(ours, far, label="far")

  def test_integers_must_be_equal(self):
    with self.assertRaisesRegex(compare.MismatchError, "difference is 1"):
      compare.check_same(jnp.int32(100000), jnp.int32(100001), label="row")

  def test_large_integers_must_be_equal(self):
    with self.assertRaises(compare.MismatchError):
      compare.check_same(jnp.int32(2**24), jnp.int32(2**24 + 1), label="row")

  def test_one_wrong_element_among_many(self):
    ours = np.zeros((300, 300), np.float32)
    theirs = ours.copy()
    theirs[17, 5] = 0.5
    with self.assertRaisesRegex(compare.MismatchError, "0.5"):
      compare.check_same(ours, theirs, label="row")

  @parameterized.parameters((np.nan, 1.0), (1.0, np.nan), (np.nan, np.nan))
  def test_not_a_number_is_refused(self, ours, theirs):
    with self.assertRaises(compare.MismatchError):
      compare.check_same(jnp.float32(ours), jnp.float32(theirs), label="row")

  def test_equal_infinities_agree(self):
    compare.check_same(jnp.float32(np.inf), jnp.float32(np.inf), label="row")
    with self.assertRaises(compare.MismatchError):
      compare.check_same(jnp.float32(np.inf), jnp.float32(-np.inf), label="row")

  def test_structure_must_agree(self):
    with self.assertRaisesRegex(
      compare.MismatchError, "must return the same structure.*'y'"
    ):
      compare.check_same({"x": 1}, {"x": 1, "y": 2}, label="row")

  def test_dtype_and_shape_must_agree(self):
    with self.assertRaisesRegex(
      compare.MismatchError, r"float32\[2\] and bfloat16\[2\]"
    ):
      compare.check_same(jnp.ones(2), jnp.ones(2, jnp.bfloat16), label="row")
    with self.assertRaisesRegex(
      compare.MismatchError, r"float32\[2\] and float32\[3\]"
    ):
      compare.check_same(jnp.ones(2), jnp.ones(3), label="row")

  def test_strings_must_be_equal(self):
    compare.check_same(["a"], ["a"], label="row")
    with self.assertRaisesRegex(compare.MismatchError, "'a' and 'b'"):
      compare.check_same(["a"], ["b"], label="row")

  def test_given_tolerance_wins(self):
    compare.check_same(
      jnp.ones(2),
      jnp.full(2, 1.05),
      label="row",
      tolerance=compare.Tolerance(0.1, 0.0),
    )

  def test_part_of_the_largest_element(self):
    tolerance = compare.Tolerance(0.0, 1e-6, of_largest=0.01)
    ours = jnp.array([0.5, 100.0])
    compare.check_same(
      ours, jnp.array([1.0, 100.0]), label="row", tolerance=tolerance
    )
    with self.assertRaisesRegex(compare.MismatchError, "0.01 of the largest"):
      compare.check_same(
        ours, jnp.array([2.0, 100.0]), label="row", tolerance=tolerance
      )

  def test_empty_arrays_agree(self):
    compare.check_same(jnp.ones((0, 3)), jnp.ones((0, 3)), label="row")

  def test_returns_the_largest_difference(self):
    ours, theirs = jnp.array([0, 1.0]), jnp.array([0, 1.25])
    for pair in ((ours, theirs), ({"x": ours, "y": 1}, {"x": theirs, "y": 1})):
      difference = compare.check_same(
        *pair, label="row", tolerance=compare.Tolerance(0.0, 1.0)
      )
      self.assertEqual(difference, 0.25)


class NormToleranceTest(absltest.TestCase):
  def difference(self, ours, theirs):
    return compare.check_same(
      ours, theirs, label="row", tolerance=compare.NormTolerance(10.0)
    )

  def test_difference_is_of_whole_arrays(self):
    want = jnp.ones(10000), jnp.full((2, 8), 2.0, "bfloat16"), jnp.arange(3)
    self.assertEqual(self.difference(want, want), 0)
    # A gate that is open on one side alone.
    got = want[0].at[7].set(0), *want[1:]
    self.assertAlmostEqual(self.difference(got, want), 0.01)
    # The array that is furthest off counts.
    got = got[0], want[1] * 1.5, want[2]
    self.assertAlmostEqual(self.difference(got, want), 0.5)
    zeros = (jnp.zeros(4),)
    self.assertAlmostEqual(self.difference((jnp.ones(4),), zeros), 2)

  def test_more_than_the_tolerance_is_refused(self):
    with self.assertRaisesRegex(
      compare.MismatchError, "0.4 of the norm .* is 0.5"
    ):
      compare.check_same(
        jnp.full(2, 1.5),
        jnp.ones(2),
        label="row",
        tolerance=compare.NormTolerance(0.4),
      )

  def test_what_is_not_a_number_never_passes(self):
    good = jnp.ones(4)
    for broken in (good.at[1].set(jnp.nan), good.at[1].set(jnp.inf)):
      for got, want in (
        ((broken, good), (good, good)),
        ((good, broken), (good, good)),
        ((broken, good), (broken, good)),
        ((good, good), (good, broken)),
      ):
        with self.assertRaises(compare.MismatchError):
          self.difference(got, want)


if __name__ == "__main__":
  absltest.main()
