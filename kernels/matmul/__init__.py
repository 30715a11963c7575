"""Products of activations with a matrix of weights, fast for few rows.

The package itself can be called: `kernels.matmul(...)` is
`kernels.matmul.matmul(...)`.

Example:
  >>> import jax.numpy as jnp
  >>> import kernels
  >>> x = jnp.ones((1, 3), jnp.bfloat16)
  >>> kernels.matmul(x, jnp.ones((3, 2), jnp.bfloat16), jnp.ones(2)).tolist()
  [[4.0, 4.0]]
"""

import sys
import types

from .api import matmul
from .quantization import (
  QuantizedWeight,
  dequantize,
  quantization_error,
  quantize,
)

__all__ = [
  "QuantizedWeight",
  "dequantize",
  "matmul",
  "quantization_error",
  "quantize",
]


# As `decode_attention`, this package is called like the function of its name.
class _CallablePackage(types.ModuleType):
  """What this package is: a module that can be called."""

  __call__ = staticmethod(matmul)
  QuantizedWeight = QuantizedWeight
  dequantize = staticmethod(dequantize)
  matmul = staticmethod(matmul)
  quantization_error = staticmethod(quantization_error)
  quantize = staticmethod(quantize)


sys.modules[__name__].__class__ = _CallablePackage
