"""What the tests of updates in place have in common."""

from unittest import mock

from absl.testing import parameterized
import jax.numpy as jnp

import nnx
from nnx.transforms import in_place_programs

SIZE = 64


@nnx.jit
def step(variable, x):
  variable.value = variable.value + x


def started(value=0.0):
  """A Variable whose array is its own, after two steps."""
  variable = nnx.Param(jnp.full(SIZE, value))
  step(variable, 1.0)
  step(variable, 1.0)
  return variable


class Case(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    for name in ("LEAST_ARRAY", "LEAST_TOTAL", "LEAST_FLOPS"):
      self.enter_context(mock.patch.object(in_place_programs, name, 0))
    step.clear_cache()
    self.addCleanup(step.clear_cache)
