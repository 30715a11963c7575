"""Reductions over windows that slide along the spatial axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from nnx.nn import checks

Padding = str | Sequence[tuple[int, int]]


def _as_sizes(name: str, sizes: Any) -> tuple[int, ...]:
  if not isinstance(sizes, Iterable):
    raise ValueError(
      f"`{name}` must have a number for each spatial axis, but got {sizes}."
    )
  sizes = tuple(sizes)
  checks.wholes(name, sizes, 1)
  return sizes


def _as_pairs(padding: Any) -> tuple[tuple[int, ...], ...]:
  """Returns the pairs as tuples, or nothing if there are none."""
  try:
    return tuple(map(tuple, padding))
  except TypeError:
    return ()


def pool(
  inputs: jax.Array,
  init: Any,
  reduce_fn: Callable[[Any, Any], Any],
  window_shape: Sequence[int],
  strides: Sequence[int] | None,
  padding: Padding,
) -> jax.Array:
  """Reduces windows with a function of two values.

  Example:

    >>> import jax.numpy as jnp
    >>> from jax import lax
    >>> import nnx
    >>> x = jnp.array([1.0, 2.0, 3.0])[:, None]
    >>> nnx.pool(x, 1.0, lax.mul, (2,), None, "VALID")[:, 0]
    Array([2., 6.], dtype=float32)

  Args:
    inputs: `[..., *spatial, c]`.
    init: The value that each reduction starts with.
    reduce_fn: The function, as in `jax.lax.reduce_window`; derivatives exist
      for `lax.add`, `lax.max` and `lax.min`.
    window_shape: The sizes of a window along the spatial axes.
    strides: From window to window; all 1, if None.
    padding: "SAME", "VALID", or for each spatial axis how much of `init` to put
      before and after.

  Returns:
    `[..., *fewer, c]`.

  Raises:
    ValueError: If `strides` or `padding` do not fit `window_shape`, or
      `window_shape` does not fit `inputs`.
  """
  window = _as_sizes("window_shape", window_shape)
  batch = inputs.ndim - len(window) - 1
  if batch < 0:
    raise ValueError(
      "`inputs` must have an axis for each of `window_shape` and one for"
      f" features, but got the shape {inputs.shape} and"
      f" `window_shape={window}`."
    )
  ones = (1,) * len(window)
  strides = ones if strides is None else _as_sizes("strides", strides)
  if len(strides) != len(window):
    raise ValueError(
      "`strides` must have one number for each of `window_shape`, but got"
      f" `strides={strides}` and `window_shape={window}`."
    )
  if not isinstance(padding, str):
    pads = _as_pairs(padding)
    if len(pads) != len(window) or any(len(pair) != 2 for pair in pads):
      raise ValueError(
        "`padding` must be a string or one pair (before, after) for each of"
        f" `window_shape`, but got `padding={padding}` and"
        f" `window_shape={window}`."
      )
    own = tuple((before, after) for before, after in pads)
    padding = ((0, 0),) * batch + own + ((0, 0),)
  elif padding not in ("SAME", "VALID", "SAME_LOWER"):
    raise ValueError(
      "`padding` must be SAME, VALID, SAME_LOWER or pairs of numbers, but got"
      f" {padding!r}."
    )
  ones = (1,) * batch
  return lax.reduce_window(
    inputs, init, reduce_fn, (*ones, *window, 1), (*ones, *strides, 1), padding
  )


def avg_pool(
  inputs: jax.Array,
  window_shape: Sequence[int],
  strides: Sequence[int] | None = None,
  padding: Padding = "VALID",
  count_include_pad: bool = True,
) -> jax.Array:
  """Takes the mean of each window.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> x = jnp.array([1.0, 2.0, 3.0])[:, None]
    >>> nnx.avg_pool(x, (2,), padding="SAME")[:, 0]
    Array([1.5, 2.5, 1.5], dtype=float32)
    >>> nnx.avg_pool(x, (2,), padding="SAME", count_include_pad=False)[:, 0]
    Array([1.5, 2.5, 3. ], dtype=float32)

  Args:
    inputs: `[..., *spatial, c]`, floating.
    window_shape: The sizes of a window along the spatial axes.
    strides: From window to window; all 1, if None.
    padding: "SAME", "VALID", or for each spatial axis how many zeros to put
      before and after.
    count_include_pad: Whether these zeros count as elements.

  Returns:
    `[..., *fewer, c]`.

  Raises:
    ValueError: For the same reasons as `pool`.
  """
  sums = pool(inputs, 0.0, lax.add, window_shape, strides, padding)
  if count_include_pad:
    return sums / math.prod(window_shape)
  spatial = inputs.shape[inputs.ndim - len(window_shape) - 1 : -1]
  ones = jnp.ones((*spatial, 1), sums.dtype)
  counts = pool(ones, 0.0, lax.add, window_shape, strides, padding)
  return sums / jnp.expand_dims(counts, range(sums.ndim - counts.ndim))


def max_pool(
  inputs: jax.Array,
  window_shape: Sequence[int],
  strides: Sequence[int] | None = None,
  padding: Padding = "VALID",
) -> jax.Array:
  """Takes the largest element of each window.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> nnx.max_pool(jnp.array([1.0, 3.0, 2.0])[:, None], (2,))[:, 0]
    Array([3., 3.], dtype=float32)

  Args:
    inputs: `[..., *spatial, c]`, floating.
    window_shape: The sizes of a window along the spatial axes.
    strides: From window to window; all 1, if None.
    padding: "SAME", "VALID", or for each spatial axis how much of `-inf` to put
      before and after.

  Returns:
    `[..., *fewer, c]`.

  Raises:
    ValueError: For the same reasons as `pool`.
  """
  return pool(inputs, -jnp.inf, lax.max, window_shape, strides, padding)


def min_pool(
  inputs: jax.Array,
  window_shape: Sequence[int],
  strides: Sequence[int] | None = None,
  padding: Padding = "VALID",
) -> jax.Array:
  """Takes the smallest element of each window.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> nnx.min_pool(jnp.array([1.0, 3.0, 2.0])[:, None], (2,))[:, 0]
    Array([1., 2.], dtype=float32)

  Args:
    inputs: `[..., *spatial, c]`, floating.
    window_shape: The sizes of a window along the spatial axes.
    strides: From window to window; all 1, if None.
    padding: "SAME", "VALID", or for each spatial axis how much of `inf` to put
      before and after.

  Returns:
    `[..., *fewer, c]`.

  Raises:
    ValueError: For the same reasons as `pool`.
  """
  return pool(inputs, jnp.inf, lax.min, window_shape, strides, padding)
