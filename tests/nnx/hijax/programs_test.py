"""Programs on hijax Variables and mutable arrays do what Flax's do."""

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import numpy as np
import pytest

import nnx
from tests.nnx.hijax import (
  cases,
  graph_functions,
  jax_transforms,
  models,
  refs,
  switches,
  transforms,
  values,
)

CASES = {
  name: program
  for module in (
    values,
    switches,
    jax_transforms,
    graph_functions,
    models,
    transforms,
    refs,
  )
  for name, program in module.CASES.items()
}
# What Flax fails at in its own code, where jax would let it go on, and what
# these programs return here.
BEYOND = {
  "jit_isinstance": [[True, False, True, "x", [], True, True]],
  "hijax_and_ref": [True, True, 2.0, 2.0, True],
  "pop": [2.0, False],
  "sow": [[1.0, 1.0]],
  "nnx_jit_model_graph": [3.0, 3.0, True, 3.0, 6.0],
  "nnx_jit_shared_graph": [4.0, 2.0],
  "nnx_cond_graph": 2.0,
  "ref_grad_nondiff_graph": [6.0, 6.0],
  "nnx_scan_carry_graph": [[1.0, 2.0, 4.0], 4.0],
  "nnx_scan_carry_values": [[1.0, 2.0, 4.0], 4.0],
  "nnx_scan_carry_tree": [[1.0, 2.0, 4.0], 4.0],
  "nnx_while_graph": 4.0,
  "nnx_while_values": 4.0,
  "nnx_while_tree": 4.0,
  "nnx_eval_shape_values": [3],
  "nnx_eval_shape_tree": [3],
  # What jax cannot return leaves its box, and gets another outside.
  **{
    f"{kind}_jit_create_{mode}": [[0.0, 0.0, 0.0], True]
    for kind in ("nnx", "ref")
    for mode in ("graph", "values", "tree")
  },
  # Flax loses what is written to the mutable arrays.
  "ref_vmap_graph": [[2.0, 4.0, 6.0], [1.0, 2.0, 3.0]],
  "ref_scan_xs_graph": [6.0, [1.0, 2.0, 3.0]],
  "ref_cond_graph": 2.0,
  # Or puts an array in their place.
  "ref_update_variable": [[1.0, 1.0, 1.0], True, True],
}
# Models: their results are those that they have without hijax.
MODELS = ("forward", "train_step", "kv_cache")


def plain(value):
  """Makes arrays of numbers, for a comparison."""
  if isinstance(value, dict):
    return {name: plain(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(item) for item in value]
  if isinstance(value, (str, bool)) or value is None:
    return value
  if isinstance(value, (jax.Array, np.ndarray, int, float)):
    return np.asarray(value)
  return str(value)


def outcome(name, library):
  """Returns what a program returns, or None if it raises."""
  try:
    return plain(CASES[name](library))
  except Exception:
    return None


def same(ours, theirs):
  jax.tree.map(
    lambda a, b: (
      np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
      if isinstance(a, np.ndarray)
      else np.testing.assert_equal(a, b)
    ),
    ours,
    theirs,
  )


@pytest.mark.filterwarnings("ignore")  # Those are Flax's.
class TableTest(parameterized.TestCase):
  """One program after the other, ours against Flax's."""

  @parameterized.named_parameters(
    (f"_{n}", n) for n in CASES if n not in BEYOND and n not in MODELS
  )
  @cases.needs_mutable_types
  def test_as_flax(self, name):
    theirs, ours = outcome(name, flax_nnx), outcome(name, nnx)
    self.assertEqual(ours is None, theirs is None)
    same(ours, theirs)

  @parameterized.named_parameters((f"_{n}", n) for n in BEYOND)
  @cases.needs_mutable_types
  def test_beyond_flax(self, name):
    same(outcome(name, nnx), plain(BEYOND[name]))

  @parameterized.named_parameters((f"_{n}", n) for n in MODELS)
  def test_models(self, name):
    program = CASES[name]
    same(plain(program(nnx)), plain(program(flax_nnx, hijax=False)))


if __name__ == "__main__":
  absltest.main()
