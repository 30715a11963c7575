"""The CPU's handler of the cache update refuses what does not fit."""

from absl.testing import parameterized

from tests.kernels.kv_cache import cases, lies


class HandlerTest(parameterized.TestCase):
  @parameterized.parameters(
    ("float32", "bsnh", False), ("bfloat16", "bnsh", False),
    ("int8", "bsnh", False), ("float16", "bsnh", True),
    ("float8_e4m3fn", "bnsh", True),
  )  # fmt: skip
  def test_every_lie_is_refused_by_name(self, dtype, layout, paged):
    self.assertGreater(lies.check("cpu", dtype, layout, paged), 150)

  def test_every_dtype_of_a_cache_is_lied_about(self):
    # So that a dtype that is added is thought of here.
    self.assertLen(cases.FLOATS + cases.QUANTIZED, 6)
