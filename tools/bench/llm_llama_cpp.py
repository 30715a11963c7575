"""The steps of suite `llm` in llama.cpp, through `llama-cpp-python`."""

import contextlib
import ctypes
import os
import pathlib
import tempfile
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

# How llama.cpp calls what comes nearest to our dtypes.
FILE_TYPES = {
  "float32": "F32",
  "bfloat16": "BF16",
  "int8": "Q8_0",
  "int4": "Q4_1",
}
_FTYPES = {
  "float32": llama_cpp.LLAMA_FTYPE_ALL_F32,
  "bfloat16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
  "int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
  "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
}


@llama_cpp.llama_log_callback
def _say_nothing(level, text, user_data):
  del level, text, user_data


class Step:
  """Appends tokens to texts; each call appends the same ones at one place.

  Keys and values are in float16, which is llama.cpp's default.

  Args:
    path: of a GGUF file.
    dtype: one of `FILE_TYPES`.
    context: tokens that each text begins with.
    tokens: `[texts, t]`, to append.
    room: for so many tokens behind a context there is room.
  """

  def __init__(
    self,
    path: pathlib.Path,
    dtype: str,
    context: np.ndarray,
    tokens: np.ndarray,
    room: int,
  ):
    llama_cpp.llama_log_set(_say_nothing, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    self._texts, self._count = tokens.shape
    self._before = context.size
    # What must be freed, the last first.
    self._open = contextlib.ExitStack()
    model = _load(path, dtype)
    self._open.callback(llama_cpp.llama_model_free, model)
    params = llama_cpp.llama_context_default_params()
    length = self._before + max(self._count, room)
    params.n_ctx = self._texts * length
    params.n_seq_max = self._texts
    params.kv_unified = False  # or a text would read what others have
    params.n_batch = max(512, self._texts * self._count)
    params.n_ubatch = params.n_batch
    params.n_threads = params.n_threads_batch = os.cpu_count()
    params.no_perf = True
    self._context = llama_cpp.llama_init_from_model(model, params)
    self._open.callback(llama_cpp.llama_free, self._context)
    self._memory = llama_cpp.llama_get_memory(self._context)
    self._vocabulary = llama_cpp.llama_vocab_n_tokens(
      llama_cpp.llama_model_get_vocab(model)
    )
    for first in range(0, self._before, 512):
      piece = context[None, first : first + 512]
      batch = _batch(piece, first)
      self._decode(batch)
      llama_cpp.llama_batch_free(batch)
    for text in range(1, self._texts):
      llama_cpp.llama_memory_seq_cp(self._memory, 0, text, -1, -1)
    self._batch = _batch(tokens, self._before)
    self._open.callback(llama_cpp.llama_batch_free, self._batch)

  def __call__(self) -> np.ndarray:
    """Returns the logits after the last token, `[texts, vocabulary]`."""
    for text in range(self._texts):
      llama_cpp.llama_memory_seq_rm(self._memory, text, self._before, -1)
    return self._next()

  def _next(self) -> np.ndarray:
    self._decode(self._batch)
    logits = llama_cpp.llama_get_logits(self._context)  # waits
    return np.ctypeslib.as_array(logits, (self._texts, self._vocabulary))

  def write(self, count: int) -> np.ndarray:
    """Returns the likeliest tokens after the given ones, `[texts, count]`.

    Args:
      count: how many of each text.
    """
    given = [self._batch.token[text] for text in range(self._texts)]
    written = []
    for i in range(count):
      for text in range(self._texts):
        self._batch.pos[text] = self._before + i
      logits = self() if i == 0 else self._next()
      written.append(logits.argmax(-1))
      for text in range(self._texts):
        self._batch.token[text] = int(written[-1][text])
    for text in range(self._texts):
      self._batch.pos[text] = self._before
      self._batch.token[text] = given[text]
    return np.stack(written, -1).astype(np.int32)

  def _decode(self, batch: Any) -> None:
    status = llama_cpp.llama_decode(self._context, batch)
    if status:
      raise RuntimeError(f"llama_decode returned {status}.")

  def __del__(self):
    self._open.close()


def _load(path: pathlib.Path, dtype: str) -> Any:
  """Loads a file's model with its weights as another file type."""
  params = llama_cpp.llama_model_quantize_default_params()
  params.ftype = _FTYPES[dtype]
  params.allow_requantize = True
  params.pure = True  # the table of tokens too
  with tempfile.TemporaryDirectory() as folder:
    other = os.path.join(folder, "model.gguf").encode()
    if llama_cpp.llama_model_quantize(
      os.fspath(path).encode(), other, ctypes.byref(params)
    ):
      raise RuntimeError(f"llama.cpp does not quantize to {FILE_TYPES[dtype]}.")
    return llama_cpp.llama_model_load_from_file(
      other, llama_cpp.llama_model_default_params()
    )


def _batch(tokens: np.ndarray, index: int) -> Any:
  """Makes a batch of new tokens of some texts, with logits of the last ones."""
  texts, count = tokens.shape
  batch = llama_cpp.llama_batch_init(tokens.size, 0, 1)
  batch.n_tokens = tokens.size
  for text in range(texts):
    for i in range(count):
      at = text * count + i
      batch.token[at] = int(tokens[text, i])
      batch.pos[at] = index + i
      batch.n_seq_id[at] = 1
      batch.seq_id[at][0] = text
      batch.logits[at] = i == count - 1
  return batch
