"""Random keys as state: streams that hand out one key after another.

A stream holds a key and a count. Its n-th key is `fold_in(key, n)`: it depends
on nothing but the seed and on how many keys were taken before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import functools
from typing import Any, NamedTuple, TypeVar

import jax
from jax import random
import jax.numpy as jnp
import numpy as np

from nnx import filterlib as filters_lib
from nnx.graphlib import functional, modes
from nnx.pytreelib import Pytree
from nnx.variablelib import Variable

A = TypeVar("A")
F = TypeVar("F", bound=Callable[..., Any])

Filter = filters_lib.Filter
Shape = int | tuple[int, ...]

_MISSING = object()


class RngState(Variable[jax.Array]):
  """The state of a random stream; base of `RngKey` and `RngCount`.

  Example:

    >>> import nnx
    >>> list(nnx.state(nnx.Rngs(0), nnx.RngState).default)
    ['count', 'key']
  """

  __slots__ = ()
  _fixed_shape = False
  _sizes_as_one = True

  tag: str


class RngCount(RngState):
  """How many keys a stream has handed out: `[...]`, uint32.

  Example:

    >>> import nnx
    >>> rngs = nnx.Rngs(0)
    >>> _ = rngs()
    >>> rngs.default.count.value
    Array(1, dtype=uint32)
  """

  __slots__ = ()


class RngKey(RngState):
  """The key that a stream derives its keys from: `[...]`, a typed jax key.

  Example:

    >>> import nnx
    >>> nnx.Rngs(params=0).params.key.tag
    'params'
  """

  __slots__ = ()


def _next_key(key: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The key that is next, and the count after it."""
  return random.fold_in(key, count), count + jnp.ones((), count.dtype)


# One compiled call takes a key and counts on, instead of one for every
# operation.
_next_key_compiled = jax.jit(_next_key)

# The same for what a stream is made of.
_make_key = jax.jit(
  lambda seed, impl: random.key(seed, impl=impl), static_argnums=1, inline=True
)
_zeros = jax.jit(
  lambda shape: jnp.zeros(shape, jnp.uint32), static_argnums=0, inline=True
)
_MAX_SEED = 2**31  # below it, `random.key` treats seeds of all types alike

_DISTRIBUTIONS = (
  "ball bernoulli beta binomial bits categorical cauchy chisquare choice"
  " dirichlet double_sided_maxwell exponential f gamma generalized_normal"
  " geometric gumbel laplace loggamma logistic lognormal maxwell multinomial"
  " multivariate_normal normal orthogonal pareto permutation poisson rademacher"
  " randint rayleigh t triangular truncated_normal uniform wald weibull_min"
).split()

# `normal`, `uniform`, `truncated_normal` and `orthogonal` are distributions.
_INITIALIZERS = (
  "delta_orthogonal glorot_normal glorot_uniform he_normal he_uniform"
  " kaiming_normal kaiming_uniform lecun_normal lecun_uniform variance_scaling"
  " xavier_normal xavier_uniform"
).split()


def _distribution_method(name: str) -> Callable[..., Any]:
  function = getattr(random, name)

  @functools.wraps(function)
  def method(self, *args, **kwargs):
    return function(self(), *args, **kwargs)

  return method


def _initializer_method(name: str) -> Callable[..., Any]:
  make_initializer = getattr(jax.nn.initializers, name)

  @functools.wraps(make_initializer)
  def method(self, *args, **kwargs):
    initializer = make_initializer(*args, **kwargs)

    def keyless_initializer(*init_args, **init_kwargs):
      return initializer(self(), *init_args, **init_kwargs)

    return keyless_initializer

  return method


class _RandomMethods:
  """The functions of `jax.random` and the initializers, with a key filled in.

  A distribution takes the arguments of its function in `jax.random` after the
  key; an initializer returns a function of shape and dtype.
  """


for _name in _DISTRIBUTIONS:
  setattr(_RandomMethods, _name, _distribution_method(_name))
for _name in _INITIALIZERS:
  setattr(_RandomMethods, _name, _initializer_method(_name))


def _as_key(key: Any) -> jax.Array:
  """A typed key of a seed, of raw key data, or of a typed key."""
  if isinstance(key, RngStream):
    key = key.key
  if isinstance(key, Variable):
    key = key.value
  if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
    if 0 <= key < _MAX_SEED:
      return _make_key(np.int32(key), jax.config.jax_default_prng_impl)
    return random.key(key)
  if isinstance(key, jax.Array):
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
      return key
    if key.dtype == jnp.uint32:
      return random.wrap_key_data(key)
  raise ValueError(
    "The seed of a random stream must be an int, a `jax.random.key` or raw key"
    f" data of dtype uint32, but got `{key!r}` of type `{type(key).__name__}`."
  )


class RngStream(_RandomMethods, Pytree):
  """A stream of random keys: call it for the next one.

  Example:

    >>> import jax, nnx
    >>> stream = nnx.RngStream(0, tag="params")
    >>> first = stream()
    >>> bool(first == jax.random.fold_in(jax.random.key(0), 0))
    True
    >>> stream.normal((2,)).shape
    (2,)

  Args:
    key: a seed, a `jax.random.key` of any shape, or raw key data.
    tag: the name of the stream, by which filters find its state.
  """

  def __init__(self, key: jax.Array | int, *, tag: str):
    key = _as_key(key)
    self.tag = tag
    self.key = RngKey(key, tag=tag)
    self.count = RngCount(_zeros(key.shape), tag=tag)

  def __call__(self) -> jax.Array:
    """Returns the next key: `[]`, a typed key."""
    key, count = self.key.value, self.count.value
    if isinstance(count, jax.core.Tracer) or isinstance(key, jax.core.Tracer):
      # In a program that is being traced, a call would stay a call.
      key, self.count.value = _next_key(key, count)
    else:
      key, self.count.value = _next_key_compiled(key, count)
    return key

  def split(self, k: Shape) -> RngStream:
    """A stream of `k` keys at once, made of the next key.

    Example:

      >>> import nnx
      >>> nnx.RngStream(0, tag="params").split(3).key.shape
      (3,)
    """
    return type(self)(random.split(self(), k), tag=self.tag)

  def fork(self, *, split: Shape | None = None) -> RngStream:
    """A stream of its own, made of the next key.

    Example:

      >>> import nnx
      >>> stream = nnx.RngStream(0, tag="params")
      >>> bool(stream.fork()() == stream())
      False

    Args:
      split: of how many keys the stream shall be, as `split` makes it.
    """
    if split is not None:
      return self.split(split)
    return type(self)(self(), tag=self.tag)

  def broadcast(self, k: Shape) -> RngStream:
    """A stream of `k` times the same key, made of the next key.

    Example:

      >>> import nnx
      >>> key = nnx.RngStream(0, tag="params").broadcast(2).key
      >>> bool(key[0] == key[1])
      True
    """
    key = self()
    shape = (k,) if isinstance(k, int) else tuple(k)
    return type(self)(jnp.broadcast_to(key, shape + key.shape), tag=self.tag)


class Rngs(_RandomMethods, Pytree):
  """Random streams by name.

  `rngs.params()` is the next key of the stream `params`. A name that there is
  no stream for stands for the stream `default`, which is also the one that
  `rngs()` and the functions of `jax.random`, such as `rngs.normal((2,))`, use.

  Example:

    >>> import nnx
    >>> rngs = nnx.Rngs(0, params=1)
    >>> key = rngs.params()
    >>> key = rngs.dropout()  # from `default`
    >>> rngs.default.count.value, rngs.params.count.value
    (Array(1, dtype=uint32), Array(1, dtype=uint32))

  Args:
    default: the seed, key or stream of the stream `default`, or a mapping from
      names to these.
    **rngs: the seed, key or stream of each stream.
  """

  def __init__(
    self,
    default: int | jax.Array | RngStream | Mapping[str, Any] | None = None,
    **rngs: int | jax.Array | RngStream,
  ):
    if isinstance(default, Mapping):
      rngs = {**default, **rngs}
    elif default is not None:
      rngs["default"] = default
    for name, key in rngs.items():
      setattr(self, name, RngStream(key, tag=name))

  def _stream(self, name: str, error: type[Exception]) -> RngStream:
    streams = vars(self)
    if name in streams:
      return streams[name]
    if "default" in streams:
      return streams["default"]
    raise error(
      f"No RngStream named '{name}' found in Rngs. Its streams are"
      f" {list(streams)}; pass `{name}=seed`, or a seed for all other names"
      " as the first argument."
    )

  def __getitem__(self, name: str) -> RngStream:
    return self._stream(name, KeyError)

  def __getattr__(self, name: str) -> RngStream:
    if name.startswith(("__", "_repr_")):
      raise AttributeError(name)
    return self._stream(name, AttributeError)

  def __call__(self) -> jax.Array:
    """Returns the next key of the stream `default`: `[]`, a typed key."""
    return self.default()

  def __iter__(self) -> Iterator[str]:
    return (name for name, _ in self.items())

  def __len__(self) -> int:
    return sum(1 for _ in self.items())

  def __contains__(self, name: Any) -> bool:
    return name in vars(self)

  def items(self) -> Iterator[tuple[str, RngStream]]:
    """The names and streams.

    Example:

      >>> import nnx
      >>> [name for name, _ in nnx.Rngs(0, params=1).items()]
      ['params', 'default']
    """
    for name, stream in list(vars(self).items()):
      if isinstance(stream, RngStream):
        yield name, stream

  def _replaced(
    self,
    rules: Any,
    change: Callable[[RngStream, Any], RngStream],
    other: Callable[[RngStream], RngStream],
  ) -> Rngs:
    """New `Rngs`, changed by the first of the rules whose filter holds.

    A stream that is not changed is the same stream: to start another one from
    its key would give the keys that it has given once more.
    """
    predicates = _rules(rules)
    replaced = Rngs()
    for name, stream in self.items():
      for predicate, argument in predicates:
        if predicate((), stream):
          setattr(replaced, name, change(stream, argument))
          break
      else:
        setattr(replaced, name, other(stream))
    return replaced

  def split(self, k: Mapping[Filter, Shape | None] | Shape) -> Rngs:
    """Streams of several keys at once, made of the next keys of these.

    Example:

      >>> import nnx
      >>> rngs = nnx.Rngs(params=1, dropout=2).split({"params": 5, ...: None})
      >>> rngs.params.key.shape, rngs.dropout.key.shape
      ((5,), ())

    Args:
      k: how many keys, or a mapping from filters to that; a stream with `None`,
        or that no filter selects, is shared by both.

    Returns:
      New `Rngs`.
    """
    return self._replaced(
      k,
      lambda stream, n: stream if n is None else stream.split(n),
      lambda stream: stream,
    )

  def broadcast(self, k: Mapping[Filter, Shape | None] | Shape | None) -> Rngs:
    """Streams of several times the same key, made of the next keys of these.

    Example:

      >>> import nnx
      >>> nnx.Rngs(0).broadcast(5).default.key.shape
      (5,)

    Args:
      k: how many keys, or a mapping from filters to that; a stream with `None`,
        or that no filter selects, is shared by both.

    Returns:
      New `Rngs`.
    """
    return self._replaced(
      {...: None} if k is None else k,
      lambda stream, n: stream if n is None else stream.broadcast(n),
      lambda stream: stream,
    )

  def fork(
    self, /, *, split: Mapping[Filter, Shape | None] | Shape | None = None
  ) -> Rngs:
    """Streams of their own, made of the next keys of these.

    Example:

      >>> import nnx
      >>> rngs = nnx.Rngs(params=1)
      >>> bool(rngs.fork().params() == rngs.params())
      False

    Args:
      split: how many keys the streams shall have, or a mapping from filters to
        that.

    Returns:
      New `Rngs`.
    """
    return self._replaced(
      {} if split is None else split,
      lambda stream, n: stream.fork(split=n),
      lambda stream: stream.fork(),
    )


def _rules(rules: Any) -> list[tuple[filters_lib.Predicate, Any]]:
  """Predicates and arguments, of a mapping from filters or one argument."""
  if rules is None:
    return []
  if not isinstance(rules, Mapping):
    rules = {...: rules}
  return [(filters_lib.to_predicate(f), value) for f, value in rules.items()]


def _streams(node: Any) -> list[tuple[tuple[Any, ...], RngStream]]:
  return [
    (path, stream)
    for path, stream in functional.iter_graph(node)
    if isinstance(stream, RngStream)
  ]


def _selects(
  predicate: filters_lib.Predicate, path: tuple[Any, ...], stream: RngStream
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
  """The streams below an object with their keys, for `restore_rngs`.

  Example:

    >>> import nnx
    >>> rngs = nnx.Rngs(0)
    >>> len(nnx.backup_keys(rngs))
    1

  Args:
    node: an object, or a pytree of objects.
    graph: accepted for programs of Flax 0.12; references are always followed.

  Returns:
    Pairs of a stream and its key. Counts are left as they will be, so that no
    key comes twice.
  """
  del graph
  return [(stream, stream.key.value) for _, stream in _streams(node)]


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
  """
  shape = (
    split_pattern
    if isinstance(split_pattern, int)
    else tuple(1 if n is None else n for n in split_pattern)
  )
  parts = state.split(
    filters_lib.All(split_filter, RngKey),
    filters_lib.All(split_filter, RngCount),
    RngKey,
    RngCount,
  )
  split_keys = jax.tree.map(lambda key: random.split(key, shape), parts[0])
  return ForkStates(split_keys, *parts[1:])


def _split_shape(splits: Shape) -> tuple[int, ...]:
  return (splits,) if isinstance(splits, int) else tuple(splits)


def _next_keys(stream: RngStream) -> jax.Array:
  """The next key of each key of a stream that has several."""
  next_key = _next_key
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

    return wrapper

  return decorator


def split_rngs(
  node: Any = _MISSING,
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
    graph: `False` does what `graph_updates=False` does; None stands for
      `nnx.set_graph_mode`.
    graph_updates: `False` leaves the object as it is and returns a copy of it
      with split streams; None stands for `nnx.set_graph_updates`.

  Returns:
    A `SplitBackups`; a copy of `node` if `graph_updates` or `graph` is `False`;
    a decorator if there is no `node`.

  Raises:
    ValueError: if `squeeze` is asked for with `splits` other than 1.
  """
  in_place = not modes.is_tree(graph, graph_updates)
  if node is _MISSING:
    return _decorator(
      lambda arguments: split_rngs(
        arguments,
        splits=splits,
        only=only,
        squeeze=squeeze,
        graph=in_place,
        graph_updates=in_place,
      ),
      in_place,
    )
  if squeeze and splits != 1:
    raise ValueError(
      f"`squeeze` drops an axis of size 1, but got `splits={splits}`. Use"
      " `splits=1`."
    )
  predicate = filters_lib.to_predicate(only)

  def split(stream: RngStream) -> tuple[jax.Array, jax.Array]:
    shape = stream.count.shape
    wanted = _split_shape(splits)
    if shape and shape[: len(wanted)] == wanted:
      key = _next_keys(stream)
      if squeeze:
        key, shape = key[0], shape[1:]
      return key, _zeros(shape)
    key = random.split(stream(), splits)
    if squeeze:
      key = key[0]
    else:
      shape = (*wanted, *shape)
    return key, _zeros(shape)

  if in_place:
    backups = []
    for path, stream in _streams(node):
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

  return functional.recursive_map(visit, node)


def fork_rngs(
  node: Any = _MISSING,
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
    split: how many keys the streams shall have, or a mapping from filters to
      that; streams that no filter selects are left as they are.
    graph: `False` does what `graph_updates=False` does; None stands for
      `nnx.set_graph_mode`.
    graph_updates: `False` leaves the object as it is and returns a copy of it
      with forked streams; None stands for `nnx.set_graph_updates`.

  Returns:
    A `SplitBackups`; a copy of `node` if `graph_updates` or `graph` is `False`;
    a decorator if there is no `node`.
  """
  in_place = not modes.is_tree(graph, graph_updates)
  if node is _MISSING:
    return _decorator(
      lambda arguments: fork_rngs(
        arguments, split=split, graph=in_place, graph_updates=in_place
      ),
      in_place,
    )
  rules = _rules({...: None} if split is None else split)

  def rule_for(path, stream):
    for predicate, splits in rules:
      if _selects(predicate, path, stream):
        return True, splits
    return False, None

  if in_place:
    backups = []
    for path, stream in _streams(node):
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

  return functional.recursive_map(visit, node)


def with_rngs(
  node: Any = _MISSING,
  /,
  *,
  split: Mapping[Filter, Shape] | Shape | None = None,
  fork: Filter | Sequence[Filter] | None = None,
  broadcast: Mapping[Filter, Shape] | Shape | None = None,
  only: Filter = True,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """A copy of an object whose streams are split, forked or broadcast.

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
    split: how many keys the streams shall have, or a mapping from filters to
      that.
    fork: a filter, or several, of the streams to fork.
    broadcast: how many times the streams shall have one key, or a mapping from
      filters to that.
    only: a filter of the streams to look at; the others stay as they are.
    graph: accepted for programs of Flax 0.12; references are always followed.
    graph_updates: accepted as well; it is always a copy that is returned.

  Returns:
    The copy, or a decorator if there is no `node`.

  Raises:
    ValueError: if a stream falls under two rules neither of which is `...`.
  """
  del graph, graph_updates
  if node is _MISSING:
    return _decorator(
      lambda arguments: with_rngs(
        arguments, split=split, fork=fork, broadcast=broadcast, only=only
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
      (filter, filters_lib.to_predicate(filter), argument)
      for filter, argument in by_filter.items()
      if argument is not None
    ]
    for name, by_filter in rules.items()
  }
  selects = filters_lib.to_predicate(only)

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

  return functional.recursive_map(visit, node)


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
    graph: accepted for programs of Flax 0.12; references are always followed.
    policy: what to do with streams of several keys: `"scalars_only"` refuses
      them, `"match_shape"` splits the new key into as many, and a function
      `(path, key, shape) -> key` decides by itself.
    **stream_keys: the seed or key for each tag. Streams of one tag get keys
      that differ.

  Raises:
    ValueError: if `policy` is none of these, or refuses a stream.
  """
  del graph
  if not callable(policy):
    if policy not in _POLICIES:
      raise ValueError(
        f"`policy` must be one of {sorted(_POLICIES)} or a function, but got"
        f" `{policy!r}`."
      )
    policy = _POLICIES[policy]
  rngs = Rngs(**stream_keys)
  for path, stream in _streams(node):
    if stream.key.tag in stream_keys:
      key = policy(path, rngs[stream.key.tag](), stream.key.shape)
      stream.key.value = key
      stream.count.value = _zeros(key.shape)
