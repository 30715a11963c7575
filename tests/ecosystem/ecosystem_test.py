"""Programs on libraries of Flax NNX compute on `nnx` what they do on Flax."""

import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

PROGRAMS = pathlib.Path("tests/ecosystem/programs")
# Of the largest magnitude in an array: ours sums the statistics of a batch in
# another order than XLA, which twenty steps of an optimizer carry on.
TOLERANCE = 1e-4


def run(program: str, *switch: str) -> Any:
  done = subprocess.run(
    [sys.executable, *switch, str(PROGRAMS / f"{program}.py")],
    env={
      **os.environ,
      "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
      "PYTHONWARNINGS": "ignore",  # of the libraries and of Flax
    },
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])


def compare(ours: Any, theirs: Any, name: str) -> float:
  """Returns the largest difference, relative to the array that it is in."""
  if isinstance(theirs, dict):
    assert ours.keys() == theirs.keys(), name
    return max(compare(ours[k], theirs[k], f"{name}/{k}") for k in theirs)
  ours, theirs = np.asarray(ours), np.asarray(theirs)
  assert ours.shape == theirs.shape, name
  if theirs.dtype.kind not in "fi":
    np.testing.assert_array_equal(ours, theirs, name)
    return 0.0
  if not theirs.size:
    return 0.0
  scale = np.abs(theirs).max() or 1.0
  np.testing.assert_allclose(
    ours, theirs, rtol=0, atol=TOLERANCE * scale, err_msg=name
  )
  return float(np.abs(ours - theirs).max() / scale)


@pytest.mark.parametrize(
  "program, package",
  [
    ("bijx_flow", "bijx"),
    ("cax_automaton", "cax"),
    ("keras_sequential", "keras"),
    ("numpyro_modules", "numpyro"),
    ("qwix_quantization", "qwix"),
    ("tunix_training", "google-tunix"),
    # In the manner of public tutorials.
    ("bridged_models", "flax"),
    ("ensemble_q_learning", "flax"),
    ("gpt_scan", "flax"),
    ("resumed_training", "flax"),
    ("states_and_averages", "flax"),
    ("vae_optimizers", "flax"),
  ],
)
def test_a_program_computes_the_same(program, package):
  theirs = run(program)
  ours = run(program, "-m", "nnx.as_flax")
  assert theirs
  difference = compare(ours, theirs, program)
  version = importlib.metadata.version(package)
  print(f"{package} {version}: largest difference {difference:.1e}")


def test_a_difference_is_seen():
  with pytest.raises(AssertionError, match="x/losses"):
    compare({"losses": [1.0, 2.0]}, {"losses": [1.0, 2.1]}, "x")
