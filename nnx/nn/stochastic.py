"""Layers that draw random numbers."""

from __future__ import annotations

from collections.abc import Sequence
import functools
from typing import Any

import jax
from jax import lax, random
import jax.numpy as jnp

from nnx import eager
from nnx.module import Module
from nnx.nn import checks
from nnx.rnglib import Rngs, RngStream


class Dropout(Module):
  """Sets random elements to 0 and scales the others up to keep the mean.

      keep = jax.random.bernoulli(key, 1 - rate, inputs.shape)
      y = jnp.where(keep, inputs / (1 - rate), 0)

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    >>> x = jnp.ones(100)
    >>> sorted(set(layer(x).tolist()))
    [0.0, 2.0]
    >>> layer.eval()
    >>> bool((layer(x) == x).all())
    True

  Args:
    rate: In [0, 1], the probability with which an element is dropped.
    broadcast_dims: Axes along which all elements are kept or dropped together.
    deterministic: Whether to return the input as it is; `train()` and `eval()`
      set it. None, if each call says so.
    rng_collection: The stream that keys come from.
    rngs: A fork of its stream, or of this stream, is kept. None, if each call
      brings keys.

  Raises:
    TypeError: If `rngs` is something else.
    ValueError: If `rate` is not in [0, 1].
  """

  def __init__(
    self,
    rate: float,
    *,
    broadcast_dims: Sequence[int] = (),
    deterministic: bool | None = False,
    rng_collection: str = "dropout",
    rngs: Rngs | RngStream | None = None,
  ):
    checks.rate("rate", rate)
    self.rate = rate
    self.broadcast_dims = broadcast_dims
    self.deterministic = deterministic
    self.rng_collection = rng_collection
    if isinstance(rngs, Rngs):
      rngs = rngs[rng_collection]
    elif rngs is not None and not isinstance(rngs, RngStream):
      raise TypeError(
        "`rngs` must be a `Rngs`, a `RngStream` or None, but got a"
        f" `{type(rngs).__name__}`. Pass `rngs=nnx.Rngs(seed)`."
      )
    self.rngs = None if rngs is None else rngs.fork()

  def __call__(
    self,
    inputs: jax.Array,
    *,
    deterministic: bool | None = None,
    rngs: Rngs | RngStream | jax.Array | None = None,
  ) -> jax.Array:
    """Applies the layer.

    Args:
      inputs: `[...]`, floating.
      deterministic: Overrides that of the layer, if not None.
      rngs: Streams, a stream or a key, overriding those of the layer, if not
        None.

    Returns:
      An array of the shape and dtype of `inputs`.

    Raises:
      ValueError: If neither the call nor the layer says `deterministic`, or
        has `rngs` where they are needed.
      TypeError: If `rngs` is something else.
    """
    if deterministic is None:
      deterministic = self.deterministic
      if deterministic is None:
        raise ValueError(
          "`Dropout` must be told `deterministic`, but it is None in the layer"
          " and in the call. Pass it to one of them, or set it for a whole"
          " model: `model.train()`, `model.eval()` or `nnx.view(model,"
          " deterministic=...)`."
        )
    if deterministic:
      return inputs
    checks.rate("rate", self.rate)  # An attribute may have been set.
    if self.rate == 0.0:
      return inputs
    if self.rate == 1.0:  # where 1 / (1 - rate) would make NaN gradients
      return jnp.zeros_like(inputs)
    if rngs is None:
      rngs = self.rngs
      if rngs is None:
        raise ValueError(
          "`Dropout` must have `rngs` unless it is deterministic, but they are"
          " None in the layer and in the call. Pass them to one of them."
        )
    if isinstance(rngs, RngStream):
      key = rngs()
    elif isinstance(rngs, Rngs):
      key = rngs[self.rng_collection]()
    elif isinstance(rngs, jax.Array):
      key = rngs
    else:
      raise TypeError(
        "`rngs` must be a `Rngs`, a `RngStream` or a key, but got a"
        f" `{type(rngs).__name__}`. Pass `rngs=nnx.Rngs(seed)`."
      )
    return _drop(key, inputs, 1.0 - self.rate, tuple(self.broadcast_dims))

  def set_view(self, deterministic: bool | None = None):
    """Sets attributes for `nnx.view`.

    Example:

      >>> import nnx
      >>> layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
      >>> nnx.view(layer, deterministic=True).deterministic
      True

    Args:
      deterministic: Whether to return the input as it is.
    """
    if deterministic is not None:
      self.deterministic = deterministic


@functools.partial(eager.compiled, static=("dims",))
def _drop(
  key: jax.Array, inputs: jax.Array, keep_prob: Any, dims: tuple[int, ...]
) -> jax.Array:
  inputs = jnp.asarray(inputs)
  shape = list(inputs.shape)
  for axis in dims:
    shape[axis] = 1
  keep = random.bernoulli(
    key, keep_prob, shape, out_sharding=jax.typeof(inputs).sharding
  )
  return lax.select(
    jnp.broadcast_to(keep, inputs.shape),
    inputs / keep_prob,
    jnp.zeros_like(inputs),
  )
