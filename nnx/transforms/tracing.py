"""eval_shape, make_jaxpr and checkify: functions of graphs, looked into."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools
from typing import Any, ParamSpec, TypeVar

import jax

from nnx import partitioning, spmd
from nnx.engine import _engine, boxes
from nnx.graphlib import modes
from nnx.transforms import callables, lift, outcomes

P = ParamSpec("P")
R = TypeVar("R")


def eval_shape(
  f: Callable[..., R],
  *args: Any,
  graph: bool | None = None,
  graph_updates: bool | None = None,
  **kwargs: Any,
) -> R:
  """Computes the shapes and dtypes that a function would return.

  As `jax.eval_shape`, but arguments and results may hold Modules and Variables:
  a function that makes a model gives the model with abstract values. Nothing is
  done to the arguments. Where a mesh is active, values of annotated Variables
  also get shardings.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Scale(nnx.Module):
    ...   def __init__(self, size):
    ...     self.w = nnx.Param(jnp.ones(size))
    >>> nnx.eval_shape(lambda: Scale(3)).w.value
    ShapeDtypeStruct(shape=(3,), dtype=float32)

  Args:
    f: the function.
    *args: its arguments, concrete or abstract.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.
    **kwargs: its keyword arguments.

  Returns:
    What the function returns, with a `jax.ShapeDtypeStruct` for each array.
  """
  f = callables.function_of(f, "eval_shape")
  policy = lift.Policy(modes.resolve(graph, graph_updates), "eval_shape")
  call = lift.Call(policy, f, args, callables.with_owner(f, kwargs))
  inputs = [i for i, leaf in enumerate(call.leaves) if lift.is_array(leaf)]

  def flat(leaves):
    packed = call.lifted(call.with_leaves(inputs, leaves))
    # Values of hijax Variables that the function makes, out of their boxes.
    outputs = tuple(map(boxes.opened, packed.outputs))
    return _engine.packed_unflatten(packed.plan, outputs)

  packed = call.framed(
    jax.eval_shape,
    call.described(flat, "eval_shape", inputs),
    call.pick(inputs),
  )
  abstract = [
    jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype")
    else leaf
    for leaf in call.leaves
  ]
  result = outcomes.result_of(packed.plan, packed.outputs, abstract)
  return spmd.as_abstract(result) if partitioning.active_mesh() else result


def make_jaxpr(
  f: Callable[..., Any] | None = None,
  *,
  static_argnums: int | Iterable[int] = (),
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Makes the function that traces a function into a jaxpr.

  As `jax.make_jaxpr`, but arguments and results may hold Modules and Variables.
  Nothing is done to the arguments.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> w = nnx.Param(jnp.array(2.0))
    >>> nnx.make_jaxpr(lambda w: w * w)(w)
    { lambda ; a:f32[]. let b:f32[] = mul a a in (b,) }

  Args:
    f: the function; without it, `make_jaxpr` is a decorator.
    static_argnums: positions of arguments that are not traced.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`; `True` makes the values that the function
      writes outputs of the jaxpr, before those that it returns. By default, as
      in Flax, only what it returns is an output.

  Returns:
    A function of the same arguments that returns a `ClosedJaxpr`.

  Raises:
    ValueError: if `static_argnums` does not name arguments.
  """
  mode = modes.resolve(graph, graph_updates)
  if f is None:
    return functools.partial(
      make_jaxpr,
      static_argnums=static_argnums,
      graph=graph,
      graph_updates=graph_updates,
    )
  f = callables.function_of(f, "make_jaxpr")
  policy = lift.Policy(mode, "make_jaxpr")
  argnums = callables.as_tuple(static_argnums)

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    args, kwargs = policy.bind(f, args, kwargs)
    static = callables.positions(argnums, len(args), "static_argnums")
    call = lift.Call(policy, f, args, kwargs, static)

    def flat(*leaves):
      packed = call.lifted(leaves)
      outputs = packed.outputs
      if graph_updates:
        return outputs
      return outputs[len(outputs) - len(outcomes.result_leaves(packed.plan)) :]

    call.described(flat, "make_jaxpr")
    return call.framed(jax.make_jaxpr(flat), *call.leaves)

  return wrapper


def checkify(
  f: Callable[P, R],
  errors: Any = None,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Callable[P, tuple[Any, R]]:
  """Makes a function that also returns the errors of the checks in it.

  As `jax.experimental.checkify.checkify`, but arguments and results may hold
  Modules and Variables, and what the function does to them is done to the
  caller's.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> from jax.experimental import checkify
    >>> w = nnx.Param(jnp.array(jnp.inf))
    >>> error, y = nnx.checkify(jnp.sin, errors=checkify.float_checks)(w.value)
    >>> error.get().startswith("nan generated by primitive: sin")
    True

  Args:
    f: the function.
    errors: the kinds of errors to check for; by default those of
      `checkify.check`, as in jax.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    A function of the same arguments that returns a pair of an error and the
    result.
  """
  # Here, because few programs need it, and all would wait for it.
  from jax.experimental import checkify as checkify_lib

  f = callables.function_of(f, "checkify")
  policy = lift.Policy(modes.resolve(graph, graph_updates), "checkify")
  if errors is None:
    errors = checkify_lib.user_checks

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    call = lift.Call(policy, f, args, callables.with_owner(f, kwargs))
    inputs = [i for i, leaf in enumerate(call.leaves) if lift.is_array(leaf)]
    flat = call.described(
      lambda leaves: call.lifted(call.with_leaves(inputs, leaves)),
      "checkify",
      inputs,
    )
    checked = checkify_lib.checkify(flat, errors)
    error, packed = call.framed(checked, call.pick(inputs))
    return error, call.apply(packed)

  return wrapper
