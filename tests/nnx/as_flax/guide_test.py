"""The code of docs/from_flax.md runs, each block as a program."""

import os
import pathlib
import re
import subprocess
import sys

from absl.testing import absltest, parameterized

GUIDE = pathlib.Path("docs/from_flax.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)


class GuideTest(parameterized.TestCase):
  def test_there_are_blocks(self):
    self.assertGreaterEqual(len(BLOCKS), 3)

  @parameterized.parameters(*range(len(BLOCKS)))
  def test_block(self, index):
    done = subprocess.run(
      [sys.executable, "-W", "ignore", "-c", BLOCKS[index]],
      env={
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path]),
      },
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)


if __name__ == "__main__":
  absltest.main()
