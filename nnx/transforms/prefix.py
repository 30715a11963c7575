"""What an option says of each leaf: axes, shardings and the like, by prefix.

Options such as `in_axes` and `in_shardings` are pytree prefixes: one entry may
stand for a whole argument, for a part of it, or, as a filter map (`StateAxes`,
`StateSharding`), for the Variables of a graph that each filter selects.
`broadcast` gives the entry of every leaf of a structure, `Walk` further says
where each leaf is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from nnx import filterlib
from nnx.engine import _engine, preorder, pytrees
from nnx.graphlib import modes
from nnx.statelib import State, to_flat_state
from nnx.transforms import lift

N = TypeVar("N")


class FilterMap:
  """Pairs of a filter and an entry; the base of StateAxes and StateSharding.

  Example:

    >>> from nnx.transforms.prefix import FilterMap
    >>> FilterMap({"params": 0, ...: None})
    FilterMap({'params': 0, Ellipsis: None})

  Args:
    entries: a mapping from filters to entries, or pairs of them, or a State of
      entries; the first filter that selects a leaf decides.
  """

  __slots__ = ("filters", "entries")

  # Whether a Variable that has several paths in one graph node must have one
  # entry by all of them; else the first path decides.
  by_all_paths = True

  def __init__(self, entries: Mapping[Any, Any] | Sequence[tuple[Any, Any]], /):
    if isinstance(entries, State):
      pairs = [
        (filterlib.PathIn(path), _unboxed(entry))
        for path, entry in to_flat_state(entries)
      ]
    elif isinstance(entries, Mapping):
      pairs = list(entries.items())
    else:
      pairs = list(entries)
    self.filters = tuple(filter_ for filter_, _ in pairs)
    self.entries = tuple(entry for _, entry in pairs)

  def __setstate__(self, state: Any) -> None:
    if isinstance(state, tuple):  # of an object with slots
      self.filters, self.entries = state[1]["filters"], state[1]["entries"]
    else:  # pickled by Flax
      self.filters = state["_filters"]
      name = "_axes" if "_axes" in state else "_shardings"
      self.entries = state[name]

  def items(self) -> list[tuple[Any, Any]]:
    """Returns the pairs of a filter and an entry."""
    return list(zip(self.filters, self.entries))

  def select(self, path: tuple, value: Any) -> tuple[bool, Any]:
    """Tells whether a filter selects a leaf, and the entry that it then has.

    Args:
      path: the path from the graph node that is an argument, or is in one.
      value: a Variable, or a leaf that is in none.
    """
    for filter_, entry in zip(self.filters, self.entries):
      if filterlib.to_predicate(filter_)(path, value):
        return True, entry
    return False, None

  def map_prefix(self, path: tuple, value: Any) -> Any:
    """Returns the entry of a leaf.

    Example:

      >>> import nnx
      >>> nnx.StateAxes({nnx.Param: 0}).map_prefix(("w",), nnx.Param(1.0))
      0

    Args:
      path: the path from the graph node that is an argument, or is in one.
      value: a Variable, or a leaf that is in none.

    Raises:
      ValueError: if no filter selects it.
    """
    found, entry = self.select(path, value)
    if not found:
      raise ValueError(
        "No filter matched: the filters must select every leaf, but none of"
        f" {list(self.filters)} selects `{text('', path)}` of type"
        f" {type(value).__name__}. Add `...` as the last filter."
      )
    return entry

  def __repr__(self) -> str:
    pairs = ", ".join(f"{f!r}: {e!r}" for f, e in self.items())
    return f"{type(self).__name__}({{{pairs}}})"

  def __eq__(self, other: Any) -> bool:
    return type(self) is type(other) and self.items() == other.items()

  def __hash__(self) -> int:
    return hash((type(self), self.filters, self.entries))


def _unboxed(entry: Any) -> Any:
  return entry.value if isinstance(entry, _engine.VariableBase) else entry


def check(policy: lift.Policy, option: str, entries: Any) -> None:
  """Refuses in an option what it cannot say.

  Args:
    policy: the mode.
    option: the name of the option.
    entries: its value.

  Raises:
    ValueError: if there is an object with arrays, or in a mode without updates
      a filter map, or a Variable that holds an entry.
  """
  for entry in jax.tree.leaves(entries):
    if isinstance(entry, (jax.Array, np.ndarray)):
      raise ValueError(
        f"`{option}` of `nnx.{policy.transform}` must have an entry for each"
        f" leaf of an object, but has an array of shape {entry.shape} itself."
        " Pass one entry for the whole object, or make one for each leaf by"
        " `nnx.prefix`."
      )
  if policy.mode.updates:
    return
  unusual = (FilterMap, _engine.VariableBase)
  for entry in jax.tree.leaves(
    entries, is_leaf=lambda x: isinstance(x, unusual)
  ):
    name = type(entry).__name__
    if isinstance(entry, FilterMap):
      policy.refuse(
        f"`{option}` must hold no filters, but has a `{name}`. Use"
        " `nnx.prefix(node, {filter: entry, ...})` in its place"
      )
    if isinstance(entry, _engine.VariableBase):
      policy.refuse(
        f"`{option}` must have one entry for a whole Variable, but has a"
        f" `{name}` that holds one. Use `nnx.prefix` to make it"
      )


def prefix(
  node: N,
  filter_map: Mapping[Any, Any] | Callable[[tuple, Any], Any],
  /,
  *,
  graph: bool | None = None,
) -> N:
  """Makes a prefix, such as `in_axes`, in the shape of what it speaks of.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> state = {
    ...   "a": nnx.Param(jnp.array(2)),
    ...   "b": nnx.BatchStat(jnp.arange(5)),
    ... }
    >>> axes = nnx.prefix(state, {nnx.Param: None, nnx.BatchStat: 0})
    >>> axes
    {'a': None, 'b': 0}
    >>> nnx.vmap(lambda s: s["a"] * s["b"], in_axes=(axes,))(state)
    Array([0, 2, 4, 6, 8], dtype=int32)

  Args:
    node: a Module, a Variable, or any pytree of them.
    filter_map: `filter_map(path, leaf)` gives what stands in the place of a
      Variable, or of an array that is in none; or a mapping from filters to
      that, where the first filter that selects it decides.
    graph: accepted for programs that set it: the result is a copy in any mode.
      In the graph mode of Flax it has another form.

  Returns:
    A copy of `node` with that in the place of Variables and arrays; for the
    options of transforms of `nnx` and of jax. Nodes that share a Variable have
    an entry for it each.

  Raises:
    ValueError: if no filter selects a leaf.
  """
  modes.resolve(graph)  # Which mode it is makes no difference.
  if isinstance(filter_map, Mapping):
    filter_map = FilterMap(filter_map).map_prefix
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: filter_map(tuple(map(pytrees.plain_key, path)), leaf),
    node,
    is_leaf=lambda x: isinstance(x, _engine.VariableBase),
  )


class Root(NamedTuple):
  """What an option says of one root, and how errors call the root."""

  entry: Any
  option: str
  where: str
  path: tuple = ()


class Place(NamedTuple):
  """Where a leaf is: the outermost graph node, the path from it, the Variable.

  `top` and `variable` are numbers of nodes, -1 where there is none.
  """

  top: int
  path: tuple
  variable: int
  text: str


def check_form(
  option: str, entry: Any, is_entry: Callable[[Any], bool]
) -> bool:
  """Refuses an option for all arguments that is neither one entry nor a tuple.

  Args:
    option: its name.
    entry: its value.
    is_entry: whether something stands for all leaves below it.

  Returns:
    Whether it is one entry.

  Raises:
    TypeError: if it is neither.
  """
  if is_entry(entry) or isinstance(entry, FilterMap):
    return True
  if not isinstance(entry, (tuple, list)):
    raise TypeError(
      f"`{option}` must be one entry for all arguments or a tuple with one for"
      f" each, but got `{entry!r}` of type `{type(entry).__name__}`."
    )
  return False


def roots(
  entry: Any,
  count: int,
  names: Sequence[str],
  *,
  is_entry: Callable[[Any], bool],
  option: str,
  keyword_entry: Any = None,
) -> list[Root]:
  """Returns what an option for all arguments says of each.

  Args:
    entry: one entry for all positional arguments, or one for each.
    count: the number of positional arguments.
    names: the keyword arguments.
    is_entry: whether something stands for all leaves below it.
    option: the name of the option, for errors.
    keyword_entry: the entry of keyword arguments.

  Raises:
    TypeError: if `entry` is neither an entry nor a tuple or list.
    ValueError: if there are not as many entries as positional arguments.
  """
  one = check_form(option, entry, is_entry)
  entries = [entry] * count if one else list(entry)
  if len(entries) != count:
    raise ValueError(
      f"`{option}` must have one entry for each positional argument, but it has"
      f" {len(entries)} for {count}."
    )
  return [
    *(Root(e, option, f"args[{i}]") for i, e in enumerate(entries)),
    *(Root(keyword_entry, option, name) for name in names),
  ]


_SEQUENCES = frozenset(
  (
    _engine.NodeKind.LIST,
    _engine.NodeKind.NAMEDTUPLE,
    _engine.NodeKind.TUPLE,
  )
)


class Walk:
  """One walk over a structure along prefixes.

  Attributes:
    entries: by leaf.
    places: by leaf, None where `skip` passed.
    tops: for each outermost graph node, in order, the `Root` that says the same
      of it: what state made inside of it later gets.
    top_indices: the numbers of these nodes.
  """

  def __init__(
    self,
    structure: Any,
    leaves: Sequence[Any],
    objects: Sequence[Any],
    is_entry: Callable[[Any], bool],
  ):
    self.records = structure._records
    self.leaves = leaves
    self.objects = objects
    self.is_entry = is_entry
    self.entries: list[Any] = [None] * len(leaves)
    self.places: list[Place | None] = [None] * len(leaves)
    self.tops: list[Root] = []
    self.top_indices: list[int] = []
    self.position = 0
    self._first: dict[int, tuple[int, int]] = {}  # node -> position, top
    self._checking: set[tuple[int, Any]] = set()
    # What a cycle says of leaves before they are reached the first time.
    self._early: dict[int, list[tuple[Any, tuple]]] = {}

  def skip(self, count: int) -> None:
    """Passes some roots."""
    for _ in range(count):
      self.position = preorder.subtree_end(self.records, self.position)

  def visit_root(self, root: Root) -> None:
    """Assigns entries to the leaves of the next root."""
    self.root = root
    self.position = self._visit(
      self.position, root.entry, root.path, Place(-1, (), -1, ""), False
    )

  def _visit(
    self, position: int, entry: Any, path: tuple, place: Place, again: bool
  ) -> int:
    """Assigns, or compares if `again`; returns the end of the subtree."""
    record = self.records[position]
    kind, index, leaf = record.kind, record.index, record.leaf
    if kind is _engine.NodeKind.REF:
      self._visit_again(index, entry, path, place)
      return position + 1
    if index >= 0:
      if place.top < 0:
        place = Place(index, (), -1, "")
        if not again:
          self.tops.append(self.root._replace(entry=entry, path=path))
          self.top_indices.append(index)
      if kind is _engine.NodeKind.VARIABLE:
        place = place._replace(variable=index)
        if isinstance(entry, _engine.VariableBase):
          entry = entry.raw_value
      if not again:
        self._first[index] = position, place.top
    whole = self.is_entry(entry) or isinstance(entry, FilterMap)
    if isinstance(entry, FilterMap) and (
      leaf >= 0 or kind is _engine.NodeKind.VARIABLE
    ):
      entry = self._select(entry, path, place, leaf)
    if leaf >= 0:
      if not whole:
        self._fail(entry, kind, path)
      if again:
        self._check_same(leaf, entry, path)
      else:
        self.entries[leaf] = entry
        self.places[leaf] = place._replace(text=self.text(path))
        for early_entry, early_path in self._early.pop(leaf, ()):
          self._check_same(leaf, early_entry, early_path)
    inner = self._inner(entry, record, path, whole)
    next_position = position + 1
    for key, below_entry in zip(preorder.child_keys(record), inner):
      below = place
      if place.top >= 0 and place.variable < 0:
        below = place._replace(path=(*place.path, key))
      next_position = self._visit(
        next_position, below_entry, (*path, key), below, again
      )
    return next_position

  def _visit_again(
    self, index: int, entry: Any, path: tuple, place: Place
  ) -> None:
    """Compares what is said of a shared node here and where it was first."""
    if index not in self._first:
      return  # of a root that was skipped
    position, top = self._first[index]
    if (
      top == place.top
      and isinstance(entry, FilterMap)
      and not entry.by_all_paths
    ):
      return
    # A filter map may say another thing at each path; cycles must end.
    mark = (index, id(entry))
    if mark in self._checking:
      return
    self._checking.add(mark)
    self._visit(position, entry, path, place, True)
    self._checking.discard(mark)

  def _inner(
    self, entry: Any, record: _engine.NodeRecord, path: tuple, whole: bool
  ) -> list[Any]:
    """Finds the entries of the children."""
    kind, keys, children = record.kind, record.keys, record.children
    if whole:
      return [entry] * children
    if children == 0:
      return []
    if kind in _SEQUENCES and isinstance(entry, (tuple, list)):
      if len(entry) == children:
        return list(entry)
    elif keys is not None and isinstance(entry, Mapping):
      if set(entry) == set(keys):
        return [entry[key] for key in keys]
    elif kind is _engine.NodeKind.OBJECT and isinstance(
      entry, _engine.ObjectBase
    ):
      # What `jax.tree.map` or `nnx.prefix` makes of the object itself.
      attributes = vars(entry)
      if set(attributes) == set(keys or ()):
        return [attributes[key] for key in keys or ()]
    self._fail(entry, kind, path)
    raise AssertionError

  def _select(self, entry: Any, path: tuple, place: Place, leaf: int) -> Any:
    """Returns what a filter map says of a Variable or of a leaf in none."""
    variable = place.variable
    value = self.objects[variable] if variable >= 0 else self.leaves[leaf]
    found, selected = entry.select(place.path, value)
    if not found:
      raise ValueError(
        f"The filters of `{self.root.option}` must select every leaf, but none"
        f" of {list(entry.filters)} selects `{self.text(path)}` of type"
        f" {type(value).__name__}: add `...` as the last filter."
      )
    if not self.is_entry(selected):
      self._fail(selected, _engine.NodeKind.LEAF, path)
    return selected

  def _check_same(self, leaf: int, entry: Any, path: tuple) -> None:
    """Refuses a shared node that is given two different entries."""
    before = self.entries[leaf]
    place = self.places[leaf]
    if place is None:
      self._early.setdefault(leaf, []).append((entry, path))
      return
    if before != entry:
      value = (
        self.objects[place.variable]
        if place.variable >= 0
        else self.leaves[leaf]
      )
      raise ValueError(
        f"`{self.root.option}` must give a shared node one entry, but the"
        f" {type(value).__name__} at `{place.text}` and `{self.text(path)}` has"
        f" both {before!r} and {entry!r}."
      )

  def _fail(self, entry: Any, kind: _engine.NodeKind, path: tuple) -> None:
    """Raises the error for a prefix that does not fit."""
    article = "an" if kind is _engine.NodeKind.OBJECT else "a"
    raise ValueError(
      f"`{self.root.option}` must be a prefix of what it speaks of, but at"
      f" `{self.text(path)}` there is {article} {kind} where it has {entry!r}."
    )

  def text(self, path: Sequence[Any]) -> str:
    """Returns a path from the current root as a user would type it."""
    return text(self.root.where, path)


def text(where: str, path: Sequence[Any]) -> str:
  """Writes a path as a user would type it."""
  return preorder.path_text(path, where)
