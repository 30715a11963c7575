"""Tests of the example that serves an exported program."""

import numpy as np

from examples import digits, serve, shared
import nnx


def test_the_other_process_answers_as_the_model_does(tmp_path):
  model = shared.Mlp(rngs=nnx.Rngs(0))
  model.eval()
  file = tmp_path / "digits.export"
  file.write_bytes(serve.exported(model))
  images = digits.load().test_images
  own = np.asarray(model(images).argmax(-1)).tolist()
  assert len(set(own)) > 1
  with serve.serving(file) as address:
    assert serve.ask(address, images[:7]) == own[:7]
    assert serve.ask(address, images) == own


def test_the_program_exports_and_asks(capsys, tmp_path):
  serve.main(["--steps=20", "--requests=3", f"--plot={tmp_path / 'serve.png'}"])
  assert "all answers are those of the model" in capsys.readouterr().out
  assert (tmp_path / "serve.png").exists()
