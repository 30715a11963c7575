"""A cache split over two real processes, joined by jax.distributed."""

import os
import pathlib
import socket
import subprocess
import sys

from absl.testing import absltest

_WORKER = pathlib.Path(__file__).with_name("two_process_worker.py")


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


class TwoProcessTest(absltest.TestCase):
  def test_decoding_crosses_processes(self):
    port = _free_port()
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    env.pop("XLA_FLAGS", None)
    workers = [
      subprocess.Popen(
        [sys.executable, str(_WORKER), str(port), str(rank)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
      )
      for rank in range(2)
    ]
    try:
      for rank, worker in enumerate(workers):
        output, _ = worker.communicate(timeout=120)
        self.assertEqual(worker.returncode, 0, output[-4000:])
        self.assertIn(f"process {rank} of 2: ok", output)
    finally:
      for worker in workers:
        if worker.poll() is None:
          worker.kill()
          worker.communicate()


if __name__ == "__main__":
  absltest.main()
