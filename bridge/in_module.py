"""Modules of other kinds as submodules of a `bridge.Module`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import nnx

from . import to_nnx
from .module import Module, check_name, current_module
from .module_context import Scope, current_context

M = TypeVar("M", bound=nnx.Module)


def linen_in_bridge_mdl(
  linen_module: Any, name: str | None = None
) -> to_nnx.ToNNX:
  """Makes a Linen module a submodule of the `bridge.Module` being run.

  Example:

    >>> import bridge, jax.numpy as jnp
    >>> from flax import linen as nn
    >>> class Model(bridge.Module):
    ...   @bridge.compact
    ...   def __call__(self, x):
    ...     return bridge.linen_in_bridge_mdl(nn.Dense(4), name="dense")(x)
    >>> variables = Model().init(0, jnp.ones((1, 2)))
    >>> variables["params"]["dense"]["kernel"].shape
    (2, 4)

  Args:
    linen_module: the Linen module.
    name: its name; by default, in a method under `compact`, that of its class
      and a number, and in `setup` the attribute it is assigned to.

  Returns:
    The Linen module as an nnx Module.

  Raises:
    ValueError: outside of `init` and `apply` of a `bridge.Module`.
  """
  parent, scope = _parent("linen_in_bridge_mdl")
  module = to_nnx.ToNNX(linen_module, scope.rngs)
  _attach(parent, type(linen_module), module, name)
  return module


def nnx_in_bridge_mdl(
  factory: Callable[[nnx.Rngs], M], name: str | None = None
) -> M:
  """Makes an nnx Module a submodule of the `bridge.Module` being run.

  During `apply` no array of it is computed: they come from the variables.

  Example:

    >>> import bridge, jax.numpy as jnp, nnx
    >>> class Model(bridge.Module):
    ...   @bridge.compact
    ...   def __call__(self, x):
    ...     return bridge.nnx_in_bridge_mdl(
    ...       lambda rngs: nnx.Linear(2, 4, rngs=rngs), name="linear"
    ...     )(x)
    >>> variables = Model().init(0, jnp.ones((1, 2)))
    >>> Model().apply(variables, jnp.ones((1, 2))).shape
    (1, 4)

  Args:
    factory: makes the Module, with the random streams of the parent.
    name: see `linen_in_bridge_mdl`.

  Returns:
    The Module.

  Raises:
    ValueError: outside of `init` and `apply` of a `bridge.Module`.
  """
  parent, scope = _parent("nnx_in_bridge_mdl")
  rngs = scope.rngs
  if parent.is_initializing():
    module = factory(rngs)
  else:
    streams = rngs if vars(rngs) else nnx.Rngs(0)
    module = nnx.eval_shape(factory, nnx.clone(streams))
    if nnx.state(module, nnx.RngState):
      made = factory(streams)
      nnx.update(module, nnx.state(made, nnx.RngState))
  _attach(parent, type(module), module, name)
  return module


def _parent(function: str) -> tuple[Module, Scope]:
  parent = current_module()
  if parent is None or parent.scope is None:
    raise ValueError(
      f"`{function}` must be called in `setup` or in a method of a"
      " `bridge.Module` that runs through `init` or `apply`."
    )
  return parent, parent.scope


def _attach(parent: Module, cls: type, module: Any, name: str | None) -> None:
  context = current_context()
  assert context is not None
  if name is not None and not context.in_compact:
    check_name(cls, name, context)
  if name is not None or context.in_compact:
    setattr(parent, name or context.new_name(cls), module)
