"""Tests of the example that moves from Linen."""

import re

import jax
import numpy as np

from examples import digits, from_linen
import nnx


def test_the_three_models_say_the_same():
  images = digits.load().test_images
  linen = from_linen.LinenMlp()
  variables = linen.init(jax.random.key(1), images[:1], train=True)
  variables["batch_stats"]["norm"]["mean"] += 0.5
  theirs = linen.apply(variables, images, train=False)
  bridged = from_linen.in_a_bridge(variables)(images, train=False)
  np.testing.assert_array_equal(bridged, theirs)
  ours = from_linen.written_anew(variables)
  assert type(ours.norm.mean) is nnx.BatchStat
  ours.eval()
  np.testing.assert_allclose(ours(images), theirs, atol=1e-4)


def test_training_goes_on_where_linen_stopped(capsys, tmp_path):
  from_linen.main(["--steps=120", f"--plot={tmp_path / 'moved.png'}"])
  linen, bridged, anew, on = (
    float(share) for share in re.findall(r"([\d.]+)%", capsys.readouterr().out)
  )
  assert linen == bridged == anew > 80
  assert on > linen
  assert (tmp_path / "moved.png").exists()
