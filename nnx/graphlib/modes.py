"""Switches: names in traces, and Flax 0.12's graph and tree modes.

Shared references are always handled here, and cost nothing where there are
none. Where the modes differ in what a function returns, its arguments `graph`
and `graph_updates` decide, then the switches, then the environment variables
`NNX_GRAPH_MODE` and `NNX_GRAPH_UPDATES`.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
import os
import threading
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


_TRUTHS = {
  **dict.fromkeys(("y", "yes", "t", "true", "on", "1"), True),
  **dict.fromkeys(("n", "no", "f", "false", "off", "0"), False),
}


def _from_environment(name: str) -> bool:
  text = os.environ.get(name, "true")
  if text.lower() not in _TRUTHS:
    raise ValueError(
      f"The environment variable `{name}` must be `true` or `false`, but is"
      f" `{text}`."
    )
  return _TRUTHS[text.lower()]


class _Settings(threading.local):
  graph_mode = _from_environment("NNX_GRAPH_MODE")
  graph_updates = _from_environment("NNX_GRAPH_UPDATES")
  named_scopes = _from_environment("NNX_NAMED_SCOPES")


settings = _Settings()


class _Switch:
  """Sets a setting from the call on; for a block or function, as it is used."""

  _name: str
  _before: bool | None

  def __init__(self, value: bool, /):
    self._value = bool(value)
    self._before = vars(settings).get(self._name)
    setattr(settings, self._name, self._value)

  def _restore(self) -> None:
    if self._before is None:  # the default, whatever it is by now
      vars(settings).pop(self._name, None)
    else:
      setattr(settings, self._name, self._before)

  def __call__(self, fun: Callable[P, R], /) -> Callable[P, R]:
    self._restore()

    @functools.wraps(fun)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
      with type(self)(self._value):
        return fun(*args, **kwargs)

    return wrapped

  def __enter__(self):
    return self

  def __exit__(self, *exc_info) -> None:
    self._restore()

  @classmethod
  def current_value(cls) -> bool:
    """Returns the value that was set last in this thread."""
    return getattr(settings, cls._name)


def is_tree(graph: bool | None, graph_updates: bool | None) -> bool:
  """Tells whether only values may change, as in a plain pytree.

  Example:

    >>> from nnx.graphlib import modes
    >>> modes.is_tree(None, None), modes.is_tree(False, None)
    (False, True)

  Args:
    graph: the argument of a function; None stands for `set_graph_mode`.
    graph_updates: the same; None stands for `set_graph_updates`.
  """
  if graph is None:
    graph = settings.graph_mode
  if graph_updates is None:
    graph_updates = settings.graph_updates
  return not (graph and graph_updates)


class set_graph_mode(_Switch):
  """What `graph=None` means, from here on or in a block or function.

  `NNX_GRAPH_MODE` in the environment says what it means at first.

  Example:

    >>> import nnx
    >>> with nnx.set_graph_mode(False):
    ...   nnx.set_graph_mode.current_value()
    False
    >>> nnx.set_graph_mode.current_value()
    True

  Args:
    value: whether Modules are graphs, not plain pytrees.
  """

  _name = "graph_mode"


class set_graph_updates(_Switch):
  """What `graph_updates=None` means, from here on or in a block or function.

  `NNX_GRAPH_UPDATES` in the environment says what it means at first.

  Example:

    >>> import nnx
    >>> with nnx.set_graph_updates(False):
    ...   nnx.set_graph_updates.current_value()
    False

  Args:
    value: whether what a function does to objects is done to the caller's.
  """

  _name = "graph_updates"


class set_named_scopes(_Switch):
  """Whether traces name the Modules in which an operation is.

  Each call of a Module under `jit`, `grad` and the like is in a scope of jax
  that is named after where the Module is (`Net/blocks_0/attn/query`), which the
  text of the program, errors of the compiler and profiles show. It costs some
  time while a function is traced and none while it runs. A function that has
  been compiled stays as it is.

  `NNX_NAMED_SCOPES` in the environment says whether they do at first.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Net(nnx.Module):
    ...   def __init__(self, rngs):
    ...     self.layer = nnx.Linear(2, 3, rngs=rngs)
    ...
    ...   def __call__(self, x):
    ...     return self.layer(x)
    >>> net, x = Net(nnx.Rngs(0)), jnp.ones((1, 2))
    >>> def text():
    ...   return nnx.jit(Net.__call__).lower(net, x).as_text(debug_info=True)
    >>> "Net/layer/dot_general" in text()
    True
    >>> with nnx.set_named_scopes(False):
    ...   "Net/layer/dot_general" in text()
    False

  Args:
    value: whether they do.
  """

  _name = "named_scopes"
