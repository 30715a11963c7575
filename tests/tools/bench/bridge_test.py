"""Tests of the rows of suite `bridge`."""

from absl.testing import absltest, parameterized

from tools.bench import bridge, harness

SMALL = [
  row
  for quick in (True, False)
  for row in bridge.cases(harness.Settings.for_run(quick=quick))
  if quick or "dense" not in row.case
]


class CasesTest(parameterized.TestCase):
  def test_rows_have_the_promised_names(self):
    wrapped = ("dense", "batch_norm", "batch_norm_train")
    expected = {
      (op, f"{how}_{model}")
      for how in ("eager", "traced", "jitted")
      for op, models in (
        ("to_nnx_call", wrapped),
        ("to_linen_apply", ["dense"]),
      )
      for model in models
    }
    rows = bridge.cases(harness.Settings.for_run(quick=False))
    self.assertEqual({(row.op, row.case) for row in rows}, expected)

  @parameterized.parameters((row,) for row in SMALL)
  def test_both_sides_agree(self, row):
    comparison = row.build()
    self.assertEqual(comparison.clock, harness.THREAD_CPU)
    harness.check(comparison, row.label)


if __name__ == "__main__":
  absltest.main()
