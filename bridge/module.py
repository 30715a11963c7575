"""nnx Modules in Linen's manner: `setup`, `compact`, `init` and `apply`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
from typing import Any, TypeVar, cast, dataclass_transform

from flax import core
from flax.core import meta
import jax
import jax.numpy as jnp

import nnx

from . import to_nnx
from . import variables as variables_lib
from .layout import MISSING
from .module_arguments import clash, method_of, streams
from .module_context import MODULE_CONTEXT as MODULE_CONTEXT
from .module_context import AttrPriority as AttrPriority
from .module_context import ModuleContext as ModuleContext
from .module_context import ModuleStackEntry as ModuleStackEntry
from .module_context import Running
from .module_context import Scope as Scope
from .module_context import current_context as current_context

F = TypeVar("F", bound=Callable[..., Any])


M = TypeVar("M", bound="Module")


class ModuleState(nnx.State):
  """Variables that wait in an attribute for the Module they belong to."""


nnx.register_data_type(ModuleState)


def current_module() -> Module | None:
  """Returns the innermost `bridge.Module` that is being run.

  Example:

    >>> import bridge
    >>> class Model(bridge.Module):
    ...   def __call__(self):
    ...     return bridge.current_module() is self
    >>> Model().apply({}), bridge.current_module()
    (True, None)
  """
  context = current_context()
  return context.module if context is not None else None


class ModuleMeta(type):
  """Makes Modules that are made inside of another one its submodules."""

  def __call__(cls, *args: Any, **kwargs: Any) -> Any:
    context = current_context()
    parent, name = None, None
    if context is not None:
      parent = context.module
      if "parent" in kwargs:
        parent = kwargs.pop("parent")
        if parent is not None:
          raise ValueError(
            f"`parent` of `{cls.__name__}` must be left out or None inside of"
            f" `{type(context.module).__name__}`, which is its parent, but got"
            f" a `{type(parent).__name__}`."
          )
      if "name" in kwargs:
        name = kwargs["name"]
        if "name" not in getattr(cls, "__dataclass_fields__", {}):
          del kwargs["name"]
        check_name(cls, name, context)
      elif context.in_compact and parent is not None:
        name = context.new_name(cls)
    module = super().__call__(*args, **kwargs)
    if parent is not None and name is not None:
      setattr(parent, name, module)
      parent.set_attr_priority(name, AttrPriority.INIT_PARENT)
    return module


def check_name(cls: type, name: Any, context: ModuleStackEntry) -> None:
  if not isinstance(name, str):
    raise ValueError(
      f"`name` of `{cls.__name__}` must be a string, but got {name!r}."
    )
  owner = type(context.module).__name__
  context.type_counter[f"name={name}"] += 1
  if context.type_counter[f"name={name}"] > 1:
    raise ValueError(
      f"Names of submodules of `{owner}` must differ, but `{name}` is given to"
      f" two, the second a `{cls.__name__}`. Rename one of them, or call the"
      " first again to share its parameters."
    )


@dataclass_transform(field_specifiers=(dataclasses.field,))
class Module(nnx.Module, metaclass=ModuleMeta):
  """An nnx Module that is written and used as a Linen module is.

  Its annotations are the fields of a dataclass. Submodules are made in `setup`,
  or in a method under `compact`, which names them; parameters and variables by
  `param` and `variable`. `init` and `apply` work on a copy of the Module, so it
  stays as it was, and take and return variables by collection.

  Example:

    >>> import bridge, jax.numpy as jnp, nnx
    >>> class Linear(bridge.Module):
    ...   features: int
    ...
    ...   @bridge.compact
    ...   def __call__(self, x):
    ...     shape = (x.shape[-1], self.features)
    ...     return x @ self.param("w", nnx.initializers.ones_init(), shape)
    >>> class Model(bridge.Module):
    ...   @bridge.compact
    ...   def __call__(self, x):
    ...     return Linear(2)(Linear(4)(x))
    >>> variables = Model().init(0, jnp.ones((1, 3)))
    >>> sorted(variables["params"])
    ['Linear_0', 'Linear_1']
    >>> Model().apply(variables, jnp.ones((1, 3)))
    Array([[12., 12.]], dtype=float32)
  """

  # No fields of the dataclasses: this class is none.
  scope: Scope | None = None
  attr_priorities: Mapping[str, int] = {}

  def __init_subclass__(cls, **kwargs: Any) -> None:
    super().__init_subclass__(pytree=False, **kwargs)
    dataclasses.dataclass(repr=False, eq=False)(cls)

  def __getattribute__(self, name: str) -> Any:
    value = super().__getattribute__(name)
    # Not `isinstance`, which for a Mapping takes as long as the read.
    if type(value) is ModuleState:
      raise AttributeError(
        f"`{type(self).__name__}` has variables for `{name}`, but has not made"
        " the submodule yet."
      )
    return value

  def __setattr__(self, name: str, value: Any) -> None:
    if self.scope is not None and name != "scope":
      waiting = vars(self).get(name)
      if isinstance(waiting, ModuleState):
        _give(value, waiting.raw_mapping, type(self).__name__, (name,))
      elif isinstance(waiting, Module) and isinstance(value, Module):
        # A method called twice makes its submodules anew: they are the same.
        if waiting is not value and type(waiting) is type(value):
          for key, item in vars(waiting).items():
            if isinstance(item, (nnx.Variable, Module)):
              nnx.Module.__setattr__(value, key, item)
      _bind(self, value)
    super().__setattr__(name, value)

  def set_attr_priority(self, name: str, value: AttrPriority) -> None:
    """Says how good an attribute is as the place of the Module it holds.

    Args:
      name: the attribute.
      value: the lowest wins; attributes have `DEFAULT`.
    """
    self.attr_priorities = {**self.attr_priorities, name: int(value)}

  def make_rng(self, name: str = "default") -> jax.Array:
    """Draws a key from a random stream.

    Args:
      name: the stream.

    Returns:
      The key, a scalar.

    Raises:
      ValueError: outside of `init` and `apply`, or if there is no stream of
        this name nor one called `default`.
    """
    scope = self._bound(f"draw from the stream `{name}`")
    try:
      stream = scope.rngs[name]
    except (KeyError, AttributeError):
      raise ValueError(
        f"`{type(self).__name__}` must have a key for the stream `{name}`, but"
        f" has {sorted(vars(scope.rngs)) or 'none'}. Pass"
        f" `rngs={{{name!r}: key}}`."
      ) from None
    return stream()

  def param(
    self,
    name: str,
    init_fn: Callable[..., Any],
    *args: Any,
    unbox: bool = True,
    **kwargs: Any,
  ) -> nnx.Param[Any]:
    """Returns a parameter: the one in the variables, or a new one.

    Example:

      >>> import bridge, nnx
      >>> class Model(bridge.Module):
      ...   @bridge.compact
      ...   def __call__(self):
      ...     init = nnx.initializers.ones_init()
      ...     return self.param("w", init, (2,), unbox=False).value
      >>> Model().init_with_output(0)[0]
      Array([1., 1.], dtype=float32)

    Args:
      name: its name.
      init_fn: makes its value of a key and `args` and `kwargs`.
      *args: more arguments of `init_fn`.
      unbox: Linen's, without effect: metadata is the Variable's.
      **kwargs: keyword arguments of it.

    Returns:
      The Variable.

    Raises:
      ValueError: outside of `init` and `apply`; if the name is taken by
        something else; or if the parameter has another shape than `init_fn`
        gives.
    """
    del unbox
    self._bound(f"make the parameter `{name}`")
    variable = self._variable(
      "params",
      nnx.Param,
      name,
      lambda key: init_fn(key, *args, **kwargs),
      lambda: self.make_rng("params"),
    )
    return cast(nnx.Param[Any], variable)

  def variable(
    self,
    col: str,
    name: str,
    init_fn: Callable[..., Any] | None = None,
    *args: Any,
    unbox: bool = True,
    **kwargs: Any,
  ) -> nnx.Variable[Any]:
    """Returns a variable of any collection: the present one, or a new one.

    Args:
      col: the collection.
      name: its name.
      init_fn: makes its value of `args` and `kwargs`.
      *args: arguments of `init_fn`.
      unbox: see `param`.
      **kwargs: keyword arguments of it.

    Returns:
      The Variable.

    Raises:
      ValueError: as `param`, or if it is new and there is no `init_fn`.
    """
    del unbox
    self._bound(f"make the variable `{name}`")
    kind = nnx.variable_type_from_name(col, allow_register=True)
    if init_fn is None:
      if not isinstance(vars(self).get(name), nnx.Variable):
        raise ValueError(
          f"`init_fn` must be given for the variable `{name}` of"
          f" `{type(self).__name__}`, which is not in the collection `{col}`"
          " yet."
        )
      return self._variable(col, kind, name, None, None)
    return self._variable(
      col, kind, name, lambda _: init_fn(*args, **kwargs), lambda: None
    )

  def _bound(self, what: str) -> Scope:
    if self.scope is None:
      raise ValueError(
        f"`{type(self).__name__}` must be bound to {what}: do it in `setup` or"
        " in a method under `bridge.compact`, called through `init` or `apply`."
      )
    return self.scope

  def _variable(
    self,
    col: str,
    kind: type[nnx.Variable[Any]],
    name: str,
    make: Callable[[Any], Any] | None,
    draw: Callable[[], Any] | None,
  ) -> nnx.Variable[Any]:
    known = vars(self).get(name)
    if known is None:
      assert make is not None and draw is not None
      variable = kind(make(draw()))
      setattr(self, name, variable)
      return variable
    if not isinstance(known, kind):
      raise ValueError(
        f"`{name}` of `{type(self).__name__}` must be a `{kind.__name__}`, of"
        f" the collection `{col}`, but it is a `{type(known).__name__}`. Rename"
        " one of the two."
      )
    if make is not None and col == "params":
      wanted = jax.eval_shape(lambda: _unboxed(make(jax.random.key(0))))
      given = known.get_raw_value()
      for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(given)):
        if jnp.shape(a) != jnp.shape(b):
          raise ValueError(
            f"The parameter `{name}` of `{type(self).__name__}` must have the"
            f" shape {jnp.shape(a)}, as its initializer says, but has"
            f" {jnp.shape(b)}. Pass the variables of this model, or the"
            " arguments that it was initialised with."
          )
    return known

  @property
  def variables(self) -> Mapping[str, Any]:
    """All variables, by collection, as Linen has them."""
    return core.FrozenDict(self._collections())

  def _collections(self) -> dict[str, Any]:
    collected: dict[str, Any] = {}
    for path, variable in _walk(self):
      if isinstance(variable, nnx.RngState):
        continue
      collection = nnx.variable_name_from_type(
        type(variable), allow_register=True
      )
      value = variables_lib.to_linen_var(variable)
      variables_lib.put(collected, (collection, *path), value)
    return collected

  def apply(
    self,
    variables: Mapping[str, Mapping[str, Any]],
    *args: Any,
    rngs: Any = None,
    method: Callable[..., Any] | str = "__call__",
    mutable: Any = False,
    **kwargs: Any,
  ) -> Any:
    """Runs a method of a copy of the Module that has the given variables.

    Args:
      variables: variables by collection.
      *args: arguments of the method.
      rngs: random streams, keys by name, or a key or seed for all of them.
      method: the method or its name; the name of a submodule calls that.
      mutable: whether to return the variables as well: False, or anything else
        for all of them.
      **kwargs: keyword arguments of the method.

    Returns:
      What the method returns, or the pair of it and the variables.
    """
    return self._run(variables, args, kwargs, rngs, method, mutable, False)

  def init(
    self,
    rngs: Any = None,
    *args: Any,
    method: Callable[..., Any] | str = "__call__",
    **kwargs: Any,
  ) -> dict[str, Any]:
    """Makes the variables; see `apply`.

    Returns:
      The variables by collection.
    """
    return self._run({}, args, kwargs, rngs, method, True, True)[1]

  def init_with_output(
    self,
    rngs: Any = None,
    *args: Any,
    method: Callable[..., Any] | str = "__call__",
    mutable: Any = True,
    **kwargs: Any,
  ) -> tuple[Any, dict[str, Any]]:
    """Makes the variables; see `apply`.

    Example:

      >>> import bridge, jax.numpy as jnp, nnx
      >>> class Model(bridge.Module):
      ...   @bridge.compact
      ...   def __call__(self, x):
      ...     return x * self.param("w", nnx.initializers.ones_init(), ())
      >>> y, variables = Model().init_with_output(0, jnp.ones(()), mutable=True)
      >>> list(variables["params"])
      ['w']

    Args:
      rngs: see `apply`.
      *args: likewise.
      method: likewise.
      mutable: accepted as in Flax: all variables are made and returned.
      **kwargs: see `apply`.

    Returns:
      What the method returned, and the variables by collection.
    """
    del mutable
    return self._run({}, args, kwargs, rngs, method, True, True)

  def bind(
    self: M, variables: Mapping[str, Mapping[str, Any]], rngs: Any = None
  ) -> M:
    """Returns a copy of the Module with the given variables, to use directly.

    Args:
      variables: variables by collection.
      rngs: see `apply`.

    Returns:
      The copy, whose submodules of `setup` are made.
    """
    return self._prepared(variables, rngs, mutable=True, initializing=False)

  def is_initializing(self) -> bool:
    """Tells whether the variables are being made."""
    return self._pytree__state.initializing

  def _prepared(
    self: M, variables: Any, rngs: Any, mutable: Any, initializing: bool
  ) -> M:
    module = nnx.clone(self)
    attributes = variables_lib.linen_vars_to_nnx_attrs(variables)
    _give(module, attributes, type(self).__name__, ())
    scope = Scope(streams(rngs), mutable)
    for _, value in reversed(list(nnx.iter_modules(module))):
      value._pytree__state._initializing = initializing
      if isinstance(value, Module):
        value.scope = scope.copy()
    for _, value in reversed(list(nnx.iter_modules(module))):
      if isinstance(value, Module):
        _set_up(value)
    return module

  def _run(
    self,
    variables: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rngs: Any,
    method: Any,
    mutable: Any,
    initializing: bool,
  ) -> Any:
    with to_nnx.running(initializing, mutable):
      module = self._prepared(variables, rngs, mutable, initializing)
      with Running(module, in_compact=False):
        result = method_of(module, method)(module, *args, **kwargs)
    for _, value in nnx.iter_modules(module):
      if initializing:
        value._pytree__state._initializing = False
      if isinstance(value, Module):
        vars(value).pop("scope", None)
    return result if mutable is False else (result, module._collections())


def compact(method: F) -> F:
  """Lets a method make the submodules and parameters that it uses.

  Example:

    >>> import bridge, jax.numpy as jnp, nnx
    >>> class Model(bridge.Module):
    ...   @bridge.compact
    ...   def __call__(self, x):
    ...     return x + self.param("bias", nnx.initializers.ones_init(), ())
    >>> Model().init_with_output(0, jnp.ones(()))[0]
    Array(2., dtype=float32)

  Args:
    method: a method of a `bridge.Module`.

  Returns:
    The method. Submodules made in it get the names `<class>_<number>`, or those
    that they are given.

  Raises:
    TypeError: on a call, if the object is no `bridge.Module`.
  """

  @functools.wraps(method)
  def wrapper(self, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(self, Module):
      raise TypeError(
        "`bridge.compact` must be used on methods of a `bridge.Module`, but"
        f" `{method.__qualname__}` was called on a `{type(self).__name__}`."
      )
    with Running(self, in_compact=True):
      return method(self, *args, **kwargs)

  return cast(F, wrapper)


def _unboxed(value: Any) -> Any:
  if isinstance(value, nnx.VariableMetadata):
    return value.raw_value
  if isinstance(value, meta.AxisMetadata):
    return value.unbox()
  return value


def _set_up(module: Module) -> None:
  state = module._pytree__state
  if hasattr(module, "setup") and not state.is_setup:
    state._is_setup = True
    with Running(module, in_compact=False):
      module.setup()


def _bind(parent: Module, value: Any) -> None:
  """Binds the Modules in a value that becomes an attribute."""
  found = [
    leaf
    for leaf in jax.tree.leaves(
      value, is_leaf=lambda x: isinstance(x, nnx.Module)
    )
    if isinstance(leaf, nnx.Module)
  ]
  initializing = parent.is_initializing()
  for root in found:
    for _, module in reversed(list(nnx.iter_modules(root))):
      module._pytree__state._initializing = initializing
      if isinstance(module, Module):
        if module.scope is None:
          assert parent.scope is not None
          module.scope = parent.scope.copy()
        _set_up(module)


def _give(
  target: Any, values: Mapping[Any, Any], owner: str, path: tuple[Any, ...]
) -> None:
  """Puts Variables into a Module and those below it, or lets them wait."""
  for key, value in values.items():
    current = _child(target, key)
    if isinstance(current, nnx.Variable) and isinstance(value, nnx.Variable):
      current.update_from_state(value)
    elif isinstance(value, nnx.Variable):
      if current is not MISSING:
        raise clash(owner, (*path, key), current, value)
      _put(target, key, value, owner, path)
    elif isinstance(current, nnx.Variable):
      raise clash(owner, (*path, key), current, value)
    elif current is not MISSING:
      _give(current, value, owner, (*path, key))
    elif isinstance(target, Module):
      vars(target)[key] = ModuleState(value)
    else:
      _put(target, key, value, owner, path)


def _child(target: Any, key: Any) -> Any:
  if isinstance(target, Mapping):
    return target.get(key, MISSING)
  if isinstance(target, (list, tuple, nnx.List)):
    return target[int(key)] if int(key) < len(target) else MISSING
  return vars(target).get(key, MISSING)


def _put(
  target: Any, key: Any, value: Any, owner: str, path: tuple[Any, ...]
) -> None:
  if isinstance(target, (Module, to_nnx.ToNNX)):
    nnx.Module.__setattr__(target, key, value)
  elif isinstance(target, dict):
    target[key] = value
  else:
    raise ValueError(
      f"The variables given to `{owner}` must be those of its submodules, but"
      f" `{'/'.join(map(str, (*path, key)))}` has no place in a"
      f" `{type(target).__name__}`. Leave it out, or pass the variables that"
      " `init` returned."
    )


def _walk(module: Any) -> Iterator[tuple[tuple[Any, ...], nnx.Variable[Any]]]:
  """Yields the Variables, each at the best of its paths, see `AttrPriority`."""
  seen: set[int] = set()

  def visit(node: Any, path: tuple[Any, ...]):
    if id(node) in seen:
      return
    seen.add(id(node))
    if isinstance(node, nnx.Variable):
      yield path, node
      return
    if isinstance(node, Mapping):
      items = list(node.items())
    elif isinstance(node, (list, tuple)):
      items = list(enumerate(node))
    elif isinstance(node, nnx.Pytree):
      ranks = node.attr_priorities if isinstance(node, Module) else {}
      items = sorted(
        (
          item
          for item in vars(node).items()
          if item[0] not in ("scope", "attr_priorities")
        ),
        key=lambda item: (
          ranks.get(item[0], AttrPriority.DEFAULT),
          str(item[0]),
        ),
      )
    else:
      return
    for key, value in items:
      yield from visit(value, (*path, key))

  yield from visit(module, ())
