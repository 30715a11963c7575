"""Runs a short, fixed part of the fuzzer of the engine."""

from absl.testing import absltest, parameterized

from tests.fuzz import engine_fuzz, worker


class EngineFuzzTest(parameterized.TestCase):
  @parameterized.parameters(*engine_fuzz.FAMILIES)
  def test_nothing_is_found(self, family):
    worker.check(
      "tests.fuzz.engine_fuzz",
      worker.Plan(cases=200, each=100, only=(family,)),
    )


if __name__ == "__main__":
  absltest.main()
