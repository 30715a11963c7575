"""Tests of what connects devices, by times that are had by hand."""

import math

from absl.testing import absltest, parameterized
import hypothesis
from hypothesis import strategies as st

from tests.tools.plan import round_chip
from tools.plan import chips, fabric, mesh, refusal

PROPERTY = hypothesis.settings(
  derandomize=True, deadline=None, max_examples=100
)


def switch(size, bandwidth, hop=0.0, start=0.0):
  return fabric.Tier(size, bandwidth, bandwidth, size - 1, hop, start)


class CollectivesTest(parameterized.TestCase):
  def test_gather_of_a_ring(self):
    # 7 parts of 100 bytes arrive at 10 bytes a second; 7 hops and a start.
    took = fabric.gather_seconds([switch(8, 10.0, 0.5, 2.0)], 800)
    self.assertAlmostEqual(took, 70 + 7 * 0.5 + 2)

  def test_reduce_is_twice_a_gather(self):
    tiers = [switch(4, 10.0, 0.1)]
    self.assertAlmostEqual(
      fabric.reduce_seconds(tiers, 400), 2 * (30 + 3 * 0.1)
    )

  def test_the_slowest_tier_decides(self):
    # Of 800 bytes 700 come over the fast links; of the 100 of a device's own
    # group of eight, half comes over the slow one.
    tiers = [switch(8, 100.0), switch(2, 1.0)]
    self.assertAlmostEqual(fabric.gather_seconds(tiers, 800), 50)

  def test_exchange_behind_a_switch(self):
    self.assertAlmostEqual(fabric.exchange_seconds([switch(4, 10.0)], 400), 30)

  def test_exchange_in_a_ring_passes_a_quarter(self):
    tier = fabric.Tier(16, 10.0, 5.0, 8, 0.0, 0.0, ring=True)
    self.assertAlmostEqual(fabric.exchange_seconds([tier], 160), 150 * 4 / 10)

  def test_shift_takes_one_link(self):
    tier = fabric.Tier(16, 10.0, 5.0, 8, 0.5, 1.0, ring=True)
    self.assertAlmostEqual(fabric.shift_seconds([tier], 10), 2 + 0.5 + 1)

  def test_one_device_sends_nothing(self):
    for collective in (
      fabric.gather_seconds,
      fabric.exchange_seconds,
      fabric.shift_seconds,
    ):
      self.assertEqual(collective((), 1e9), 0)

  @PROPERTY
  @hypothesis.given(
    sizes=st.lists(st.integers(2, 64), min_size=1, max_size=3),
    bandwidth=st.floats(1e6, 1e12),
    size=st.floats(1.0, 1e12),
    factor=st.floats(1.0, 100.0),
  )
  def test_grows_with_size_and_not_with_bandwidth(
    self, sizes, bandwidth, size, factor
  ):
    slow = [switch(n, bandwidth, 1e-6, 1e-6) for n in sizes]
    fast = [switch(n, bandwidth * factor, 1e-6, 1e-6) for n in sizes]
    for collective in (
      fabric.gather_seconds,
      fabric.exchange_seconds,
      fabric.shift_seconds,
    ):
      took = collective(slow, size)
      self.assertLessEqual(collective(fast, size), took * (1 + 1e-9))
      self.assertGreaterEqual(
        collective(slow, size * factor), took * (1 - 1e-9)
      )


class FabricTest(parameterized.TestCase):
  def test_inner_axes_are_behind_the_first_switch(self):
    tiers = round_chip.CHIP.fabric.tiers(mesh.Mesh(tensor=4, fsdp=16))
    self.assertEqual([t.size for t in tiers["tensor"]], [4])
    self.assertEqual([t.size for t in tiers["fsdp"]], [2, 8])
    self.assertEqual([t.bandwidth for t in tiers["fsdp"]], [1e11, 1e10])
    self.assertEqual(tiers["data"], ())

  @parameterized.parameters(
    ("v5e", 64, (8, 8)),
    ("v5e", 256, (16, 16)),
    ("v6e", 8, (4, 2)),
    ("v5p", 64, (4, 4, 4)),
    ("v5p", 512, (8, 8, 8)),
  )
  def test_grids(self, chip, devices, grid):
    self.assertEqual(chips.CHIPS[chip].fabric.grid(devices), grid)

  def test_a_whole_row_of_16_wraps(self):
    torus = chips.CHIPS["v5e"].fabric
    both = torus.tiers(mesh.Mesh(tensor=16, fsdp=16))
    for name in ("tensor", "fsdp"):
      (tier,) = both[name]
      self.assertEqual(tier.bandwidth, 2 * tier.link)
      self.assertEqual(tier.hops, 8)

  def test_a_row_of_8_does_not(self):
    (tier,) = chips.CHIPS["v5e"].fabric.tiers(mesh.Mesh(tensor=8, fsdp=8))[
      "tensor"
    ]
    self.assertEqual(tier.bandwidth, tier.link)
    self.assertEqual(tier.hops, 7)

  def test_one_axis_has_both_sides_of_the_grid(self):
    (tier,) = chips.CHIPS["v5e"].fabric.tiers(mesh.Mesh(fsdp=256))["fsdp"]
    self.assertEqual(tier.bandwidth, 4 * tier.link)

  def test_several_grids_are_along_data(self):
    tiers = chips.CHIPS["v5e"].fabric.tiers(mesh.Mesh(fsdp=256, data=4))
    self.assertEqual([t.size for t in tiers["data"]], [4])
    self.assertFalse(tiers["data"][0].ring)
    with self.assertRaisesRegex(
      refusal.Refused, "`data`=1 must be a multiple of `grids`=2"
    ):
      chips.CHIPS["v5e"].fabric.tiers(mesh.Mesh(fsdp=512))

  def test_refuses_what_makes_no_grid(self):
    with self.assertRaisesRegex(
      refusal.Refused, "17 devices make no grid inside of 16x16"
    ):
      chips.CHIPS["v5e"].fabric.grid(17)

  def test_a_shared_machine_divides_what_it_has(self):
    shared = fabric.Shared(round_chip.link(8e9, start=1.0))
    (tier,) = shared.tiers(mesh.Mesh(data=4))["data"]
    self.assertEqual(tier.bandwidth, 2e9)
    self.assertEqual(tier.latency, 1.0)

  @PROPERTY
  @hypothesis.given(
    st.sampled_from(sorted(chips.CHIPS)),
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
  )
  def test_tiers_have_all_devices_of_an_axis(self, name, powers):
    axes = mesh.Mesh(*(2**power for power in powers))
    hypothesis.assume(axes.devices <= 256)
    tiers = chips.CHIPS[name].fabric.tiers(axes)
    for axis, size in axes.sizes.items():
      self.assertEqual(math.prod(t.size for t in tiers[axis]), size)


if __name__ == "__main__":
  absltest.main()
