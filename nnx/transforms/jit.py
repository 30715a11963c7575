"""jit and jit_partial: compiled by graph structure, checked by the engine.

The first call with a new structure makes one flat function for it and hands
that to `jax.jit`. A repeated call does not come to Python: the engine checks
that the arguments still have the structure, passes their arrays to the flat
function, and writes back what the function wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
import functools
from typing import (
  TYPE_CHECKING,
  Any,
  Concatenate,
  Generic,
  ParamSpec,
  Self,
  TypedDict,
  TypeVar,
  Unpack,
  overload,
)

import jax
from jax import core
from jax.experimental import serialize_executable
import jax.numpy as jnp

from nnx import environment
from nnx.engine import _engine, jax_private
from nnx.graphlib import modes
from nnx.transforms import callables, lift, prefix
from nnx.transforms.jit_options import Flat as Flat
from nnx.transforms.jit_options import Options as Options
from nnx.transforms.jit_options import argument_keys, as_tuple

P = ParamSpec("P")
Q = ParamSpec("Q")
R = TypeVar("R")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")


class JitOptions(TypedDict, total=False):
  """The options of `jit`, for type checkers; see there."""

  in_shardings: Any
  out_shardings: Any
  static_argnums: int | Sequence[int] | None
  static_argnames: str | Iterable[str] | None
  donate_argnums: int | Sequence[int] | None
  donate_argnames: str | Iterable[str] | None
  keep_unused: bool
  device: Any
  backend: str | None
  inline: bool
  graph: bool | None
  graph_updates: bool | None


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


class _Caller:
  """Calls what was compiled for one structure of arguments.

  Args:
    structure: that of the arguments.
    statics: which arguments are part of it, by position or name.
    donated: the leaves that are donated.
    given: arguments before those of the call.
  """

  def __init__(
    self,
    structure: _engine.StructureBase,
    statics: frozenset[int | str],
    donated: tuple[int, ...],
    given: tuple[Any, ...] = (),
  ):
    self.structure = structure
    self.statics = statics
    self.donated = donated
    self.given = given

  def __call__(
    self, run: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]
  ) -> Any:
    roots = _roots(self.statics, (*self.given, *args), kwargs)
    structure, leaves, objects = roots
    if structure != self.structure:
      raise ValueError(
        "A compiled function must be called with arguments of the structure"
        " that it was lowered for: their Modules, static attributes or"
        " containers differ. Call the jitted function itself instead."
      )
    packed = run(*_partition(leaves, self.donated))
    return _engine.apply(packed, objects, leaves)

  def after(self, given: tuple[Any, ...]) -> _Caller:
    """Returns that of the same function with its first arguments given."""
    return _Caller(self.structure, self.statics, self.donated, given)


class Lowered(Generic[P, R]):
  """A jitted function lowered for some arguments, not yet compiled.

  Attributes that are not here are those of jax's `Lowered`.
  """

  def __init__(self, lowered: Any, call: _Caller):
    self.lowered = lowered
    self.call = call

  def compile(
    self, compiler_options: Mapping[str, Any] | None = None
  ) -> Compiled[P, R]:
    """Compiles; see `Compiled`."""
    return Compiled(self.lowered.compile(compiler_options), self.call)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.lowered, name)


class Compiled(Generic[P, R]):
  """A compiled function: called like the original, for one structure only.

  It pickles, for a process with the same jax, machine and number of devices.
  What it is called with there must have the same structure: static attributes
  are compared by value, and functions by their names. A pickle runs code where
  it is loaded: load those that you trust.

  Attributes that are not here are those of jax's `Compiled`.

  Example:

    >>> import pickle
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> counter = nnx.Variable(jnp.zeros(()))
    >>> @nnx.jit
    ... def add(counter, by):
    ...   counter[...] += by
    >>> data = pickle.dumps(add.lower(counter, 1.0).compile())
    >>> pickle.loads(data)(counter, 2.0)
    >>> counter.value
    Array(2., dtype=float32)
  """

  def __init__(self, compiled: Any, call: _Caller):
    self.compiled = compiled
    self._call = call

  def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
    return self._call(self.compiled, args, kwargs)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.compiled, name)

  def __reduce__(self):
    data = serialize_executable.serialize(self.compiled)
    devices = self.compiled.runtime_executable().local_devices()
    numbers = tuple(device.id for device in devices)
    return _load, (self._call, numbers, devices[0].platform, *data)


def _load(
  call: _Caller, numbers: tuple[int, ...], platform: str, *data: Any
) -> Compiled[..., Any]:
  """Reads a compiled function that was pickled."""
  here = {device.id: device for device in jax.local_devices(backend=platform)}
  if not here.keys() >= set(numbers):
    raise ValueError(
      "A compiled function must be loaded where the devices are that it was"
      f" compiled for: {platform} {', '.join(map(str, numbers))}, but here are"
      f" {', '.join(map(str, here))}."
    )
  devices = [here[number] for number in numbers]
  return Compiled(
    serialize_executable.deserialize_and_load(
      *data, backend=platform, execution_devices=devices
    ),
    call,
  )


class JitWrapped(_engine.JitFunction, Generic[P, R]):
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
    """The function that is compiled, with `_cache_size` and the like.

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

  def _explain(
    self,
    error: BaseException,
    structure: Any,
    names: Sequence[str],
    leaves: Sequence[Any],
  ) -> None:
    """Adds to an error of a call, which the engine has caught, what it knows.

    Args:
      error: the error.
      structure: that of the arguments.
      names: those of the keyword arguments.
      leaves: the leaves of the arguments.
    """
    if "deleted" not in str(error):
      return
    lifted = lift.Lifted(
      self.options.fun, structure, names, self.options.policy
    )
    paths = lifted.leaf_names(range(len(leaves)))
    gone = [
      f"`{path}`"
      for path, leaf in zip(paths, leaves)
      if isinstance(leaf, jax.Array)
      and not isinstance(leaf, core.Tracer)
      and leaf.is_deleted()
    ]
    if gone:
      more = f" and {len(gone) - 3} more" if len(gone) > 3 else ""
      error.add_note(
        f"Of the arguments of `{callables.name_of(self.options.fun)}`, no array"
        f" is left of {', '.join(gone[:3])}{more}: it was given to a function"
        " that donates it (`donate_argnums`). Use what that function returned,"
        " or give it a copy."
      )

  if TYPE_CHECKING:  # The engine has these; it knows no types.

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...
    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Self: ...
    @overload
    def __get__(
      self: JitWrapped[Concatenate[Any, Q], R],
      instance: object,
      owner: type | None = None,
    ) -> Callable[Q, R]: ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any: ...

  def lower(self, *args: Any, **kwargs: Any) -> Lowered[P, R]:
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
    statics = self.options.statics
    structure = _roots(statics, args, kwargs).structure
    call = _Caller(structure, statics, donated)
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

  def eval_shape(self, *args: P.args, **kwargs: P.kwargs) -> R:
    """Returns the result as shapes and dtypes; nothing is computed."""
    compiled, flat_args, _ = self._prepare(*args, **kwargs)
    structure, leaves, _ = _roots(self.options.statics, args, kwargs)
    packed = compiled.eval_shape(*flat_args)
    # Applied to copies: the arguments stay as they are.
    objects = _engine.unflatten(structure, leaves).objects
    return _engine.apply(packed, objects, leaves)


def _roots(
  statics: frozenset[int | str], args: tuple, kwargs: Mapping[str, Any]
) -> _engine.Flattened:
  """Returns the structure, leaves and objects of a call."""
  names = sorted(kwargs)
  static = [key in statics for key in (*range(len(args)), *names)]
  values = (*args, *(kwargs[name] for name in names))
  return _engine.flatten(values, tuple(static))


def _partition(leaves: tuple, donated: tuple[int, ...]) -> tuple[tuple, ...]:
  """Returns leaves as the arguments of the compiled function."""
  if not donated:
    return (leaves,)
  gone = frozenset(donated)
  kept = tuple(leaf for i, leaf in enumerate(leaves) if i not in gone)
  return kept, tuple(leaves[i] for i in donated)


class JitPartial(Generic[P, R]):
  """A jitted function with its first arguments given; see `nnx.jit_partial`."""

  def __init__(self, jitted: JitWrapped[..., R], args: tuple[Any, ...]):
    policy = jitted.options.policy
    if not policy.mode.graph:
      lift.Call(policy, jitted.fun, args)  # refuses what is no tree
    self.jitted = jitted
    self.args = args
    functools.update_wrapper(self, jitted)

  def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
    return self.jitted(*self.args, *args, **kwargs)

  def lower(self, *args: Any, **kwargs: Any) -> Lowered[P, R]:
    """Does what `JitWrapped.lower` does, for the remaining arguments.

    So are the arguments of the compiled function.
    """
    lowered = self.jitted.lower(*self.args, *args, **kwargs)
    return Lowered(lowered.lowered, lowered.call.after(self.args))

  def trace(self, *args: Any, **kwargs: Any) -> Any:
    """Does what `JitWrapped.trace` does, for the remaining arguments."""
    return self.jitted.trace(*self.args, *args, **kwargs)

  def clear_cache(self) -> None:
    """Does what `JitWrapped.clear_cache` does."""
    self.jitted.clear_cache()

  def _cache_size(self) -> int:
    return self.jitted._cache_size()

  def eval_shape(self, *args: P.args, **kwargs: P.kwargs) -> R:
    """Does what `JitWrapped.eval_shape` does, for the remaining arguments."""
    return self.jitted.eval_shape(*self.args, *args, **kwargs)


@overload
def jit(
  fun: Callable[P, R], **options: Unpack[JitOptions]
) -> JitWrapped[P, R]: ...
@overload
def jit(
  fun: None = None, **options: Unpack[JitOptions]
) -> Callable[[Callable[P, R]], JitWrapped[P, R]]: ...
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

  Large Variables that the function writes are updated in place where nobody
  else has their arrays; see `nnx.use_updates_in_place`.

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
    graph: `False` is tree mode: Variables may not be shared, there are no
      cycles, and only what Variables hold is given back. None stands for
      `nnx.set_graph_mode`.
    graph_updates: `False` gives back only what Variables hold: no attributes,
      no structure. None stands for `nnx.set_graph_updates`.

  Returns:
    A `JitWrapped`, with `lower`, `trace`, `eval_shape` and `clear_cache`.

  Raises:
    TypeError: if a static argument is not hashable.
    ValueError: if an option does not fit the function or its arguments.
    TraceContextError: if the function changes a Module or Variable that it was
      not given.
  """
  mode = modes.resolve(graph, graph_updates)
  environment.check_flags(keep_unused=keep_unused, inline=inline)
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
      **mode.arguments,
    )
  callables.refuse_foreign(fun, "jit")
  if not callable(fun):
    raise TypeError(
      f"`fun` must be callable, but got {fun!r} of type {type(fun).__name__}."
    )
  jit_options: dict[str, Any] = {"keep_unused": keep_unused, "inline": inline}
  if device is not None:
    jit_options["device"] = device
  if backend is not None:
    jit_options["backend"] = backend
  method = callables.method_of(fun)
  if method is not None:
    fun = method.function
    static_argnums = _shifted(static_argnums)
    donate_argnums = _shifted(donate_argnums)
    if isinstance(in_shardings, (tuple, list)):
      in_shardings = (None, *in_shardings)
  options = Options(
    lift.Policy(mode, "jit"),
    fun,
    in_shardings,
    out_shardings,
    argument_keys(fun, static_argnums, static_argnames, "static_"),
    argument_keys(fun, donate_argnums, donate_argnames, "donate_"),
    jit_options,
  )
  wrapped: JitWrapped[..., Any] = JitWrapped(options)
  return wrapped if method is None else JitPartial(wrapped, (method.owner,))


def _shifted(nums: int | Sequence[int] | None) -> tuple[int, ...]:
  """Converts positions of a bound method's arguments to the function's."""
  return tuple(n + 1 if n >= 0 else n for n in as_tuple(nums, int))


@overload
def jit_partial(
  fun: Callable[Concatenate[T1, P], R],
  arg: T1,
  /,
  **options: Unpack[JitOptions],
) -> JitPartial[P, R]: ...
@overload
def jit_partial(
  fun: Callable[Concatenate[T1, T2, P], R],
  arg1: T1,
  arg2: T2,
  /,
  **options: Unpack[JitOptions],
) -> JitPartial[P, R]: ...
@overload
def jit_partial(
  fun: Callable[Concatenate[T1, T2, T3, P], R],
  arg1: T1,
  arg2: T2,
  arg3: T3,
  /,
  **options: Unpack[JitOptions],
) -> JitPartial[P, R]: ...
@overload
def jit_partial(
  fun: Callable[..., R], *partial_args: Any, **options: Unpack[JitOptions]
) -> JitPartial[..., R]: ...
def jit_partial(
  fun: Callable[..., Any], *partial_args: Any, **options: Any
) -> JitPartial[..., Any]:
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

  Raises:
    ValueError: in tree mode, if the given arguments are no tree.
  """
  return JitPartial(jit(fun, **options), partial_args)
