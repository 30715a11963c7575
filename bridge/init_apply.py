"""A Module class as a pair of functions on states."""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
from typing import Any, Generic, TypeVar

import nnx

M = TypeVar("M", bound=nnx.Module)


@dataclasses.dataclass
class Functional(Generic[M]):
  """A Module class used in Linen's way: `init` gives a state, `apply` takes it.

  Example:

    >>> import bridge, jax.numpy as jnp, nnx
    >>> class Scale(nnx.Module):
    ...   def __init__(self, size, *, rngs):
    ...     self.scale = nnx.Param(jnp.full(size, 2.0))
    ...
    ...   def __call__(self, x):
    ...     return self.scale * x
    >>> model = bridge.functional(Scale)(3)
    >>> state = model.init(rngs=nnx.Rngs(0))
    >>> y, (graphdef, state) = model.apply(state)(jnp.ones(3))
    >>> y
    Array([2., 2., 2.], dtype=float32)

  Attributes:
    module_type: the class.
    graphdef: the structure of the Module, from `init` on.
    args: the arguments of the class.
    kwargs: its keyword arguments, without `rngs`.
  """

  module_type: type[M]
  graphdef: nnx.GraphDef[M] | None
  args: tuple[Any, ...]
  kwargs: dict[str, Any]

  def init(self, *, rngs: nnx.Rngs | None = None) -> nnx.State:
    """Makes the Module; returns its state."""
    extra = {} if rngs is None else {"rngs": rngs}
    module = self.module_type(*self.args, **self.kwargs, **extra)
    self.graphdef, state = nnx.split(module)
    return state

  def apply(self, *states: Any) -> Any:
    """Returns the Module of some states, as an object whose methods are pure.

    Returns:
      What `nnx.call` returns: a call gives the result and
      `(graphdef, new state)`.

    Raises:
      ValueError: before `init`.
    """
    if self.graphdef is None:
      raise ValueError(
        f"`init` of the functional `{self.module_type.__name__}` must be called"
        " before `apply`."
      )
    return nnx.call((self.graphdef, *states))


def functional(cls: type[M]) -> Callable[..., Functional[M]]:
  """Makes a function of a class's arguments that gives its `Functional`.

  Example:

    >>> import bridge, jax.numpy as jnp, nnx
    >>> model = bridge.functional(nnx.Linear)(2, 3)
    >>> state = model.init(rngs=nnx.Rngs(0))
    >>> y, _ = model.apply(state)(jnp.ones((1, 2)))
    >>> y.shape
    (1, 3)

  Args:
    cls: the class of Modules.

  Returns:
    A function of the class's arguments, `rngs` left out.
  """

  def make(*args: Any, **kwargs: Any) -> Functional[M]:
    return Functional(cls, None, args, kwargs)

  return make
