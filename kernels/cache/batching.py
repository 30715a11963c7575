"""What `vmap` does to the operands of an op on a cache."""

from typing import Any

import jax
import jax.numpy as jnp

from . import addressing, layouts


def uniform_of_batch(
  uniform: addressing.Uniform, dims: dict[str, Any]
) -> addressing.Uniform:
  """Returns where operands repeat themselves once `fold_batch` has been.

  Args:
    uniform: Where they did before.
    dims: Of operands, by name, the axis that is mapped over, or None.
  """
  return tuple(
    (name, axis)
    for name, axis in uniform
    if axis > 0 or (name != "layer" and dims.get(name) is None)
  )


def fold_batch(
  values: dict[str, Any], size: Any, layout: layouts.Layout
) -> dict[str, Any]:
  """Folds the axis of `vmap` into the batch; the cache stays as it is.

  The cache's new axis in front becomes one more axis of layers.

  Args:
    values: Operands with a leading axis each: cache_k, cache_v, layer, and any
      others of shape `[size, b, ...]`.
    size: Of the leading axis.
    layout: Of the caches.

  Returns:
    The operands of one larger call.
  """
  caches = ("cache_k", "cache_v")
  one_k, one_v = (
    jax.ShapeDtypeStruct(values[name].shape[1:], values[name].dtype)
    for name in caches
  )
  g = addressing.Geometry.of(one_k, one_v, layout)
  out = {
    name: value
    if name in caches
    else value.reshape((size * value.shape[1], *value.shape[2:]))
    for name, value in values.items()
  }
  copy = jnp.arange(size, dtype=jnp.int32)[:, None]
  layer = values["layer"]
  valid = (layer >= 0) & (layer < g.layers)
  out["layer"] = jnp.where(valid, layer + copy * g.layers, -1).reshape(
    (size * layer.shape[1],)
  )
  return out
