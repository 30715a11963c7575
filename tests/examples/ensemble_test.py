"""Tests of the example of an ensemble."""

import re

import jax
import numpy as np

from examples import digits, ensemble


def test_members_are_different_models():
  model, optimizer = ensemble.make(3)
  assert model.hidden.kernel.shape == (3, 64, 128)
  assert optimizer.step.shape == (3,)
  first, second, _ = np.asarray(model.hidden.kernel)
  assert (first != second).any()
  said = ensemble.probabilities(model, digits.load().test_images[:5])
  assert said.shape == (3, 5, 10)
  np.testing.assert_allclose(said.sum(-1), 1, rtol=1e-5)


def test_a_step_moves_each_member():
  model, optimizer = ensemble.make(2)
  before = np.asarray(model.out.bias)
  data = digits.load()
  images = data.train_images[:8].reshape(2, 4, 8, 8, 1)
  labels = data.train_labels[:8].reshape(2, 4)
  losses = ensemble.train_step(model, optimizer, images, labels)
  assert losses.shape == (2,)
  assert jax.device_get(optimizer.step.value).tolist() == [1, 1]
  assert (np.asarray(model.out.bias) != before).any(-1).all()


def test_together_they_are_right_more_often(capsys, tmp_path):
  ensemble.main(["--steps=60", f"--plot={tmp_path / 'ensemble.png'}"])
  said = capsys.readouterr().out
  worst, _, together, sure, _ = map(float, re.findall(r"([\d.]+)%", said))
  assert worst < together < sure
  assert (tmp_path / "ensemble.png").exists()
