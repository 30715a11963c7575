"""A test over two real processes, joined by jax.distributed on loopback.

The program that both run is a file of its own, `worker`:

    if __name__ == "__main__":
      two_processes.join(work)

and the test is `two_processes.run(worker)`.
"""

from collections.abc import Callable
import os
import pathlib
import socket
import subprocess
import sys

DEVICES_EACH = 2


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


def _ok(rank: int) -> str:
  return f"process {rank} of 2: ok"


def run(worker: pathlib.Path) -> None:
  """Runs a program twice at once, and waits until both have done their work.

  Args:
    worker: the program's file, which calls `join`.

  Raises:
    AssertionError: if one fails, with the end of what it said.
  """
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
  }
  env.pop("XLA_FLAGS", None)
  port = _free_port()
  processes = [
    subprocess.Popen(
      [sys.executable, str(worker), str(port), str(rank)],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for rank in range(2)
  ]
  try:
    for rank, process in enumerate(processes):
      output, _ = process.communicate(timeout=120)
      assert process.returncode == 0, output[-4000:]
      assert _ok(rank) in output, output[-4000:]
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()
        process.communicate()


def join(work: Callable[[], None]) -> None:
  """Does the work of one process, which has half of the four devices.

  Args:
    work: what both processes do; it fails by raising.
  """
  import jax  # not by the test, which would only wait for it

  port, rank = sys.argv[1], int(sys.argv[2])
  jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
  assert jax.device_count() == 2 * DEVICES_EACH, jax.devices()
  work()
  print(_ok(rank), flush=True)
  jax.distributed.shutdown()
