"""grad, value_and_grad, vjp, jvp: derivatives of functions of graphs.

Which leaves are differentiated is all that these say of the arguments; the
function, and what it does to its arguments, is lifted as everywhere. State that
the function writes is an auxiliary output, so it does not take part in the
derivative, and state that it only reads is not an output at all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
import dataclasses
import functools
from typing import Any, ParamSpec, TypedDict, TypeVar, Unpack, overload

import jax

from nnx import environment, variablelib
from nnx.engine import _engine, boxes
from nnx.filterlib import Filter
from nnx.graphlib import modes
from nnx.statelib import State
from nnx.transforms import lift, prefix
from nnx.variablelib import Param

P = ParamSpec("P")
R = TypeVar("R")


class GradOptions(TypedDict, total=False):
  """The options of `grad`, for type checkers; see there."""

  argnums: int | DiffState | Sequence[int | DiffState]
  has_aux: bool
  holomorphic: bool
  allow_int: bool
  reduce_axes: Sequence[Hashable]
  graph: bool | None
  graph_updates: bool | None


@dataclasses.dataclass(frozen=True)
class DiffState:
  """An argument, and the part of its state to differentiate.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Line(nnx.Module):
    ...   def __init__(self):
    ...     self.a, self.b = (
    ...       nnx.Param(jnp.array(2.0)),
    ...       nnx.Param(jnp.array(1.0)),
    ...     )
    >>> f = lambda line, x: line.a * x + line.b
    >>> only_a = nnx.DiffState(0, nnx.PathContains("a"))
    >>> grads = nnx.grad(f, argnums=only_a)(Line(), 3.0)
    >>> list(grads), float(grads.a.value)
    (['a'], 3.0)

  Args:
    argnum: the position of the argument.
    filter: which Variables and arrays of the graph nodes in it are
      differentiated.
  """

  argnum: int
  filter: Filter


class Selection(prefix.FilterMap):
  """Selects the leaves of graph nodes to differentiate; others all are."""

  __slots__ = ()

  by_all_paths = False

  def __init__(self, filter_: Filter):
    super().__init__(((filter_, True), (..., False)))

  def select(self, path: tuple, value: Any) -> tuple[bool, Any]:
    # A path leads from a graph node to what is in it.
    return super().select(path, value) if path else (True, True)


def is_selection(value: Any) -> bool:
  """Tells whether a selection is the same for all leaves."""
  return isinstance(value, bool)


def diff_states(
  argnums: int | DiffState | Iterable[int | DiffState],
) -> tuple[int | DiffState, ...]:
  """Returns argument numbers as a tuple."""
  if isinstance(argnums, (int, DiffState)):
    return (argnums,)
  if not isinstance(argnums, Iterable):
    raise TypeError(
      "`argnums` must be an int, an `nnx.DiffState` or several, but got"
      f" `{argnums!r}` of type `{type(argnums).__name__}`. To differentiate by"
      " what a filter selects, pass `nnx.DiffState(0, filter)`."
    )
  return tuple(argnums)


def check_states(
  policy: lift.Policy, option: str, argnums: Sequence[int | DiffState]
) -> None:
  """Refuses `DiffState`s in a mode without updates.

  Raises:
    ValueError: if there is one.
  """
  if policy.mode.updates:
    return
  if any(isinstance(argnum, DiffState) for argnum in argnums):
    raise ValueError(
      "With `graph=False` or `graph_updates=False` the derivative of a Module"
      f" is a whole Module, but got `{option}={argnums!r}`. Select a part of"
      " the derivative, by `nnx.state(grads, filter)`, or"
      f" {modes.way_out(policy.transform, updates=True)}."
    )


def selections(
  argnums: Sequence[int | DiffState], count: int, tree: bool
) -> tuple[tuple[int, ...], list[Any]]:
  """Returns the positions meant, and what is selected of each argument."""
  wanted = lift.positions(
    [a.argnum if isinstance(a, DiffState) else a for a in argnums],
    count,
    "argnums",
  )
  entries: list[Any] = [False] * count
  for position, argnum in zip(wanted, argnums):
    if isinstance(argnum, DiffState):
      entries[position] = Selection(argnum.filter)
    else:
      entries[position] = True if tree else Selection(Param)
  return wanted, entries


def walk_selected(call: lift.Call, entries: Sequence[Any], option: str) -> Any:
  """Walks over the arguments of a call; entries are True where selected."""
  walk = prefix.Walk(call.structure, call.leaves, call.objects, is_selection)
  for i, entry in enumerate(entries):
    walk.visit_root(prefix.Root(entry, option, f"args[{i}]"))
  for name in call.lifted.names:
    walk.visit_root(prefix.Root(False, option, name))
  return walk


class Gradients:
  """Puts derivatives in the form of the arguments they belong to.

  Args:
    call: the call.
    walk: a walk over its arguments.
    tree: whether Modules stand for the derivatives of Modules, not States.
  """

  def __init__(self, call: lift.Call, walk: prefix.Walk, tree: bool):
    self.call = call
    self.walk = walk
    self.tree = tree
    self.seen: set[int] = set()

  def build(self, leaves: Sequence[Any], selected: Sequence[int]) -> list[Any]:
    """Builds the arguments; selected leaves of Modules are in States."""
    values, objects = _engine.unflatten(self.call.structure, tuple(leaves))
    if self.tree:
      return list(values)
    nested: dict[int, dict[Any, Any]] = {
      id(node): {} for node in _outermost_nodes(self.walk, objects)
    }
    for leaf in selected:
      place = self.walk.places[leaf]
      top = id(objects[place.top]) if place.top >= 0 else 0
      if top not in nested:
        continue
      target = nested[top]
      for key in place.path[:-1]:
        target = target.setdefault(key, {})
      target[place.path[-1]] = (
        objects[place.variable] if place.variable >= 0 else leaves[leaf]
      )
    if not nested and not self.call.structure._shares:
      return list(values)
    return [self._with_states(value, nested) for value in values]

  def _with_states(self, value: Any, nested: dict[int, Any]) -> Any:
    def is_node(node):
      return id(node) in nested or isinstance(node, _engine.VariableBase)

    def convert(node):
      if not is_node(node):
        return node
      # Of a node that comes twice, the derivative is where it comes first.
      if id(node) in self.seen:
        return State._from_nested({})
      self.seen.add(id(node))
      return (
        State._from_nested(nested[id(node)]) if id(node) in nested else node
      )

    return jax.tree.map(convert, value, is_leaf=is_node)


def _outermost_nodes(walk: prefix.Walk, objects: Sequence[Any]) -> list[Any]:
  return [
    objects[index]
    for index in walk.top_indices
    if not isinstance(objects[index], _engine.VariableBase)
  ]


def _differentiate(
  transform: str,
  fun: Callable[..., Any],
  argnums: int | DiffState | Sequence[int | DiffState],
  has_aux: bool,
  holomorphic: bool,
  allow_int: bool,
  reduce_axes: Sequence[Hashable],
  mode: modes.Mode,
) -> Callable[..., Any]:
  fun = lift.function_of(fun, transform)
  _check_reduce_axes(reduce_axes)
  wanted_argnums = diff_states(argnums)
  policy = lift.Policy(mode, transform)
  check_states(policy, "argnums", wanted_argnums)

  @functools.wraps(fun)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    args, kwargs = policy.bind(fun, args, kwargs)
    call = lift.Call(policy, fun, args, kwargs)
    wanted, entries = selections(wanted_argnums, len(args), not mode.updates)
    walk = walk_selected(call, entries, "argnums")
    selected = [leaf for leaf, entry in enumerate(walk.entries) if entry]

    def flat(diff_leaves):
      leaves = call.with_leaves(selected, diff_leaves)
      values, objects = call.lifted.open(leaves)
      loss, aux = call.lifted.call(values), None
      if has_aux:
        loss, aux = pair(loss, fun)
      return loss, call.lifted.pack(objects, leaves, aux, (loss, aux))

    _check_boxes(call, walk, selected)
    call.described(flat, transform, selected)
    derivative = jax.value_and_grad(
      flat, has_aux=True, holomorphic=holomorphic, allow_int=allow_int
    )
    try:
      (loss, packed), grads = call.framed(derivative, call.pick(selected))
    except TypeError as error:
      _name_discrete(error, call, () if allow_int else selected)
      raise
    aux = call.apply(packed)
    arguments = Gradients(call, walk, not mode.updates).build(
      call.with_leaves(selected, grads), selected
    )
    if isinstance(argnums, (int, DiffState)):
      result = arguments[wanted[0]]
    else:
      result = tuple(arguments[i] for i in wanted)
    if transform == "grad":
      return (result, aux) if has_aux else result
    return ((loss, aux) if has_aux else loss), result

  return wrapper


def _check_boxes(
  call: lift.Call, walk: prefix.Walk, selected: Sequence[int]
) -> None:
  """Refuses to differentiate what jax keeps in a value that changes."""
  for leaf in selected:
    value = call.leaves[leaf]
    if boxes.is_box(value) or variablelib.is_ref(value):
      # With later versions of jax both kinds are mutable arrays.
      index = walk.places[leaf].variable
      ref = call.objects[index].ref if index >= 0 else variablelib.is_ref(value)
      kind = "ref" if ref else "hijax"
      raise TypeError(
        "What is differentiated must be arrays, but"
        f" `{call.path(leaf)}` is a Variable with `{kind}=True`. Pass"
        " `nnx.with_vars(model, hijax=False, ref=False)`, and write back what"
        " the function changes."
      )


def _name_discrete(
  error: TypeError, call: lift.Call, selected: Sequence[int]
) -> None:
  """Adds to an error what has no derivative, where there is such a leaf."""
  for leaf in selected:
    dtype = jax.dtypes.result_type(call.leaves[leaf])
    if not jax.dtypes.issubdtype(dtype, jax.numpy.inexact):
      error.add_note(
        f"`{call.path(leaf)}` is to be differentiated and has the dtype"
        f" {dtype}. Leave it out by a `DiffState` in `argnums`."
      )


def pair(result: Any, fun: Callable[..., Any]) -> tuple[Any, Any]:
  """Returns what a function with `has_aux` must return."""
  if not isinstance(result, (tuple, list)) or len(result) != 2:
    raise TypeError(
      f"With `has_aux=True`, `{lift.name_of(fun)}` must return a pair of the"
      f" output and auxiliary data, but got `{result!r}`."
    )
  return result[0], result[1]


def _check_reduce_axes(reduce_axes: Sequence[Hashable]) -> None:
  if reduce_axes:
    raise NotImplementedError(
      "`reduce_axes` must be empty, since jax no longer has it, but got"
      f" `{reduce_axes!r}`. Use `jax.lax.psum` inside of the function."
    )


@overload
def grad(
  f: Callable[P, R], **options: Unpack[GradOptions]
) -> Callable[P, Any]: ...
@overload
def grad(
  f: None = None, **options: Unpack[GradOptions]
) -> Callable[[Callable[P, R]], Callable[P, Any]]: ...
def grad(
  f: Callable[..., Any] | None = None,
  *,
  argnums: int | DiffState | Sequence[int | DiffState] = 0,
  has_aux: bool = False,
  holomorphic: bool = False,
  allow_int: bool = False,
  reduce_axes: Sequence[Hashable] = (),
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Makes the function that computes the gradient of a function.

  As `jax.grad`, but arguments may hold Modules and Variables, and what the
  function does to them is done to the caller's. Of a Module the `Param`s are
  differentiated, or what a `DiffState` selects; of anything else every leaf.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Scale(nnx.Module):
    ...   def __init__(self):
    ...     self.w, self.calls = nnx.Param(jnp.array(2.0)), nnx.Variable(0)
    >>> def loss(model, x):
    ...   model.calls.value += 1
    ...   return (model.w * x) ** 2
    >>> model = Scale()
    >>> grads = nnx.grad(loss)(model, 3.0)
    >>> float(grads.w.value), model.calls.value
    (36.0, 1)

  Args:
    f: a function that returns a scalar; without it, `grad` is a decorator.
    argnums: the positions of the arguments to differentiate, or `DiffState`s.
    has_aux: whether the function returns a pair of a scalar and other data.
    holomorphic: whether inputs and outputs are complex, as in `jax.grad`.
    allow_int: whether ints may be differentiated, as in `jax.grad`.
    reduce_axes: must be empty.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`. With `False`, and in tree mode, the gradient
      of a Module is a Module, and all leaves of it are differentiated.

  Returns:
    A function of the same arguments that returns the gradient: a `State` for
    each Module, a copy of everything else; a tuple if `argnums` is a sequence.
    With `has_aux`, a pair of that and the data.

  Raises:
    ValueError: if `argnums` does not name arguments, or if a Variable that is
      to be differentiated is shared with an argument that is not.
    TypeError: as `jax.grad`, if a leaf cannot be differentiated.
  """
  mode = modes.resolve(graph, graph_updates)
  environment.check_flags(
    has_aux=has_aux, holomorphic=holomorphic, allow_int=allow_int
  )
  if f is None:
    return functools.partial(
      grad,
      argnums=argnums,
      has_aux=has_aux,
      holomorphic=holomorphic,
      allow_int=allow_int,
      reduce_axes=reduce_axes,
      **mode.arguments,
    )
  return _differentiate(
    "grad",
    f,
    argnums,
    has_aux,
    holomorphic,
    allow_int,
    reduce_axes,
    mode,
  )


@overload
def value_and_grad(
  f: Callable[P, R], **options: Unpack[GradOptions]
) -> Callable[P, tuple[R, Any]]: ...
@overload
def value_and_grad(
  f: None = None, **options: Unpack[GradOptions]
) -> Callable[[Callable[P, R]], Callable[P, tuple[R, Any]]]: ...
def value_and_grad(
  f: Callable[..., Any] | None = None,
  *,
  argnums: int | DiffState | Sequence[int | DiffState] = 0,
  has_aux: bool = False,
  holomorphic: bool = False,
  allow_int: bool = False,
  reduce_axes: Sequence[Hashable] = (),
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Makes the function that computes a function and its gradient.

  As `grad`, which see for the arguments.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> square = nnx.value_and_grad(lambda p: p**2)
    >>> loss, grads = square(nnx.Param(jnp.array(3.0)))
    >>> float(loss), float(grads.value)
    (9.0, 6.0)

  Returns:
    A function of the same arguments that returns a pair of the output and the
    gradient. With `has_aux`, the output is a pair itself.
  """
  mode = modes.resolve(graph, graph_updates)
  environment.check_flags(
    has_aux=has_aux, holomorphic=holomorphic, allow_int=allow_int
  )
  if f is None:
    return functools.partial(
      value_and_grad,
      argnums=argnums,
      has_aux=has_aux,
      holomorphic=holomorphic,
      allow_int=allow_int,
      reduce_axes=reduce_axes,
      **mode.arguments,
    )
  return _differentiate(
    "value_and_grad",
    f,
    argnums,
    has_aux,
    holomorphic,
    allow_int,
    reduce_axes,
    mode,
  )


def _flat_primal(
  transform: str, call: lift.Call, selected: Sequence[int], has_aux: bool
):
  """Returns the function of selected leaves: the output's leaves; all, packed.

  Returns:
    The function, and a list to which it adds the structure of the output.
  """
  forms: list[Any] = []

  def flat(diff_leaves):
    leaves = call.with_leaves(selected, diff_leaves)
    values, objects = call.lifted.open(leaves)
    result = call.lifted.call(values)
    output = result
    if has_aux:
      result = output, _ = pair(result, call.lifted.fun)
    form, output_leaves, _ = _engine.flatten((output,))
    forms.append(form)
    packed = call.lifted.pack(objects, leaves, result)
    return output_leaves, packed

  return call.described(flat, transform, selected), forms


def _name_unlike(
  error: Exception,
  call: lift.Call,
  selected: Sequence[int],
  tangents: Sequence[Any],
) -> None:
  """Adds to an error which tangents have other shapes than their primals."""
  for leaf in selected:
    if not lift.is_array(tangents[leaf]):
      error.add_note(f"The tangent of `{call.path(leaf)}` is no array.")
      continue
    given = jax.typeof(tangents[leaf])
    wanted = jax.typeof(call.leaves[leaf]).to_tangent_aval()
    if (given.shape, given.dtype) != (wanted.shape, wanted.dtype):
      error.add_note(
        f"The tangent of `{call.path(leaf)}` must be {wanted.str_short()}, but"
        f" is {given.str_short()}."
      )


def _arrays_of_args(call: lift.Call) -> list[int]:
  """Returns those leaves of positional arguments that jax can differentiate."""
  leaves = lift.leaves_of_roots(call.structure, range(call.num_args))
  return [i for i in leaves if lift.is_array(call.leaves[i])]


def vjp(
  f: Callable[..., Any] | None = None,
  *primals: Any,
  has_aux: bool = False,
  reduce_axes: Sequence[Hashable] = (),
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Computes a function and its vector-Jacobian product at some arguments.

  As `jax.vjp`, but arguments and outputs may hold Modules and Variables, and
  what the function does to the arguments is done to the caller's. All leaves
  are differentiated.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> w = nnx.Param(jnp.array(2.0))
    >>> y, pull_back = nnx.vjp(lambda w, x: w * x, w, 3.0)
    >>> w_grad, x_grad = pull_back(jnp.array(1.0))
    >>> float(y), float(w_grad.value), float(x_grad)
    (6.0, 3.0, 2.0)

  Args:
    f: the function; without it, `vjp` is a decorator.
    *primals: its arguments; without them, a function of the arguments is
      returned.
    has_aux: whether the function returns a pair of the output and other data.
    reduce_axes: must be empty.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    A pair of the output and a function from a cotangent, which has the form of
    the output, to a tuple of gradients in the form of the arguments. With
    `has_aux` the data come third.

  Raises:
    ValueError: if a cotangent has another form than the output.
  """
  _check_reduce_axes(reduce_axes)
  mode = modes.resolve(graph, graph_updates)
  environment.check_flags(has_aux=has_aux)
  options: dict[str, Any] = {"has_aux": has_aux, **mode.arguments}
  if f is None:
    return functools.partial(vjp, **options)
  f = lift.function_of(f, "vjp")
  if not primals:
    return functools.partial(vjp, f, **options)
  policy = lift.Policy(mode, "vjp")
  call = lift.Call(policy, f, primals, lift.with_owner(f, {}))
  selected = _arrays_of_args(call)
  flat, forms = _flat_primal("vjp", call, selected, has_aux)
  _, pull_back_leaves, packed = call.framed(
    functools.partial(jax.vjp, flat, has_aux=True), call.pick(selected)
  )
  result = call.apply(packed)
  form, structure, others = forms[-1], call.structure, call.leaves

  def pull_back(cotangent: Any) -> tuple[Any, ...]:
    leaves = policy.leaves(cotangent)
    if len(leaves) != form.num_leaves:
      raise ValueError(
        "The cotangent must have the form of the output, which has"
        f" {form.num_leaves} leaves, but got one that has {len(leaves)}:"
        f" `{cotangent!r}`."
      )
    (cotangents,) = pull_back_leaves(leaves)
    filled = list(others)
    for leaf, value in zip(selected, cotangents):
      filled[leaf] = value
    return _engine.unflatten(structure, tuple(filled)).values[: len(primals)]

  if has_aux:
    return result[0], pull_back, result[1]
  return result, pull_back


def jvp(
  f: Callable[..., Any] | None = None,
  primals: Sequence[Any] | None = None,
  tangents: Sequence[Any] | None = None,
  *,
  has_aux: bool = False,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Computes a function and its Jacobian-vector product at some arguments.

  As `jax.jvp`, but arguments and outputs may hold Modules and Variables, and
  what the function does to the arguments is done to the caller's.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> w = nnx.Param(jnp.array(2.0))
    >>> y, y_dot = nnx.jvp(
    ...   lambda w, x: w * x, (w, 3.0), (nnx.Param(jnp.array(1.0)), 0.5)
    ... )
    >>> float(y), float(y_dot)
    (6.0, 4.0)

  Args:
    f: the function; without it, `jvp` is a decorator.
    primals: its arguments; without them, a function of `primals` and `tangents`
      is returned.
    tangents: one tangent an argument, in the form of it.
    has_aux: whether the function returns a pair of the output and other data.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    A pair of the output and its tangent. With `has_aux` the data come third.

  Raises:
    TypeError: if `primals` or `tangents` is no tuple or list.
    ValueError: if `tangents` has another form than `primals`.
  """
  mode = modes.resolve(graph, graph_updates)
  environment.check_flags(has_aux=has_aux)
  options: dict[str, Any] = {"has_aux": has_aux, **mode.arguments}
  if f is None:
    return functools.partial(jvp, **options)
  f = lift.function_of(f, "jvp")
  if primals is None or tangents is None:
    return functools.partial(jvp, f, **options)
  for name, value in (("primals", primals), ("tangents", tangents)):
    if not isinstance(value, (tuple, list)):
      raise TypeError(
        f"`{name}` must be a tuple or list with one item for each argument, but"
        f" got a `{type(value).__name__}`."
      )
  policy = lift.Policy(mode, "jvp")
  call = lift.Call(policy, f, primals, lift.with_owner(f, {}))
  tangent_leaves = policy.leaves(tuple(tangents))
  count = len(lift.leaves_of_roots(call.structure, range(len(primals))))
  if len(tangents) != len(primals) or len(tangent_leaves) != count:
    raise ValueError(
      "`tangents` must have the form of `primals`, which has"
      f" {len(primals)} items with {count} leaves, but got"
      f" {len(tangents)} items with {len(tangent_leaves)} leaves."
    )
  selected = _arrays_of_args(call)
  flat, forms = _flat_primal("jvp", call, selected, has_aux)
  try:
    _, output_tangents, packed = call.framed(
      functools.partial(jax.jvp, flat, has_aux=True),
      (call.pick(selected),),
      (tuple(tangent_leaves[i] for i in selected),),
    )
  except (TypeError, ValueError) as error:
    _name_unlike(error, call, selected, tangent_leaves)
    raise
  result = call.apply(packed)
  (tangent,), _ = _engine.unflatten(forms[-1], output_tangents)
  if has_aux:
    return result[0], tangent, result[1]
  return result, tangent
