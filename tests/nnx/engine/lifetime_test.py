"""What the engine looks at stays while Python code runs: `lifetime_cases`."""

import os

from absl.testing import absltest, parameterized

from tests.nnx.engine import lifetime_cases
from tests.testing import forks


class LifetimeTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # Memory that was freed is filled, or known to the sanitizer.
    asan = "libasan" in os.environ.get("LD_PRELOAD", "")
    cls.process = cls.enterClassContext(
      forks.Process(
        [lifetime_cases.__name__],
        environment={
          "PYTHONMALLOC": "malloc" if asan else "debug",
          "PYTHONFAULTHANDLER": "1",
        },
      )
    )

  @parameterized.parameters(*[case.__name__ for case in lifetime_cases.CASES])
  def test_nothing_that_was_freed_is_read(self, name):
    done = self.process.run(
      f"from tests.nnx.engine import lifetime_cases as c; c.{name}()"
    )
    self.assertEqual(done.returncode, 0, done.stderr[-4000:])


if __name__ == "__main__":
  absltest.main()
