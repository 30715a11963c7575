"""Requests as lines of JSON."""

import io
import json

from absl.testing import absltest

from examples.llm import generate, serving, session, tokenizer
from tests.examples.llm import load, tiny


class SessionTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model = load.model(tiny.CONFIGS["llama"])

  def run_lines(self, *lines):
    """Returns what comes out, by the ids of requests, and the server."""
    server = serving.Server(
      self.model, tiny.Letters(), blocks=load.BLOCKS, block_size=4, texts=4
    )
    output = io.StringIO()
    served = session.Session(server, tiny.Letters(), output)
    served.run(
      line if isinstance(line, str) else json.dumps(line) for line in lines
    )
    found = {}
    for line in output.getvalue().splitlines():
      values = json.loads(line)
      found.setdefault(values.pop("id"), []).append(values)
    return found, server

  def test_answers_come_by_their_ids(self):
    writer = generate.Writer(self.model, load.POSITIONS)
    found, server = self.run_lines(
      {"id": "a", "prompt": "12345", "tokens": 9},
      "\n",
      {"id": 7, "prompt": "ABC", "tokens": 4},
    )
    for name, prompt, most in (("a", "12345", 9), (7, "ABC", 4)):
      *pieces, last = found[name]
      request = serving.Request(tiny.Letters().encode(prompt), most)
      expected = load.expected(writer, request)
      text = "".join(piece["text"] for piece in pieces)
      self.assertEqual(text, tiny.Letters().decode(expected))
      self.assertEqual(last["tokens"], len(expected))
      self.assertIn(last["done"], ("length", "end"))
    self.assertEqual(server.blocks.free, load.BLOCKS)

  def test_a_request_is_cancelled(self):
    found, server = self.run_lines(
      {"id": "a", "prompt": "12345", "tokens": 40},
      {"cancel": "a"},
      {"cancel": "nobody"},
    )
    self.assertEqual(found["a"][-1]["done"], "cancelled")
    self.assertEqual(server.counters.cancelled, 1)

  def test_wrong_lines_are_refused_in_words(self):
    for line, words in (
      ("{", "Expecting property name"),
      ("[]", "must be an object"),
      ({"prompt": "a"}, "`id` must be there"),
      ({"id": "x"}, "either `prompt` or `messages`"),
      ({"id": "x", "prompt": "1", "temprature": 1}, "has temprature"),
      ({"id": "x", "prompt": "1", "top_p": 2}, "`top_p` must be"),
      ({"id": "x", "prompt": "1", "tokens": 900}, "at most 64 tokens"),
    ):
      with self.subTest(words):
        found, _ = self.run_lines(line)
        ((answers),) = found.values()
        self.assertLen(answers, 1)
        self.assertIn(words, answers[0]["error"])

  def test_messages_need_a_template(self):
    line = {"messages": [{"role": "user", "content": "1"}]}
    with self.assertRaisesRegex(ValueError, "must have a chat template"):
      session.parse(line, tokenizer.Tokenizer(None, frozenset()))


if __name__ == "__main__":
  absltest.main()
