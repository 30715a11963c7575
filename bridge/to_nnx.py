"""Linen modules as nnx Modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import contextlib
import threading
import types
from typing import Any

from flax import errors, linen
from flax.core import meta
import jax

import nnx

from . import linen_errors
from . import variables as variables_lib
from .flax_nnx import is_of_flax_nnx

_PREFIX = "to_nnx__"
_RESERVED = frozenset(["module", "rngs", "lazy_init"])

# Metadata of the key of a random stream for which nobody gave a key: a Linen
# module must not get it, so that it complains if it needs one.
NO_KEY = "no_key"


class _Context(threading.local):
  initializing = False
  mutable: Any = None  # what a bridge.Module around lets be written


_context = _Context()

# What Linen raises where a module has no variables yet.
_MISSING_VARIABLES = (
  errors.ScopeCollectionNotFound,
  errors.ScopeParamNotFoundError,
  errors.ScopeVariableNotFoundError,
)


@contextlib.contextmanager
def running(initializing: bool, mutable: Any = None) -> Iterator[None]:
  """Says how calls of `ToNNX` modules are meant, for a block.

  Args:
    initializing: whether they initialise the modules.
    mutable: the collections that they may write, in any of Linen's forms; None
      if nobody says.
  """
  before = _context.initializing, _context.mutable
  _context.initializing, _context.mutable = initializing, mutable
  try:
    yield
  finally:
    _context.initializing, _context.mutable = before


def lazy_init(fn: Any, *args: Any, **kwargs: Any) -> Any:
  """Initialises the Linen modules inside a Module by one call with samples.

  Example:

    >>> import bridge, jax.numpy as jnp, nnx
    >>> from flax import linen as nn
    >>> class Model(nnx.Module):
    ...   def __init__(self, rngs):
    ...     self.dense = bridge.ToNNX(nn.Dense(4), rngs=rngs)
    ...
    ...   def __call__(self, x):
    ...     return self.dense(x)
    >>> model = bridge.lazy_init(Model(nnx.Rngs(0)), jnp.ones((1, 2)))
    >>> model.dense.kernel.shape
    (2, 4)

  Args:
    fn: a Module, which is called, or a bound method of one; a method of the
      Linen module, `model.method`, too.
    *args: samples of the arguments.
    **kwargs: samples of the keyword arguments.

  Returns:
    `fn`.

  Raises:
    ValueError: if `fn` is neither a Module nor a method of one.
  """
  owner = getattr(fn, "__self__", fn)
  if not isinstance(owner, nnx.Module) or not callable(fn):
    raise ValueError(
      "`fn` must be a Module that can be called, or a method bound to a Module,"
      f" but got {fn!r}."
    )
  _mark_initializing(owner, True)
  try:
    with running(initializing=True):
      fn(*args, **kwargs)
  finally:
    _mark_initializing(owner, False)
  return fn


def _mark_initializing(module: nnx.Module, value: bool) -> None:
  for _, part in nnx.iter_modules(module):
    part._pytree__state._initializing = value


class ToNNX(nnx.Module):
  """A Linen module as an nnx Module.

  The variables of the Linen module are attributes: Variables of the types that
  go with their collections, in nested dicts as Linen has them. They appear when
  the module is initialised, by `lazy_init` with samples of its arguments.

  Example:

    >>> import bridge, jax, nnx
    >>> from flax import linen as nn
    >>> x = jax.numpy.ones((1, 32))
    >>> model = bridge.ToNNX(nn.Dense(features=64), rngs=nnx.Rngs(0)).lazy_init(
    ...   x
    ... )
    >>> model(x).shape, model.kernel.shape
    ((1, 64), (32, 64))

  Args:
    module: the Linen module.
    rngs: the random streams, keys by name, or a key for `params`. A copy is
      kept, and gives the Linen module its keys.

  Raises:
    TypeError: if `module` is no instance of a Linen module.
  """

  def __init__(
    self,
    module: linen.Module,
    rngs: nnx.Rngs | jax.Array | Mapping[str, jax.Array] | None = None,
  ):
    if not isinstance(module, linen.Module):
      raise TypeError(_not_linen_text(module))
    if module.parent is not None:
      # Made inside of another Linen module, which must not count it as its own.
      module = module.clone(parent=None)
    self.to_nnx__module = module
    if isinstance(rngs, nnx.Rngs):
      rngs = rngs.fork()
    elif isinstance(rngs, Mapping):
      rngs = nnx.Rngs(**rngs)
    elif rngs is not None:
      rngs = nnx.Rngs(params=rngs)
    self.to_nnx__rngs = rngs

  @property
  def module(self) -> linen.Module:
    """The Linen module."""
    return self.to_nnx__module

  @property
  def rngs(self) -> nnx.Rngs | None:
    """The random streams."""
    return self.to_nnx__rngs

  def lazy_init(self, *args: Any, **kwargs: Any) -> ToNNX:
    """Initialises the module with samples of its arguments; see `lazy_init`.

    Returns:
      The module itself.
    """
    return lazy_init(self, *args, **kwargs)

  def __getattr__(self, name: str) -> Any:
    module = vars(self).get("to_nnx__module")
    if _has_field(module, name):
      return getattr(module, name)
    method = getattr(type(module), name, None)
    if not name.startswith("_") and callable(method):

      def call(self: ToNNX, *args: Any, **kwargs: Any) -> Any:
        return self(*args, method=method, **kwargs)

      # A bound method, so that `lazy_init` sees whose it is.
      return types.MethodType(call, self)
    if module is not None and not _is_initialised(self):
      raise AttributeError(
        f"{_describe(self)} has no attribute `{name}`: it has no variables yet."
        " Call `lazy_init` with samples of its arguments first."
      )
    raise AttributeError(
      f"{_describe(self)} has no attribute `{name}`; it has"
      f" {sorted(_attributes(self))}."
    )

  def __setattr__(self, name: str, value: Any) -> None:
    # So that `model.train()`, `model.eval()` and the like reach the fields of
    # the Linen module, such as `deterministic` and `use_running_average`.
    module: Any = vars(self).get("to_nnx__module")
    if _has_field(module, name) and name not in vars(self):
      super().__setattr__("to_nnx__module", module.clone(**{name: value}))
    else:
      super().__setattr__(name, value)

  def __call__(
    self,
    *args: Any,
    rngs: nnx.Rngs | jax.Array | Mapping[str, jax.Array] | None = None,
    method: Callable[..., Any] | str | None = None,
    mutable: Any = None,
    **kwargs: Any,
  ) -> Any:
    """Calls the Linen module on the Variables, and keeps what it writes.

    Args:
      *args: the arguments.
      rngs: random streams, keys by name, or a key for `params`, in place of the
        module's own streams.
      method: a method of the Linen module, or its name, in place of `__call__`.
      mutable: the collections that the Linen module may write. By default all
        that the module has, but `params`; inside of a Linen module, those that
        are mutable there. Add `intermediates` to keep what is sown.
      **kwargs: the keyword arguments.

    Returns:
      What the Linen module returns; never the updated variables, which are in
      the Variables.

    Raises:
      ValueError: if the module has not been initialised; if two variables
        clash; for want of a key or variable; if it writes what is not in
        `mutable`. Errors of Linen are instances of its classes as well.
    """
    try:
      return self._call(args, kwargs, rngs, method, mutable)
    except (errors.FlaxError, ValueError) as error:
      explained = linen_errors.explained(error, _describe(self))
      if explained is error:
        raise
      raise explained from error

  def _call(
    self,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rngs: Any,
    method: Any,
    mutable: Any,
  ) -> Any:
    module = self.to_nnx__module
    keys = _linen_keys(self.to_nnx__rngs if rngs is None else rngs)
    if _context.initializing or self._pytree__state.initializing:
      try:
        result, updates = module.init_with_output(
          keys, *args, method=method, **kwargs
        )
      except errors.InvalidRngError as error:
        if keys:
          raise
        raise ValueError(
          f"{_describe(self)} must have random streams to be initialised: pass"
          " `rngs=nnx.Rngs(0)` to `ToNNX` or to `lazy_init`."
        ) from error
      _write(self, updates)
      return result
    variables = linen_variables(self)
    if mutable is None:
      mutable = _default_mutable(variables)
    try:
      result = module.apply(
        variables, *args, rngs=keys, method=method, mutable=mutable, **kwargs
      )
    except _MISSING_VARIABLES as error:
      if _is_initialised(self):
        raise
      raise ValueError(
        f"{_describe(self)} must be initialised before it is called: call"
        " `lazy_init` with samples of its arguments, or `bridge.lazy_init` on"
        " the Module that it is part of."
      ) from error
    if mutable is not False:
      result, updates = result
      _write(self, updates)
    return result


def linen_variables(model: ToNNX) -> dict[str, Any]:
  """Returns the variables of a bridged Linen module, as Linen has them.

  Example:

    >>> import bridge, jax, nnx
    >>> from flax import linen as nn
    >>> x = jax.numpy.ones((1, 2))
    >>> model = bridge.ToNNX(nn.Dense(3), rngs=nnx.Rngs(0)).lazy_init(x)
    >>> jax.tree.map(jax.numpy.shape, bridge.linen_variables(model))
    {'params': {'bias': (3,), 'kernel': (2, 3)}}

  Args:
    model: the module.

  Returns:
    Collection to nested dicts of arrays or metadata boxes; the arrays are those
    of the module.

  Raises:
    TypeError: if `model` is no `ToNNX`.
  """
  _check_bridged(model)
  return variables_lib.nnx_attrs_to_linen_vars(_attributes(model))


def load_linen_variables(
  model: ToNNX, variables: Mapping[str, Mapping[str, Any]]
) -> None:
  """Gives a bridged Linen module variables, such as those of a checkpoint.

  A module that has not been initialised needs not be: it takes all of them.

  Example:

    >>> import bridge, jax
    >>> from flax import linen as nn
    >>> x = jax.numpy.ones((1, 2))
    >>> variables = nn.Dense(3).init(jax.random.key(0), x)
    >>> model = bridge.ToNNX(nn.Dense(3))
    >>> bridge.load_linen_variables(model, variables)
    >>> model(x).shape
    (1, 3)

  Args:
    model: the module.
    variables: collection to nested dicts of arrays or metadata boxes. Values
      without a box keep the metadata that the module has for them; so do boxes
      that a checkpoint has made `{"value": ...}`.

  Raises:
    TypeError: if `model` is no `ToNNX`, or `variables` do not map collections
      to mappings.
    ValueError: if the module has been initialised, and has other variables or
      variables of other shapes.
  """
  _check_bridged(model)
  if not isinstance(variables, Mapping) or not all(
    isinstance(tree, Mapping) for tree in variables.values()
  ):
    raise TypeError(
      "`variables` must map collections to nested mappings, as in"
      ' `{"params": {"kernel": ...}}`, but got'
      f" {_kinds(variables)}."
    )
  boxed = {
    name: _with_boxes(model, tree, ()) for name, tree in variables.items()
  }
  if _is_initialised(model):
    _check_loaded(model, boxed)
  _write(model, boxed)


def _kinds(variables: Any) -> str:
  if not isinstance(variables, Mapping):
    return f"an object of type `{type(variables).__name__}`"
  return ", ".join(
    f"a `{type(tree).__name__}` for `{name}`"
    for name, tree in variables.items()
    if not isinstance(tree, Mapping)
  )


def _check_bridged(model: Any) -> None:
  if not isinstance(model, ToNNX):
    raise TypeError(
      "`model` must be a `ToNNX`, but got an object of type"
      f" `{type(model).__name__}`. Pass the attribute that holds the Linen"
      " module, as in `model.dense`."
    )


def _check_loaded(model: ToNNX, variables: Mapping[str, Any]) -> None:
  has = dict(_shapes(linen_variables(model)))
  given = dict(_shapes(variables))
  if has.keys() != given.keys():

    def listed(paths: Any) -> str:
      return (
        ", ".join(f"`{'/'.join(path)}`" for path in sorted(paths)) or "none"
      )

    raise ValueError(
      f"`variables` must be those of {_describe(model)}, but"
      f" {listed(has.keys() - given.keys())} are missing and"
      f" {listed(given.keys() - has.keys())} are not its own. Collections come"
      " first in a path."
    )
  for path, shape in has.items():
    if shape != given[path]:
      raise ValueError(
        f"`{'/'.join(path)}` of {_describe(model)} must have the shape {shape},"
        f" but got {given[path]}. Initialise the module with the arguments that"
        " the variables were made with, or load into one that is not."
      )


def _shapes(
  tree: Any, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
  for key, value in tree.items():
    if isinstance(value, Mapping):
      yield from _shapes(value, (*path, str(key)))
    else:
      shapes = jax.tree.map(jax.numpy.shape, meta.unbox(value))
      yield (*path, str(key)), shapes


def _with_boxes(model: ToNNX, tree: Any, path: tuple[Any, ...]) -> Any:
  """Puts values into the metadata boxes that the module has for them."""
  current: Any = vars(model)
  for key in path:
    current = current.get(key) if isinstance(current, Mapping) else None
  box = None
  if isinstance(current, nnx.Variable):
    box = variables_lib.to_linen_var(current)
  if isinstance(box, meta.AxisMetadata) and not isinstance(
    tree, meta.AxisMetadata
  ):
    if isinstance(tree, Mapping) and [*tree] == ["value"]:
      tree = tree["value"]  # what a checkpoint makes of a box
    return box.replace_boxed(tree)
  if not isinstance(tree, Mapping):
    return tree
  return {
    key: _with_boxes(model, value, (*path, key)) for key, value in tree.items()
  }


def _has_field(module: linen.Module | None, name: str) -> bool:
  """Tells whether a Linen module has a field of its own of this name."""
  return module is not None and (
    name in type(module).__dataclass_fields__ and name not in ("parent", "name")
  )


def _not_linen_text(value: Any) -> str:
  text = "`module` must be an instance of a Linen module, but got "
  if isinstance(value, type) and issubclass(value, linen.Module):
    name = value.__name__
    return (
      f"{text}the class `{name}`. Make one: `ToNNX({name}(...), rngs=...)`."
    )
  text += f"an object of type `{type(value).__name__}`."
  if isinstance(value, nnx.Module):
    return f"{text} It is a Module of `nnx` already: use it as it is."
  if is_of_flax_nnx(value):
    return f"{text} Convert it by `nnx.bridge.from_flax_nnx`."
  return f"{text} Pass one, as in `ToNNX(linen.Dense(4), rngs=nnx.Rngs(0))`."


def _describe(model: ToNNX) -> str:
  return f"`ToNNX({type(vars(model).get('to_nnx__module')).__name__})`"


def _attributes(model: ToNNX) -> dict[str, Any]:
  """Returns the attributes that hold variables of the Linen module."""
  return {
    name: value
    for name, value in vars(model).items()
    if not name.startswith(_PREFIX)
    and isinstance(value, (nnx.Variable, Mapping))
  }


def _is_initialised(model: ToNNX) -> bool:
  return bool(_attributes(model))


def _default_mutable(variables: Mapping[str, Any]) -> Any:
  """Returns the collections that may be written when the caller did not say."""
  stack = linen.module._context.module_stack
  if stack and stack[-1] is not None and stack[-1].scope is not None:
    return stack[-1].scope.mutable
  if _context.mutable is not None:
    return _context.mutable
  return [name for name in variables if name != "params"] or False


def _linen_keys(rngs: Any) -> dict[str, jax.Array]:
  """Returns the keys for one call of a Linen module."""
  if rngs is None:
    return {}
  if isinstance(rngs, nnx.Rngs):
    keys = {
      name: stream()
      for name, stream in rngs.items()
      if not stream.key.get_metadata(NO_KEY, False)
    }
  elif isinstance(rngs, Mapping):
    keys = dict(rngs)
  else:
    keys = {"params": rngs}
  if "params" not in keys and "default" in keys:
    keys["params"] = keys.pop("default")
  return keys


def _write(model: ToNNX, updates: Mapping[str, Any]) -> None:
  """Puts updated Linen variables into the Variables of the module."""
  try:
    attributes = variables_lib.linen_vars_to_nnx_attrs(updates)
  except ValueError as error:
    raise ValueError(f"{_describe(model)}: {error}") from error
  for name, value in attributes.items():
    if name in _RESERVED or name.startswith(_PREFIX):
      raise ValueError(
        f"Variables and submodules of {_describe(model)} must not be called"
        f" `{name}`, which is an attribute of `ToNNX` itself. Rename it in the"
        " Linen module."
      )
    current = vars(model).get(name)
    if current is not None:
      value = _merged(model, current, value, name)
    # Not by `setattr`, which would change a field of the same name.
    nnx.Module.__setattr__(model, name, value)


def _merged(model: ToNNX, current: Any, new: Any, path: str) -> Any:
  """Puts the values of `new` into `current`, whose Variables stay."""
  if isinstance(new, nnx.Variable) and type(current) is type(new):
    current.update_from_state(new)
    return current
  if isinstance(new, nnx.Variable) or isinstance(current, nnx.Variable):

    def name(x: Any) -> str:
      is_variable = isinstance(x, nnx.Variable)
      return f"a `{type(x).__name__}`" if is_variable else "a submodule"

    raise ValueError(
      f"Variables of {_describe(model)} must have different paths, but `{path}`"
      f" is both {name(current)} and {name(new)}. Rename one of them in the"
      " Linen module."
    )
  for key, value in new.items():
    current[key] = (
      _merged(model, current[key], value, f"{path}/{key}")
      if key in current
      else value
    )
  return current
