"""scan: a function of graphs over a leading axis, with a carry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, TypedDict, TypeVar, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np

from nnx import eager, environment, rnglib, spmd
from nnx.engine import _engine, jax_private, preorder
from nnx.graphlib import modes
from nnx.transforms import callables, lift, mapped, outcomes, prefix
from nnx.transforms import carry as carry_lib
from nnx.transforms import jit as jit_lib
from nnx.transforms import vmap as vmap_lib
from nnx.transforms.carry import Carry

_CONFIG: Any = jax.config  # whose options have no types

F = TypeVar("F", bound=Callable[..., Any])


class ScanOptions(TypedDict, total=False):
  """The options of `scan`, for type checkers; see there."""

  length: int | None
  reverse: bool
  unroll: int | bool
  _split_transpose: bool
  in_axes: Any
  out_axes: Any
  transform_metadata: Mapping[str, Any] | None
  graph: bool | None
  graph_updates: bool | None


def _is_axis(value: Any) -> bool:
  return value is Carry or vmap_lib.is_axis(value)


def _carry_position(option: str, axes: Any) -> int | None:
  """Says where the carry is; 0 also if it is all."""
  if axes is Carry:
    return 0
  if not isinstance(axes, (tuple, list)):
    _refuse_nested(option, axes)
    return None
  found = [i for i, entry in enumerate(axes) if entry is Carry]
  for entry in axes:
    if entry is not Carry:
      _refuse_nested(option, entry)
  if len(found) > 1:
    raise ValueError(
      f"`{option}` must have one `nnx.Carry`, but got it at positions {found}."
      " Carry a tuple."
    )
  return found[0] if found else None


def _refuse_nested(option: str, entry: Any) -> None:
  leaves = jax.tree.leaves(
    entry, is_leaf=lambda x: _is_axis(x) or isinstance(x, prefix.FilterMap)
  )
  if Carry in [leaf for leaf in leaves if isinstance(leaf, type)]:
    raise ValueError(
      f"`nnx.Carry` must stand for a whole argument or result in `{option}`,"
      f" but it is inside of `{entry!r}`."
    )


def _check_out_axes(out_axes: Any) -> None:
  for entry in mapped.entries_in([out_axes], _is_axis):
    if entry is None:
      raise ValueError(
        "`out_axes` must have an axis for every result that is not the carry,"
        f" but got `{out_axes!r}`, which has `None`."
      )
  leaves = jax.tree.leaves(
    out_axes, is_leaf=lambda x: isinstance(x, prefix.FilterMap)
  )
  for leaf in leaves:
    if isinstance(leaf, prefix.FilterMap) and Carry in leaf.entries:
      raise ValueError(
        "`nnx.StateAxes` in `out_axes` must hold axes, but got `nnx.Carry` in"
        f" `{leaf!r}`. State is carried through the arguments."
      )


@overload
def scan(f: F, **options: Unpack[ScanOptions]) -> F: ...
@overload
def scan(
  f: None = None, **options: Unpack[ScanOptions]
) -> Callable[[F], F]: ...
def scan(
  f: Callable[..., Any] | None = None,
  *,
  length: int | None = None,
  reverse: bool = False,
  unroll: int | bool = 1,
  _split_transpose: bool = False,
  in_axes: Any = (Carry, 0),
  out_axes: Any = (Carry, 0),
  transform_metadata: Mapping[str, Any] | None = None,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Runs a function once for each element of an axis, in order.

  As `jax.lax.scan`, but for a function of any arguments, which may hold Modules
  and Variables, and what the function does to them is done to the caller's.
  The axes say of each argument, or with `StateAxes` of each Variable, whether
  it is carried, scanned over an axis, or the same for all iterations. A
  Variable that is to be the same but is written is carried; not so a stream of
  random numbers, from which all iterations draw the same.

  Outside of `jit` the loop is compiled once for each structure, and found again
  by the function that `scan` returns: make it once, not at every call. What it
  takes from outside of its arguments and is no array of jax, a number above
  all, then keeps the value of the first call, as under `jit`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Layers(nnx.Module):
    ...   def __init__(self):
    ...     self.w = nnx.Param(jnp.array([1.0, 2.0, 3.0]))
    ...     self.calls = nnx.Variable(jnp.array(0))
    >>> axes = nnx.StateAxes({nnx.Param: 0, ...: nnx.Carry})
    >>> @nnx.scan(in_axes=(nnx.Carry, axes), out_axes=(nnx.Carry, 0))
    ... def forward(x, layers):
    ...   layers.calls.value += 1
    ...   return x * layers.w, x
    >>> layers = Layers()
    >>> y, xs = forward(jnp.array(1.0), layers)
    >>> print(y, xs, layers.calls.value)
    6.0 [1. 1. 2.] 3

  Args:
    f: the function; without it, `scan` is a decorator.
    length: the number of iterations, needed where nothing is scanned.
    reverse: whether to start with the last element.
    unroll: how many iterations to unroll in one, as in `jax.lax.scan`.
    _split_transpose: as in `jax.lax.scan`.
    in_axes: for each argument `nnx.Carry` (one of them), an axis, `None` for
      what is the same for all iterations, a `StateAxes`, or a pytree prefix of
      these; one entry may stand for all.
    out_axes: the same for the result, without `None`.
    transform_metadata: as in `nnx.vmap`, for the axes that are scanned.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    A function of the same arguments. The carry in its result is the last one;
    everything else is stacked.

  Raises:
    TypeError: if an axis is none, if an argument cannot be made positional, or
      if the carry changes its shape or dtype.
    ValueError: if axes do not fit, if the carry changes its structure or
      objects, or if state is made where it is not scanned.
  """
  mode = modes.resolve(graph, graph_updates)
  environment.check_flags(reverse=reverse, _split_transpose=_split_transpose)
  if f is None:
    return functools.partial(
      scan,
      length=length,
      reverse=reverse,
      unroll=unroll,
      _split_transpose=_split_transpose,
      in_axes=in_axes,
      out_axes=out_axes,
      transform_metadata=transform_metadata,
      **mode.arguments,
    )
  f = callables.function_of(f, "scan")
  policy = lift.Policy(mode, "scan")
  vmap_lib.check_axes(policy, in_axes, out_axes, _is_axis)
  carry_in = _carry_position("in_axes", in_axes)
  carry_out = _carry_position("out_axes", out_axes)
  _check_out_axes(out_axes)
  if (carry_in is None) != (carry_out is None):
    raise ValueError(
      "`nnx.Carry` must be both in `in_axes` and in `out_axes`, or in neither,"
      f" but got `in_axes={in_axes!r}` and `out_axes={out_axes!r}`."
    )

  def run(*args: Any, **owner: Any) -> Any:
    call = lift.Call(policy, f, args, owner)
    walk = prefix.Walk(call.structure, call.leaves, call.objects, _is_axis)
    for root in prefix.roots(
      in_axes, len(args), tuple(owner), is_entry=_is_axis, option="in_axes"
    ):
      walk.visit_root(root)
    loop = _Loop(call, walk, carry_in, carry_out, out_axes, transform_metadata)
    return loop.run(
      length=length,
      reverse=reverse,
      unroll=unroll,
      _split_transpose=_split_transpose,
    )

  kept = _Kept(functools.wraps(f)(run), in_axes)

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    args, owner = policy.bind(f, args, kwargs, in_axes)
    named = sorted(owner.keys() - callables.with_owner(f, {}).keys())
    if named:
      raise TypeError(
        "The arguments of a scanned function must be positional, but"
        f" {named} are not."
      )
    if in_axes is Carry and len(args) != 1:
      raise ValueError(
        "With `in_axes=nnx.Carry` the function must have one argument, but got"
        f" {len(args)}."
      )
    return kept(*args, **owner)

  return wrapper


_MOST_KEPT = 256  # structures: a layer's scan is that of all its instances


class _Captured(Exception):
  """A function has taken an array from outside of its arguments."""


class _Kept(jit_lib.Options):
  """A scan that outside of traces is compiled once for each structure.

  `jax.lax.scan` finds its compiled loop again by the function that it is given,
  and that is a new one at every call here: so the whole scan is a jitted
  function, which has all arrays as arguments. Where that would make a
  difference to the function scanned, the scan runs by itself: under a trace,
  where arguments are values that jit would trace and scan does not, where
  arrays come from outside, whose later values a compiled loop would not see,
  and where functions of jax have been replaced (`nnx.eager`).
  """

  def __init__(self, run: Callable[..., Any], in_axes: Any):
    nothing: frozenset[int | str] = frozenset()
    # What the scan gives back is its own affair: all of it is passed on.
    policy = lift.Policy(modes.Mode.GRAPH, "scan")
    super().__init__(policy, run, None, None, nothing, nothing, {})
    self.in_axes = in_axes
    self.captures = False
    self.entries = 0
    self.jitted: jit_lib.JitWrapped[..., Any] = jit_lib.JitWrapped(self)

  def __call__(self, /, *args: Any, **owner: Any) -> Any:
    if (
      self.captures
      or _CONFIG.jax_disable_jit
      or not jax_private.outside_of_traces()
      or not self.all_are_arrays(args, tuple(owner.values()))
      or not eager.functions_are_as_imported()
    ):
      return self.fun(*args, **owner)
    if self.entries > _MOST_KEPT:
      self.jitted, self.entries = jit_lib.JitWrapped(self), 0
    try:
      return self.jitted(*args, **owner)
    except _Captured:
      self.captures = True
    return self.fun(*args, **owner)

  def all_are_arrays(
    self, args: tuple[Any, ...], owner: tuple[Any, ...]
  ) -> bool:
    """Tells whether to trace all leaves is what a scan does, or nearly so.

    Numbers and NumPy's arrays that are the same for all iterations stay what
    they are.
    """
    structure, leaves, _ = _engine.flatten((*args, *owner), ())
    if all(isinstance(leaf, jax.Array) for leaf in leaves):
      return True
    axes = self.in_axes
    if not isinstance(axes, (tuple, list)):
      axes = (axes,) * len(args)
    whole = lift.leaves_of_roots(
      structure,
      (i for i, e in enumerate(axes) if e is Carry or isinstance(e, int)),
    )
    numbers = (jax.Array, np.ndarray, np.generic, int, float)
    return all(
      isinstance(leaf, numbers if i in whole else jax.Array)
      for i, leaf in enumerate(leaves)
    )

  def make_entry(self, structure, leaves, names, objects):
    self.entries += 1
    flat = jit_lib.Flat(self, structure, names)
    if any(isinstance(c, jax.Array) for c in flat.trace(leaves)[0].consts):
      raise _Captured
    traced = flat.split(list(range(len(leaves))), [])
    return _engine.JitEntry(
      (jax.jit(lambda leaves: traced(leaves, ())), None, None)
    )


class _Loop:
  """One scan: the leaves by what happens to them, and the body."""

  def __init__(
    self,
    call: lift.Call,
    walk: Any,
    carry_in: int | None,
    carry_out: Any,
    out_axes: Any,
    metadata: Any,
  ):
    self.call = call
    self.walk = walk
    self.carry_in = carry_in
    self.carry_out = carry_out
    self.out_root = prefix.Root(out_axes, "out_axes", "result")
    self.metadata = metadata
    entries = list(enumerate(walk.entries))
    self.scanned = [i for i, e in entries if e is not None and e is not Carry]
    self.carried = [
      i for i, e in entries if e is Carry and lift.is_array(call.leaves[i])
    ]
    self.plain: list[int] = []  # leaves of the carry that are those returned
    if carry_in is not None:
      self.plain = carry_lib.returned_leaves(
        call, walk, lift.leaves_of_roots(call.structure, (carry_in,))
      )
    # Streams of random numbers that all iterations start from in one state.
    self.broadcast: list[int] = []
    self.traced: Any = None  # the plan, and the entry of each output
    self.jaxpr: Any = None  # of `step`, and the leaves that are its inputs

  def run(self, *, length: int | None, **options: Any) -> Any:
    """Runs the loop."""
    call = self.call
    vmap_lib.check_sizes(self.walk, length, _is_index)
    xs = tuple(
      leaf if axis == 0 else jnp.moveaxis(leaf, axis, 0)
      for leaf, axis in (
        (call.leaves[i], self.walk.entries[i]) for i in self.scanned
      )
    )
    self.find_late(xs)
    body = call.described(
      lambda *args: self.body(*args), "scan", [*self.carried, *self.scanned]
    )
    final, ys = call.framed(
      functools.partial(jax.lax.scan, length=length, **options),
      body,
      call.pick(self.carried),
      xs,
    )
    plan, entries = self.traced
    last = dict(zip(self.carried, final))
    stacked = iter(ys)
    outputs = [
      _moved(next(stacked), entry) if _is_index(entry) else None
      for entry in entries
    ]
    for leaf, output in enumerate(plan.output_of):
      if output >= 0 and outputs[output] is None:
        outputs[output] = last[self.carried_leaf(plan, leaf)]
    return call.apply_outputs(plan, outputs)

  def carried_leaf(self, plan: Any, leaf: int) -> int:
    """Returns the argument's leaf whose last value a leaf of the plan has."""
    if leaf < len(plan.matches):
      return plan.matches[leaf]
    return self.plain[leaf - self.first_carry_leaf(plan)]

  def first_carry_leaf(self, plan: Any) -> int:
    """Returns the first leaf of the carry in the result."""
    records = plan.structure._records
    position = outcomes.result_position(plan)
    first = len(plan.matches)
    if self.out_root.entry is not Carry:
      position += 1
      for _ in range(self.carry_out or 0):
        end = preorder.subtree_end(records, position)
        first += len(preorder.leaves(records, position, end))
        position = end
    return first

  def body(self, carry_leaves: Sequence[Any], xs: Sequence[Any]) -> Any:
    """Runs one iteration on the leaves."""
    call, walk = self.call, self.walk
    leaves = call.with_leaves(
      [*self.carried, *self.scanned, *self.broadcast],
      [*carry_leaves, *xs, *call.pick(self.broadcast)],
    )
    outputs = self.step(leaves)
    plan, entries = self.traced
    first = self.first_carry_leaf(plan) if self.carry_in is not None else 0
    new = carry_lib.next_values(
      self.carried, leaves, plan, outputs, self.plain, first
    )
    for leaf, old, value in zip(self.carried, carry_leaves, new):
      carry_lib.check_type(old, value, "scan", walk.places[leaf].text)
    ys = [output for output, entry in zip(outputs, entries) if _is_index(entry)]
    return tuple(new), tuple(ys)

  def step(self, leaves: tuple[Any, ...]) -> Sequence[Any]:
    """Runs the function once; what it did is in `traced`."""
    if self.jaxpr is not None:
      jaxpr, inputs = self.jaxpr
      return lift.run_jaxpr(jaxpr, *(leaves[i] for i in inputs))
    call, walk = self.call, self.walk
    values, objects = call.lifted.open(leaves)
    before = None
    if self.carry_in is not None:
      before = carry_lib.Opened(values[self.carry_in])
    if self.metadata and spmd.PARTITION_NAME in self.metadata:
      mapped.remove_axes(walk, objects, self.metadata)
      result = call.lifted.call(values)
      policy, metadata = call.lifted.policy, self.metadata
      mapped.add_axes(policy, walk, objects, result, self.out_root, metadata)
    else:
      result = call.lifted.call(values)
    if before is not None:
      after = carry_lib.Opened(self.carry_of(result))
      where = f"args[{self.carry_in}]"
      carry_lib.check_same(call.lifted.policy, before, after, where)
    new = None
    if call.lifted.policy.mode.updates:
      call.lifted.check_new(objects, result)
    else:
      result, new = self.apart(result)
    packed = call.lifted.pack(objects, leaves, result, new)
    entries = mapped.output_entries(
      packed.plan, packed.outputs, walk, self.out_root
    )
    self.check_state(packed.plan, entries)
    self.traced = packed.plan, entries
    return packed.outputs

  def find_late(self, xs: Sequence[Any]) -> None:
    """Finds out which state is written that is not marked as carried.

    Such state must be known before the loop is traced, so the function is
    traced here, and the loop is made of the jaxpr.
    """
    call = self.call
    unmarked = [
      leaf
      for leaf, entry in enumerate(self.walk.entries)
      if entry is None
      and self.walk.places[leaf].top >= 0
      and lift.is_array(call.leaves[leaf])
    ]
    if not unmarked:
      return
    inputs = [*self.carried, *self.scanned, *unmarked]
    slices = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]

    def flat(*values):
      return tuple(self.step(call.with_leaves(inputs, values)))

    call.described(flat, "scan", inputs)
    jaxpr = call.framed(
      jax.make_jaxpr(flat),
      *call.pick(self.carried),
      *slices,
      *call.pick(unmarked),
    )
    self.jaxpr = jaxpr, inputs
    plan, _ = self.traced
    late = outcomes.written(plan).keys() & set(unmarked)
    self.carried = sorted({*self.carried, *late})
    variables = {leaf: self.walk.places[leaf].variable for leaf in late}
    if not call.lifted.policy.mode.updates:
      return  # There streams are carried as all else.
    self.broadcast = [
      leaf
      for leaf, variable in sorted(variables.items())
      if variable >= 0 and isinstance(call.objects[variable], rnglib.RngState)
    ]

  def carry_of(self, result: Any) -> Any:
    """Returns the carry in the function's result."""
    out_axes = self.out_root.entry
    if out_axes is Carry:
      return result
    if not isinstance(result, (tuple, list)) or len(result) != len(out_axes):
      given = f"a `{type(result).__name__}`"
      if isinstance(result, (tuple, list)):
        given += f" of {len(result)}"
      raise ValueError(
        f"`{callables.name_of(self.call.lifted.fun)}` must return a tuple of"
        f" {len(out_axes)}, one for each entry of `out_axes`, but it returned"
        f" {given}."
      )
    return result[self.carry_out]

  def apart(self, result: Any) -> tuple[Any, Any]:
    """Returns a result whose carry shares no object with the rest; the rest."""
    if self.carry_in is None:
      return result, result
    if self.out_root.entry is Carry:
      return result, ()
    parts, at = list(result), self.carry_out
    rest = _engine.clone((*parts[:at], None, *parts[at + 1 :]), False)
    return (*rest[:at], parts[at], *rest[at + 1 :]), rest

  def check_state(self, plan: Any, entries: Sequence[Any]) -> None:
    """Refuses new state that is not scanned."""
    for match, output in zip(plan.matches, plan.output_of):
      if match >= 0 or output < 0 or _is_index(entries[output]):
        continue
      paths = mapped.output_paths(plan, self.walk, self.out_root)
      raise ValueError(
        "State that a scanned function makes must be scanned, but"
        f" `{paths[output]}` is made inside and has the axis"
        f" {'nnx.Carry' if entries[output] is Carry else None}. Make it"
        " before the loop, or give it an axis with `nnx.StateAxes`."
      )


def _is_index(entry: Any) -> bool:
  return entry is not None and entry is not Carry


def _moved(stacked: Any, axis: int) -> Any:
  return stacked if axis == 0 else jnp.moveaxis(stacked, 0, axis)
