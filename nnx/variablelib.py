"""Variables: mutable boxes around the arrays of a model.

`Variable` is a Python class on a C++ base, `_engine.VariableBase`, which holds
the raw value, the metadata and the trace in which it was made, and which serves
the common accesses without running Python. What is rare is here: hooks,
metadata, placement, operators, displays.

Hooks are functions `hook(variable, value) -> value` kept in the metadata under
`on_set_value`, `on_get_value` and `on_create_value`, and functions
`hook(variable, axis_index, axis_name)` under `on_add_axis` and
`on_remove_axis`. The names that Flax 0.10 gave them, `set_value_hooks` and so
on, are accepted wherever hooks are, and mean the same.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Iterator, Mapping, MutableMapping
import copy
import functools
import math
import operator
import threading
from typing import Any, Generic, TypeVar

import jax
import numpy as np

from nnx import partitioning, reprlib, tracers
from nnx.engine import _engine, pytrees

A = TypeVar("A")
B = TypeVar("B")
V = TypeVar("V", bound="Variable[Any]")
F = TypeVar("F", bound=Callable[..., Any])


class _Missing:
  def __repr__(self) -> str:
    return "<missing>"


MISSING = _Missing()

# Flax 0.10's names of the hooks, and those under which they are stored.
HOOK_ALIASES = {
  "set_value_hooks": "on_set_value",
  "get_value_hooks": "on_get_value",
  "create_value_hooks": "on_create_value",
  "add_axis_hooks": "on_add_axis",
  "remove_axis_hooks": "on_remove_axis",
}
_HOOK_NAMES = frozenset(HOOK_ALIASES.values())
_ALIASED_NAMES = frozenset(HOOK_ALIASES) | frozenset(partitioning.SHARDING_KEYS)

# Metadata by which Flax says how it keeps a Variable.
_FLAX_METADATA = frozenset(
  "is_hijax has_ref is_mutable hijax ref mutable eager_sharding".split()
)

# Bits of the engine's hook flags.
_GET_HOOK, _SET_HOOK, _CREATE_HOOK = 1, 2, 4


# Settings


class _Settings(threading.local):
  eager_sharding = True
  ref = False


_settings = _Settings()


class use_eager_sharding:
  """Sets whether new Variables with a sharding annotation are placed at once.

  Works from the call on, and as a context manager for a block.

  Example:

    >>> import nnx
    >>> with nnx.use_eager_sharding(False):
    ...   nnx.using_eager_sharding()
    False
    >>> nnx.using_eager_sharding()
    True

  Args:
    value: whether arrays are placed when there is a mesh to place them on.
  """

  def __init__(self, value: bool, /):
    self._before = vars(_settings).get("eager_sharding")
    _settings.eager_sharding = bool(value)

  def __enter__(self) -> use_eager_sharding:
    return self

  def __exit__(self, *exc_info) -> None:
    if self._before is None:  # the default, whatever it is by now
      vars(_settings).pop("eager_sharding", None)
    else:
      _settings.eager_sharding = self._before


def using_eager_sharding() -> bool:
  """Whether new Variables with a sharding annotation are placed at once.

  Example:

    >>> import nnx
    >>> nnx.using_eager_sharding()
    True
  """
  return _settings.eager_sharding


class VarDefaults(collections.abc.Mapping):
  """What new Variables are made with; see `var_defaults`.

  Sets it from its making on, and as a context manager for a block.

  Example:

    >>> import nnx
    >>> dict(nnx.var_defaults())
    {'hijax': False, 'ref': False}
  """

  def __init__(self, ref: bool, before: bool):
    self.ref = ref
    self._before = before

  hijax = False

  def __getitem__(self, name: str) -> bool:
    if name not in ("hijax", "ref"):
      raise KeyError(name)
    return getattr(self, name)

  def __iter__(self) -> Iterator[str]:
    return iter(("hijax", "ref"))

  def __len__(self) -> int:
    return 2

  def __enter__(self) -> VarDefaults:
    return self

  def __exit__(self, *exc_info) -> None:
    _settings.ref = self._before


def var_defaults(
  *, hijax: bool | None = None, ref: bool | None = None
) -> VarDefaults:
  """Sets, or with no arguments tells, what new Variables are made with.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> with nnx.var_defaults(ref=True):
    ...   nnx.Param(jnp.zeros(2)).ref
    True
    >>> nnx.Param(jnp.zeros(2)).ref
    False

  Args:
    hijax: must not be `True`, see `normalize_metadata`.
    ref: whether new Variables hold their value in a mutable array of jax.

  Returns:
    The defaults, a mapping and a context manager.

  Raises:
    ValueError: if `hijax` is asked for.
  """
  if hijax:
    normalize_metadata({"hijax": True})
  before = _settings.ref
  if ref is not None:
    if ref:
      _route_construction_through_python()
    _settings.ref = bool(ref)
  return VarDefaults(_settings.ref, before)


# Whether the constructor must look at the defaults. It need not as long as no
# program has changed them, and then runs in the engine alone.
_defaults_changed = False


def _route_construction_through_python() -> None:
  global _defaults_changed
  if not _defaults_changed:
    _defaults_changed = True
    classes = [Variable]
    while classes:
      cls = classes.pop()
      cls._class_hook_flags |= _CREATE_HOOK
      classes.extend(cls.__subclasses__())


# Metadata


def as_hooks(hooks: Any) -> tuple[Callable[..., Any], ...]:
  """One hook, several, or none, as a tuple.

  Example:

    >>> from nnx.variablelib import as_hooks
    >>> as_hooks(len)
    (<built-in function len>,)
  """
  if hooks is None:
    return ()
  if callable(hooks):
    return (hooks,)
  return tuple(hooks)


def normalize_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
  """Copies metadata with hooks under their one name and no switch that is off.

  Example:

    >>> from nnx.variablelib import normalize_metadata
    >>> normalize_metadata({"get_value_hooks": (), "ref": False})
    {}
    >>> normalize_metadata({"get_value_hooks": len, "axis": 1})
    {'axis': 1, 'on_get_value': (<built-in function len>,)}

  Args:
    metadata: as given by a user.

  Returns:
    A new dict.

  Raises:
    ValueError: if two spellings of one thing are given and differ, or if
      `hijax` is asked for.
  """
  result = {}
  for name, value in metadata.items():
    if name in HOOK_ALIASES or name in _HOOK_NAMES:
      continue
    if name in ("hijax", "ref") and not value:
      continue
    result[name] = value
  for alias, name in HOOK_ALIASES.items():
    hooks = as_hooks(metadata.get(name))
    other = as_hooks(metadata.get(alias))
    if hooks and other and hooks != other:
      raise ValueError(
        f"Hooks must be given by one name, but `{name}={hooks}` and"
        f" `{alias}={other}` were given. Put them into one tuple."
      )
    if hooks or other:
      result[name] = hooks or other
  if result.get("hijax"):
    raise ValueError(
      "Variables of jax's experimental `hijax` are not made here, but got"
      " `hijax=True`. Use `ref=True` for a Variable that plain jax transforms"
      " can write, or pass the Variable through `nnx.jit` and the like."
    )
  given = [key for key in partitioning.SHARDING_KEYS if key in result]
  if len(given) > 1:
    first, *rest = given
    for key in rest:
      if result[key] != result[first]:
        raise ValueError(
          f"A sharding annotation must be given by one name, but `{first}="
          f"{result[first]!r}` and `{key}={result[key]!r}` were given."
        )
      del result[key]
  return result


class VariableMetadata(Generic[A]):
  """A value together with the metadata of the Variable that is to hold it.

  Initializers wrapped by `with_metadata` return it; a Variable made from it
  takes the value, the hooks and the metadata.

  Example:

    >>> import nnx
    >>> box = nnx.VariableMetadata(1.0, metadata={"axis": "embed"})
    >>> nnx.Param(box).axis
    'embed'

  Args:
    raw_value: the value.
    set_value_hooks: hooks run on values before they are stored.
    get_value_hooks: hooks run on values when they are read.
    create_value_hooks: hooks run on the first value.
    add_axis_hooks: hooks run when a transform adds an axis.
    remove_axis_hooks: hooks run when a transform removes an axis.
    metadata: further metadata.
    **hooks: the same hooks by the names `on_set_value` and so on.
  """

  def __init__(
    self,
    raw_value: A,
    set_value_hooks: Any = (),
    get_value_hooks: Any = (),
    create_value_hooks: Any = (),
    add_axis_hooks: Any = (),
    remove_axis_hooks: Any = (),
    metadata: Mapping[str, Any] | None = None,
    **hooks: Any,
  ):
    for name in hooks:
      if name not in _HOOK_NAMES:
        raise TypeError(
          "`VariableMetadata` takes hooks by the names"
          f" {sorted(_HOOK_NAMES)}, but got `{name}`. Other metadata goes into"
          " `metadata`."
        )
    self.raw_value = raw_value
    # Hooks may also come inside `metadata`, where they must not stay.
    everything = normalize_metadata(
      {
        **(metadata or {}),
        **{k: v for k, v in hooks.items() if as_hooks(v)},
        **{
          name: value
          for name, value in (
            ("set_value_hooks", set_value_hooks),
            ("get_value_hooks", get_value_hooks),
            ("create_value_hooks", create_value_hooks),
            ("add_axis_hooks", add_axis_hooks),
            ("remove_axis_hooks", remove_axis_hooks),
          )
          if as_hooks(value)
        },
      }
    )
    for name in _HOOK_NAMES:
      setattr(self, name, everything.pop(name, ()))
    self.metadata = everything

  def __getattr__(self, name: str) -> Any:
    if name in HOOK_ALIASES:
      return getattr(self, HOOK_ALIASES[name])
    raise AttributeError(
      f"`{type(self).__name__}` has no attribute `{name}`.", name=name, obj=self
    )

  def _all(self) -> dict[str, Any]:
    hooks = {name: getattr(self, name) for name in sorted(_HOOK_NAMES)}
    return {**self.metadata, **{k: v for k, v in hooks.items() if v}}

  def __eq__(self, other) -> bool:
    if not isinstance(other, VariableMetadata):
      return NotImplemented
    return (self.raw_value, self._all()) == (other.raw_value, other._all())

  __hash__ = None

  def __repr__(self) -> str:
    return f"VariableMetadata({self.raw_value!r}, metadata={self._all()!r})"


def with_metadata(
  initializer: F,
  set_value_hooks: Any = (),
  get_value_hooks: Any = (),
  create_value_hooks: Any = (),
  add_axis_hooks: Any = (),
  remove_axis_hooks: Any = (),
  **metadata: Any,
) -> F:
  """Wraps an initializer so that its Variable gets hooks and metadata.

  Example:

    >>> import jax, nnx
    >>> init = nnx.with_metadata(
    ...   jax.nn.initializers.zeros, get_value_hooks=lambda v, x: x + 1, axis=0
    ... )
    >>> p = nnx.Param(init(jax.random.key(0), (2,)))
    >>> p.value, p.raw_value, p.axis
    (Array([1., 1.], dtype=float32), Array([0., 0.], dtype=float32), 0)

  Args:
    initializer: a function that returns a value.
    set_value_hooks: one hook or several, run on values before they are stored.
    get_value_hooks: the same, run on values when they are read.
    create_value_hooks: the same, run on the first value.
    add_axis_hooks: the same, run when a transform adds an axis.
    remove_axis_hooks: the same, run when a transform removes an axis.
    **metadata: further metadata; hooks by the names `on_set_value` and so on
      are hooks here too.

  Returns:
    A function of the same arguments that returns a `VariableMetadata`.
  """
  hooks = {name: metadata.pop(name) for name in _HOOK_NAMES if name in metadata}
  template = VariableMetadata(
    None,
    set_value_hooks,
    get_value_hooks,
    create_value_hooks,
    add_axis_hooks,
    remove_axis_hooks,
    metadata,
    **hooks,
  )

  @functools.wraps(initializer)
  def wrapper(*args, **kwargs):
    return VariableMetadata(
      initializer(*args, **kwargs), metadata=template._all()
    )

  return wrapper


# Operators


def _unwrap(value: Any) -> Any:
  return value.value if isinstance(value, _engine.VariableBase) else value


def _binary(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
  def method(self, other):
    return operation(self.value, _unwrap(other))

  return method


def _reflected(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
  def method(self, other):
    return operation(_unwrap(other), self.value)

  return method


def _unary(operation: Callable[[Any], Any]) -> Callable[..., Any]:
  def method(self):
    return operation(self.value)

  return method


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
  """`v += x` is `v.value = v.value + x`, as in Flax 0.10; 0.12 refuses it."""

  def method(self, other):
    self.value = operation(self.value, _unwrap(other))
    return self

  return method


def is_ref(value: Any) -> bool:
  """Whether a value is a mutable array of jax (`jax.new_ref`).

  Example:

    >>> import jax
    >>> from nnx.variablelib import is_ref
    >>> is_ref(jax.new_ref(1.0))
    True
  """
  return isinstance(value, jax.Ref)


def _copy_containers(value: Any) -> Any:
  """A copy of the lists and dicts of a value, with the same leaves."""
  if type(value) in (list, dict):
    return jax.tree.map(lambda x: x, value)
  return value


class _MetadataView(MutableMapping):
  """The metadata of a Variable, read and written as those of a dict."""

  def __init__(self, variable: Variable[Any]):
    self._variable = variable

  def __getitem__(self, name: str) -> Any:
    return self._variable._metadata[name]

  def __setitem__(self, name: str, value: Any) -> None:
    self._variable.set_metadata(name, value)

  def __delitem__(self, name: str) -> None:
    self._variable.del_metadata(name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._variable._metadata)

  def __len__(self) -> int:
    return len(self._variable._metadata)

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Mapping) and dict(self) == dict(other)

  __hash__ = None

  def __repr__(self) -> str:
    return repr(self._variable._metadata)


class Variable(_engine.VariableBase, reprlib.Displayable, Generic[A]):
  """A mutable box around a value, with metadata; the base of all of its kinds.

  Kinds of Variables are subclasses, and the graph functions select by them:
  `nnx.split`, `nnx.state`, `nnx.pop`, `State.filter` and the like.

  Reading and writing: `v.value` or `v[...]` is the value after the hooks,
  `v[...] = x` keeps shape and dtype, `v.value = x` replaces the value, and
  `v.raw_value` goes past the hooks. Metadata are attributes. Arithmetic, and
  attributes of arrays such as `shape`, work on the value; `v += x` sets it.

  A subclass may define `on_set_value(self, value)` and the other hooks as
  methods, or override `get_value`, `set_value` or `create_value`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Gain(nnx.Variable):
    ...   pass
    >>> gain = Gain(jnp.ones(2), axis="embed")
    >>> gain[...] *= 3
    >>> gain += 1
    >>> gain + 1, gain.shape, gain.axis
    (Array([5., 5.], dtype=float32), (2,), 'embed')

  Args:
    value: any value: an array, a pytree of arrays, or a `VariableMetadata`.
    ref: whether to hold the value in a mutable array of jax (`jax.new_ref`).
    eager_sharding: whether to place the value now if it has a sharding
      annotation and there is a mesh; `use_eager_sharding` sets the default.
    out_sharding: the sharding annotation, a tuple of axis names; `sharding` and
      `sharding_names` mean the same.
    **metadata: hooks, by either of their names, and any other metadata.
  """

  __slots__ = ()
  __array_priority__ = 100  # numpy arrays on the left leave operators to us.

  # Whether `nnx.update` takes arrays of other shapes for a mistake.
  _fixed_shape = True
  _class_hook_flags = 0
  required_metadata = frozenset(["hijax", "ref", "eager_sharding"])

  def __init_subclass__(cls, **kwargs):
    super().__init_subclass__(**kwargs)
    flags = 0
    if hasattr(cls, "on_get_value") or cls.get_value is not Variable.get_value:
      flags |= _GET_HOOK
    if hasattr(cls, "on_set_value") or cls.set_value is not Variable.set_value:
      flags |= _SET_HOOK
    if (
      hasattr(cls, "on_create_value")
      or cls.create_value is not Variable.create_value
    ):
      flags |= _CREATE_HOOK
    if _defaults_changed:
      flags |= _CREATE_HOOK
    cls._class_hook_flags = flags
    pytrees.register_variable_type(cls)

  def _init_slow(
    self,
    value: A | VariableMetadata[A] | type[Variable[A]] = MISSING,
    state_value: Any = MISSING,
    /,
    **metadata: Any,
  ):
    """The constructor where there is more to do than to store a value."""
    if (value is MISSING) != ("value" in metadata):
      raise TypeError(
        f"`{type(self).__name__}` must be given one value, as the first"
        f" argument or as `value=`, but got"
        f" {'none' if value is MISSING else 'both'}."
      )
    if value is MISSING:
      value = metadata.pop("value")
    if state_value is not MISSING:  # `VariableState(type, value)` of Flax 0.10
      if not (isinstance(value, type) and issubclass(value, Variable)):
        raise TypeError(
          f"`{type(self).__name__}` must be given one value, or a type of"
          f" Variables and a value, but got {value!r} and {state_value!r}."
        )
      self.__class__ = value
      value = state_value
    if isinstance(value, VariableMetadata):
      for name in ("ref", "eager_sharding"):
        outer, inner = metadata.get(name), value.metadata.get(name)
        if outer is not None and inner is not None and outer != inner:
          raise ValueError(
            f"`{name}` must be given once, but it is `{inner}` in the"
            f" `VariableMetadata` and `{outer}` in the constructor."
          )
      hooks = normalize_metadata(
        {k: v for k, v in metadata.items() if is_hook_name(k)}
      )
      inherited = {k: v for k, v in value._all().items() if k not in hooks}
      rest = {k: v for k, v in metadata.items() if not is_hook_name(k)}
      if partitioning.sharding_key(value.metadata) and (
        key := partitioning.sharding_key(rest)
      ):
        # Flax lets the annotation of the initializer win.
        del rest[key]
      metadata = {**rest, **inherited, **hooks}
      value = value.raw_value
    use_ref = metadata.get("ref")
    if use_ref is None:
      use_ref = _settings.ref
    metadata = normalize_metadata(metadata)
    if isinstance(value, _engine.VariableBase):
      value = value.raw_value
    if any(map(is_ref, jax.tree.leaves(value))):
      raise ValueError(
        "The value of a Variable must hold no mutable arrays, but got"
        f" `{value!r}`. Pass `ref=True` and an ordinary array."
      )
    if metadata.get("eager_sharding", MISSING) is None:
      del metadata["eager_sharding"]
    if use_ref:
      metadata["ref"] = True
    self._replace_metadata(metadata)
    # Hooks on the first value may look at the Variable, which holds it already.
    self.raw_value = value
    for hook in self._hooks("on_create_value"):
      value = hook(self, value)
      self.raw_value = value
    value = self.create_value(value)
    if metadata.get("eager_sharding", _settings.eager_sharding):
      value = partitioning.place(value, metadata)
    if metadata.get("ref"):
      value = jax.new_ref(value)
    self.raw_value = value

  @staticmethod
  def _metadata_flags(metadata: Mapping[str, Any]) -> int:
    """The hook flags that metadata ask for."""
    if not metadata:
      return 0
    flags = 0
    if metadata.get("on_get_value"):
      flags |= _GET_HOOK
    if metadata.get("on_set_value"):
      flags |= _SET_HOOK
    if metadata.get("ref"):
      flags |= _GET_HOOK | _SET_HOOK
    return flags

  def _hooks(self, name: str) -> tuple[Callable[..., Any], ...]:
    """The hooks of one kind: those of the metadata, or else of the class."""
    hooks = self._metadata.get(name)
    if hooks is None:
      hooks = getattr(type(self), name, None)
    return as_hooks(hooks)

  # The value.

  def create_value(self, value: A) -> A:
    """What to store first; for subclasses to override.

    Example:

      >>> import nnx
      >>> class Rounded(nnx.Variable):
      ...   def create_value(self, value):
      ...     return round(value)
      >>> Rounded(1.6).value
      2
    """
    return value

  def get_value(self, *, index: Any = MISSING) -> A:
    """The value after the hooks; subclasses may override it.

    Example:

      >>> import jax.numpy as jnp
      >>> import nnx
      >>> nnx.Param(jnp.arange(3)).get_value(index=1)
      Array(1, dtype=int32)

    Args:
      index: what `v[index]` asks for; without it the whole value.

    Returns:
      The value, or the part of it.
    """
    value = self.raw_value
    if is_ref(value):
      value = value[... if index is MISSING else index]
    elif index is not MISSING and not (
      index is ... and isinstance(value, jax.Array)
    ):
      value = value[index]
    for hook in self._hooks("on_get_value"):
      value = hook(self, value)
    return value

  def set_value(self, value: A, *, index: Any = MISSING) -> None:
    """Stores a value after the hooks; subclasses may override it.

    Example:

      >>> import jax.numpy as jnp
      >>> import nnx
      >>> p = nnx.Param(jnp.zeros(3))
      >>> p.set_value(1, index=0)
      >>> p.value
      Array([1., 0., 0.], dtype=float32)

    Args:
      value: the new value.
      index: what `v[index] = value` sets, keeping the shape and dtype of an
        array; without it the whole value is replaced.
    """
    for hook in self._hooks("on_set_value"):
      value = hook(self, value)
    raw = self.raw_value
    if is_ref(raw):
      self._check_can_update()
      value = _unwrap(value)
      if isinstance(value, (bool, int, float, complex)):
        value = jax.numpy.asarray(value, raw.dtype)
      raw[... if index is MISSING else index] = value
    elif index is MISSING:
      self.raw_value = value
    elif isinstance(raw, jax.Array):
      value = _unwrap(value)
      if (
        index is ...
        and isinstance(value, jax.Array)
        and value.shape == raw.shape
        and value.dtype == raw.dtype
      ):
        self.raw_value = value
      else:
        self.raw_value = raw.at[index].set(value)
    else:
      self._check_can_update()
      raw[index] = _unwrap(value)

  def _get_value_slow(self) -> A:
    return self.get_value()

  def _set_value_slow(self, value: A) -> None:
    self.set_value(value)

  def _getitem_slow(self, index: Any) -> Any:
    return self.get_value(index=index)

  def _setitem_slow(self, index: Any, value: Any) -> None:
    self.set_value(value, index=index)

  def get_raw_value(self) -> A:
    """The stored value, past the hooks.

    Example:

      >>> import nnx
      >>> nnx.Param(1, on_get_value=lambda v, x: x + 1).get_raw_value()
      1
    """
    return self.raw_value

  def set_raw_value(self, value: A) -> None:
    """Stores a value, past the hooks.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1)
      >>> p.set_raw_value(2)
      >>> p.value
      2
    """
    self.raw_value = value

  # Metadata.

  @property
  def type(self) -> type[Variable[A]]:
    """The class of the Variable.

    Example:

      >>> import nnx
      >>> nnx.Param(1).type is nnx.Param
      True
    """
    return type(self)

  var_type = type

  @property
  def hijax(self) -> bool:
    """Whether this is a Variable of jax's experimental `hijax`: never.

    Example:

      >>> import nnx
      >>> nnx.Param(1).hijax
      False
    """
    return False

  @property
  def ref(self) -> bool:
    """Whether the value is held in a mutable array of jax.

    Example:

      >>> import jax.numpy as jnp
      >>> import nnx
      >>> nnx.Param(jnp.zeros(2), ref=True).ref
      True
    """
    return bool(self._metadata.get("ref", False))

  @property
  def eager_sharding(self) -> bool:
    """Whether the value is placed when the Variable is made.

    Example:

      >>> import nnx
      >>> nnx.Param(1).eager_sharding
      True
    """
    return self._metadata.get("eager_sharding", _settings.eager_sharding)

  def _stored_name(self, name: str) -> str:
    """The name under which a piece of metadata is, or is to be, stored."""
    if name in HOOK_ALIASES:
      return HOOK_ALIASES[name]
    if name in partitioning.SHARDING_KEYS:
      return partitioning.sharding_key(self._metadata) or name
    return name

  def get_metadata(
    self,
    name: str | None = None,
    default: Any = MISSING,
    *,
    exclude_required: bool | None = None,
  ) -> Any:
    """One piece of metadata, or all of them as a new dict.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1, axis="embed")
      >>> p.get_metadata("axis"), p.get_metadata("b", None), p.get_metadata()
      ('embed', None, {'axis': 'embed'})

    Args:
      name: which piece; all of them if not given.
      default: what to return if there is no such piece.
      exclude_required: whether to leave out the switches `ref` and
        `eager_sharding` when all are asked for.

    Returns:
      The piece, or the dict.

    Raises:
      KeyError: if there is no such piece and no default.
      TypeError: if arguments are given that do not go together.
    """
    metadata = self._metadata
    if name is None:
      if default is not MISSING:
        raise TypeError(
          "`default` must come with a `name`, but got only"
          f" `default={default!r}`."
        )
      if exclude_required:
        return {
          k: v for k, v in metadata.items() if k not in self.required_metadata
        }
      return dict(metadata)
    if exclude_required is not None:
      raise TypeError(
        "`exclude_required` is about all of the metadata, but got it with"
        f" `name={name!r}`."
      )
    stored = self._stored_name(name) if name in _ALIASED_NAMES else name
    if stored in metadata:
      return metadata[stored]
    if name in self.required_metadata:
      return getattr(self, name)
    if default is not MISSING:
      return default
    raise KeyError(name)

  def set_metadata(self, *args, **kwargs) -> None:
    """Sets metadata, in one of three ways.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1, a=1)
      >>> p.set_metadata("b", 2)  # one piece
      >>> p.set_metadata(c=3)  # some pieces
      >>> p.get_metadata()
      {'a': 1, 'b': 2, 'c': 3}
      >>> p.set_metadata({"d": 4})  # all of them
      >>> p.get_metadata()
      {'d': 4}

    Raises:
      TypeError: if called in another way.
      ValueError: if `ref` would change, which is fixed at construction.
    """
    if len(args) == 1 and not kwargs:
      new = normalize_metadata(args[0])
      if "ref" not in new and self.ref:
        new["ref"] = True
      if "eager_sharding" not in new and "eager_sharding" in self._metadata:
        new["eager_sharding"] = self._metadata["eager_sharding"]
    elif len(args) == 2 and not kwargs:
      new = self._metadata_with({args[0]: args[1]})
    elif kwargs and not args:
      new = self._metadata_with(kwargs)
    else:
      raise TypeError(
        "`set_metadata` must be called with a dict, with a name and a value, or"
        f" with keywords, but got `args={args}` and `kwargs={kwargs}`."
      )
    if bool(new.get("ref")) != self.ref:
      raise ValueError(
        f"`ref` must stay as the Variable was made, `{self.ref}`, but got"
        f" `{not self.ref}`. Make a new Variable instead."
      )
    self._check_can_update()
    self._replace_metadata(new)

  def _metadata_with(self, updates: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata with some pieces replaced, each under its stored name."""
    new = dict(self._metadata)
    for name, value in updates.items():
      stored = self._stored_name(name)
      if stored in _HOOK_NAMES:
        value = as_hooks(value)
        if not value:
          new.pop(stored, None)
          continue
      new[stored] = value
    return normalize_metadata(new)

  def _replace_metadata(self, metadata: dict[str, Any]) -> None:
    live = self._metadata
    live.clear()
    live.update(metadata)
    self._update_hook_flags()

  def _update_hook_flags(self) -> None:
    flags = self._class_hook_flags | self._metadata_flags(self._metadata)
    self._set_hook_flags(flags & (_GET_HOOK | _SET_HOOK))

  @classmethod
  def _make(cls, value: Any, metadata: dict[str, Any]) -> Variable[Any]:
    """An instance with these contents, made without `__init__`."""
    result = cls._new(value, metadata)
    if metadata:
      result._update_hook_flags()
    return result

  def has_metadata(self, name: str) -> bool:
    """Whether there is a piece of metadata of a given name.

    Example:

      >>> import nnx
      >>> nnx.Param(1, sharding=("a",)).has_metadata("out_sharding")
      True
    """
    return self._stored_name(name) in self._metadata

  def del_metadata(self, name: str) -> None:
    """Removes a piece of metadata.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1, axis="embed")
      >>> p.del_metadata("axis")
      >>> p.get_metadata()
      {}

    Raises:
      KeyError: if there is no such piece.
      ValueError: if `name` is `ref`, which is fixed at construction.
    """
    if name in ("hijax", "ref"):
      raise ValueError(
        f"`{name}` must stay as the Variable was made, but it was to be"
        " deleted. Make a new Variable instead."
      )
    new = dict(self._metadata)
    del new[self._stored_name(name)]
    self._check_can_update()
    self._replace_metadata(new)

  def _getattr_slow(self, name: str) -> Any:
    """Attributes that neither the class nor the metadata have."""
    if name in _ALIASED_NAMES:
      stored = self._stored_name(name)
      if stored in self._metadata and not (
        name == "sharding" and hasattr(self.raw_value, "sharding")
      ):
        return self._metadata[stored]
      if name in HOOK_ALIASES:
        return ()
      if name == "sharding_names":
        return None
    try:
      return getattr(self.raw_value, name)
    except AttributeError:
      pass
    raise AttributeError(
      f"`{type(self).__name__}` has no attribute or metadata `{name}`, and"
      f" neither has its value of type `{type(self.raw_value).__name__}`. Its"
      f" metadata are {sorted(self._metadata)}.",
      name=name,
      obj=self,
    )

  def _setattr_slow(self, name: str, value: Any) -> None:
    """Attributes that the class does not have are metadata."""
    if name.startswith("__"):
      raise AttributeError(f"`{name}` cannot be set on a Variable.")
    self.set_metadata(name, value)

  def _delattr_slow(self, name: str) -> None:
    try:
      self.del_metadata(name)
    except KeyError:
      raise AttributeError(
        f"`{type(self).__name__}` has no metadata `{name}` to delete. Its"
        f" metadata are {sorted(self._metadata)}.",
        name=name,
        obj=self,
      ) from None

  def add_axis(self, axis_index: int, axis_name: str | None) -> None:
    """Runs the hooks for an axis that a transform has added.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1, on_add_axis=lambda v, i, name: print(i, name))
      >>> p.add_axis(0, "layers")
      0 layers
    """
    for hook in self._hooks("on_add_axis"):
      hook(self, axis_index, axis_name)

  def remove_axis(self, axis_index: int, axis_name: str | None) -> None:
    """Runs the hooks for an axis that a transform has removed.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1, on_remove_axis=lambda v, i, name: print(i, name))
      >>> p.remove_axis(0, "layers")
      0 layers
    """
    for hook in self._hooks("on_remove_axis"):
      hook(self, axis_index, axis_name)

  # Copies.

  @classmethod
  def from_metadata(
    cls, value: B, attributes: Mapping[str, Any]
  ) -> Variable[B]:
    """Makes a Variable without running hooks or placing its value.

    Example:

      >>> import nnx
      >>> nnx.Param.from_metadata(1, {"axis": "embed"}).axis
      'embed'

    Args:
      value: the raw value.
      attributes: the metadata, which is copied.
    """
    return cls._make(value, normalize_metadata(attributes))

  def copy(
    self, value: Any = MISSING, *, _copy_ref: bool = True, **updates: Any
  ) -> Variable[Any]:
    """A Variable of the same kind, with another value or other metadata.

    `replace`, `to_state` and `to_variable` are other names of it.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1, axis="embed")
      >>> p.copy().value, p.replace(2).value, p.replace(axis="heads").axis
      (1, 2, 'heads')

    Args:
      value: the raw value of the copy; that of this Variable if not given.
      **updates: metadata that the copy shall have besides or instead.
    """
    if value is MISSING:
      value = updates.pop("value", self.raw_value)
    metadata = self._metadata_with(updates) if updates else dict(self._metadata)
    if _copy_ref:
      if is_ref(value):
        value = value[...]
      if metadata.get("ref"):
        value = jax.new_ref(value)
    return self._make(_copy_containers(value), metadata)

  replace = copy
  to_state = copy
  to_variable = copy

  @classmethod
  def state(cls, value: Any, **metadata: Any) -> Variable[Any]:
    """Makes a Variable for a State, as Flax 0.10 spelled it.

    Example:

      >>> import nnx
      >>> nnx.Param.state(1, a=2).type, nnx.Param.state(1, a=2).a
      (<class 'nnx.variablelib.Param'>, 2)

    Args:
      value: its value.
      **metadata: its metadata.
    """
    return cls(value, **metadata)

  def copy_from(self, other: Variable[A]) -> None:
    """Takes over the value and the metadata of another Variable of this kind.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1)
      >>> p.copy_from(nnx.Param(2, axis="embed"))
      >>> p.value, p.axis
      (2, 'embed')

    Raises:
      ValueError: if `other` is a Variable of another kind.
    """
    if type(self) is not type(other):
      raise ValueError(
        f"`other` must be of the same kind, `{type(self).__name__}`, but got a"
        f" `{type(other).__name__}`."
      )
    if self is not other:
      self.raw_value = other.raw_value
      self._replace_metadata(dict(other._metadata))

  def update_from_state(self, variable_state: Variable[A]) -> None:
    """Takes over the value and the metadata of a Variable of any kind.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1)
      >>> p.update_from_state(nnx.Param(2))
      >>> p.value
      2
    """
    self.raw_value = variable_state.raw_value
    if self._metadata != variable_state._metadata:
      self._replace_metadata(dict(variable_state._metadata))

  def __copy__(self) -> Variable[A]:
    return self.copy()

  def __deepcopy__(self, memo: dict[int, Any]) -> Variable[A]:
    raw = self.raw_value
    if is_ref(raw):
      value = jax.new_ref(raw[...])
    else:
      value = copy.deepcopy(raw, memo)
    result = self._make(value, copy.deepcopy(self._metadata, memo))
    memo[id(self)] = result
    return result

  # What programs of Flax reach for; under these names a Variable is pickled.

  @property
  def _raw_value(self) -> A:
    return self.raw_value

  @_raw_value.setter
  def _raw_value(self, value: A) -> None:
    # They set it where the check of the trace is to be avoided.
    with tracers.unchecked():
      self.raw_value = value

  @property
  def _var_metadata(self) -> MutableMapping[str, Any]:
    return _MetadataView(self)

  @_var_metadata.setter
  def _var_metadata(self, metadata: Mapping[str, Any]) -> None:
    self._replace_metadata(normalize_metadata(metadata))

  @property
  def _trace_state(self) -> tracers.TraceState:
    return tracers.TraceState.of(self)

  @_trace_state.setter
  def _trace_state(self, state: tracers.TraceState) -> None:
    tracers.TraceState.of(self)._jax_trace = state._jax_trace

  def __getstate__(self) -> dict[str, Any]:
    raw = self.raw_value
    return {
      "_raw_value": raw[...] if is_ref(raw) else raw,
      "_trace_state": tracers.TraceState(),
      "_var_metadata": dict(self._metadata),
    }

  def __setstate__(self, state: Mapping[str, Any]) -> None:
    metadata = state["_var_metadata"]
    if "hijax" in metadata or "is_hijax" in metadata:
      # Pickled by Flax, which writes down all of its switches.
      kept = "ref" if metadata.get("ref") else None
      metadata = {
        name: value
        for name, value in metadata.items()
        if name not in _FLAX_METADATA or name == kept
      }
    self._replace_metadata(normalize_metadata(metadata))
    value = state["_raw_value"]
    self.raw_value = jax.new_ref(value) if metadata.get("ref") else value

  # Display.

  def _display(self) -> reprlib.Parts:
    value = self.raw_value
    if is_ref(value):
      value = value[...]
    size = reprlib.Size.of(value)
    items = [("value", value), *self._metadata.items()]
    if reprlib.setting("in_state"):
      # The documents print the Variables of a State by the class that Flax
      # 0.10 had for them.
      return reprlib.Parts(
        "VariableState",
        [("type", type(self)), *items],
        comment=repr(size) if size else "",
        type=type(self),
      )
    return reprlib.Parts(
      type(self).__name__,
      items,
      comment=repr(size) if size else "",
      type=type(self),
    )

  # The value's behaviour.

  def __jax_array__(self) -> Any:
    value = self.value
    return value if isinstance(value, jax.Array) else jax.numpy.asarray(value)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    array = np.asarray(self.value)
    if dtype is not None and array.dtype != dtype:
      if copy is False:
        raise ValueError(
          f"The value must be copied to change its dtype from `{array.dtype}`"
          f" to `{dtype}`, but got `copy=False`."
        )
      return array.astype(dtype)
    return array.copy() if copy else array

  # Not `__delitem__`: a Python method would take item assignment, which shares
  # its slot, away from the engine.
  def _delitem_slow(self, key: Any) -> None:
    value = _copy_containers(self.value)
    del value[key]
    self.set_value(value)

  def __call__(self, *args, **kwargs) -> Any:
    return self.value(*args, **kwargs)

  def __len__(self) -> int:
    return len(self.value)

  def __iter__(self) -> Iterator[Any]:
    return iter(self.value)

  def __contains__(self, item: Any) -> bool:
    return item in self.value

  def __bool__(self) -> bool:
    value = self.value
    # `if self.bias:` asks whether there is one, as it does in Flax.
    return len(value) > 0 if getattr(value, "ndim", 0) else bool(value)

  def __format__(self, spec: str) -> str:
    return format(self.value, spec) if spec else str(self)

  def __round__(self, ndigits: int = 0) -> Any:
    return self.value.__round__(ndigits)

  def __divmod__(self, other: Any) -> Any:
    return divmod(self.value, _unwrap(other))

  def __rdivmod__(self, other: Any) -> Any:
    return divmod(_unwrap(other), self.value)

  __hash__ = None  # Equality is that of the values, elementwise.

  __add__ = _binary(operator.add)
  __sub__ = _binary(operator.sub)
  __mul__ = _binary(operator.mul)
  __matmul__ = _binary(operator.matmul)
  __truediv__ = _binary(operator.truediv)
  __floordiv__ = _binary(operator.floordiv)
  __mod__ = _binary(operator.mod)
  __pow__ = _binary(operator.pow)
  __lshift__ = _binary(operator.lshift)
  __rshift__ = _binary(operator.rshift)
  __and__ = _binary(operator.and_)
  __xor__ = _binary(operator.xor)
  __or__ = _binary(operator.or_)
  __eq__ = _binary(operator.eq)
  __ne__ = _binary(operator.ne)
  __lt__ = _binary(operator.lt)
  __le__ = _binary(operator.le)
  __gt__ = _binary(operator.gt)
  __ge__ = _binary(operator.ge)

  __radd__ = _reflected(operator.add)
  __rsub__ = _reflected(operator.sub)
  __rmul__ = _reflected(operator.mul)
  __rmatmul__ = _reflected(operator.matmul)
  __rtruediv__ = _reflected(operator.truediv)
  __rfloordiv__ = _reflected(operator.floordiv)
  __rmod__ = _reflected(operator.mod)
  __rpow__ = _reflected(operator.pow)
  __rlshift__ = _reflected(operator.lshift)
  __rrshift__ = _reflected(operator.rshift)
  __rand__ = _reflected(operator.and_)
  __rxor__ = _reflected(operator.xor)
  __ror__ = _reflected(operator.or_)

  __iadd__ = _in_place(operator.add)
  __isub__ = _in_place(operator.sub)
  __imul__ = _in_place(operator.mul)
  __imatmul__ = _in_place(operator.matmul)
  __itruediv__ = _in_place(operator.truediv)
  __ifloordiv__ = _in_place(operator.floordiv)
  __imod__ = _in_place(operator.mod)
  __ipow__ = _in_place(operator.pow)
  __ilshift__ = _in_place(operator.lshift)
  __irshift__ = _in_place(operator.rshift)
  __iand__ = _in_place(operator.and_)
  __ixor__ = _in_place(operator.xor)
  __ior__ = _in_place(operator.or_)

  __neg__ = _unary(operator.neg)
  __pos__ = _unary(operator.pos)
  __abs__ = _unary(operator.abs)
  __invert__ = _unary(operator.invert)
  __complex__ = _unary(complex)
  __int__ = _unary(int)
  __float__ = _unary(float)
  __index__ = _unary(operator.index)
  __trunc__ = _unary(math.trunc)
  __floor__ = _unary(lambda value: value.__floor__())
  __ceil__ = _unary(lambda value: value.__ceil__())


pytrees.register_variable_type(Variable)
VariableState = Variable


def is_hook_name(name: str) -> bool:
  """Whether a name is that of a kind of hooks, in either spelling.

  Example:

    >>> from nnx.variablelib import is_hook_name
    >>> is_hook_name("set_value_hooks")
    True
  """
  return name in HOOK_ALIASES or name in _HOOK_NAMES


class Param(Variable[A]):
  """A parameter that is learned.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Affine(nnx.Module):
    ...   def __init__(self):
    ...     self.kernel = nnx.Param(jnp.ones((2, 3)))
    ...     self.bias = nnx.Param(jnp.zeros(3))
    >>> print(jax.tree.map(jnp.shape, nnx.state(Affine(), nnx.Param)))
    State({
      'bias': VariableState(
        type=Param,
        value=(3,)
      ),
      'kernel': VariableState(
        type=Param,
        value=(2, 3)
      )
    })
  """

  __slots__ = ()


class BatchStat(Variable[A]):
  """A running statistic of a batch normalization, which is not learned.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> mean = nnx.BatchStat(jnp.zeros(3))
    >>> mean[...] += 0.1 * (jnp.ones(3) - mean)
    >>> mean.value
    Array([0.1, 0.1, 0.1], dtype=float32)
  """

  __slots__ = ()


class Cache(Variable[A]):
  """What a layer keeps from earlier steps, such as the keys and values seen.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> nnx.Cache(jnp.zeros((1, 8, 2, 4))).shape
    (1, 8, 2, 4)
  """

  __slots__ = ()
  _fixed_shape = False


class Intermediate(Variable[A]):
  """A value on its way through the model, kept by `Module.sow`.

  Example:

    >>> import nnx
    >>> class Model(nnx.Module):
    ...   def __call__(self, x):
    ...     self.sow(nnx.Intermediate, "x", x)
    ...     return x
    >>> model = Model()
    >>> _ = model(3)
    >>> model.x.value
    (3,)
  """

  __slots__ = ()
  _fixed_shape = False


class Perturbation(Intermediate[A]):
  """A zero added by `Module.perturb`, whose gradient is that of the value.

  Example:

    >>> import nnx
    >>> issubclass(nnx.Perturbation, nnx.Intermediate)
    True
  """

  __slots__ = ()


# Names of kinds of Variables, as Linen calls its collections

_types_by_name: dict[str, type[Variable[Any]]] = {}


def variable_type_from_name(
  name: str,
  /,
  *,
  base: type[Variable[Any]] = Variable,
  allow_register: bool = False,
) -> type[Variable[Any]]:
  """The kind of Variable that goes by a name.

  Example:

    >>> import nnx
    >>> nnx.variable_type_from_name("params") is nnx.Param
    True

  Args:
    name: the name, such as that of a Linen collection.
    base: the base of the kind that is made if there is none.
    allow_register: whether to make and register one if there is none.

  Returns:
    The class.

  Raises:
    ValueError: if there is none and none may be made.
  """
  if name not in _types_by_name:
    if not allow_register:
      raise ValueError(
        f"`name` must be that of a registered kind of Variable, one of"
        f" {sorted(_types_by_name)}, but got `{name}`. Register it by"
        " `nnx.register_variable_name` or pass `allow_register=True`."
      )
    _types_by_name[name] = type(name, (base,), {"__slots__": ()})
  return _types_by_name[name]


def variable_name_from_type(
  typ: type[Variable[Any]], /, *, allow_register: bool = False
) -> str:
  """The name that a kind of Variable goes by.

  Example:

    >>> import nnx
    >>> nnx.variable_name_from_type(nnx.BatchStat)
    'batch_stats'

  Args:
    typ: the class.
    allow_register: whether to register it by its own name if it has none.

  Returns:
    The name.

  Raises:
    ValueError: if it has none and may get none, or if its own name is taken.
  """
  for name, known in _types_by_name.items():
    if known is typ:
      return name
  if not allow_register:
    raise ValueError(
      f"`typ` must be a registered kind of Variable, but got `{typ.__name__}`."
      " Register it by `nnx.register_variable_name` or pass"
      " `allow_register=True`."
    )
  name = typ.__name__
  if name in _types_by_name:
    raise ValueError(
      f"The name of a kind of Variable must be its own, but `{name}` is that of"
      f" `{_types_by_name[name]}` already. Register `{typ}` by another name."
    )
  _types_by_name[name] = typ
  return name


def register_variable_name_type_pair(
  name: str, typ: type[Variable[Any]], overwrite: bool = False
) -> None:
  """Registers a kind of Variable by the name that Flax 0.10 had for it.

  Example:

    >>> import nnx
    >>> class Offset(nnx.Variable):
    ...   pass
    >>> nnx.register_variable_name_type_pair("offsets", Offset, overwrite=True)
    >>> nnx.variable_name_from_type(Offset)
    'offsets'

  Args:
    name: the name, such as that of a Linen collection.
    typ: the class.
    overwrite: whether the name may be taken from another class.

  Raises:
    ValueError: if the name is taken and must not be overwritten.
  """
  register_variable_name(name, typ, overwrite=overwrite)


def register_variable_name(
  name: str,
  typ: type[Variable[Any]] | None = None,
  *,
  overwrite: bool = False,
) -> Any:
  """Registers the name of a kind of Variable; also a decorator.

  Example:

    >>> import nnx
    >>> @nnx.register_variable_name("gains", overwrite=True)
    ... class Gain(nnx.Variable):
    ...   pass
    >>> nnx.variable_type_from_name("gains") is Gain
    True

  Args:
    name: the name, such as that of a Linen collection.
    typ: the class; without it a decorator is returned.
    overwrite: whether the name may be taken from another class.

  Returns:
    The class.

  Raises:
    ValueError: if the name is taken and must not be overwritten.
  """
  if typ is None:
    return functools.partial(register_variable_name, name, overwrite=overwrite)
  if not overwrite and name in _types_by_name:
    raise ValueError(
      f"`name` must be new, but `{name}` is that of `{_types_by_name[name]}`."
      " Pass `overwrite=True` to give it to another class."
    )
  _types_by_name[name] = typ
  return typ


register_variable_name("params", Param)
register_variable_name("batch_stats", BatchStat)
register_variable_name("cache", Cache)
register_variable_name("intermediates", Intermediate)
register_variable_name("perturbations", Perturbation)
