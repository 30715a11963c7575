"""Objects of a graph: what their attributes are, and how that is said.

An attribute is *data* or *static*. Data are Variables, objects of this library,
arrays, and registered types; lists, tuples and dicts are looked into. All else
is static: it is compared and hashed, and a change of it compiles anew. The
engine decides when it walks over an object, so assigning costs nothing; only
what is marked by `data(...)` and `static(...)`, by an annotation or by a
dataclass field is kept, per object, in `_pytree_status`.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
import dataclasses
import inspect
from typing import Any, ClassVar

from nnx import attribute_marks, errors, reprlib, tracers
from nnx.attribute_marks import Data as Data
from nnx.attribute_marks import Marker as Marker
from nnx.attribute_marks import Static as Static
from nnx.attribute_marks import data as data
from nnx.attribute_marks import data_types as data_types
from nnx.attribute_marks import dataclass as dataclass
from nnx.attribute_marks import has_data as has_data
from nnx.attribute_marks import is_data as is_data
from nnx.attribute_marks import register_data_type as register_data_type
from nnx.attribute_marks import static as static
from nnx.engine import _engine, pytrees
from nnx.pytree_state import THEIR_NODES, THEIR_STATE, NodesView, StateView
from nnx.pytree_state import ObjectState as ObjectState
from nnx.pytree_state import PytreeState as PytreeState

# Bits of `_setattr_flags`: why assignments to a class's objects need Python.
_HAS_STATUSES, _STRICT = 1, 2


def _annotated_status(annotation: Any) -> bool | None:
  """Reads an annotation of an attribute: data, static, or nothing."""
  if isinstance(annotation, str):
    name = annotation.split("[")[0].strip().removeprefix("nnx.")
    return {"Data": True, "Static": False}.get(name)
  metadata = getattr(annotation, "__metadata__", ())
  if attribute_marks.DATA in metadata:
    return True
  return False if attribute_marks.STATIC in metadata else None


def _declared_statuses(cls: type) -> dict[str, bool]:
  """Finds the attributes that the body of a class marks."""
  statuses = {}
  for name, annotation in inspect.get_annotations(cls).items():
    status = _annotated_status(annotation)
    if status is not None:
      statuses[name] = status
  for name, value in vars(cls).items():
    if isinstance(value, Marker):
      status = value.is_data
    elif isinstance(value, dataclasses.Field) and "static" in value.metadata:
      is_static = value.metadata["static"]
      if not isinstance(is_static, bool):
        raise ValueError(
          f"`static` in the metadata of `{cls.__name__}.{name}` must be a bool,"
          f" but got `{is_static!r}`."
        )
      status = not is_static
    else:
      continue
    if statuses.get(name, status) != status:
      raise ValueError(
        f"`{cls.__name__}.{name}` must be marked one way, but its annotation"
        f" says {_word(not status)} and its field says {_word(status)}."
      )
    statuses[name] = status
  return statuses


def _word(status: bool) -> str:
  return "data" if status else "static"


class Pytree(_engine.ObjectBase, reprlib.Displayable):
  """An object whose attributes form a graph; the base of `Module`.

  Its objects are pytrees of jax and nodes of the graph functions. Which of the
  attributes are data is told by their values, and can be marked: see `data`.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Foo(nnx.Pytree):
    ...   def __init__(self, x):
    ...     self.x = x
    ...     self.name = "foo"
    >>> jax.tree.map(lambda x: x + 1, Foo(jnp.zeros(1))).x
    Array([1.], dtype=float32)

  Class keywords:
    pytree: whether objects are pytrees of jax too, `True` by default.
    strict: whether to refuse, as Flax 0.12 does, lists, tuples and dicts that
      hold data without a mark, and data in an attribute that was static.
    experimental_pytree: accepted for programs of Flax 0.10.
  """

  __abstractmethods__: ClassVar[frozenset[str]]
  _class_statuses: Mapping[str, bool] = {}
  _setattr_flags = 0
  _is_pytree = True

  def __init_subclass__(
    cls,
    *,
    pytree: bool = True,
    strict: bool | None = None,
    experimental_pytree: bool = True,
    **kwargs: Any,
  ) -> None:
    del experimental_pytree  # of Flax 0.10, where not all of them were
    super().__init_subclass__(**kwargs)
    if cls.__dict__.get("__slots__"):
      raise TypeError(
        f"A `Pytree` must keep its attributes in its `__dict__`, but"
        f" `{cls.__name__}` has `__slots__={cls.__slots__}`. Remove them."
      )
    statuses: dict[str, bool] = {}
    for base in reversed(cls.__mro__[1:]):
      statuses.update(base.__dict__.get("_class_statuses", {}))
    statuses.update(_declared_statuses(cls))
    if strict is None:
      strict = bool(cls._setattr_flags & _STRICT)
    cls._class_statuses = statuses
    cls._setattr_flags = (_HAS_STATUSES if statuses else 0) | (
      _STRICT if strict else 0
    )
    cls._is_pytree = pytree
    # Abstract methods count as they do in Flax, whose metaclass is `ABCMeta`.
    cls.__abstractmethods__ = frozenset()
    abc.update_abstractmethods(cls)
    if pytree:
      pytrees.register_object_type(cls)

  def __init__(self, *args: Any, **kwargs: Any):
    # Refuses arguments, which the constructor of the C++ base takes.
    super().__init__(*args, **kwargs)

  def _setattr_slow(self, name: str, value: Any) -> None:
    """Assigns where something is marked or the class is strict."""
    explicit = None
    if isinstance(value, Marker):
      explicit, value = value.is_data, value.value
    status = explicit
    if status is None:
      status = (self._pytree_status or self._class_statuses).get(
        name, self._class_statuses.get(name)
      )
    if status is ...:  # of what stood in the place of data
      assert self._pytree_status is not None
      self._pytree_status.pop(name)
      status = None
    strict = bool(self._setattr_flags & _STRICT)
    if strict or status is not None:
      _check_value(self, name, value, status, strict)
    if (
      strict
      and status is None
      and is_data(value)
      and name in vars(self)
      and not is_data(vars(self)[name])
    ):
      raise ValueError(
        f"An attribute of the strict class `{type(self).__name__}` must stay"
        f" what it was, but `{name}` was static and got a"
        f" `{type(value).__name__}`. Mark it: `self.{name} = nnx.data(...)`."
      )
    self._setattr_raw(name, value)
    if status is not None:
      statuses = self._pytree_status
      if statuses is None:
        object.__setattr__(self, "_pytree_status", {name: status})
      else:
        statuses[name] = status

  def _delattr_slow(self, name: str) -> None:
    self._delattr_raw(name)
    if self._pytree_status:
      self._pytree_status.pop(name, None)
      if name in self._class_statuses:
        self._pytree_status[name] = self._class_statuses[name]

  # What programs of Flax reach for.
  _pytree__state = _object__state = StateView()
  _pytree__nodes = _object__nodes = NodesView()

  def _check_valid_context(self, error_msg: Callable[[], str]) -> None:
    """Raises if the object may not be changed; programs of Flax override it."""
    if not self._can_update and not tracers.may_change(self):
      raise errors.TraceContextError(error_msg())

  check_valid_context = _check_valid_context

  def __getstate__(self) -> dict[str, Any]:
    state = dict(vars(self))
    if self._pytree_status:
      state["_pytree_status"] = dict(self._pytree_status)
    return state

  def __setstate__(self, state: Mapping[str, Any]) -> None:
    state = dict(state)
    theirs = {
      name: state.pop(name)
      for name in (THEIR_STATE, THEIR_NODES)
      if name in state
    }
    # Past a `__setattr__` of the class: that of a frozen dataclass refuses.
    object.__setattr__(
      self, "_pytree_status", state.pop("_pytree_status", None)
    )
    vars(self).update(state)
    for name, value in theirs.items():
      if name == THEIR_STATE:
        value = PytreeState(value.initializing, value.is_setup)
        value._trace_state = tracers.TraceState.of(self)
      object.__setattr__(self, name, value)

  def _display(self) -> reprlib.Parts:
    if not _shown_first(self):
      return reprlib.Parts(
        type(self).__name__, [(None, _DOTS)], one_line=True, type=type(self)
      )
    return reprlib.Parts(
      type(self).__name__,
      _shown_attributes(self),
      comment=sizes_comment(self),
      type=type(self),
      nested={"summarize": True, "in_state": False},
    )


pytrees.register_object_type(Pytree)


class Object(Pytree, pytree=False):
  """An object whose attributes form a graph, but that is not a pytree of jax.

  Example:

    >>> import nnx
    >>> class Counter(nnx.Object):
    ...   def __init__(self):
    ...     self.count = nnx.Variable(0)
    >>> import jax
    >>> len(jax.tree.leaves(Counter())), nnx.state(Counter()).count.value
    (1, 0)
  """

  def __init_subclass__(cls, *, pytree: bool = False, **kwargs: Any) -> None:
    if pytree:
      raise ValueError(
        f"An `Object` is not a pytree, but `{cls.__name__}` has `pytree=True`."
        " Derive it from `nnx.Pytree`."
      )
    super().__init_subclass__(pytree=False, **kwargs)


def check_pytree(pytree: Any) -> None:
  """Checks the attributes of an object against what they are marked as.

  Example:

    >>> import numpy as np
    >>> import nnx
    >>> class Foo(nnx.Pytree):
    ...   def __init__(self):
    ...     self.a = nnx.static([1])
    >>> foo = Foo()
    >>> nnx.check_pytree(foo)
    >>> foo.a.append(np.zeros(1))
    >>> try:
    ...   nnx.check_pytree(foo)
    ... except ValueError as e:
    ...   print(str(e).split(",")[0])
    A static attribute must hold no data

  Args:
    pytree: the object.

  Raises:
    TypeError: if it is not a `Pytree`.
    ValueError: if a static attribute holds data, if a container holds a mark,
      or, in a strict class, if a container holds data without a mark.
  """
  if not isinstance(pytree, Pytree):
    raise TypeError(
      f"`pytree` must be a `Pytree`, but got a `{type(pytree).__name__}`."
    )
  strict = bool(pytree._setattr_flags & _STRICT)
  statuses = pytree._pytree_status or {}
  for name, value in list(vars(pytree).items()):
    _check_value(pytree, name, value, statuses.get(name), strict)


def _check_value(
  owner: Pytree, name: Any, value: Any, status: bool | None, strict: bool
) -> None:
  leaves = attribute_marks.leaves(value)
  where = f"`{name}` of `{type(owner).__name__}`"
  if any(isinstance(leaf, Marker) for leaf in leaves):
    raise ValueError(
      "`nnx.data(...)` and `nnx.static(...)` must be assigned to attributes,"
      f" but {where} holds one inside a `{type(value).__name__}`. Wrap the"
      " whole value."
    )
  if status:
    return
  found = sorted({type(leaf).__name__ for leaf in leaves if is_data(leaf)})
  if not found:
    return
  if status is False:
    raise ValueError(
      f"A static attribute must hold no data, but {where} holds"
      f" {', '.join(f'`{type_}`' for type_ in found)}. Remove the data, or mark"
      f" the attribute as data: `self.{name} = nnx.data(...)`."
    )
  if strict and not is_data(value):
    raise ValueError(
      "In a strict class a container that holds data must be marked, but"
      f" {where} is a `{type(value).__name__}` that holds"
      f" {', '.join(f'`{type_}`' for type_ in found)}. Use `self.{name} ="
      f" nnx.data(...)`, declare `{name}: {type(value).__name__} = nnx.data()`"
      " in the class, or use `nnx.List` or `nnx.Dict`."
    )


# Display


class _Dots:
  def __repr__(self) -> str:
    return "..."


_DOTS = _Dots()


def _shown_first(node: Pytree) -> bool:
  """Tells whether a display shows `node` for the first time."""
  shown = reprlib.memo().setdefault("shown", set())
  first = id(node) not in shown
  shown.add(id(node))
  return first


def _shown_attributes(node: Pytree) -> list[tuple[Any, Any]]:
  statuses = node._pytree_status or {}
  return [
    (name, value)
    for name, value in list(vars(node).items())
    if not str(name).startswith("_") or statuses.get(name, is_data(value))
  ]


def sizes_comment(node: Pytree) -> str:
  """Writes the sizes of the Variables below an object, by their kind.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Foo(nnx.Pytree):
    ...   def __init__(self):
    ...     self.a = nnx.Param(jnp.zeros(3))
    ...     self.b = [self.a, nnx.BatchStat(jnp.zeros(2))]
    >>> nnx.pytreelib.sizes_comment(Foo())
    'Param: 3 (12 B), BatchStat: 2 (8 B), Total: 5 (20 B)'
  """
  totals: dict[str, reprlib.Size] = {}
  known = reprlib.memo().setdefault("sizes", {})
  for kind, size in _sizes(node, known).values():
    totals[kind] = totals.get(kind, reprlib.Size()) + size
  parts = [f"{kind}: {size}" for kind, size in totals.items()]
  if len(parts) > 1:
    parts.append(f"Total: {sum(totals.values(), reprlib.Size())}")
  return ", ".join(parts)


def _sizes(
  node: Any, known: dict[int, dict[int, tuple[str, reprlib.Size]]]
) -> dict[int, tuple[str, reprlib.Size]]:
  """Finds the kind and size of every Variable below `node`, by identity."""
  if isinstance(node, _engine.VariableBase):
    size = reprlib.Size.of(node.raw_value)
    return {id(node): (_size_kind(type(node)), size)} if size else {}
  children: Iterable[Any]
  if isinstance(node, _engine.ObjectBase):
    children = vars(node).values()
  elif isinstance(node, Mapping):  # a State too
    children = node.values()
  elif isinstance(node, (list, tuple)):
    children = node
  else:
    return {}
  if id(node) not in known:
    known[id(node)] = sizes = {}  # what a cycle back to `node` adds
    for child in list(children):
      sizes.update(_sizes(child, known))
  return known[id(node)]


def _size_kind(cls: type) -> str:
  for base in cls.__mro__:
    if base.__dict__.get("_sizes_as_one"):
      return base.__name__
  return cls.__name__
