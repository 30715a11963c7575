"""The example of several hosts, as processes on loopback that die and leave."""

import functools
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
import time

from absl.testing import absltest, parameterized
import jax
import numpy as np

from examples import several_hosts
import nnx
from tests.testing import devices

devices.use_cpu_devices(8)

LONG = bool(os.environ.get("NNX_LONG"))


class Job:
  """A job in a folder, of which processes come and go."""

  def __init__(self, folder):
    self.folder = pathlib.Path(folder)
    self.seen = 0

  def start(self, processes, each, layout="all", steps=1000, pause=0.2):
    (self.folder / "losses.jsonl").touch()
    self.seen += len(self.losses())
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "programs"),
    }
    return several_hosts.launch(
      processes,
      each,
      [
        f"--folder={self.folder}",
        f"--layout={layout}",
        f"--steps={steps}",
        f"--pause={pause}",
        "--save_every=2",
      ],
      env=env,
    )

  def losses(self):
    """Returns pairs of steps and losses, of the last start alone."""
    text = (self.folder / "losses.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [(line["step"], line["loss"]) for line in lines[self.seen :]]

  def wait_for(self, step, processes):
    """Waits until a step has been done."""
    deadline = time.monotonic() + 240
    while not any(done >= step for done, _ in self.losses()):
      assert all(process.poll() is None for process in processes)
      assert time.monotonic() < deadline, self.losses()
      time.sleep(0.05)

  def checkpoints(self):
    names = os.listdir(self.folder / "checkpoints")
    return sorted(int(name) for name in names if name.isdigit())


@functools.cache
def losses_of_one_process(steps):
  with tempfile.TemporaryDirectory() as folder:
    job = Job(folder)
    several_hosts.train(several_hosts.LAYOUTS["data"], folder, steps, 100)
    return [loss for _, loss in job.losses()]


class SeveralHostsTest(parameterized.TestCase):
  def folder(self):
    return self.enterContext(tempfile.TemporaryDirectory())

  def test_a_job_goes_on_whatever_happens_to_its_processes(self):
    job = Job(self.folder())
    self.assertEqual(several_hosts.wait(job.start(2, 2, steps=12, pause=0)), 0)
    first = dict(job.losses())
    self.assertEqual(list(first), list(range(1, 13)))
    self.assertLess(first[12], first[1] - 1)
    self.assertEqual(job.checkpoints(), [8, 10, 12])

    # One of two is killed, and the scheduler takes the other away.
    for step in (10, 12):
      shutil.rmtree(job.folder / "checkpoints" / str(step))
    processes = job.start(2, 2)
    job.wait_for(10, processes)
    processes[1].kill()
    self.assertNotEqual(several_hosts.wait(processes), 0)
    again = job.losses()
    self.assertEqual(again[0][0], 9)
    for step, loss in again:
      # On as many processes and devices, every bit is the same.
      self.assertEqual(loss, first.get(step, loss))

    # Four go on where two were, until one of them gets a notice.
    last = job.checkpoints()[-1]
    self.assertIn(last, (8, 10, 12))
    processes = job.start(4, 1)
    job.wait_for(last + 2, processes)
    processes[2].send_signal(signal.SIGTERM)
    self.assertEqual(several_hosts.wait(processes), 0)
    more = job.losses()
    self.assertEqual(more[0][0], last + 1)
    known = first | dict(again)
    for step, loss in more[:2]:
      np.testing.assert_allclose(loss, known.get(step, loss), rtol=1e-4)
    self.assertEqual(job.checkpoints()[-1], more[-1][0])

  def test_layouts_train_alike(self):
    devices.need_devices(8)
    losses = {}
    for name in several_hosts.LAYOUTS if LONG else ("data", "all"):
      layout = several_hosts.LAYOUTS[name]
      job = Job(self.folder())
      self.assertTrue(several_hosts.train(layout, str(job.folder), 3, 100))
      losses[name] = [loss for _, loss in job.losses()]
      with layout.on(layout.mesh()):
        kernel = several_hosts.Block(nnx.Rngs(0)).up.kernel.value
      split = kernel.size // kernel.addressable_shards[0].data.size
      self.assertEqual(
        split, {"data": 1, "fsdp": 8, "tensor": 2, "all": 8}[name]
      )
    for name in losses:
      np.testing.assert_allclose(losses[name], losses["data"], rtol=1e-4)

  def test_a_layout_that_does_not_divide_the_devices(self):
    layout = several_hosts.Layout(model=jax.device_count() + 1)
    with self.assertRaisesRegex(ValueError, "must be a multiple of"):
      layout.mesh()

  @parameterized.product(
    layout=tuple(several_hosts.LAYOUTS), shape=((2, 2), (4, 1), (4, 2))
  )
  def test_layouts_over_processes(self, layout, shape):
    if not LONG:
      self.skipTest("only with NNX_LONG=1")
    job = Job(self.folder())
    self.assertEqual(
      several_hosts.wait(job.start(*shape, layout, steps=4, pause=0)), 0
    )
    np.testing.assert_allclose(
      [loss for _, loss in job.losses()], losses_of_one_process(4), rtol=1e-4
    )


if __name__ == "__main__":
  absltest.main()
