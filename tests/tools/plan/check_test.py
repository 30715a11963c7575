"""Tests of the comparison with virtual devices, on any machine.

How well plans meet them is on docs/planning.md; here it is asked that both
sides can be had, and are not absurd.
"""

from absl.testing import absltest, parameterized

from tests.testing import devices
from tools.plan import check, host, mesh, model

devices.use_cpu_devices(2)

TIMER = host.Timer("cpu", samples=1, least=0.0)
SMALL = model.Model(2, 64, 4, 4, 16, 128, 64, gated=False)


class CheckTest(parameterized.TestCase):
  @parameterized.parameters(
    (False, "data", 1),
    (False, "tensor", 2),
    (True, "data", 2),
    (True, "tensor", 2),
  )
  def test_plans_and_measures(self, decode, axis, count):
    devices.need_devices(count)
    trial = check.Trial(decode, axis, count, SMALL, 4, 32)
    measured, plan = trial.compare(TIMER)
    self.assertGreater(plan.seconds, 0)
    # Tiny arrays and a busy machine: dispatch alone is most of a step.
    self.assertBetween(plan.seconds / measured, 1 / 50, 50)

  @parameterized.parameters(("data", (1, 4, 4, 128)), ("tensor", (4, 1, 1, 32)))
  def test_kernels_have_the_sizes_of_a_device(self, axis, expected):
    sizes = check.Trial(True, axis, 4, SMALL, 4, 32).sizes()
    own = sizes.model
    self.assertEqual(
      (sizes.rows, own.heads, own.kv_heads, own.hidden), expected
    )
    self.assertEqual(own.features, SMALL.features)

  @parameterized.parameters(False, True)
  def test_rates_are_what_was_timed(self, decode):
    devices.need_devices(2)
    machine = host.Machine(2, host.Sizes(SMALL, 2, 32), decode)
    slow, fast = (
      machine.chip([factor] * (len(machine.calls) - 2) + [0.5, 1.0])
      for factor in (2.0, 1.0)
    )
    rates = ("weights",) if decode else ("attention", "norms", "copy")
    for name in rates:
      one, other = getattr(slow, name).reached, getattr(fast, name).reached
      self.assertAlmostEqual(2 * one, other, delta=1e-6 * other)
    self.assertEqual(slow.kernel, 2 * fast.kernel)
    self.assertEqual(slow.fabric, fast.fabric)

  def test_the_trials_of_eight_devices(self):
    trials = list(check.trials([1, 2, 4, 8]))
    self.assertLen(trials, 2 * (1 + 3 * 2))
    for trial in trials:
      axes = mesh.Mesh(**{trial.axis: trial.devices})
      self.assertEqual(trial.batch % axes.batch, 0)
      self.assertEqual(trial.model.heads % axes.tensor, 0)

  def test_more_devices_share_what_there_is(self):
    devices.need_devices(2)
    machine = host.Machine(2, host.Sizes(SMALL, 2, 32), decode=False)
    chip = machine.chip(TIMER.seconds(machine.calls))
    (tier,) = chip.fabric.tiers(mesh.Mesh(data=2))["data"]
    self.assertEqual(tier.bandwidth, chip.fabric.link.bandwidth / 2)


if __name__ == "__main__":
  absltest.main()
