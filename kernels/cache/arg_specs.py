"""Shapes of caches, for the tests and the bench of the ops on them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class CacheSpec:
  """A cache and the rows that come into it.

  Example:

    >>> from kernels.cache import arg_specs
    >>> spec = arg_specs.CacheSpec("llama", 2, 16, 8, 64, layers=3)
    >>> spec.cache_shape, spec.new_shape
    ((3, 2, 16, 8, 64), (2, 1, 8, 64))

  Attributes:
    name: Of the row.
    batch: b.
    length: s.
    heads: n, the key-value heads.
    head_dim: h.
    tokens: t.
    dtype: Of the cache.
    layers: l of a stacked cache, or None.
  """

  name: str
  batch: int
  length: int
  heads: int
  head_dim: int
  _: dataclasses.KW_ONLY
  tokens: int = 1
  dtype: str = "bfloat16"
  layers: int | None = None

  @property
  def cache_shape(self) -> tuple[int, ...]:
    """Returns the shape of `cache_k` and `cache_v`."""
    lead = () if self.layers is None else (self.layers,)
    return (*lead, self.batch, self.length, self.heads, self.head_dim)

  @property
  def new_shape(self) -> tuple[int, ...]:
    """Returns the shape of `new_k` and `new_v`."""
    return (self.batch, self.tokens, self.heads, self.head_dim)
