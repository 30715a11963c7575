"""Streams of random keys: the Variables and classes under `rnglib`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
import functools
from typing import Any

import jax
from jax import core, random
import jax.numpy as jnp
import numpy as np

from nnx import filterlib
from nnx.pytreelib import Pytree
from nnx.variablelib import Variable

_CONFIG: Any = jax.config  # whose options have no types

Filter = filterlib.Filter
Shape = int | tuple[int, ...]


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


def next_key_and_count(
  key: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Makes the next key, and the count after it."""
  return random.fold_in(key, count), count + jnp.ones((), count.dtype)


# One compiled call takes a key and counts on, instead of one for every
# operation.
_next_key_compiled = jax.jit(next_key_and_count)

# The same for what a stream is made of.
_make_key = jax.jit(
  lambda seed, impl: random.key(seed, impl=impl),
  static_argnames="impl",
  inline=True,
)
zeros_of_counts = jax.jit(
  lambda shape: jnp.zeros(shape, jnp.uint32),
  static_argnames="shape",
  inline=True,
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


def as_key(key: Any) -> jax.Array:
  """Makes a typed key of a seed, raw key data or a typed key."""
  if isinstance(key, RngStream):
    key = key.key
  if isinstance(key, Variable):
    key = key.value
  if isinstance(key, (int, np.integer)) and not isinstance(key, bool):
    if 0 <= key < _MAX_SEED:
      return _make_key(np.int32(key), _CONFIG.jax_default_prng_impl)
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


def key_shape(k: Any) -> tuple[int, ...]:
  """Makes a shape of how many keys are asked for.

  Example:

    >>> from nnx.rng_streams import key_shape
    >>> key_shape(3), key_shape((2, 3))
    ((3,), (2, 3))

  Args:
    k: an int, or a shape.

  Raises:
    TypeError: if it is neither.
    ValueError: if it is negative.
  """
  shape = tuple(k) if isinstance(k, Sequence) else (k,)
  if not all(isinstance(n, (int, np.integer)) for n in shape):
    raise TypeError(
      f"The number of keys must be an int or a shape of ints, but got {k!r}."
    )
  if any(n < 0 for n in shape):
    raise ValueError(f"The number of keys must be at least 0, but got {k!r}.")
  return shape


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
    key = as_key(key)
    self.tag = tag
    self.key = RngKey(key, tag=tag)
    self.count = RngCount(zeros_of_counts(key.shape), tag=tag)

  def __call__(self) -> jax.Array:
    """Returns the next key: `[]`, a typed key."""
    key, count = self.key.value, self.count.value
    if isinstance(count, core.Tracer) or isinstance(key, core.Tracer):
      # In a program that is being traced, a call would stay a call.
      key, self.count.value = next_key_and_count(key, count)
    else:
      key, self.count.value = _next_key_compiled(key, count)
    return key

  def split(self, k: Shape) -> RngStream:
    """Makes a stream of `k` keys at once, of the next key.

    Example:

      >>> import nnx
      >>> nnx.RngStream(0, tag="params").split(3).key.shape
      (3,)
    """
    shape = key_shape(k)  # before a key is drawn
    return type(self)(random.split(self(), shape), tag=self.tag)

  def fork(self, *, split: Shape | None = None) -> RngStream:
    """Makes an independent stream of the next key.

    Example:

      >>> import nnx
      >>> stream = nnx.RngStream(0, tag="params")
      >>> bool(stream.fork()() == stream())
      False

    Args:
      split: how many keys to give the stream, as `split` does.
    """
    if split is not None:
      return self.split(split)
    return type(self)(self(), tag=self.tag)

  def broadcast(self, k: Shape) -> RngStream:
    """Makes a stream of `k` times the same key, of the next key.

    Example:

      >>> import nnx
      >>> key = nnx.RngStream(0, tag="params").broadcast(2).key
      >>> bool(key[0] == key[1])
      True
    """
    shape = key_shape(k)
    key = self()
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
    key: Any
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
    """Walks over the names and streams.

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
    """Makes new `Rngs`, each stream changed by the first rule that selects it.

    A stream that is not changed is the same stream: to start another one from
    its key would give the keys that it has given once more.
    """
    predicates = stream_rules(rules)
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
    """Makes streams of several keys at once, of the next keys of these.

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
    """Makes streams that repeat a key, of the next keys of these.

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
    """Makes streams of their own, of the next keys of these.

    Example:

      >>> import nnx
      >>> rngs = nnx.Rngs(params=1)
      >>> bool(rngs.fork().params() == rngs.params())
      False

    Args:
      split: how many keys to give the streams, or a mapping from filters to
        that.

    Returns:
      New `Rngs`.
    """
    return self._replaced(
      {} if split is None else split,
      lambda stream, n: stream.fork(split=n),
      lambda stream: stream.fork(),
    )


def stream_rules(rules: Any) -> list[tuple[filterlib.Predicate, Any]]:
  """Pairs predicates with arguments, of a mapping from filters or of one."""
  if rules is None:
    return []
  if not isinstance(rules, Mapping):
    rules = {...: rules}
  return [(filterlib.to_predicate(f), value) for f, value in rules.items()]


for _cls in (RngState, RngCount, RngKey, RngStream, Rngs):
  _cls.__module__ = "nnx.rnglib"
