"""The operators of Variables, which work on their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
import math
import operator
from typing import Any

import jax
import numpy as np

from nnx.engine import _engine


def unwrap(value: Any) -> Any:
  """Replaces a Variable by its value.

  Example:

    >>> import nnx
    >>> from nnx.variable_operators import unwrap
    >>> unwrap(nnx.Param(1)), unwrap(2)
    (1, 2)
  """
  return value.value if isinstance(value, _engine.VariableBase) else value


def _binary(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
  def method(self, other):
    return operation(self.value, unwrap(other))

  return method


def _reflected(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
  def method(self, other):
    return operation(unwrap(other), self.value)

  return method


def _unary(operation: Callable[[Any], Any]) -> Callable[..., Any]:
  def method(self):
    return operation(self.value)

  return method


def _in_place(operation: Callable[[Any, Any], Any]) -> Callable[..., Any]:
  """Makes `v += x` set the value, as in Flax 0.10; 0.12 refuses it."""

  def method(self, other):
    self.value = operation(self.value, unwrap(other))
    return self

  return method


class Operators(_engine.VariableBase):
  """The part of a Variable that behaves like its value."""

  __slots__ = ()
  __array_priority__ = 100  # numpy arrays on the left leave operators to us.

  def __jax_array__(self) -> Any:
    value = self.value
    return value if isinstance(value, jax.Array) else jax.numpy.asarray(value)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    array = np.asarray(self.value)
    if dtype is not None and array.dtype != dtype:
      if copy is False:
        raise ValueError(
          f"The value must be copied to change its dtype from `{array.dtype}`"
          f" to `{dtype}`, but got `copy=False`."
        )
      return array.astype(dtype)
    return array.copy() if copy else array

  def __call__(self, *args, **kwargs) -> Any:
    return self.value(*args, **kwargs)

  def __len__(self) -> int:
    return len(self.value)

  def __iter__(self) -> Iterator[Any]:
    return iter(self.value)

  def __contains__(self, item: Any) -> bool:
    return item in self.value

  def __bool__(self) -> bool:
    value = self.value
    # `if self.bias:` asks whether there is one, as it does in Flax.
    return len(value) > 0 if getattr(value, "ndim", 0) else bool(value)

  def __format__(self, spec: str) -> str:
    return format(self.value, spec) if spec else str(self)

  def __round__(self, ndigits: int = 0) -> Any:
    return self.value.__round__(ndigits)

  def __divmod__(self, other: Any) -> Any:
    return divmod(self.value, unwrap(other))

  def __rdivmod__(self, other: Any) -> Any:
    return divmod(unwrap(other), self.value)

  __add__ = _binary(operator.add)
  __sub__ = _binary(operator.sub)
  __mul__ = _binary(operator.mul)
  __matmul__ = _binary(operator.matmul)
  __truediv__ = _binary(operator.truediv)
  __floordiv__ = _binary(operator.floordiv)
  __mod__ = _binary(operator.mod)
  __pow__ = _binary(operator.pow)
  __lshift__ = _binary(operator.lshift)
  __rshift__ = _binary(operator.rshift)
  __and__ = _binary(operator.and_)
  __xor__ = _binary(operator.xor)
  __or__ = _binary(operator.or_)
  __eq__ = _binary(operator.eq)  # elementwise, so there is no hash
  __ne__ = _binary(operator.ne)
  __lt__ = _binary(operator.lt)
  __le__ = _binary(operator.le)
  __gt__ = _binary(operator.gt)
  __ge__ = _binary(operator.ge)

  __radd__ = _reflected(operator.add)
  __rsub__ = _reflected(operator.sub)
  __rmul__ = _reflected(operator.mul)
  __rmatmul__ = _reflected(operator.matmul)
  __rtruediv__ = _reflected(operator.truediv)
  __rfloordiv__ = _reflected(operator.floordiv)
  __rmod__ = _reflected(operator.mod)
  __rpow__ = _reflected(operator.pow)
  __rlshift__ = _reflected(operator.lshift)
  __rrshift__ = _reflected(operator.rshift)
  __rand__ = _reflected(operator.and_)
  __rxor__ = _reflected(operator.xor)
  __ror__ = _reflected(operator.or_)

  __iadd__ = _in_place(operator.add)
  __isub__ = _in_place(operator.sub)
  __imul__ = _in_place(operator.mul)
  __imatmul__ = _in_place(operator.matmul)
  __itruediv__ = _in_place(operator.truediv)
  __ifloordiv__ = _in_place(operator.floordiv)
  __imod__ = _in_place(operator.mod)
  __ipow__ = _in_place(operator.pow)
  __ilshift__ = _in_place(operator.lshift)
  __irshift__ = _in_place(operator.rshift)
  __iand__ = _in_place(operator.and_)
  __ixor__ = _in_place(operator.xor)
  __ior__ = _in_place(operator.or_)

  __neg__ = _unary(operator.neg)
  __pos__ = _unary(operator.pos)
  __abs__ = _unary(operator.abs)
  __invert__ = _unary(operator.invert)
  __complex__ = _unary(complex)
  __int__ = _unary(int)
  __float__ = _unary(float)
  __index__ = _unary(operator.index)
  __trunc__ = _unary(math.trunc)
  __floor__ = _unary(lambda value: value.__floor__())
  __ceil__ = _unary(lambda value: value.__ceil__())
