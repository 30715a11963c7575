"""A model's compiled steps, one for each number of texts and new tokens.

A step is looked up, never made, when it is called: what has not been compiled
before cannot be compiled by surprise while somebody waits for an answer.
"""

from collections.abc import Iterable
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from examples.llm import model as model_lib
import nnx


def bucket(count: int, sizes: Iterable[int]) -> int:
  """Returns the smallest of some sizes that is not less than a count."""
  return min(size for size in sizes if size >= count)


@nnx.jit(donate_argnames="cache")
def _last(model, cache, tokens, index, lengths, block_table):
  """Appends tokens; returns the choice after the last one, and its logits."""
  x = model(tokens, cache, index, lengths, block_table)
  last = jnp.maximum(lengths - 1, 0)[:, None, None]
  logits = model.logits(jnp.take_along_axis(x, last, axis=1)[:, 0])
  return logits.argmax(-1), logits


@nnx.jit(donate_argnames="cache")
def _every(model, cache, tokens, index, lengths, block_table):
  """As `_last`, after every one of the tokens."""
  logits = model.logits(model(tokens, cache, index, lengths, block_table))
  return logits.argmax(-1), logits


@nnx.jit(donate_argnames="cache")
def _likeliest(model, cache, tokens, index, room, count, ends, block_table):
  """Appends the likeliest tokens, one after another, in one program."""
  definition, weights = nnx.split(model)
  each = jnp.ones_like(index)

  def goes_on(carry):
    _, _, last, i = carry
    ended = (last[:, None] == ends).any(1).all()
    return (i < count) & ~ended

  def step(carry):
    cache, text, last, i = carry
    # Weights that come with the token are none that do not change in the loop,
    # of which XLA would make wider copies before it.
    model = nnx.merge(definition, lax.optimization_barrier((weights, last))[0])
    x = model(last[:, None], cache, index + i, each, block_table)
    last = model.logits(x[:, 0]).argmax(-1).astype(text.dtype)
    return cache, text.at[:, i].set(last), last, i + 1

  carry = cache, room, tokens, jnp.int32(0)
  _, text, _, written = nnx.while_loop(goes_on, step, carry)
  return text, written


class Steps:
  """Appends tokens to texts in a cache, and says what may come next.

  Args:
    model: whose steps they are.
    cache: of the model; updated in place.
    blocks: how many blocks a text may have, if the cache is a pool.
  """

  def __init__(
    self,
    model: model_lib.Model,
    cache: model_lib.KVCache,
    blocks: int | None = None,
  ):
    self._model = model
    self._cache = cache
    self._blocks = blocks
    self._programs: dict[tuple[Any, ...], Any] = {}

  @property
  def compiled(self) -> int:
    """How many steps there are."""
    return len(self._programs)

  def compile(self, rows: int, tokens: int, every: bool = False) -> None:
    """Makes a step, if there is none of this size.

    Args:
      rows: how many texts.
      tokens: how many new tokens each.
      every: whether to say what comes after each of the tokens.
    """
    if (rows, tokens, every) in self._programs:
      return
    step = _every if every else _last
    self._programs[rows, tokens, every] = step.lower(
      self._model,
      self._cache,
      np.zeros((rows, tokens), np.int32),
      np.zeros(rows, np.int32),
      np.zeros(rows, np.int32),
      self._table(rows),
    ).compile()

  def compile_writing(self, rows: int, most: int, ends: int) -> None:
    """Makes a program that writes, if there is none of this size.

    Args:
      rows: how many texts.
      most: how many tokens it writes at most.
      ends: how many tokens end a text.
    """
    if ("write", rows, most, ends) in self._programs:
      return
    self._programs["write", rows, most, ends] = _likeliest.lower(
      self._model,
      self._cache,
      np.zeros(rows, np.int32),
      np.zeros(rows, np.int32),
      np.zeros((rows, most), np.int32),
      np.int32(0),
      np.zeros(ends, np.int32),
      self._table(rows),
    ).compile()

  def __call__(
    self,
    tokens: np.ndarray,
    index: np.ndarray,
    lengths: np.ndarray,
    block_table: np.ndarray | None = None,
    *,
    every: bool = False,
  ) -> tuple[jax.Array, jax.Array]:
    """Takes a step that was compiled.

    Args:
      tokens: `[b, t]` int32, new tokens, padded on the right.
      index: `[b]` int32, how many tokens of each text the cache has.
      lengths: `[b]` int32, how many of the new ones there are.
      block_table: `[b, blocks]` int32, the blocks of each text, for a pool.
      every: as given to `compile`.

    Returns:
      The likeliest token after the last one of each text, `[b]`, and the
      logits, `[b, vocabulary]`; with `every`, after each of the new tokens, and
      so with another axis after the first.

    Raises:
      KeyError: if there is no such step.
    """
    step = self._programs[*tokens.shape, every]
    return step(self._model, self._cache, tokens, index, lengths, block_table)

  def write(
    self,
    tokens: np.ndarray,
    index: np.ndarray,
    most: int,
    count: int,
    ends: np.ndarray,
    block_table: np.ndarray | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """Writes the likeliest tokens with a program that was compiled.

    What Python and JAX cost a call, these tokens share.

    Args:
      tokens: `[b]` int32, the last of each text, which the cache has not yet.
      index: `[b]` int32, how many tokens of each text the cache has.
      most: as given to `compile_writing`.
      count: how many tokens to write, at most `most`.
      ends: `[e]` int32, tokens after which no more are written, once each text
        has just got one of them.
      block_table: as of a step.

    Returns:
      `[b, most]` tokens, and how many of each text have been written.

    Raises:
      KeyError: if there is no such program.
    """
    program = self._programs["write", len(tokens), most, len(ends)]
    return program(
      self._model,
      self._cache,
      tokens,
      index,
      np.zeros((len(tokens), most), np.int32),
      np.int32(count),
      ends,
      block_table,
    )

  def _table(self, rows: int) -> np.ndarray | None:
    """Returns a table of blocks for so many texts, if the cache is a pool."""
    if self._blocks is None:
      return None
    return np.zeros((rows, self._blocks), np.int32)
