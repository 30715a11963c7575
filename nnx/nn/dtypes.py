"""The dtypes that layers compute in."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp

Dtype = Any


class PromoteDtypeFn(Protocol):
  """A function that a layer may be given in place of `promote_dtype`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> def in_half_precision(args, /, *, dtype=None, inexact=True):
    ...   return nnx.nn.dtypes.promote_dtype(args, dtype=jnp.bfloat16)
    >>> layer = nnx.Linear(
    ...   2, 3, promote_dtype=in_half_precision, rngs=nnx.Rngs(0)
    ... )
    >>> layer(jnp.ones((1, 2))).dtype
    dtype(bfloat16)
  """

  def __call__(
    self,
    args: tuple[Any, ...],
    /,
    *,
    dtype: Dtype | None = None,
    inexact: bool = True,
  ) -> tuple[Any, ...]: ...


def canonicalize_dtype(
  *args: Any, dtype: Dtype | None = None, inexact: bool = True
) -> Dtype:
  """Returns the dtype in which to compute with some values.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import dtypes
    >>> half, whole = jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.int32)
    >>> dtypes.canonicalize_dtype(half, None, whole)
    dtype(bfloat16)
    >>> dtypes.canonicalize_dtype(whole)
    dtype('float32')

  Args:
    *args: Arrays, or what jax makes arrays of; None is passed over.
    dtype: The answer, unless it is None.
    inexact: Whether the dtype must be floating or complex; integers alone then
      make float32.

  Returns:
    `dtype`, or jax's common dtype of the arguments.

  Raises:
    ValueError: If `dtype` is not floating or complex where it must be.
  """
  if dtype is None:
    dtype = jnp.result_type(*(jnp.asarray(x) for x in args if x is not None))
    if inexact and not jnp.issubdtype(dtype, jnp.inexact):
      dtype = jnp.promote_types(jnp.float32, dtype)
  elif inexact and not jnp.issubdtype(dtype, jnp.inexact):
    raise ValueError(
      f"`dtype` must be floating or complex, but got `{jnp.dtype(dtype).name}`."
      " Pass None to derive it from the inputs, or `inexact=False`."
    )
  return dtype


def promote_dtype(
  args: tuple[Any, ...],
  /,
  *,
  dtype: Dtype | None = None,
  inexact: bool = True,
) -> tuple[Any, ...]:
  """Converts values to one dtype.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import dtypes
    >>> x, missing = dtypes.promote_dtype((jnp.arange(2), None))
    >>> x, missing
    (Array([0., 1.], dtype=float32), None)

  Args:
    args: Arrays, or what jax makes arrays of; None stays None.
    dtype: The dtype, unless it is None: then that of `canonicalize_dtype`.
    inexact: Whether the dtype must be floating or complex.

  Returns:
    A tuple of arrays of that dtype, and of None.

  Raises:
    ValueError: If `dtype` is not floating or complex where it must be.
  """
  dtype = canonicalize_dtype(*args, dtype=dtype, inexact=inexact)
  wanted = jnp.dtype(dtype)
  return tuple(
    x
    if x is None
    or (isinstance(x, jax.Array) and x.dtype == wanted and not x.weak_type)
    else jnp.asarray(x, dtype)
    for x in args
  )
