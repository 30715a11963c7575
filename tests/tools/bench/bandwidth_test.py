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
    for backend in ("cpu", "gpu"):
      with mock.patch.object(jax, "default_backend", return_value=backend):
        self.assertGreater(bandwidth.Mover(traffic).seconds(), 0)


if __name__ == "__main__":
  absltest.main()
