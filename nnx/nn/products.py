"""Helpers of the layers that multiply by a kernel."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Sequence
from typing import Any

import jax

from nnx.nn import dtypes

DotGeneral = Callable[..., jax.Array]


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
