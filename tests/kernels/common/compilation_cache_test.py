"""The persistent compilation cache tells programs apart and finds them."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

from absl.testing import absltest

WORKER = pathlib.Path(__file__).with_name("compilation_cache_worker.py")


def _run(mode: str, directory: str) -> dict[str, Any]:
  """Runs the worker in a process with an environment like a user's."""
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
  }
  done = subprocess.run(
    [sys.executable, str(WORKER), mode, directory],
    env=env,
    capture_output=True,
    text=True,
    timeout=280,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  return json.loads(done.stdout.splitlines()[-1])


def _wrong(seen: dict[str, Any]) -> list[str]:
  return [name for name, right in seen["right"].items() if not right]


class CompilationCacheTest(absltest.TestCase):
  def test_a_second_process_finds_every_program(self):
    directory = self.create_tempdir().full_path
    first = _run("sweep", directory)
    self.assertEmpty(_wrong(first))
    self.assertGreater(first["misses"], len(first["right"]) // 2)
    second = _run("sweep", directory)
    self.assertEmpty(_wrong(second))
    self.assertEqual(second["misses"], 0)
    # For other platforms nothing is compiled here: the text is the key.
    self.assertEqual(first["texts"], second["texts"])
    self.assertLen(set(first["texts"].values()), len(first["texts"]))

  def test_no_program_is_taken_for_one_that_is_gone(self):
    seen = _run("loop", self.create_tempdir().full_path)
    self.assertEmpty(_wrong(seen))
    self.assertEqual(seen["hits"], 0)


if __name__ == "__main__":
  absltest.main()
