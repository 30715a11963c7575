"""Helpers of the layers that multiply by a kernel.

On the CPU, a product of few rows, as in decoding, is `kernels.matmul`, which
takes half to a tenth of the time of XLA's. `dot` says when.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Sequence
import math
from typing import Any

import jax
from jax import lax

from nnx import eager
from nnx.nn import dtypes

_CONFIG: Any = jax.config  # whose options have no types

DotGeneral = Callable[..., jax.Array]

# As it was imported; see `eager.current`.
_DOT_GENERAL = lax.dot_general
# Beyond these a program keeps the product that it has. `kernels.matmul` takes
# it too, but for bfloat16 where the processor multiplies pairs of it. They are
# written again, as they are asked for before any kernel is imported.
_MOST_ROWS = 32
_LEAST_SIZE = 4096
_DTYPES = ("float32", "bfloat16", "float16")


def as_tuple(value: int | Sequence[int]) -> tuple[int, ...]:
  """Returns one number or several as a tuple.

  Example:

    >>> from nnx.nn import products
    >>> products.as_tuple(3), products.as_tuple([1, 2])
    ((3,), (1, 2))
  """
  if isinstance(value, collections.abc.Iterable):
    return tuple(value)
  return (value,)


def product_options(
  precision: Any,
  preferred_element_type: dtypes.Dtype | None,
  out_sharding: Any,
) -> dict[str, Any]:
  """Returns the keywords of a product such as `jax.lax.dot_general`.

  A function that a layer is given in its place may not take
  `preferred_element_type`, and so gets it only if it is set.

  Example:

    >>> from nnx.nn import products
    >>> products.product_options("highest", None, None)
    {'precision': 'highest', 'out_sharding': None}

  Args:
    precision: The precision of the product.
    preferred_element_type: The dtype of the product, or None.
    out_sharding: The sharding of the product, or None.
  """
  options = {"precision": precision, "out_sharding": out_sharding}
  if preferred_element_type is not None:
    options["preferred_element_type"] = preferred_element_type
  return options


def dot(
  inputs: jax.Array,
  kernel: jax.Array,
  dimension_numbers: lax.DotDimensionNumbers,
  *,
  dot_general: Callable[..., jax.Array] = lax.dot_general,
  precision: Any = None,
  preferred_element_type: dtypes.Dtype | None = None,
  out_sharding: Any = None,
) -> jax.Array:
  """Contracts axes of inputs with those of a kernel.

  It is `dot_general`, or where that changes nothing but the time that it takes
  and the primitive in a jaxpr `kernels.matmul`: on the CPU, where the last axes
  are contracted with the first ones of the kernel, for up to 32 rows and
  kernels of 4,096 numbers and more in float32, bfloat16 or float16, without
  options that it does not have, and while functions of jax are those that were
  imported. In exported programs, and where the compiler splits it over devices,
  it is XLA's product. What asks jaxprs for products by name does not know it:
  `jax.checkpoint_policies.dots_saveable` and `jax.experimental.jet`.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import products
    >>> products.dot(
    ...   jnp.ones((5, 2)), jnp.ones((2, 3)), (((1,), (0,)), ((), ()))
    ... ).shape
    (5, 3)

  Args:
    inputs: An array.
    kernel: Another one.
    dimension_numbers: As in `jax.lax.dot_general`: which axes are contracted,
      and which are those of a batch.
    dot_general: The product, as in `jax.lax.dot_general`.
    precision: The precision of the product.
    preferred_element_type: The dtype of the product, or None.
    out_sharding: The sharding of the product, or None.

  Returns:
    What `dot_general` does.
  """
  function = eager.current(dot_general)
  options = product_options(precision, preferred_element_type, out_sharding)
  axes = len(dimension_numbers[0][0])
  last = tuple(range(inputs.ndim - axes, inputs.ndim))
  is_of_rows = dimension_numbers == ((last, tuple(range(axes))), ((), ()))
  if function is _DOT_GENERAL and is_of_rows:
    y = few_rows(inputs, kernel, axes, **options)
    if y is not None:
      return y
  return function(inputs, kernel, dimension_numbers, **options)


def few_rows(
  inputs: jax.Array,
  kernel: jax.Array,
  axes: int,
  *,
  transposed: bool = False,
  **options: Any,
) -> jax.Array | None:
  """Returns the product of `dot` by `kernels.matmul`, or None.

  Example:

    >>> import jax.numpy as jnp
    >>> from nnx.nn import products
    >>> products.few_rows(jnp.ones((1, 2)), jnp.ones((2, 3)), 1) is None
    True

  Args:
    inputs: `[*rows, *contracted]`.
    kernel: `[*contracted, *out]`.
    axes: How many axes are contracted.
    transposed: Whether `kernel` is a matrix `[out, contracted]`.
    **options: Of the product; with any of them set, there is none.

  Returns:
    `[*rows, *out]`; None where XLA's product is to run.
  """
  if any(value is not None for value in options.values()):
    return None
  contracted, out = kernel.shape[:axes], kernel.shape[axes:]
  if transposed:
    contracted, out = out, contracted
  if not _has_few_rows(inputs, kernel, contracted):
    return None
  # While tracing: programs without such products import no kernels.
  from nnx.kernels import matmul

  rows = inputs.shape[: inputs.ndim - axes]
  size = math.prod(contracted)
  shape = (size, math.prod(out))
  y = matmul.matmul(
    inputs.reshape((*rows, size)),
    kernel.reshape(shape[::-1] if transposed else shape),
    transposed=transposed,
    implementation="unseen",
  )
  return y.reshape((*rows, *out))


def _has_few_rows(
  inputs: jax.Array, kernel: jax.Array, contracted: tuple[int, ...]
) -> bool:
  """Returns whether a product is one that `kernels.matmul` is for."""
  first = inputs.ndim - len(contracted)
  shape = (*inputs.shape, *kernel.shape)
  return (
    inputs.dtype == kernel.dtype
    and inputs.dtype.name in _DTYPES
    and first >= 0
    and inputs.shape[first:] == contracted
    and all(isinstance(size, int) for size in shape)  # none is symbolic
    and 1 <= math.prod(inputs.shape[:first]) <= _MOST_ROWS
    and math.prod(kernel.shape) >= _LEAST_SIZE
    and _CONFIG.jax_default_matmul_precision is None
    and on_plain_cpu()
  )


def on_plain_cpu() -> bool:
  """Returns whether a layer may compute in another way that suits the CPU.

  It runs there, no axis of a mesh is the program's own business, and no
  function of jax has been replaced.

  Example:

    >>> import jax
    >>> from nnx.nn import products
    >>> products.on_plain_cpu() == (jax.default_backend() == "cpu")
    True
  """
  mesh = jax.sharding.get_abstract_mesh()
  return (
    (mesh.empty or mesh.are_all_axes_auto)
    and jax.default_backend() == "cpu"
    and eager.functions_are_as_imported()
  )
