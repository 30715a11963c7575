"""Transforms as Flax 0.10 had them before: `flax.nnx.transforms.deprecated`.

`vmap`, `pmap` and `scan` are those of `nnx.transforms.by_filters`; without a
function they return a decorator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any

import nnx
from nnx.graphlib import modes, traversal
from nnx.transforms import by_filters


def _or_decorator(transform: Callable[..., Any]) -> Callable[..., Any]:
  @functools.wraps(transform)
  def call(f: Callable[..., Any] | None = None, **options: Any) -> Any:
    if f is None:
      return functools.partial(call, **options)
    return functools.wraps(f)(transform(f, **options))

  return call


vmap = _or_decorator(by_filters.vmap)
pmap = _or_decorator(by_filters.pmap)
scan = _or_decorator(by_filters.scan)


def _differentiated(
  transform: Callable[..., Any],
  f: Callable[..., Any],
  argnums: int | Sequence[int],
  wrt: Any,
  **options: Any,
) -> Callable[..., Any]:
  @functools.cache
  def transformed(nodes: tuple[bool, ...]) -> Callable[..., Any]:
    def mark(argnum: int) -> Any:
      return nnx.DiffState(argnum, wrt) if nodes[argnum] else argnum

    marked = (
      mark(argnums)
      if isinstance(argnums, int)
      else tuple(mark(argnum) for argnum in argnums)
    )
    return transform(f, argnums=marked, **options, **modes.Mode.GRAPH.arguments)

  @functools.wraps(f)
  def call(*args: Any) -> Any:
    return transformed(tuple(map(traversal.is_graph_node, args)))(*args)

  return call


def grad(
  f: Callable[..., Any],
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  holomorphic: bool = False,
  allow_int: bool = False,
  reduce_axes: Sequence[Any] = (),
  *,
  wrt: Any = nnx.Param,
) -> Callable[..., Any]:
  """Differentiates by what a filter selects of each Module.

  Example:

    >>> import nnx
    >>> from nnx.as_flax import earlier
    >>> model = nnx.Dict(a=nnx.Param(2.0), b=nnx.BatchStat(3.0))
    >>> earlier.grad(lambda m: m.a * m.b, wrt=nnx.BatchStat)(model).b.value
    Array(2., dtype=float32, weak_type=True)

  Args:
    f: the function; it takes arguments by position.
    argnums: as in `nnx.grad`.
    has_aux: the same.
    holomorphic: the same.
    allow_int: the same.
    reduce_axes: the same.
    wrt: which Variables of the Modules to differentiate by.

  Returns:
    The function of the gradients.
  """
  return _differentiated(
    nnx.grad,
    f,
    argnums,
    wrt,
    has_aux=has_aux,
    holomorphic=holomorphic,
    allow_int=allow_int,
    reduce_axes=reduce_axes,
  )


def value_and_grad(
  f: Callable[..., Any],
  argnums: int | Sequence[int] = 0,
  has_aux: bool = False,
  holomorphic: bool = False,
  allow_int: bool = False,
  reduce_axes: Sequence[Any] = (),
  *,
  wrt: Any = nnx.Param,
) -> Callable[..., Any]:
  """Differentiates as `grad` here, and returns what the function does as well.

  Example:

    >>> import nnx
    >>> from nnx.as_flax import earlier
    >>> model = nnx.Dict(a=nnx.Param(2.0), b=nnx.BatchStat(3.0))
    >>> value, grads = earlier.value_and_grad(lambda m: m.a * m.b)(model)
    >>> float(value), list(grads)
    (6.0, ['a'])

  Args:
    f: the function; it takes arguments by position.
    argnums: as in `nnx.value_and_grad`.
    has_aux: the same.
    holomorphic: the same.
    allow_int: the same.
    reduce_axes: the same.
    wrt: which Variables of the Modules to differentiate by.

  Returns:
    The function of the values and the gradients.
  """
  return _differentiated(
    nnx.value_and_grad,
    f,
    argnums,
    wrt,
    has_aux=has_aux,
    holomorphic=holomorphic,
    allow_int=allow_int,
    reduce_axes=reduce_axes,
  )
