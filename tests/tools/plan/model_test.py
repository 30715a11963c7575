"""Tests of what follows from a model's sizes."""

from absl.testing import absltest, parameterized

from tools.plan import model, refusal

# What their authors' checkpoints have.
COUNTS = {
  "llama2-7b": 6_738_415_616,
  "llama2-13b": 13_015_864_320,
  "llama2-70b": 68_976_648_192,
  "llama3-8b": 8_030_261_248,
  "llama3-70b": 70_553_706_496,
  "llama3-405b": 405_853_388_800,
  "mixtral-8x7b": 46_702_792_704,
}


class ModelTest(parameterized.TestCase):
  @parameterized.parameters(*COUNTS.items())
  def test_counts_the_parameters_of_checkpoints(self, name, count):
    self.assertEqual(model.MODELS[name].parameters, count)

  def test_all_have_a_count(self):
    self.assertEqual(set(COUNTS), set(model.MODELS))

  def test_forward_flops_by_hand(self):
    sizes = model.Model(2, 4, 2, 1, 2, 8, 10)
    # Queries 4 x 4, keys and values 4 x 2 each, out 4 x 4; three of 4 x 8.
    products = 16 + 8 + 8 + 16 + 3 * 32
    # A query sees 3 keys of 6, at 2 operations a feature, and their values.
    attended = 3 * 4 * 2 * 2
    self.assertEqual(
      sizes.forward_flops(6), 2 * (2 * products + attended) + 2 * 40
    )

  def test_tokens_go_to_the_experts_used(self):
    dense = model.Model(1, 4, 2, 2, 2, 8, 10)
    routed = model.Model(1, 4, 2, 2, 2, 8, 10, experts=4, used=2)
    self.assertEqual(routed.multiplied - dense.multiplied, 3 * 32 + 4 * 4)
    self.assertEqual(routed.parameters - dense.parameters, 3 * 96 + 4 * 4)

  def test_cache_bytes_of_70b(self):
    size = model.MODELS["llama2-70b"].cache_bytes(1, "bfloat16")
    self.assertEqual(size, 2 * 80 * 8 * 128 * 2)

  @parameterized.parameters(
    (
      {"heads": 3},
      "`heads`=3 must be a multiple of `kv_heads`=2, but is not.",
    ),
    ({"layers": 0}, "`layers` must be at least 1, but got 0."),
    (
      {"experts": 2, "used": 3},
      "`used` must be at most `experts`=2, but got 3.",
    ),
  )
  def test_refuses(self, changes, message):
    sizes = {
      "layers": 1,
      "features": 4,
      "heads": 2,
      "kv_heads": 2,
      "head_dim": 2,
      "hidden": 8,
      "vocabulary": 10,
    }
    with self.assertRaises(refusal.Refused) as raised:
      model.Model(**sizes | changes)
    self.assertEqual(str(raised.exception), message)

  def test_refuses_an_unknown_dtype(self):
    with self.assertRaisesRegex(refusal.Refused, "but got `float12`"):
      model.element_bytes("float12")


if __name__ == "__main__":
  absltest.main()
