"""Embedding tables."""

from __future__ import annotations

from collections.abc import Mapping
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nnx import eager
from nnx.module import Module
from nnx.nn import checks, dtypes, initializers, products
from nnx.nn.initializers import NO_METADATA, Initializer, initialize
from nnx.rnglib import Rngs
from nnx.variablelib import Param

default_embed_init = initializers.variance_scaling(
  1.0, "fan_in", "normal", out_axis=0
)


class Embed(Module):
  """Looks up learned vectors by integers.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.Embed(5, 3, rngs=nnx.Rngs(0))
    >>> layer(jnp.array([[0, 1], [4, -1]])).shape
    (2, 2, 3)
    >>> layer.attend(jnp.ones((2, 3))).shape
    (2, 5)

  Args:
    num_embeddings: n, the number of vectors.
    features: c, the size of a vector.
    dtype: The dtype of the result; that of the table, if None.
    param_dtype: The dtype of the table.
    embedding_init: `(key, shape, dtype) -> table`.
    promote_dtype: `((embedding,), dtype=dtype, inexact=False)`, or for `attend`
      `((query, embedding), dtype=dtype)`; returns those in the dtype to compute
      in.
    rngs: The stream `params` gives the key of the table.
    embedding_metadata: Metadata of the table.

  Attributes:
    embedding: `Param`, `[n, c]`.
  """

  def __init__(
    self,
    num_embeddings: int,
    features: int,
    *,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    embedding_init: Initializer = default_embed_init,
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    rngs: Rngs,
    embedding_metadata: Mapping[str, Any] = NO_METADATA,
  ):
    checks.whole("num_embeddings", num_embeddings)
    checks.whole("features", features)
    self.embedding = Param(
      initialize(
        embedding_init,
        checks.key(rngs),
        (num_embeddings, features),
        param_dtype,
      ),
      **embedding_metadata,
    )
    self.num_embeddings = num_embeddings
    self.features = features
    self.dtype = dtype or self.embedding.dtype
    self.param_dtype = param_dtype
    self.promote_dtype = promote_dtype

  def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Looks up vectors.

    Args:
      inputs: `[...]`, integers in [-n, n), negative ones from the end. Others
        give NaN. With one vector, any integer gives that.
      out_sharding: The sharding of the result, under a mesh with explicit axes.

    Returns:
      `[..., c]`.

    Raises:
      ValueError: If `inputs` are not integers.
    """
    check_integers(inputs)
    table = self.embedding[...]
    one = self.num_embeddings == 1
    if self.promote_dtype is dtypes.promote_dtype and out_sharding is None:
      return _look_up(table, inputs, one, self.dtype)
    (table,) = self.promote_dtype((table,), dtype=self.dtype, inexact=False)
    if out_sharding is None or one:
      return _take(table, inputs, one)

    def take(table, inputs):
      return _take(table, inputs, False)

    # `jnp.take` has no parameter for the sharding.
    automatic: Any = jax.sharding.auto_axes
    return automatic(take, out_sharding=out_sharding)(table, inputs)

  def attend(self, query: jax.Array, out_sharding: Any = None) -> jax.Array:
    """Multiplies vectors with all of the table, as for logits of tokens.

    Args:
      query: `[..., c]`.
      out_sharding: The sharding of the result, under a mesh with explicit axes.

    Returns:
      `[..., n]`.
    """
    table = self.embedding[...]
    try:
      if self.promote_dtype is dtypes.promote_dtype:
        return _attend(query, table, self.dtype, out_sharding)
      query, table = self.promote_dtype((query, table), dtype=self.dtype)
      return jnp.dot(query, table.T, out_sharding=out_sharding)
    except (TypeError, ValueError):
      checks.last_axis(self, "query", query, self.embedding.shape[1])
      raise


def check_integers(inputs: jax.Array) -> None:
  """Raises ValueError if what is looked up is not integers."""
  if not jnp.issubdtype(inputs.dtype, jnp.integer):
    raise ValueError(
      f"`inputs` must be integers, but got `{inputs.dtype.name}`. Convert them"
      " with `inputs.astype(int)`."
    )


def _take(table: jax.Array, inputs: jax.Array, one: bool) -> jax.Array:
  if one:
    return jnp.broadcast_to(table, (*inputs.shape, table.shape[-1]))
  return jnp.take(table, inputs, axis=0)


@functools.partial(eager.compiled, static=("one", "dtype"))
def _look_up(
  table: jax.Array, inputs: jax.Array, one: bool, dtype: dtypes.Dtype
) -> jax.Array:
  (table,) = dtypes.promote_dtype((table,), dtype=dtype, inexact=False)
  return _take(table, inputs, one)


@functools.partial(eager.compiled, static=("dtype", "out_sharding"))
def _attend(
  query: jax.Array, table: jax.Array, dtype: dtypes.Dtype, out_sharding: Any
) -> jax.Array:
  query, table = dtypes.promote_dtype((query, table), dtype=dtype)
  y = products.few_rows(
    query, table, 1, transposed=True, out_sharding=out_sharding
  )
  if y is not None:
    return y
  return jnp.dot(query, table.T, out_sharding=out_sharding)
