"""Many texts at once, on one device."""

from absl.testing import absltest

from examples.llm import generate, sampling, serving
from tests.examples.llm import load, tiny


class ServingTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = load.model(tiny.CONFIGS["llama"])
    cls.writer = generate.Writer(cls.model, load.POSITIONS)

  def server(self, **options):
    return load.server(self.model, **options)

  def test_each_text_is_what_it_is_alone(self):
    load.check(self, self.server(), self.writer, seed=7)

  def test_windows_are_kept_in_blocks(self):
    model = load.model(tiny.CONFIGS["gemma3"])
    writer = generate.Writer(model, load.POSITIONS)
    load.check(self, load.server(model), writer, seed=3)

  def test_stream_gives_the_text_while_others_go_on(self):
    server = self.server()
    first, second = (server.submit(r) for r in load.requests(2, 5))
    text = "".join(server.stream(first))
    expected = load.expected(self.writer, first.request)
    self.assertEqual(text, tiny.Letters().decode(expected))
    "".join(server.stream(second))
    self.assertTrue(server.idle)
    self.assertFalse(server.step())
    self.assertEqual(server.blocks.free, load.BLOCKS)

  def test_prompts_are_read_between_the_steps_of_others(self):
    server = self.server(chunk=4)
    first = server.submit(serving.Request([1, 2], 30))
    server.step()
    server.step()
    begun = len(first.tokens)
    server.submit(serving.Request(list(range(20)), 5))
    for _ in range(4):  # of the five chunks that it takes
      server.step()
    self.assertLen(first.tokens, begun + 4)

  def test_the_same_beginning_is_read_once(self):
    server = self.server()
    prompt = list(range(20))
    for _ in range(2):
      answer = server.submit(serving.Request(prompt, 4))
      "".join(server.stream(answer))
      expected = load.expected(self.writer, answer.request)
      self.assertEqual(answer.tokens, expected)
    # All full blocks of what is before the last token.
    self.assertEqual(server.counters.shared_tokens, 16)

  def test_a_text_that_went_on_is_shared_too(self):
    server = self.server()
    first = server.submit(serving.Request(list(range(8)), 12))
    "".join(server.stream(first))
    again = server.submit(serving.Request([*first.text, 1, 2], 4))
    "".join(server.stream(again))
    self.assertGreaterEqual(server.counters.shared_tokens, 12)
    self.assertEqual(again.tokens, load.expected(self.writer, again.request))

  def test_requests_wait_for_blocks_in_order(self):
    server = self.server(blocks=8)
    answers = [server.submit(serving.Request([i], 20)) for i in range(3)]
    server.step()
    self.assertLen(answers[0].tokens, 1)
    self.assertEmpty(answers[1].tokens + answers[2].tokens)
    server.cancel(answers[1])
    "".join(server.stream(answers[0]))
    server.step()
    self.assertLen(answers[2].tokens, 1)
    self.assertEqual(answers[1].reason, serving.CANCELLED)
    server.cancel(answers[2])
    server.cancel(answers[2])
    self.assertEqual(server.counters.cancelled, 2)
    self.assertEqual(server.blocks.free, 8)

  def test_what_can_never_fit_is_refused(self):
    server = self.server(blocks=8)
    for prompt, most, words in (
      ([], 5, "A prompt must have at least one token"),
      ([1], 0, "`most` must be at least 1, but got 0"),
      ([1] * 40, 30, "at most 64 tokens, but 40 and 30 are 70"),
      ([1] * 30, 10, "into the 8 blocks of the pool, but .* take 10 blocks"),
    ):
      with self.assertRaisesRegex(ValueError, words):
        server.submit(serving.Request(prompt, most))
    with self.assertRaisesRegex(ValueError, "`stops` must be words"):
      server.submit(serving.Request([1], 5, stops=[""]))
    self.assertEqual(server.counters.refused, 5)
    self.assertEqual(server.counters.submitted, 0)
    with self.assertRaisesRegex(ValueError, "`texts` must be at least 1"):
      self.server(texts=0)

  def test_a_stop_word_ends_an_answer(self):
    request = load.requests(9, 5)[8]
    text = tiny.Letters().decode(load.expected(self.writer, request))
    stop = text[2:4]
    server = self.server()
    answer = server.submit(
      serving.Request(request.prompt, request.most, stops=[stop])
    )
    written = "".join(server.stream(answer))
    self.assertEqual(written, text[: text.index(stop)])
    self.assertEqual(answer.reason, serving.STOP)

  def test_sampled_texts_are_what_they_are_alone(self):
    server = self.server()
    answers = [
      server.submit(
        serving.Request(
          request.prompt, 12, sampling.Sampling(temperature=0.8, seed=seed)
        )
      )
      for seed, request in enumerate(load.requests(6, 7))
    ]
    while server.step():
      pass
    for answer in answers:
      request = answer.request
      alone = self.writer.write(
        request.prompt, request.sampling, most=12, ends=tiny.Letters.ends
      )
      self.assertEqual(answer.tokens, list(alone))


if __name__ == "__main__":
  absltest.main()
