"""docs/flax_names.md has every public name of the Flax that is installed."""

import importlib.metadata
import importlib.util
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest

TABLE = pathlib.Path("docs/flax_names.md")
# In a process of its own: the switch is for a process.
PROGRAM = """
import json, pathlib, sys
import nnx.as_flax
from tools import flax_names
names = flax_names.names_of(pathlib.Path(sys.argv[1]))
print(json.dumps({n: flax_names.status(n, p) for n, p in names.items()}))
"""


def documented() -> dict[str, tuple[list[str], str]]:
  rows = {}
  for line in TABLE.read_text(encoding="utf-8").splitlines():
    if line.startswith("| `") and not line.startswith("| `flax.nnx.`"):
      name, versions, here = line.strip("| ").split(" | ", 2)
      rows[name.strip("`")] = (versions.split(", "), here)
  return rows


class FlaxNamesTest(absltest.TestCase):
  def test_table_is_complete_and_true(self):
    import json

    spec = importlib.util.find_spec("flax")
    flax = pathlib.Path(spec.origin).parent
    done = subprocess.run(
      [sys.executable, "-W", "ignore", "-c", PROGRAM, str(flax)],
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
    found = json.loads(done.stdout)
    self.assertGreater(len(found), 400)
    rows = documented()
    version = importlib.metadata.version("flax")
    having = {n for n, (versions, _) in rows.items() if version in versions}
    self.assertEqual(having, set(found))
    newest = max(
      (v for versions, _ in rows.values() for v in versions),
      key=lambda v: [int(n) for n in v.split(".")],
    )
    for name, status in found.items():
      versions, here = rows[name]
      # A row tells of the newest version that has the name.
      if versions[-1] in (version, newest):
        self.assertEqual(here.partition(":")[0], status.partition(":")[0], name)

  def test_what_differs_says_how(self):
    for name, (_, here) in documented().items():
      if here != "same":
        kind, _, reason = here.partition(": ")
        self.assertIn(kind, ("differs", "refused"), name)
        self.assertTrue(reason, name)


if __name__ == "__main__":
  absltest.main()
