"""The metadata of Variables: hooks, annotations, switches.

Hooks are functions `hook(variable, value) -> value` kept in the metadata under
`on_set_value`, `on_get_value` and `on_create_value`, and functions
`hook(variable, axis_index, axis_name)` under `on_add_axis` and
`on_remove_axis`. The names that Flax 0.10 gave them, `set_value_hooks` and so
on, are accepted wherever hooks are, and mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import operator
from typing import Any

import jax

from nnx import environment, partitioning
from nnx.engine import _engine, boxes, jax_private
from nnx.missing import MISSING

Hooks = tuple[Callable[..., Any], ...]


# Flax 0.10's names of the hooks, and those under which they are stored.
HOOK_ALIASES = {
  "set_value_hooks": "on_set_value",
  "get_value_hooks": "on_get_value",
  "create_value_hooks": "on_create_value",
  "add_axis_hooks": "on_add_axis",
  "remove_axis_hooks": "on_remove_axis",
}
HOOK_NAMES = frozenset(HOOK_ALIASES.values())
_ALIASED_NAMES = frozenset(HOOK_ALIASES) | frozenset(partitioning.SHARDING_KEYS)

# As plain ints, which are faster to combine. The engine does not know the
# last one.
GET_HOOK = int(_engine.HookFlags.GET)
SET_HOOK = int(_engine.HookFlags.SET)
BOXED = int(_engine.HookFlags.BOXED)
CREATE_HOOK = 8


# Switches that say how a value is kept, and what they are where they are not
# among the metadata.
FIXED = {"hijax": False, "ref": False, "mutable": True}
SWITCHES = {**FIXED, "eager_sharding": True}
# Those that every Variable lists, as in Flax.
LISTED = ("hijax", "ref", "eager_sharding")


def in_order(metadata: Mapping[str, Any]) -> boxes.Metadata:
  """Returns metadata as they are kept in treedefs and boxes.

  Example:

    >>> from nnx.variable_metadata import in_order
    >>> in_order({"b": 1, "a": 2})
    (('a', 2), ('b', 1))
  """
  return tuple(sorted(metadata.items(), key=operator.itemgetter(0)))


def _is_boxed(metadata: Mapping[str, Any]) -> bool:
  return (
    metadata.get("hijax", False)
    and not metadata.get("ref")
    and metadata.get("mutable", True)
  )


def _has_arrays_only(value: Any) -> bool:
  if type(value) is list:  # In their place jax puts what it lowers boxes to.
    return False
  leaves = jax.tree.leaves(value)
  return bool(leaves) and all(isinstance(leaf, jax.Array) for leaf in leaves)


def is_ref(value: Any) -> bool:
  """Tells whether a value is a mutable array of jax (`jax.new_ref`).

  Example:

    >>> import jax
    >>> from nnx.variablelib import is_ref
    >>> is_ref(jax.new_ref(1.0))
    True
  """
  return isinstance(value, jax.Ref)


def is_hook_name(name: str) -> bool:
  """Tells whether a name is that of a kind of hooks, in either spelling.

  Example:

    >>> from nnx.variablelib import is_hook_name
    >>> is_hook_name("set_value_hooks")
    True
  """
  return name in HOOK_ALIASES or name in HOOK_NAMES


def as_hooks(hooks: Any) -> tuple[Callable[..., Any], ...]:
  """Makes a tuple of one hook, several or none.

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
    TypeError: if a switch is something else than True, False or None.
    ValueError: if two spellings of one thing are given and differ.
  """
  result = {}
  for name, value in metadata.items():
    if name in HOOK_ALIASES or name in HOOK_NAMES:
      continue
    if name in SWITCHES:
      if value is None:
        continue
      environment.check_flags(**{name: value})
      value = bool(value)
      if SWITCHES[name] is value:
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


def metadata_flags(metadata: Mapping[str, Any]) -> int:
  """Finds the hook flags that metadata ask for.

  Example:

    >>> from nnx.variable_metadata import metadata_flags
    >>> metadata_flags({"on_set_value": len}), metadata_flags({"ref": True})
    (2, 7)
  """
  if not metadata:
    return 0
  flags = 0
  if metadata.get("on_get_value"):
    flags |= GET_HOOK
  if metadata.get("on_set_value"):
    flags |= SET_HOOK
  if (
    metadata.get("ref")
    or metadata.get("hijax")
    or metadata.get("mutable") is False
  ):
    flags |= GET_HOOK | SET_HOOK | BOXED
  return flags


class HasMetadata(_engine.VariableBase):
  """The part of a Variable that reads and changes its metadata."""

  __slots__ = ()

  _class_hook_flags = 0
  required_metadata = frozenset(LISTED)

  def _hooks(self, name: str) -> tuple[Callable[..., Any], ...]:
    """Finds the hooks of one kind: in the metadata, or else the class."""
    hooks = self._metadata.get(name)
    if hooks is None:
      hooks = getattr(type(self), name, None)
    return as_hooks(hooks)

  @property
  def type(self) -> type[HasMetadata]:
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
    """Whether the value can be written under any trace of jax.

    Example:

      >>> import nnx
      >>> nnx.Param(1).hijax, nnx.Param(1, hijax=True).hijax
      (False, True)
    """
    return bool(self._metadata.get("hijax", False))

  @property
  def ref(self) -> bool:
    """Whether the value is held in a mutable array of jax.

    Example:

      >>> import jax.numpy as jnp
      >>> import nnx
      >>> nnx.Param(jnp.zeros(2), ref=True).ref
      True
    """
    return bool(self._metadata.get("ref", False)) and self.mutable

  @property
  def mutable(self) -> bool:
    """Whether the value may be written; `nnx.with_vars` makes it so or not.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1)
      >>> p.mutable, nnx.with_vars(p, mutable=False).mutable
      (True, False)
    """
    return self._metadata.get("mutable", True)

  @property
  def eager_sharding(self) -> bool:
    """Whether the value is placed when the Variable is made.

    Example:

      >>> import nnx
      >>> nnx.Param(1).eager_sharding
      True
    """
    return self._metadata.get("eager_sharding", True)

  def _stored_name(self, name: str) -> str:
    """Finds the name under which a piece of metadata is or will be stored."""
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
    """Returns one piece of metadata, or all of them as a new dict.

    The dict has a sharding annotation under `out_sharding`, whichever of its
    names that was given by, and at its end the switches `hijax`, `ref` and
    `eager_sharding`.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1, axis="embed")
      >>> p.get_metadata("axis"), p.get_metadata("b", None)
      ('embed', None)
      >>> p.get_metadata()
      {'axis': 'embed', 'hijax': False, 'ref': False, 'eager_sharding': True}
      >>> p.get_metadata(exclude_required=True)
      {'axis': 'embed'}

    Args:
      name: which piece; all of them if not given.
      default: what to return if there is no such piece.
      exclude_required: whether to leave out the switches when all are asked
        for.

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
      result = partitioning.Metadata(metadata)
      for switch in LISTED:
        value = result.pop(switch, SWITCHES[switch])
        if not exclude_required:
          result[switch] = value
      return result
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
      >>> p.get_metadata(exclude_required=True)
      {'a': 1, 'b': 2, 'c': 3}
      >>> p.set_metadata({"d": 4})  # all of them
      >>> p.get_metadata(exclude_required=True)
      {'d': 4}

    Raises:
      TypeError: if called in another way.
      ValueError: if `ref`, `hijax` or `mutable` would change, which are fixed
        at construction.
    """
    if len(args) == 1 and not kwargs:
      new = normalize_metadata(args[0])
      for switch in SWITCHES:
        if switch not in args[0] and switch in self._metadata:
          new[switch] = self._metadata[switch]
    elif len(args) == 2 and not kwargs:
      new = self._metadata_with({args[0]: args[1]})
    elif kwargs and not args:
      new = self._metadata_with(kwargs)
    else:
      raise TypeError(
        "`set_metadata` must be called with a dict, with a name and a value, or"
        f" with keywords, but got `args={args}` and `kwargs={kwargs}`."
      )
    for switch, default in FIXED.items():
      old = self._metadata.get(switch, default)
      if new.get(switch, default) != old:
        raise ValueError(
          f"`{switch}` must stay as the Variable was made, `{old}`, but got"
          f" `{not old}`. Make a new Variable instead."
        )
    self._check_can_update()
    self._replace_metadata(new)

  def _metadata_with(self, updates: Mapping[str, Any]) -> dict[str, Any]:
    """Copies the metadata with some pieces replaced, by their stored names."""
    new = dict(self._metadata)
    for name, value in updates.items():
      stored = self._stored_name(name)
      if stored in HOOK_NAMES:
        value = as_hooks(value)
        if not value:
          new.pop(stored, None)
          continue
      new[stored] = value
    return normalize_metadata(new)

  @classmethod
  def _in_store(cls, value: Any, metadata: Mapping[str, Any]) -> Any:
    """Puts a value where Variables with these metadata keep theirs."""
    if metadata.get("mutable") is False:
      return value
    if metadata.get("ref"):
      return jax.new_ref(value)
    if metadata.get("hijax"):
      return boxes.new(cls, value, in_order(metadata))
    return value

  def _replace_metadata(self, metadata: dict[str, Any]) -> None:
    live = self._metadata
    live.clear()
    live.update(metadata)
    stored = self._stored
    if metadata.get("hijax") and boxes.is_box(stored):
      boxes.write(stored, boxes.read(stored), in_order(metadata))
    self._update_hook_flags()

  def _update_hook_flags(self) -> None:
    flags = self._class_hook_flags | metadata_flags(self._metadata)
    self._set_hook_flags(flags & (GET_HOOK | SET_HOOK | BOXED))

  def _refresh_metadata(self, live: dict[str, Any]) -> None:
    """Takes over what was set under a trace, which left it in the box."""
    stored = self._stored
    if not boxes.is_box(stored):
      # A tree of such Variables was mapped over. What is written to them may
      # not be lost, so they get boxes before somebody passes them on.
      if (
        _is_boxed(live)
        and jax_private.outside_of_traces()
        and _has_arrays_only(stored)
      ):
        self._stored = boxes.new(type(self), stored, in_order(live))
      return
    kept = boxes.metadata(stored)
    if kept is not None and kept != in_order(live):
      live.clear()
      live.update(kept)
      self._update_hook_flags()

  def has_metadata(self, name: str) -> bool:
    """Tells whether there is a piece of metadata of a given name.

    Example:

      >>> import nnx
      >>> nnx.Param(1, sharding=("a",)).has_metadata("out_sharding")
      True
    """
    stored = self._stored_name(name)
    return stored in self._metadata or stored in LISTED

  def del_metadata(self, name: str) -> None:
    """Removes a piece of metadata.

    Example:

      >>> import nnx
      >>> p = nnx.Param(1, axis="embed")
      >>> p.del_metadata("axis")
      >>> p.has_metadata("axis")
      False

    Raises:
      KeyError: if there is no such piece.
      ValueError: if `name` is `ref`, `hijax` or `mutable`, which are fixed at
        construction.
    """
    if name in FIXED:
      raise ValueError(
        f"`{name}` must stay as the Variable was made, but it was to be"
        " deleted. Make a new Variable instead."
      )
    new = dict(self._metadata)
    del new[self._stored_name(name)]
    self._check_can_update()
    self._replace_metadata(new)

  def _getattr_slow(self, name: str) -> Any:
    """Gets an attribute that neither the class nor the metadata have."""
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
    """Sets what the class does not have as metadata."""
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
