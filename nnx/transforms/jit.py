"""jit and jit_partial: compiled by graph structure, checked by the engine.

The first call with a new structure makes one flat function for it and hands
that to `jax.jit`. A repeated call does not come to Python: the engine checks
that the arguments still have the structure, passes their arrays to the flat
function, and writes back what the function wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nnx.engine import _engine, jax_private, preorder
from nnx.transforms import lift, prefix


class StateSharding(prefix.FilterMap):
  """Shardings for the Variables of a graph, by filter.

  Example:

    >>> import nnx
    >>> from jax.sharding import PartitionSpec as P
    >>> nnx.StateSharding({nnx.Param: P("model"), ...: P()}).filters
    (<class 'nnx.variablelib.Param'>, Ellipsis)

  Args:
    entries: a mapping from filters to shardings (`NamedSharding`,
      `PartitionSpec`, None), or pairs of them, or a State of shardings.
  """

  @property
  def shardings(self) -> tuple[Any, ...]:
    """The shardings, in the order of the filters."""
    return self.entries


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


def _as_tuple(value: Any, item: type) -> tuple[Any, ...]:
  if value is None:
    return ()
  return (value,) if isinstance(value, item) else tuple(value)


def _positions(
  fun: Callable[..., Any], nums: Any, names: Any, option: str
) -> frozenset[int | str]:
  """The arguments meant, by position and by name wherever both are possible."""
  positions = list(_as_tuple(nums, int))
  keywords = list(_as_tuple(names, str))
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
        f" `{_name_of(fun)}`, which has {len(positional)}, but got {position}."
      )
    result.add(at)
    if at < len(positional):
      if positional[at].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD:
        result.add(positional[at].name)
  by_name = {p.name: p for p in parameters}
  for name in keywords:
    if name not in by_name and not free:
      raise ValueError(
        f"`{option}argnames` must name parameters of `{_name_of(fun)}`, which"
        f" are {list(by_name)}, but got `{name}`."
      )
    result.add(name)
    if name in by_name and by_name[name] in positional:
      result.add(positional.index(by_name[name]))
  return frozenset(result)


def _name_of(fun: Callable[..., Any]) -> str:
  return getattr(fun, "__qualname__", None) or type(fun).__name__


class Options:
  """What a jitted function was asked to do, and how its parts are made."""

  def __init__(
    self,
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
    """The compiled function for one structure, and the leaves it donates."""
    self.check_leaves(structure, leaves, names)
    shardings = self.input_shardings(structure, leaves, names)
    if shardings is not None:
      lift.place_variables(structure, objects, shardings)
    flat = Flat(self, structure, names, shardings)
    donated = self.donated_leaves(structure, leaves, names, flat)
    options = dict(self.jit_options)
    if not donated:
      if shardings is not None:
        options["in_shardings"] = (tuple(shardings),)
      return jax.jit(flat, **options), None
    kept = [i for i in range(len(leaves)) if i not in set(donated)]
    if shardings is not None:
      options["in_shardings"] = (
        tuple(shardings[i] for i in kept),
        tuple(shardings[i] for i in donated),
      )
    split = flat.split(kept, donated)
    return jax.jit(split, donate_argnums=1, **options), donated

  def check_leaves(self, structure, leaves, names) -> None:
    """Refuses what cannot be traced, with the path to it."""
    for number, leaf in enumerate(leaves):
      if isinstance(leaf, _TRACEABLE):
        continue
      try:
        jax.typeof(leaf)
      except TypeError:
        lifted = lift.Lifted(self.fun, structure, names)
        path = lifted.leaf_names([number])[0]
        raise TypeError(
          "Arguments of a jitted function must be arrays, numbers or static,"
          f" but `{path}` is {leaf!r} of type {type(leaf).__name__}. Name the"
          " argument in `static_argnames`, or keep the value in an attribute"
          " of a Module."
        ) from None

  def root_keys(self, structure: Any, names: tuple[str, ...]) -> list[Any]:
    """The position or name of each root."""
    count = structure._num_roots - len(names)
    return [*range(count), *names]

  def input_shardings(self, structure, leaves, names) -> list[Any] | None:
    """The sharding of each leaf, or None where nothing was asked."""
    if self.in_shardings is None:
      return None
    keys = self.root_keys(structure, names)
    count = structure._num_roots - len(names)
    entry = self.in_shardings
    if _is_sharding(entry) or isinstance(entry, prefix.FilterMap):
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
    return prefix.broadcast(
      structure,
      leaves,
      [*entries, *[None] * len(names)],
      is_entry=_is_sharding,
      option="in_shardings",
    )

  def donated_leaves(self, structure, leaves, names, flat) -> list[int]:
    """The leaves that may be donated: plain arrays, and what is written.

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
        kind, index, leaf = records[i][:3]
        if index >= 0 and kind != "ref" and i >= node_end:
          node_end = preorder.subtree_end(records, i)
        if leaf >= 0:
          asked.append(leaf)
          if i >= node_end:
            plain.add(leaf)
    if not asked:
      return []
    _, plan = flat.trace(leaves)
    unchanged = {~source for source in plan.sources if source < 0}
    return [i for i in asked if i in plain or i not in unchanged]


class Flat(lift.Lifted):
  """A lifted function with what jit adds: shardings of results, donation."""

  __slots__ = ("options", "shardings", "_traced")

  def __init__(self, options: Options, structure, names, shardings):
    super().__init__(options.fun, structure, names)
    self.options = options
    self.shardings = shardings
    self._traced = None

  @property
  def __name__(self) -> str:
    return getattr(self.fun, "__name__", type(self.fun).__name__)

  @property
  def __fun_debug_info__(self) -> Any:
    return self.debug_info("jit", range(self.structure.num_leaves))

  def __call__(
    self, leaves: tuple, donated: frozenset[int] = frozenset()
  ) -> Any:
    values, objects = _engine.unflatten(self.structure, leaves)
    result = self.call(values)
    if donated:
      # No value is identical to these, so that every donated leaf counts as
      # written and comes back as an output.
      leaves = tuple(
        None if i in donated else leaf for i, leaf in enumerate(leaves)
      )
    packed = _engine.pack(self.structure, objects, leaves, result)
    return self.constrain(packed)

  def trace(self, leaves: tuple) -> tuple[Any, Any]:
    """Traces once ahead of compilation, which `split` need not do again.

    Returns:
      The closed jaxpr, and the plan of what the function does.
    """
    jaxpr, packed = jax.make_jaxpr(self, return_shape=True)(leaves)
    self._traced = traced = jaxpr, packed.plan
    return traced

  def split(self, kept: list[int], donated: list[int]) -> Callable[..., Any]:
    """The function of the leaves that are kept and those that are donated."""
    total = len(kept) + len(donated)

    def split(kept_leaves, donated_leaves):
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

  def constrain(self, packed: Any) -> Any:
    """Places the outputs: state where it came from, results where asked."""
    if self.shardings is None and self.options.out_shardings is None:
      return packed
    plan, outputs = packed.plan, list(packed.outputs)
    filled = [None if s < 0 else outputs[s] for s in plan.sources]
    wanted: list[Any] = [None] * len(filled)
    roots = plan.structure._num_roots
    if self.options.out_shardings is not None:
      wanted = prefix.broadcast(
        plan.structure,
        filled,
        [self.options.out_shardings],
        is_entry=_is_sharding,
        option="out_shardings",
        first_root=roots - 1,
      )
    if self.shardings is not None:
      sharding_of = {
        index: self.shardings[leaf]
        for kind, index, leaf, *_ in self.structure._records
        if kind == "variable" and leaf >= 0
      }
      for kind, index, leaf, *_ in plan.structure._records:
        if kind == "variable" and leaf >= 0 and plan.origin[index] >= 0:
          wanted[leaf] = sharding_of.get(plan.origin[index])
    for leaf, sharding in enumerate(wanted):
      source = plan.sources[leaf]
      if source >= 0 and sharding is not None:
        outputs[source] = jax.lax.with_sharding_constraint(
          outputs[source], sharding
        )
    return _engine.packed_unflatten(plan, tuple(outputs))


class Lowered:
  """A jitted function lowered for some arguments, not yet compiled.

  Attributes that are not here are those of jax's `Lowered`.
  """

  def __init__(self, lowered: Any, make_call: Callable[..., Any]):
    self.lowered = lowered
    self.call = make_call

  def compile(
    self, compiler_options: Mapping[str, Any] | None = None
  ) -> Compiled:
    """Compiles; see `Compiled`."""
    return Compiled(self.lowered.compile(compiler_options), self.call)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.lowered, name)


class Compiled:
  """A compiled function: called like the original, for one structure only.

  Attributes that are not here are those of jax's `Compiled`.
  """

  def __init__(self, compiled: Any, make_call: Callable[..., Any]):
    self.compiled = compiled
    self._make_call = make_call

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._make_call(self.compiled, args, kwargs)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.compiled, name)


class JitWrapped(_engine.JitFunction):
  """A function compiled by `nnx.jit`; see there.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> double = nnx.jit(lambda x: 2 * x)
    >>> double.eval_shape(jnp.ones(3))
    ShapeDtypeStruct(shape=(3,), dtype=float32)
  """

  def __init__(self, options: Options):
    super().__init__(options.make_entry, jnp.copy, options.statics)
    self.options = options
    functools.update_wrapper(self, options.fun)
    jax_private.register_cache(self, "nnx.jit")

  # What programs of Flax ask for: there a jitted function of jax is inside.

  @property
  def jitted_fn(self) -> JitWrapped:
    """What is compiled, with `_cache_size` and the like: the function itself.

    Example:

      >>> import nnx
      >>> double = nnx.jit(lambda x: 2 * x)
      >>> double(1.0), double.jitted_fn._cache_size()
      (Array(2., dtype=float32, weak_type=True), 1)
    """
    return self

  @property
  def fun(self) -> Callable[..., Any]:
    """The function that was given to `nnx.jit`."""
    return self.options.fun

  def _roots(self, args: tuple, kwargs: Mapping[str, Any]):
    """The structure, leaves and objects of a call."""
    names = sorted(kwargs)
    static = [
      key in self.options.statics for key in (*range(len(args)), *names)
    ]
    values = (*args, *(kwargs[name] for name in names))
    return _engine.flatten(values, tuple(static))

  def lower(self, *args: Any, **kwargs: Any) -> Lowered:
    """Lowers the function for arguments, which may be abstract.

    Example:

      >>> import jax, nnx
      >>> double = nnx.jit(lambda x: 2 * x)
      >>> lowered = double.lower(jax.ShapeDtypeStruct((3,), "float32"))
      >>> "stablehlo.multiply" in lowered.as_text()
      True

    Returns:
      A `Lowered`, with `compile()`.
    """
    compiled, flat_args, donated = self._prepare(*args, **kwargs)
    structure = self._roots(args, kwargs)[0]

    def call(run, args, kwargs):
      given, leaves, objects = self._roots(args, kwargs)
      if given != structure:
        raise ValueError(
          "A compiled function must be called with arguments of the structure"
          " that it was lowered for: their Modules, static attributes or"
          " containers differ. Call the jitted function itself instead."
        )
      packed = run(*_partition(leaves, donated))
      return _engine.apply(packed, objects, leaves)

    return Lowered(compiled.lower(*flat_args), call)

  def trace(self, *args: Any, **kwargs: Any) -> Any:
    """Traces the function: jax's `Traced` of the flat function.

    Example:

      >>> import jax.numpy as jnp
      >>> import nnx
      >>> nnx.jit(lambda x: 2 * x).trace(jnp.ones(3)).jaxpr.in_avals
      [ShapedArray(float32[3])]
    """
    compiled, flat_args, _ = self._prepare(*args, **kwargs)
    return compiled.trace(*flat_args)

  def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
    """The result with shapes in place of arrays; nothing is computed."""
    compiled, flat_args, _ = self._prepare(*args, **kwargs)
    structure, leaves, _ = self._roots(args, kwargs)
    packed = compiled.eval_shape(*flat_args)
    # Applied to copies: the arguments stay as they are.
    objects = _engine.unflatten(structure, leaves)[1]
    return _engine.apply(packed, objects, leaves)


def _partition(leaves: tuple, donated: tuple[int, ...]) -> tuple[tuple, ...]:
  """Leaves as the arguments of the compiled function."""
  if not donated:
    return (leaves,)
  gone = frozenset(donated)
  kept = tuple(leaf for i, leaf in enumerate(leaves) if i not in gone)
  return kept, tuple(leaves[i] for i in donated)


class JitPartial:
  """A jitted function with its first arguments given; see `nnx.jit_partial`."""

  def __init__(self, jitted: JitWrapped, args: tuple[Any, ...]):
    self.jitted = jitted
    self.args = args
    functools.update_wrapper(self, jitted)

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self.jitted(*self.args, *args, **kwargs)

  def lower(self, *args: Any, **kwargs: Any) -> Lowered:
    """As `JitWrapped.lower`, for the remaining arguments.

    So are the arguments of the compiled function.
    """
    lowered = self.jitted.lower(*self.args, *args, **kwargs)

    def call(run, args, kwargs):
      return lowered.call(run, (*self.args, *args), kwargs)

    return Lowered(lowered.lowered, call)

  def trace(self, *args: Any, **kwargs: Any) -> Any:
    """As `JitWrapped.trace`, for the remaining arguments."""
    return self.jitted.trace(*self.args, *args, **kwargs)

  def clear_cache(self) -> None:
    """As `JitWrapped.clear_cache`."""
    self.jitted.clear_cache()

  def _cache_size(self) -> int:
    return self.jitted._cache_size()

  def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
    """As `JitWrapped.eval_shape`, for the remaining arguments."""
    return self.jitted.eval_shape(*self.args, *args, **kwargs)


def jit(
  fun: Callable[..., Any] | None = None,
  *,
  in_shardings: Any = None,
  out_shardings: Any = None,
  static_argnums: int | Sequence[int] | None = None,
  static_argnames: str | Iterable[str] | None = None,
  donate_argnums: int | Sequence[int] | None = None,
  donate_argnames: str | Iterable[str] | None = None,
  keep_unused: bool = False,
  device: Any = None,
  backend: str | None = None,
  inline: bool = False,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Compiles a function of Modules, Variables and arrays with XLA.

  As `jax.jit`, but arguments and results may hold Modules and Variables, and
  what the function does to them is done to the caller's: values written,
  attributes and Variables added, changed and removed. References that the
  arguments share are shared inside.

  The function is compiled again for a new structure: other classes, attribute
  names, static attributes, metadata or sharing. A repeated call costs little
  more than that of `jax.jit` on the arrays alone. The 256 structures used last
  are kept, until `clear_cache()` or `jax.clear_caches()`. Static values are
  equal if their types are, too: 1, 1.0 and True differ, and so do 0.0 and -0.0.
  One without a hash is compared by what it holds; one with a hash must not
  change.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Counter(nnx.Module):
    ...   def __init__(self):
    ...     self.count = nnx.Variable(jnp.zeros((), "int32"))
    >>> @nnx.jit
    ... def increment(counter, by):
    ...   counter.count[...] += by
    ...   return 2 * counter.count
    >>> counter = Counter()
    >>> increment(counter, 3)
    Array(6, dtype=int32)
    >>> counter.count.value
    Array(3, dtype=int32)

  Args:
    fun: the function; without it, `jit` is a decorator with options. A
      Module, or a method bound to one, is compiled with the Module as an
      argument.
    in_shardings: for each positional argument a sharding, a pytree prefix of
      shardings, or a `StateSharding`. State that is written keeps the sharding
      of the argument it belongs to; Variables of the first call that are only
      read are placed so as well, and need not be moved again.
    out_shardings: the same for the result.
    static_argnums: positions of arguments that are part of the structure.
    static_argnames: their names; positions and names imply each other.
    donate_argnums: positions of arguments whose buffers may be reused. Arrays
      are given up; of a Module only the Variables that the function writes, so
      nothing that is still in use is lost. Where two of them hold the same
      array, one is copied.
    donate_argnames: their names; positions and names imply each other.
    keep_unused: whether to pass arguments that the function does not use.
    device: as in `jax.jit`, where it is deprecated.
    backend: as in `jax.jit`, where it is deprecated.
    inline: whether to inline the function into an outer trace.
    graph: accepted for programs that set it; graphs and trees are one here.
    graph_updates: accepted likewise; changes of structure are always passed on.

  Returns:
    A `JitWrapped`, with `lower`, `trace`, `eval_shape` and `clear_cache`.

  Raises:
    TypeError: if a static argument is not hashable.
    ValueError: if an option does not fit the function or its arguments.
    TraceContextError: if the function changes a Module or Variable that it was
      not given.
  """
  del graph, graph_updates
  if fun is None:
    return functools.partial(
      jit,
      in_shardings=in_shardings,
      out_shardings=out_shardings,
      static_argnums=static_argnums,
      static_argnames=static_argnames,
      donate_argnums=donate_argnums,
      donate_argnames=donate_argnames,
      keep_unused=keep_unused,
      device=device,
      backend=backend,
      inline=inline,
    )
  lift.refuse_foreign(fun, "jit")
  if not callable(fun):
    raise TypeError(
      f"`fun` must be callable, but got {fun!r} of type {type(fun).__name__}."
    )
  jit_options = {"keep_unused": keep_unused, "inline": inline}
  if device is not None:
    jit_options["device"] = device
  if backend is not None:
    jit_options["backend"] = backend
  method = lift.method_of(fun)
  if method is not None:
    fun = method.function
    static_argnums = _shifted(static_argnums)
    donate_argnums = _shifted(donate_argnums)
    if isinstance(in_shardings, (tuple, list)):
      in_shardings = (None, *in_shardings)
  options = Options(
    fun,
    in_shardings,
    out_shardings,
    _positions(fun, static_argnums, static_argnames, "static_"),
    _positions(fun, donate_argnums, donate_argnames, "donate_"),
    jit_options,
  )
  wrapped = JitWrapped(options)
  return wrapped if method is None else JitPartial(wrapped, (method.owner,))


def _shifted(nums: int | Sequence[int] | None) -> tuple[int, ...]:
  """Positions of a bound method's arguments as those of the function."""
  return tuple(n + 1 if n >= 0 else n for n in _as_tuple(nums, int))


def jit_partial(
  fun: Callable[..., Any], *partial_args: Any, **options: Any
) -> JitPartial:
  """Compiles a function with its first arguments given.

  The given arguments are objects, not values: their state may change between
  calls, and what the function does to them is done to them.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> scale = nnx.Param(jnp.ones(2))
    >>> apply = nnx.jit_partial(lambda scale, x: scale * x, scale)
    >>> apply(3.0)
    Array([3., 3.], dtype=float32)

  Args:
    fun: the function.
    *partial_args: its first positional arguments.
    **options: those of `nnx.jit`; positions count from the first argument of
      `fun`.

  Returns:
    A function of the remaining arguments.
  """
  return JitPartial(jit(fun, **options), partial_args)
