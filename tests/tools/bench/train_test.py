"""Tests of the rows and models of suite `train`."""

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import numpy as np

import nnx
from tools.bench import harness, models, train, train_models


class ModelsTest(parameterized.TestCase):
  @parameterized.parameters(*train._QUICK_MODELS)
  def test_gradients_are_those_of_flax(self, name):
    spec = train._QUICK_MODELS[name]
    batch = train_models.batch(spec)
    grads = []
    for library in (nnx, flax_nnx):
      model = train_models.model(library, spec, "float32")
      found = library.jit(library.grad(train.loss_of))(model, *batch)
      grads.append(models.arrays(library, found))
    self.assertEqual(*(list(each) for each in grads))
    for path, grad in grads[0].items():
      size = max(1e-3, np.abs(grad).max())
      np.testing.assert_allclose(
        grad, grads[1][path], atol=1e-4 * size, err_msg=path
      )


class CasesTest(absltest.TestCase):
  def test_rows_have_the_promised_names(self):
    cases = train.cases(harness.Settings.for_run(quick=False))
    rows = {(case.op, case.case) for case in cases}
    self.assertEqual(
      rows,
      {
        ("resnet50", "8x128x128"),
        ("vit_s16", "4x224x224"),
        ("gpt_10m", "4x256"),
        ("gpt_1m", "12x64"),
      },
    )
    self.assertEqual({c.dtype for c in cases}, {"float32", "bfloat16"})


if __name__ == "__main__":
  absltest.main()
