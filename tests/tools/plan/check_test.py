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
    plan = trial.plan(TIMER)
    self.assertGreater(plan.seconds, 0)
    # Tiny arrays and a busy machine: dispatch alone is most of a step.
    self.assertBetween(plan.seconds / trial.measure(TIMER), 1 / 50, 50)

  def test_the_trials_of_eight_devices(self):
    trials = list(check.trials([1, 2, 4, 8]))
    self.assertLen(trials, 2 * (1 + 3 * 2))
    for trial in trials:
      axes = mesh.Mesh(**{trial.axis: trial.devices})
      self.assertEqual(trial.batch % axes.batch, 0)
      self.assertEqual(trial.model.heads % axes.tensor, 0)

  def test_more_devices_share_what_there_is(self):
    devices.need_devices(2)
    chip = host.chip(2, host.Sizes(SMALL, 2, 32), decode=False, timer=TIMER)
    (tier,) = chip.fabric.tiers(mesh.Mesh(data=2))["data"]
    self.assertEqual(tier.bandwidth, chip.fabric.link.bandwidth / 2)


if __name__ == "__main__":
  absltest.main()
