"""The class `Variable`: a mutable box around a value.

It is a Python class on a C++ base, `_engine.VariableBase`, which holds the raw
value, the metadata and the trace in which it was made, and which serves the
common accesses without running Python. What is rare is here: construction with
metadata, access through hooks, copies, displays. Its other parts are classes of
their own: what it does with metadata, like its value, and when it is pickled.
"""

from __future__ import annotations

from collections.abc import Mapping
import copy
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, cast, overload

import jax

from nnx import partitioning, reprlib
from nnx.engine import _engine, boxes, jax_private, pytrees
from nnx.missing import MISSING
from nnx.variable_initial import VariableMetadata
from nnx.variable_metadata import (
  CREATE_HOOK,
  FIXED,
  GET_HOOK,
  LISTED,
  SET_HOOK,
  SWITCHES,
  HasMetadata,
  in_order,
  is_hook_name,
  is_ref,
  normalize_metadata,
)
from nnx.variable_operators import Operators, unwrap
from nnx.variable_pickling import Pickled
from nnx.variable_settings import Settings, settings

A = TypeVar("A")
B = TypeVar("B")
V = TypeVar("V", bound="Variable[Any]")


def _copy_containers(value: Any) -> Any:
  """Copies the lists and dicts of a value, with the same leaves."""
  if type(value) in (list, dict):
    return jax.tree.map(lambda x: x, value)
  return value


class Variable(
  Pickled, HasMetadata, Operators, reprlib.Displayable, Generic[A]
):
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
    hijax: whether traces of jax itself, such as those of `jax.jit`, can write
      the value, and change its structure.
    ref: whether to hold the value in a mutable array of jax (`jax.new_ref`).
    eager_sharding: whether to place the value now if it has a sharding
      annotation and there is a mesh; `use_eager_sharding` sets the default.
    out_sharding: the sharding annotation, a tuple of axis names; `sharding` and
      `sharding_names` mean the same.
    **metadata: hooks, by either of their names, and any other metadata.
  """

  __slots__ = ()

  if TYPE_CHECKING:  # The engine has these; it knows no types.
    value: A
    raw_value: A

    def __init__(
      self, value: A | VariableMetadata[A], /, **metadata: Any
    ) -> None: ...
    @overload
    def __getitem__(self, key: EllipsisType) -> A: ...
    @overload
    def __getitem__(self: Variable[jax.Array], key: Any) -> jax.Array: ...
    @overload
    def __getitem__(self, key: Any) -> Any: ...
    def __getitem__(self, key: Any) -> Any: ...

  # Whether `nnx.update` refuses arrays of other shapes.
  _fixed_shape = True
  # Whether the constructor must look at `var_defaults`. It need not as long as
  # no program has changed them, and then runs in the engine alone.
  _defaults_changed = False

  def __init_subclass__(cls, **kwargs):
    super().__init_subclass__(**kwargs)
    # The constructor of the C base never goes on to it.
    after = cls.__mro__[cls.__mro__.index(_engine.VariableBase) + 1 :]
    for base in after:
      if isinstance(base.__dict__.get("__new__"), staticmethod):
        raise TypeError(
          f"A base with a `__new__` must come before `{Variable.__name__}`, but"
          f" `{base.__name__}` comes after it in `{cls.__name__}`. Derive it"
          f" from `{base.__name__}` first."
        )
    flags = 0
    if hasattr(cls, "on_get_value") or cls.get_value is not Variable.get_value:
      flags |= GET_HOOK
    if hasattr(cls, "on_set_value") or cls.set_value is not Variable.set_value:
      flags |= SET_HOOK
    if (
      hasattr(cls, "on_create_value")
      or cls.create_value is not Variable.create_value
    ):
      flags |= CREATE_HOOK
    if Variable._defaults_changed:
      flags |= CREATE_HOOK
    cls._class_hook_flags = flags
    pytrees.register_variable_type(cls)

  def _init_slow(
    self,
    value: A | VariableMetadata[A] | type[Variable[A]] = MISSING,
    state_value: Any = MISSING,
    /,
    **metadata: Any,
  ):
    """Constructs where there is more to do than to store a value."""
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
      self.__class__ = value  # pyright: ignore[reportAttributeAccessIssue]
      value = state_value
    if isinstance(value, VariableMetadata):
      for name in LISTED:
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
    for name in LISTED:
      if metadata.get(name) is None:
        metadata[name] = getattr(settings, name)
    metadata = normalize_metadata(metadata)
    if isinstance(value, _engine.VariableBase):
      value = value.raw_value
    if any(map(is_ref, jax.tree.leaves(value))):
      raise ValueError(
        "The value of a Variable must hold no mutable arrays, but got"
        f" `{value!r}`. Pass `ref=True` and an ordinary array."
      )
    self._replace_metadata(metadata)
    # Hooks on the first value may look at the Variable, which holds it already.
    self._stored = value
    for hook in self._hooks("on_create_value"):
      value = hook(self, value)
      self._stored = value
    value = self.create_value(cast(A, value))
    if self.eager_sharding:
      value = partitioning.place(value, metadata)
    self._stored = self._in_store(value, metadata)

  # The value.

  def create_value(self, value: A) -> A:
    """Makes the value that is stored first; subclasses may override it.

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
    """Returns the value after the hooks; subclasses may override it.

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
    value: Any = self.raw_value
    if is_ref(value):
      value = value[... if index is MISSING else index]
    elif index is not MISSING and not (
      index is ... and isinstance(value, jax.Array)
    ):
      value = value[index]
    for hook in self._hooks("on_get_value"):
      value = hook(self, value)
    # Of the kind that the Variable holds, whatever was seen to be an array.
    return value  # pyright: ignore[reportReturnType]

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
    raw: Any = self.raw_value
    if is_ref(raw):
      new: Any = unwrap(value)
      if isinstance(new, (bool, int, float, complex)):
        new = jax.numpy.asarray(new, raw.dtype)
      raw[... if index is MISSING else index] = new
    elif index is MISSING:
      self.raw_value = value
    elif isinstance(raw, jax.Array):
      value = unwrap(value)
      if (
        index is ...
        and isinstance(value, jax.Array)
        and value.shape == raw.shape
        and value.dtype == raw.dtype
      ):
        self.raw_value = value
      else:
        array: Any = raw.at[index].set(value)
        self.raw_value = array
    else:
      self._check_can_update()
      raw[index] = unwrap(value)
      if self.hijax:  # That was a copy.
        self.raw_value = raw

  def _get_raw_slow(self) -> Any:
    """Returns the value out of its box, if it is in one."""
    # On some versions of jax a box is a mutable array, which `ref` asks for.
    if self.ref:
      return self._stored
    # A copy, box or not: what is done to it is not done to the value.
    return _copy_containers(boxes.opened(self._stored))

  def _set_raw_slow(self, value: Any) -> None:
    """Stores a value in the box, if there is one."""
    if not self.mutable:
      raise ValueError(
        f"A `{type(self).__name__}` with `mutable=False` must not be written."
        " `nnx.with_vars(x, mutable=True)` makes one of it that may be."
      )
    stored = self._stored
    if not self.ref and boxes.is_box(stored):
      boxes.write(stored, value, in_order(self._metadata))
      return
    owner = self._trace_ref
    trace = jax_private.trace_context().trace
    if trace is not (jax_private.eval_trace() if owner is None else owner()):
      self._check_can_update()
    if self.hijax:
      if jax_private.outside_of_traces():
        value = self._in_store(value, self._metadata)
      elif not boxes.CHANGES_STRUCTURE and not jax.tree.leaves(stored):
        # There is no array of jax's to write to: it would be lost.
        boxes.refuse_structure(stored, value)
    self._stored = value

  def _write_raw_slow(self, value: Any) -> None:
    """Stores a value in the box or mutable array, if there is one."""
    stored = self._stored
    if is_ref(stored) and self.ref:
      stored[...] = value[...] if is_ref(value) else value
    else:
      self._set_raw_slow(value)

  def _copy_box(self) -> None:
    raw: Any = self._get_raw_slow()
    self._stored = self._in_store(
      raw[...] if is_ref(raw) else raw, self._metadata
    )

  def _get_value_slow(self) -> A:
    return self.get_value()

  def _set_value_slow(self, value: A) -> None:
    self.set_value(value)

  def _getitem_slow(self, index: Any) -> Any:
    return self.get_value(index=index)

  def _setitem_slow(self, index: Any, value: Any) -> None:
    self.set_value(value, index=index)

  def get_raw_value(self) -> A:
    """Returns the stored value, past the hooks.

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

  # Not `__delitem__`: a Python method would take item assignment, which shares
  # its slot, away from the engine.
  def _delitem_slow(self, key: Any) -> None:
    value = _copy_containers(self.value)
    del value[key]
    self.set_value(value)

  @classmethod
  def _make(cls, value: Any, metadata: dict[str, Any]) -> Self:
    """Makes an instance with these contents, without `__init__`."""
    if metadata.get("hijax") and not metadata.get("ref"):
      value = cls._in_store(value, metadata)
    result = cls._new(value, metadata)
    if metadata:
      result._update_hook_flags()
    return result

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
    made: Any = cls._make(value, normalize_metadata(attributes))
    return made

  def copy(
    self, value: Any = MISSING, *, _copy_ref: bool = True, **updates: Any
  ) -> Self:
    """Copies a Variable, with another value or other metadata if given.

    `replace`, `to_state` and `to_variable` are other names of it.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1, axis="embed")
      >>> p.copy().value, p.replace(2).value, p.replace(axis="heads").axis
      (1, 2, 'heads')

    Args:
      value: the raw value of the copy; that of this Variable if not given.
      **updates: metadata of the copy, in addition or instead.
    """
    if value is MISSING:
      value = updates.pop("value", self.raw_value)
    metadata = self._metadata_with(updates) if updates else dict(self._metadata)
    if _copy_ref:
      if is_ref(value):
        value = value[...]
      if metadata.get("ref"):
        value = self._in_store(value, metadata)
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
      self._assign_slow(other)

  def update_from_state(self, variable_state: Variable[A]) -> None:
    """Takes over the value and the metadata of a Variable of any kind.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1)
      >>> p.update_from_state(nnx.Param(2))
      >>> p.value
      2
    """
    self._assign_slow(variable_state)

  def _assign_slow(self, other: Variable[Any]) -> None:
    """Takes over value and metadata, but not how they are kept."""
    metadata = dict(other._metadata)
    for name in FIXED:
      metadata.pop(name, None)
      if name in self._metadata:
        metadata[name] = self._metadata[name]
    self._write_raw_slow(other.raw_value)
    if self._metadata != metadata:
      self._replace_metadata(metadata)

  def __copy__(self) -> Self:
    return self.copy()

  def __deepcopy__(self, memo: dict[int, Any]) -> Self:
    raw: Any = self.raw_value
    if is_ref(raw):
      value = jax.new_ref(raw[...])
    else:
      value = copy.deepcopy(raw, memo)
    result = self._make(value, copy.deepcopy(self._metadata, memo))
    memo[id(self)] = result
    return result

  # Display.

  def _display(self) -> reprlib.Parts:
    value: Any = self.raw_value
    if is_ref(value):
      value = value[...]
    size = reprlib.Size.of(value)
    metadata = self._metadata
    switches = {name: metadata.get(name, SWITCHES[name]) for name in LISTED}
    items = [
      ("value", value),
      *(item for item in metadata.items() if item[0] not in LISTED),
      # Those of which the program has another default.
      *(s for s in switches.items() if s[1] != getattr(Settings, s[0])),
    ]
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


Variable.__module__ = "nnx.variablelib"
pytrees.register_variable_type(Variable)
