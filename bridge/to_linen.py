"""nnx Modules as Linen modules."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

from flax import core, linen
from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np

from bridge import to_nnx
from bridge import variables as variables_lib
import nnx

# The collection of what is not a variable of the nnx Module: its graphdef, and
# arrays that are plain attributes.
COLLECTION = "nnx"
_GRAPHDEF = "graphdef"
_ARRAYS = "arrays"


class ToLinen(linen.Module):
  """An nnx Module as a Linen module.

  `init` makes the Module, once. Its Variables become Linen variables in the
  collections that go with their types, and its structure, a
  `nnx.graph.NodeDef`, goes into the collection `nnx`. `apply` merges the two:
  it never constructs the Module again.

  Example:

    >>> import bridge, jax, nnx
    >>> model = bridge.ToLinen(nnx.Linear, args=(32, 64))
    >>> x = jax.numpy.ones((1, 32))
    >>> y, variables = model.init_with_output(jax.random.key(0), x)
    >>> y.shape, variables["params"]["kernel"].shape
    ((1, 64), (32, 64))
    >>> variables.keys()
    dict_keys(['nnx', 'params'])
    >>> type(variables["nnx"]["graphdef"])
    <class 'nnx.graph.NodeDef'>

  Random streams of the Module are not stored. In each call they start anew from
  the keys that the Linen module is given under their names, or else under
  `params`.

  Args:
    nnx_class: the class of the Module, or a function that makes it.
    args: its arguments.
    kwargs: its keyword arguments, without `rngs`.
    skip_rng: whether the Module takes no `rngs`.
    metadata_type: the box of Variables that have metadata, called with the
      type, the value and the metadata; `None` for bare values.
    metadata_fn: in place of it, a function from a Variable to what is stored.
    abstract_init: if there is no stored graphdef, whether to make the Module
      abstractly, without computing its arrays, to get one. It is kept for later
      calls either way.
    store_graphdef: whether to store the graphdef among the variables.
  """

  nnx_class: Callable[..., nnx.Module]
  args: Sequence[Any] = ()
  kwargs: Mapping[str, Any] = dataclasses.field(
    default_factory=lambda: core.FrozenDict({})
  )
  skip_rng: bool = False
  metadata_type: Any = variables_lib.NNXMeta
  metadata_fn: Callable[[nnx.Variable[Any]], Any] | None = None
  abstract_init: bool = True
  store_graphdef: bool = True

  @linen.compact
  def __call__(
    self,
    *args: Any,
    nnx_method: Callable[..., Any] | str | None = None,
    **kwargs: Any,
  ) -> Any:
    """Calls the Module.

    Args:
      *args: the arguments.
      nnx_method: a method of the Module, or its name, in place of `__call__`.
      **kwargs: the keyword arguments.

    Returns:
      What the Module returns.

    Raises:
      ValueError: if variables of the Module are missing.
    """
    method = _method_of(self.nnx_class, nnx_method)
    if not self.is_initializing():
      module, defaulted = self._load()
      result = method(module, *args, **kwargs)
      _check_streams(self, defaulted)
      self._store(module)
      return result
    module = self._make()
    # As in Linen, what the call itself changes is not part of `init`; but Linen
    # modules inside of the Module get their variables in the call.
    stored = nnx.clone(module)
    with to_nnx.running(initializing=True):
      result = method(module, *args, **kwargs)
    if _holds_linen(module):
      nnx.pop(module, nnx.Intermediate)
      stored = module
    # A lifted `init` may not hand this collection on: then `apply` makes it.
    if self.store_graphdef and self.is_mutable_collection(COLLECTION):
      graphdef, arrays = _structure(stored)
      self.put_variable(COLLECTION, _GRAPHDEF, graphdef)
      if arrays:
        self.put_variable(COLLECTION, _ARRAYS, arrays)
    self._store(stored)
    return result

  def __getattr__(self, name: str) -> Any:
    if not name.startswith("_"):
      fields = vars(self)
      if name in fields.get("kwargs", ()):
        return fields["kwargs"][name]
      method = getattr(fields.get("nnx_class"), name, None)
      if callable(method):
        return functools.partial(self.__call__, nnx_method=method)
    return super().__getattribute__(name)

  def _make(self) -> nnx.Module:
    """Constructs the Module, with the keys of this Linen module."""
    kwargs = dict(self.kwargs)
    if not self.skip_rng:
      keys = {name: self.make_rng(name) for name in self.scope.rngs}
      if "default" not in keys and "params" in keys:
        keys["default"] = keys["params"]
      kwargs["rngs"] = nnx.Rngs(**keys)
    return self.nnx_class(*self.args, **kwargs)

  def _load(self) -> tuple[nnx.Module, dict[str, list[nnx.Variable[Any]]]]:
    """The Module of the stored graphdef and the current variables.

    Also returns, by name, the counters of the random streams for which there
    was no key.
    """
    given = dict(self.scope.variables())
    stored = given.pop(COLLECTION, {})
    graphdef = stored.get(_GRAPHDEF)
    arrays = stored.get(_ARRAYS, {})
    if graphdef is None:
      graphdef, arrays = _rebuilt(self)
    layout = _layout(graphdef)
    state: dict[Any, Any] = {}
    for slot in layout.slots:
      source = (
        arrays if slot.collection is None else given.get(slot.collection, {})
      )
      value = _lookup(source, slot.path)
      if value is _MISSING:
        raise ValueError(_missing_text(self, slot, given))
      if isinstance(value, meta.AxisMetadata):
        value = variables_lib.to_nnx_var(slot.collection, value)
      elif isinstance(value, np.ndarray):  # of a checkpoint, perhaps read-only
        value = jnp.asarray(value)
      _put(state, slot.path, value)
    defaulted = self._seed(layout, state)
    module = nnx.merge(graphdef, state)
    for collection, tree in given.items():
      if _size(tree) == layout.sizes.get(collection, 0):
        continue  # all of them found their slots
      for path, value in _leaves(tree):
        if (collection, *map(str, path)) not in layout.known:
          variable = variables_lib.to_nnx_var(collection, value)
          if not _add(module, path, variable):
            raise ValueError(
              f"The variables given to {_describe(self)} must be its own, but"
              f" `{'/'.join(map(str, path))}` in the collection `{collection}`"
              " has no place in it. Leave it out, or pass the variables that"
              " `init` returned."
            )
    return module, defaulted

  def _seed(self, layout: Layout, state: dict[Any, Any]) -> dict[str, list]:
    """Puts fresh random streams into `state`."""
    defaulted: dict[str, list] = {}
    for tag, paths in layout.streams.items():
      # A Module made of one key has one stream, `default`, for everything.
      others = ("dropout", *sorted(self.scope.rngs)) if tag == "default" else ()
      names = (tag, "params", *others)
      name = next((n for n in names if self.has_rng(n)), None)
      if name is None:
        keys = [jax.random.key(0)] * len(paths)
      else:
        key = self.make_rng(name)
        if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
          key = jax.random.wrap_key_data(key)
        keys = [key] if len(paths) == 1 else jax.random.split(key, len(paths))
      for path, key in zip(paths, keys):
        count = nnx.RngCount(np.zeros((), np.uint32), tag=tag)
        metadata = {to_nnx.NO_KEY: True} if name is None else {}
        _put(state, (*path, "key"), nnx.RngKey(key, tag=tag, **metadata))
        _put(state, (*path, "count"), count)
        if name is None:
          defaulted.setdefault(tag, []).append((count, count.raw_value))
    return defaulted

  def _store(self, module: nnx.Module) -> None:
    """Puts the Module's Variables into the collections that may be written."""
    if self.scope.mutable is False:
      return
    grouped: dict[str, dict[Any, Any]] = {}
    state = nnx.state(module, nnx.All(nnx.Variable, nnx.Not(nnx.RngState)))
    for path, variable in nnx.to_flat_state(state):
      collection = nnx.variable_name_from_type(
        type(variable), allow_register=True
      )
      if self.is_mutable_collection(collection):
        tree = grouped.setdefault(collection, {})
        _put(tree, path, self._boxed(variable))
    for collection, tree in grouped.items():
      for name, value in tree.items():
        self.put_variable(collection, name, value)

  def _boxed(self, variable: nnx.Variable[Any]) -> Any:
    """What is stored for a Variable."""
    if self.metadata_fn is not None:
      return self.metadata_fn(variable)
    if self.metadata_type is None:
      return variable.raw_value
    boxed = variables_lib.to_linen_var(variable)
    if type(boxed) is variables_lib.NNXMeta:
      return self.metadata_type(boxed.var_type, boxed.value, boxed.metadata)
    return boxed


_MISSING = object()


@dataclasses.dataclass(frozen=True)
class Slot:
  """Where a Variable or array of a graphdef is among the Linen variables."""

  collection: str | None  # None: an array that is a plain attribute
  path: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
  """The leaves of a graphdef: stored ones, and random streams by name."""

  slots: tuple[Slot, ...]
  streams: Mapping[str, list[tuple[Any, ...]]]
  known: frozenset[tuple[str, ...]]  # collections and paths, as strings
  sizes: Mapping[str, int]  # how many slots a collection has


@functools.lru_cache(maxsize=1024)
def _layout(graphdef: nnx.GraphDef) -> Layout:
  slots: list[Slot] = []
  streams: dict[str, list[tuple[Any, ...]]] = {}
  for path, type_, metadata in graphdef.leaf_records():
    if type_ is None:
      slots.append(Slot(None, path))
    elif issubclass(type_, nnx.RngKey):
      streams.setdefault(metadata["tag"], []).append(path[:-1])
    elif not issubclass(type_, nnx.RngState):
      name = nnx.variable_name_from_type(type_, allow_register=True)
      slots.append(Slot(name, path))
  known = frozenset(
    (slot.collection, *map(str, slot.path)) for slot in slots if slot.collection
  )
  sizes = collections.Counter(slot.collection for slot in slots)
  return Layout(tuple(slots), streams, known, sizes)


def _structure(module: nnx.Module) -> tuple[nnx.GraphDef, dict[Any, Any]]:
  """The graphdef of a Module, and its arrays that are not in Variables."""
  graphdef, _, arrays = nnx.split(module, nnx.Variable, ...)
  return graphdef, arrays.raw_mapping


@functools.lru_cache(maxsize=256)
def _built(
  nnx_class: Any, args: tuple, kwargs: tuple, skip_rng: bool, abstract: bool
) -> tuple[nnx.GraphDef, dict[Any, Any]]:
  def build():
    rngs = {} if skip_rng else {"rngs": nnx.Rngs(0)}
    return _structure(nnx_class(*args, **dict(kwargs), **rngs))

  return jax.eval_shape(build) if abstract else build()


def _rebuilt(model: ToLinen) -> tuple[nnx.GraphDef, dict[Any, Any]]:
  """The structure of a Module whose graphdef was not stored: made once."""
  graphdef, arrays = _built(
    model.nnx_class,
    tuple(model.args),
    tuple(sorted(model.kwargs.items())),
    model.skip_rng,
    model.abstract_init,
  )
  if arrays and model.abstract_init:
    raise ValueError(
      f"{_describe(model)} has arrays that are not in Variables, so its stored"
      " graphdef is needed, but the variables have no collection `nnx`. Keep it"
      " (`store_graphdef=True`), or make the arrays Variables, or pass"
      " `abstract_init=False`."
    )
  return graphdef, arrays


def _holds_linen(module: nnx.Module) -> bool:
  return any(
    isinstance(value, to_nnx.ToNNX) for _, value in nnx.iter_modules(module)
  )


def _method_of(cls: Any, method: Any) -> Callable[..., Any]:
  """The function to call with the Module as its first argument."""
  if callable(method):
    return method
  name = method or "__call__"
  if not isinstance(name, str):
    raise TypeError(
      f"`nnx_method` must be a function or the name of a method, but got"
      f" {method!r}."
    )
  if isinstance(cls, type) and not callable(getattr(cls, name, None)):
    raise AttributeError(
      f"`nnx_method` must name a method of `{cls.__name__}`, but it has no"
      f" `{name}`."
    )
  return lambda module, *args, **kwargs: getattr(module, name)(*args, **kwargs)


def _describe(model: ToLinen) -> str:
  name = getattr(model.nnx_class, "__name__", repr(model.nnx_class))
  path = "/".join(model.scope.path) if model.scope is not None else ""
  return f"`ToLinen({name})`" + (f" at `{path}`" if path else "")


def _missing_text(model: ToLinen, slot: Slot, collections: Mapping) -> str:
  path = "/".join(map(str, slot.path))
  return (
    f"{_describe(model)} needs the variable `{path}` in the collection"
    f" `{slot.collection or COLLECTION}`, but the variables given have"
    f" {sorted(collections) or 'no collections'}. Pass all the variables that"
    " `init` returned."
  )


def _check_streams(model: ToLinen, defaulted: Mapping[str, list]) -> None:
  """Refuses randomness for which nobody gave a key."""
  for tag, counters in defaulted.items():
    if any(count.raw_value is not before for count, before in counters):
      raise ValueError(
        f"{_describe(model)} drew random numbers from the stream `{tag}`, but"
        f" no key was given for it: pass `rngs={{{tag!r}: key}}` to `apply`."
      )


def _lookup(tree: Any, path: tuple[Any, ...]) -> Any:
  for key in path:
    if not isinstance(tree, Mapping):
      return _MISSING
    if key in tree:
      tree = tree[key]
    elif str(key) in tree:  # a checkpoint makes strings of ints
      tree = tree[str(key)]
    else:
      return _MISSING
  return tree


def _put(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value


def _size(tree: Any) -> int:
  """The number of leaves of nested mappings."""
  return sum(
    _size(value) if isinstance(value, (dict, Mapping)) else 1
    for value in tree.values()
  )


def _leaves(tree: Any, path: tuple[Any, ...] = ()):
  """The leaves of nested mappings."""
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _leaves(value, (*path, key))
    else:
      yield (*path, key), value


def _add(module: nnx.Module, path: tuple[Any, ...], value: Any) -> bool:
  """Adds a Variable that the graphdef does not have, such as a sown one.

  Returns:
    Whether there is a module for it, with the name free.
  """
  owner: Any = module
  for key in path[:-1]:
    if isinstance(owner, (list, tuple, nnx.List)) and str(key).isdigit():
      owner = owner[int(key)] if int(key) < len(owner) else None
    elif isinstance(owner, Mapping):
      owner = owner.get(key)
    else:
      owner = getattr(owner, str(key), None)
  if not isinstance(owner, nnx.Module) or path[-1] in vars(owner):
    return False
  setattr(owner, path[-1], value)
  return True


def to_linen(
  nnx_class: Callable[..., nnx.Module],
  *args: Any,
  name: str | None = None,
  **kwargs: Any,
) -> ToLinen:
  """`ToLinen` with the arguments of the Module given as one would give them.

  Example:

    >>> import bridge, jax, nnx
    >>> model = bridge.to_linen(nnx.Linear, 32, out_features=64)
    >>> model.init_with_output(jax.random.key(0), jax.numpy.ones((1, 32)))[
    ...   0
    ... ].shape
    (1, 64)

  Args:
    nnx_class: the class of the Module.
    *args: its arguments.
    name: the name of the Linen module.
    **kwargs: its keyword arguments, without `rngs`. The names of other fields
      of `ToLinen`, such as `skip_rng` and `metadata_fn`, set those.
  """
  fields = {key: kwargs.pop(key) for key in _OPTIONS if key in kwargs}
  return ToLinen(
    nnx_class, args=args, kwargs=core.FrozenDict(kwargs), name=name, **fields
  )


_OPTIONS = (
  "skip_rng",
  "metadata_type",
  "metadata_fn",
  "abstract_init",
  "store_graphdef",
)


def to_linen_class(
  base_nnx_class: Callable[..., nnx.Module],
  base_metadata_fn: Callable[[nnx.Variable[Any]], Any] | None = None,
  base_skip_rng: bool = False,
  *,
  base_metadata_type: Any = variables_lib.NNXMeta,
  **partial_kwargs: Any,
) -> type[ToLinen]:
  """A class of Linen modules that takes the arguments of one class of nnx.

  It may be derived from, and given to Linen's transforms, as any class of Linen
  modules.

  Example:

    >>> import bridge, jax, nnx
    >>> Dense = bridge.to_linen_class(nnx.Linear, use_bias=False)
    >>> variables = Dense(2, 3).init(jax.random.key(0), jax.numpy.ones((1, 2)))
    >>> list(variables["params"])
    ['kernel']

  Args:
    base_nnx_class: the class of the Module.
    base_metadata_fn: see `ToLinen`.
    base_skip_rng: whether the Module takes no `rngs`.
    base_metadata_type: see `ToLinen`.
    **partial_kwargs: keyword arguments of the Module, which those of the class
      override.

  Returns:
    The class. Its arguments are those of the Module, also as `args` and
    `kwargs`, and the other fields of `ToLinen`.
  """
  base = {
    "nnx_class": base_nnx_class,
    "skip_rng": base_skip_rng,
    "metadata_type": base_metadata_type,
    "metadata_fn": base_metadata_fn,
  }

  def init(self: ToLinen, *args: Any, **given: Any) -> None:
    fields = {
      name: given.pop(name)
      for name in ToLinen.__dataclass_fields__
      if name in given
    }
    kwargs = {**partial_kwargs, **fields.pop("kwargs", {}), **given}
    args = args or tuple(fields.pop("args", ()))
    ToLinen.__init__(  # type: ignore[call-arg]
      self,
      **{**base, **fields},
      args=args,
      kwargs=core.FrozenDict(kwargs),
    )

  class Partial(ToLinen):
    def __init_subclass__(cls, **kwargs: Any) -> None:
      super().__init_subclass__(**kwargs)
      cls.__init__ = init  # in place of that of a dataclass

  # A class of its own, so that what is derived from it has this constructor.
  name = f"ToLinen{getattr(base_nnx_class, '__name__', '')}"
  return type(name, (Partial,), {"__module__": __name__})
