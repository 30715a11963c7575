"""GGUF files that the test writes."""

import pathlib
import tempfile

from absl.testing import absltest, parameterized
from jax import numpy as jnp
import numpy as np

from examples.llm import gguf_file, load_gguf, weights
import nnx
from tests.examples.llm import oracle, tiny


class LoadGgufTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.path = pathlib.Path(folder.name) / "tiny.gguf"

  @parameterized.parameters(*tiny.CONFIGS)
  def test_logits_are_those_of_the_weights(self, name):
    values = tiny.CONFIGS[name]
    if name == "gemma3":  # the file does not say it
      values = values | {"query_pre_attn_scalar": values["head_dim"]}
    made = tiny.tensors(values)
    tiny.write_gguf(self.path, values, made)
    checkpoint = load_gguf.Checkpoint(self.path)
    model = weights.load(checkpoint, 48)
    tokens = np.random.default_rng(1).integers(64, size=40)
    logits = nnx.jit(lambda model, tokens: model.logits(model(tokens)))(
      model, jnp.asarray(tokens)[None]
    )[0]
    expected = oracle.logits(values, made, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)

  @parameterized.parameters("float16", "bfloat16")
  def test_matrices_of_16_bits_are_read(self, dtype):
    values = tiny.CONFIGS["qwen3"]
    made = tiny.tensors(values)
    tiny.write_gguf(self.path, values, made, dtype)
    read = load_gguf.Checkpoint(self.path).read(
      "layers.1.mlp.up_proj.weight", jnp.float32
    )
    expected = jnp.asarray(made["model.layers.1.mlp.up_proj.weight"], dtype)
    np.testing.assert_array_equal(read, expected.astype(jnp.float32))

  def test_metadata_is_read(self):
    values = tiny.CONFIGS["llama"]
    more = {"a": ["b", "ä"], "c": [True, False], "d": "e", "f": [1.5, -2.0]}
    tiny.write_gguf(self.path, values, {}, tokenizer=more)
    metadata = gguf_file.File(self.path).metadata
    self.assertEqual({name: metadata[name] for name in more}, more)

  def test_another_file_is_refused(self):
    self.path.write_bytes(b"GGML" + bytes(40))
    with self.assertRaisesRegex(ValueError, "must be a GGUF file of version"):
      gguf_file.File(self.path)


if __name__ == "__main__":
  absltest.main()
