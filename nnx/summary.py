"""Tables of what is in a model: `tabulate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import functools
import io
import threading
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nnx import reprlib, summary_cells
from nnx.containers import Dict, List
from nnx.graphlib import functional, traversal
from nnx.module import Module
from nnx.pytreelib import Pytree
from nnx.rnglib import RngState, RngStream
from nnx.statelib import State, to_flat_state
from nnx.variablelib import Variable, is_ref

# The attribute under which an object that is watched keeps its `_Place`.
_PLACE = "_tabulate_place"


class _Place:
  """Where an object is. A static attribute, equal to itself alone.

  So what a method compiles for one table is not found again for another, whose
  calls would go unseen.
  """

  def __init__(self, path: tuple[Any, ...]):
    self.path = path


class CallInfo(NamedTuple):
  """One call of a method of an object: a row of `tabulate`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> calls = []
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu)
    >>> _ = nnx.tabulate(
    ...   model, jnp.ones((1, 2)), row_filter=lambda row: not calls.append(row)
    ... )
    >>> [(row.path, row.type.__name__) for row in calls]
    [((), 'Sequential'), (('layers', 0), 'Linear')]

  Attributes:
    call_order: the number of calls before it.
    type: the class of the object.
    object_path: where the object is.
    path: the same; the method's name follows, unless it is `__call__`.
    inputs_repr: the arguments, as they are shown.
    outputs: the result, with `jax.ShapeDtypeStruct`s in place of arrays.
    flops: floating-point operations of the call, if asked for.
    vjp_flops: those of the call and its gradient, if asked for.
  """

  call_order: int
  type: type
  object_path: tuple[Any, ...]
  path: tuple[Any, ...]
  inputs_repr: str
  outputs: Any
  flops: int | None = None
  vjp_flops: int | None = None


def filter_rng_streams(row: CallInfo) -> bool:
  """Tells whether a row is anything but a call of a random stream.

  Example:

    >>> import nnx
    >>> from nnx.summary import CallInfo, filter_rng_streams
    >>> filter_rng_streams(
    ...   CallInfo(0, nnx.RngStream, ("rngs",), ("rngs",), "", None)
    ... )
    False
  """
  return not issubclass(row.type, RngStream)


# Watching calls


class _Watch(threading.local):
  recorder: _Recorder | None = None


_watch = _Watch()


def _is_iterator(value: Any) -> bool:
  return isinstance(value, Iterator)


class _Recorder:
  """Keeps the calls that are made while it is active."""

  def __init__(self, flops: bool, vjp_flops: bool):
    self.flops = flops
    self.vjp_flops = vjp_flops
    self.rows: list[CallInfo] = []
    self._seen: set[Any] = set()
    self._calls = 0

  def call(
    self,
    node: Pytree,
    cls: type,
    name: str,
    method: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
  ) -> Any:
    order, self._calls = self._calls, self._calls + 1
    path = getattr(node, _PLACE).path
    inputs = summary_cells.arguments_text(args, kwargs)
    identity = path, name, inputs
    if identity in self._seen:
      return method(node, *args, **kwargs)
    self._seen.add(identity)
    counted = self.flops or self.vjp_flops
    # Before the call, which may change the object.
    flat = _flat(node, method, args, kwargs) if counted else None
    outputs = method(node, *args, **kwargs)
    flops, vjp_flops = self._costs(flat)
    self.rows.append(
      CallInfo(
        call_order=order,
        type=cls,
        object_path=path,
        path=path if name == "__call__" else (*path, name),
        inputs_repr=inputs,
        outputs=jax.tree.map(_abstract, outputs, is_leaf=_is_iterator),
        flops=flops,
        vjp_flops=vjp_flops,
      )
    )
    return outputs

  def _costs(self, flat: _Flat | None) -> tuple[int | None, int | None]:
    if flat is None:
      return None, None
    function, operands = flat
    _watch.recorder = None  # what is lowered calls the same methods again
    try:
      flops = _flops(function, operands) if self.flops else None
      if not self.vjp_flops:
        return flops, None
      return flops, _flops(functools.partial(_vjp, function), operands)
    finally:
      _watch.recorder = self


def _abstract(value: Any) -> Any:
  if isinstance(value, (jax.Array, np.ndarray)):
    return jax.ShapeDtypeStruct(value.shape, value.dtype)
  return value


# A function of arrays, and abstract ones to call it with.
_Flat = tuple[Callable[..., Any], tuple[Any, ...]]


def _flat(
  node: Any,
  method: Callable[..., Any],
  args: tuple[Any, ...],
  kwargs: Mapping[str, Any],
) -> _Flat:
  """Turns a call into a function of arrays, and gives its abstract ones.

  The function works on a copy of the node, and returns the arrays of the
  result.
  """
  graphdef, state = functional.split(node, graph=True)
  variables, statedef = jax.tree.flatten(state)
  leaves, treedef = jax.tree.flatten((args, dict(kwargs)))
  dynamic = [i for i, leaf in enumerate(leaves) if summary_cells.is_array(leaf)]

  def function(variables, arrays):
    copy = functional.merge(graphdef, statedef.unflatten(variables))
    filled = list(leaves)
    for i, array in zip(dynamic, arrays, strict=True):
      filled[i] = array
    args, kwargs = treedef.unflatten(filled)
    return method(copy, *args, **kwargs)

  arrays = [leaves[i] for i in dynamic]
  return function, jax.tree.map(_abstract, (variables, arrays))


def _vjp(
  function: Callable[..., Any], variables: list[Any], arrays: list[Any]
) -> Any:
  """Computes the gradient of all float outputs by all float inputs."""
  inputs = [*variables, *arrays]
  floats = [
    i
    for i, leaf in enumerate(inputs)
    if jnp.issubdtype(leaf.dtype, jnp.inexact)
  ]

  def of_floats(leaves):
    filled = list(inputs)
    for i, leaf in zip(floats, leaves, strict=True):
      filled[i] = leaf
    count = len(variables)
    outputs = jax.tree.leaves(function(filled[:count], filled[count:]))
    return [
      leaf
      for leaf in outputs
      if summary_cells.is_array(leaf)
      and jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]

  primals, backward = jax.vjp(of_floats, [inputs[i] for i in floats])
  return backward(primals)


def _flops(function: Callable[..., Any], operands: tuple[Any, ...]) -> int:
  def arrays_of(*operands):
    return [
      x
      for x in jax.tree.leaves(function(*operands))
      if summary_cells.is_array(x)
    ]

  # Here: a table without FLOPs needs no kernels.
  from nnx import kernels

  # A fused kernel counts as what it computes, which XLA cannot see in it.
  with kernels.xla_only():
    lowered = jax.jit(arrays_of).lower(*operands)
  # Of the program as written; not every backend can tell before it is compiled.
  cost = lowered.cost_analysis() or lowered.compile().cost_analysis()
  return int((cost or {}).get("flops", 0))


# Calls of the methods of these are not part of what a model computes.
_COMMON = (Module, Pytree, Dict, List)


def _watched_methods(cls: type) -> Iterator[tuple[str, Any]]:
  """Lists the methods of a class that are rows, but those of all Modules."""
  found: set[str] = set()
  for base in cls.__mro__:
    for name, method in vars(base).items():
      if name in found:
        continue
      found.add(name)
      if name != "__call__" and (name.startswith("_") or base in _COMMON):
        continue
      if callable(method) and hasattr(type(method), "__get__"):
        if not isinstance(method, (type, staticmethod, classmethod)):
          yield name, method


@functools.lru_cache(maxsize=256)
def _watched_class(cls: type) -> type:
  """Derives a class whose methods tell that they are called."""

  def watched(name: str, method: Any) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self, *args, **kwargs):
      def original(node, *args, **kwargs):
        return method.__get__(node, cls)(*args, **kwargs)

      recorder = _watch.recorder
      # An object that the model makes of one of its own has no place.
      if recorder is None or not hasattr(self, _PLACE):
        return original(self, *args, **kwargs)
      return recorder.call(self, cls, name, original, args, kwargs)

    return call

  methods = {name: watched(name, m) for name, m in _watched_methods(cls)}
  return type(cls.__name__, (cls,), {"__module__": cls.__module__, **methods})


def _record(
  obj: Any,
  method: str,
  args: tuple[Any, ...],
  kwargs: Mapping[str, Any],
  recorder: _Recorder,
) -> None:
  """Runs a method on a copy of the object, without computing anything."""
  obj = functional.clone(obj, graph=True)
  for path, node in list(traversal.iter_graph(obj, graph=True)):
    if isinstance(node, Pytree):
      cls: Any = type(node)
      cls = _watched_class(cls)
      if isinstance(node, Dict):  # whose attributes are its items
        cls = type(cls.__name__, (cls,), {_PLACE: _Place(path)})
      else:
        setattr(node, _PLACE, _Place(path))
      node.__class__ = cls
  if not callable(getattr(type(obj), method, None)):
    raise ValueError(
      f"`method` must be that of the object, but a `{type(obj).__name__}` has"
      f" no method `{method}`."
    )

  def run(node, *args, **kwargs):
    getattr(node, method)(*args, **kwargs)

  function, operands = _flat(obj, run, args, kwargs)
  before = _watch.recorder
  _watch.recorder = recorder
  try:
    jax.eval_shape(function, *operands)
  finally:
    _watch.recorder = before


# The table


class _Contents:
  """The Variables of a model, each at the first path that leads to it."""

  def __init__(self, obj: Pytree):
    state = functional.state(obj, graph=True)
    leaves = to_flat_state(state) if isinstance(state, State) else ()
    self.variables = [
      (path, leaf) for path, leaf in leaves if isinstance(leaf, Variable)
    ]

  @staticmethod
  def type_of(variable: Variable[Any]) -> type:
    return RngState if isinstance(variable, RngState) else type(variable)

  def types(self) -> list[type]:
    types = {self.type_of(variable) for _, variable in self.variables}
    return sorted(types, key=lambda t: t.__name__)

  def below(self, path: tuple[Any, ...], type_: type) -> reprlib.Size:
    """Sums the sizes of the Variables of a kind below a path."""
    total = reprlib.Size()
    for where, variable in self.variables:
      if where[: len(path)] == path and self.type_of(variable) is type_:
        total += reprlib.Size.of(_value(variable))
    return total

  def at(self, path: tuple[Any, ...], type_: type) -> dict[Any, Any]:
    """Finds the Variables of a kind among the attributes at a path."""
    found: dict[Any, Any] = {}
    for where, variable in self.variables:
      if where[:-1] != path or not where or self.type_of(variable) is not type_:
        continue
      value = _value(variable)
      text = value if summary_cells.is_array(value) else ""
      metadata = variable.get_metadata(exclude_required=True)
      if metadata:
        found[where[-1]] = {"value": text, **metadata}
      elif summary_cells.is_array(value):
        found[where[-1]] = text
    return found


def _value(variable: Variable[Any]) -> Any:
  value = variable.raw_value
  return value[...] if is_ref(value) else value


def tabulate(
  obj: Any,
  *input_args: Any,
  depth: int | None = None,
  method: str = "__call__",
  row_filter: Callable[[CallInfo], bool] = filter_rng_streams,
  table_kwargs: Mapping[str, Any] = MappingProxyType({}),
  column_kwargs: Mapping[str, Any] = MappingProxyType({}),
  console_kwargs: Mapping[str, Any] = MappingProxyType({}),
  compute_flops: bool = False,
  compute_vjp_flops: bool = False,
  **input_kwargs: Any,
) -> str:
  """Draws a table of the calls that a method makes, and of the Variables.

  Each object whose methods are called has a row for each of them: its path, its
  class, the arguments, the results, and the Variables of each kind with their
  sizes. A shared Variable counts where its path comes first. Nothing is
  computed, and the model stays as it is.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    >>> print(
    ...   nnx.tabulate(
    ...     layer, jnp.ones((1, 3)), console_kwargs={"force_terminal": False}
    ...   )
    ... )
                            Linear Summary
    ┏━━━━━━┳━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━━━━━━┓
    ┃ path ┃ type   ┃ inputs       ┃ outputs      ┃ Param                ┃
    ┡━━━━━━╇━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━━━━━━┩
    │      │ Linear │ float32[1,3] │ float32[1,4] │ bias: float32[4]     │
    │      │        │              │              │ kernel: float32[3,4] │
    │      │        │              │              │                      │
    │      │        │              │              │ 16 (64 B)            │
    ├──────┼────────┼──────────────┼──────────────┼──────────────────────┤
    │      │        │              │        Total │ 16 (64 B)            │
    └──────┴────────┴──────────────┴──────────────┴──────────────────────┘
    <BLANKLINE>
                      Total Parameters: 16 (64 B)

  Args:
    obj: the model, or another object of this library.
    *input_args: arguments of the method; arrays may be
      `jax.ShapeDtypeStruct`s.
    depth: how long the paths of rows may be.
    method: the name of the method.
    row_filter: says which rows to show; by default all but calls of
      streams of random numbers.
    table_kwargs: keywords of `rich.table.Table`.
    column_kwargs: keywords of its `add_column`, for each column.
    console_kwargs: keywords of `rich.console.Console`. It writes colours unless
      `force_terminal` is `False`.
    compute_flops: whether to add a column of the floating-point operations of
      each call, as XLA estimates them. Fused kernels count as none.
    compute_vjp_flops: whether to add one of those of the call and its gradient.
    **input_kwargs: keyword arguments of the method.

  Returns:
    The table, as text.

  Raises:
    ModuleNotFoundError: if `rich` is not installed.
    TypeError: if `obj` is not an object of this library.
    ValueError: if it has no such method.
  """
  if not isinstance(obj, Pytree):
    raise TypeError(
      f"`obj` must be a Module or another `nnx.Pytree`, but got a"
      f" `{type(obj).__name__}`."
    )
  contents = _Contents(obj)
  recorder = _Recorder(compute_flops, compute_vjp_flops)
  _record(obj, method, input_args, input_kwargs, recorder)
  rows = sorted(recorder.rows, key=lambda row: row.call_order)
  rows = [
    row
    for row in rows
    if (depth is None or len(row.path) <= depth) and row_filter(row)
  ]
  columns = {"path": ["/".join(map(str, row.path)) for row in rows]}
  columns["type"] = [row.type.__name__ for row in rows]
  columns["inputs"] = [row.inputs_repr for row in rows]
  columns["outputs"] = [summary_cells.text(row.outputs) for row in rows]
  if compute_flops:
    columns["flops"] = [str(row.flops) for row in rows]
  if compute_vjp_flops:
    columns["vjp_flops"] = [str(row.vjp_flops) for row in rows]
  return _render(
    type(obj).__name__,
    columns,
    rows,
    contents,
    table_kwargs,
    column_kwargs,
    console_kwargs,
  )


def _render(
  name: str,
  columns: Mapping[str, list[str]],
  rows: list[CallInfo],
  contents: _Contents,
  table_kwargs: Mapping[str, Any],
  column_kwargs: Mapping[str, Any],
  console_kwargs: Mapping[str, Any],
) -> str:
  """Lays the cells out; adds a column for each kind of Variable, and sums."""
  rich_console, rich_table, rich_text = _rich()
  types = contents.types()
  totals = [contents.below((), type_) for type_ in types]
  table = rich_table.Table(
    show_header=True,
    show_lines=True,
    show_footer=True,
    title=f"{name} Summary",
    **table_kwargs,
  )
  *firsts, last = columns
  for column in firsts:
    table.add_column(column, **column_kwargs)
  table.add_column(last, **column_kwargs)
  table.columns[-1].footer = rich_text.Text("Total", justify="right")
  for type_, total in zip(types, totals, strict=True):
    table.add_column(type_.__name__, **column_kwargs)
    table.columns[-1].footer = summary_cells.size_text(total)
  for i, row in enumerate(rows):
    cells = [cells[i] for cells in columns.values()]
    for type_ in types:
      attributes = summary_cells.text(contents.at(row.object_path, type_))
      size = contents.below(row.object_path, type_)
      cell = f"{attributes}\n\n" if attributes else ""
      cells.append(
        cell + (f"[bold]{summary_cells.size_text(size)}[/bold]" if size else "")
      )
    table.add_row(*cells)
  table.caption_style = "bold"
  total = sum(totals, reprlib.Size())
  table.caption = f"\nTotal Parameters: {summary_cells.size_text(total)}"
  file = io.StringIO()
  options = {"force_terminal": True, "force_jupyter": reprlib.in_notebook()}
  rich_console.Console(file=file, **(options | dict(console_kwargs))).print(
    table
  )
  return file.getvalue()


def _rich() -> tuple[Any, Any, Any]:
  # Imported when asked for: it takes longer than the rest of this library.
  try:
    from rich import console, table, text
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "`nnx.tabulate` must have the package `rich` to draw tables, but it is"
      " not installed. Install it: `pip install rich`.",
      name="rich",
    ) from error
  return console, table, text
