"""The CPU's handlers of decode attention refuse what does not fit."""

from absl.testing import parameterized

from tests.kernels.decode_attention import lies


class HandlersTest(parameterized.TestCase):
  @parameterized.parameters(
    ("float32", "bsnh", True, True), ("int8", "bnsh", False, True),
    ("bfloat16", "bnsh", True, False), ("float8_e5m2", "bsnh", False, False),
  )  # fmt: skip
  def test_every_lie_is_refused_by_name(self, dtype, layout, many, appends):
    told = lies.check("cpu", dtype, layout, many, appends)
    self.assertGreater(told, 250)
