"""grad and value_and_grad: derivatives of functions of graphs.

Which leaves are differentiated is all that these say of the arguments, by
`diff_states`; the function, and what it does to its arguments, is lifted as
everywhere. State that the function writes is an auxiliary output, so it does
not take part in the derivative, and state that it only reads is no output at
all.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
import functools
from typing import Any, ParamSpec, TypedDict, TypeVar, Unpack, overload

import jax

from nnx import environment, variablelib
from nnx.engine import boxes
from nnx.graphlib import modes
from nnx.transforms import callables, diff_states, lift, prefix
from nnx.transforms.diff_states import DiffState

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
  fun = callables.function_of(fun, transform)
  diff_states.check_reduce_axes(reduce_axes)
  wanted_argnums = diff_states.as_tuple(argnums)
  policy = lift.Policy(mode, transform)
  diff_states.check_states(policy, "argnums", wanted_argnums)

  @functools.wraps(fun)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    args, kwargs = policy.bind(fun, args, kwargs)
    call = lift.Call(policy, fun, args, kwargs)
    wanted, entries = diff_states.selections(
      wanted_argnums, len(args), not mode.updates
    )
    walk = diff_states.walk_selected(call, entries, "argnums")
    selected = [leaf for leaf, entry in enumerate(walk.entries) if entry]

    def flat(diff_leaves):
      leaves = call.with_leaves(selected, diff_leaves)
      values, objects = call.lifted.open(leaves)
      loss, aux = call.lifted.call(values), None
      if has_aux:
        loss, aux = callables.pair(loss, fun)
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
    arguments = diff_states.Gradients(call, walk, not mode.updates).build(
      call.with_leaves(selected, grads), selected
    )
    if not isinstance(argnums, Iterable):
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
      place = walk.places[leaf]
      assert place is not None
      index = place.variable
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
    if not jax.numpy.issubdtype(dtype, jax.numpy.inexact):
      error.add_note(
        f"`{call.path(leaf)}` is to be differentiated and has the dtype"
        f" {dtype}. Leave it out by a `DiffState` in `argnums`."
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
