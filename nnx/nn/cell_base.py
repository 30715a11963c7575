"""Bases of recurrent cells: what `RNN` calls, and what our cells share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from nnx.module import Module
from nnx.nn import dtypes, initializers
from nnx.nn.initializers import (
  Initializer,
  default_recurrent_init,
  initialize,
)
from nnx.rnglib import Rngs, RngStream


def modified_orthogonal(
  key: jax.Array, shape: tuple[int, ...], dtype: dtypes.Dtype = jnp.float32
) -> jax.Array:
  """Makes an orthogonal matrix in float32 and converts it to a dtype.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from nnx.nn.recurrent import modified_orthogonal
    >>> modified_orthogonal(jax.random.key(0), (4, 4), jnp.bfloat16).dtype
    dtype(bfloat16)

  Args:
    key: `[]`, a random key.
    shape: The shape of the matrix.
    dtype: Its dtype.

  Returns:
    The matrix.
  """
  matrix = initialize(default_recurrent_init, key, shape, jnp.float32)
  return matrix.astype(dtype)


class RNNCellBase(Module):
  """Base of recurrent cells, also of your own: what `RNN` calls.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Sum(nnx.RNNCellBase):
    ...   num_feature_axes = 1
    ...
    ...   def initialize_carry(self, input_shape, rngs=None, carry_init=None):
    ...     return jnp.zeros(input_shape)
    ...
    ...   def __call__(self, carry, inputs):
    ...     return carry + inputs, carry + inputs
    >>> nnx.RNN(Sum())(jnp.ones((1, 3, 1)))[0, :, 0]
    Array([1., 2., 3.], dtype=float32)
  """

  def initialize_carry(
    self,
    input_shape: tuple[int, ...],
    rngs: Rngs | RngStream | None = None,
    carry_init: Initializer | None = None,
  ) -> Any:
    """Makes the initial carry.

    Args:
      input_shape: The shape of the input of one step.
      rngs: The source of the keys for `carry_init`.
      carry_init: `(key, shape, dtype) -> carry`.

    Returns:
      A pytree of arrays.
    """
    raise NotImplementedError(
      f"`{type(self).__name__}` must define `initialize_carry(input_shape,"
      " rngs, carry_init)`."
    )

  def __call__(self, carry: Any, inputs: jax.Array) -> tuple[Any, jax.Array]:
    """Does one step.

    Args:
      carry: Carry of the step before.
      inputs: Input of this step.

    Returns:
      The new carry, and the output of this step.
    """
    raise NotImplementedError(
      f"`{type(self).__name__}` must define `__call__(carry, inputs)`."
    )

  @property
  def num_feature_axes(self) -> int:
    """Returns how many of the last axes of the inputs are features."""
    raise NotImplementedError(
      f"`{type(self).__name__}` must define `num_feature_axes`."
    )


class Cell(RNNCellBase):
  """Base of the cells whose carry is arrays of `hidden_features`."""

  hidden_features: int
  param_dtype: dtypes.Dtype
  carry_init: Initializer | None
  rngs: RngStream | None

  _num_carries = 1

  def initialize_carry(
    self,
    input_shape: tuple[int, ...],
    rngs: Rngs | RngStream | None = None,
    carry_init: Initializer | None = None,
  ) -> Any:
    """Makes the initial carry.

    Example:

      >>> import nnx
      >>> cell = nnx.GRUCell(3, 2, rngs=nnx.Rngs(0))
      >>> cell.initialize_carry((1, 3))
      Array([[0., 0.]], dtype=float32)

    Args:
      input_shape: `(..., in_features)`, of the input of one step.
      rngs: Its stream `carry`, or this stream, gives the keys; the cell's own,
        if None. Not needed if `carry_init` takes no key, as zeros do.
      carry_init: `(key, shape, dtype) -> array`; that of the cell, if None, and
        zeros if it has none.

    Returns:
      `[..., hidden_features]`, or for an LSTM the pair of memory and output.

    Raises:
      ValueError: If `carry_init` takes keys and neither the call nor the cell
        has `rngs`.
    """
    rngs = self.rngs if rngs is None else rngs
    if isinstance(rngs, Rngs):
      rngs = rngs.carry
    carry_init = carry_init or self.carry_init or initializers.zeros
    shape = (*input_shape[:-1], self.hidden_features)
    next_key: Callable[[], Any] = (lambda: None) if rngs is None else rngs
    try:
      carries = [
        initialize(carry_init, next_key(), shape, self.param_dtype)
        for _ in range(self._num_carries)
      ]
    except TypeError as error:
      if rngs is not None:
        raise
      # jax refuses None as a key.
      raise ValueError(
        "`initialize_carry` must have `rngs` for a `carry_init` that takes"
        " keys, but they are None in the call and in the cell, and it raised:"
        f" {error}. Pass `rngs=nnx.Rngs(seed)`."
      ) from error
    return tuple(carries) if len(carries) > 1 else carries[0]

  @property
  def num_feature_axes(self) -> int:
    """Returns how many of the last axes of the inputs are features: 1."""
    return 1
