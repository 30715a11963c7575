"""batch_norm over two real processes."""

import pathlib

from absl.testing import absltest

from tests.testing import two_processes


class TwoProcessTest(absltest.TestCase):
  def test_statistics_and_gradients_cross_processes(self):
    two_processes.run(pathlib.Path(__file__).with_name("two_process_worker.py"))


if __name__ == "__main__":
  absltest.main()
