"""Tests of the example on LoRA."""

import re

import jax
import numpy as np
import optax

from examples import digits, lora, shared
import nnx


def test_only_the_new_matrices_move():
  data = digits.load()
  model = shared.Mlp(rngs=nnx.Rngs(0))
  adapted = lora.adapt(model, nnx.Rngs(1))
  before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
  images = data.test_images
  model.eval()
  np.testing.assert_array_equal(adapted(images), model(images))
  optimizer = nnx.Optimizer(adapted, optax.adam(1e-2), wrt=nnx.LoRAParam)
  for batch in shared.batches(data, 2):
    lora.lora_step(adapted, optimizer, *batch)
  after = nnx.to_pure_dict(nnx.state(model))
  jax.tree.map(np.testing.assert_array_equal, before, after)
  assert (adapted(images) != model(images)).any()
  assert adapted.hidden.base_module.kernel is model.hidden.kernel
  assert lora.count(adapted, nnx.LoRAParam) == lora.RANK * (64 + 128 + 128 + 10)


def test_it_learns_turned_digits(capsys, tmp_path):
  lora.main(["--steps=100", f"--plot={tmp_path / 'lora.png'}"])
  upright, before, after = (
    float(share) for share in re.findall(r"([\d.]+)%", capsys.readouterr().out)
  )
  assert upright > 90 and before < 40 and after > 75
  assert (tmp_path / "lora.png").exists()
