"""What the engine looks at stays while Python code runs: `lifetime_cases`."""

import os
import subprocess
import sys

from absl.testing import absltest, parameterized

from tests.nnx.engine import lifetime_cases


class LifetimeTest(parameterized.TestCase):
  @parameterized.parameters(*[case.__name__ for case in lifetime_cases.CASES])
  def test_nothing_that_was_freed_is_read(self, name):
    # Memory that was freed is filled, or known to the sanitizer.
    asan = "libasan" in os.environ.get("LD_PRELOAD", "")
    environment = os.environ | {
      "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
      "PYTHONMALLOC": "malloc" if asan else "debug",
      "PYTHONFAULTHANDLER": "1",
    }
    code = f"from tests.nnx.engine import lifetime_cases as c; c.{name}()"
    done = subprocess.run(
      [sys.executable, "-c", code],
      env=environment,
      capture_output=True,
      text=True,
      timeout=250,
    )
    self.assertEqual(done.returncode, 0, done.stderr[-4000:])


if __name__ == "__main__":
  absltest.main()
