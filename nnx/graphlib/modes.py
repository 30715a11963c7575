"""Which mode a function is in, and whether traces name layers.

A mode takes objects for graphs, for graphs whose values alone change, or for
trees. The arguments `graph` and `graph_updates` of a function decide, then the
switches, then the environment variables `NNX_GRAPH_MODE` and
`NNX_GRAPH_UPDATES`. A function asks `resolve` once and passes the `Mode` on.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import enum
import functools
import threading
from typing import Any, NoReturn, ParamSpec, TypedDict, TypeVar

import jax

from nnx import environment

P = ParamSpec("P")
R = TypeVar("R")


class _Settings(threading.local):
  graph_mode = environment.switch("NNX_GRAPH_MODE", True)
  graph_updates = environment.switch("NNX_GRAPH_UPDATES", True)
  named_scopes = environment.switch("NNX_NAMED_SCOPES", True)


settings = _Settings()


class _Switch(environment.ForBlock):
  """Sets a setting from the call on; for a block or function, as it is used."""

  _name: str

  def __init__(self, value: bool, /):
    self._value = value
    self._change = environment.Change(settings, {self._name: value})

  def __call__(self, fun: Callable[P, R], /) -> Callable[P, R]:
    self._change.undo()

    @functools.wraps(fun)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
      with type(self)(self._value):
        return fun(*args, **kwargs)

    return wrapped

  @classmethod
  def current_value(cls) -> bool:
    """Returns the value that was set last in this thread."""
    return getattr(settings, cls._name)


class Arguments(TypedDict):
  """The arguments of functions that say in which mode they are."""

  graph: bool
  graph_updates: bool


class Mode(enum.Enum):
  """What a function takes objects for, and what of them it gives back.

  Example:

    >>> from nnx.graphlib import modes
    >>> [mode.name for mode in modes.Mode if mode.updates]
    ['GRAPH']
    >>> modes.Mode.TREE.arguments
    {'graph': False, 'graph_updates': False}

  Attributes:
    graph: whether references may be shared and form cycles.
    updates: whether whatever a function does to objects is done to the
      caller's; otherwise only what it writes to Variables is.
  """

  GRAPH = (True, True)
  VALUES = (True, False)
  TREE = (False, False)

  def __init__(self, graph: bool, updates: bool):
    self.graph = graph
    self.updates = updates

  @property
  def arguments(self) -> Arguments:
    """The arguments that ask for this mode."""
    return {"graph": self.graph, "graph_updates": self.updates}

  def refuse(
    self, function: str, problem: str, *, updates: bool = False
  ) -> NoReturn:
    """Raises the error for what a function cannot do in this mode.

    Args:
      function: its name.
      problem: what may not be and is, and what to do about it.
      updates: whether it has the argument `graph_updates`.

    Raises:
      ValueError: in any case.
    """
    raise ValueError(
      f"`nnx.{function}` is in {self}, where {problem}, or"
      f" {way_out(function, updates=updates)}."
    )

  def __str__(self) -> str:
    """Returns what errors call the mode, and the argument that asks for it."""
    if self is Mode.TREE:
      return "tree mode (`graph=False`)"
    return f"graph mode (`graph_updates={self.updates}`)"


def is_tree(graph: bool | None) -> bool:
  """Tells whether a function that makes no updates is in tree mode.

  Example:

    >>> from nnx.graphlib import modes
    >>> modes.is_tree(None), modes.is_tree(False)
    (False, True)

  Args:
    graph: the argument of the function; None stands for `set_graph_mode`.

  Raises:
    TypeError: if it is something else than True, False or None.
  """
  # Functions that take no time come here at every call.
  if graph is None:
    return not settings.graph_mode
  if type(graph) is not bool:
    environment.check_flags(graph=graph)
  return not graph


def resolve(graph: bool | None, graph_updates: bool | None = None) -> Mode:
  """Tells which mode a function is in.

  Example:

    >>> from nnx.graphlib import modes
    >>> modes.resolve(None).name, modes.resolve(False, True).name
    ('GRAPH', 'TREE')

  Args:
    graph: the argument of the function; None stands for `set_graph_mode`.
    graph_updates: the same; None stands for `set_graph_updates`.

  Raises:
    TypeError: if one of them is something else than True, False or None.
  """
  tree = is_tree(graph)
  if graph_updates is None:
    graph_updates = settings.graph_updates
  else:
    environment.check_flags(graph_updates=graph_updates)
  if tree:
    return Mode.TREE
  return Mode.GRAPH if graph_updates else Mode.VALUES


# Functions that `nnx.compat` has in graph mode.
_IN_COMPAT = frozenset(
  "backup_keys cached_partial checkify clone cond custom_vjp eval_shape flatten"
  " fori_loop fork_rngs get_abstract_model grad graphdef iter_children"
  " iter_graph iter_modules jit jvp pmap recursive_map remat reseed scan"
  " shard_map split split_rngs state switch value_and_grad view view_info vjp"
  " vmap while_loop".split()
)


def way_out(function: str, *, updates: bool = False) -> str:
  """Says how to call a function in graph mode.

  Example:

    >>> from nnx.graphlib import modes
    >>> modes.way_out("split")
    'pass `graph=True`, or call `nnx.compat.split`'

  Args:
    function: its name.
    updates: whether it has the argument `graph_updates`.
  """
  arguments = "graph=True, graph_updates=True" if updates else "graph=True"
  text = f"pass `{arguments}`"
  if function in _IN_COMPAT:
    text += f", or call `nnx.compat.{function}`"
  return text


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


def named_scope(name: str) -> contextlib.AbstractContextManager[Any]:
  """Returns a scope that names what no Module calls, unless they are off."""
  if settings.named_scopes:
    return jax.named_scope(name)
  return contextlib.nullcontext()
