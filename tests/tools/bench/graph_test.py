"""Tests of the rows and models of suite `graph`."""

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax

import nnx
from tools.bench import graph, graph_models, harness


def _count(library, model):
  return len(jax.tree.leaves(library.state(model)))


class ModelsTest(parameterized.TestCase):
  @parameterized.product(library=(nnx, flax_nnx), size=(10, 100))
  def test_blocks_have_the_promised_variables(self, library, size):
    model = graph_models.make_blocks(library, size)
    self.assertEqual(_count(library, model), size)

  @parameterized.parameters(nnx, flax_nnx)
  def test_real_layers_share_one_parameter(self, library):
    model = graph_models.make_real_layers(library, 2)
    self.assertIs(model.head, model.embedding)
    self.assertEqual(_count(library, model), 2 * 22 + 1)

  @parameterized.parameters(nnx, flax_nnx)
  def test_float_variables_leave_out_the_streams(self, library):
    model = graph_models.make_real_layers(library, 2)
    floats = list(graph_models.float_variables(library, model))
    self.assertLen(floats, 2 * 20 + 1)


class CasesTest(absltest.TestCase):
  def test_rows_have_the_promised_names(self):
    rows = {
      (case.op, case.case)
      for case in graph.cases(harness.Settings.for_run(quick=False))
    }
    for op in (
      "jit_noop jit_write_all jit_noop_values jit_write_all_values split state"
      " update merge clone tree_flatten state_filter state_split state_merge"
    ).split():
      for case in ("10", "100", "1000", "real_layers"):
        self.assertIn((op, case), rows)
    for op in ("jit_noop_tree", "jit_write_all_tree", "split_tree"):
      for case in ("10", "100", "1000"):
        self.assertIn((op, case), rows)
    for op in (
      "var_read var_write param_new setattr rngs_params hijax_write_all"
    ).split():
      for case in ("10", "100", "1000"):
        self.assertIn((op, case), rows)
    self.assertIn(("import_time", "process"), rows)
    for case in ("60_models", "150_models"):
      self.assertIn(("jit_round_robin", case), rows)
    for case in ("one_row", "all"):
      self.assertIn(("jit_write_large", case), rows)

  def test_jit_rows_have_the_flat_jit_as_floor(self):
    for case in graph.cases(harness.Settings.for_run(quick=True)):
      if case.op.startswith("jit_") and case.case == "100":
        comparison = case.build()
        self.assertEqual(comparison.floor_name, "jax.jit on the flat tuple")
        self.assertEqual(comparison.clock, harness.THREAD_CPU)

  def test_hijax_writes_every_variable(self):
    comparison = graph._build_hijax_write_all(10)
    for side in (comparison.ours, *comparison.baselines):
      state = side.fresh()
      observed = side.observe(state, side.call(state))
      self.assertEqual([float(x.sum()) for x in observed], [4.0] * 10)

  def test_round_robin_has_a_program_a_model_on_every_side(self):
    comparison = graph._build_round_robin(3)
    flax, static = comparison.baselines
    self.assertEqual(static.name, "jax.jit, static argument")
    for side in (comparison.ours, flax, static):
      state = side.fresh()
      for times in (1, 2):
        result = side.call(state)
        observed = side.observe(state, result)
        state = side.advance(state, result)
        # Each model has added its own number so often.
        self.assertEqual(
          [float(arrays[0][0]) * 256 for arrays in observed],
          [times, 2 * times, 3 * times],
        )
        self.assertEqual([len(arrays) for arrays in observed], [10] * 3)


if __name__ == "__main__":
  absltest.main()
