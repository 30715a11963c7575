"""The CPU's handlers of batch_stat refuse what does not fit."""

from absl.testing import parameterized

from kernels.batch_stat import ffi
from tests.kernels.batch_stat import lies


class HandlersTest(parameterized.TestCase):
  @parameterized.parameters("float32", "bfloat16")
  def test_every_lie_is_refused_by_name(self, dtype):
    told = lies.check("cpu", dtype, ffi.HANDLERS, workspace=False)
    self.assertGreater(told, 300)
