"""State: the leaves of a model as a nested mapping, and the functions on it.

A `State` wraps one nested plain dict, whose leaves are Variables or arrays.
Flattening, splitting and merging are done by a few small functions on such
dicts, in `nested_mappings` and in the engine; the classes wrap what they take
and return. Methods of `State` are these functions by another name, and the
functions make States: so they share a file, half of which is documentation.
"""

from __future__ import annotations

import collections.abc
from collections.abc import (
  Callable,
  Iterable,
  Iterator,
  Mapping,
  MutableMapping,
  Sequence,
)
from typing import (
  Any,
  Generic,
  TypeVar,
  overload,
)

import jax

from nnx import filterlib, flat_states, reprlib
from nnx.engine import _engine, pytrees, serialization
from nnx.nested_mappings import copy_mapping as copy_mapping
from nnx.nested_mappings import (
  nested_items,
  one_or_tuple,
  replace_in,
)
from nnx.nested_mappings import path_sort_key as path_sort_key
from nnx.nested_mappings import restore_int_paths as restore_int_paths
from nnx.nested_mappings import sorted_by_path as sorted_by_path
from nnx.nested_mappings import unflatten_mapping as unflatten_mapping
from nnx.variable_operators import unwrap

K = TypeVar("K")
V = TypeVar("V")

Key = filterlib.Key
PathParts = filterlib.PathParts
Filter = filterlib.Filter


class FlatState(flat_states.FlatLeaves[V]):
  """The leaves of a `State` in the order of their paths.

  Behaves as a sequence of pairs `(path, leaf)`; it is a pytree.

  Example:

    >>> import nnx
    >>> flat = nnx.FlatState([(("b",), 1), (("a", 0), 2)], sort=True)
    >>> flat.paths, flat.leaves
    ((('a', 0), ('b',)), [2, 1])

  Args:
    items: pairs of a path and a leaf.
    sort: whether to sort them by path; if not, they must be sorted.
  """

  __slots__ = ()

  def to_nested_state(self) -> State[Key, V]:
    """Makes the `State` with these leaves.

    Example:

      >>> import nnx
      >>> nnx.FlatState([(("a", "b"), 1)]).to_nested_state()
      State({
        'a': {
          'b': 1
        }
      })
    """
    return from_flat_state(self)


class State(reprlib.Displayable, MutableMapping[K, V], Generic[K, V]):
  """The leaves of a model as a nested mapping; a pytree.

  Keys are strings or ints, values are leaves (Variables or arrays) or nested
  mappings, which read as `State`s that share their contents with this one.
  Entries are read and written as items, and as attributes if their key is a
  string. The Variables are those of the model that the `State` was taken from:
  writing to one writes to the model.

  Example:

    >>> import nnx
    >>> state = nnx.State({"a": {0: nnx.Param(1)}, "b": nnx.BatchStat(2)})
    >>> state.a[0].value, state["b"].value
    (1, 2)
    >>> state.filter(nnx.Param)
    State({
      'a': {
        0: VariableState(
          type=Param,
          value=1
        )
      }
    })

  Args:
    mapping: a mapping, or pairs of key and value.
    _copy: whether to copy the outermost dict; if not, `mapping` must be one.
  """

  _mapping: dict[Any, Any]

  def __init_subclass__(cls, **kwargs: Any) -> None:
    super().__init_subclass__(**kwargs)
    pytrees.register_state_type(cls)

  def __init__(
    self,
    mapping: Mapping[K, Any] | Iterable[tuple[K, Any]] = (),
    /,
    *,
    _copy: bool = True,
  ):
    if _copy:
      mapping = dict(mapping)
      for key, value in mapping.items():
        if isinstance(value, State):
          mapping[key] = value._mapping
    elif type(mapping) is not dict:
      raise ValueError(
        "With `_copy=False` the mapping must be a dict, but got a"
        f" `{type(mapping).__name__}`."
      )
    object.__setattr__(self, "_mapping", mapping)

  @classmethod
  def _from_nested(cls, mapping: dict[Any, Any]) -> State[Any, Any]:
    """Wraps a nested dict without looking at it."""
    self = object.__new__(cls)
    object.__setattr__(self, "_mapping", mapping)
    return self

  @property
  def raw_mapping(self) -> dict[K, Any]:
    """The nested dict itself.

    Example:

      >>> import nnx
      >>> nnx.State({"a": {"b": 1}}).raw_mapping
      {'a': {'b': 1}}
    """
    return self._mapping

  def __getitem__(self, key: K) -> Any:
    value = self._mapping[key]
    return self._from_nested(value) if type(value) is dict else value

  # A name is a key, of whatever type those are.
  def __getattr__(self, key: Any) -> Any:
    # While it is unpickled or copied, an instance has no mapping yet.
    mapping = self.__dict__.get("_mapping", {})
    if key not in mapping:
      raise AttributeError(
        f"`State` has no entry `{key}`. Its entries are {list(mapping)}.",
        name=key,
        obj=self,
      )
    return self[key]

  def __setitem__(self, key: K, value: Any) -> None:
    self._mapping[key] = value._mapping if isinstance(value, State) else value

  def __setattr__(self, name: Any, value: Any) -> None:
    if name == "__orig_class__":  # typing sets it on `State[K, V](...)`
      object.__setattr__(self, name, value)
    else:
      self[name] = value

  def __delitem__(self, key: K) -> None:
    del self._mapping[key]

  def __delattr__(self, name: str) -> None:
    if name not in self._mapping:
      raise AttributeError(
        f"`State` has no entry `{name}`. Its entries are"
        f" {list(self._mapping)}.",
        name=name,
        obj=self,
      )
    del self._mapping[name]

  def __contains__(self, key: Any) -> bool:
    return key in self._mapping

  def __iter__(self) -> Iterator[K]:
    return iter(self._mapping)

  def __len__(self) -> int:
    return len(self._mapping)

  def __getstate__(self) -> dict[str, Any]:
    return {"_mapping": self._mapping}

  def __setstate__(self, state: dict[str, Any]) -> None:
    object.__setattr__(self, "_mapping", state["_mapping"])

  def __copy__(self) -> State[K, V]:
    return self._from_nested(copy_mapping(self._mapping))

  def __dir__(self) -> list[str]:
    names = (key for key in self._mapping if isinstance(key, str))
    return sorted({*super().__dir__(), *names})

  def _display(self) -> reprlib.Parts:
    return reprlib.Parts(
      type(self).__name__,
      nested_items(self._mapping),
      start="({",
      end="})",
      separator=": ",
      type=type(self),
      nested={"in_state": True},
    )

  def map(self, f: Callable[[PathParts, V], Any]) -> State[K, Any]:
    """Applies a function to every path and leaf; see `map_state`.

    Example:

      >>> import nnx
      >>> nnx.State({"a": 1}).map(lambda path, x: x + 1).a
      2
    """
    return map_state(f, self)

  def flat_state(self) -> FlatState[V]:
    """Lists the leaves in the order of their paths; see `to_flat_state`.

    Example:

      >>> import nnx
      >>> nnx.State({"a": {0: 5}}).flat_state()[0]
      (('a', 0), 5)
    """
    return to_flat_state(self)

  @classmethod
  def from_flat_path(
    cls,
    flat_state: Mapping[PathParts, V] | Iterable[tuple[PathParts, V]],
    /,
  ) -> State[Any, V]:
    """Makes a State of paths and leaves; see `from_flat_state`.

    Example:

      >>> import nnx
      >>> nnx.State.from_flat_path({("a", 0): 5}).a[0]
      5
    """
    return from_flat_state(flat_state, cls=cls)

  def to_pure_dict(
    self, extract_fn: Callable[[Any], Any] | None = None
  ) -> dict[Any, Any]:
    """Makes nested dicts of the values; see `nnx.to_pure_dict`.

    Example:

      >>> import nnx
      >>> nnx.State({"a": nnx.Param(1)}).to_pure_dict()
      {'a': 1}
    """
    return to_pure_dict(self, extract_fn)

  def replace_by_pure_dict(
    self,
    pure_dict: Mapping[Any, Any],
    replace_fn: Callable[[Any, Any], Any] | None = None,
  ) -> None:
    """Sets the values from nested dicts; see `nnx.replace_by_pure_dict`.

    Example:

      >>> import nnx
      >>> state = nnx.State({"a": nnx.Param(1)})
      >>> state.replace_by_pure_dict({"a": 2})
      >>> state.a.value
      2
    """
    replace_by_pure_dict(self, pure_dict, replace_fn)

  @overload
  def split(self, first: Filter, /) -> State[Any, Any]: ...
  @overload
  def split(
    self, first: Filter, /, *filters: Filter
  ) -> tuple[State[Any, Any], ...]: ...
  def split(self, first: Filter, /, *filters: Filter) -> Any:
    """Splits by filters that select every leaf; see `split_state`.

    Example:

      >>> import nnx
      >>> params, rest = nnx.State({"a": nnx.Param(1), "b": 2}).split(
      ...   nnx.Param, ...
      ... )
      >>> list(params), list(rest)
      (['a'], ['b'])
    """
    return split_state(self, first, *filters)

  @overload
  def filter(self, first: Filter, /) -> State[Any, Any]: ...
  @overload
  def filter(
    self, first: Filter, /, *filters: Filter
  ) -> tuple[State[Any, Any], ...]: ...
  def filter(self, first: Filter, /, *filters: Filter) -> Any:
    """Selects leaves by filters; see `filter_state`.

    Example:

      >>> import nnx
      >>> list(nnx.State({"a": nnx.Param(1), "b": 2}).filter(nnx.Param))
      ['a']
    """
    return filter_state(self, first, *filters)

  @staticmethod
  def merge(
    state: Mapping[Any, Any], /, *states: Mapping[Any, Any]
  ) -> State[Any, Any]:
    """Joins States into a new one; see `merge_state`.

    Example:

      >>> import nnx
      >>> merged = nnx.State.merge(nnx.State({"a": 1}), nnx.State({"b": 2}))
      >>> list(merged)
      ['a', 'b']
    """
    return merge_state(state, *states)

  def __or__(self, other: State[Any, Any]) -> State[Any, Any]:
    if not isinstance(other, collections.abc.Mapping):
      return NotImplemented
    return merge_state(self, other) if other else self

  def __sub__(self, other: State[Any, Any]) -> State[Any, Any]:
    if not isinstance(other, collections.abc.Mapping):
      return NotImplemented
    return diff(self, other) if other else self


pytrees.register_state_type(State)
jax.tree_util.register_pytree_node(
  FlatState,
  lambda flat: (flat._values, flat._keys),
  lambda keys, values: FlatState.from_sorted_keys_values(keys, list(values)),
)
serialization.register(FlatState)


def to_flat_state(state: Mapping[Any, Any]) -> FlatState[Any]:
  """Lists the leaves of a State in the order of their paths.

  Example:

    >>> import nnx
    >>> nnx.to_flat_state(nnx.State({"b": 1, "a": {1: 2, 0: 3}})).paths
    (('a', 0), ('a', 1), ('b',))

  Args:
    state: a `State`, or any nested mapping.

  Returns:
    The `FlatState`. Empty mappings leave no trace in it.
  """
  paths, leaves = _engine.flatten_mapping(raw_mapping(state))
  return FlatState.from_sorted_keys_values(paths, leaves)


def from_flat_state(
  flat_state: Mapping[PathParts, V] | Iterable[tuple[PathParts, V]],
  *,
  cls: type[State[Any, Any]] = State,
) -> State[Any, V]:
  """Makes a State of paths and leaves.

  Example:

    >>> import nnx
    >>> nnx.from_flat_state({("a", 0): 1, ("b",): 2}).raw_mapping
    {'a': {0: 1}, 'b': 2}

  Args:
    flat_state: a `FlatState`, a mapping from paths, or pairs.
    cls: the class to make, `State` or a subclass.

  Returns:
    The State.

  Raises:
    ValueError: if a path leads through a leaf.
  """
  return cls._from_nested(unflatten_mapping(flat_state))


def map_state(
  f: Callable[[PathParts, Any], Any], state: State[Any, Any]
) -> State[Any, Any]:
  """Applies a function to every path and leaf of a State.

  Example:

    >>> import nnx
    >>> nnx.map_state(lambda path, x: x + 1, nnx.State({"a": 1})).a
    2

  Args:
    f: called with the path and the leaf; returns the new leaf.
    state: a `State`.

  Returns:
    A new State.
  """
  flat = to_flat_state(state)
  return from_flat_state([(path, f(path, leaf)) for path, leaf in flat])


@overload
def filter_state(
  state: Mapping[Any, Any], first: Filter, /
) -> State[Any, Any]: ...
@overload
def filter_state(
  state: Mapping[Any, Any], first: Filter, /, *filters: Filter
) -> tuple[State[Any, Any], ...]: ...
def filter_state(
  state: Mapping[Any, Any], first: Filter, /, *filters: Filter
) -> Any:
  """Selects leaves by filters; those that no filter selects are left out.

  Example:

    >>> import nnx
    >>> state = nnx.State({"a": nnx.Param(1), "b": nnx.BatchStat(2)})
    >>> params, rest = nnx.filter_state(state, nnx.Param, ...)
    >>> list(params), list(rest)
    (['a'], ['b'])

  Args:
    state: a `State`, or any nested mapping.
    first: a filter.
    *filters: more filters; the first that selects a leaf gets it.

  Returns:
    One State, or a tuple of them if there are several filters.

  Raises:
    ValueError: if `...` is not the last of the filters.
  """
  return _split(state, (first, *filters), exhaustive=False)


@overload
def split_state(
  state: Mapping[Any, Any], first: Filter, /
) -> State[Any, Any]: ...
@overload
def split_state(
  state: Mapping[Any, Any], first: Filter, /, *filters: Filter
) -> tuple[State[Any, Any], ...]: ...
def split_state(
  state: Mapping[Any, Any], first: Filter, /, *filters: Filter
) -> Any:
  """Splits a State by filters that together must select every leaf.

  Example:

    >>> import nnx
    >>> state = nnx.State({"a": nnx.Param(1), "b": nnx.BatchStat(2)})
    >>> params, stats = nnx.split_state(state, nnx.Param, nnx.BatchStat)
    >>> list(params), list(stats)
    (['a'], ['b'])

  Args:
    state: a `State`, or any nested mapping.
    first: a filter.
    *filters: more filters; the first that selects a leaf gets it.

  Returns:
    One State, or a tuple of them if there are several filters.

  Raises:
    ValueError: if a leaf is left, or if `...` is not the last of the filters.
  """
  return _split(state, (first, *filters), exhaustive=True)


def merge_state(
  state: Mapping[Any, Any],
  /,
  *states: Mapping[Any, Any],
  cls: type[State[Any, Any]] = State,
) -> State[Any, Any]:
  """Joins States into a new one, the inverse of `split_state`.

  Example:

    >>> import nnx
    >>> a, b = nnx.State({"l": {"w": 1}}), nnx.State({"l": {"b": 2}})
    >>> nnx.merge_state(a, b).raw_mapping
    {'l': {'w': 1, 'b': 2}}

  Args:
    state: a `State`, or any nested mapping.
    *states: more of them; where two have the same path, the later one wins.
    cls: the class to make, `State` or a subclass.

  Returns:
    The State; with a single argument that is a `cls` already, it itself.

  Raises:
    ValueError: if a path of one leads through a leaf of another.
  """
  if not states:
    return state if isinstance(state, cls) else cls(state)
  parts = map(raw_mapping, (state, *states))
  return cls._from_nested(_engine.merge_mappings(*parts))


def diff(state: State[Any, Any], other: State[Any, Any]) -> State[Any, Any]:
  """Takes the part of a State at paths that another one does not have.

  Example:

    >>> import nnx
    >>> (nnx.State({"a": 1, "b": 2}) - nnx.State({"a": 3})).raw_mapping
    {'b': 2}

  Args:
    state: a `State`.
    other: the State whose paths are left out.

  Returns:
    A new State.
  """
  known = set(to_flat_state(other).paths)
  return from_flat_state(
    [pair for pair in to_flat_state(state) if pair[0] not in known]
  )


def to_pure_dict(
  state: Mapping[Any, Any], extract_fn: Callable[[Any], Any] | None = None
) -> dict[Any, Any]:
  """Makes nested dicts of the values of a State.

  It is the form that checkpoints keep: it depends on the names and the values
  alone. `replace_by_pure_dict` is the way back.

  Example:

    >>> import nnx
    >>> nnx.to_pure_dict(nnx.State({"a": {0: nnx.Param(1)}}))
    {'a': {0: 1}}

  Args:
    state: a `State`, or any nested mapping.
    extract_fn: makes a value of a leaf; by default the Variables' values.

  Returns:
    Nested dicts with keys in order.
  """
  if extract_fn is None:
    extract_fn = unwrap
  return unflatten_mapping(
    [(path, extract_fn(leaf)) for path, leaf in to_flat_state(state)]
  )


def replace_by_pure_dict(
  state: State[Any, Any],
  pure_dict: Mapping[Any, Any],
  replace_fn: Callable[[Any, Any], Any] | None = None,
) -> None:
  """Sets the leaves of a State from nested dicts, as `to_pure_dict` makes them.

  Keys that a checkpoint has turned from int to str are matched, and the value
  of a Variable may be in a dict under `value`, as orbax gives it.

  Example:

    >>> import nnx
    >>> state = nnx.State({"a": {0: nnx.Param(1)}})
    >>> nnx.replace_by_pure_dict(state, {"a": {"0": 5}})
    >>> state.a[0].value
    5

  Args:
    state: a `State`, whose leaves are replaced; the Variables in it are not
      written to, new ones take their place.
    pure_dict: nested dicts of values, for all of the leaves or for some.
    replace_fn: makes the new leaf of the old leaf and the value; by default a
      Variable of the same kind and metadata, or the value itself.

  Raises:
    ValueError: if `pure_dict` has a path that `state` has not, or something
      else than an array where a Variable of an array is.
  """
  replace_in(state._mapping, pure_dict, replace_fn, ())


def raw_mapping(state: Mapping[Any, Any]) -> dict[Any, Any]:
  """Returns the dict that a State wraps; another mapping as a dict.

  Example:

    >>> import nnx
    >>> from nnx.statelib import raw_mapping
    >>> raw_mapping(nnx.State({"a": 1}))
    {'a': 1}

  Args:
    state: a `State`, or any nested mapping.

  Returns:
    The dict of the State, or the dict given, itself; a nested dict with the
    same leaves for mappings of other types.

  Raises:
    TypeError: if it is not a mapping.
  """
  if isinstance(state, State):
    return state._mapping
  if type(state) is dict:
    return state
  if isinstance(state, collections.abc.Mapping):
    return copy_mapping(state)
  raise TypeError(
    "A State or a nested mapping must be given, but got a"
    f" `{type(state).__name__}`."
  )


def _split(
  state: Mapping[Any, Any], filters: Sequence[Filter], *, exhaustive: bool
) -> Any:
  parts = _engine.split_mapping(
    raw_mapping(state), filterlib.engine_filters(filters), exhaustive
  )
  cls = type(state) if isinstance(state, State) else State
  return one_or_tuple([cls._from_nested(part) for part in parts])
