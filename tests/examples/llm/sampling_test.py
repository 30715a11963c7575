"""Which tokens are chosen, and how often."""

from absl.testing import absltest, parameterized
import numpy as np

from examples.llm import sampling

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.05, 0.25], np.float32))


def kept(**options) -> dict[int, float]:
  tokens, probabilities = sampling.distribution(
    LOGITS, sampling.Sampling(**({"temperature": 1.0} | options))
  )
  return dict(zip(tokens.tolist(), probabilities.tolist()))


class SamplingTest(parameterized.TestCase):
  def test_without_temperature_the_likeliest_is_taken(self):
    how = sampling.Sampling()
    self.assertTrue(how.is_argmax)
    self.assertEqual(sampling.choose(LOGITS, how, [], 0), 1)

  @parameterized.parameters(
    ({}, [0.1, 0.4, 0.2, 0.05, 0.25]),
    ({"top_k": 2}, [0, 0.4, 0, 0, 0.25]),
    ({"top_k": 9}, [0.1, 0.4, 0.2, 0.05, 0.25]),
    ({"top_p": 0.6}, [0, 0.4, 0, 0, 0.25]),
    ({"top_p": 0.66}, [0, 0.4, 0.2, 0, 0.25]),
    ({"top_p": 1e-9}, [0, 0.4, 0, 0, 0]),
    ({"min_p": 0.3}, [0, 0.4, 0.2, 0, 0.25]),
    ({"top_k": 3, "top_p": 0.5}, [0, 0.4, 0, 0, 0.25]),
    ({"temperature": 0.5}, [0.01, 0.16, 0.04, 0.0025, 0.0625]),
  )
  def test_filters_keep_the_likeliest(self, options, weights):
    expected = np.array(weights) / sum(weights)
    probabilities = kept(**options)
    self.assertEqual(set(probabilities), set(np.flatnonzero(expected).tolist()))
    for token, probability in probabilities.items():
      self.assertAlmostEqual(probability, expected[token], places=6)

  def test_frequencies_are_the_probabilities(self):
    how = sampling.Sampling(temperature=1.0, top_k=4, seed=3)
    count = 20_000
    drawn = np.bincount(
      [sampling.choose(LOGITS, how, [], i) for i in range(count)], minlength=5
    )
    expected = np.array([0.1, 0.4, 0.2, 0, 0.25]) / 0.95
    # Five standard deviations.
    bound = 5 * np.sqrt(expected * (1 - expected) / count)
    np.testing.assert_array_less(
      np.abs(drawn / count - expected), bound + 1e-12
    )

  def test_the_seed_and_the_position_decide(self):
    def text(seed):
      how = sampling.Sampling(temperature=1.0, seed=seed)
      return [sampling.choose(LOGITS, how, [], i) for i in range(50)]

    self.assertEqual(text(1), text(1))
    self.assertNotEqual(text(1), text(2))

  def test_repetition_is_penalised_on_both_sides_of_zero(self):
    logits = np.array([2.0, -2.0, 1.0], np.float32)
    how = sampling.Sampling(repetition_penalty=2.0)
    self.assertFalse(how.is_argmax)
    result = sampling.penalized(logits, how, [0, 1, 1])
    np.testing.assert_array_equal(result, [1.0, -4.0, 1.0])
    np.testing.assert_array_equal(logits, [2.0, -2.0, 1.0])

  @parameterized.parameters(
    ("temperature", -1.0, "at least 0"),
    ("top_k", -1, "at least 0"),
    ("top_p", 0.0, r"in \(0, 1\]"),
    ("min_p", 1.5, r"in \[0, 1\]"),
    ("repetition_penalty", 0.0, "positive"),
    ("seed", -1, "at least 0"),
  )
  def test_numbers_out_of_range_are_refused(self, name, value, words):
    with self.assertRaisesRegex(
      ValueError, f"`{name}` must be {words}, but got {value}"
    ):
      sampling.Sampling(**{name: value})


if __name__ == "__main__":
  absltest.main()
