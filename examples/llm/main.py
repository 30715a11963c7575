"""Answers a prompt with a language model.

tools/bazel run //examples/llm -- --prompt "What is the capital of France?"
"""

import argparse
from collections.abc import Sequence
import sys
import time
from typing import Any

from examples.llm import generate, options, sampling


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="llm", description="Answers a prompt with a language model."
  )
  parser.add_argument("--prompt", required=True)
  parser.add_argument("--system", help="what the model is told about itself")
  parser.add_argument(
    "--raw", action="store_true", help="go on with the prompt, without a chat"
  )
  parser.add_argument(
    "--tokens", type=int, default=256, help="the most to write"
  )
  parser.add_argument(
    "--stop", action="append", default=[], help="a word that ends the answer"
  )
  parser.add_argument(
    "--guesses",
    type=int,
    default=0,
    help="tokens to guess in a step from what the text had before (prompt"
    " lookup): faster where texts repeat themselves, and the same text",
  )
  options.add_model(parser)
  group = parser.add_argument_group("sampling")
  group.add_argument(
    "--temperature", type=float, default=0.0, help="0 takes the likeliest"
  )
  group.add_argument("--top-k", type=int, default=0)
  group.add_argument("--top-p", type=float, default=1.0)
  group.add_argument("--min-p", type=float, default=0.0)
  group.add_argument("--repetition-penalty", type=float, default=1.0)
  group.add_argument("--seed", type=int, default=0)
  return parser


def main(arguments: Sequence[str] | None = None) -> None:
  """Loads, answers and says how fast."""
  parser = _parser()
  given: Any = parser.parse_args(arguments)
  if given.tokens < 1:
    parser.error(f"--tokens must be at least 1, but got {given.tokens}")
  begin = time.perf_counter()
  model, text = options.load(parser, given)
  loaded = time.perf_counter()
  messages = [{"role": "user", "content": given.prompt}]
  if given.system is not None:
    messages.insert(0, {"role": "system", "content": given.system})
  try:
    how = sampling.Sampling(
      given.temperature,
      given.top_k,
      given.top_p,
      given.min_p,
      given.repetition_penalty,
      given.seed,
    )
    prompt = text.encode(given.prompt) if given.raw else text.chat(messages)
    writer = generate.Writer(model, model.positions, given.guesses)
    pieces = generate.answer(
      writer, text, prompt, how, most=given.tokens, stops=given.stop
    )
    writer.compile(len(prompt), how, text.ends)
    compiled = time.perf_counter()
    for piece in pieces:
      print(piece, end="", flush=True)
  except ValueError as error:
    parser.error(str(error))
  print()
  times = writer.times
  packed = f", weights of {given.bits} bits" if given.bits else ""
  print(
    f"[{model.dtype.name}{packed}: loaded in {loaded - begin:.1f} s, compiled"
    f" in {compiled - loaded:.1f} s; prompt {times.prompt_tokens} tokens,"
    f" {times.prompt_speed:.1f} tokens/s; answer {times.new_tokens} tokens in"
    f" {times.steps + 1} steps, {times.decode_speed:.1f} tokens/s]",
    file=sys.stderr,
  )


if __name__ == "__main__":
  main()
