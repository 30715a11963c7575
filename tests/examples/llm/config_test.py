"""What `config.json` may say."""

from absl.testing import absltest

from examples.llm import config
from tests.examples.llm import tiny


class ConfigTest(absltest.TestCase):
  def test_new_names_of_rotations_mean_the_same(self):
    values = dict(tiny.CONFIGS["gemma3"])
    old = config.from_json(values)
    local = values.pop("rope_local_base_freq")
    full = values.pop("rope_scaling") | {"rope_theta": values.pop("rope_theta")}
    values["rope_parameters"] = {
      "full_attention": full,
      "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }
    del values["sliding_window_pattern"]
    values["layer_types"] = ["sliding_attention"] * 5 + ["full_attention"]
    self.assertEqual(config.from_json(values), old)
    self.assertEqual(old.windows, (5, 5, 5, 5, 5, None))

  def test_the_part_for_text_is_taken(self):
    values = tiny.CONFIGS["gemma3"]
    whole = {"model_type": "gemma3", "text_config": values}
    self.assertEqual(config.from_json(whole), config.from_json(values))

  def test_what_a_file_leaves_out_is_as_in_transformers(self):
    # All that the file of Gemma 3 4B says of its part for text.
    values = {
      "model_type": "gemma3_text",
      "hidden_size": 2560,
      "intermediate_size": 10240,
      "num_hidden_layers": 34,
      "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
      "sliding_window": 1024,
    }
    read = config.from_json(values)
    self.assertEqual((read.heads, read.kv_heads, read.head_dim), (8, 4, 256))
    self.assertEqual((read.vocabulary, read.context), (262208, 131072))
    self.assertEqual((read.scale, read.epsilon), (1 / 16, 1e-6))
    self.assertEqual(read.windows[:7], (1024,) * 5 + (None, 1024))
    self.assertEqual(read.rope.rates[0], 1 / 8)
    self.assertAlmostEqual(read.rope.rates[64], 1e-3 / 8)
    self.assertAlmostEqual(read.local_rope.rates[64], 1e-2)
    self.assertTrue(read.tied)

  def test_other_architectures_are_refused(self):
    with self.assertRaisesRegex(
      ValueError, "`model_type` must be one of llama, qwen3, gemma3, but"
    ):
      config.from_json({"model_type": "mamba"})

  def test_other_rotations_are_refused(self):
    values = tiny.CONFIGS["llama"] | {"rope_scaling": {"rope_type": "longrope"}}
    with self.assertRaisesRegex(ValueError, "`rope_type` must be `default`"):
      config.from_json(values)
    values = tiny.CONFIGS["llama"] | {
      "rope_scaling": {"partial_rotary_factor": 0.5}
    }
    with self.assertRaisesRegex(ValueError, "`partial_rotary_factor` must be"):
      config.from_json(values)

  def test_caps_are_refused(self):
    values = tiny.CONFIGS["gemma3"] | {"final_logit_softcapping": 30.0}
    with self.assertRaisesRegex(
      ValueError, "`final_logit_softcapping` must be null"
    ):
      config.from_json(values)


if __name__ == "__main__":
  absltest.main()
