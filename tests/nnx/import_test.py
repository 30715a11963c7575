"""What `import nnx` brings in: little more than jax."""

import shutil
import subprocess
import sys
import tempfile

from absl.testing import absltest

# What takes long to import and few programs need, and what nnx replaces.
HEAVY = (
  "bridge",
  "flax",
  "jax._src.checkify",
  "jax._src.pallas",
  "kernels",
  "optax",
  "orbax",
  "rich",
  "treescope",
)

PROGRAM = f"""
import jax
before = set(sys.modules)
import nnx
print(*(m for m in {HEAVY} if m in sys.modules and m not in before))
"""


class ImportTest(absltest.TestCase):
  def test_nothing_heavy(self):
    path = f"import sys; sys.path[:] = {sys.path!r}"
    done = subprocess.run(
      [sys.executable, "-c", path + PROGRAM],
      capture_output=True,
      check=True,
      text=True,
    )
    self.assertEqual(done.stdout.split(), [])

  def test_a_checkout_that_is_not_built_says_how(self):
    with tempfile.TemporaryDirectory() as folder:
      shutil.copytree("nnx", f"{folder}/nnx", ignore=ignored)
      path = f"import sys; sys.path[:] = {[folder, *sys.path]!r}"
      done = subprocess.run(
        [sys.executable, "-c", f"{path}\nimport nnx"],
        capture_output=True,
        text=True,
      )
    last = done.stderr.strip().splitlines()[-1]
    self.assertIn("run `tools/bazel run //tools:develop` in", last)

  def test_free_threaded_python_is_refused(self):
    self.assertEqual(
      refusal(
        "import sysconfig",
        "sysconfig.get_config_vars()['Py_GIL_DISABLED'] = 1",
      ),
      "ImportError: `nnx` needs a Python with the global lock, but this one is"
      " free-threaded: run a build of CPython 3.11 to 3.14 that is not.",
    )

  def test_an_old_python_is_refused(self):
    self.assertEqual(
      refusal("import jax, sys", "sys.version_info = (3, 10, 13)"),
      "ImportError: `nnx` needs CPython 3.11 to 3.14, but this is Python 3.10.",
    )

  def test_an_old_jax_is_refused(self):
    old = (
      "import jax",
      "jax.__version_info__, jax.__version__ = (0, 8, 0), '0.8.0'",
    )
    end = (
      " jax 0.10.2 or later, but this is jax 0.8.0: run `pip install --upgrade"
      " jax`."
    )
    self.assertEqual(refusal(*old), f"ImportError: `nnx` needs{end}")
    self.assertEqual(
      refusal(*old, imported="kernels"), f"ImportError: `kernels` need{end}"
    )


def refusal(*before, imported="nnx"):
  """Returns the last line of what an import says after some statements."""
  path = f"import sys; sys.path[:] = {sys.path!r}"
  program = "\n".join([path, *before, f"import {imported}"])
  done = subprocess.run(
    [sys.executable, "-c", program], capture_output=True, text=True
  )
  return done.stderr.strip().splitlines()[-1]


ignored = shutil.ignore_patterns("*.so", "cc", "__pycache__")

if __name__ == "__main__":
  absltest.main()
