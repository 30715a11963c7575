"""Tests of the bandwidth table; the machine's speed is not judged."""

from absl.testing import absltest

from tools.bench import bandwidth


class BandwidthTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.table = bandwidth.Bandwidth(
      read={100: 400.0, 10000: 100.0}, copy={100: 200.0, 10000: 50.0}
    )

  def test_reads_only(self):
    self.assertAlmostEqual(self.table.seconds(read=100, written=0), 0.25)

  def test_copy_counts_both_directions(self):
    self.assertAlmostEqual(self.table.seconds(read=50, written=50), 0.5)

  def test_surplus_reads_go_at_the_rate_of_reads(self):
    # 40 read and 40 written at 200 a second, 20 more read at 400.
    self.assertAlmostEqual(self.table.seconds(read=60, written=40), 0.45)

  def test_sizes_in_between_are_interpolated(self):
    # Half way on the logarithmic scale: the geometric mean of the rates.
    self.assertAlmostEqual(self.table.seconds(read=1000, written=0), 5.0)

  def test_sizes_outside_take_the_nearest(self):
    self.assertAlmostEqual(self.table.seconds(read=4, written=0), 0.01)
    self.assertAlmostEqual(self.table.seconds(read=10**6, written=0), 10**4)

  def test_measures_every_size(self):
    table = bandwidth.Bandwidth.measure(quick=True)
    self.assertEqual(tuple(table.read), bandwidth.QUICK_SIZES)
    self.assertEqual(tuple(table.copy), bandwidth.QUICK_SIZES)
    for rate in (*table.read.values(), *table.copy.values()):
      self.assertGreater(rate, 0)


if __name__ == "__main__":
  absltest.main()
