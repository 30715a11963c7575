"""Key-value caches: writing this step's rows in place.

Example:
  >>> import jax.numpy as jnp
  >>> from kernels import kv_cache
  >>> cache = jnp.zeros((1, 8, 2, 4), jnp.bfloat16)
  >>> row = jnp.ones((1, 1, 2, 4), jnp.bfloat16)
  >>> k, v = kv_cache.update(cache, cache, row, row, 5)
  >>> k[0, :, 0, 0].tolist()
  [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
"""

from ..cache.quantization import dequantize, quantize, scale_for
from .api import update

__all__ = ["dequantize", "quantize", "scale_for", "update"]
