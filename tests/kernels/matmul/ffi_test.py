"""The CPU's handlers of matmul refuse what does not fit."""

from absl.testing import parameterized

from tests.kernels.matmul import lies


class HandlersTest(parameterized.TestCase):
  @parameterized.parameters("float32", "bfloat16")
  def test_every_lie_is_refused_by_name(self, dtype):
    self.assertGreater(lies.check("cpu", dtype), 220)
