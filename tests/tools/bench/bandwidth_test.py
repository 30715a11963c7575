"""Tests of the floor's clock; the machine's speed is not judged."""

from unittest import mock

from absl.testing import absltest, parameterized
import jax

from tools.bench import bandwidth


class MoverTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("nothing", 0, 0),
    ("one_byte", 1, 0),
    ("reads", 2**20, 0),
    ("writes", 0, 2**20),
    ("copy", 2**20, 2**20),
    ("copy_and_reads", 2**20, 2**18),
    ("copy_and_writes", 2**18, 2**20),
  )
  def test_takes_time_on_host_and_device(self, read, written):
    traffic = bandwidth.Traffic(read, written)
    self.enter_context(mock.patch.object(bandwidth, "_COPY_BYTES", 2**16))
    for backend in ("cpu", "gpu"):
      with mock.patch.object(jax, "default_backend", return_value=backend):
        self.assertGreater(bandwidth.Mover(traffic).seconds(), 0)

  def test_device_takes_the_bytes_at_the_speed_of_a_copy(self):
    copied = []
    self.enter_context(mock.patch.object(bandwidth, "_COPY_BYTES", 2**20))
    self.enter_context(mock.patch.object(jax, "default_backend", lambda: "gpu"))
    self.enter_context(
      mock.patch.object(bandwidth, "_device_copy", lambda: copied.append)
    )
    clock = iter([10.0, 10.0 + 6.0])
    self.enter_context(
      mock.patch.object(
        bandwidth, "time", mock.Mock(perf_counter=lambda: next(clock))
      )
    )
    mover = bandwidth.Mover(bandwidth.Traffic(2**20, 2**21))
    seconds = mover.seconds()
    # Two that warm up, and those that are timed: each reads and writes 1 MiB.
    self.assertEqual(copied[:2], [1, 1])
    self.assertAlmostEqual(seconds, 6.0 / copied[2] * 3 / 2)


if __name__ == "__main__":
  absltest.main()
