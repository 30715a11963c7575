"""Objects of `flax.nnx` as objects of `nnx`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import inspect
import types
from typing import Any, cast

from flax import core
import jax
from jax import core as jax_core

import nnx

from . import to_nnx
from .flax_nnx import flax_nnx

# Attributes of Flax's objects that say nothing here.
_THEIRS_ALONE = {"Optimizer": ("graph",), "ModelAndOptimizer": ("graph",)}
# Attributes that our attention layer has besides, called as its parameters.
_ATTENTION_OPTIONS = (
  "window",
  "softcap",
  "rope_base",
  "rope_scale",
  "rope_dim",
  "rope_interleaved",
  "rope_scaling",
  "is_causal",
)
# Metadata that says how Flax keeps a Variable.
_THEIR_METADATA = frozenset(
  "is_hijax has_ref is_mutable hijax ref mutable eager_sharding".split()
)


def from_flax_nnx(module: Any, known: Mapping[Any, Any] | None = None) -> Any:
  """Converts a Module of `flax.nnx` to ours, with its layers and weights.

  Layers, containers, random streams, optimizers and metrics of `flax.nnx` are
  known, those of exactly these classes. What is shared stays shared. Arrays are
  copied, so that either model may be trained and its buffers donated. Objects
  of ours, and pytrees of any kind, are copied for what is of `flax.nnx` below.

  For classes of one's own, `known` says what they become: a class of ours,
  whose objects get the same attributes, converted; or a function of the object
  and of a function that converts its parts. Kinds of Variables may be given in
  it as well; those that are not become a kind of the same collection.

  Example:

    >>> import bridge, nnx
    >>> from flax import nnx as flax_nnx
    >>> theirs = flax_nnx.Linear(2, 3, rngs=flax_nnx.Rngs(0))
    >>> ours = bridge.from_flax_nnx(theirs)
    >>> type(ours) is nnx.Linear
    True
    >>> bool((ours.kernel[...] == theirs.kernel[...]).all())
    True

    >>> class Theirs(flax_nnx.Module):
    ...   def __init__(self, rngs):
    ...     self.layer = flax_nnx.Linear(2, 3, rngs=rngs)
    >>> class Ours(nnx.Module):
    ...   def __call__(self, x):
    ...     return self.layer(x)
    >>> model = bridge.from_flax_nnx(Theirs(flax_nnx.Rngs(0)), {Theirs: Ours})
    >>> type(model.layer) is nnx.Linear
    True

  Args:
    module: a Module, Variable, State or other object of `flax.nnx`, or a pytree
      or an object of ours that holds such.
    known: classes of Flax to classes of ours, or to functions.

  Returns:
    The object of ours.

  Raises:
    ValueError: if there are objects of classes that are not known; it lists
      them all, with their paths.
  """
  converter = _Converter(known or {})
  result = converter.convert(module, ())
  if converter.unknown:
    listed = "; ".join(
      f"`{'/'.join(map(str, path)) or '.'}` is a"
      f" `{cls.__module__}.{cls.__qualname__}`"
      for path, cls in converter.unknown
    )
    name = converter.unknown[0][1].__name__
    raise ValueError(
      "Every object must be of a class of `flax.nnx` itself or of one in"
      f" `known`, but {listed}. Pass `known={{{name}: ...}}` with a class of"
      " ours for each: its objects get the same attributes."
    )
  return result


class _Converter:
  """Converts a graph of objects, each once."""

  def __init__(self, known: Mapping[Any, Any]):
    self.known = {**_classes(), **known}
    self.unknown: list[tuple[tuple[Any, ...], type]] = []
    self._done: dict[int, Any] = {}
    self._kept: list[Any] = []  # so that ids stay those of one object

  def convert(self, value: Any, path: tuple[Any, ...]) -> Any:
    if id(value) in self._done:
      return self._done[id(value)]
    cls = type(value)
    if isinstance(value, (flax_nnx.Variable, nnx.Variable)):
      return self._keep(value, self._variable(value, path))
    if cls in self.known or isinstance(value, (flax_nnx.Pytree, nnx.Pytree)):
      return self._object(value, path)
    if isinstance(value, flax_nnx.State):
      items = {k: self.convert(v, (*path, k)) for k, v in value.items()}
      return self._keep(value, nnx.State(items))
    if isinstance(value, jax.Array):
      return self._keep(value, _copied(value))
    if cls is dict:
      result: Any = self._keep(value, {})
      for key, item in value.items():
        result[key] = self.convert(item, (*path, key))
      return result
    if cls is list:
      result = self._keep(value, [])
      result.extend(self.convert(x, (*path, i)) for i, x in enumerate(value))
      return result
    if isinstance(value, tuple):
      given = [self.convert(x, (*path, i)) for i, x in enumerate(value)]
      return cls(*given) if hasattr(cls, "_fields") else cls(given)
    if isinstance(value, types.MethodType):
      owner = self.convert(value.__self__, path)
      return getattr(owner, value.__name__, value)
    if isinstance(value, functools.partial):
      parts = value.func, value.args, value.keywords
      func, args, keywords = (self.convert(x, path) for x in parts)
      return cls(func, *args, **keywords)
    if isinstance(value, flax_nnx.GraphDef):
      raise ValueError(
        "A graphdef of `flax.nnx` must be given as the object it describes,"
        f" but `{'/'.join(map(str, path)) or '.'}` is one. Pass"
        " `flax.nnx.merge(graphdef, state)`."
      )
    if isinstance(value, flax_nnx.statelib.FlatState):
      state = nnx.from_flat_state(
        [(key, self.convert(x, (*path, *key))) for key, x in value]
      )
      return nnx.to_flat_state(state)
    # Any other pytree, one level of it.
    parts, treedef = jax.tree.flatten(value, is_leaf=lambda x: x is not value)
    if parts and parts[0] is not value:
      inner = [self.convert(x, (*path, i)) for i, x in enumerate(parts)]
      return self._keep(value, treedef.unflatten(inner))
    result = self.static(value)
    if result is value and cls.__module__.startswith(("flax.nnx", "_flax_nnx")):
      if not isinstance(value, type):
        self.unknown.append((path, cls))
    return result

  def _keep(self, value: Any, result: Any) -> Any:
    self._kept.append(value)
    self._done[id(value)] = result
    return result

  def _object(self, value: Any, path: tuple[Any, ...]) -> Any:
    cls: Any = type(value)
    if cls in (flax_nnx.List, nnx.List):
      result = self._keep(value, nnx.List())
      for index, item in enumerate(value):
        result.append(self.convert(item, (*path, index)))
      return result
    is_ours = isinstance(value, nnx.Pytree)
    target = self.known.get(cls, cls if is_ours else None)
    if target is None:
      self.unknown.append((path, cls))
      self._keep(value, None)
      for name, item in _attributes(value).items():
        self.convert(item, (*path, name))  # to list what is unknown below it
      return None
    if not isinstance(target, type):
      return self._keep(
        value, target(value, functools.partial(self.convert, path=path))
      )
    # Past the constructor, which would make other weights.
    result = self._keep(value, cast(Any, target).__new__(target))
    defaults = _defaults(cls, cast(Any, target))
    for name, item in _attributes(value).items():
      if id(item) in defaults and item is defaults[id(item)][0]:
        converted = defaults[id(item)][1]
      else:
        converted = self.convert(item, (*path, name))
      if name == "batch_axis" and isinstance(item, core.FrozenDict):
        layers: Any = nnx.nn  # whose modules are no part of its type
        converted = layers.linear.AxisSizes(item)
      if isinstance(converted, (dict, list, tuple)) and nnx.has_data(converted):
        converted = nnx.data(converted)
      setattr(result, name, converted)
    _complete(result)
    return result

  def _variable(self, variable: Any, path: tuple[Any, ...]) -> Any:
    metadata = {
      name: self.static(item)
      for name, item in variable.get_metadata().items()
      if name not in _THEIR_METADATA and item not in ((), None)
    }
    cls = type(variable)
    kind = cls if isinstance(variable, nnx.Variable) else self._kind(cls)
    value = variable.get_raw_value()
    if isinstance(value, jax.Ref):
      value = value[...]
    value = jax.tree.map(
      lambda x: self.convert(x, path),
      value,
      is_leaf=lambda x: isinstance(x, (flax_nnx.Variable, nnx.Variable)),
    )
    return kind.from_metadata(value, metadata)

  def _kind(self, cls: type) -> Any:
    if cls in self.known:
      return self.known[cls]
    name = flax_nnx.variable_name_from_type(cls, allow_register=True)
    return nnx.variable_type_from_name(name, allow_register=True)

  def static(self, value: Any) -> Any:
    """Converts what is not data: functions, types and filters of Flax."""
    if isinstance(value, type):
      if issubclass(value, flax_nnx.Variable):
        return self._kind(value)
      return self.known.get(value, value)
    if isinstance(value, flax_nnx.StateAxes):
      return nnx.StateAxes(
        [
          (self.static(filter_), self.static(axis))
          for filter_, axis in zip(value.filters, value.axes)
        ]
      )
    if type(value) in (tuple, set, frozenset):
      return type(value)(self.static(x) for x in value)
    if type(value) in _filters():
      ours = _filters()[type(value)]
      fields = {k: self.static(v) for k, v in vars(value).items()}
      if "predicates" in fields:
        return ours(*fields["predicates"])
      return ours(**fields)
    return _functions().get(id(value), value) if callable(value) else value


def _complete(layer: Any) -> None:
  """Sets the attributes that only our layers have, to do what Flax's do."""
  added: dict[str, Any] = {}
  if type(layer) is nnx.GroupNorm:
    added["num_features"] = layer.num_groups * layer.group_size
  elif type(layer) is nnx.MultiHeadAttention:
    parameters = inspect.signature(nnx.MultiHeadAttention).parameters
    for name in _ATTENTION_OPTIONS:
      added[name] = parameters[name].default
    added |= dict.fromkeys(
      ("cached_key_scale", "cached_value_scale", "block_size")
    )
  for name, value in added.items():
    setattr(layer, name, value)


def _copied(array: jax.Array) -> jax.Array:
  if isinstance(array, jax_core.Tracer):
    return array
  if jax.numpy.issubdtype(array.dtype, jax.dtypes.prng_key):
    return jax.random.clone(array)
  return jax.numpy.copy(array)


def _attributes(value: Any) -> dict[str, Any]:
  skipped = _THEIRS_ALONE.get(type(value).__name__, ())
  return {
    name: item
    for name, item in vars(value).items()
    if not name.startswith("_pytree__") and name not in skipped
  }


@functools.cache
def _classes() -> dict[type, type]:
  """Maps the classes of `flax.nnx` to those of the same names here."""
  pairs: dict[type, Any] = {flax_nnx.bridge.ToNNX: to_nnx.ToNNX}
  for theirs, ours in (
    (flax_nnx, nnx),
    (flax_nnx.metrics, getattr(nnx, "metrics", None)),
    (flax_nnx.optimizer, nnx),
  ):
    for name in dir(theirs):
      cls, target = getattr(theirs, name), getattr(ours, name, None)
      if (
        isinstance(cls, type)
        and isinstance(target, type)
        and issubclass(cls, (flax_nnx.Pytree, flax_nnx.Variable))
      ):
        pairs[cls] = target
  pairs[flax_nnx.Carry] = nnx.Carry
  return pairs


@functools.cache
def _filters() -> dict[type, Any]:
  theirs = flax_nnx.filterlib
  names = "OfType WithTag PathContains PathIn Any All Not Everything Nothing"
  return {
    getattr(theirs, name): getattr(nnx.filters, name)
    for name in names.split()
    if hasattr(theirs, name)
  }


@functools.cache
def _functions() -> dict[int, Callable[..., Any]]:
  """Maps functions of `flax.nnx`, by identity, to those of the same names."""
  return {
    id(getattr(flax_nnx, name)): getattr(nnx, name)
    for name in dir(flax_nnx)
    if inspect.isfunction(getattr(flax_nnx, name))
    and callable(getattr(nnx, name, None))
  }


@functools.cache
def _defaults(cls: Any, target: Any) -> dict[int, tuple[Any, Any]]:
  """Maps functions that are defaults of Flax's layer to those of ours."""
  try:
    theirs = inspect.signature(cls.__init__).parameters
    ours = inspect.signature(target.__init__).parameters
  except ValueError:
    return {}
  return {
    id(parameter.default): (parameter.default, ours[name].default)
    for name, parameter in theirs.items()
    if callable(parameter.default)
    and parameter.default is not inspect.Parameter.empty
    and name in ours
    and callable(ours[name].default)
    and ours[name].default is not inspect.Parameter.empty
  }
