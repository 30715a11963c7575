"""Random keys as state: streams that hand out one key after another.

A stream holds a key and a count. Its n-th key is `fold_in(key, n)`: it depends
on nothing but the seed and on how many keys were taken before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
from typing import Any, NamedTuple, TypeVar, cast, overload

import jax
from jax import random

from nnx import environment, filterlib
from nnx.graphlib import modes, traversal
from nnx.missing import MISSING
from nnx.rng_streams import RngCount as RngCount
from nnx.rng_streams import RngKey as RngKey
from nnx.rng_streams import Rngs as Rngs
from nnx.rng_streams import RngState as RngState
from nnx.rng_streams import RngStream as RngStream
from nnx.rng_streams import (
  key_shape,
  next_key_and_count,
  stream_rules,
  zeros_of_counts,
)
from nnx.statelib import State

A = TypeVar("A")
F = TypeVar("F", bound=Callable[..., Any])

Filter = filterlib.Filter
Shape = int | tuple[int, ...]


def _streams(
  node: Any, graph: bool | None
) -> list[tuple[tuple[Any, ...], RngStream]]:
  return [
    (path, stream)
    for path, stream in traversal.iter_graph(node, graph=graph)
    if isinstance(stream, RngStream)
  ]


def _selects(
  predicate: filterlib.Predicate, path: tuple[Any, ...], stream: RngStream
) -> bool:
  return predicate((*path, "key"), stream.key) and predicate(
    (*path, "count"), stream.count
  )


class SplitBackups:
  """The keys and counts that streams had before they were split or forked.

  Leaving it as a context manager, or `restore_rngs`, puts them back.

  Example:

    >>> import nnx
    >>> rngs = nnx.Rngs(0)
    >>> with nnx.split_rngs(rngs, splits=3):
    ...   print(rngs.default.key.shape)
    (3,)
    >>> rngs.default.key.shape
    ()

  Args:
    backups: tuples of a stream, its key, and, where it is to be restored, its
      count.
  """

  def __init__(self, backups: Iterable[tuple[Any, ...]]):
    self.backups = list(backups)

  def __iter__(self) -> Iterator[tuple[Any, ...]]:
    return iter(self.backups)

  def __len__(self) -> int:
    return len(self.backups)

  def __enter__(self) -> SplitBackups:
    return self

  def __exit__(self, *exc_info) -> None:
    restore_rngs(self)


def restore_rngs(backups: Iterable[tuple[Any, ...]], /) -> None:
  """Puts the keys and counts of streams back.

  Example:

    >>> import nnx
    >>> rngs = nnx.Rngs(0)
    >>> backups = nnx.split_rngs(rngs, splits=3)
    >>> nnx.restore_rngs(backups)
    >>> rngs.default.key.shape
    ()

  Args:
    backups: what `split_rngs`, `fork_rngs` or `backup_keys` returned.
  """
  for stream, key, *count in backups:
    stream.key.value = key
    if count:
      stream.count.value = count[0]


def backup_keys(
  node: Any, /, *, graph: bool | None = None
) -> list[tuple[RngStream, jax.Array]]:
  """Lists the streams below an object with their keys, for `restore_rngs`.

  Example:

    >>> import nnx
    >>> rngs = nnx.Rngs(0)
    >>> len(nnx.backup_keys(rngs))
    1

  Args:
    node: an object, or a pytree of objects.
    graph: `False` refuses what is no tree; None stands for
      `nnx.set_graph_mode`.

  Returns:
    Pairs of a stream and its key. Counts are left as they will be, so that no
    key comes twice.
  """
  return [(stream, stream.key.value) for _, stream in _streams(node, graph)]


class ForkStates(NamedTuple):
  """The state of random streams, forked; see `fork`.

  Attributes:
    split_keys: the keys that are split, and so have more axes.
    split_counts: the counts of their streams.
    broadcast_keys: the other keys.
    broadcast_counts: the counts of their streams.
  """

  split_keys: Any
  split_counts: Any
  broadcast_keys: Any
  broadcast_counts: Any


def fork(
  state: Any, split_filter: Filter, split_pattern: int | Sequence[int | None]
) -> ForkStates:
  """Splits some keys of a state of random streams, as Flax 0.10 did.

  `split_rngs` does the same to the streams of a Module.

  Example:

    >>> import nnx
    >>> state = nnx.state(nnx.Rngs(params=0, dropout=1))
    >>> forked = nnx.fork(state, "params", 4)
    >>> forked.split_keys.params.key.shape, list(forked.broadcast_keys)
    ((4,), ['dropout'])

  Args:
    state: the state, of `RngState` alone.
    split_filter: selects the keys to split.
    split_pattern: how many keys become of each, along one axis or more; None
      stands for 1.

  Returns:
    The state in four parts.

  Raises:
    TypeError: if `state` is no State, or the pattern is not of ints.
    ValueError: if `state` holds something else, or a number is negative.
  """
  if not isinstance(state, State):
    raise TypeError(
      "`state` must be a State of random streams, such as"
      f" `nnx.state(rngs)`, but got a `{type(state).__name__}`."
    )
  if isinstance(split_pattern, (list, tuple)):
    split_pattern = tuple(1 if n is None else n for n in split_pattern)
  shape = key_shape(split_pattern)
  parts = state.split(
    filterlib.All(split_filter, RngKey),
    filterlib.All(split_filter, RngCount),
    RngKey,
    RngCount,
  )
  split_keys = jax.tree.map(lambda key: random.split(key, shape), parts[0])
  return ForkStates(split_keys, *parts[1:])


def _next_keys(stream: RngStream) -> jax.Array:
  """Makes the next key of each key of a stream that has several."""
  next_key = next_key_and_count
  for _ in stream.count.shape:
    next_key = jax.vmap(next_key)
  keys, stream.count.value = next_key(stream.key.value, stream.count.value)
  return keys


def _decorator(transform: Callable[..., Any], in_place: bool) -> Any:
  """Applies a function like `split_rngs` to the arguments of a function."""

  def decorator(f: F) -> F:
    @functools.wraps(f)
    def wrapper(*args, **kwargs):
      if in_place:
        with transform((args, kwargs)):
          return f(*args, **kwargs)
      args, kwargs = transform((args, kwargs))
      return f(*args, **kwargs)

    return cast(F, wrapper)

  return decorator


@overload
def split_rngs(
  *,
  splits: Shape,
  only: Filter = ...,
  squeeze: bool = False,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Callable[[F], F]: ...
@overload
def split_rngs(
  node: Any,
  /,
  *,
  splits: Shape,
  only: Filter = ...,
  squeeze: bool = False,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any: ...
def split_rngs(
  node: Any = MISSING,
  /,
  *,
  splits: Shape,
  only: Filter = ...,
  squeeze: bool = False,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Splits the streams below an object into streams of several keys at once.

  Without an object it is a decorator, which splits the streams among the
  arguments of a function for the time of a call.

  A stream that has `splits` keys, as a layer has that was made under a `vmap`
  over split streams, goes on from the next key of each of them.

  Example:

    >>> import nnx
    >>> rngs = nnx.Rngs(params=0, dropout=1)
    >>> _ = nnx.split_rngs(rngs, splits=5, only="params")
    >>> rngs.params.key.shape, rngs.dropout.key.shape
    ((5,), ())
    >>> @nnx.split_rngs(splits=2, only="dropout")
    ... def f(rngs):
    ...   return rngs.dropout.key.shape
    >>> f(rngs), rngs.dropout.key.shape
    ((2,), ())

  Args:
    node: an object, or a pytree of objects.
    splits: how many keys: an int, or a shape.
    only: a filter of the streams' keys and counts.
    squeeze: whether to drop the new axis, which `splits=1` allows.
    graph: `False` does what `graph_updates=False` does, and refuses what is no
      tree; None stands for `nnx.set_graph_mode`.
    graph_updates: `False` leaves the object as it is and returns a copy of it
      with split streams; None stands for `nnx.set_graph_updates`.

  Returns:
    A `SplitBackups`; a copy of `node` if `graph_updates` or `graph` is `False`;
    a decorator if there is no `node`.

  Raises:
    ValueError: if `squeeze` is asked for with `splits` other than 1.
  """
  mode = modes.resolve(graph, graph_updates)
  environment.check_flags(squeeze=squeeze)
  in_place = mode.updates
  if node is MISSING:
    return _decorator(
      lambda arguments: split_rngs(
        arguments,
        splits=splits,
        only=only,
        squeeze=squeeze,
        **mode.arguments,
      ),
      in_place,
    )
  if squeeze and splits != 1:
    raise ValueError(
      f"`squeeze` drops an axis of size 1, but got `splits={splits}`. Use"
      " `splits=1`."
    )
  predicate = filterlib.to_predicate(only)
  wanted = key_shape(splits)

  def split(stream: RngStream) -> tuple[jax.Array, jax.Array]:
    shape = stream.count.shape
    if shape and shape[: len(wanted)] == wanted:
      key = _next_keys(stream)
      if squeeze:
        key, shape = key[0], shape[1:]
      return key, zeros_of_counts(shape)
    key = random.split(stream(), wanted)
    if squeeze:
      key = key[0]
    else:
      shape = (*wanted, *shape)
    return key, zeros_of_counts(shape)

  if in_place:
    backups = []
    for path, stream in _streams(node, mode.graph):
      if _selects(predicate, path, stream):
        key, count = split(stream)
        backups.append((stream, stream.key.value, stream.count.value))
        stream.key.value, stream.count.value = key, count
    return SplitBackups(backups)

  def visit(path, value):
    if isinstance(value, RngStream) and _selects(predicate, path, value):
      key, count = split(value)
      value.key = RngKey(key, tag=value.tag)
      value.count = RngCount(count, tag=value.tag)
    return value

  return traversal.recursive_map(visit, node, graph=mode.graph)


@overload
def fork_rngs(
  *,
  split: Mapping[Filter, Shape | None] | Shape | None = None,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Callable[[F], F]: ...
@overload
def fork_rngs(
  node: Any,
  /,
  *,
  split: Mapping[Filter, Shape | None] | Shape | None = None,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any: ...
def fork_rngs(
  node: Any = MISSING,
  /,
  *,
  split: Mapping[Filter, Shape | None] | Shape | None = None,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Forks the streams below an object: each goes on from its next key.

  Without an object it is a decorator, which forks the streams among the
  arguments of a function for the time of a call.

  Example:

    >>> import nnx
    >>> rngs = nnx.Rngs(params=0, dropout=1)
    >>> _ = nnx.fork_rngs(rngs, split={"params": 5, ...: None})
    >>> rngs.params.key.shape, rngs.dropout.key.shape
    ((5,), ())

  Args:
    node: an object, or a pytree of objects.
    split: how many keys to give the streams, or a mapping from filters to
      that; streams that no filter selects are left as they are.
    graph: `False` does what `graph_updates=False` does, and refuses what is no
      tree; None stands for `nnx.set_graph_mode`.
    graph_updates: `False` leaves the object as it is and returns a copy of it
      with forked streams; None stands for `nnx.set_graph_updates`.

  Returns:
    A `SplitBackups`; a copy of `node` if `graph_updates` or `graph` is `False`;
    a decorator if there is no `node`.
  """
  mode = modes.resolve(graph, graph_updates)
  in_place = mode.updates
  if node is MISSING:
    return _decorator(
      lambda arguments: fork_rngs(arguments, split=split, **mode.arguments),
      in_place,
    )
  rules = stream_rules({...: None} if split is None else split)

  def rule_for(path, stream):
    for predicate, splits in rules:
      if _selects(predicate, path, stream):
        return True, splits
    return False, None

  if in_place:
    backups = []
    for path, stream in _streams(node, mode.graph):
      selected, splits = rule_for(path, stream)
      if selected:
        fork = stream.fork(split=splits)
        backups.append((stream, stream.key.value, stream.count.value))
        stream.key.value = fork.key.value
        stream.count.value = fork.count.value
    return SplitBackups(backups)

  def visit(path, value):
    if isinstance(value, RngStream):
      selected, splits = rule_for(path, value)
      if selected:
        return value.fork(split=splits)
    return value

  return traversal.recursive_map(visit, node, graph=mode.graph)


@overload
def with_rngs(
  *,
  split: Mapping[Filter, Shape] | Shape | None = None,
  fork: Filter | Sequence[Filter] | None = None,
  broadcast: Mapping[Filter, Shape] | Shape | None = None,
  only: Filter = True,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Callable[[F], F]: ...
@overload
def with_rngs(
  node: Any,
  /,
  *,
  split: Mapping[Filter, Shape] | Shape | None = None,
  fork: Filter | Sequence[Filter] | None = None,
  broadcast: Mapping[Filter, Shape] | Shape | None = None,
  only: Filter = True,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any: ...
def with_rngs(
  node: Any = MISSING,
  /,
  *,
  split: Mapping[Filter, Shape] | Shape | None = None,
  fork: Filter | Sequence[Filter] | None = None,
  broadcast: Mapping[Filter, Shape] | Shape | None = None,
  only: Filter = True,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Copies an object, with its streams split, forked or broadcast.

  Without an object it is a decorator, which hands such copies of its arguments
  to a function. The streams of the object itself only move on by one key.

  Example:

    >>> import nnx
    >>> rngs = nnx.Rngs(params=0, dropout=1)
    >>> new = nnx.with_rngs(rngs, split={"params": 4}, fork=...)
    >>> new.params.key.shape, new.dropout.key.shape, rngs.params.key.shape
    ((4,), (), ())

  Args:
    node: an object, or a pytree of objects.
    split: how many keys to give the streams, or a mapping from filters to
      that.
    fork: a filter, or several, of the streams to fork.
    broadcast: how many times to repeat the keys of streams, or a mapping from
      filters to that.
    only: a filter of the streams to look at; the others stay as they are.
    graph: `False` refuses what is no tree; None stands for
      `nnx.set_graph_mode`.
    graph_updates: accepted as well; it is always a copy that is returned.

  Returns:
    The copy, or a decorator if there is no `node`.

  Raises:
    ValueError: if a stream falls under two rules neither of which is `...`.
  """
  mode = modes.resolve(graph, graph_updates)
  if node is MISSING:
    return _decorator(
      lambda arguments: with_rngs(
        arguments,
        split=split,
        fork=fork,
        broadcast=broadcast,
        only=only,
        **mode.arguments,
      ),
      in_place=False,
    )
  if fork is None:
    fork = ()
  elif isinstance(fork, str) or not isinstance(fork, Sequence):
    fork = (fork,)
  rules = {
    "split": split if isinstance(split, Mapping) else {...: split},
    "broadcast": broadcast
    if isinstance(broadcast, Mapping)
    else {...: broadcast},
    "fork": dict.fromkeys(fork, True),
  }
  compiled = {
    name: [
      (filter, filterlib.to_predicate(filter), argument)
      for filter, argument in by_filter.items()
      if argument is not None
    ]
    for name, by_filter in rules.items()
  }
  selects = filterlib.to_predicate(only)

  def visit(path, value):
    if not isinstance(value, RngStream) or not selects(path, value):
      return value
    matches = {}
    for name, entries in compiled.items():
      for filter, predicate, argument in entries:
        if predicate(path, value):
          matches[name] = filter, argument
          break
    specific = {
      name: filter
      for name, (filter, _) in matches.items()
      if filter is not ... and filter is not True
    }
    if len(specific) > 1:
      raise ValueError(
        f"One rule must hold for a stream, but for the one at `{path}` these"
        f" do: {specific}. Make the filters exclude each other."
      )
    for name in matches:  # of two rules the first holds
      argument = matches[name][1]
      if name == "split":
        return value.split(argument)
      if name == "broadcast":
        return value.broadcast(argument)
      return value.fork()
    return value

  return traversal.recursive_map(visit, node, graph=mode.graph)


def _scalars_only(path, key, shape):
  if shape != ():
    raise ValueError(
      "A stream must have a single key to be reseeded, but the one at"
      f" `{path}` has keys of shape `{shape}`. Pass `policy='match_shape'` if"
      " they are to differ along all axes, or a function as `policy`."
    )
  return key


def _match_shape(path, key, shape):
  del path
  return key if shape == () else random.split(key, shape)


_POLICIES = {"scalars_only": _scalars_only, "match_shape": _match_shape}


def reseed(
  node: Any,
  /,
  *,
  graph: bool | None = None,
  policy: str
  | Callable[
    [tuple[Any, ...], jax.Array, tuple[int, ...]], jax.Array
  ] = "scalars_only",
  **stream_keys: int | jax.Array,
) -> None:
  """Gives the streams below an object new seeds, by their tags.

  Example:

    >>> import nnx
    >>> rngs = nnx.Rngs(dropout=0)
    >>> first = rngs.dropout()
    >>> nnx.reseed(rngs, dropout=0)
    >>> rngs.dropout.count.value
    Array(0, dtype=uint32)

  Args:
    node: an object, or a pytree of objects.
    graph: `False` refuses what is no tree; None stands for
      `nnx.set_graph_mode`.
    policy: what to do with streams of several keys: `"scalars_only"` refuses
      them, `"match_shape"` splits the new key into as many, and a function
      `(path, key, shape) -> key` decides by itself.
    **stream_keys: the seed or key for each tag. Streams of one tag get keys
      that differ.

  Raises:
    ValueError: if `policy` is unknown, or refuses a stream.
  """
  if not callable(policy):
    if policy not in _POLICIES:
      raise ValueError(
        f"`policy` must be one of {sorted(_POLICIES)} or a function, but got"
        f" `{policy!r}`."
      )
    policy = _POLICIES[policy]
  new_key: Any = policy
  rngs = Rngs(**stream_keys)
  for path, stream in _streams(node, graph):
    if stream.key.tag in stream_keys:
      key = new_key(path, rngs[stream.key.tag](), stream.key.shape)
      stream.key.value = key
      stream.count.value = zeros_of_counts(key.shape)
