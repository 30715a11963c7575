"""What the Python code of a Linen module depends on, apart from its arguments.

A call of a Linen module may be recorded and replayed only if running its Python
again would do the same. Linen modules are frozen, but their code can read
globals, print, count, or draw from NumPy's generator. `Dependencies` reads the
byte code of every function that a module may reach and settles one of two
things: all that it depends on, with guards that tell when any of it changes; or
that it cannot tell. It must never be wrong in the first way, so what it does
not know is refused.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Mapping
import dataclasses
import dis
import enum
import functools
import inspect
import types
from typing import Any

from flax import core, linen
import jax
import numpy as np

# Libraries whose functions do the same every time.
_TRUSTED = frozenset(
  "jax jaxlib flax math functools itertools operator _operator typing einops"
  " dataclasses collections enum abc types copy string re numbers".split()
)
# Parts of them, and of numpy, that do not.
_UNTRUSTED_PREFIXES = (
  "flax.nnx",
  "flax.training",
  "jax.profiler",
  "jax.experimental.multihost_utils",
  "numpy.random",
  "numpy.lib.npyio",
)
_NUMPY_FILES = frozenset(
  "fromfile load loadtxt memmap save savetxt savez savez_compressed seterr"
  " set_printoptions genfromtxt".split()
)
_BUILTINS = frozenset(
  "abs all any bool bytes callable classmethod complex dict divmod enumerate"
  " filter float format frozenset getattr hasattr hash int isinstance"
  " issubclass iter len list map max min next object pow property range repr"
  " reversed round set slice sorted staticmethod str sum super tuple type zip"
  " NotImplemented Ellipsis __build_class__ __debug__".split()
)
_SCALARS = (bool, int, str, bytes, type(None), type(Ellipsis), np.dtype)
_BUILTIN_FUNCTIONS = (
  types.BuiltinFunctionType,
  types.MethodDescriptorType,
  types.WrapperDescriptorType,
  types.MethodWrapperType,
  types.ClassMethodDescriptorType,
  types.GetSetDescriptorType,
  types.MemberDescriptorType,
)
_SMALL_ARRAY = 4096  # bytes of a numpy array that a guard may compare
# Attributes that Linen lets code outside of `setup` assign: Variables' values.
_ASSIGNABLE = frozenset(["value"])
# Attributes in which Linen keeps where a module is.
_LINEN_INTERNALS = frozenset(
  ["parent", "name", "scope", "_state", "_parent_ref", "_id"]
)
_SETUPS = frozenset(["setup", "__post_init__"])

Guard = Callable[[], bool]
_MISSING = object()


class UnsettledError(Exception):
  """The code may do something else the next time it runs."""


class Identity:
  """A key that stands for one object, and keeps it alive."""

  __slots__ = ("value",)

  def __init__(self, value: Any):
    self.value = value

  def __hash__(self) -> int:
    return id(self.value)

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Identity) and self.value is other.value


def _root(name: Any) -> str:
  return str(name).split(".", 1)[0]


def _is_frozen(cls: Any) -> bool:
  return dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen


def _is_trusted(module: Any) -> bool:
  module = str(module)
  return _root(module) in _TRUSTED and not module.startswith(
    _UNTRUSTED_PREFIXES
  )


class Dependencies:
  """Collects what values and functions depend on.

  Example:

    >>> from bridge import purity
    >>> found = purity.Dependencies()
    >>> key = found.key((1, "a"))
    >>> found.hold()
    True
    >>> found.key(print)
    Traceback (most recent call last):
      ...
    bridge.purity.UnsettledError: `print` may do something else next time
  """

  def __init__(self):
    self.guards: list[Guard] = []
    self._seen: dict[int, Any] = {}
    self._modules: dict[int, int] = {}

  def hold(self) -> bool:
    """Whether everything found is still as it was."""
    return all(guard() for guard in self.guards)

  def key(self, value: Any) -> Any:
    """Returns a hashable value that says all by which `value` can matter.

    Args:
      value: an attribute, an argument or a global.

    Returns:
      Equal keys for values that behave alike; types count, so that `1`, `1.0`
      and `True` differ.

    Raises:
      UnsettledError: if it cannot tell.
    """
    cls = type(value)
    if cls in _SCALARS:
      return (cls, value)
    if cls in (float, complex):
      return (cls, repr(value))  # -0.0 and nan are told apart
    if isinstance(value, linen.Module):
      return self._module(value)
    if isinstance(value, enum.Enum):
      self._class(cls)
      return (cls, value.name)
    if cls in (tuple, list, frozenset, set) or hasattr(cls, "_fields"):
      if cls not in (tuple, list, frozenset, set):
        self._class(cls)
      items = tuple(value)
      if cls in (list, set):
        self.guards.append(_same_items(value, items))
      return (cls, tuple(self.key(item) for item in items))
    if cls in (dict, core.FrozenDict, types.MappingProxyType):
      items = tuple(value.items())
      if cls is not core.FrozenDict:
        self.guards.append(_same_items(value, tuple(value), dict(items)))
      return (cls, tuple((self.key(k), self.key(v)) for k, v in items))
    if isinstance(value, jax.Array):
      if isinstance(value, jax.core.Tracer) or isinstance(value, jax.Ref):
        raise _unsettled(value)
      return Identity(value)
    if isinstance(value, np.generic):
      return (cls, value.tobytes())
    if isinstance(value, np.ndarray):
      if value.dtype.hasobject or value.nbytes > _SMALL_ARRAY:
        raise _unsettled(value)
      content = (value.shape, value.dtype, value.tobytes())
      self.guards.append(
        lambda: (value.shape, value.dtype, value.tobytes()) == content
      )
      return content
    if isinstance(value, functools.partial):
      return (
        cls,
        self.key(value.func),
        self.key(value.args),
        self.key(tuple(sorted(value.keywords.items()))),
      )
    if isinstance(value, types.ModuleType):
      if not _is_trusted(value.__name__):
        raise _unsettled(value)
      return Identity(value)
    if isinstance(value, type):
      self._class(value)
      return Identity(value)
    if isinstance(value, types.MethodType):
      self._function(value.__func__)
      return (cls, Identity(value.__func__), self.key(value.__self__))
    if isinstance(value, types.FunctionType) or isinstance(
      value, _BUILTIN_FUNCTIONS
    ):
      self._function(value)
      return Identity(value)
    if isinstance(value, (property, classmethod, staticmethod)):
      for part in ("fget", "fset", "fdel", "__func__"):
        if getattr(value, part, None) is not None:
          self.key(getattr(value, part))
      return Identity(value)
    if _is_frozen(cls):
      self._class(cls)
      fields = dataclasses.fields(value)
      return (
        cls,
        tuple((f.name, self.key(getattr(value, f.name))) for f in fields),
      )
    if isinstance(value, (np.ufunc, jax.sharding.PartitionSpec)) or (
      _root(cls.__module__) in ("jax", "jaxlib")
      and cls.__hash__ is not None
      and value is not jax.config
    ):
      # Compiled functions, rules of differentiation, precisions, shardings.
      wrapped = getattr(value, "__wrapped__", None)
      if wrapped is not None:
        self.key(wrapped)
      return Identity(value)
    if cls.__module__ in ("typing", "_collections") or isinstance(
      value, (types.GenericAlias, types.UnionType)
    ):
      return Identity(value)
    raise _unsettled(value)

  def _module(self, module: linen.Module) -> Any:
    """A Linen module by its class and fields."""
    if id(module) in self._modules:
      # The same module twice shares its variables; two equal ones do not.
      return ("same", self._modules[id(module)])
    self._modules[id(module)] = len(self._modules)
    if module.parent is not None or module.scope is not None:
      raise UnsettledError("a bound Linen module depends on what it is part of")
    cls = type(module)
    self._class(cls)
    names = [f.name for f in dataclasses.fields(module) if f.name != "parent"]
    known = _LINEN_INTERNALS.union(names)
    extra = [k for k in vars(module) if k not in known]
    return (
      cls,
      tuple((name, self.key(getattr(module, name, None))) for name in names),
      tuple((name, self.key(vars(module)[name])) for name in extra),
    )

  def _visit(self, value: Any) -> bool:
    """Whether a function or class is new; keeps it, so that its id stays."""
    if id(value) in self._seen:
      return False
    self._seen[id(value)] = value
    return True

  def _class(self, cls: type) -> None:
    """All methods and attributes of a class that a user wrote."""
    for base in cls.__mro__:
      if _is_trusted(base.__module__) or base is object:
        continue
      if base.__module__ == "builtins":
        if base.__name__ not in _BUILTINS and not issubclass(
          base, BaseException
        ):
          raise _unsettled(base)
        continue
      if _root(base.__module__) == "numpy":
        if not issubclass(base, (np.generic, np.dtype)):
          raise _unsettled(base)
        continue
      if not self._visit(base):
        continue
      if not (
        issubclass(base, (linen.Module, enum.Enum, BaseException))
        or hasattr(base, "_fields")
        or _is_frozen(base)
      ):
        raise UnsettledError(
          f"objects of `{base.__qualname__}` may change or be changed"
        )
      self._class_attributes(base)

  def _class_attributes(self, base: type) -> None:
    skipped = set()
    if issubclass(base, linen.Module):
      skipped |= _LINEN_INTERNALS
    if issubclass(base, enum.Enum):
      skipped |= set(base.__members__) | {"_member_map_", "_value2member_map_"}
    for name, value in list(vars(base).items()):
      is_dunder = name.startswith("__") and name.endswith("__")
      if name in skipped or name.startswith(("_abc_", "_kw_only_")):
        continue
      if isinstance(value, types.FunctionType):
        innermost = inspect.unwrap(value)
        if is_dunder and innermost.__code__.co_filename == "<string>":
          continue  # written by dataclasses
      elif is_dunder:
        continue
      elif issubclass(base, enum.Enum) and name.startswith("_"):
        continue
      self.guards.append(_same_attribute(base, name, value))
      if isinstance(value, dataclasses.Field):
        continue
      self.key(value)
    fields = getattr(base, "__dataclass_fields__", {})
    for field in fields.values():
      if field.default_factory is not dataclasses.MISSING:
        self.key(field.default_factory)

  def _function(self, fn: Any) -> None:
    """A function: by its name if it is a library's, else by its code."""
    if not self._visit(fn):
      return
    if isinstance(fn, _BUILTIN_FUNCTIONS):
      self._builtin(fn)
      return
    wrapped = getattr(fn, "__wrapped__", None)
    if wrapped is not None:
      self.key(wrapped)
    home = fn.__globals__.get("__name__", "")
    cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or ()))
    if _root(home) == "numpy":
      if home.startswith(_UNTRUSTED_PREFIXES) or fn.__name__ in _NUMPY_FILES:
        raise _unsettled(fn)
      return
    if _is_trusted(home):
      # The library's own, but it may have been given a user's function.
      for cell in cells.values():
        content = _content(cell)
        if isinstance(content, (types.FunctionType, functools.partial, type)):
          self.key(content)
      return
    self.key(fn.__defaults__ or ())
    self.key(tuple(sorted((fn.__kwdefaults__ or {}).items())))
    for cell in cells.values():
      content = _content(cell)
      self.guards.append(_same_cell(cell, content))
      if content is not _MISSING:
        self.key(content)
    self._code(fn.__code__, fn.__globals__, frozenset(cells))

  def _builtin(self, fn: Any) -> None:
    owner = getattr(fn, "__self__", None)
    objclass = getattr(fn, "__objclass__", None)
    if objclass is not None:
      self._class(objclass)
    elif owner is not None and not isinstance(owner, types.ModuleType):
      self.key(owner)
    elif getattr(builtins, fn.__name__, None) is fn:
      if fn.__name__ not in _BUILTINS:
        raise _unsettled(fn)
    elif _root(fn.__module__) == "numpy":
      if (
        str(fn.__module__).startswith(_UNTRUSTED_PREFIXES)
        or fn.__name__ in _NUMPY_FILES
      ):
        raise _unsettled(fn)
    elif not _is_trusted(fn.__module__) and fn.__module__ != "builtins":
      raise _unsettled(fn)

  def _code(
    self, code: types.CodeType, scope: dict[str, Any], outer: frozenset[str]
  ) -> None:
    """Byte code: the names it reads and what it assigns.

    Args:
      code: the code of a function, or of one inside of it.
      scope: its globals.
      outer: names of variables of the functions around the outermost one.
    """
    instructions = [i for i in dis.get_instructions(code) if i.opname != "NOP"]
    for index, instruction in enumerate(instructions):
      op, name = instruction.opname, instruction.argval
      if op in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
        chain = []
        for following in instructions[index + 1 :]:
          if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
            break
          chain.append(following.argval)
        if op == "LOAD_GLOBAL" or name in scope or hasattr(builtins, name):
          self._global(name, scope, chain)
      elif op in ("STORE_GLOBAL", "DELETE_GLOBAL"):
        raise UnsettledError(
          f"`{code.co_qualname}` assigns the global `{name}`"
        )
      elif op in ("STORE_DEREF", "DELETE_DEREF") and name in outer:
        raise UnsettledError(
          f"`{code.co_qualname}` assigns `{name}` of a function around it"
        )
      elif op in ("STORE_ATTR", "DELETE_ATTR"):
        if name not in _ASSIGNABLE and code.co_name not in _SETUPS:
          raise UnsettledError(
            f"`{code.co_qualname}` assigns the attribute `{name}`"
          )
      elif op == "IMPORT_NAME" and (
        not _is_trusted(name) or instructions[index - 2].argval != 0
      ):  # by a relative path, a name is another one
        raise UnsettledError(f"`{code.co_qualname}` imports `{name}`")
    for constant in code.co_consts:
      if isinstance(constant, types.CodeType):
        self._code(constant, scope, outer)

  def _global(self, name: str, scope: dict[str, Any], chain: list[str]) -> None:
    if name in scope:
      value = scope[name]
      self.guards.append(_same_item(scope, name, value))
    else:
      self.guards.append(_same_item(scope, name, _MISSING))
      value = getattr(builtins, name, _MISSING)
      if value is _MISSING:
        raise UnsettledError(f"there is no global `{name}` yet")
      if name in _BUILTINS or (
        isinstance(value, type) and issubclass(value, BaseException)
      ):
        return
    for attribute in chain:
      if not isinstance(value, types.ModuleType):
        break
      owner = value
      value = getattr(owner, attribute, _MISSING)
      if value is _MISSING:
        raise UnsettledError(f"`{owner.__name__}` has no `{attribute}`")
      self.guards.append(_same_attribute(owner, attribute, value))
    self.key(value)


def _unsettled(value: Any) -> UnsettledError:
  name = getattr(value, "__qualname__", None) or getattr(
    value, "__name__", None
  )
  name = name or f"a `{type(value).__qualname__}`"
  return UnsettledError(f"`{name}` may do something else next time")


def _content(cell: Any) -> Any:
  try:
    return cell.cell_contents
  except ValueError:  # not assigned yet
    return _MISSING


def _same_cell(cell: Any, content: Any) -> Guard:
  return lambda: _content(cell) is content


def _same_item(scope: dict[str, Any], name: str, value: Any) -> Guard:
  return lambda: scope.get(name, _MISSING) is value


def _same_attribute(owner: Any, name: str, value: Any) -> Guard:
  if name in vars(owner):
    attributes = vars(owner)
    return lambda: attributes.get(name, _MISSING) is value
  return lambda: getattr(owner, name, _MISSING) is value


def _same_items(
  container: Any,
  items: tuple[Any, ...],
  values: Mapping[Any, Any] | None = None,
) -> Guard:
  """A guard for a list, set or dict: the same objects in the same order."""

  def guard() -> bool:
    if len(container) != len(items):
      return False
    if not all(a is b for a, b in zip(container, items)):
      return False
    return values is None or all(container[k] is values[k] for k in items)

  return guard
