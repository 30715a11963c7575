"""Initializers: those of jax, by their names there, and constant builders."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import types
from typing import Any

import jax
from jax.nn.initializers import constant as constant
from jax.nn.initializers import delta_orthogonal as delta_orthogonal
from jax.nn.initializers import glorot_normal as glorot_normal
from jax.nn.initializers import glorot_uniform as glorot_uniform
from jax.nn.initializers import he_normal as he_normal
from jax.nn.initializers import he_uniform as he_uniform
from jax.nn.initializers import kaiming_normal as kaiming_normal
from jax.nn.initializers import kaiming_uniform as kaiming_uniform
from jax.nn.initializers import lecun_normal as lecun_normal
from jax.nn.initializers import lecun_uniform as lecun_uniform
from jax.nn.initializers import normal as normal
from jax.nn.initializers import ones as ones
from jax.nn.initializers import orthogonal as orthogonal
from jax.nn.initializers import truncated_normal as truncated_normal
from jax.nn.initializers import uniform as uniform
from jax.nn.initializers import variance_scaling as variance_scaling
from jax.nn.initializers import xavier_normal as xavier_normal
from jax.nn.initializers import xavier_uniform as xavier_uniform
from jax.nn.initializers import zeros as zeros
import jax.numpy as jnp

from nnx import eager

# (key, shape, dtype) -> array or VariableMetadata.
Initializer = Callable[..., Any]

# The default of the layers' `*_metadata` parameters.
NO_METADATA: Mapping[str, Any] = types.MappingProxyType({})


def zeros_init() -> Initializer:
  """Returns the initializer of zeros.

  Example:

    >>> import jax
    >>> from nnx import initializers
    >>> initializers.zeros_init()(jax.random.key(0), (2,))
    Array([0., 0.], dtype=float32)
  """
  return zeros


def ones_init() -> Initializer:
  """Returns the initializer of ones.

  Example:

    >>> import jax
    >>> from nnx import initializers
    >>> initializers.ones_init()(jax.random.key(0), (2,))
    Array([1., 1.], dtype=float32)
  """
  return ones


# The defaults of the layers: one object each, so that `initialize` knows them.
default_kernel_init = lecun_normal()
default_bias_init = zeros
default_lora_init = he_uniform()
default_recurrent_init = orthogonal()

# One compiled call in place of about ten. Only for initializers whose numbers
# stay bit-equal; those of `normal`, which ends with a product, do not.
_ONE_CALL = {
  init: eager.compiled(init, static=("shape", "dtype"))
  for init in (
    default_kernel_init,
    default_lora_init,
    default_recurrent_init,
    ones,
    zeros,
  )
}


def initialize(
  init: Initializer, key: jax.Array, shape: Sequence[int], dtype: Any
) -> jax.Array:
  """Runs an initializer, by one compiled call where that changes no bit.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from nnx.nn import initializers
    >>> init = initializers.default_kernel_init
    >>> key = jax.random.key(0)
    >>> kernel = initializers.initialize(init, key, (2, 3), jnp.float32)
    >>> bool((kernel == init(key, (2, 3), jnp.float32)).all())
    True

  Args:
    init: `(key, shape, dtype) -> value`.
    key: `[]`, a random key.
    shape: The shape of the value.
    dtype: The dtype of the value.

  Returns:
    What `init` returns: an array, or a `VariableMetadata` around one, which
    stands for the array where a Variable is made.

  Raises:
    TypeError: If `init` cannot be called.
  """
  if not callable(init):
    raise TypeError(
      "An initializer must be a function of a key, a shape and a dtype, but got"
      f" {init!r}. Pass one such as `nnx.initializers.constant(0.1)`."
    )
  one_call = _ONE_CALL.get(init)
  if one_call is None:
    return init(key, shape, dtype)
  if 0 in shape:  # whose variance would be a division by 0
    return jnp.zeros(shape, dtype)
  return one_call(key, tuple(shape), dtype)
