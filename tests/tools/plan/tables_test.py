"""Tests that docs/planning.md has the tables that the program makes."""

import pathlib

from absl.testing import absltest, parameterized

from tools.plan import published, tables

PAGE = pathlib.Path("docs/planning.md")


class TablesTest(parameterized.TestCase):
  @parameterized.parameters(*tables.all_tables())
  def test_the_page_has_the_table(self, name):
    self.assertIn(
      tables.all_tables()[name],
      PAGE.read_text(encoding="utf-8"),
      f"Paste the table `{name}` of `python -m tools.plan.main tables`.",
    )

  def test_virtual_devices_are_met_within_30_percent(self):
    rows = tables.checked()
    self.assertLen(rows, 14)
    for row in rows:
      with self.subTest(f"{row['job']}, {row['mesh']}"):
        self.assertBetween(row["predicted"] / row["measured"], 0.7, 1.3)

  def test_published_figures_are_met_to_a_factor(self):
    # A plan knows of no stragglers and no gaps, so it is fast; never so slow
    # that a real system is much faster.
    for figure in published.TRAINING:
      self.assertBetween(figure.predicted / figure.published, 0.9, 1.5)
    for figure in published.DECODING:
      self.assertBetween(figure.predicted / figure.published, 0.9, 2.2)


if __name__ == "__main__":
  absltest.main()
