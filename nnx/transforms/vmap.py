"""vmap, pmap and transform_metadata: functions of graphs mapped over axes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
import functools
from typing import Any, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp

from nnx import spmd
from nnx.engine import _engine, jax_private
from nnx.graphlib import modes
from nnx.rng_streams import RngState
from nnx.transforms import callables, lift, mapped, prefix
from nnx.transforms.carry import Carry

F = TypeVar("F", bound=Callable[..., Any])


class VmapOptions(TypedDict, total=False):
  """The options of `vmap`, for type checkers; see there."""

  in_axes: Any
  out_axes: Any
  axis_name: Hashable | None
  axis_size: int | None
  spmd_axis_name: Hashable | tuple[Hashable, ...] | None
  transform_metadata: Mapping[str, Any] | None
  graph: bool | None
  graph_updates: bool | None


# `items` is a list, as a filter may come twice.
class StateAxes(prefix.FilterMap, Mapping[Any, Any]):  # type: ignore[misc]
  """Axes for the Variables of a graph, by filter.

  Example:

    >>> import nnx
    >>> axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    >>> axes
    StateAxes({<class 'nnx.variablelib.Param'>: 0, Ellipsis: None})
    >>> axes[nnx.Param]
    0

  Args:
    entries: a mapping from filters to axes (an int, `None`, or for `nnx.scan`
      `nnx.Carry`), or pairs of them, or a State of axes.
  """

  __slots__ = ()

  @property
  def axes(self) -> tuple[Any, ...]:
    """The axes, in the order of the filters."""
    return self.entries

  def __getitem__(self, filter_: Any) -> Any:
    return self.entries[self.filters.index(filter_)]

  def __iter__(self):
    return iter(self.filters)

  def __len__(self) -> int:
    return len(self.filters)

  def select(self, path: tuple, value: Any) -> tuple[bool, Any]:
    if not path and not isinstance(value, _engine.VariableBase):
      raise ValueError(
        "`StateAxes` speaks of the Variables of Modules, but was given for"
        f" `{value!r}` of type `{type(value).__name__}`. Use an int or `None`."
      )
    return super().select(path, value)


def is_axis(value: Any) -> bool:
  """Tells whether something is the axis of all leaves below it."""
  return value is None or (
    isinstance(value, int) and not isinstance(value, bool)
  )


def check_axes(
  policy: lift.Policy,
  in_axes: Any,
  out_axes: Any,
  is_entry: Callable[[Any], bool],
) -> None:
  """Refuses axes that are none, or that the mode has not.

  Raises:
    TypeError: if a leaf of the axes is no axis.
    ValueError: if the mode does not allow what they say.
  """
  options = {"in_axes": in_axes, "out_axes": out_axes}
  for option, axes in options.items():
    prefix.check(policy, option, axes)
  for option, axes in options.items():
    for entry in mapped.entries_in([axes], is_entry):
      if not is_entry(entry):
        raise TypeError(
          f"`{option}` must hold ints, `None`, `nnx.StateAxes` and containers"
          f" of them, but got `{entry!r}` of type `{type(entry).__name__}`."
        )
  prefix.check_form("in_axes", in_axes, is_entry)


def walk_axes(
  structure: Any,
  leaves: Sequence[Any],
  objects: Sequence[Any],
  lifted: lift.Lifted,
  in_axes: Any,
) -> prefix.Walk:
  """Walks over arguments to find the axis of each leaf."""
  names, bound = lifted.names, isinstance(lifted.fun, callables.Method)
  walk = prefix.Walk(structure, leaves, objects, is_axis)
  count = structure._num_roots - len(names)
  for root in prefix.roots(
    in_axes,
    count,
    names,
    is_entry=is_axis,
    option="in_axes",
    keyword_entry=0,
  ):
    if bound and root.where == callables.SELF:
      root = prefix.Root(None, root.option, root.where)
    walk.visit_root(root)
  return walk


def check_sizes(
  walk: prefix.Walk,
  axis_size: int | None,
  is_index: Callable[[Any], bool] = lambda axis: axis is not None,
) -> None:
  """Refuses arrays that cannot be mapped together.

  Raises:
    ValueError: if an array has no such axis, or if the axes have two sizes.
  """
  first = "`axis_size`", axis_size
  for leaf, axis, place in zip(walk.leaves, walk.entries, walk.places):
    if not is_index(axis):
      continue
    assert place is not None
    shape = jnp.shape(leaf) if lift.is_array(leaf) else None
    if shape is None or not -len(shape) <= axis < len(shape):
      has = f"shape {shape}" if shape is not None else f"the value {leaf!r}"
      cure = "Use `None` for what is not mapped."
      variable = walk.objects[place.variable] if place.variable >= 0 else None
      if isinstance(variable, RngState):
        cure += " `nnx.split_rngs` gives random streams an axis."
      raise ValueError(
        f"`in_axes` must name axes that arrays have, but `{place.text}` has"
        f" {has} and no axis {axis}. {cure}"
      )
    if first[1] is None:
      first = f"axis {axis} of `{place.text}`", shape[axis]
    elif shape[axis] != first[1]:
      raise ValueError(
        "All axes that are mapped must have one size, but"
        f" {first[0]} has {first[1]} and axis {axis} of `{place.text}` has"
        f" {shape[axis]}."
      )


# What versions of jax say of an output that is mapped and shall not be.
_UNMAPPED = ("out_axes is None", "axis spec None but output was batched")


def _unmapped_error(plans: Sequence[Any], walk, out_root) -> str:
  """Says which outputs were to have no mapped axis."""
  names: list[str] = []
  for plan, entry_of in plans:
    paths = mapped.output_paths(plan, walk, out_root)
    names += [p for p, entry in zip(paths, entry_of) if entry is None]
  named = ", ".join(f"`{name}`" for name in dict.fromkeys(names))
  return (
    "What has the axis `None` must be the same for all elements of the mapped"
    f" axis, but one of {named} got values that differ. Give it an axis in"
    " `in_axes` or `out_axes`, or do not write it."
  )


@overload
def vmap(f: F, **options: Unpack[VmapOptions]) -> F: ...
@overload
def vmap(
  f: None = None, **options: Unpack[VmapOptions]
) -> Callable[[F], F]: ...
def vmap(
  f: Callable[..., Any] | None = None,
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  axis_name: Hashable | None = None,
  axis_size: int | None = None,
  spmd_axis_name: Hashable | tuple[Hashable, ...] | None = None,
  transform_metadata: Mapping[str, Any] | None = None,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Maps a function over axes of its arguments.

  As `jax.vmap`, but arguments and results may hold Modules and Variables, and
  what the function does to them is done to the caller's: a Variable that is
  written keeps its axis, and one that is made inside gets the axis of the
  Module it is put into, or that of the result it is returned in.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Scale(nnx.Module):
    ...   def __init__(self):
    ...     self.w = nnx.Param(jnp.arange(3.0))
    ...     self.calls = nnx.Variable(jnp.array(0))
    >>> axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    >>> @nnx.vmap(in_axes=(axes, None))
    ... def apply(scale, x):
    ...   scale.calls.value += 1
    ...   return scale.w * x
    >>> scale = Scale()
    >>> print(apply(scale, 2.0), scale.calls.value)
    [0. 2. 4.] 1

  Args:
    f: the function; without it, `vmap` is a decorator.
    in_axes: for each positional argument an axis, `None` for what is not
      mapped, a `StateAxes`, or a pytree prefix of these; one entry may stand
      for all. Keyword arguments are mapped over axis 0.
    out_axes: the same for the result.
    axis_name: a name for collectives.
    axis_size: the size of the axis, needed where nothing is mapped.
    spmd_axis_name: as in `jax.vmap`.
    transform_metadata: with a name under `nnx.PARTITION_NAME`, that name is
      taken out of the sharding annotations of mapped Variables for the
      function and entered afterwards, also into those of new Variables; their
      hooks for added and removed axes run.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    The mapped function.

  Raises:
    TypeError: if `in_axes` or `out_axes` holds something else.
    ValueError: if they do not fit the arguments or the result, if a shared
      Variable gets two axes, if mapped axes differ in size, or if what has the
      axis `None` is given values that differ along the mapped axis.
  """
  mode = modes.resolve(graph, graph_updates)
  if f is None:
    return functools.partial(
      vmap,
      in_axes=in_axes,
      out_axes=out_axes,
      axis_name=axis_name,
      axis_size=axis_size,
      spmd_axis_name=spmd_axis_name,
      transform_metadata=transform_metadata,
      **mode.arguments,
    )
  f = callables.function_of(f, "vmap")
  policy = lift.Policy(mode, "vmap")
  check_axes(policy, in_axes, out_axes, is_axis)
  groups = mapped.entries_in([in_axes, out_axes, 0, None], is_axis)
  out_root = prefix.Root(out_axes, "out_axes", "result")

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    args, kwargs = policy.bind(f, args, kwargs, in_axes)
    call = lift.Call(policy, f, args, kwargs)
    walk = walk_axes(
      call.structure, call.leaves, call.objects, call.lifted, in_axes
    )
    check_sizes(walk, axis_size)
    inputs = [i for i, axis in enumerate(walk.entries) if axis is not None]
    if not inputs and axis_size is None:
      raise ValueError(
        "`nnx.vmap` must be given an array to map over, but no argument of"
        f" `{callables.name_of(f)}` has one with an axis in `in_axes`. Give the"
        " number of elements in `axis_size`."
      )
    function = mapped.Mapped(
      call.lifted, walk, out_root, groups, transform_metadata
    )
    plans = []

    def flat(leaves):
      grouped = function(call.with_leaves(inputs, leaves))
      plans.append(grouped[0].value)
      return grouped

    vmapped = jax.vmap(
      call.described(flat, "vmap", inputs),
      in_axes=(tuple(walk.entries[i] for i in inputs),),
      out_axes=(None, *groups),
      axis_name=axis_name,
      axis_size=axis_size,
      spmd_axis_name=spmd_axis_name,
    )
    try:
      grouped = call.framed(vmapped, call.pick(inputs))
    except ValueError as error:
      if plans and any(text in str(error) for text in _UNMAPPED):
        text = _unmapped_error(plans, walk, out_root)
        raise ValueError(text) from error
      raise
    return call.apply(function.packed(grouped))

  return wrapper


class _Pmapped(_engine.JitFunction):
  """A function mapped by `nnx.pmap`: compiled once for each structure."""

  def __init__(self, *args: Any):
    super().__init__(*args)
    jax_private.register_cache(self, "nnx.pmap")


def pmap(
  f: Callable[..., Any] | None = None,
  *,
  axis_name: Hashable | None = None,
  in_axes: Any = 0,
  out_axes: Any = 0,
  static_broadcasted_argnums: int | Iterable[int] = (),
  devices: Sequence[Any] | None = None,
  backend: str | None = None,
  axis_size: int | None = None,
  donate_argnums: int | Iterable[int] = (),
  transform_metadata: Mapping[str, Any] | None = None,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Maps a function over axes of its arguments, one element a device.

  As `jax.pmap`, with Modules and Variables as in `vmap`. The function is
  compiled once for each structure of its arguments.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> w = nnx.Param(jnp.ones((1, 2)))
    >>> nnx.pmap(lambda w, x: w * x, in_axes=(0, None))(w, 3.0).shape
    (1, 2)

  Args:
    f: the function; without it, `pmap` is a decorator.
    axis_name: a name for collectives.
    in_axes: as in `vmap`.
    out_axes: as in `vmap`.
    static_broadcasted_argnums: positions of arguments that are compile-time
      constants, with the axis `None` in `in_axes`.
    devices: the devices, as in `jax.pmap`.
    backend: the backend, as in `jax.pmap`.
    axis_size: the size of the axis.
    donate_argnums: positions of arguments whose buffers may be reused. State in
      them stays valid: it counts as written.
    transform_metadata: as in `vmap`.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    The mapped function.

  Raises:
    TypeError: if a static argument is not hashable.
    ValueError: as `vmap`; also as `jax.pmap`, for too few devices.
  """
  mode = modes.resolve(graph, graph_updates)
  if f is None:
    return functools.partial(
      pmap,
      axis_name=axis_name,
      in_axes=in_axes,
      out_axes=out_axes,
      static_broadcasted_argnums=static_broadcasted_argnums,
      devices=devices,
      backend=backend,
      axis_size=axis_size,
      donate_argnums=donate_argnums,
      transform_metadata=transform_metadata,
      **mode.arguments,
    )
  f = callables.function_of(f, "pmap")
  policy = lift.Policy(mode, "pmap")
  check_axes(policy, in_axes, out_axes, is_axis)
  groups = mapped.entries_in([in_axes, out_axes, 0, None], is_axis)
  out_root = prefix.Root(out_axes, "out_axes", "result")
  static = callables.as_tuple(static_broadcasted_argnums)
  donated = callables.as_tuple(donate_argnums)

  def make_entry(
    structure: Any, leaves: tuple, names: tuple[str, ...], _: tuple
  ):
    objects = _engine.unflatten(structure, leaves).objects
    lifted = lift.Lifted(f, structure, names, policy)
    lift.check_statics(lifted)
    walk = walk_axes(structure, leaves, objects, lifted, in_axes)
    check_sizes(walk, axis_size)
    given_up = lift.leaves_of_roots(structure, donated)
    function = mapped.Mapped(
      lifted,
      walk,
      out_root,
      groups,
      transform_metadata,
      frozenset(given_up),
    )

    def flat(*leaves):
      return function(leaves)

    flat.__name__ = flat.__qualname__ = callables.name_of(f)
    pmapped = jax.pmap(
      flat,
      axis_name=axis_name,
      in_axes=tuple(walk.entries),
      out_axes=(None, *groups),
      devices=devices,
      backend=backend,
      axis_size=axis_size,
      donate_argnums=given_up,
    )
    return _engine.JitEntry(
      (lambda leaves: function.packed(pmapped(*leaves)), None, None)
    )

  wrapped = _Pmapped(make_entry, jnp.copy, frozenset(static))
  if isinstance(f, callables.Method):
    return functools.wraps(f)(
      lambda *args, **kwargs: wrapped(*args, **callables.with_owner(f, kwargs))
    )
  return functools.update_wrapper(wrapped, f)


def _without_carry(axes: Any) -> Any:
  """Returns axes of a scan for what has no loop: the carry is not mapped."""
  if axes is Carry:
    return None
  if isinstance(axes, (tuple, list)):
    return type(axes)(map(_without_carry, axes))
  if isinstance(axes, StateAxes):
    return StateAxes([(f, _without_carry(entry)) for f, entry in axes.items()])
  if isinstance(axes, Mapping):
    return {key: _without_carry(entry) for key, entry in axes.items()}
  return axes


def transform_metadata(
  f: Callable[..., Any] | None = None,
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  partition: str | None,
  graph: bool | None = None,
) -> Any:
  """Takes the name of an axis out of annotations for a function.

  Put between a transform of jax and a function, it does what the option
  `transform_metadata` of `nnx.vmap` does: inside, the sharding annotations are
  those of one element; outside, those of all.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> p = nnx.Param(jnp.ones((3, 2)), out_sharding=("layers", "embed"))
    >>> @nnx.transform_metadata(partition="layers")
    ... def f(p):
    ...   return p.out_sharding
    >>> f(p), p.out_sharding
    (('embed',), ('layers', 'embed'))

  Args:
    f: the function; without it, `transform_metadata` is a decorator.
    in_axes: where the axis is in the arguments, as in `vmap` or `scan`.
    out_axes: where it is in the result.
    partition: the name of the axis, or `None`.
    graph: as in `nnx.jit`; changes of structure are never passed on.

  Returns:
    The function.

  Raises:
    TypeError: if `in_axes` or `out_axes` holds something else.
    ValueError: if they do not fit, or if an annotation has another name.
  """
  mode = modes.resolve(graph)
  if f is None:
    return functools.partial(
      transform_metadata,
      in_axes=in_axes,
      out_axes=out_axes,
      partition=partition,
      graph=graph,
    )
  f = callables.function_of(f, "transform_metadata")
  policy = lift.Policy(mode, "transform_metadata")
  in_axes, out_axes = _without_carry(in_axes), _without_carry(out_axes)
  check_axes(policy, in_axes, out_axes, is_axis)
  out_root = prefix.Root(out_axes, "out_axes", "result")
  metadata = {spmd.PARTITION_NAME: partition}

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    args, kwargs = callables.bind(f, args, kwargs, in_axes)
    call = lift.Call(policy, f, args, kwargs)
    walk = walk_axes(
      call.structure, call.leaves, call.objects, call.lifted, in_axes
    )

    def run():
      values, objects = call.lifted.open(call.leaves)
      mapped.remove_axes(walk, objects, metadata)
      result = call.lifted.call(values)
      mapped.add_axes(policy, walk, objects, result, out_root, metadata)
      return call.lifted.pack(objects, call.leaves, result)

    return call.apply(call.framed(run))

  return wrapper
