"""vjp and jvp: products with the Jacobians of functions of graphs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
import functools
from typing import Any

import jax

from nnx import environment
from nnx.engine import _engine
from nnx.graphlib import modes
from nnx.transforms import callables, diff_states, lift


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
      result = output, _ = callables.pair(result, call.lifted.fun)
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
  diff_states.check_reduce_axes(reduce_axes)
  mode = modes.resolve(graph, graph_updates)
  environment.check_flags(has_aux=has_aux)
  options: dict[str, Any] = {"has_aux": has_aux, **mode.arguments}
  if f is None:
    return functools.partial(vjp, **options)
  f = callables.function_of(f, "vjp")
  if not primals:
    return functools.partial(vjp, f, **options)
  policy = lift.Policy(mode, "vjp")
  call = lift.Call(policy, f, primals, callables.with_owner(f, {}))
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
  f = callables.function_of(f, "jvp")
  if primals is None or tangents is None:
    return functools.partial(jvp, f, **options)
  for name, value in (("primals", primals), ("tangents", tangents)):
    if not isinstance(value, (tuple, list)):
      raise TypeError(
        f"`{name}` must be a tuple or list with one item for each argument, but"
        f" got a `{type(value).__name__}`."
      )
  policy = lift.Policy(mode, "jvp")
  call = lift.Call(policy, f, primals, callables.with_owner(f, {}))
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
