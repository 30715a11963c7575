"""Transforms as Flax 0.10 had them before: `flax.nnx.transforms.deprecated`.

Axes are told for arrays by position and for state by filter, and streams are
split for the time of a call, by the machinery of `nnx.Vmap` and its like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any

import nnx
from nnx.graphlib import traversal
from nnx.transforms import combinators

_GRAPH = combinators._GRAPH
_ALL_MAPPED = combinators._ALL_MAPPED


def _or_decorator(transform: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a decorator of a transform that is called without a function."""

  @functools.wraps(transform)
  def call(f: Callable[..., Any] | None = None, **options: Any) -> Any:
    if f is None:
      return functools.partial(transform, **options)
    return transform(f, **options)

  return call


@_or_decorator
def vmap(
  f: Callable[..., Any],
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  axis_name: Any = None,
  axis_size: int | None = None,
  spmd_axis_name: Any = None,
  in_axes_kwargs: Any = 0,
  state_axes: Mapping[Any, Any] = _ALL_MAPPED,
  split_rngs: Any = ...,
  transform_metadata: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
  """Maps a function whose Modules have axes by filter.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> from nnx.as_flax import earlier
    >>> make = earlier.vmap(
    ...   lambda rngs: nnx.Linear(2, 3, rngs=rngs),
    ...   state_axes={nnx.Param: 0},
    ...   axis_size=5,
    ... )
    >>> layers = make(nnx.Rngs(0))
    >>> earlier.vmap(lambda m, x: m(x))(layers, jnp.ones((5, 2))).shape
    (5, 3)

  Args:
    f: the function; without it, a decorator is returned.
    in_axes: as in `nnx.Vmap`.
    out_axes: the same; Modules that are returned have the axes of state.
    axis_name: the same.
    axis_size: the same.
    spmd_axis_name: the same.
    in_axes_kwargs: the same.
    state_axes: the same.
    split_rngs: the same.
    transform_metadata: the same.

  Returns:
    The mapped function.
  """
  transform = functools.partial(
    nnx.vmap,
    axis_name=axis_name,
    axis_size=axis_size,
    spmd_axis_name=spmd_axis_name,
    transform_metadata=transform_metadata,
    **_GRAPH,
  )
  mapping = combinators._Mapping(transform, state_axes, split_rngs, axis_size)
  mapped = mapping.map(f, in_axes, in_axes_kwargs, out_axes)
  return functools.wraps(f)(mapped)


@_or_decorator
def pmap(
  f: Callable[..., Any],
  *,
  axis_name: Any = None,
  in_axes: Any = 0,
  out_axes: Any = 0,
  static_broadcasted_argnums: Any = (),
  devices: Any = None,
  backend: str | None = None,
  axis_size: int | None = None,
  donate_argnums: Any = (),
  global_arg_shapes: Any = None,
  in_axes_kwargs: Any = 0,
  state_axes: Mapping[Any, Any] = _ALL_MAPPED,
  split_rngs: Any = ...,
  transform_metadata: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
  """Maps a function over devices; as `vmap` here, in terms of `nnx.pmap`.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> from nnx.as_flax import earlier
    >>> n = jax.device_count()
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> apply = earlier.pmap(lambda m, x: m(x), state_axes={})
    >>> apply(model, jnp.ones((n, 1, 2))).shape == (n, 1, 3)
    True

  Args:
    f: the function; without it, a decorator is returned.
    axis_name: as in `nnx.Pmap`.
    in_axes: the same.
    out_axes: the same; Modules that are returned have the axes of state.
    static_broadcasted_argnums: must be empty, as in Flax.
    devices: as in `nnx.Pmap`.
    backend: the same.
    axis_size: the same.
    donate_argnums: must be empty, as in Flax.
    global_arg_shapes: must be None, as in Flax.
    in_axes_kwargs: as in `nnx.Pmap`.
    state_axes: the same.
    split_rngs: the same.
    transform_metadata: the same.

  Returns:
    The mapped function.

  Raises:
    ValueError: if an argument that must be left out is not.
  """
  combinators.check_left_out(
    static_broadcasted_argnums=static_broadcasted_argnums,
    donate_argnums=donate_argnums,
    global_arg_shapes=global_arg_shapes,
  )
  transform = functools.partial(
    nnx.pmap,
    axis_name=axis_name,
    devices=devices,
    backend=backend,
    axis_size=axis_size,
    transform_metadata=transform_metadata,
    **_GRAPH,
  )
  mapping = combinators._Mapping(transform, state_axes, split_rngs, axis_size)
  mapped = mapping.map(f, in_axes, in_axes_kwargs, out_axes)
  return functools.wraps(f)(mapped)


@_or_decorator
def scan(
  f: Callable[..., Any],
  *,
  length: int | None = None,
  reverse: bool = False,
  unroll: int | bool = 1,
  _split_transpose: bool = False,
  in_axes: Any = 0,
  in_axes_kwargs: Any = 0,
  out_axes: Any = 0,
  carry_argnum: int = 0,
  state_axes: Mapping[Any, Any] = _ALL_MAPPED,
  split_rngs: Any = ...,
  transform_metadata: Mapping[str, Any] | None = None,
  scan_output: bool = True,
) -> Callable[..., Any]:
  """Scans a function whose Modules have axes by filter.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> from nnx.as_flax import earlier
    >>> layers = nnx.Vmap.constructor(nnx.Linear, axis_size=5)(
    ...   2, 2, rngs=nnx.Rngs(0)
    ... ).vmap_module
    >>> apply = earlier.scan(lambda x, layer: layer(x), scan_output=False)
    >>> apply(jnp.ones((1, 2)), layers).shape
    (1, 2)

  Args:
    f: the function; without it, a decorator is returned.
    length: as in `nnx.Scan`.
    reverse: the same.
    unroll: the same.
    _split_transpose: the same.
    in_axes: the same.
    in_axes_kwargs: the same.
    out_axes: the axis of what is returned besides the carry.
    carry_argnum: which argument is the carry.
    state_axes: as in `nnx.Scan`.
    split_rngs: the same.
    transform_metadata: the same.
    scan_output: whether `f` returns a pair, or the carry alone.

  Returns:
    The scanned function.
  """
  transform = functools.partial(
    nnx.scan,
    length=length,
    reverse=reverse,
    unroll=unroll,
    _split_transpose=_split_transpose,
    transform_metadata=transform_metadata,
    **_GRAPH,
  )
  mapping = combinators._Mapping(
    transform, state_axes, split_rngs, length, nnx.Carry
  )
  results = (nnx.Carry, out_axes) if scan_output else nnx.Carry
  mapped = mapping.map(f, in_axes, in_axes_kwargs, results, carry_argnum)
  return functools.wraps(f)(mapped)


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
    return transform(f, argnums=marked, **options, **_GRAPH)

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
