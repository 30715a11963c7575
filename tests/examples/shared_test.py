"""Tests of what the short examples share."""

import numpy as np
import optax
import pytest

from examples import digits, shared
import nnx


def test_the_same_seed_draws_the_same_batches():
  data = digits.load()
  one, again, other = (
    list(shared.batches(data, 3, seed)) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(one[2][0], again[2][0])
  assert (one[0][1] != other[0][1]).any()
  assert one[0][0].shape == (shared.BATCH, 8, 8, 1)


def test_a_step_changes_model_and_optimizer_and_looking_does_not():
  data = digits.load()
  model = shared.Mlp(rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
  losses = [
    shared.train_step(model, optimizer, *batch)
    for batch in shared.batches(data, 60)
  ]
  assert losses[-1] < losses[0] / 3
  assert optimizer.step.value == 60
  before = np.asarray(model.norm.mean)
  test = (data.test_images, data.test_labels)
  assert shared.accuracy(model, *test) > 0.9
  np.testing.assert_array_equal(model.norm.mean, before)


def test_options_are_whole_numbers_of_at_least_one(capsys):
  found = shared.options("A title.", ["--steps=3"], steps=5, members=2)
  assert (found.steps, found.members, found.plot) == (3, 2, None)
  with pytest.raises(SystemExit):
    shared.options("A title.", ["--members=0"], steps=5, members=2)
  assert "--members must be at least 1, but got 0" in capsys.readouterr().err


def test_a_plot_is_a_png(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("BUILD_WORKING_DIRECTORY", str(tmp_path))
  shared.plot("a.png", "loss", {"a": [2.0, 1.0], "b": [float("nan"), 1.0]})
  assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
  assert capsys.readouterr().out == f"wrote {tmp_path / 'a.png'}\n"
  shared.plot(None, "loss", {})
  assert capsys.readouterr().out == ""
