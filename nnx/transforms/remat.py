"""remat: functions of graphs that compute again what a gradient needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import functools
from typing import Any, TypedDict, TypeVar, Unpack, overload

import jax

from nnx import environment
from nnx.graphlib import modes
from nnx.transforms import callables, lift

F = TypeVar("F", bound=Callable[..., Any])


class RematOptions(TypedDict, total=False):
  """The options of `remat`, for type checkers; see there."""

  prevent_cse: bool
  static_argnums: int | Iterable[int]
  policy: Callable[..., bool] | None
  graph: bool | None
  graph_updates: bool | None


@overload
def remat(f: F, **options: Unpack[RematOptions]) -> F: ...
@overload
def remat(
  f: None = None, **options: Unpack[RematOptions]
) -> Callable[[F], F]: ...
def remat(
  f: Callable[..., Any] | None = None,
  *,
  prevent_cse: bool = True,
  static_argnums: int | Iterable[int] = (),
  policy: Callable[..., bool] | None = None,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Makes a function whose gradient computes its intermediates again.

  As `jax.checkpoint`, but arguments and results may hold Modules and Variables,
  and what the function does to them is done to the caller's.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> w = nnx.Param(jnp.array(2.0))
    >>> sine = nnx.remat(lambda w, x: jnp.sin(jnp.sin(w * x)))
    >>> grads = nnx.grad(sine)(w, 0.0)
    >>> print(grads.value)
    0.0

  Args:
    f: the function; without it, `remat` is a decorator.
    prevent_cse: whether to keep the compiler from merging the two computations,
      as in `jax.checkpoint`.
    static_argnums: positions of arguments that are not traced.
    policy: which intermediates are kept, as in `jax.checkpoint`.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    A function that computes the same.

  Raises:
    ValueError: if `static_argnums` does not name arguments.
    TypeError: if a static argument is not hashable.
  """
  mode = modes.resolve(graph, graph_updates)
  environment.check_flags(prevent_cse=prevent_cse)
  if f is None:
    return functools.partial(
      remat,
      prevent_cse=prevent_cse,
      static_argnums=static_argnums,
      policy=policy,
      **mode.arguments,
    )
  f = callables.function_of(f, "remat")
  lifting = lift.Policy(mode, "remat")
  argnums = callables.as_tuple(static_argnums)

  @functools.wraps(f)
  def wrapper(*args: Any, **kwargs: Any) -> Any:
    args, kwargs = lifting.bind(f, args, kwargs)
    static = callables.positions(argnums, len(args), "static_argnums")
    call = lift.Call(lifting, f, args, kwargs, static)
    checkpointed = jax.checkpoint(
      call.described(lambda leaves: call.lifted(leaves), "remat"),
      prevent_cse=prevent_cse,
      policy=policy,
    )
    return call.apply(call.framed(checkpointed, call.leaves))

  return wrapper
