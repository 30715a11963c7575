"""Flatten and unflatten in plain Python: the oracle of the engine's tests.

Written to be read, and never made faster. `flatten` gives the records that
`GraphDef._records` gives: a `NodeRecord` of each node, in preorder.
"""

from __future__ import annotations

from collections.abc import Sequence
import types
from typing import Any

import numpy as np

from nnx import runtime, variablelib
from nnx.engine import _engine, pytrees
from nnx.graphlib import registry
from nnx.statelib import State

Kind = _engine.NodeKind

_SCALARS = (type(None), bool, int, float, complex, str, bytes, type(...))
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)


def canonical_keys(keys: Sequence[Any]) -> tuple[Any, ...]:
  """Sorts ints, then strings; keeps the order if there are others.

  Example:

    >>> from nnx.graphlib import reference
    >>> reference.canonical_keys(["b", 10, "a", 9])
    (9, 10, 'a', 'b')
  """
  if any(type(key) not in (int, str) for key in keys):
    return tuple(keys)
  return tuple(sorted(keys, key=lambda key: (type(key) is str, key)))


def is_plain(value: Any) -> bool:
  """Tells whether a value is a scalar, function or class: never a pytree node.

  Example:

    >>> from nnx.graphlib import reference
    >>> reference.is_plain(1), reference.is_plain([1])
    (True, False)
  """
  return (
    type(value) in _SCALARS
    or type(value) in _FUNCTIONS
    or isinstance(value, (type, np.generic))
  )


def is_atomic(value: Any) -> bool:
  """Tells whether a static value is compared without calling Python code.

  Example:

    >>> from nnx.graphlib import reference
    >>> reference.is_atomic(1), reference.is_atomic((1,))
    (True, False)
  """
  return (
    type(value) in _SCALARS
    or isinstance(value, type)
    or type(value) is types.FunctionType
    or (
      type(value).__hash__ is object.__hash__
      and type(value).__eq__ is object.__eq__
    )
  )


_NOTHING = {
  "kind": Kind.STATIC,
  "index": -1,
  "leaf": -1,
  "children": 0,
  "type": None,
  "keys": None,
  "aux": None,
  "reference": False,
  "atomic": False,
  "hook_flags": _engine.HookFlags(0),
}


class Flattener:
  """The records of values, one root after the other.

  Example:

    >>> import nnx
    >>> from nnx.graphlib import reference
    >>> walk = reference.Flattener()
    >>> walk.add({"a": nnx.Param(1.0)}, attributes=True)
    >>> [str(record.kind) for record in walk.records], walk.leaves
    (['dict', 'variable'], [1.0])
  """

  def __init__(self) -> None:
    self.records: list[Any] = []
    self.leaves: list[Any] = []
    self.objects: list[Any] = []

  def add(
    self, value: Any, *, attributes: bool, in_state: bool = False
  ) -> None:
    """Walks a value.

    Args:
      value: the value.
      attributes: whether it is read as an attribute: arrays are leaves, other
        values static but for the first of all, lists and dicts have an
        identity. Otherwise as the argument of a function: all but containers
        are leaves.
      in_state: whether it is below a State, where lists and dicts have no
        identity.
    """
    variable = isinstance(value, _engine.VariableBase)
    if variable or isinstance(value, _engine.ObjectBase):
      if not self._refer(value):
        (self._variable if variable else self._object)(value)
    elif runtime.is_array_type(type(value)):
      if not variablelib.is_ref(value):
        self._leaf(value)
      elif not self._refer(value):
        self._leaf(value, index=len(self.objects) - 1)
    elif isinstance(value, _engine.StructureBase):
      self._static(value)
    elif is_plain(value):
      if (attributes and self.records) or value is None:
        self._static(value)
      else:
        self._leaf(value)
    elif type(value) in (list, dict):
      if not attributes or in_state or not self._refer(value):
        self._container(value, attributes, in_state)
    elif type(value) in registry.node_types:
      if not self._refer(value):
        pairs, metadata = registry.node_types[type(value)].flatten(value)
        items = dict(pairs)
        keys = canonical_keys(list(items))
        self._node(Kind.CUSTOM, value, items, keys, metadata)
    elif isinstance(value, tuple):
      names = getattr(value, "_fields", None)
      items = dict(zip(names or range(len(value)), value))
      kind = Kind.TUPLE if names is None else Kind.NAMEDTUPLE
      self._node(kind, value, items, names, None, attributes, in_state)
    elif isinstance(value, State):
      items = value._mapping
      keys = canonical_keys(list(items))
      self._node(Kind.STATE, value, items, keys, None, attributes, True)
    else:
      opened = pytrees.flatten_pytree(value)
      if opened is not None:
        items = dict(zip(opened.keys, opened.children))
        self._node(
          Kind.PYTREE,
          value,
          items,
          opened.keys,
          opened.treedef,
          attributes,
          in_state,
        )
      elif attributes and self.records:
        self._static(value)
      else:
        self._leaf(value)

  def _refer(self, value: Any) -> bool:
    """Records a reference if the value was met before; else numbers it."""
    for index, known in enumerate(self.objects):
      if known is value:
        self._record(Kind.REF, index=index)
        return True
    self.objects.append(value)
    return False

  def _record(self, kind, **fields):
    """Adds a record; fields that are not given are those of `_NOTHING`."""
    fields = {**_NOTHING, "kind": kind, **fields}
    self.records.append(_engine.NodeRecord(fields.values()))

  def _static(self, value):
    self._record(Kind.STATIC, aux=value, atomic=is_atomic(value))

  def _leaf(self, value, index=-1):
    self._record(Kind.LEAF, index=index, leaf=len(self.leaves))
    self.leaves.append(value)

  def _variable(self, variable):
    raw = variable.raw_value
    is_leaf = raw is not None and (
      bool(runtime.is_array_type(type(raw)))
      or is_plain(raw)
      or not (
        isinstance(raw, (list, dict, tuple, State))
        or isinstance(raw, (_engine.VariableBase, _engine.ObjectBase))
        or type(raw) in registry.node_types
        or pytrees.flatten_pytree(raw) is not None
      )
    )
    self._record(
      Kind.VARIABLE,
      index=len(self.objects) - 1,
      leaf=len(self.leaves) if is_leaf else -1,
      children=0 if is_leaf else 1,
      type=type(variable),
      aux=dict(variable._metadata) or None,
      hook_flags=variable._hook_flags,
    )
    if is_leaf:
      self.leaves.append(raw)
    else:
      self.add(raw, attributes=False)

  def _object(self, value):
    marks = value._pytree_status or {}
    keys = canonical_keys(list(vars(value)))
    self._record(
      Kind.OBJECT,
      index=len(self.objects) - 1,
      children=len(keys),
      type=type(value),
      keys=keys,
      aux=dict(marks) or None,
    )
    for key in keys:
      child = vars(value)[key]
      mark = marks.get(key)
      if mark is False:
        self._static(child)
      elif mark is True and is_plain(child) and child is not None:
        self._leaf(child)
      else:
        self.add(child, attributes=True)

  def _container(self, value, attributes, in_state):
    keys = None if type(value) is list else canonical_keys(list(value))
    items = dict(enumerate(value)) if keys is None else value
    kind = Kind.LIST if keys is None else Kind.DICT
    self._node(kind, value, items, keys, None, attributes, in_state)

  def _node(
    self, kind, value, items, keys, aux=None, attributes=True, in_state=False
  ):
    reference = kind in (Kind.LIST, Kind.DICT) and attributes and not in_state
    has_identity = reference or kind is Kind.CUSTOM
    self._record(
      kind,
      index=len(self.objects) - 1 if has_identity else -1,
      children=len(items),
      type=type(value),
      keys=keys,
      aux=aux,
      reference=reference,
    )
    for key in range(len(items)) if keys is None else keys:
      self.add(items[key], attributes=attributes, in_state=in_state)


def flatten(value: Any) -> tuple[tuple[Any, ...], list[Any], list[Any]]:
  """Records an object as `nnx.split` sees it; also its leaves and nodes.

  Example:

    >>> import nnx
    >>> from nnx.graphlib import reference
    >>> model = nnx.Dict(a=nnx.Param(1.0))
    >>> reference.flatten(model)[0] == nnx.graphdef(model)._records
    True
  """
  walk = Flattener()
  walk.add(value, attributes=True)
  return tuple(walk.records), walk.leaves, walk.objects


def unflatten(records: Sequence[Any], leaves: Sequence[Any]) -> Any:
  """Builds the object that records and leaves describe.

  Example:

    >>> import nnx
    >>> from nnx.graphlib import reference
    >>> records, leaves, _ = reference.flatten(nnx.Dict(a=nnx.Param(1.0)))
    >>> reference.unflatten(records, [2.0]).a.value
    2.0
  """
  made: dict[int, Any] = {}
  rest = iter(records)

  def build() -> Any:
    record = next(rest)
    kind, index, leaf = record.kind, record.index, record.leaf
    cls, keys, aux = record.type, record.keys, record.aux
    if kind is Kind.STATIC:
      return aux
    if kind is Kind.LEAF:
      made[index] = leaves[leaf]
      return leaves[leaf]
    if kind is Kind.REF:
      return made[index]
    if kind is Kind.VARIABLE:
      made[index] = variable = cls.from_metadata(None, aux or {})
      variable.raw_value = leaves[leaf] if leaf >= 0 else build()
      return variable
    if kind is Kind.OBJECT:
      made[index] = value = cls.__new__(cls)
      value._pytree_status = dict(aux) if aux else None
      for key in keys:
        vars(value)[key] = build()
      return value
    if kind is Kind.LIST:
      made[index] = value = []
      for _ in range(record.children):
        value.append(build())
      return value
    if kind in (Kind.DICT, Kind.STATE):
      made[index] = value = {}
      for key in keys:
        value[key] = build()
      return cls._from_nested(value) if kind is Kind.STATE else value
    if kind is Kind.CUSTOM:
      node_type = registry.node_types[cls]
      made[index] = value = node_type.create_empty(aux)
      node_type.init(value, [(key, build()) for key in keys])
      return value
    items = [build() for _ in range(record.children)]
    if kind is Kind.TUPLE:
      return tuple(items)
    if kind is Kind.NAMEDTUPLE:
      return cls(*items)
    return aux.unflatten(items)  # a pytree of jax

  return build()
