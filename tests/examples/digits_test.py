"""Tests of the digits example, on the real images."""

import pathlib

from absl.testing import absltest
import jax
import numpy as np

from examples import digits
import nnx


class DigitsTest(absltest.TestCase):
  def test_data_is_all_of_the_digits(self):
    data = digits.load()
    images = np.concatenate([data.train_images, data.test_images])
    self.assertEqual(images.shape, (1797, 8, 8, 1))
    self.assertEqual((images.min(), images.max()), (0.0, 1.0))
    self.assertLen(np.unique(data.test_labels), 10)

  def test_short_training_classifies_unseen_images(self):
    history = digits.train(digits.load(), epochs=5)
    self.assertLen(history.loss, 5)
    self.assertLess(history.loss[-1], history.loss[0])
    self.assertGreater(history.accuracy[-1], 0.95)
    self.assertGreater(history.train_accuracy[-1], 0.95)

  def test_running_averages_move_towards_the_batch(self):
    model = digits.Classifier(nnx.Rngs(0))
    images = digits.load().train_images[:64]
    forward = nnx.jit(lambda model: model(images))
    for _ in range(100):
      forward(model)
    block = model.blocks[0]
    x = np.asarray(block.conv(images), np.float64)
    np.testing.assert_allclose(
      block.norm.mean.value, x.mean((0, 1, 2)), rtol=1e-3, atol=1e-4
    )
    np.testing.assert_allclose(
      block.norm.var.value, x.var((0, 1, 2)), rtol=1e-3, atol=1e-4
    )

  def test_evaluation_leaves_the_model_alone(self):
    model = digits.Classifier(nnx.Rngs(0))
    model.eval()
    before = nnx.to_pure_dict(nnx.state(model))
    metrics = nnx.MultiMetric(accuracy=nnx.metrics.Accuracy())
    data = digits.load()
    digits.evaluate(model, metrics, data.test_images, data.test_labels)
    self.assertEqual(int(metrics.accuracy.count.value), 360)
    after = nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, before, after)

  def test_program_writes_a_plot(self):
    path = pathlib.Path(self.create_tempdir().full_path, "digits.png")
    digits.main(["--epochs=1", f"--plot={path}"])
    self.assertEqual(path.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

  def test_no_epochs_is_refused(self):
    with self.assertRaisesRegex(
      ValueError, "`epochs` must be at least 1, but got 0"
    ):
      digits.train(digits.load(), epochs=0)


if __name__ == "__main__":
  absltest.main()
