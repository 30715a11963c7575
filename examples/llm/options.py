"""What the commands take from their command lines."""

import argparse
from typing import Any

from examples.llm import loading, tokenizer
from examples.llm import model as model_lib


def add_model(parser: argparse.ArgumentParser) -> None:
  """Adds the options that say which model, and how."""
  group = parser.add_argument_group("model")
  group.add_argument(
    "--model",
    metavar="PATH",
    help="a GGUF file, or a folder with safetensors; by default"
    " SmolLM2-135M-Instruct",
  )
  group.add_argument(
    "--dtype",
    choices=["float32", "bfloat16"],
    default="bfloat16",
    help="of the weights and of what is computed; by default bfloat16",
  )
  group.add_argument(
    "--bits",
    type=int,
    choices=[8, 4],
    help="pack the weights into so many bits; by default they are not packed",
  )
  group.add_argument(
    "--context",
    type=int,
    default=2048,
    help="the most tokens of a prompt and its answer",
  )


def load(
  parser: argparse.ArgumentParser, options: Any
) -> tuple[model_lib.Model, tokenizer.Tokenizer]:
  """Loads what `add_model`'s options name, or ends the program in words."""
  if options.context < 2:
    parser.error(f"--context must be at least 2, but got {options.context}")
  try:
    return loading.load(
      options.model,
      positions=options.context,
      dtype=options.dtype,
      bits=options.bits,
    )
  except (FileNotFoundError, ImportError, ValueError) as error:
    parser.error(str(error))
