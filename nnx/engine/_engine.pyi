"""The graph engine in C++; README.md says how it works.

What has several parts crosses this border as a record with named fields, what
is one of several kinds as a member of an enum. `object` is a value that the
engine only looks into; `Any` one that the caller knows the type of.
"""

from collections.abc import Callable, Iterable
import enum
from types import EllipsisType
from typing import Any, TypedDict, TypeVar, Unpack, overload

T = TypeVar("T")
Key = int | str
Nested = dict[Key, Any]
# `True` selects all, a class its instances; a predicate is called with the path
# and the leaf.
Filter = bool | type | Callable[[tuple[Key, ...], Any], bool]
# What jax is given as the static part of a pytree node.
Aux = tuple[Any, ...] | None

class NodeKind(enum.StrEnum):
  STATIC = "static"
  LEAF = "leaf"
  VARIABLE = "variable"
  OBJECT = "object"
  LIST = "list"
  DICT = "dict"
  TUPLE = "tuple"
  NAMEDTUPLE = "namedtuple"
  STATE = "state"
  PYTREE = "pytree"
  CUSTOM = "custom"
  REF = "ref"

class HookFlags(enum.IntFlag):
  GET = 1
  SET = 2
  BOXED = 4

# Records are struct sequences: made of one iterable of their fields in order.

class NodeRecord(tuple[Any, ...]):
  def __new__(cls, fields: Iterable[Any], /) -> NodeRecord: ...
  @property
  def kind(self) -> NodeKind: ...
  @property
  def index(self) -> int: ...  # type: ignore[override]  # hides tuple's
  @property
  def leaf(self) -> int: ...
  @property
  def children(self) -> int: ...
  @property
  def type(self) -> type | None: ...
  @property
  def keys(self) -> tuple[Any, ...] | None: ...
  @property
  def aux(self) -> Any: ...
  @property
  def reference(self) -> bool: ...
  @property
  def atomic(self) -> bool: ...
  @property
  def hook_flags(self) -> HookFlags: ...

class Flattened(tuple[StructureBase, tuple[Any, ...], tuple[Any, ...]]):
  @property
  def structure(self) -> StructureBase: ...
  @property
  def leaves(self) -> tuple[Any, ...]: ...
  @property
  def objects(self) -> tuple[Any, ...]: ...

class Unflattened(tuple[tuple[Any, ...], tuple[Any, ...]]):
  @property
  def values(self) -> tuple[Any, ...]: ...
  @property
  def objects(self) -> tuple[Any, ...]: ...

class Prepared(tuple[Any, tuple[Any, ...], tuple[int, ...]]):
  @property
  def function(self) -> Any: ...
  @property
  def arguments(self) -> tuple[Any, ...]: ...
  @property
  def donated(self) -> tuple[int, ...]: ...

class VariableWrite(tuple[int, int]):
  @property
  def index(self) -> int: ...  # type: ignore[override]  # hides tuple's
  @property
  def output(self) -> int: ...

class SourceLine(tuple[str, int]):
  @property
  def filename(self) -> str: ...
  @property
  def line(self) -> int: ...

class OpenedPytree(tuple[tuple[Any, ...], Any, tuple[Any, ...]]):
  def __new__(
    cls, fields: tuple[tuple[Any, ...], object, tuple[Any, ...]], /
  ) -> OpenedPytree: ...
  @property
  def children(self) -> tuple[Any, ...]: ...
  @property
  def treedef(self) -> Any: ...
  @property
  def keys(self) -> tuple[Any, ...]: ...

class JitEntry(
  tuple[
    Callable[..., Packed], Iterable[int] | None, Callable[..., Packed] | None
  ]
):
  def __new__(
    cls,
    fields: tuple[
      Callable[..., Packed], Iterable[int] | None, Callable[..., Packed] | None
    ],
    /,
  ) -> JitEntry: ...
  @property
  def function(self) -> Callable[..., Packed]: ...
  @property
  def donated(self) -> Iterable[int] | None: ...
  @property
  def in_place(self) -> Callable[..., Packed] | None: ...

# What the engine is given of Python. See `runtime.h`.
class Settings(TypedDict, total=False):
  trace_context: object
  eval_trace: object
  trace_error: Callable[[Any], Exception | None]
  is_array_type: Callable[[type], bool | EllipsisType | None]
  flatten_pytree: Callable[[Any], OpenedPytree | None]
  named_scope: Callable[[str], Any]
  settings: object
  explain_error: Callable[[BaseException], None]
  copy_array: Callable[[Any], object]
  check_loan: Callable[[tuple[Any, ...], tuple[Any, ...]], None]
  may_lend: Callable[[], bool]
  get_threshold: Callable[[], tuple[int, int, int]]
  set_threshold: Callable[[int], object]
  new_ref: Callable[[Any], Any]
  unboxed: Callable[[Any], Any]
  array_type: type
  jitted_type: type
  ref_type: type
  tracer_type: type
  variable_metadata: type
  attribute_marker: type
  state: type
  structure: type[StructureBase]
  library_prefix: str
  freeze_static: Callable[[Any], object]
  restored_value: Callable[[Any, Any, str, bool], object]
  shape_message: Callable[[str, Any, Any], str]
  restored_leaf: object
  jax_prefix: str

def configure(**settings: Unpack[Settings]) -> None: ...
def name_calls(cls: type, /) -> None: ...

class VariableBase:
  value: Any
  raw_value: Any
  _stored: Any
  @property
  def _metadata(self) -> dict[str, Any]: ...
  @property
  def _hook_flags(self) -> HookFlags: ...
  @property
  def _origin(self) -> SourceLine | None: ...
  @property
  def _can_update(self) -> bool: ...
  @property
  def _trace_ref(self) -> Any: ...
  def __init__(self, value: object, /, **metadata: object) -> None: ...
  def __getitem__(self, key: Any) -> Any: ...
  def __setitem__(self, key: Any, value: object) -> None: ...
  def __delitem__(self, key: Any) -> None: ...
  def __getattr__(self, name: str) -> Any: ...
  def _set_hook_flags(self, flags: int, /) -> None: ...
  def _check_can_update(self) -> None: ...
  @classmethod
  def _new(
    cls: type[T], raw_value: object, metadata: dict[str, Any], /
  ) -> T: ...

class ObjectBase:
  _pytree_status: dict[Key, bool] | None
  @property
  def _origin(self) -> SourceLine | None: ...
  @property
  def _can_update(self) -> bool: ...
  @property
  def _trace_ref(self) -> Any: ...
  def _check_can_update(self) -> None: ...
  def _setattr_raw(self, name: str, value: object, /) -> None: ...
  def _delattr_raw(self, name: str, /) -> None: ...

class StructureBase:
  @property
  def _records(self) -> tuple[NodeRecord, ...]: ...
  @property
  def num_leaves(self) -> int: ...
  @property
  def num_nodes(self) -> int: ...
  @property
  def _num_roots(self) -> int: ...
  @property
  def _num_outer(self) -> int: ...
  @property
  def _shares(self) -> bool: ...
  @property
  def _is_tree(self) -> bool: ...
  @property
  def _object_types(self) -> set[type]: ...
  @property
  def _updates(self) -> tuple[int, ...] | None: ...
  @classmethod
  def _restore(
    cls: type[T],
    records: tuple[tuple[Any, ...], ...],
    num_roots: int,
    num_outer: int = 0,
    updates: tuple[int, ...] | None = None,
    /,
  ) -> T: ...

class Plan:
  @property
  def writes(self) -> tuple[VariableWrite, ...] | None: ...
  @property
  def matches(self) -> tuple[int, ...]: ...
  @property
  def output_of(self) -> tuple[int, ...]: ...
  @property
  def structure(self) -> StructureBase: ...
  @property
  def origin(self) -> tuple[int, ...]: ...
  @classmethod
  def _restore(
    cls,
    structure: StructureBase,
    output_of: tuple[int, ...],
    matches: tuple[int, ...],
    writes: tuple[tuple[int, int], ...] | None,
    origin: tuple[int, ...],
    /,
  ) -> Plan: ...

class Packed:
  @property
  def plan(self) -> Plan: ...
  @property
  def outputs(self) -> tuple[Any, ...]: ...

class NotInPlace(Exception): ...
class Loan: ...

def loan(arrays: tuple[Any, ...], lent: bool, /) -> Loan: ...
def loan_flatten(loan: Loan, /) -> tuple[tuple[Any, ...], None]: ...
def loan_unflatten(
  aux: None, children: Iterable[Any], /
) -> Any: ...  # a tuple, which stands for a Loan

class JitFunction:
  def __init__(
    self,
    make_entry: Callable[
      [StructureBase, tuple[Any, ...], tuple[str, ...], tuple[Any, ...]],
      JitEntry,
    ],
    copy_array: Callable[[Any], object],
    statics: frozenset[int | str],
  ) -> None: ...
  def __call__(self, *args: Any, **kwargs: Any) -> Any: ...
  def __get__(self, instance: object, owner: type | None = None) -> Any: ...
  def clear_cache(self) -> None: ...
  def cache_clear(self) -> None: ...
  def _cache_size(self) -> int: ...
  def _prepare(self, *args: object, **kwargs: object) -> Prepared: ...

# Lifting: functions of objects as functions of their leaves.

def flatten(
  values: tuple[object, ...], static: tuple[bool, ...] = ()
) -> Flattened: ...
def unflatten(
  structure: StructureBase, leaves: tuple[object, ...], /
) -> Unflattened: ...
def pack(
  structure: StructureBase,
  objects: tuple[object, ...],
  leaves: tuple[object, ...],
  result: object,
  given: tuple[object, ...] | None = None,
  /,
) -> Packed: ...
def apply(
  packed: Packed, objects: tuple[object, ...], leaves: tuple[object, ...], /
) -> Any: ...
def matches(
  structure: StructureBase, values: tuple[object, ...], /
) -> bool: ...
def with_outputs(plan: Plan, leaves: tuple[int, ...], /) -> Plan: ...
def framed(
  structure: StructureBase,
  objects: tuple[object, ...],
  function: Callable[..., T],
  /,
  *args: object,
) -> T: ...
def forget_copies(structure: StructureBase, /) -> None: ...
def packed_flatten(packed: Packed, /) -> tuple[tuple[Any, ...], Plan]: ...
def packed_unflatten(plan: Plan, outputs: Iterable[object], /) -> Packed: ...

# The graph functions.

@overload
def split(
  value: object,
  filters: tuple[Filter, ...],
  exhaustive: bool,
  as_pytree: bool = False,
  /,
) -> tuple[Any, list[Any]]: ...
@overload
def split(
  value: object,
  filters: tuple[Filter, ...],
  exhaustive: bool,
  seen: list[Any] | None,
  updated: list[Any] | None,
  /,
) -> tuple[Any, list[Any]]: ...
def state(
  value: object, filters: tuple[Filter, ...], as_tree: bool = False, /
) -> list[Any]: ...
def is_tree(value: object, /) -> bool: ...
def graphdef(value: object, as_pytree: bool = False, /) -> Any: ...
def merge(
  structure: object,
  state: object,
  copy: bool,
  keep_arrays: bool,
  seen: list[Any] | None = None,
  updated: list[Any] | None = None,
  /,
) -> Any: ...
def clone(value: T, variables: bool, as_tree: bool = False, /) -> T: ...
def update(
  value: object,
  state: object,
  check_variables: bool,
  check_arrays: bool,
  new_arrays: bool,
  /,
) -> None: ...
def pop(value: object, filters: tuple[Filter, ...], /) -> list[Nested]: ...

# Identity.

def same_codes(
  functions: tuple[Callable[..., Any], ...], codes: tuple[object, ...], /
) -> bool: ...
def same_values(
  dict: dict[str, Any], values: tuple[object, ...], /
) -> bool: ...

# Nested mappings alone.

def split_mapping(
  mapping: object, filters: tuple[Filter, ...], exhaustive: bool, /
) -> list[Nested]: ...
def merge_mappings(*mappings: object) -> Nested: ...
def flatten_mapping(
  mapping: object, /
) -> tuple[tuple[tuple[Key, ...], ...], list[Any]]: ...

# Nodes, one by one.

def items(
  value: object, as_tree: bool = False, /
) -> list[tuple[Key, Any]] | None: ...
def set_item(node: object, key: Key, child: object, /) -> None: ...
def is_custom_node(value: object, /) -> bool: ...
def holds_data(value: object, /) -> bool: ...
def forget_type(type: type, /) -> None: ...
def register_node_type(
  type: type[T],
  flatten: Callable[[T], tuple[Iterable[tuple[Key, Any]], Any]],
  set_key: Callable[[T, Key, Any], object],
  pop_key: Callable[[T, Key], Any],
  create_empty: Callable[[Any], T],
  clear: Callable[[T], object],
  init: Callable[[T, Iterable[tuple[Key, Any]]], object],
  /,
) -> None: ...

# Pytrees of jax, whose protocol asks for these pairs of children and aux.

def variable_flatten(variable: VariableBase, /) -> tuple[tuple[Any], Aux]: ...
def make_variable_unflatten(
  cls: type[T], /
) -> Callable[[Any, Iterable[Any]], T]: ...
def object_flatten(
  node: ObjectBase, /
) -> tuple[tuple[Any, ...], tuple[Any, ...]]: ...
def make_object_unflatten(
  cls: type[T], /
) -> Callable[[Any, Iterable[Any]], T]: ...
def make_state_unflatten(cls: type, /) -> Callable[[Any, Any], Any]: ...
def state_flatten(
  state: object, /
) -> tuple[tuple[Any, ...], tuple[Key, ...]]: ...
