"""Answers requests that come as lines of JSON.

    tools/bazel run //examples/llm:serve < requests.jsonl

A line of standard input is a request, or says that one is not wanted any more:

    {"id": "a", "prompt": "What is the capital of France?", "tokens": 100}
    {"cancel": "a"}

Lines of standard output are pieces of answers, as they come:

    {"id": "a", "text": "The capital"}
    {"id": "a", "done": "end", "tokens": 7}
    {"id": "b", "error": "A prompt and its answer must have at most ..."}

At the end of its input it ends its answers, and says on standard error what it
has done.
"""

import argparse
from collections.abc import Sequence
import dataclasses
import json
import sys
from typing import Any

from examples.llm import options, serving, session, sharding


def main(arguments: Sequence[str] | None = None) -> None:
  """Loads a model and answers what comes."""
  parser = argparse.ArgumentParser(
    prog="serve", description="Answers requests that come as lines of JSON."
  )
  options.add_model(parser)
  group = parser.add_argument_group("serving")
  group.add_argument("--blocks", type=int, default=512)
  group.add_argument("--block-size", type=int, default=16)
  group.add_argument(
    "--texts", type=int, default=8, help="the most written at a time"
  )
  group.add_argument(
    "--chunk", type=int, default=128, help="tokens of a prompt read in a step"
  )
  group.add_argument("--devices", type=int, default=1)
  given: Any = parser.parse_args(arguments)
  model, text = options.load(parser, given)
  try:
    cache = None
    if given.devices > 1:
      cache = model.make_cache((given.blocks, given.block_size))
      sharding.shard(model, cache, given.devices)
    server = serving.Server(
      model,
      text,
      blocks=given.blocks,
      block_size=given.block_size,
      texts=given.texts,
      chunk=given.chunk,
      cache=cache,
    )
  except ValueError as error:
    parser.error(str(error))
  print("[ready]", file=sys.stderr, flush=True)
  session.Session(server, text, sys.stdout).run(sys.stdin)
  counters = dataclasses.asdict(server.counters)
  print(json.dumps({"counters": counters}), file=sys.stderr)


if __name__ == "__main__":
  main()
