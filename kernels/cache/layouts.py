"""The orders that the axes of caches and tokens come in."""

import enum
from typing import Any

import jax


class Layout(enum.StrEnum):
  """The order of the axes of a cache, and of arrays of tokens, by letters.

  A cache is `[..., r, s, n, h]` or `[..., r, n, s, h]`: rows, slots, heads and
  the elements of a head. Arrays of tokens are `[b, t, n, h]` or `[b, n, t, h]`,
  or have several axes in place of the heads'.

  Attributes:
    tokens_axis: Of the tokens, in an array of them.
    heads_axis: Of the heads, in an array of tokens.
    slots_axis: Of the slots in a cache, from the end.
  """

  BSNH = "bsnh"
  BNSH = "bnsh"

  def __init__(self, letters: str):
    self.tokens_axis = letters.index("s")
    self.heads_axis = letters.index("n")
    self.slots_axis = self.tokens_axis - len(letters)

  @property
  def heads_first(self) -> bool:
    """Returns whether the heads come before the tokens or slots."""
    return self is Layout.BNSH

  def order(self, tokens: Any, *heads: Any) -> tuple[Any, ...]:
    """Puts what belongs to the two middle axes in order.

    Args:
      tokens: Of the tokens or slots.
      *heads: Of the heads, or of the axes in their place.
    """
    return (*heads, tokens) if self is Layout.BNSH else (tokens, *heads)

  def words(self, tokens: str, heads: str) -> str:
    """Writes the axes of an array of tokens, for errors."""
    return ", ".join(("b", *self.order(tokens, heads), "h"))

  def to_heads_first(self, x: jax.Array) -> jax.Array:
    """Moves the tokens `[b, t, ..., h]` to `[b, ..., t, h]`; see `order`."""
    if self is Layout.BNSH:
      return x
    return x.transpose(0, *range(2, x.ndim - 1), 1, x.ndim - 1)

  def from_heads_first(self, x: jax.Array) -> jax.Array:
    """Undoes `to_heads_first`."""
    if self is Layout.BNSH:
      return x
    return x.transpose(0, x.ndim - 2, *range(1, x.ndim - 2), x.ndim - 1)


NAMES = tuple(layout.value for layout in Layout)
