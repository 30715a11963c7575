"""nnx Modules as Linen modules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import operator
import types
from typing import Any

from flax import core, linen, serialization
from flax.core import meta
import jax
import jax.numpy as jnp
import numpy as np

import nnx

from . import layout as layout_lib
from . import to_linen_checks as checks
from . import to_nnx
from . import variables as variables_lib

# It has no arrays, and its classes and functions are those of the program.
for _type in (nnx.GraphDef, nnx.graph.NodeDef):
  serialization.register_serialization_state(
    _type, lambda _: {}, lambda target, _: target, override=True
  )


class ToLinen(linen.Module):
  """An nnx Module as a Linen module.

  `init` makes the Module, once. Its Variables become Linen variables in the
  collections that go with their types, and its structure, a
  `nnx.graph.NodeDef`, goes into the collection `nnx`. `apply` merges the two:
  it never constructs the Module again. If `nnx` is mutable there, it returns
  what the call has made of the structure.

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

  To `flax.serialization` the graphdef is empty: restored into variables that
  have one, it is theirs. Without one, or where it is not stored, each `apply`
  makes the Module again to learn its structure.

  Args:
    nnx_class: the class of the Module, or a function that makes it.
    args: its arguments.
    kwargs: its keyword arguments, without `rngs`.
    skip_rng: whether the Module takes no `rngs`.
    metadata_type: the box of Variables that have metadata, called with the
      type, the value and the metadata; `None` for bare values.
    metadata_fn: in place of it, a function from a Variable to what is stored.
    abstract_init: if there is no stored graphdef, whether to make the Module
      abstractly, without computing its arrays, to get one.
    store_graphdef: whether to store the graphdef among the variables.

  Raises:
    TypeError: if `nnx_class` makes no Modules, or another argument is not of
      its type.
    ValueError: if `rngs` are among `kwargs`.
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
    method = checks.method_of(self.nnx_class, nnx_method)
    if self.is_initializing():
      return self._initialize(method, args, kwargs)
    module, layout, defaulted = self._load()
    result = method(module, *args, **kwargs)
    checks.check_streams(self, defaulted)
    self._store(module)
    self._store_changes(module, layout)
    return result

  def _initialize(
    self,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
  ) -> Any:
    """Calls the Module in `init`: makes it, unless an earlier call has."""
    module = self._made_before()
    if module is not None:
      return method(module, *args, **kwargs)
    module = self._make()
    # As in Linen, what the call itself changes is not part of `init`; but Linen
    # modules inside of the Module get their variables in the call.
    stored = nnx.clone(module)
    with to_nnx.running(initializing=True):
      result = method(module, *args, **kwargs)
    if _holds_linen(module):
      nnx.pop(module, nnx.Intermediate)
      stored = module
    if self._stores_structure():
      self._put_structure(*layout_lib.structure_of(stored))
    self._store(stored)
    return result

  def __getattr__(self, name: str) -> Any:
    if not name.startswith("_"):
      fields = vars(self)
      if name in fields.get("kwargs", ()):
        return fields["kwargs"][name]
      method = getattr(fields.get("nnx_class"), name, None)
      if callable(method):

        def call(self: ToLinen, *args: Any, **kwargs: Any) -> Any:
          return self(*args, nnx_method=method, **kwargs)

        # A bound method, which `apply(..., method=name)` binds anew.
        return types.MethodType(call, self)
    return super().__getattribute__(name)

  def __post_init__(self) -> None:
    checks.check_arguments(self)
    super().__post_init__()

  def _make(self) -> nnx.Module:
    """Constructs the Module, with the keys of this Linen module."""
    kwargs = dict(self.kwargs)
    if not self.skip_rng:
      assert self.scope is not None
      keys = {name: self.make_rng(name) for name in self.scope.rngs}
      if "default" not in keys and "params" in keys:
        keys["default"] = keys["params"]
      kwargs["rngs"] = nnx.Rngs(**keys)
    return checks.check_made(self, self.nnx_class(*self.args, **kwargs))

  def _made_before(self) -> nnx.Module | None:
    """Returns the Module that an earlier call in this `init` made, if any."""
    assert self.scope is not None
    collections_ = self.scope.variables()
    made = any(
      collections_[name]
      for name in collections_
      if name != layout_lib.COLLECTION
    )
    if not made or _is_tabulated() or self._shares_scope():
      return None
    module = self._load()[0]
    return None if _holds_linen(module) else module

  def _load(self) -> tuple[nnx.Module, layout_lib.Layout, dict[str, list]]:
    """Returns the Module of the stored graphdef and the current variables.

    Also returns the layout of its graphdef and, by name, the counters of the
    random streams for which there was no key.
    """
    assert self.scope is not None
    given = dict(self.scope.variables())
    stored = given.pop(layout_lib.COLLECTION, {})
    graphdef = stored.get(layout_lib.GRAPHDEF)
    arrays = stored.get(layout_lib.ARRAYS, {})
    is_shared = self._shares_scope()
    if is_shared or not isinstance(graphdef, nnx.GraphDef):
      graphdef, rebuilt = _rebuilt(self, needs_arrays=not arrays)
      arrays = arrays or rebuilt
    layout = layout_lib.layout_of(graphdef)
    state: dict[Any, Any] = {}
    for slot in layout.slots:
      source = (
        arrays if slot.collection is None else given.get(slot.collection, {})
      )
      value = layout_lib.lookup(source, slot.path)
      if value is layout_lib.MISSING:
        raise ValueError(checks.missing_text(self, slot, given))
      if slot.boxed and isinstance(value, Mapping) and [*value] == ["value"]:
        value = value["value"]  # what a checkpoint makes of a box
      if isinstance(value, meta.AxisMetadata) and slot.collection is not None:
        value = variables_lib.to_nnx_var(slot.collection, value)
      elif isinstance(value, np.ndarray):  # of a checkpoint, perhaps read-only
        value = jnp.asarray(value)
      variables_lib.put(state, slot.path, value)
    defaulted = self._seed(layout, state)
    module = nnx.merge(graphdef, state)
    for collection, tree in given.items():
      if layout_lib.size(tree) == layout.sizes.get(collection, 0):
        continue  # all of them found their slots
      for path, value in layout_lib.unplaced(tree, (collection,), layout.known):
        variable = variables_lib.to_nnx_var(collection, value)
        if not is_shared and not layout_lib.add(module, path[1:], variable):
          raise ValueError(
            f"The variables given to {checks.describe(self)} must be its own,"
            f" but `{'/'.join(map(str, path[1:]))}` in the collection"
            f" `{collection}` has no place in it. Leave it out, or pass the"
            " variables that `init` returned."
          )
    return module, layout, defaulted

  def _seed(
    self, layout: layout_lib.Layout, state: dict[Any, Any]
  ) -> dict[str, list]:
    """Puts fresh random streams into `state`."""
    defaulted: dict[str, list] = {}
    assert self.scope is not None
    for tag, streams in layout.streams.items():
      # A Module made of one key has one stream, `default`, for everything.
      others = ("dropout", *sorted(self.scope.rngs)) if tag == "default" else ()
      names = (tag, "params", *others)
      name = next((n for n in names if self.has_rng(n)), None)
      if name is None:
        keys = [jax.random.key(0)] * len(streams)
      else:
        key = self.make_rng(name)
        if not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
          key = jax.random.wrap_key_data(key)
        size = len(streams)
        keys = [key] if size == 1 else jax.random.split(key, size)
      for (path, shape), key in zip(streams, keys):
        if shape:
          key = jax.random.split(key, shape)
        zeros: Any = np.zeros(shape, np.uint32)
        count = nnx.RngCount(zeros, tag=tag)
        metadata = {to_nnx.NO_KEY: True} if name is None else {}
        variables_lib.put(
          state, (*path, "key"), nnx.RngKey(key, tag=tag, **metadata)
        )
        variables_lib.put(state, (*path, "count"), count)
        if name is None:
          defaulted.setdefault(tag, []).append((count, count.raw_value))
    return defaulted

  def _store(self, module: nnx.Module) -> None:
    """Puts the Module's Variables into the collections that may be written."""
    assert self.scope is not None
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
        variables_lib.put(tree, path, self._boxed(variable))
    for collection, tree in grouped.items():
      for name, value in tree.items():
        self.put_variable(collection, name, value)

  def _stores_structure(self) -> bool:
    # A lifted `init` may not hand this collection on; then `apply` makes it. A
    # table of `nn.tabulate` shows arrays alone.
    return (
      self.store_graphdef
      and self.is_mutable_collection(layout_lib.COLLECTION)
      and not _is_tabulated()
      and not self._shares_scope()
    )

  def _shares_scope(self) -> bool:
    """Tells whether its variables are its parent's, by `nn.share_scope`."""
    parent = self.parent
    return isinstance(parent, linen.Module) and parent.scope is self.scope

  def _put_structure(self, graphdef: nnx.GraphDef, arrays: Any) -> None:
    self.put_variable(layout_lib.COLLECTION, layout_lib.GRAPHDEF, graphdef)
    if arrays:
      self.put_variable(layout_lib.COLLECTION, layout_lib.ARRAYS, arrays)

  def _store_changes(
    self, module: nnx.Module, layout: layout_lib.Layout
  ) -> None:
    """Stores what a call has changed that is not in Variables."""
    if not self._stores_structure():
      return

    def is_lost(path: tuple[Any, ...], value: Any) -> bool:
      # New, and either of one call only or not among what `apply` returns.
      if not isinstance(value, nnx.Variable) or isinstance(value, nnx.RngState):
        return False
      name = nnx.variable_name_from_type(type(value), allow_register=True)
      if (name, *map(str, path)) in layout.known:
        return False
      is_mutable = self.is_mutable_collection(name)
      return isinstance(value, nnx.Intermediate) or not is_mutable

    nnx.pop(module, is_lost)
    graphdef, arrays = layout_lib.structure_of(module)
    assert self.scope is not None
    stored = self.scope.variables().get(layout_lib.COLLECTION, {})
    before = jax.tree.leaves(stored.get(layout_lib.ARRAYS, {}))
    after = jax.tree.leaves(arrays)
    is_same = len(before) == len(after) and all(
      map(operator.is_, before, after)
    )
    if graphdef != stored.get(layout_lib.GRAPHDEF) or not is_same:
      self._put_structure(graphdef, arrays)

  def _boxed(self, variable: nnx.Variable[Any]) -> Any:
    """Returns what is stored for a Variable."""
    if self.metadata_fn is not None:
      return self.metadata_fn(variable)
    if self.metadata_type is None:
      return variable.raw_value
    boxed = variables_lib.to_linen_var(variable)
    if type(boxed) is not variables_lib.NNXMeta:
      return boxed
    if _is_tabulated():
      return boxed.value
    box = self.metadata_type(boxed.var_type, boxed.value, boxed.metadata)
    if isinstance(box, meta.AxisMetadata) and box.unbox() is not boxed.value:
      raise ValueError(
        f"`metadata_type` of {checks.describe(self)} must make a box whose"
        " `unbox()` is the second of its arguments `(type, value, metadata)`,"
        f" but `{type(box).__name__}` does not. Use `metadata_fn` to store a"
        " Variable in a box of another kind."
      )
    return box


def _rebuilt(
  model: ToLinen, needs_arrays: bool
) -> tuple[nnx.GraphDef, dict[Any, Any]]:
  """Returns the structure of a Module whose graphdef was not stored."""

  def build():
    kwargs = dict(model.kwargs)
    if not model.skip_rng:
      assert model.scope is not None
      # Of the names that `init` had, so that each stream gets its own key.
      names = {"default", *model.scope.rngs}
      kwargs["rngs"] = nnx.Rngs(**dict.fromkeys(sorted(names), 0))
    made = model.nnx_class(*model.args, **kwargs)
    return layout_lib.structure_of(checks.check_made(model, made))

  graphdef, arrays = jax.eval_shape(build) if model.abstract_init else build()
  if arrays and needs_arrays and model.abstract_init:
    raise ValueError(
      f"{checks.describe(model)} has arrays that are not in Variables, so its"
      " stored graphdef is needed, but the variables have no collection `nnx`."
      " Keep it (`store_graphdef=True`), or make the arrays Variables, or pass"
      " `abstract_init=False`."
    )
  return graphdef, arrays


def _is_tabulated() -> bool:
  """Tells whether `nn.tabulate` is looking."""
  return bool(linen.module._context.call_info_stack)


def _holds_linen(module: nnx.Module) -> bool:
  return any(
    isinstance(value, to_nnx.ToNNX) for _, value in nnx.iter_modules(module)
  )


def to_linen(
  nnx_class: Callable[..., nnx.Module],
  *args: Any,
  name: str | None = None,
  **kwargs: Any,
) -> ToLinen:
  """Makes a `ToLinen` from arguments as the Module itself takes them.

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
  """Makes a Linen class that takes the arguments of one class of nnx.

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
      # In place of that of a dataclass.
      cls.__init__ = init  # type: ignore[assignment, method-assign]

  # A class of its own, so that what is derived from it has this constructor.
  name = f"ToLinen{getattr(base_nnx_class, '__name__', '')}"
  return type(name, (Partial,), {"__module__": __name__})
