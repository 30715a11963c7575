"""What `nnx.jit` compiles: one flat function for each structure.

`Options` is what the user asked for, and makes the flat functions; `Flat` is
one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import inspect
from typing import Any

import jax
from jax import core
import numpy as np

from nnx.engine import _engine, jax_private, preorder
from nnx.transforms import (
  callables,
  in_place_programs,
  lift,
  mapped,
  places,
  prefix,
)

_CONFIG: Any = jax.config  # whose options have no types

_TRACEABLE = (
  jax.Array,
  jax.ShapeDtypeStruct,
  np.ndarray,
  np.generic,
  bool,
  int,
  float,
  complex,
)


def _is_sharding(value: Any) -> bool:
  return value is None or isinstance(
    value, (jax.sharding.Sharding, jax.sharding.PartitionSpec)
  )


def _lies_anywhere(leaf: Any) -> bool:
  """Tells whether an array is on one of several devices, and need not be."""
  if isinstance(leaf, core.Tracer):
    return places.is_noting_places()
  return (
    isinstance(leaf, jax.Array)
    and not leaf.committed
    and len(leaf.sharding.device_set) == 1
    and jax.device_count() > 1
    and not _CONFIG.jax_disable_jit
  )


def as_tuple(value: Any, item: type) -> tuple[Any, ...]:
  """Makes a tuple of None, one item or several."""
  if value is None:
    return ()
  return (value,) if isinstance(value, item) else tuple(value)


def argument_keys(
  fun: Callable[..., Any], nums: Any, names: Any, option: str
) -> frozenset[int | str]:
  """Returns the arguments meant, by position and by name where it can."""
  positions = list(as_tuple(nums, int))
  keywords = list(as_tuple(names, str))
  if not positions and not keywords:
    return frozenset()
  try:
    parameters = list(inspect.signature(fun).parameters.values())
  except (TypeError, ValueError):
    return frozenset((*positions, *keywords))
  positional = [
    p
    for p in parameters
    if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
  ]
  variadic = any(p.kind == p.VAR_POSITIONAL for p in parameters)
  free = any(p.kind == p.VAR_KEYWORD for p in parameters)
  result: set[int | str] = set()
  for position in positions:
    at = position + len(positional) if position < 0 else position
    if at < 0 or (at >= len(positional) and not variadic):
      raise ValueError(
        f"`{option}argnums` must name positional parameters of"
        f" `{callables.name_of(fun)}`, which has {len(positional)}, but got"
        f" {position}."
      )
    result.add(at)
    if at < len(positional):
      if positional[at].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD:
        result.add(positional[at].name)
  by_name = {p.name: p for p in parameters}
  for name in keywords:
    if name not in by_name and not free:
      raise ValueError(
        f"`{option}argnames` must name parameters of"
        f" `{callables.name_of(fun)}`, which are {list(by_name)}, but got"
        f" `{name}`."
      )
    result.add(name)
    if name in by_name and by_name[name] in positional:
      result.add(positional.index(by_name[name]))
  return frozenset(result)


class Options:
  """What a jitted function was asked to do, and how its parts are made."""

  def __init__(
    self,
    policy: lift.Policy,
    fun: Callable[..., Any],
    in_shardings: Any,
    out_shardings: Any,
    statics: frozenset[int | str],
    donated: frozenset[int | str],
    jit_options: Mapping[str, Any],
  ):
    both = sorted(map(str, statics & donated))
    if both:
      raise ValueError(
        "An argument must be static or donated, not both, but got"
        f" {', '.join(both)}."
      )
    prefix.check(policy, "in_shardings", in_shardings)
    prefix.check(policy, "out_shardings", out_shardings)
    prefix.check_form("in_shardings", in_shardings, _is_sharding)
    self.policy = policy
    self.fun = fun
    self.in_shardings = in_shardings
    self.out_shardings = out_shardings
    self.statics = statics
    self.donated = donated
    self.jit_options = jit_options

  def make_entry(
    self,
    structure: Any,
    leaves: tuple,
    names: tuple[str, ...],
    objects: tuple,
  ):
    """Makes the function for one structure; also the leaves that it donates."""
    self.check_leaves(structure, leaves, names)
    shardings = None
    if self.in_shardings is not None:
      shardings = self.input_walk(structure, leaves, names).entries
      places.place_variables(structure, objects, shardings)
    flat = Flat(self, structure, names)
    if self.statics:
      lift.check_statics(flat)
    donated = self.donated_leaves(structure, leaves, names, flat)
    options = dict(self.jit_options)
    program = None
    if not donated:
      if shardings is not None:
        options["in_shardings"] = (tuple(shardings),)
      compiled = jax.jit(flat, **options)
      args: tuple[tuple[Any, ...], ...] = (leaves,)
      if not self.donated and not self.is_placed:
        program = in_place_programs.make(flat, compiled, leaves, options)
    else:
      kept = sorted(set(range(len(leaves))).difference(donated))
      if shardings is not None:
        options["in_shardings"] = (
          tuple(shardings[i] for i in kept),
          tuple(shardings[i] for i in donated),
        )
      split = flat.split(kept, donated)
      compiled = jax.jit(split, donate_argnums=1, **options)
      args = (
        tuple(leaves[i] for i in kept),
        tuple(leaves[i] for i in donated),
      )
    if shardings is None and any(map(_lies_anywhere, leaves)):
      compiled.trace(*args)  # jax keeps it for the call
      places.place_variables(
        structure,
        objects,
        [
          flat.places.get(i) if _lies_anywhere(leaf) else None
          for i, leaf in enumerate(leaves)
        ],
      )
    if program is not None:
      return _engine.JitEntry((compiled, program.donated, program.function))
    return _engine.JitEntry((compiled, donated or None, None))

  @property
  def is_placed(self) -> bool:
    """Whether it was said where arguments or results are to be."""
    return (
      self.in_shardings is not None
      or self.out_shardings is not None
      or bool(self.jit_options.keys() & {"device", "backend"})
    )

  def check_leaves(self, structure, leaves, names) -> None:
    """Refuses what cannot be traced, with the path to it."""
    for number, leaf in enumerate(leaves):
      if isinstance(leaf, _TRACEABLE):
        continue
      try:
        jax.typeof(leaf)
      except TypeError:
        lifted = lift.Lifted(self.fun, structure, names, self.policy)
        path = lifted.leaf_names([number])[0]
        raise TypeError(
          "Arguments of a jitted function must be arrays, numbers or static,"
          f" but `{path}` is {leaf!r} of type {type(leaf).__name__}. Name the"
          " argument in `static_argnames`, or keep the value in an attribute"
          " of a Module."
        ) from None

  def root_keys(self, structure: Any, names: tuple[str, ...]) -> list[Any]:
    """Returns the position or name of each root."""
    count = structure._num_roots - len(names)
    return [*range(count), *names]

  def input_walk(self, structure, leaves, names) -> prefix.Walk:
    """Walks over the arguments, with the sharding that is asked for a leaf."""
    keys = self.root_keys(structure, names)
    count = structure._num_roots - len(names)
    entry = self.in_shardings
    if prefix.check_form("in_shardings", entry, _is_sharding):
      entries = [entry] * count
    else:
      entries = list(entry)
      dynamic = [key for key in keys[:count] if key not in self.statics]
      if len(entries) == len(dynamic) != count:
        # As in jax: static arguments have no sharding.
        by_key = dict(zip(dynamic, entries))
        entries = [by_key.get(key) for key in keys[:count]]
      if len(entries) != count:
        raise ValueError(
          "`in_shardings` must have one entry for each positional argument,"
          f" but it has {len(entries)} for {count}."
        )
    objects = _engine.unflatten(structure, tuple(leaves)).objects
    walk = prefix.Walk(structure, leaves, objects, _is_sharding)
    for i, entry in enumerate(entries):
      walk.visit_root(prefix.Root(entry, "in_shardings", f"args[{i}]"))
    for name in names:
      walk.visit_root(prefix.Root(None, "in_shardings", name))
    return walk

  def donated_leaves(self, structure, leaves, names, flat) -> list[int]:
    """Returns what may be donated: plain arrays, and what is written.

    Under an argument that is a graph, only the Variables that the function
    writes are given up; those that it only reads stay as they are.
    """
    if not self.donated:
      return []
    asked, plain = [], set()
    records = structure._records
    keys = self.root_keys(structure, names)
    for key, (start, end) in zip(keys, preorder.roots(structure)):
      if key not in self.donated:
        continue
      node_end = start  # of the outermost graph node around, or before it
      for i in range(start, end):
        record = records[i]
        if preorder.is_graph_node(record) and i >= node_end:
          node_end = preorder.subtree_end(records, i)
        if record.leaf >= 0:
          asked.append(record.leaf)
          if i >= node_end:
            plain.add(record.leaf)
    if not asked:
      return []
    _, plan = flat.trace(leaves)
    unchanged = {
      match for match, output in zip(plan.matches, plan.output_of) if output < 0
    }
    return [i for i in asked if i in plain or i not in unchanged]


class Flat(lift.Lifted):
  """A lifted function with what jit adds: shardings of results, donation."""

  __slots__ = ("options", "places", "_traced")

  def __init__(self, options: Options, structure, names):
    super().__init__(options.fun, structure, names, options.policy)
    self.options = options
    # Where transforms inside want leaves to lie, once it has been traced.
    self.places: dict[int, Any] = {}
    self._traced: tuple[Any, Any] | None = None

  @property
  def __name__(self) -> str:
    return getattr(self.fun, "__name__", type(self.fun).__name__)

  @property
  def __fun_debug_info__(self) -> Any:
    return self.debug_info("jit", range(self.structure.num_leaves))

  def __call__(
    self, leaves: tuple, donated: frozenset[int] = frozenset()
  ) -> Any:
    values, objects = self.open(leaves)
    with places.noting_places(leaves) as self.places:
      # In a frame of its own: jax may trace after the call, and by itself.
      result = _engine.framed(self.structure, objects, self.call, values)
    if self.policy.mode.updates:
      self.check_new(objects, result)
    # Every donated leaf comes back as an output.
    packed = self.pack(objects, leaves, result, written=donated)
    return self.constrain(packed, leaves)

  def trace(self, leaves: tuple) -> tuple[Any, Any]:
    """Traces once ahead of compilation, which `split` need not do again.

    Returns:
      The closed jaxpr, and the plan of what the function does.
    """
    jaxpr, packed = jax.make_jaxpr(self, return_shape=True)(leaves)
    self._traced = traced = jaxpr, packed.plan
    return traced

  def split(self, kept: list[int], donated: list[int]) -> Callable[..., Any]:
    """Returns the function of the kept leaves and of the donated ones."""
    total = len(kept) + len(donated)

    def split(kept_leaves: tuple, donated_leaves: tuple) -> Any:
      leaves: list[Any] = [None] * total
      for i, leaf in zip((*kept, *donated), (*kept_leaves, *donated_leaves)):
        leaves[i] = leaf
      traced, self._traced = self._traced, None
      if traced is not None:
        jaxpr, plan = traced
        if list(jaxpr.in_avals) == [jax.typeof(leaf) for leaf in leaves]:
          outputs = lift.run_jaxpr(jaxpr, *leaves)
          return _engine.packed_unflatten(plan, tuple(outputs))
      return self(tuple(leaves), frozenset(donated))

    split.__name__ = split.__qualname__ = self.__name__
    info = self.debug_info("jit", [*kept, *donated])
    setattr(split, jax_private.DEBUG_INFO, info)
    return split

  def constrain(self, packed: Any, leaves: tuple) -> Any:
    """Places the outputs: state where its argument lies, results where asked.

    State that the function makes lies where the option for the arguments says
    of its place.
    """
    options = self.options
    if options.in_shardings is None and options.out_shardings is None:
      return packed
    walk = options.input_walk(self.structure, leaves, self.names)
    root = prefix.Root(options.out_shardings, "out_shardings", "result")
    wanted = mapped.output_entries(packed.plan, packed.outputs, walk, root)
    outputs = tuple(
      output
      if sharding is None
      else jax.lax.with_sharding_constraint(output, sharding)
      for output, sharding in zip(packed.outputs, wanted)
    )
    return _engine.packed_unflatten(packed.plan, outputs)
