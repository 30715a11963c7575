"""What needs packages that the default lock file has not."""

import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized
from jax import numpy as jnp
import numpy as np
import pytest

from examples.llm import (
  load_gguf,
  load_safetensors,
  loading,
  tokenizer,
  weights,
)
import nnx
from tests.examples.llm import oracle, tiny

gguf = pytest.importorskip("gguf", reason="needs the packages of @pypi_llm")

# Bytes as GPT-2 writes them: a space is `Ġ`.
_LETTERS = ["<|end|>", *"abc12", "\u0120", "ab", "\u0120ab", "12"]
_MERGES = ["a b", "\u0120 ab", "1 2"]
_BYTES = [f"<0x{i:02X}>" for i in range(256)]


class PackagesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    self.folder = pathlib.Path(folder.name)

  @parameterized.parameters(*tiny.CONFIGS)
  def test_folders_are_loaded(self, name):
    values, made = tiny.CONFIGS[name], tiny.tensors(tiny.CONFIGS[name])
    tiny.write_folder(self.folder, values, made)
    model = weights.load(load_safetensors.Checkpoint(self.folder), 48)
    tokens = np.random.default_rng(1).integers(64, size=40)
    logits = nnx.jit(lambda model, tokens: model.logits(model(tokens)))(
      model, jnp.asarray(tokens)[None]
    )[0]
    expected = oracle.logits(values, made, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)

  def test_bfloat16_stays_as_it_is_stored(self):
    values = tiny.CONFIGS["qwen3"]
    made = {
      name: np.asarray(jnp.asarray(x, jnp.bfloat16))
      for name, x in tiny.tensors(values).items()
    }
    tiny.write_folder(self.folder, values, made)
    model = weights.load(
      load_safetensors.Checkpoint(self.folder), 48, jnp.bfloat16
    )
    np.testing.assert_array_equal(
      model.layers[1].mlp.gate_up_proj.kernel[:, 1::2].T,
      made["model.layers.1.mlp.up_proj.weight"],
    )

  def test_a_folder_without_weights_is_refused(self):
    (self.folder / "config.json").write_text(
      json.dumps(tiny.CONFIGS["llama"]), encoding="utf-8"
    )
    with self.assertRaisesRegex(FileNotFoundError, "must have files"):
      load_safetensors.Checkpoint(self.folder)

  @parameterized.parameters("Q8_0", "Q4_1", "Q4_0")
  def test_files_of_the_package_gguf_are_dequantised(self, name):
    kind = gguf.GGMLQuantizationType[name]
    x = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    stored = gguf.quantize(x, kind)
    path = self.folder / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("a", x[:, :5].copy())
    writer.add_tensor("b", stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = load_gguf.gguf_file.File(path)
    self.assertEqual(file.metadata["llama.block_count"], 1)
    np.testing.assert_array_equal(file.read("a", np.float32), x[:, :5])
    expected = gguf.dequantize(stored, kind)
    np.testing.assert_array_equal(file.read("b", np.float32), expected)
    np.testing.assert_array_equal(
      file.read("b", jnp.bfloat16), expected.astype(jnp.bfloat16)
    )

  def _byte_level(self, **more):
    return tokenizer.from_gguf(
      {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": _LETTERS,
        "tokenizer.ggml.token_type": [3] + [1] * (len(_LETTERS) - 1),
        "tokenizer.ggml.merges": _MERGES,
        "tokenizer.ggml.eos_token_id": 0,
      }
      | {f"tokenizer.ggml.{name}": value for name, value in more.items()}
    )

  def test_byte_level_vocabularies_of_gguf_are_made(self):
    text = self._byte_level(pre="gpt-2")
    tokens = text.encode("ab ab12<|end|>c")
    names = ["ab", "\u0120ab", "12", "<|end|>", "c"]
    self.assertEqual([_LETTERS[token] for token in tokens], names)
    self.assertEqual(text.decode(tokens), "ab ab12c")
    self.assertEqual(text.ends, {0})
    digits = self._byte_level(pre="smollm").encode("12")
    self.assertEqual([_LETTERS[token] for token in digits], ["1", "2"])
    for pre in ("qwen2", "llama-bpe"):
      tokens = self._byte_level(pre=pre).encode("ab ab")
      self.assertEqual([_LETTERS[token] for token in tokens], names[:2])

  def test_a_text_begins_as_the_model_wants(self):
    text = self._byte_level(bos_token_id=0, add_bos_token=True)
    self.assertEqual(text.encode("c"), [0, 3])
    self.assertEqual(text.encode("c", bos=False), [3])

  def test_vocabularies_with_scores_are_made(self):
    tokens = ["<unk>", "<s>", "</s>", *_BYTES]
    own = ["\u2581", "a", "b", "ab", "\u2581a", "\u2581ab"]
    scores = [0.0] * len(tokens) + [-9.0, -9.0, -9.0, -1.0, -2.0, -3.0]
    text = tokenizer.from_gguf(
      {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens + own,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_space_prefix": False,
      }
    )
    ids = text.encode("ab ab\u00e9</s>")
    names = [(tokens + own)[i] for i in ids]
    expected = ["<s>", "ab", "\u2581ab", "<0xC3>", "<0xA9>", "</s>"]
    self.assertEqual(names, expected)
    self.assertEqual(text.decode(ids), "ab ab\u00e9")

  def test_other_vocabularies_are_refused(self):
    with self.assertRaisesRegex(ValueError, "must be `gpt2` or `llama`, but"):
      tokenizer.from_gguf({"tokenizer.ggml.model": "bert"})
    with self.assertRaisesRegex(ValueError, "one of default, gpt-2, smollm"):
      self._byte_level(pre="other")

  def test_a_folder_has_its_tokenizer_and_its_template(self):
    values = tiny.CONFIGS["llama"] | {"eos_token_id": [0, 3]}
    tiny.write_folder(self.folder, values, tiny.tensors(values))
    made = self._byte_level(pre="gpt-2")
    made.vocabulary.save(str(self.folder / "tokenizer.json"))
    template = (
      "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    (self.folder / "tokenizer_config.json").write_text(
      json.dumps({"chat_template": template, "bos_token": "<|end|>"}),
      encoding="utf-8",
    )
    model, text = loading.load(self.folder, positions=32)
    self.assertEqual(model.positions, 32)
    self.assertEqual(text.ends, {0, 3})
    messages = [{"role": "user", "content": "ab"}]
    self.assertEqual(text.chat(messages), [0, _LETTERS.index("ab")])
    self.assertEqual(model.dtype, "bfloat16")

  def test_a_chat_needs_a_template(self):
    with self.assertRaisesRegex(ValueError, "must have a chat template"):
      self._byte_level().chat([])

  def test_a_path_that_is_none_is_refused(self):
    with self.assertRaisesRegex(FileNotFoundError, "a GGUF file or a folder"):
      loading.load(self.folder / "nothing")


if __name__ == "__main__":
  absltest.main()
