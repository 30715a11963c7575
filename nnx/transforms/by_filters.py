"""Maps and scans functions of Modules, whose axes filters tell.

The manner of Flax 0.10: axes are told for arrays by position and for state by
filter, and streams are split for the time of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import types
from typing import Any

import jax

from nnx import filterlib, rnglib
from nnx.graphlib import functional, modes, traversal
from nnx.transforms import scan as scan_lib
from nnx.transforms import vmap as vmap_lib
from nnx.transforms.carry import Carry

# No other mode has axes that are filters.
_GRAPH = modes.Mode.GRAPH.arguments

ALL_MAPPED: Mapping[Any, Any] = types.MappingProxyType({...: 0})


@jax.tree_util.register_static
class _Place(int):
  """Where in an output a graph node was, by its number."""


def _take_out_nodes(output: Any) -> tuple[Any, list[Any]]:
  nodes: list[Any] = []

  def place(leaf: Any) -> Any:
    if not traversal.is_graph_node(leaf):
      return leaf
    nodes.append(leaf)
    return _Place(len(nodes) - 1)

  return jax.tree.map(place, output, is_leaf=traversal.is_graph_node), nodes


def _put_nodes_back(output: Any, nodes: list[Any]) -> Any:
  def is_place(leaf: Any) -> bool:
    return isinstance(leaf, _Place)

  return jax.tree.map(
    lambda leaf: nodes[leaf] if is_place(leaf) else leaf,
    output,
    is_leaf=is_place,
  )


class _Mapping:
  """How functions of Modules are mapped, in terms of `nnx.vmap` or `nnx.scan`.

  Graph nodes among the arguments get the axes of state, other arguments those
  of `in_axes`; and streams are split for the time of a call. So do graph nodes
  that a function returns, but for one with a carry.
  """

  def __init__(
    self,
    transform: Callable[..., Any],
    state_axes: Mapping[Any, Any],
    split_rngs: Any,
    size: int | None,
    rest: Any = None,
  ):
    self.transform = transform
    self.split_rngs = split_rngs
    self.size = size
    not_random = filterlib.Not(rnglib.RngState)
    self.mapped = [
      (filterlib.All(not_random, filter_), axis)
      for filter_, axis in state_axes.items()
      if axis is not None
    ]
    self.node_axes = vmap_lib.StateAxes(
      [
        (filterlib.All(rnglib.RngState, split_rngs), 0),
        (rnglib.RngState, None),
        *self.mapped,
        (..., rest),
      ]
    )

  def map(
    self,
    f: Callable[..., Any],
    in_axes: Any,
    in_axes_kwargs: Any,
    out_axes: Any,
    carry_argnum: int | None = None,
  ) -> Callable[..., Any]:
    def positional(*args):
      *args, kwargs = args
      output = f(*args, **kwargs)
      return output if has_carry else _take_out_nodes(output)

    has_carry = carry_argnum is not None
    results = out_axes if has_carry else (out_axes, self.node_axes)

    def axes_of(count: int) -> list[Any]:
      whole = not isinstance(in_axes, (tuple, list))
      axes = [in_axes] * count if whole else list(in_axes)
      if len(axes) != count:
        raise ValueError(
          "`in_axes` must have an entry for the Module and for each positional"
          f" argument, but has {len(axes)} for the Module and {count - 1}"
          " arguments."
        )
      if carry_argnum is not None:
        if count <= carry_argnum:
          raise TypeError(
            f"The carry must be argument {carry_argnum}, counting the Module as"
            f" 0, but got {count - 1} positional arguments. Pass the carry by"
            " position."
          )
        axes[carry_argnum] = Carry
      return axes

    @functools.lru_cache(maxsize=256)
    def transformed(nodes: tuple[bool, ...], keywords: tuple[Any, ...]):
      axes = [
        self.node_axes if node and axis is not Carry else axis
        for node, axis in zip(nodes, axes_of(len(nodes)), strict=True)
      ]
      of_keywords = {
        name: self.node_axes if node else in_axes_kwargs
        for name, node in keywords
      }
      return self.transform(
        positional, in_axes=(*axes, of_keywords), out_axes=results
      )

    def call(*args: Any, **kwargs: Any) -> Any:
      nodes = tuple(map(traversal.is_graph_node, args))
      keywords = tuple(
        (name, traversal.is_graph_node(kwargs[name])) for name in sorted(kwargs)
      )
      plain = [
        (value, axis)
        for node, value, axis in zip(nodes, args, axes_of(len(args)))
        if not node
      ]
      plain += [(kwargs[k], in_axes_kwargs) for k, node in keywords if not node]
      size = self.size
      if size is None:
        size = self.find_size((args, kwargs), plain)
      split = {"splits": size, "only": self.split_rngs}
      with rnglib.split_rngs(
        (args, kwargs), graph=True, graph_updates=True, **split
      ):
        output = transformed(nodes, keywords)(*args, kwargs)
      return output if has_carry else _put_nodes_back(*output)

    return call

  def find_size(self, graph: Any, plain: Sequence[tuple[Any, Any]]) -> int:
    """Returns the size of the mapped axis, of state or of an argument."""
    states = functional.state(
      graph, *(f for f, _ in self.mapped), ..., graph=True
    )
    axes = [axis for _, axis in self.mapped]
    for value, axis in (*zip(states, axes), *plain):
      if isinstance(axis, int):
        for leaf in jax.tree.leaves(value):
          return leaf.shape[axis]
    raise ValueError(
      "The size of the mapped axis must be known, but no state and no argument"
      " that is an array has the axis. Give `axis_size`, or to `nnx.Scan`"
      " `length`."
    )


def check_left_out(**options: Any) -> None:
  """Refuses values of options that are there for programs of Flax alone.

  Example:

    >>> from nnx.transforms import by_filters
    >>> by_filters.check_left_out(donate_argnums=())

  Args:
    **options: the options; empty or None where they are left out.

  Raises:
    ValueError: if one of them is not left out.
  """
  for name, value in options.items():
    if value not in ((), [], None):
      raise ValueError(f"`{name}` must be left out, but got `{value}`.")


def vmap(
  f: Callable[..., Any],
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  axis_name: Any = None,
  axis_size: int | None = None,
  spmd_axis_name: Any = None,
  in_axes_kwargs: Any = 0,
  state_axes: Mapping[Any, Any] = ALL_MAPPED,
  split_rngs: Any = ...,
  transform_metadata: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
  """Maps a function whose Modules have axes by filter.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> from nnx.transforms import by_filters
    >>> make = by_filters.vmap(
    ...   lambda rngs: nnx.Linear(2, 3, rngs=rngs),
    ...   state_axes={nnx.Param: 0},
    ...   axis_size=5,
    ... )
    >>> layers = make(nnx.Rngs(0))
    >>> by_filters.vmap(lambda m, x: m(x))(layers, jnp.ones((5, 2))).shape
    (5, 3)

  Args:
    f: the function.
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
    vmap_lib.vmap,
    axis_name=axis_name,
    axis_size=axis_size,
    spmd_axis_name=spmd_axis_name,
    transform_metadata=transform_metadata,
    **_GRAPH,
  )
  mapping = _Mapping(transform, state_axes, split_rngs, axis_size)
  return mapping.map(f, in_axes, in_axes_kwargs, out_axes)


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
  state_axes: Mapping[Any, Any] = ALL_MAPPED,
  split_rngs: Any = ...,
  transform_metadata: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
  """Maps a function over devices; as `vmap` here, in terms of `nnx.pmap`.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> from nnx.transforms import by_filters
    >>> n = jax.device_count()
    >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    >>> apply = by_filters.pmap(lambda m, x: m(x), state_axes={})
    >>> apply(model, jnp.ones((n, 1, 2))).shape == (n, 1, 3)
    True

  Args:
    f: the function.
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
  check_left_out(
    static_broadcasted_argnums=static_broadcasted_argnums,
    donate_argnums=donate_argnums,
    global_arg_shapes=global_arg_shapes,
  )
  transform = functools.partial(
    vmap_lib.pmap,
    axis_name=axis_name,
    devices=devices,
    backend=backend,
    axis_size=axis_size,
    transform_metadata=transform_metadata,
    **_GRAPH,
  )
  mapping = _Mapping(transform, state_axes, split_rngs, axis_size)
  return mapping.map(f, in_axes, in_axes_kwargs, out_axes)


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
  state_axes: Mapping[Any, Any] = ALL_MAPPED,
  split_rngs: Any = ...,
  transform_metadata: Mapping[str, Any] | None = None,
  scan_output: bool = True,
) -> Callable[..., Any]:
  """Scans a function whose Modules have axes by filter.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> from nnx.transforms import by_filters
    >>> layers = nnx.Vmap.constructor(nnx.Linear, axis_size=5)(
    ...   2, 2, rngs=nnx.Rngs(0)
    ... ).vmap_module
    >>> apply = by_filters.scan(lambda x, layer: layer(x), scan_output=False)
    >>> apply(jnp.ones((1, 2)), layers).shape
    (1, 2)

  Args:
    f: the function.
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
    scan_lib.scan,
    length=length,
    reverse=reverse,
    unroll=unroll,
    _split_transpose=_split_transpose,
    transform_metadata=transform_metadata,
    **_GRAPH,
  )
  mapping = _Mapping(transform, state_axes, split_rngs, length, Carry)
  results = (Carry, out_axes) if scan_output else Carry
  return mapping.map(f, in_axes, in_axes_kwargs, results, carry_argnum)
