"""Runs `names_cases` in a process of its own: the switch is for a process."""

import os
import subprocess
import sys

from absl.testing import absltest


class NamesTest(absltest.TestCase):
  def test_cases(self):
    done = subprocess.run(
      [sys.executable, "-W", "ignore", "tests/nnx/as_flax/names_cases.py"],
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
      },
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-4000:])
    self.assertRegex(done.stderr, r"Ran \d\d tests")


if __name__ == "__main__":
  absltest.main()
