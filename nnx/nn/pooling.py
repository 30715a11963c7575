"""Reductions over windows that slide along the spatial axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from nnx.nn import checks, products

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


def _canonical(
  inputs: jax.Array,
  window_shape: Sequence[int],
  strides: Sequence[int] | None,
  padding: Padding,
) -> tuple[tuple[int, ...], tuple[int, ...], Any]:
  """Returns window, strides and padding, the last a string or for all axes."""
  window = _as_sizes("window_shape", window_shape)
  batch = inputs.ndim - len(window) - 1
  if batch < 0:
    raise ValueError(
      "`inputs` must have an axis for each of `window_shape` and one for"
      f" features, but got the shape {inputs.shape} and"
      f" `window_shape={window}`."
    )
  if strides is None:
    strides = (1,) * len(window)
  strides = _as_sizes("strides", strides)
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
  else:
    name, padding = padding, padding.upper()
    if padding not in ("SAME", "VALID", "SAME_LOWER"):
      raise ValueError(
        "`padding` must be SAME, VALID, SAME_LOWER or pairs of numbers, but got"
        f" {name!r}."
      )
  return window, strides, padding


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
  window, strides, padding = _canonical(inputs, window_shape, strides, padding)
  ones = (1,) * (inputs.ndim - len(window) - 1)
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
    `[..., *fewer, c]`, of the dtype of `inputs`; half precision is summed in
    float32.

  Raises:
    ValueError: For the same reasons as `pool`.
  """
  dtype = inputs.dtype
  if jnp.issubdtype(dtype, jnp.floating):
    # In half precision a sum may overflow where the mean does not.
    inputs = inputs.astype(jnp.promote_types(dtype, jnp.float32))
  sums = pool(inputs, 0.0, lax.add, window_shape, strides, padding)
  if count_include_pad:
    means = sums / math.prod(window_shape)
  else:
    spatial = inputs.shape[inputs.ndim - len(window_shape) - 1 : -1]
    ones = jnp.ones((*spatial, 1), sums.dtype)
    counts = pool(ones, 0.0, lax.add, window_shape, strides, padding)
    means = sums / jnp.expand_dims(counts, range(sums.ndim - counts.ndim))
  return means.astype(dtype) if jnp.issubdtype(dtype, jnp.floating) else means


@dataclasses.dataclass(frozen=True)
class _Slide:
  """Windows that slide along one axis.

  Attributes:
    axis: which axis.
    size: of a window.
    stride: from window to window.
    pads: how much to put before and after.
    find: `lax.max` or `lax.min`.
  """

  axis: int
  size: int
  stride: int
  pads: tuple[int, int]
  find: Callable[[Any, Any], jax.Array]

  def taps(self, x: jax.Array, fill: float) -> list[jax.Array]:
    """Returns the first elements of all windows, the second ones, and so on."""
    pads = [(0, 0, 0)] * x.ndim
    pads[self.axis] = (*self.pads, 0)
    x = lax.pad(x, jnp.asarray(fill, x.dtype), pads)
    last = x.shape[self.axis] - self.size
    return [
      lax.slice_in_dim(x, i, i + last + 1, self.stride, self.axis)
      for i in range(self.size)
    ]


def _first(find: Callable[[Any, Any], jax.Array]) -> float:
  """Returns the value that any other one takes the place of."""
  return -jnp.inf if find is lax.max else jnp.inf


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _along(x: jax.Array, slide: _Slide) -> jax.Array:
  """Takes the extreme of each window along one axis.

  Its derivative is that of XLA: of equal elements, the first is the one.
  """
  return functools.reduce(slide.find, slide.taps(x, _first(slide.find)))


@_along.defjvp
def _along_jvp(slide, primals, tangents):
  (x,), (tangent,) = primals, tangents
  # XLA rounds half precision after each operation, which takes long.
  wide = jnp.promote_types(x.dtype, jnp.float32)
  best, *rest = slide.taps(x.astype(wide), _first(slide.find))
  is_best = lax.ge if slide.find is lax.max else lax.le
  where = jnp.zeros(best.shape, jnp.int8)
  starts = np.arange(best.shape[slide.axis]) * slide.stride - slide.pads[0]
  starts = starts.reshape((-1,) + (1,) * (x.ndim - slide.axis - 1))
  for i, tap in enumerate(rest, 1):
    is_new = ~is_best(best, tap)
    if (starts + i <= 0).any():  # padding gives way to what is equal
      is_new |= starts + i <= 0
    best = jnp.where(is_new, tap, best)
    where = jnp.where(is_new, jnp.int8(i), where)
  parts = [
    jnp.where(where == i, tap, 0)
    for i, tap in enumerate(slide.taps(tangent.astype(wide), 0))
  ]
  return _along(x, slide), jnp.astype(sum(parts), x.dtype)


# A window of more elements along an axis is left to XLA: each is a slice.
_MOST_TAPS = 16


def _extreme(
  inputs: jax.Array,
  find: Callable[[Any, Any], jax.Array],
  window_shape: Sequence[int],
  strides: Sequence[int] | None,
  padding: Padding,
) -> jax.Array:
  """Takes the extreme of each window.

  On the CPU one axis after the other: XLA's windows are slow there, and their
  gradient, which looks for the extreme again, some ten times as slow.
  """
  window, steps, pads = _canonical(inputs, window_shape, strides, padding)
  sizes = inputs.shape[inputs.ndim - len(window) - 1 : -1]
  if not (
    jnp.issubdtype(inputs.dtype, jnp.floating)
    and all(isinstance(size, int) for size in inputs.shape)
    and max(window, default=1) <= _MOST_TAPS
    and products.on_plain_cpu()
  ):
    return pool(inputs, _first(find), find, window_shape, strides, padding)
  if isinstance(pads, str):
    pads = lax.padtype_to_pads(sizes, window, steps, pads)
  else:
    pads = pads[-len(window) - 1 : -1]
  if any(n + sum(p) < w for n, p, w in zip(sizes, pads, window)):
    return pool(inputs, _first(find), find, window_shape, strides, padding)
  # The last axis first, so that of equal elements it is the first in order.
  for i in reversed(range(len(window))):
    if window[i] > 1 or steps[i] > 1 or any(pads[i]):
      axis = inputs.ndim - len(window) - 1 + i
      slide = _Slide(axis, window[i], steps[i], (pads[i][0], pads[i][1]), find)
      inputs = _along(inputs, slide)
  return inputs


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
  return _extreme(inputs, lax.max, window_shape, strides, padding)


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
  return _extreme(inputs, lax.min, window_shape, strides, padding)
