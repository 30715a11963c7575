"""Jit, Remat, Vmap and Scan: Modules whose methods are transformed.

The manner of Flax 0.10; a transform around a function does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import operator
import types
from typing import Any

import jax

from nnx import filterlib, rnglib
from nnx.graphlib import functional, modes, traversal
from nnx.module import Module
from nnx.transforms import jit as jit_lib
from nnx.transforms import remat as remat_lib
from nnx.transforms import scan as scan_lib
from nnx.transforms import vmap as vmap_lib
from nnx.transforms.carry import Carry

# Their axes are filters, which no other mode has.
_GRAPH = modes.Mode.GRAPH.arguments

_ALL_MAPPED: Mapping[Any, Any] = types.MappingProxyType({...: 0})


class _Method:
  """What to call on a Module: names and items to look up, one after another."""

  def __init__(self, lifted: LiftedModule, steps: tuple[Any, ...]):
    self._lifted = lifted
    self._steps = steps

  def __getattr__(self, name: str) -> _Method:
    return _Method(self._lifted, (*self._steps, (getattr, name)))

  def __getitem__(self, key: Any) -> _Method:
    return _Method(self._lifted, (*self._steps, (operator.getitem, key)))

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    lifted = self._lifted
    run = lifted._transformed(self._steps)
    return run(lifted._submodule, *args, **kwargs)


def _by_method(
  transform: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Callable[[tuple[Any, ...]], Callable[..., Any]]:
  """Makes one transformed function for each method, and keeps it."""

  @functools.lru_cache(maxsize=256)
  def transformed(steps: tuple[Any, ...]) -> Callable[..., Any]:
    def call(module, *args, **kwargs):
      for look_up, name in steps:
        module = look_up(module, name)
      return module(*args, **kwargs)

    return transform(call)

  return transformed


class LiftedModule(Module):
  """A Module that calls another one under a transform.

  `lifted(...)` calls the Module inside, `lifted.call.method(...)` a method of
  it. Subclasses are `Jit`, `Remat`, `Vmap`, `Pmap` and `Scan`.

  Example:

    >>> import nnx
    >>> embed = nnx.Jit.constructor(nnx.Embed)(4, 3, rngs=nnx.Rngs(0))
    >>> embed.call.attend(embed(2)).shape
    (4,)
  """

  _transformed: Callable[[tuple[Any, ...]], Callable[..., Any]]
  _inside: str  # The attribute that holds the Module.

  @property
  def _submodule(self) -> Any:
    return getattr(self, self._inside)

  @property
  def call(self) -> Any:
    """The Module inside, to call methods of under the transform."""
    method = _Method(self, ())
    return method.call if isinstance(self._submodule, LiftedModule) else method

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the Module inside under the transform."""
    return self.call(*args, **kwargs)

  @classmethod
  def constructor(
    cls, module_constructor: Callable[..., Any], **options: Any
  ) -> Callable[..., Any]:
    """Returns a function of the arguments of `module_constructor`.

    Args:
      module_constructor: makes the Module inside, say its class.
      **options: those of the transform; see the class.

    Returns:
      A function that makes the Module and puts it inside of a new one of this
      class.
    """

    def construct(*args: Any, **kwargs: Any) -> LiftedModule:
      return cls(
        module_constructor=module_constructor,
        module_init_args=args,
        module_init_kwargs=kwargs,
        **options,
      )

    return construct


class _OfMethods(LiftedModule):
  """One whose methods are transformed, but not how its Module is made."""

  _transform: Callable[..., Any]

  def __init__(
    self,
    module_constructor: Callable[..., Any],
    *,
    module_init_args: tuple[Any, ...] = (),
    module_init_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
  ):
    self._transformed = _by_method(
      functools.partial(type(self)._transform, **options)
    )
    self.module_constructor = module_constructor
    inside = module_constructor(*module_init_args, **module_init_kwargs or {})
    setattr(self, self._inside, inside)


class Jit(_OfMethods):
  """A Module whose methods are compiled by `nnx.jit`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> linear = nnx.Jit.constructor(nnx.Linear)(2, 3, rngs=nnx.Rngs(0))
    >>> linear(jnp.ones((1, 2))).shape, linear.jit_module.kernel.shape
    ((1, 3), (2, 3))

  Args:
    module_constructor: makes the Module inside.
    module_init_args: its positional arguments.
    module_init_kwargs: its keyword arguments.
    **options: those of `nnx.jit`; argument 0 is the Module.
  """

  _inside = "jit_module"
  _transform = staticmethod(functools.partial(jit_lib.jit, **_GRAPH))


class Remat(_OfMethods):
  """A Module whose methods are under `nnx.remat`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> linear = nnx.Remat.constructor(nnx.Linear)(2, 3, rngs=nnx.Rngs(0))
    >>> linear(jnp.ones((1, 2))).shape, linear.remat_module.kernel.shape
    ((1, 3), (2, 3))

  Args:
    module_constructor: as in `nnx.Jit`.
    module_init_args: the same.
    module_init_kwargs: the same.
    **options: those of `nnx.remat`; argument 0 is the Module.
  """

  _inside = "remat_module"
  _transform = staticmethod(functools.partial(remat_lib.remat, **_GRAPH))


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


class Vmap(LiftedModule):
  """Modules made and called under `nnx.vmap`, as one.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> Layers = nnx.Vmap.constructor(
    ...   nnx.Linear, state_axes={nnx.Param: 0}, axis_size=5
    ... )
    >>> layers = Layers(2, 3, rngs=nnx.Rngs(0))
    >>> layers.vmap_module.kernel.shape, layers(jnp.ones((5, 1, 2))).shape
    ((5, 2, 3), (5, 1, 3))

  Args:
    module_constructor: makes the Module inside. It runs once, mapped: its
      arguments are the same for all, but for their split streams.
    in_axes: an axis or `None` for each positional argument of a call, or one
      for all; argument 0 is the Module.
    out_axes: the axis of the result.
    axis_name: as in `nnx.vmap`.
    axis_size: the same; needed to make the Module.
    spmd_axis_name: the same.
    in_axes_kwargs: the axis of keyword arguments.
    state_axes: axes of Variables by filter; others are the same for all.
    split_rngs: a filter of the streams of which each element gets its own keys;
      others are the same for all.
    transform_metadata: as in `nnx.vmap`.
    module_init_args: positional arguments for `module_constructor`.
    module_init_kwargs: its keyword arguments.
  """

  _inside = "vmap_module"

  def __init__(
    self,
    module_constructor: Callable[..., Any],
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
    module_init_args: tuple[Any, ...] = (),
    module_init_kwargs: Mapping[str, Any] | None = None,
  ):
    transform = functools.partial(
      vmap_lib.vmap,
      axis_name=axis_name,
      axis_size=axis_size,
      spmd_axis_name=spmd_axis_name,
      transform_metadata=transform_metadata,
      **_GRAPH,
    )
    mapping = _Mapping(transform, state_axes, split_rngs, axis_size)
    construct = mapping.map(module_constructor, None, None, None)
    self.module_constructor = module_constructor
    self.vmap_module = construct(*module_init_args, **module_init_kwargs or {})
    self._transformed = _by_method(
      lambda f: mapping.map(f, in_axes, in_axes_kwargs, out_axes)
    )


def check_left_out(**options: Any) -> None:
  """Refuses values of options that are there for programs of Flax alone.

  Example:

    >>> from nnx.transforms import combinators
    >>> combinators.check_left_out(donate_argnums=())

  Args:
    **options: the options; empty or None where they are left out.

  Raises:
    ValueError: if one of them is not left out.
  """
  for name, value in options.items():
    if value not in ((), [], None):
      raise ValueError(f"`{name}` must be left out, but got `{value}`.")


class Pmap(LiftedModule):
  """Modules made under `nnx.vmap` and called under `nnx.pmap`, one a device.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> n = jax.device_count()
    >>> layers = nnx.Pmap.constructor(nnx.Linear, axis_size=n)(
    ...   2, 3, rngs=nnx.Rngs(0)
    ... )
    >>> layers.pmap_module.kernel.shape == (n, 2, 3)
    True
    >>> layers(jnp.ones((n, 1, 2))).shape == (n, 1, 3)
    True

  Args:
    module_constructor: as in `nnx.Vmap`.
    axis_name: as in `nnx.pmap`.
    in_axes: as in `nnx.Vmap`.
    out_axes: the axis of the result.
    static_broadcasted_argnums: must be empty: a method gets its arguments
      mapped.
    devices: as in `nnx.pmap`.
    backend: the same.
    axis_size: the same; needed to make the Module.
    donate_argnums: must be empty.
    global_arg_shapes: must be None; jax has given it up.
    in_axes_kwargs: as in `nnx.Vmap`.
    state_axes: the same.
    split_rngs: the same.
    transform_metadata: as in `nnx.pmap`.
    module_init_args: positional arguments for `module_constructor`.
    module_init_kwargs: its keyword arguments.
  """

  _inside = "pmap_module"

  def __init__(
    self,
    module_constructor: Callable[..., Any],
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
    module_init_args: tuple[Any, ...] = (),
    module_init_kwargs: Mapping[str, Any] | None = None,
  ):
    check_left_out(
      static_broadcasted_argnums=static_broadcasted_argnums,
      donate_argnums=donate_argnums,
      global_arg_shapes=global_arg_shapes,
    )
    self.module_constructor = module_constructor
    self.pmap_module = Vmap(
      module_constructor,
      axis_name=axis_name,
      axis_size=axis_size,
      state_axes=state_axes,
      split_rngs=split_rngs,
      transform_metadata=transform_metadata,
      module_init_args=module_init_args,
      module_init_kwargs=module_init_kwargs,
    ).vmap_module
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
    self._transformed = _by_method(
      lambda f: mapping.map(f, in_axes, in_axes_kwargs, out_axes)
    )


class Scan(LiftedModule):
  """Modules made under `nnx.vmap` and called one after another, by `nnx.scan`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> Layers = nnx.Scan.constructor(
    ...   nnx.Linear, state_axes={nnx.Param: 0}, length=5, scan_output=False
    ... )
    >>> layers = Layers(3, 3, rngs=nnx.Rngs(0))
    >>> layers.scan_module.kernel.shape, layers(jnp.ones((1, 3))).shape
    ((5, 3, 3), (1, 3))

  Args:
    module_constructor: as in `nnx.Vmap`.
    length: the number of iterations; needed to make the Module.
    reverse: as in `nnx.scan`.
    unroll: the same.
    _split_transpose: the same.
    in_axes: an axis for each positional argument of a call, or `None` for what
      is the same for all iterations, or one for all; argument 0 is the Module.
    in_axes_kwargs: the axis of keyword arguments.
    out_axes: the axis of the results that are not the carry.
    carry_argnum: which argument is the carry.
    state_axes: axes of Variables by filter; others are carried.
    split_rngs: as in `nnx.Vmap`.
    transform_metadata: as in `nnx.scan`.
    scan_output: whether methods return a pair of the carry and results that
      are stacked, instead of the carry.
    module_init_args: as in `nnx.Vmap`.
    module_init_kwargs: the same.
  """

  _inside = "scan_module"

  def __init__(
    self,
    module_constructor: Callable[..., Any],
    *,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    in_axes: Any = 0,
    in_axes_kwargs: Any = 0,
    out_axes: Any = 0,
    carry_argnum: int = 1,
    state_axes: Mapping[Any, Any] = _ALL_MAPPED,
    split_rngs: Any = ...,
    transform_metadata: Mapping[str, Any] | None = None,
    scan_output: bool = True,
    module_init_args: tuple[Any, ...] = (),
    module_init_kwargs: Mapping[str, Any] | None = None,
  ):
    self.module_constructor = module_constructor
    self.scan_module = Vmap(
      module_constructor,
      axis_size=length,
      state_axes=state_axes,
      split_rngs=split_rngs,
      transform_metadata=transform_metadata,
      module_init_args=module_init_args,
      module_init_kwargs=module_init_kwargs,
    ).vmap_module
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
    self._transformed = _by_method(
      lambda f: mapping.map(f, in_axes, in_axes_kwargs, results, carry_argnum)
    )
