"""What is data and what is static: types, marks, annotations."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, TypeVar, dataclass_transform

import jax
import numpy as np

from nnx.engine import _engine
from nnx.missing import MISSING

A = TypeVar("A")
T = TypeVar("T", bound=type)


class Marker:
  """A value on its way into an attribute, marked as data or as static.

  Example:

    >>> import nnx
    >>> marker = nnx.static((1, 2))
    >>> marker.value, marker.is_data
    ((1, 2), False)

  Args:
    value: the value.
    is_data: whether the attribute is data.
  """

  __slots__ = ("value", "is_data")

  def __init__(self, value: Any, is_data: bool):
    self.value = value
    self.is_data = is_data

  def __repr__(self) -> str:
    return f"nnx.{'data' if self.is_data else 'static'}({self.value!r})"

  def __hash__(self) -> int:
    # One that is hidden in a container must not pass for a static value.
    raise ValueError(
      "`nnx.data(...)` and `nnx.static(...)` must be assigned to attributes,"
      f" but a container holds `{self!r}`. Wrap the whole container."
    )


DATA, STATIC = "nnx.Data", "nnx.Static"

Data = Annotated[A, DATA]
Static = Annotated[A, STATIC]


def _mark(value: Any, is_data: bool, field: dict[str, Any]) -> Any:
  name = "data" if is_data else "static"
  if value is not MISSING:
    if field:
      raise TypeError(
        f"`nnx.{name}` must be called with a value or with keywords of"
        f" `dataclasses.field`, but got `{value!r}` and {sorted(field)}."
      )
    return Marker(value, is_data)
  metadata = dict(field.pop("metadata", None) or {})
  if "static" in metadata:
    raise ValueError(
      f"`metadata` given to `nnx.{name}` must not have the key `static`, which"
      f" is set by it, but got `{metadata}`."
    )
  return dataclasses.field(
    **field, metadata={**metadata, "static": not is_data}
  )


def data(value: Any = MISSING, /, **field: Any) -> Any:
  """Marks an attribute as data.

  Assigned to an attribute, it marks it; in the body of a class it declares an
  attribute, and takes the keywords of `dataclasses.field`.

  Example:

    >>> import jax, nnx
    >>> class Foo(nnx.Pytree):
    ...   def __init__(self):
    ...     self.a = nnx.data(42)
    ...     self.b = 7
    >>> jax.tree.leaves(Foo())
    [42]

  Args:
    value: the value of the attribute.
    **field: keywords of `dataclasses.field`, if there is no value.

  Returns:
    What to assign to the attribute.

  Raises:
    TypeError: if a value and keywords are given.
    ValueError: if `metadata` has the key `static`.
  """
  return _mark(value, True, field)


def static(value: Any = MISSING, /, **field: Any) -> Any:
  """Marks an attribute as static; see `data`.

  Example:

    >>> import jax, nnx
    >>> class Foo(nnx.Pytree):
    ...   def __init__(self):
    ...     self.a = nnx.static((1, 2))
    >>> jax.tree.leaves(Foo())
    []

  Args:
    value: the value of the attribute, which must hold no data.
    **field: keywords of `dataclasses.field`, if there is no value.

  Returns:
    What to assign to the attribute.

  Raises:
    TypeError: if a value and keywords are given.
    ValueError: if `metadata` has the key `static`; on assignment, if the value
      holds data.
  """
  return _mark(value, False, field)


@dataclass_transform(field_specifiers=(dataclasses.field, data, static))
def dataclass(cls: Any = None, /, **options: Any) -> Any:
  """Makes a dataclass of a class of this library, which prints itself.

  Example:

    >>> import jax, nnx
    >>> @nnx.dataclass
    ... class Foo(nnx.Pytree):
    ...   a: int = nnx.data()
    ...   b: str = "x"
    >>> jax.tree.leaves(Foo(3))
    [3]

  Args:
    cls: the class; without it a decorator is returned.
    **options: those of `dataclasses.dataclass`, without `repr` and `frozen`.

  Returns:
    The class.

  Raises:
    TypeError: if `frozen` or `slots` is asked for.
  """
  for option in ("frozen", "slots"):
    if options.get(option):
      raise TypeError(
        "Objects of nnx keep attributes in their `__dict__` and can be changed,"
        f" but `nnx.dataclass` got `{option}=True`. Leave it out."
      )
  return dataclasses.dataclass(cls, repr=False, **options)


# Data types

data_types: set[type] = set()


def register_data_type(type_: T, /) -> T:
  """Makes attributes whose value is of a given type data; also a decorator.

  Example:

    >>> import jax, nnx
    >>> @nnx.register_data_type
    ... class Handle:
    ...   pass
    >>> nnx.is_data(Handle())
    True

  Args:
    type_: the type; subclasses of it are not meant.

  Returns:
    The type.
  """
  data_types.add(type_)
  _engine.forget_type(type_)
  return type_


def is_data(value: Any, /) -> bool:
  """Tells whether a value by itself makes an attribute data.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> [nnx.is_data(x) for x in (jnp.zeros(2), nnx.Param(1), nnx.Rngs(0))]
    [True, True, True]
    >>> [nnx.is_data(x) for x in ("a", 42, [jnp.zeros(2)])]
    [False, False, False]

  Args:
    value: anything.

  Returns:
    True for arrays of jax and numpy, mutable arrays, Variables, objects of this
    library and registered types. Lists, tuples and dicts are not data, but the
    graph functions look into them.
  """
  return (
    isinstance(
      value,
      (
        _engine.VariableBase,
        _engine.ObjectBase,
        jax.Array,
        np.ndarray,
        jax.Ref,
      ),
    )
    or type(value) in data_types
  )


def has_data(value: Any, /) -> list[Any]:
  """Lists the data among the leaves of a pytree.

  Example:

    >>> import numpy as np
    >>> import nnx
    >>> nnx.has_data([1, np.zeros(1), "a"])
    [array([0.])]

  Args:
    value: anything; objects of this library count as leaves.

  Returns:
    The leaves for which `is_data` holds.
  """
  return [leaf for leaf in leaves(value) if is_data(leaf)]


def leaves(value: Any) -> list[Any]:
  """Lists the leaves of a pytree, marks and data among them.

  Example:

    >>> import nnx
    >>> from nnx.attribute_marks import leaves
    >>> leaves([1, nnx.static((2, 3))])
    [1, nnx.static((2, 3))]
  """
  visited: set[int] = set()

  def is_leaf(x: Any) -> bool:
    if isinstance(x, Marker) or is_data(x):
      return True
    if isinstance(x, (list, dict)):  # only these can contain themselves
      if id(x) in visited:
        return True
      visited.add(id(x))
    return False

  return jax.tree.leaves(value, is_leaf=is_leaf)
