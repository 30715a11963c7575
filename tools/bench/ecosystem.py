"""Suite `ecosystem`: the same training step of a library, on ours and on Flax.

The library imports `flax.nnx`. One process has ours in its place, as
`nnx.as_flax` puts it, and one has Flax's own: they take turns. Both must have
trained alike before any step is timed.
"""

from collections.abc import Sequence
import functools
import json
import os
import subprocess
import sys
import tempfile
from typing import IO, Any
import weakref

import numpy as np

from tools.bench import compare, harness

NAME = "ecosystem"

_PROGRAMS = ("keras_sequential", "tunix_lora")
# Of an array's own magnitude: ours sums a batch's statistics in another order.
_TOLERANCE = compare.Tolerance(1e-4, 1e-6)


class _Trainer:
  """A process that trains when it is told to.

  Args:
    program: one of `ecosystem_step.PROGRAMS`.
    switch: options of Python that come before.
  """

  def __init__(self, program: str, *switch: str):
    self._errors = tempfile.TemporaryFile("w+")
    self._options = [*switch, "-m", "tools.bench.ecosystem_step", program]
    self._process = subprocess.Popen(
      [sys.executable, *self._options],
      env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._errors,
      text=True,
    )
    weakref.finalize(self, _end, self._process, self._errors)

  def answer(self) -> Any:
    """Returns what it says next."""
    assert self._process.stdout is not None
    line = self._process.stdout.readline()
    if not line:
      self._errors.seek(0)
      raise RuntimeError(
        f"`python {' '.join(self._options)}` must train, but:"
        f" {self._errors.read()[-4000:]}"
      )
    return json.loads(line)

  def seconds(self, budget: float) -> float:
    """Returns the CPU seconds of a step, of as many as fit in `budget`."""
    assert self._process.stdin is not None
    print(budget, file=self._process.stdin, flush=True)
    return self.answer()


def _end(process: subprocess.Popen[str], errors: IO[str]) -> None:
  process.communicate()  # closes its input, which ends it
  errors.close()


def _build(program: str, settings: harness.Settings) -> harness.Comparison:
  trainers = {
    "nnx.as_flax": _Trainer(program, "-m", "nnx.as_flax"),
    "flax.nnx": _Trainer(program),
  }
  ours, theirs = (np.float32(t.answer()) for t in trainers.values())
  compare.check_same(ours, theirs, label=program, tolerance=_TOLERANCE)

  def side(name: str) -> harness.Side:
    return harness.Side(
      name=name,
      fresh=lambda: None,
      call=lambda state: state,
      stopwatch=lambda _: trainers[name].seconds(settings.sample_seconds),
    )

  sides = [side(name) for name in trainers]
  return harness.Comparison(
    ours=sides[0], baselines=sides[1:], clock=harness.THREAD_CPU
  )


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows."""
  return [
    harness.Case(
      NAME, "step", program, "", functools.partial(_build, program, settings)
    )
    for program in _PROGRAMS
  ]
