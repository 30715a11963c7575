"""shard_map: functions of graphs on the shards of a mesh."""

from __future__ import annotations

from collections.abc import Callable, Hashable
import functools
import re
from typing import Any, Required, TypedDict, TypeVar, Unpack, overload

import jax
from jax.sharding import PartitionSpec

from nnx import environment
from nnx.graphlib import modes
from nnx.transforms import callables, lift, mapped, places, prefix

F = TypeVar("F", bound=Callable[..., Any])


class ShardMapOptions(TypedDict, total=False):
  """Options of `shard_map`."""

  mesh: Required[jax.sharding.Mesh | jax.sharding.AbstractMesh]
  in_specs: Required[Any]
  out_specs: Required[Any]
  axis_names: frozenset[Hashable] | set[Hashable]
  check_vma: bool
  graph: bool | None
  graph_updates: bool | None


def _is_spec(value: Any) -> bool:
  return value is None or isinstance(value, PartitionSpec)


def _check_specs(option: str, specs: Any) -> None:
  for entry in mapped.entries_in([specs], _is_spec):
    if not _is_spec(entry):
      raise TypeError(
        f"`{option}` must hold `PartitionSpec`s, `None`, `nnx.StateSharding`"
        f" and containers of them, but got `{entry!r}` of type"
        f" `{type(entry).__name__}`."
      )


@overload
def shard_map(f: F, **options: Unpack[ShardMapOptions]) -> F: ...
@overload
def shard_map(
  f: None = None, **options: Unpack[ShardMapOptions]
) -> Callable[[F], F]: ...
def shard_map(
  f: Callable[..., Any] | None = None,
  *,
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  in_specs: Any,
  out_specs: Any,
  axis_names: frozenset[Hashable] | set[Hashable] = frozenset(),
  check_vma: bool = True,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Runs a function on the shards of its arguments, one on each device.

  As `jax.shard_map`, but arguments and results may hold Modules and Variables,
  and what the function does to them is done to the caller's: a Variable that is
  written is sharded as `in_specs` says of it.

  Example:

    >>> import jax, nnx
    >>> import jax.numpy as jnp
    >>> from jax.sharding import PartitionSpec as P
    >>> mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
    >>> w = nnx.Param(jnp.ones(2))
    >>> @nnx.shard_map(
    ...   mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
    ... )
    ... def apply(w, x):
    ...   return x * w
    >>> apply(w, jnp.ones((4, 2))).shape
    (4, 2)

  Args:
    f: the function; without it, `shard_map` is a decorator.
    mesh: the mesh.
    in_specs: for each positional argument a `PartitionSpec`, `None` for what is
      not sharded, a `StateSharding`, or a pytree prefix of these; one entry may
      stand for all. Keyword arguments are not sharded.
    out_specs: the same for the result.
    axis_names: the axes of the mesh over which the function is manual; all of
      them if empty.
    check_vma: whether to check that outputs are replicated where they say so.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    The sharded function.

  Raises:
    TypeError: if `in_specs` or `out_specs` holds something else.
    ValueError: if they do not fit the arguments or the result, or if a shared
      Variable gets two of them; also as `jax.shard_map`.
  """
  mode = modes.resolve(graph, graph_updates)
  environment.check_flags(check_vma=check_vma)
  if f is None:
    return functools.partial(
      shard_map,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names=axis_names,
      check_vma=check_vma,
      **mode.arguments,
    )
  f = callables.function_of(f, "shard_map")
  policy = lift.Policy(mode, "shard_map")
  prefix.check(policy, "in_specs", in_specs)
  prefix.check(policy, "out_specs", out_specs)
  _check_specs("in_specs", in_specs)
  _check_specs("out_specs", out_specs)
  prefix.check_form("in_specs", in_specs, _is_spec)
  groups = mapped.entries_in([in_specs, out_specs, None], _is_spec)
  out_root = prefix.Root(out_specs, "out_specs", "result")

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    args, kwargs = policy.bind(f, args, kwargs, in_specs)
    call = lift.Call(policy, f, args, kwargs)
    walk = prefix.Walk(call.structure, call.leaves, call.objects, _is_spec)
    for root in prefix.roots(
      in_specs,
      len(args),
      call.lifted.names,
      is_entry=_is_spec,
      option="in_specs",
    ):
      walk.visit_root(root)
    if isinstance(mesh, jax.sharding.Mesh):
      places.place_variables(
        call.structure,
        call.objects,
        [jax.sharding.NamedSharding(mesh, _spec(e)) for e in walk.entries],
      )
    inputs = [i for i, leaf in enumerate(call.leaves) if lift.is_array(leaf)]
    function = mapped.Mapped(call.lifted, walk, out_root, groups)

    def flat(leaves):
      return function(call.with_leaves(inputs, leaves))

    flat.__name__ = flat.__qualname__ = callables.name_of(f)
    sharded = jax.shard_map(
      call.described(flat, "shard_map", inputs),
      mesh=mesh,
      in_specs=(tuple(_spec(walk.entries[i]) for i in inputs),),
      out_specs=(PartitionSpec(), *map(_spec, groups)),
      axis_names=axis_names,
      check_vma=check_vma,
    )
    try:
      grouped = call.framed(sharded, call.pick(inputs))
    except ValueError as error:
      # By jax the arrays are items of one argument.
      numbers = map(int, re.findall(r"args\[0\]\[(\d+)\]", str(error)))
      for number in sorted(set(numbers)):
        path = call.path(inputs[number])
        error.add_note(f"`args[0][{number}]` is `{path}`.")
      raise
    return call.apply(function.packed(grouped))

  return wrapper


def _spec(entry: PartitionSpec | None) -> PartitionSpec:
  return PartitionSpec() if entry is None else entry
