"""A short part of the kernels' fuzzer: the same cases each time."""

from absl.testing import parameterized

from tests.fuzz import kernels_fuzz, worker


class KernelsFuzzTest(parameterized.TestCase):
  @parameterized.parameters(*kernels_fuzz.FAMILIES)
  def test_finds_nothing(self, family):
    plan = worker.Plan(cases=60, each=20, only=(family,))
    worker.check("tests.fuzz.kernels_fuzz", plan)
