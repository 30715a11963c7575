"""Attention over a key-value cache: append, then attend, in one call.

The package itself can be called: `kernels.decode_attention(...)` is
`kernels.decode_attention.decode_attention(...)`.

Example:
  >>> import jax.numpy as jnp
  >>> import kernels
  >>> cache = jnp.zeros((2, 32, 4, 8), jnp.bfloat16)
  >>> q = jnp.ones((2, 1, 8, 8), jnp.bfloat16)
  >>> new = jnp.ones((2, 1, 4, 8), jnp.bfloat16)
  >>> cache_k, cache_v, out = kernels.decode_attention(
  ...   cache, cache, q, new, new, 0
  ... )
  >>> out.shape
  (2, 1, 8, 8)
"""

import sys
import types

from .api import (
  attend,
  decode_attention,
  merge,
  rope_tables,
)
from .checks import window_sizes

__all__ = [
  "attend",
  "decode_attention",
  "merge",
  "rope_tables",
  "window_sizes",
]


# Users call the package like the function, `kernels.decode_attention(...)`, and
# find the other functions, and the modules, in it. What `import` binds to that
# name is the package's own module, whatever is put in its place; so the module
# itself must be callable, and giving one a class of its own is how Python
# documents that (data model, "Customizing module attribute access").
class _CallablePackage(types.ModuleType):
  """What this package is: a module that can be called."""

  __call__ = staticmethod(decode_attention)
  attend = staticmethod(attend)
  decode_attention = staticmethod(decode_attention)
  merge = staticmethod(merge)
  rope_tables = staticmethod(rope_tables)
  window_sizes = staticmethod(window_sizes)


sys.modules[__name__].__class__ = _CallablePackage
