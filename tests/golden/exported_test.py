"""Artifacts of `jax.export` that were made long ago still run."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

import kernels  # noqa: F401, whose targets are promised
from kernels.common import libraries, partitioner
import nnx  # noqa: F401, which makes its types known to jax

FOLDER = pathlib.Path(__file__).parent
FILES = sorted(path.stem for path in FOLDER.glob("*.npz"))


@pytest.mark.parametrize("name", FILES)
def test_a_process_that_traced_nothing_runs_them(name):
  done = subprocess.run(
    [sys.executable, FOLDER / "exported.py", "run", name],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr[-4000:]
  assert "is right" in done.stdout


def targets_of(name: str) -> set[str]:
  """Returns the custom calls of all artifacts of a file."""
  contents = np.load(FOLDER / f"{name}.npz")
  found = set()
  for key in contents:
    if key.endswith("/artifact"):
      blob = bytearray(contents[key].tobytes())
      text = jax.export.deserialize(blob).mlir_module()
      found |= set(re.findall(r"custom_call @(\w+)", text))
  return found


def test_each_handler_is_in_some_artifact():
  promised = {partitioner.TARGET} | libraries.targets()
  found = set().union(*map(targets_of, FILES))
  missing = sorted(promised - found)
  assert not missing, (
    f"No kept artifact calls {', '.join(missing)}. Add a program to"
    " tests/golden/exported.py and make one more file with it."
  )


def test_nothing_of_the_maker_is_kept():
  for name in FILES:
    for key, value in np.load(FOLDER / f"{name}.npz").items():
      assert not key.endswith("/artifact") or b".py" not in value.tobytes()
