"""Modules that are containers: a list, a dict, and a chain of functions."""

from __future__ import annotations

import collections.abc
from collections.abc import Callable, Iterable, Iterator, Mapping
import inspect
from typing import Any, TypeVar, overload

from nnx import reprlib
from nnx.module import Module
from nnx.pytreelib import Marker

A = TypeVar("A")


class List(Module, collections.abc.MutableSequence[A]):
  """A module that is a list of data and static values.

  A plain list as an attribute does the same; this one can be marked, passed to
  transforms by itself, and shared.

  Example:

    >>> import nnx
    >>> layers = nnx.List([nnx.Param(1), abs])
    >>> layers.append(nnx.Param(2))
    >>> len(layers), layers[-1].value, list(nnx.state(layers))
    (3, 2, [0, 2])

  Args:
    iterable: the first elements.
  """

  # The elements are attributes with the ints from 0 on as their names.

  def __init__(self, iterable: Iterable[A] | None = None, /):
    self._rebuild([] if iterable is None else list(iterable))

  def _rebuild(self, elements: list[Any]) -> None:
    """Makes `elements` the contents, keeping the marks that they have."""
    self._check_can_update()
    attributes: dict[Any, Any] = vars(self)
    statuses = self._pytree_status or {}
    for i in range(len(self)):
      del attributes[i]
    kept: dict[Any, bool] = {
      k: v for k, v in statuses.items() if not isinstance(k, int)
    }
    for i, element in enumerate(elements):
      if isinstance(element, Marker):
        kept[i] = element.is_data
        element = element.value
      attributes[i] = element
    self._pytree_status = kept or None

  def __setstate__(self, state: Mapping[str, Any]) -> None:
    if "_length" in state:  # pickled by Flax: there the names are strings
      attributes: dict[Any, Any] = dict(state)
      size = attributes.pop("_length")
      nodes = dict(attributes.get("_pytree__nodes", {}))
      for i in range(size):
        attributes[i] = attributes.pop(str(i))
        if str(i) in nodes:
          nodes[i] = nodes.pop(str(i))
      if "_pytree__nodes" in attributes:
        attributes["_pytree__nodes"] = nodes
      state = attributes
    super().__setstate__(state)

  def _elements(self) -> list[Any]:
    """Lists the elements, marked as they were."""
    statuses = self._pytree_status or {}
    return [
      Marker(element, statuses[i]) if i in statuses else element
      for i, element in enumerate(self)
    ]

  def _position(self, index: Any) -> int:
    size = len(self)
    try:
      return range(size)[index]
    except IndexError:
      raise IndexError(
        f"`index` must lie in [-{size}, {size}), but got {index}."
      ) from None

  def __getattr__(self, name: str) -> Any:
    # Where the keys of a path are texts, as in Flax.
    number = _number(name)
    if number is None or number >= len(self):
      raise AttributeError(
        f"{type(self).__name__!r} object has no attribute {name!r}"
      )
    return self[number]

  def __setattr__(self, name: str, value: Any) -> None:
    number = _number(name)
    if number is None:
      super().__setattr__(name, value)
    else:
      self[number] = value

  def __len__(self) -> int:
    attributes = vars(self)
    size = len(attributes)
    while size and size - 1 not in attributes:  # attributes of a subclass
      size -= 1
    return size

  def __iter__(self) -> Iterator[A]:
    attributes: dict[Any, Any] = vars(self)
    i = 0
    while i in attributes:
      yield attributes[i]
      i += 1

  @overload
  def __getitem__(self, index: int) -> A: ...
  @overload
  def __getitem__(self, index: slice) -> list[A]: ...
  def __getitem__(self, index: int | slice) -> Any:
    if isinstance(index, slice):
      return list(self)[index]
    attributes: dict[Any, Any] = vars(self)
    return attributes[self._position(index)]

  def __setitem__(self, index: int | slice, value: Any) -> None:
    if isinstance(index, slice) or isinstance(value, Marker):
      elements: Any = self._elements()
      elements[index] = value
      self._rebuild(elements)
    else:
      self._check_can_update()
      attributes: dict[Any, Any] = vars(self)
      attributes[self._position(index)] = value

  def __delitem__(self, index: int | slice) -> None:
    elements = self._elements()
    if not isinstance(index, slice):
      index = self._position(index)
    del elements[index]
    self._rebuild(elements)

  def append(self, value: Any) -> None:
    """Adds an element at the end.

    Example:

      >>> import nnx
      >>> layers = nnx.List([abs])
      >>> layers.append(nnx.Param(1))
      >>> len(layers)
      2
    """
    if isinstance(value, Marker):
      self._rebuild([*self._elements(), value])
    else:
      self._check_can_update()
      attributes: dict[Any, Any] = vars(self)
      attributes[len(self)] = value

  def insert(self, index: int, value: Any) -> None:
    """Adds an element before the one at `index`.

    Example:

      >>> import nnx
      >>> layers = nnx.List([nnx.Param(1)])
      >>> layers.insert(0, abs)
      >>> list(nnx.state(layers))
      [1]
    """
    elements = self._elements()
    elements.insert(index, value)
    self._rebuild(elements)

  def __dir__(self) -> list[str]:
    return sorted(name for name in super().__dir__() if isinstance(name, str))

  def _display(self) -> reprlib.Parts:
    return reprlib.Parts(
      type(self).__name__,
      [(None, element) for element in self],
      start="([",
      end="])",
      type=type(self),
      nested={"summarize": True, "in_state": False},
    )


def _number(name: str) -> int | None:
  """Returns the index that an attribute's name is the text of."""
  return int(name) if name.isdecimal() and name.isascii() else None


class Dict(Module, collections.abc.MutableMapping[str, A]):
  """A module that is a dict of data and static values with names as keys.

  A plain dict as an attribute does the same; this one can be marked, passed to
  transforms by itself, and shared. Its items are attributes as well.

  Example:

    >>> import nnx
    >>> layers = nnx.Dict(first=nnx.Param(1), activation=abs)
    >>> layers["first"].value, layers.first.value, list(layers)
    (1, 1, ['first', 'activation'])

  Args:
    mapping: a mapping, or pairs of key and value.
    **items: further items.
  """

  def __init__(
    self,
    mapping: Mapping[str, A] | Iterable[tuple[str, A]] = (),
    /,
    **items: A,
  ):
    for key, value in dict(mapping, **items).items():
      self[key] = value

  def __getitem__(self, key: str) -> A:
    return vars(self)[key]

  def __setitem__(self, key: str, value: Any) -> None:
    if not isinstance(key, str):
      raise TypeError(
        "The keys of `nnx.Dict` must be strings, since they are attributes, but"
        f" got `{key!r}`. Use a plain dict, or `nnx.List`."
      )
    setattr(self, key, value)

  def __delitem__(self, key: str) -> None:
    if key not in vars(self):
      raise KeyError(key)
    delattr(self, key)

  def __iter__(self) -> Iterator[str]:
    return iter(vars(self))

  def __len__(self) -> int:
    return len(vars(self))

  def __contains__(self, key: Any) -> bool:
    return key in vars(self)

  # Other mappings have none.
  __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]

  def _display(self) -> reprlib.Parts:
    return reprlib.Parts(
      type(self).__name__,
      list(vars(self).items()),
      start="({",
      end="})",
      separator=": ",
      type=type(self),
      nested={"summarize": True, "in_state": False},
    )


class Sequential(Module):
  """A module that applies functions, such as modules, one after another.

  What one returns is the argument of the next: a tuple as its arguments, a dict
  as its keywords, all else as its only argument.

  Example:

    >>> import nnx
    >>> class Scale(nnx.Module):
    ...   def __init__(self, factor):
    ...     self.factor = nnx.Param(factor)
    ...
    ...   def __call__(self, x):
    ...     return x * self.factor
    >>> nnx.Sequential(Scale(2), abs, Scale(3))(-1)
    6

  Args:
    *fns: the functions.

  Raises:
    TypeError: if one of them cannot be called.
  """

  def __init__(self, *fns: Callable[..., Any]):
    for i, fn in enumerate(fns):
      _check_callable(i, fn)
    self.layers = List(fns)

  def __call__(self, *args: Any, rngs: Any = None, **kwargs: Any) -> Any:
    """Applies the functions.

    Args:
      *args: arguments of the first one.
      rngs: passed to those that have a parameter `rngs`.
      **kwargs: keywords of the first one.

    Returns:
      What the last one returns; without functions, the arguments.

    Raises:
      TypeError: if one of them cannot be called.
    """
    if not self.layers:
      if len(args) == 1:
        return args[0]
      return args or kwargs or None
    output: Any = None
    for i, fn in enumerate(self.layers):
      _check_callable(i, fn)
      if i > 0:
        args, kwargs = _as_arguments(output)
      if rngs is not None and _takes_keyword(fn, "rngs"):
        kwargs["rngs"] = rngs
      output = fn(*args, **kwargs)
    return output


def _check_callable(i: int, fn: Any) -> None:
  if not callable(fn):
    advice = ""
    if isinstance(fn, (list, tuple)):
      advice = " Pass them one by one: `Sequential(*layers)`."
    raise TypeError(
      f"The layers of a `Sequential` must be callable, but layer {i} is a"
      f" `{type(fn).__name__}`.{advice}"
    )


def _as_arguments(output: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
  if isinstance(output, tuple):
    return output, {}
  if isinstance(output, dict):
    return (), dict(output)
  return (output,), {}


def _takes_keyword(fn: Callable[..., Any], name: str) -> bool:
  try:
    parameter = inspect.signature(fn).parameters.get(name)
  except (TypeError, ValueError):  # some builtins have no signature
    return False
  return parameter is not None and parameter.kind in (
    parameter.KEYWORD_ONLY,
    parameter.POSITIONAL_OR_KEYWORD,
  )
