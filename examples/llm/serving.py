"""Writing many texts at once.

A `Server` reads prompts in chunks, and between two chunks takes a step for all
texts that are being written. Texts come and go as they like; their keys and
values are in blocks of one pool. A request waits until there are blocks for
its prompt and all of its answer, so that none that has begun has to give way.
"""

import collections
from collections.abc import Iterator, Sequence
import dataclasses
import itertools
from typing import Any

import numpy as np

from examples.llm import blocks as blocks_lib
from examples.llm import model as model_lib
from examples.llm import sampling as sampling_lib
from examples.llm import steps as steps_lib
from examples.llm import text_stream
from examples.llm import tokenizer as tokenizer_lib

# Why an answer has ended.
END, STOP, LENGTH, CANCELLED = "end", "stop", "length", "cancelled"


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked for.

  Attributes:
    prompt: tokens.
    most: how many tokens to write at most.
    sampling: how they are chosen.
    stops: words that end the answer.
  """

  prompt: Sequence[int]
  most: int = 256
  sampling: sampling_lib.Sampling = sampling_lib.Sampling()
  stops: Sequence[str] = ()


class Answer:
  """What comes of a request; made by `Server.submit`.

  Attributes:
    request: what was asked for.
    tokens: those that were written.
    pieces: of the text, which nobody has taken yet.
    reason: why it has ended, or None while it goes on.
  """

  def __init__(self, request: Request, tokenizer: Any):
    self.request = request
    self.tokens: list[int] = []
    self.pieces: collections.deque[str] = collections.deque()
    self.reason: str | None = None
    self._stream = text_stream.TextStream(tokenizer, request.stops)
    self._text = list(request.prompt)  # and what was written
    self._filled = 0  # how many tokens the cache has
    self._blocks: list[int] = []
    self._names: list[bytes] = []

  @property
  def text(self) -> list[int]:
    """All tokens, those of the prompt too."""
    return self._text


@dataclasses.dataclass
class Counters:
  """What a server has done.

  Attributes:
    submitted: requests that were taken.
    refused: requests that could never fit.
    ended: answers that came to their end.
    cancelled: answers that did not.
    chunks: steps that read a part of a prompt.
    steps: steps that wrote a token to each of some texts.
    prompt_tokens: read.
    shared_tokens: of prompts, that were in blocks of other texts.
    new_tokens: written.
    padded_rows: rows of steps that wrote nothing.
    most_blocks: that were held at a time.
  """

  submitted: int = 0
  refused: int = 0
  ended: int = 0
  cancelled: int = 0
  chunks: int = 0
  steps: int = 0
  prompt_tokens: int = 0
  shared_tokens: int = 0
  new_tokens: int = 0
  padded_rows: int = 0
  most_blocks: int = 0


class Server:
  """Writes answers to requests, many at a time.

  All steps are compiled when it is made, and none later. It is for one thread:
  whoever calls `step`, or `stream`, which calls it, makes it work.

  Args:
    model: that writes; its `positions` are the most tokens of a text.
    tokenizer: of the model.
    blocks: how many the pool has.
    block_size: how many tokens a block has.
    texts: how many are written at the same time, at most.
    chunk: how many tokens of a prompt are read in a step, at most.
    cache: a pool of that size, to have it sharded over devices; one is made, if
      None.

  Attributes:
    counters: what it has done.
    blocks: of the pool.

  Raises:
    ValueError: if a number is not positive.
  """

  def __init__(
    self,
    model: model_lib.Model,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    blocks: int = 512,
    block_size: int = 16,
    texts: int = 8,
    chunk: int = 128,
    cache: model_lib.KVCache | None = None,
  ):
    for name, value in (
      ("blocks", blocks),
      ("block_size", block_size),
      ("texts", texts),
      ("chunk", chunk),
    ):
      if value < 1:
        raise ValueError(f"`{name}` must be at least 1, but got {value}.")
    self.blocks = blocks_lib.Blocks(blocks)
    self.counters = Counters()
    self._positions = model.positions
    self._size = block_size
    self._tokenizer = tokenizer
    self._waiting: collections.deque[Answer] = collections.deque()
    self._running: list[Answer] = []
    self._rows = _powers(texts)
    self._chunks = [size for size in _powers(chunk) if size >= min(16, chunk)]
    self._table_size = -(-model.positions // block_size)
    if cache is None:
      cache = model.make_cache((blocks, block_size))
    self._steps = steps_lib.Steps(model, cache, self._table_size)
    for rows in self._rows:
      self._steps.compile(rows, 1)
    for size in self._chunks:
      self._steps.compile(1, size)

  @property
  def idle(self) -> bool:
    """Whether there is nothing to do."""
    return not self._waiting and not self._running

  def submit(self, request: Request) -> Answer:
    """Takes a request.

    Args:
      request: what is asked for.

    Returns:
      The answer, which grows with each step.

    Raises:
      ValueError: if it can never be answered, and why.
    """
    try:
      answer = Answer(request, self._tokenizer)
      self._check(request)
    except ValueError:
      self.counters.refused += 1
      raise
    self.counters.submitted += 1
    self._waiting.append(answer)
    return answer

  def stream(self, answer: Answer) -> Iterator[str]:
    """Yields the text of an answer as it comes, and works meanwhile.

    Args:
      answer: from `submit`.
    """
    while True:
      while answer.pieces:
        yield answer.pieces.popleft()
      if answer.reason is not None:
        return
      self.step()

  def cancel(self, answer: Answer) -> None:
    """Ends an answer; one that has ended stays as it is.

    Args:
      answer: from `submit`.
    """
    if answer.reason is None:
      self._end(answer, CANCELLED)

  def step(self) -> bool:
    """Reads a chunk of a prompt, and writes a token to each running text.

    Returns:
      Whether there was anything to do.
    """
    self._admit()
    worked = False
    reading = [a for a in self._running if len(a.text) - a._filled > 1]
    if reading:
      self._read(reading[0])
      worked = True
    writing = [a for a in self._running if len(a.text) - a._filled == 1]
    if writing:
      self._write(writing)
      worked = True
    return worked

  def _check(self, request: Request) -> None:
    """Raises if a request can never be answered."""
    prompt = len(request.prompt)
    if prompt < 1:
      raise ValueError("A prompt must have at least one token, but has none.")
    if request.most < 1:
      raise ValueError(f"`most` must be at least 1, but got {request.most}.")
    if prompt + request.most > self._positions:
      raise ValueError(
        f"A prompt and its answer must have at most {self._positions} tokens,"
        f" but {prompt} and {request.most} are {prompt + request.most}."
      )
    needed = self._needed(request)
    if needed > self.blocks.count:
      raise ValueError(
        f"A prompt and its answer must fit into the {self.blocks.count} blocks"
        f" of the pool, but {prompt} and {request.most} tokens take {needed}"
        f" blocks of {self._size}."
      )

  def _needed(self, request: Request) -> int:
    # The last token is never read, and so has no place in the cache.
    return -(-(len(request.prompt) + request.most - 1) // self._size)

  def _admit(self) -> None:
    """Begins with requests that wait, in order, while there is room."""
    while self._waiting and len(self._running) < self._rows[-1]:
      answer = self._waiting[0]
      # All but the last token may be in blocks of others; that one must be
      # read, for what comes after it.
      names = blocks_lib.digests(answer.text[:-1], self._size)
      shared = self.blocks.find(names)
      more = self._needed(answer.request) - len(shared)
      taken = self.blocks.take(shared, more)
      if taken is None:
        return
      self._waiting.popleft()
      self._running.append(answer)
      answer._blocks = taken
      answer._names = names[: len(shared)]
      answer._filled = len(shared) * self._size
      self.counters.shared_tokens += answer._filled
      held = self.blocks.count - self.blocks.free
      self.counters.most_blocks = max(self.counters.most_blocks, held)

  def _read(self, answer: Answer) -> None:
    """Reads a chunk of a prompt; after its last token, writes the first."""
    count = min(len(answer.text) - answer._filled, self._chunks[-1])
    result = self._run([answer], count, steps_lib.bucket(count, self._chunks))
    self.counters.chunks += 1
    self.counters.prompt_tokens += count
    if answer._filled == len(answer.text):
      self._push(answer, result, 0)

  def _write(self, answers: Sequence[Answer]) -> None:
    """Writes one token to each of some texts."""
    result = self._run(answers, 1, 1)
    self.counters.steps += 1
    for row, answer in enumerate(answers):
      self._push(answer, result, row)

  def _run(self, answers: Sequence[Answer], count: int, size: int) -> Any:
    """Appends the next `count` tokens of each text to the cache."""
    rows = steps_lib.bucket(len(answers), self._rows)
    self.counters.padded_rows += rows - len(answers)
    tokens = np.zeros((rows, size), np.int32)
    index = np.zeros(rows, np.int32)
    lengths = np.zeros(rows, np.int32)
    table = np.zeros((rows, self._table_size), np.int32)
    for i, answer in enumerate(answers):
      first = answer._filled
      tokens[i, :count] = answer.text[first : first + count]
      index[i], lengths[i] = first, count
      table[i, : len(answer._blocks)] = answer._blocks
    result = self._steps(tokens, index, lengths, table)
    for answer in answers:
      answer._filled += count
      self._name_blocks(answer)
    return result

  def _name_blocks(self, answer: Answer) -> None:
    """Lets others share the blocks that a text has filled."""
    known = len(answer._names)
    if answer._filled // self._size == known:
      return
    answer._names = blocks_lib.digests(
      answer.text[: answer._filled], self._size, answer._names
    )
    for i in range(known, len(answer._names)):
      self.blocks.name(answer._blocks[i], answer._names[i])

  def _push(self, answer: Answer, result: Any, row: int) -> None:
    """Appends the token after a row of a step to a text, or ends it."""
    how = answer.request.sampling
    token = sampling_lib.next_token(result, (row,), how, answer.text)
    if token in self._tokenizer.ends:
      self._end(answer, END)
      return
    answer.tokens.append(token)
    answer.text.append(token)
    self.counters.new_tokens += 1
    self._say(answer, answer._stream.push(token))
    if answer._stream.stopped:
      self._end(answer, STOP)
    elif len(answer.tokens) == answer.request.most:
      self._end(answer, LENGTH)

  def _end(self, answer: Answer, reason: str) -> None:
    if answer in self._running:
      self._running.remove(answer)
    else:
      self._waiting.remove(answer)
    self.blocks.give_back(answer._blocks)
    answer._blocks = []
    answer.reason = reason
    if reason == CANCELLED:
      self.counters.cancelled += 1
      return
    self.counters.ended += 1
    self._say(answer, answer._stream.finish())

  @staticmethod
  def _say(answer: Answer, piece: str) -> None:
    if piece:
      answer.pieces.append(piece)


def _powers(most: int) -> list[int]:
  """Returns the powers of 2 below a number, and the number."""
  powers = itertools.takewhile(lambda n: n < most, (1 << i for i in range(64)))
  return [*powers, most]
