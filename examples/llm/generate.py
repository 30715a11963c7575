"""Writing one text, token by token."""

from collections.abc import Iterator, Sequence
import dataclasses
import time
from typing import Any

import numpy as np

from examples.llm import model as model_lib
from examples.llm import sampling as sampling_lib
from examples.llm import steps as steps_lib
from examples.llm import text_stream
from examples.llm import tokenizer as tokenizer_lib

# Prompts are read in pieces of these sizes.
_CHUNKS = (16, 64, 256)
# So many tokens are written in one call, where each is the likeliest: a call
# costs Python and JAX a millisecond or two.
_TOGETHER = 8


@dataclasses.dataclass
class Times:
  """How long a text took.

  Attributes:
    prompt_tokens: how many were read.
    prompt_seconds: until the first new token was there.
    new_tokens: how many were written.
    decode_seconds: for all of them but the first.
    steps: how often the model was applied for them; less often than there are
      tokens, where guesses were right.
  """

  prompt_tokens: int = 0
  prompt_seconds: float = 0.0
  new_tokens: int = 0
  decode_seconds: float = 0.0
  steps: int = 0

  @property
  def prompt_speed(self) -> float:
    """Tokens read in a second."""
    return self.prompt_tokens / max(self.prompt_seconds, 1e-9)

  @property
  def decode_speed(self) -> float:
    """Tokens written in a second."""
    return max(self.new_tokens - 1, 0) / max(self.decode_seconds, 1e-9)


class Writer:
  """Writes texts with a model, one after another.

  Args:
    model: that writes.
    length: the most tokens of a prompt and its answer.
    guesses: how many tokens to guess in a step, from what followed the last few
      tokens where the text had them before; 0 to guess none. Guesses change how
      fast a text comes, and not which.

  Attributes:
    times: of the last text.

  Raises:
    ValueError: if `length` is more than the model has positions for.
  """

  def __init__(self, model: model_lib.Model, length: int, guesses: int = 0):
    if not 2 <= length <= model.positions:
      raise ValueError(
        f"`length` must be from 2 to the model's {model.positions} positions,"
        f" but got {length}."
      )
    if guesses < 0:
      raise ValueError(f"`guesses` must be at least 0, but got {guesses}.")
    self.length = length
    self.times = Times()
    self._guesses = guesses
    self._steps = steps_lib.Steps(model, model.make_cache((1, length)))

  def compile(
    self,
    prompt_tokens: int,
    sampling: sampling_lib.Sampling,
    ends: frozenset[int] = frozenset(),
  ) -> None:
    """Compiles what a prompt of some length and its answer take.

    Args:
      prompt_tokens: the length.
      sampling: how tokens will be chosen.
      ends: as of `write`.
    """
    for size in {_chunk(n) for _, n in _pieces(prompt_tokens)}:
      self._steps.compile(1, size)
    if self._together(sampling):
      self._steps.compile_writing(1, _TOGETHER, len(ends))
    else:
      self._steps.compile(1, 1 + self._guesses, every=True)

  def write(
    self,
    prompt: Sequence[int],
    sampling: sampling_lib.Sampling,
    *,
    most: int | None = None,
    ends: frozenset[int] = frozenset(),
  ) -> Iterator[int]:
    """Writes what comes after a prompt.

    Args:
      prompt: its tokens, at least one.
      sampling: how tokens are chosen.
      most: how many tokens to write at most.
      ends: tokens that end the text; they are not part of it.

    Yields:
      The tokens.

    Raises:
      ValueError: if there is no prompt, or no room for it and one token more.
    """
    tokens = [int(token) for token in prompt]
    if not 0 < len(tokens) < self.length:
      raise ValueError(
        f"A prompt must have from 1 to {self.length - 1} tokens, for which"
        f" there is room, but has {len(tokens)}."
      )
    self.compile(len(tokens), sampling, ends)
    room = self.length - len(tokens)
    most = room if most is None else min(most, room)
    self.times = Times(prompt_tokens=len(tokens))
    begin = time.perf_counter()
    choice = self._read(tokens, sampling)
    self.times.prompt_seconds = time.perf_counter() - begin
    begin = time.perf_counter()
    new = [choice]
    while True:
      for token in new:
        if self.times.new_tokens == most or token in ends:
          return
        tokens.append(token)
        self.times.new_tokens += 1
        yield token
      if self.times.new_tokens == most:
        return
      if self._together(sampling):
        new = self._write(tokens, most - self.times.new_tokens, ends)
        self.times.steps += len(new)
      else:
        new = self._step(tokens, sampling)
        self.times.steps += 1
      self.times.decode_seconds = time.perf_counter() - begin

  def _read(self, tokens: list[int], sampling: sampling_lib.Sampling) -> int:
    """Reads a prompt; returns the token after it."""
    for first, count in _pieces(len(tokens)):
      result = self._run(tokens[first : first + count], first, _chunk(count))
    return sampling_lib.next_token(result, (0,), sampling, tokens)

  def _together(self, sampling: sampling_lib.Sampling) -> bool:
    """Returns whether a program can choose, and so write several tokens."""
    return sampling.is_argmax and not self._guesses

  def _write(
    self, tokens: list[int], most: int, ends: frozenset[int]
  ) -> list[int]:
    """Returns the next tokens, the likeliest, up to one that is an end."""
    text, count = self._steps.write(
      np.array(tokens[-1:], np.int32),
      np.array([len(tokens) - 1], np.int32),
      _TOGETHER,
      min(_TOGETHER, most),
      np.array(sorted(ends), np.int32),
    )
    return np.asarray(text)[0, : int(count)].tolist()

  def _step(
    self, tokens: list[int], sampling: sampling_lib.Sampling
  ) -> list[int]:
    """Returns the tokens that come next: as many as were guessed, and one."""
    index = len(tokens) - 1  # the last token is not in the cache yet
    most = min(self._guesses, self.length - len(tokens) - 1)
    guessed = guess(tokens, most) if most > 0 else []
    result = self._run(
      [tokens[-1], *guessed], index, 1 + self._guesses, every=True
    )
    new: list[int] = []
    # A choice is what it would be without guesses: as long as guesses agree
    # with choices, those after them are right as well.
    for i in range(1 + len(guessed)):
      text = tokens + new
      new.append(sampling_lib.next_token(result, (0, i), sampling, text))
      if i < len(guessed) and new[-1] != guessed[i]:
        break
    return new

  def _run(
    self, new: Sequence[int], index: int, size: int, every: bool = False
  ) -> Any:
    tokens = np.zeros((1, size), np.int32)
    tokens[0, : len(new)] = new
    return self._steps(
      tokens,
      np.array([index], np.int32),
      np.array([len(new)], np.int32),
      every=every,
    )


def answer(
  writer: Writer,
  tokenizer: tokenizer_lib.Tokenizer,
  prompt: Sequence[int],
  sampling: sampling_lib.Sampling,
  *,
  most: int,
  stops: Sequence[str] = (),
) -> Iterator[str]:
  """Writes an answer, as text.

  Args:
    writer: with the model.
    tokenizer: of the model.
    prompt: its tokens.
    sampling: how tokens are chosen.
    most: how many tokens to write at most.
    stops: words that end the answer.

  Yields:
    Pieces of it.
  """
  stream = text_stream.TextStream(tokenizer, stops)
  for token in writer.write(prompt, sampling, most=most, ends=tokenizer.ends):
    yield stream.push(token)
    if stream.stopped:
      return
  yield stream.finish()


def guess(tokens: Sequence[int], most: int) -> list[int]:
  """Guesses what comes next: what followed the last few tokens before.

  Source: prompt lookup decoding (Saxena 2023).

  Args:
    tokens: the text so far.
    most: how many tokens to guess.

  Returns:
    `most` tokens, fewer or none.
  """
  for size in (3, 2):
    end = list(tokens[-size:])
    for first in range(len(tokens) - size - 1, -1, -1):
      if tokens[first] == end[0] and list(tokens[first : first + size]) == end:
        return list(tokens[first + size : first + size + most])
  return []


def _pieces(count: int) -> list[tuple[int, int]]:
  """Returns where pieces of a prompt begin, and how long they are."""
  most = max(_CHUNKS)
  return [(i, min(most, count - i)) for i in range(0, count, most)]


def _chunk(count: int) -> int:
  return steps_lib.bucket(count, _CHUNKS)
