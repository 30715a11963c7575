"""Tests of the example on checkpoints."""

import jax
import numpy as np

from examples import checkpoint, digits, shared
import nnx


def test_what_is_resumed_is_what_was_saved(tmp_path):
  objects = checkpoint.make()
  for batch in shared.batches(digits.load(), 2):
    shared.train_step(*objects, *batch)
  checkpoint.save(tmp_path, objects, 2)
  step, again = checkpoint.resume(tmp_path)
  assert step == 2
  for saved, read in zip(
    jax.tree.leaves(nnx.state(objects)),
    jax.tree.leaves(nnx.state(again)),
    strict=True,
  ):
    if jax.dtypes.issubdtype(saved.dtype, jax.dtypes.prng_key):
      saved, read = jax.random.key_data(saved), jax.random.key_data(read)
    np.testing.assert_array_equal(saved, read)


def test_the_program_compares_the_runs(capsys, tmp_path):
  checkpoint.main(["--steps=5", f"--plot={tmp_path / 'runs.png'}"])
  assert "resumed at step 3; the losses of all 5" in capsys.readouterr().out
  assert (tmp_path / "runs.png").exists()
