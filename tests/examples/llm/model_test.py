"""Each architecture against an oracle in NumPy: plain, cached and paged."""

from absl.testing import absltest, parameterized
import jax
from jax import numpy as jnp
import numpy as np

from examples.llm import weights
import nnx
from tests.examples.llm import oracle, tiny

POSITIONS = 48
BLOCK = 8


@nnx.jit
def plain(model, tokens):
  return model.logits(model(tokens))


@nnx.jit(donate_argnames="cache")
def cached(model, cache, tokens, index, lengths, table):
  return model.logits(model(tokens, cache, index, lengths, table))


def greedy_plain(model, prompt, count):
  """Writes by reading all of the text again for each token."""
  text = np.zeros((1, POSITIONS), np.int32)
  text[0, : len(prompt)] = prompt
  for end in range(len(prompt), len(prompt) + count):
    text[0, end] = plain(model, text)[0, end - 1].argmax()
  return text[0, len(prompt) : len(prompt) + count].tolist()


def greedy_cached(model, prompt, count, paged):
  """Writes with a cache: the prompt in two pieces, then token by token."""
  table = None
  shape = (1, POSITIONS)
  if paged:
    blocks = POSITIONS // BLOCK
    shape = (2 * blocks, BLOCK)
    order = np.random.default_rng(0).permutation(2 * blocks)[:blocks]
    table = order[None].astype(np.int32)
  cache = model.make_cache(shape)
  first = np.asarray(prompt[:7], np.int32)[None]
  rest = np.zeros((1, 7), np.int32)
  rest[0, : len(prompt) - 7] = prompt[7:]

  def run(tokens, index, length):
    return cached(
      model, cache, tokens, np.array([index]), np.array([length]), table
    )

  run(first, 0, 7)
  logits = run(rest, 7, len(prompt) - 7)[0, len(prompt) - 8]
  written = [int(logits.argmax())]
  while len(written) < count:
    last = np.array([written[-1:]], np.int32)
    logits = run(last, len(prompt) + len(written) - 1, 1)[0, 0]
    written.append(int(logits.argmax()))
  return written


def parts(name, matrix, values):
  """Returns by name the matrices that a Param of the model joins."""
  if name == "gate_up_proj":
    return {"gate_proj": matrix[:, ::2], "up_proj": matrix[:, 1::2]}
  if name != "qkv_proj":
    return {name: matrix}
  rows, kv_heads = len(matrix), values["num_key_value_heads"]
  group = values["num_attention_heads"] // kv_heads
  heads = matrix.reshape(rows, kv_heads, group + 2, -1)
  cut = {
    "q_proj": heads[:, :, :-2],
    "k_proj": heads[:, :, -2],
    "v_proj": heads[:, :, -1],
  }
  return {part: each.reshape(rows, -1) for part, each in cut.items()}


class ModelTest(parameterized.TestCase):
  @parameterized.parameters(*tiny.CONFIGS)
  def test_logits_are_those_of_the_oracle(self, name):
    values = tiny.CONFIGS[name]
    tokens = np.random.default_rng(1).integers(64, size=40)
    expected = oracle.logits(values, tiny.tensors(values), tokens)
    model = weights.load(tiny.Checkpoint(values), POSITIONS)
    logits = plain(model, jnp.asarray(tokens)[None])[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)
    cache = model.make_cache((1, POSITIONS))
    logits = cached(
      model, cache, tokens[None], np.array([0]), np.array([40]), None
    )[0]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-4)

  @parameterized.parameters("llama", "qwen3", "gemma3")
  def test_greedy_text_is_the_same_with_a_cache_and_paged(self, name):
    model = weights.load(tiny.Checkpoint(tiny.CONFIGS[name]), POSITIONS)
    prompt = np.random.default_rng(2).integers(64, size=12).tolist()
    text = greedy_plain(model, prompt, 20)
    self.assertEqual(greedy_cached(model, prompt, 20, paged=False), text)
    self.assertEqual(greedy_cached(model, prompt, 20, paged=True), text)

  @parameterized.parameters("llama", "qwen3", "gemma3")
  def test_bfloat16_is_near(self, name):
    values = tiny.CONFIGS[name]
    tokens = np.random.default_rng(1).integers(64, size=20)
    expected = oracle.logits(values, tiny.tensors(values), tokens)
    model = weights.load(tiny.Checkpoint(values), POSITIONS, jnp.bfloat16)
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
      self.assertEqual(leaf.dtype, "float32" if leaf.ndim == 1 else "bfloat16")
    logits = plain(model, jnp.asarray(tokens)[None])[0]
    error = np.sqrt(np.mean((logits - expected) ** 2))
    self.assertLess(error, 0.05 * np.std(expected))

  @parameterized.product(
    name=("llama", "qwen3", "gemma3"),
    bits=(8, 4),
    dtype=("float32", "bfloat16"),
  )
  def test_packed_weights_are_what_they_unpack_to(self, name, bits, dtype):
    values = tiny.CONFIGS[name]
    tokens = np.random.default_rng(1).integers(64, size=20)
    checkpoint = tiny.Checkpoint(values)
    model = weights.load(checkpoint, POSITIONS, dtype, bits)
    made = tiny.tensors(values)
    kinds = set()
    for path, layer in nnx.iter_graph(model):
      kinds.add(type(layer))
      if isinstance(layer, (nnx.QuantizedLinear, nnx.QuantizedEmbed)):
        matrix = np.asarray(layer.dequantize("float32"))
        table = isinstance(layer, nnx.QuantizedEmbed)
        self.assertEqual(layer.bits, 8 if table else bits)
        for part, columns in parts(str(path[-1]), matrix, values).items():
          full = ".".join(map(str, (*path[:-1], part, "weight")))
          full = full if full in made else f"model.{full}"
          lost = np.linalg.norm((columns if table else columns.T) - made[full])
          most = 0.01 if layer.bits == 8 else 0.2
          self.assertLess(lost, most * np.linalg.norm(made[full]))
          made[full] = columns if table else columns.T
    self.assertTrue(kinds.isdisjoint({nnx.Linear, nnx.Embed}))
    expected = oracle.logits(values, made, tokens)
    logits = plain(model, jnp.asarray(tokens)[None])[0]
    error = np.sqrt(np.mean((logits - expected) ** 2))
    most = 1e-4 if dtype == "float32" else 0.05
    self.assertLess(error, most * np.std(expected))
    prompt = tokens[:12].tolist()
    text = greedy_plain(model, prompt, 8)
    self.assertEqual(greedy_cached(model, prompt, 8, paged=False), text)

  def test_missing_and_spare_weights_are_refused(self):
    values = tiny.CONFIGS["llama"]
    made = tiny.tensors(values)
    made["model.layers.0.self_attn.other.weight"] = made.pop(
      "model.norm.weight"
    )
    with self.assertRaisesRegex(
      ValueError,
      r"1 are missing \(`norm.weight`\) and 1 are left over"
      r" \(`layers.0.self_attn.other.weight`\)",
    ):
      weights.load(tiny.Checkpoint(values, made), POSITIONS)

  def test_a_weight_of_another_shape_is_refused(self):
    values = tiny.CONFIGS["llama"]
    made = tiny.tensors(values)
    made["model.norm.weight"] = made["model.norm.weight"][:-1]
    with self.assertRaisesRegex(
      ValueError, r"`norm.weight` must become an array of the shape \(32,\)"
    ):
      weights.load(tiny.Checkpoint(values, made), POSITIONS)


if __name__ == "__main__":
  absltest.main()
