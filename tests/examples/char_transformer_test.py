"""Tests of the transformer example, on the real text."""

import functools
import pathlib
import tempfile
from unittest import mock

from absl.testing import absltest
from flax import nnx as flax_nnx
import jax
from jax import numpy as jnp
import numpy as np

from examples import char_transformer
import nnx

SMALL = char_transformer.Size(layers=1, features=32, heads=2, context=64)


class CharTransformerTest(absltest.TestCase):
  def test_text_is_the_documentation(self):
    data = char_transformer.load()
    self.assertGreater(len(data.train), 300_000)
    self.assertGreater(len(data.test), 10_000)
    self.assertLen(set(data.alphabet), len(data.alphabet))
    self.assertIn("statement", data.decode(data.train))

  def test_short_training_learns(self):
    data = char_transformer.load()
    _, losses = char_transformer.train(data, steps=30, size=SMALL)
    self.assertAlmostEqual(losses[0], np.log(len(data.alphabet)), delta=1.5)
    self.assertLess(np.mean(losses[-5:]), losses[0] - 1)

  def test_writing_with_the_cache_is_writing_without(self):
    symbols, start, tokens = 11, 40, 20
    model = char_transformer.transformer_type()(symbols, SMALL, nnx.Rngs(0))
    text = np.random.default_rng(0).integers(symbols, size=start + 1)
    text = text.astype(np.int32)
    char_transformer.prefill(model, text[:-1], SMALL.context)
    twin = char_transformer.flax_twin(flax_nnx, model, symbols, SMALL)
    cache = model.blocks[0].attention.cached_key
    where = cache[...].unsafe_buffer_pointer()
    noise = char_transformer.noise(SMALL, symbols)
    ours = char_transformer.generate(nnx, model, text[-1], start, tokens, noise)
    self.assertEqual(cache[...].unsafe_buffer_pointer(), where)
    theirs = char_transformer.generate(
      flax_nnx, twin, text[-1], start, tokens, noise
    )
    np.testing.assert_array_equal(ours.text, theirs.text)
    whole = jnp.asarray([*text, *ours.text[:-1]])[None]
    logits = np.asarray(model(whole))[0, start:]
    drawn = np.argmax(
      logits / char_transformer.TEMPERATURE + noise[start : start + tokens, 0],
      axis=-1,
    )
    np.testing.assert_array_equal(drawn, ours.text)

  def test_draws_follow_the_probabilities(self):
    class Fixed(nnx.Module):
      def __call__(self, token, position, decode):
        return jnp.log(probabilities)[None, None] * char_transformer.TEMPERATURE

    probabilities = jnp.array([0.5, 0.3, 0.2])
    size = char_transformer.Size(context=2000)
    noise = char_transformer.noise(size, 3)
    drawn = jax.vmap(
      lambda position: char_transformer.next_token(
        Fixed(), jnp.zeros((1, 1), jnp.int32), position, noise
      )
    )(jnp.arange(size.context))
    shares = np.bincount(np.ravel(drawn), minlength=3) / size.context
    # Four standard deviations of the share of half.
    np.testing.assert_allclose(shares, probabilities, atol=0.045)

  def test_program_writes_text_and_a_plot(self):
    small = functools.partial(
      char_transformer.Size, layers=1, features=32, heads=2
    )
    with (
      mock.patch.object(char_transformer, "Size", small),
      tempfile.TemporaryDirectory() as folder,
    ):
      path = pathlib.Path(folder, "transformer.png")
      char_transformer.main(["--steps=1", "--tokens=3", f"--plot={path}"])
      self.assertEqual(path.read_bytes()[:8], b"\x89PNG\r\n\x1a\n")

  def test_no_steps_are_refused(self):
    with self.assertRaisesRegex(
      ValueError, "`steps` must be at least 1, but got 0"
    ):
      char_transformer.train(char_transformer.load(), steps=0, size=SMALL)


if __name__ == "__main__":
  absltest.main()
