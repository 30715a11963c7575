"""Runs the cases in processes of their own: the switch is for a process."""

import os
import subprocess
import sys

from absl.testing import absltest, parameterized


class NamesTest(parameterized.TestCase):
  @parameterized.parameters("names_cases", "earlier_cases")
  def test_cases(self, name):
    done = subprocess.run(
      [sys.executable, "-W", "ignore", f"tests/nnx/as_flax/{name}.py"],
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
