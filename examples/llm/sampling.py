"""How the next token is chosen.

A choice depends on the logits, the seed and the position, and on nothing else:
a text is the same whether it is made alone, beside others, or by speculation.
"""

from collections.abc import Collection, Sequence
import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Sampling:
  """Which tokens may come next, and how likely.

  Filters apply one after another, in this order, each to what the one before
  has left.

  Attributes:
    temperature: logits are divided by it; 0 takes the likeliest token.
    top_k: how many of the likeliest tokens are kept; all, if 0.
    top_p: the likeliest tokens are kept until their probabilities reach it.
    min_p: tokens are kept that are at least so many times as likely as the
      likeliest.
    repetition_penalty: logits of tokens that the text has are divided by it,
      or multiplied where they are negative.
    seed: of the choices.

  Raises:
    ValueError: if a number is out of range.
  """

  temperature: float = 0.0
  top_k: int = 0
  top_p: float = 1.0
  min_p: float = 0.0
  repetition_penalty: float = 1.0
  seed: int = 0

  def __post_init__(self):
    for name, right, words in (
      ("temperature", self.temperature >= 0, "at least 0"),
      ("top_k", self.top_k >= 0, "at least 0"),
      ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
      ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
      ("repetition_penalty", self.repetition_penalty > 0, "positive"),
      ("seed", self.seed >= 0, "at least 0"),
    ):
      if not right:
        raise ValueError(
          f"`{name}` must be {words}, but got {getattr(self, name)}."
        )

  @property
  def is_argmax(self) -> bool:
    """Whether the choice is the largest of the logits as they are."""
    return self.temperature == 0 and self.repetition_penalty == 1


def next_token(
  result: tuple[Any, Any],
  place: tuple[int, ...],
  sampling: Sampling,
  text: Sequence[int],
) -> int:
  """Chooses the token after a text.

  Args:
    result: of a step: the likeliest tokens, and logits with one axis more.
    place: where in the former the text's is.
    sampling: how.
    text: all tokens so far.
  """
  # As NumPy arrays: to index others would compile a program.
  likeliest, logits = result
  if sampling.is_argmax:
    return int(np.asarray(likeliest)[place])
  return choose(np.asarray(logits)[place], sampling, text, len(text))


def choose(
  logits: np.ndarray, sampling: Sampling, seen: Collection[int], position: int
) -> int:
  """Chooses a token.

  Args:
    logits: `[vocabulary]` float32.
    sampling: how.
    seen: the tokens of the text so far.
    position: where the token will stand in the text.
  """
  logits = penalized(logits, sampling, seen)
  if sampling.temperature == 0:
    return int(logits.argmax())
  tokens, probabilities = distribution(logits, sampling)
  # Numbers by position, so that none depends on how often one was asked for.
  random = np.random.Generator(
    np.random.Philox(key=sampling.seed, counter=position)
  )
  sums = np.cumsum(probabilities)
  place = np.searchsorted(sums, random.random() * sums[-1], side="right")
  return int(tokens[min(place, len(tokens) - 1)])


def penalized(
  logits: np.ndarray, sampling: Sampling, seen: Collection[int]
) -> np.ndarray:
  """Returns logits after the penalty for repetition.

  Args:
    logits: `[vocabulary]`.
    sampling: with the penalty.
    seen: the tokens of the text so far.
  """
  if sampling.repetition_penalty == 1 or not seen:
    return logits
  logits = logits.copy()
  tokens = np.unique(np.fromiter(seen, np.int64))
  values = logits[tokens]
  logits[tokens] = np.where(
    values > 0,
    values / sampling.repetition_penalty,
    values * sampling.repetition_penalty,
  )
  return logits


def distribution(
  logits: np.ndarray, sampling: Sampling
) -> tuple[np.ndarray, np.ndarray]:
  """Returns which tokens may be chosen, and their probabilities.

  Args:
    logits: `[vocabulary]`.
    sampling: with a temperature that is not 0.

  Returns:
    Two arrays of one length, the likeliest token first if any are left out.
  """
  x = logits.astype(np.float64) / sampling.temperature
  tokens = np.arange(len(x))
  if 0 < sampling.top_k < len(x):
    tokens = np.argpartition(-x, sampling.top_k - 1)[: sampling.top_k]
  if sampling.min_p > 0:
    tokens = tokens[x[tokens] >= x.max() + np.log(sampling.min_p)]
  if len(tokens) < len(x) or sampling.top_p < 1:
    tokens = tokens[np.argsort(-x[tokens], kind="stable")]
  weights = np.exp(x[tokens] - x.max())
  if sampling.top_p < 1:
    sums = np.cumsum(weights)
    count = np.searchsorted(sums, sampling.top_p * sums[-1]) + 1
    tokens, weights = tokens[:count], weights[:count]
  return tokens, weights / weights.sum()
