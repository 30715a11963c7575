"""Many texts at once, on eight devices."""

from absl.testing import absltest
import numpy as np

from examples.llm import generate, sharding
import nnx
from tests.examples.llm import load, oracle, tiny
from tests.testing import devices

devices.use_cpu_devices(8)


class ServingShardedTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)
    self.model = load.model(tiny.WIDE)
    self.cache = self.model.make_cache((load.BLOCKS, load.BLOCK_SIZE))
    sharding.shard(self.model, self.cache, 8)

  def test_each_text_is_what_it_is_alone(self):
    writer = generate.Writer(load.model(tiny.WIDE), load.POSITIONS)
    server = load.server(self.model, cache=self.cache)
    load.check(self, server, writer, seed=2)
    # Each device still has its heads, and no others.
    for keys in self.cache.keys:
      shape = keys[...].sharding.shard_shape(keys.shape)
      self.assertEqual(shape[2], 1)

  def test_logits_are_those_of_the_oracle(self):
    tokens = np.random.default_rng(1).integers(64, size=30)
    logits = nnx.jit(lambda model, tokens: model.logits(model(tokens)))(
      self.model, tokens[None]
    )[0]
    expected = oracle.logits(tiny.WIDE, tiny.tensors(tiny.WIDE), tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)
    kernel = self.model.layers[0].mlp.down_proj.kernel[...]
    self.assertEqual(kernel.sharding.shard_shape(kernel.shape), (8, 32))

  def test_what_cannot_be_divided_is_refused(self):
    model = load.model(tiny.CONFIGS["llama"])
    with self.assertRaisesRegex(
      ValueError, "`devices` must divide the 2 heads"
    ):
      sharding.shard(model, model.make_cache((2, 4)), 4)
    with self.assertRaisesRegex(ValueError, "`devices` must be at most 8"):
      sharding.shard(model, model.make_cache((2, 4)), 16)


if __name__ == "__main__":
  absltest.main()
