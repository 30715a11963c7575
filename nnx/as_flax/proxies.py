"""`flax.nnx.proxy_caller`: attribute and item accesses that are done later."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, Protocol, TypeVar

import jax

A = TypeVar("A", covariant=True)


@dataclasses.dataclass(frozen=True)
class GetItem:
  """The access `x[key]`."""

  key: Any

  def __call__(self, x: Any) -> Any:
    return x[self.key]


@dataclasses.dataclass(frozen=True)
class GetAttr:
  """The access `x.name`."""

  name: str

  def __call__(self, x: Any) -> Any:
    return getattr(x, self.name)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class DelayedAccessor:
  """Accesses that are done one after another when it is called.

  Example:

    >>> from nnx.as_flax.proxies import DelayedAccessor
    >>> DelayedAccessor().real[0] == DelayedAccessor().real[0]
    True
    >>> DelayedAccessor()["a"].real({"a": 1 + 2j})
    1.0
  """

  actions: tuple[GetItem | GetAttr, ...] = ()

  def __call__(self, x: Any) -> Any:
    return functools.reduce(lambda x, action: action(x), self.actions, x)

  def __getattr__(self, name: str) -> DelayedAccessor:
    return DelayedAccessor((*self.actions, GetAttr(name)))

  def __getitem__(self, key: Any) -> DelayedAccessor:
    return DelayedAccessor((*self.actions, GetItem(key)))


class CallableProxy:
  """Passes the accesses that led to a call on to a function.

  Example:

    >>> from nnx.as_flax.proxies import CallableProxy
    >>> proxy = CallableProxy(lambda accessor, x: accessor("abc")(x))
    >>> proxy.count("b")
    1

  Args:
    callable: takes a `DelayedAccessor` and the arguments of the call.
    accessor: accesses that come first.
  """

  def __init__(self, callable: Any, accessor: DelayedAccessor | None = None):
    self._callable = callable
    self._accessor = DelayedAccessor() if accessor is None else accessor

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self._callable(self._accessor, *args, **kwargs)

  def __getattr__(self, name: str) -> CallableProxy:
    return CallableProxy(self._callable, getattr(self._accessor, name))

  def __getitem__(self, key: Any) -> CallableProxy:
    return CallableProxy(self._callable, operator.getitem(self._accessor, key))


class ApplyCaller(Protocol[A]):
  """The type of what returns, with each result, what it has become."""

  def __getattr__(self, name: str) -> ApplyCaller[A]: ...

  def __getitem__(self, key: Any) -> ApplyCaller[A]: ...

  def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, A]: ...
