"""Text that comes token by token, up to a stop word."""

from collections.abc import Sequence
from typing import Any


class TextStream:
  """Turns tokens into text as they come, up to a stop word.

  Bytes of an unfinished character, and what may be the beginning of a stop
  word, are kept back until more is known.

  Args:
    tokenizer: its `decode` is called.
    stops: words that end the text, and are not part of it.

  Attributes:
    stopped: whether a stop word was found.
  """

  # As many tokens are decoded anew with each one, since the text of a token may
  # depend on those before it.
  _CONTEXT = 8

  def __init__(self, tokenizer: Any, stops: Sequence[str] = ()):
    if any(not stop for stop in stops):
      raise ValueError("`stops` must be words, but one is empty.")
    self.stopped = False
    self._tokenizer = tokenizer
    self._stops = tuple(stops)
    self._tokens: list[int] = []
    self._known = 0  # tokens whose text is out, or in `_held`
    self._held = ""

  def push(self, token: int) -> str:
    """Takes a token; returns the text that is certain now."""
    if self.stopped:
      return ""
    self._tokens.append(token)
    text = self._new()
    if text.endswith("\ufffd"):
      return ""
    self._known = len(self._tokens)
    return self._release(text, final=False)

  def finish(self) -> str:
    """Returns the rest of the text, once no more tokens come."""
    if self.stopped:
      return ""
    text = self._new()
    self._known = len(self._tokens)
    return self._release(text, final=True)

  def _new(self) -> str:
    """Returns the text of the tokens that are not known yet."""
    first = max(0, self._known - self._CONTEXT)
    before = self._tokenizer.decode(self._tokens[first : self._known])
    return self._tokenizer.decode(self._tokens[first:])[len(before) :]

  def _release(self, text: str, final: bool) -> str:
    text = self._held + text
    found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
    if found:
      self.stopped, self._held = True, ""
      return text[: min(found)]
    kept = () if final else (_overlap(text, stop) for stop in self._stops)
    cut = len(text) - max(kept, default=0)
    self._held = text[cut:]
    return text[:cut]


def _overlap(text: str, stop: str) -> int:
  """Returns how much of a stop word the end of a text may be."""
  sizes = range(min(len(text), len(stop) - 1), 0, -1)
  return next((n for n in sizes if text.endswith(stop[:n])), 0)
