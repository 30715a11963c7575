"""Writing one text, with guesses and without."""

from unittest import mock

from absl.testing import absltest, parameterized
from jax import numpy as jnp
import numpy as np

from examples.llm import generate, sampling, weights
import nnx
from tests.examples.llm import tiny

LENGTH = 96
GREEDY = sampling.Sampling()
PROMPT = [5, 9, 2, 7] * 6


class GenerateTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = weights.load(tiny.Checkpoint(tiny.CONFIGS["llama"]), LENGTH)
    cls.plain = generate.Writer(cls.model, LENGTH)
    cls.guessing = generate.Writer(cls.model, LENGTH, guesses=4)

  def test_text_is_the_likeliest_token_each_time(self):
    read = nnx.jit(lambda model, tokens: model.logits(model(tokens)))
    text = np.zeros((1, LENGTH), np.int32)
    text[0, : len(PROMPT)] = PROMPT
    for end in range(len(PROMPT), len(PROMPT) + 12):
      text[0, end] = read(self.model, jnp.asarray(text))[0, end - 1].argmax()
    written = list(self.plain.write(PROMPT, GREEDY, most=12))
    self.assertEqual(written, text[0, len(PROMPT) :][:12].tolist())

  def test_likeliest_tokens_come_several_a_call(self):
    counted = mock.patch.object(
      self.plain._steps, "write", wraps=self.plain._steps.write
    )
    with counted as write:
      text = list(self.plain.write(PROMPT, GREEDY, most=21))
    self.assertLen(text, 21)
    # The first is there when the prompt has been read.
    self.assertEqual([call.args[3] for call in write.call_args_list], [8, 8, 4])
    self.assertEqual(self.plain.times.steps, 20)
    # One by one: a penalty, though of almost nothing, must be seen by Python.
    almost = sampling.Sampling(repetition_penalty=1 + 1e-9)
    with counted as write:
      self.assertEqual(list(self.plain.write(PROMPT, almost, most=21)), text)
    write.assert_not_called()

  def test_steps_end_with_the_text(self):
    text = list(self.plain.write(PROMPT, GREEDY, most=20))
    end = text[3]
    first = text.index(end)
    ends = frozenset([end, 63])
    written = list(self.plain.write(PROMPT, GREEDY, most=20, ends=ends))
    self.assertEqual(written, text[:first])
    # The model was applied no more once the end was there.
    self.assertEqual(self.plain.times.steps, first)

  def test_a_program_makes_no_wide_copy_of_its_weights(self):
    values = tiny.CONFIGS["llama"]
    model = weights.load(tiny.Checkpoint(values), LENGTH, jnp.bfloat16)
    steps = generate.Writer(model, LENGTH)
    steps.compile(8, GREEDY)
    programs = steps._steps._programs
    (program,) = (programs[key] for key in programs if key[0] == "write")
    text = program.as_text()
    shape = ",".join(map(str, model.embed_tokens.embedding.shape))
    entry = text[text.index("\nENTRY ") :]
    self.assertIn(f"bf16[{shape}]", entry)
    self.assertNotIn(f"f32[{shape}]", entry)

  @parameterized.parameters(
    GREEDY,
    sampling.Sampling(temperature=0.7, seed=1),
    sampling.Sampling(temperature=1.0, top_k=8, top_p=0.9, min_p=0.01, seed=2),
    sampling.Sampling(repetition_penalty=1.3),
  )
  def test_guesses_change_no_text(self, how):
    text = list(self.plain.write(PROMPT, how))
    self.assertLen(text, LENGTH - len(PROMPT))
    self.assertEqual(list(self.guessing.write(PROMPT, how)), text)

  def test_right_guesses_save_steps(self):
    values = tiny.CONFIGS["llama"]
    made = tiny.tensors(values)
    for name in made:
      if "o_proj" in name:
        # A token then depends on the last one alone, and texts soon repeat.
        made[name] *= 0
    model = weights.load(tiny.Checkpoint(values, made), LENGTH)
    writer = generate.Writer(model, LENGTH, guesses=4)
    text = list(writer.write(PROMPT, GREEDY))
    self.assertLess(writer.times.steps, 0.7 * len(text))
    self.assertEqual(writer.times.new_tokens, len(text))
    self.assertEqual(writer.times.prompt_tokens, len(PROMPT))
    plain = generate.Writer(model, LENGTH)
    self.assertEqual(list(plain.write(PROMPT, GREEDY)), text)

  def test_guesses_are_what_followed_before(self):
    self.assertEqual(generate.guess([1, 2, 3, 4, 5, 2, 3], 2), [4, 5])
    self.assertEqual(generate.guess([1, 2, 3, 4, 1, 2, 3, 5, 2, 3], 1), [5])
    self.assertEqual(generate.guess([1, 2, 3], 2), [])

  def test_an_end_is_not_written(self):
    text = list(self.plain.write(PROMPT, GREEDY))
    for writer in (self.plain, self.guessing):
      ends = frozenset(text[9:10])
      written = list(writer.write(PROMPT, GREEDY, ends=ends))
      self.assertEqual(written, text[: text.index(text[9])])

  def test_most_is_kept(self):
    for most in (0, 1, 7):
      written = list(self.guessing.write(PROMPT, GREEDY, most=most))
      self.assertLen(written, most)

  def test_a_long_prompt_is_read_in_pieces(self):
    model = weights.load(tiny.Checkpoint(tiny.CONFIGS["qwen3"]), 300)
    writer = generate.Writer(model, 300)
    prompt = np.random.default_rng(0).integers(64, size=290)
    tokens = nnx.jit(lambda m, t: m.logits(m(t))[0, -1].argmax())(
      model, jnp.asarray(prompt)[None]
    )
    self.assertEqual(list(writer.write(prompt, GREEDY, most=1)), [int(tokens)])

  def test_what_does_not_fit_is_refused(self):
    for prompt in ([], [1] * LENGTH):
      with self.assertRaisesRegex(ValueError, "must have from 1 to 95 tokens"):
        list(self.plain.write(prompt, GREEDY))
    with self.assertRaisesRegex(ValueError, "`length` must be from 2 to"):
      generate.Writer(self.model, LENGTH + 1)
    with self.assertRaisesRegex(ValueError, "`guesses` must be at least 0"):
      generate.Writer(self.model, LENGTH, guesses=-1)

  def test_a_stop_word_ends_the_answer(self):
    def write(stops):
      return "".join(
        generate.answer(
          self.plain, tiny.Letters(), PROMPT, GREEDY, most=30, stops=stops
        )
      )

    text = write([])
    self.assertLen(text, 30)
    stop = text[10:12]
    self.assertEqual(write([stop]), text[: text.index(stop)])


if __name__ == "__main__":
  absltest.main()
