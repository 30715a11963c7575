"""Modules: objects that compute, and what is done to all of them at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
import functools
import inspect
import threading
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from nnx import filterlib as filters_lib
from nnx.engine import _engine
from nnx.graphlib import functional
from nnx.pytreelib import Pytree
from nnx.statelib import State, split_state
from nnx.variablelib import Perturbation, Variable, variable_type_from_name

A = TypeVar("A")
B = TypeVar("B")
M = TypeVar("M", bound="Module")

Filter = filters_lib.Filter
Key = filters_lib.Key
PathParts = filters_lib.PathParts

# The name that it has in Flax, whose guides show it.
_CAPTURES = "__captures__"


def _append(values: tuple[Any, ...], value: Any) -> tuple[Any, ...]:
  return (*values, value)


def _as_variable_type(kind: type[Variable[Any]] | str) -> type[Variable[Any]]:
  if isinstance(kind, str):
    return variable_type_from_name(kind, allow_register=True)
  return kind


class Module(Pytree):
  """Base of layers and models.

  Submodules and Variables are attributes, also in plain lists, tuples and
  dicts. No method is special; `__call__` is the usual one for the forward pass.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Scale(nnx.Module):
    ...   def __init__(self, factor):
    ...     self.factor = nnx.Param(jnp.float32(factor))
    ...
    ...   def __call__(self, x):
    ...     return x * self.factor
    >>> class Model(nnx.Module):
    ...   def __init__(self):
    ...     self.layers = [Scale(2), Scale(3)]
    ...
    ...   def __call__(self, x):
    ...     for layer in self.layers:
    ...       x = layer(x)
    ...     return x
    >>> Model()(jnp.ones(2))
    Array([6., 6.], dtype=float32)
  """

  def sow(
    self,
    variable_type: type[Variable[Any]] | str,
    name: str,
    value: A,
    reduce_fn: Callable[[B, A], B] = _append,
    init_fn: Callable[[], B] = tuple,
  ) -> bool:
    """Keeps a value for the caller of the model to look at.

    Under `nnx.capture` the value goes to the captured State, if Variables of
    this type are captured; otherwise into an attribute of the module.

    Example:

      >>> import nnx
      >>> class Double(nnx.Module):
      ...   def __call__(self, x):
      ...     self.sow(nnx.Intermediate, "x", x)
      ...     return 2 * x
      >>> y, kept = nnx.capture(Double(), nnx.Intermediate)(3)
      >>> y, kept.x.value
      (6, (3,))

    Args:
      variable_type: the type of Variable to keep it in, or its name.
      name: the name to keep it by.
      value: any value.
      reduce_fn: joins what was kept before with the value; appends to a tuple
        by default.
      init_fn: what is joined with the first value; an empty tuple by default.

    Returns:
      Whether the value was kept.

    Raises:
      ValueError: if the attribute `name` is something else.
    """
    variable_type = _as_variable_type(variable_type)
    captures = vars(self).get(_CAPTURES)
    if captures is not None:
      for variable in captures:
        if type(variable) is variable_type:
          kept = dict(variable.raw_value)
          before = kept[name] if name in kept else init_fn()
          kept[name] = reduce_fn(before, value)
          variable.raw_value = kept
          return True
      return False
    if name in vars(self):
      variable = vars(self)[name]
      if type(variable) is not variable_type:
        raise ValueError(
          f"`{name}` must be free or a `{variable_type.__name__}` for `sow` to"
          f" keep values in it, but `{type(self).__name__}.{name}` is a"
          f" `{type(variable).__name__}`. Sow by another name."
        )
      variable.value = reduce_fn(variable.value, value)
    else:
      setattr(self, name, variable_type(reduce_fn(init_fn(), value)))
    return True

  def perturb(
    self,
    name: str,
    value: Any,
    variable_type: type[Variable[Any]] | str = Perturbation,
  ) -> Any:
    """Adds a zero to a value, with respect to which one can differentiate.

    The gradient of the zero is that of the value. Under `nnx.capture` the zero
    is in the captured State, if Variables of this type are captured, and is
    taken from its `init`; otherwise it is an attribute of the module.

    Example:

      >>> import jax
      >>> import jax.numpy as jnp
      >>> import nnx
      >>> class Triple(nnx.Module):
      ...   def __call__(self, x):
      ...     return 3 * self.perturb("x", x)
      >>> model = Triple()
      >>> _, zeros = nnx.capture(model, nnx.Perturbation)(jnp.ones(()))
      >>> def loss(zeros):
      ...   return nnx.capture(model, nnx.Perturbation, init=zeros)(1.0)[0]
      >>> jax.grad(loss)(zeros).x.value
      Array(3., dtype=float32)

    Args:
      name: the name of the zero.
      value: an array, or a pytree of arrays.
      variable_type: the type of Variable to keep it in, or its name.

    Returns:
      The sum; use it in place of `value`.

    Raises:
      ValueError: if the attribute `name` is something else.
    """
    variable_type = _as_variable_type(variable_type)
    captures = vars(self).get(_CAPTURES)
    if captures is not None:
      for variable in captures:
        if type(variable) is variable_type:
          zeros = dict(variable.raw_value)
          if name not in zeros:
            zeros[name] = jax.tree.map(jnp.zeros_like, value)
            variable.raw_value = zeros
          return jax.tree.map(jnp.add, zeros[name], value)
      return value
    if name in vars(self):
      variable = vars(self)[name]
      if not isinstance(variable, variable_type):
        raise ValueError(
          f"`{name}` must be free or a `{variable_type.__name__}` for `perturb`"
          f" to keep its zero in it, but `{type(self).__name__}.{name}` is a"
          f" `{type(variable).__name__}`. Perturb by another name."
        )
    else:
      zero = jax.tree.map(jnp.zeros_like, value)
      variable = variable_type(zero)
      setattr(self, name, variable)
    return jax.tree.map(jnp.add, variable.value, value)

  def iter_modules(self) -> Iterator[tuple[PathParts, Module]]:
    """The modules below this one, and itself; see `nnx.iter_modules`.

    Example:

      >>> import nnx
      >>> model = nnx.Sequential(abs)
      >>> [path for path, _ in model.iter_modules()]
      [('layers',), ()]
    """
    return iter_modules(self)

  def iter_children(self) -> Iterator[tuple[Key, Module]]:
    """The modules that are attributes, with their names.

    Example:

      >>> import nnx
      >>> model = nnx.Sequential(abs)
      >>> [key for key, _ in model.iter_children()]
      ['layers']
    """
    return (
      (key, value)
      for key, value in iter_children(self)
      if isinstance(value, Module)
    )

  def set_attributes(
    self,
    *filters: Filter,
    raise_if_not_found: bool = True,
    graph: bool | None = None,
    **attributes: Any,
  ) -> None:
    """Sets attributes of the modules that have them, this one and all below.

    Example:

      >>> import nnx
      >>> class Noise(nnx.Module):
      ...   def __init__(self):
      ...     self.deterministic = False
      >>> model = nnx.List([Noise(), nnx.List([Noise()])])
      >>> model.set_attributes(Noise, deterministic=True)
      >>> model[1][0].deterministic
      True

    Args:
      *filters: filters of the modules; without any, all of them.
      raise_if_not_found: whether each attribute must be found at least once.
      graph: accepted for programs of Flax 0.12; references are always followed.
      **attributes: names and values.

    Raises:
      ValueError: if no selected module has one of the attributes.
    """
    del graph
    selected = filters_lib.to_predicate(filters or ...)
    remaining = set(attributes)
    for path, module in list(iter_modules(self)):
      if selected(path, module):
        for name, value in attributes.items():
          if hasattr(module, name):
            remaining.discard(name)
            setattr(module, name, value)
    if remaining and raise_if_not_found:
      raise _not_found_error(remaining)

  def train(self, **attributes: Any) -> None:
    """Puts all modules into training mode.

    Sets `deterministic` and `use_running_average` to `False` where they are.

    Example:

      >>> import nnx
      >>> class Noise(nnx.Module):
      ...   def __init__(self):
      ...     self.deterministic = True
      >>> noise = Noise()
      >>> noise.train()
      >>> noise.deterministic
      False

    Args:
      **attributes: further attributes to set.
    """
    self.set_attributes(
      **{"deterministic": False, "use_running_average": False, **attributes},
      raise_if_not_found=False,
    )

  def eval(self, **attributes: Any) -> None:
    """Puts all modules into evaluation mode.

    Sets `deterministic` and `use_running_average` to `True` where they are.

    Example:

      >>> import nnx
      >>> class Noise(nnx.Module):
      ...   def __init__(self):
      ...     self.deterministic = False
      >>> noise = Noise()
      >>> noise.eval()
      >>> noise.deterministic
      True

    Args:
      **attributes: further attributes to set.
    """
    self.set_attributes(
      **{"deterministic": True, "use_running_average": True, **attributes},
      raise_if_not_found=False,
    )


def _not_found_error(names: set[str]) -> ValueError:
  return ValueError(
    "Could not find at least one instance of the following attributes:"
    f" {sorted(names)}. Pass `raise_if_not_found=False` if they may be missing."
  )


def first_from(*args: A | None, error_msg: str) -> A:
  """The first argument that is not None: of a call, or else of the layer.

  Example:

    >>> from nnx.module import first_from
    >>> first_from(None, False, error_msg="say `deterministic`")
    False

  Args:
    *args: the candidates.
    error_msg: what to say if all of them are None.

  Returns:
    The first that is not None.

  Raises:
    ValueError: if all of them are None.
  """
  for arg in args:
    if arg is not None:
      return arg
  raise ValueError(error_msg)


def iter_modules(
  node: Any, /, *, graph: bool | None = None
) -> Iterator[tuple[PathParts, Module]]:
  """The modules below an object with their paths, and the object itself.

  Children come before their parents, in the order of their names; a module
  that is shared comes once.

  Example:

    >>> import nnx
    >>> class Block(nnx.Module):
    ...   def __init__(self):
    ...     self.layers = [nnx.List(), nnx.Dict()]
    >>> [(path, type(m).__name__) for path, m in nnx.iter_modules(Block())]
    [(('layers', 0), 'List'), (('layers', 1), 'Dict'), ((), 'Block')]

  Args:
    node: an object, or a pytree of objects.
    graph: accepted for programs of Flax 0.12; references are always followed.

  Yields:
    Pairs of path and module.
  """
  del graph
  for path, value in functional.iter_graph(node):
    if isinstance(value, Module):
      yield path, value


def iter_children(
  node: Any, /, *, graph: bool | None = None
) -> Iterator[tuple[Key, Any]]:
  """The objects and Variables that are attributes of an object.

  Example:

    >>> import nnx
    >>> class Block(nnx.Module):
    ...   def __init__(self):
    ...     self.rngs = nnx.Rngs(0)
    ...     self.w = nnx.Param(1)
    ...     self.size = 3
    >>> [key for key, _ in nnx.iter_children(Block())]
    ['rngs', 'w']

  Args:
    node: an object, or a pytree node.
    graph: accepted for programs of Flax 0.12.

  Yields:
    Pairs of name and value, in the order of the names.

  Raises:
    ValueError: if `node` has no children.
  """
  del graph
  items = _engine.items(node)
  if items is None:
    raise ValueError(
      "`node` must be an object of nnx or a pytree node, but got a"
      f" `{type(node).__name__}`."
    )
  for key, value in items:
    if isinstance(value, (Pytree, Variable)):
      yield key, value


def iter_module_children(
  node: Any, /, *, graph: bool | None = None
) -> Iterator[tuple[Key, Any]]:
  """The objects that are attributes of an object, without its Variables.

  Example:

    >>> import nnx
    >>> class Block(nnx.Module):
    ...   def __init__(self):
    ...     self.rngs = nnx.Rngs(0)
    ...     self.w = nnx.Param(1)
    >>> [key for key, _ in nnx.iter_module_children(Block())]
    ['rngs']

  Args:
    node: an object, or a pytree node.
    graph: accepted for programs of Flax 0.12.

  Yields:
    Pairs of name and object, in the order of the names.

  Raises:
    ValueError: if `node` has no children.
  """
  for key, value in iter_children(node, graph=graph):
    if isinstance(value, Pytree):
      yield key, value


# Copies with other attributes


def with_attributes(
  node: A,
  /,
  *,
  only: Filter = ...,
  raise_if_not_found: bool = True,
  graph: bool | None = None,
  **attributes: Any,
) -> A:
  """A copy of an object with attributes of its modules set.

  The copy shares the Variables of the original.

  Example:

    >>> import nnx
    >>> class Noise(nnx.Module):
    ...   def __init__(self):
    ...     self.deterministic = False
    >>> noise = Noise()
    >>> nnx.with_attributes(noise, deterministic=True).deterministic
    True
    >>> noise.deterministic
    False

  Args:
    node: an object, or a pytree of objects.
    only: a filter of the modules.
    raise_if_not_found: whether each attribute must be found at least once.
    graph: accepted for programs of Flax 0.12; references are always followed.
    **attributes: names and values, set where a module has the attribute.

  Returns:
    The copy.

  Raises:
    ValueError: if no selected module has one of the attributes.
  """
  del graph
  selected = filters_lib.to_predicate(only)
  remaining = set(attributes)

  def visit(path, value):
    if isinstance(value, Module) and selected(path, value):
      for name, attribute in attributes.items():
        if hasattr(value, name):
          setattr(value, name, attribute)
          remaining.discard(name)
    return value

  result = functional.recursive_map(visit, node)
  if remaining and raise_if_not_found:
    raise _not_found_error(remaining)
  return result


def _view_parameters(node: Any) -> tuple[set[str], bool]:
  """The names that `set_view` takes, and whether it takes any name."""
  kinds = inspect.Parameter
  parameters = inspect.signature(node.set_view).parameters
  names = {
    name
    for name, parameter in parameters.items()
    if parameter.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
  }
  any_name = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
  return names, any_name


def view(
  node: A,
  /,
  *,
  only: Filter = ...,
  raise_if_not_found: bool = True,
  graph: bool | None = None,
  **kwargs: Any,
) -> A:
  """A copy of an object in another mode, as its modules' `set_view` makes it.

  The copy shares the Variables of the original. Each module whose class has a
  method `set_view` gets the keywords that this method takes.

  Example:

    >>> import nnx
    >>> class Noise(nnx.Module):
    ...   deterministic = False
    ...
    ...   def set_view(self, deterministic: bool | None = None):
    ...     if deterministic is not None:
    ...       self.deterministic = deterministic
    >>> noise = Noise()
    >>> nnx.view(noise, deterministic=True).deterministic, noise.deterministic
    (True, False)

  Args:
    node: an object, or a pytree of objects.
    only: a filter of the modules.
    raise_if_not_found: whether each keyword must be taken by a module.
    graph: accepted for programs of Flax 0.12; references are always followed.
    **kwargs: keywords for `set_view`.

  Returns:
    The copy.

  Raises:
    ValueError: if no selected module takes one of the keywords.
  """
  del graph
  selected = filters_lib.to_predicate(only)
  remaining = set(kwargs)

  def visit(path, value):
    if hasattr(type(value), "set_view") and selected(path, value):
      names, any_name = _view_parameters(value)
      taken = (
        kwargs
        if any_name
        else {name: kwargs[name] for name in kwargs if name in names}
      )
      value.set_view(**taken)
      remaining.difference_update(taken)
    return value

  result = functional.recursive_map(visit, node)
  if remaining and raise_if_not_found:
    raise ValueError(
      f"Unused keys found in nnx.view: {sorted(remaining)}. Each must be a"
      " parameter of `set_view` of one of the modules; `nnx.view_info` lists"
      " them."
    )
  return result


def view_info(
  node: Any, /, *, only: Filter = ..., graph: bool | None = None
) -> str:
  """What `view` can set on an object, as a text.

  Example:

    >>> import nnx
    >>> class Noise(nnx.Module):
    ...   def set_view(self, deterministic: bool | None = None):
    ...     '''Sets the mode.
    ...
    ...     Args:
    ...       deterministic: whether to add nothing.
    ...     '''
    >>> print(nnx.view_info(Noise()))
    Noise:
      deterministic: bool | None = None
        whether to add nothing.

  Args:
    node: an object, or a pytree of objects.
    only: a filter of the modules.
    graph: accepted for programs of Flax 0.12; references are always followed.

  Returns:
    A paragraph for each class with a method `set_view`, by name.
  """
  del graph
  selected = filters_lib.to_predicate(only)
  classes = {
    type(value)
    for path, value in functional.iter_graph(node)
    if hasattr(type(value), "set_view") and selected(path, value)
  }
  lines = []
  for cls in sorted(classes, key=lambda cls: cls.__qualname__):
    lines.append(f"{cls.__qualname__}:")
    signature = inspect.signature(cls.set_view)
    descriptions = _argument_descriptions(inspect.getdoc(cls.set_view))
    if descriptions is None:
      lines.append(f"  set_view{signature}")
      continue
    for name, parameter in signature.parameters.items():
      if name in ("self", "args", "kwargs"):
        continue
      lines.append(f"  {_parameter_text(parameter)}")
      lines.extend(f"    {line}" for line in descriptions.get(name, ()))
  return "\n".join(lines)


def _parameter_text(parameter: inspect.Parameter) -> str:
  annotation = parameter.annotation
  if isinstance(annotation, type):
    annotation = annotation.__name__
  text = parameter.name
  if annotation is not inspect.Parameter.empty:
    text += f": {annotation}"
  if parameter.default is not inspect.Parameter.empty:
    text += f" = {parameter.default}"
  return text


def _argument_descriptions(doc: str | None) -> dict[str, list[str]] | None:
  """The lines about each argument in the `Args:` section of a docstring."""
  if doc is None:
    return None
  descriptions: dict[str, list[str]] = {}
  current = None
  inside = False
  for line in doc.splitlines():
    indent = len(line) - len(line.lstrip())
    if not inside:
      inside = line.strip() == "Args:"
    elif line.strip() and indent == 0:
      break
    elif indent == 2 and ":" in line:
      name, _, rest = line.strip().partition(":")
      current = descriptions.setdefault(name, [])
      current.append(rest.strip())
    elif current is not None and line.strip():
      current.append(line.strip())
  return descriptions


# Capturing


def capture(
  fn: Callable[..., Any] | type[Variable[Any]],
  *var_types: type[Variable[Any]],
  init: Mapping[Any, Any] | None = None,
  method_outputs: type[Variable[Any]] | None = None,
) -> Any:
  """Wraps a function so that it also returns what the model kept on the way.

  In a call of it `Module.sow` and `Module.perturb` do not touch the model; what
  they keep is returned. Called with Variable types alone it is a decorator.

  Example:

    >>> import nnx
    >>> class Double(nnx.Module):
    ...   def __call__(self, x):
    ...     self.sow(nnx.Intermediate, "x", x)
    ...     return 2 * x
    >>> @nnx.capture(nnx.Intermediate)
    ... def forward(model, x):
    ...   return model(x)
    >>> y, kept = forward(Double(), 3)
    >>> y, kept.x.value
    (6, (3,))
    >>> _, outputs = nnx.capture(
    ...   Double(), nnx.Intermediate, method_outputs=nnx.Intermediate
    ... )(3)
    >>> outputs["__call__"].value
    (6,)

  Args:
    fn: a function of a module, a module, or a bound method of one.
    *var_types: the types of Variables to return.
    init: a State, of the zeros of `perturb` for instance, to begin with.
    method_outputs: a type of Variable to sow the outputs of all methods in,
      except the inherited and the private ones.

  Returns:
    A function that returns the result and a State for each of `var_types`, or
    just the result if there are none; a decorator if `fn` is a Variable type.

  Raises:
    TypeError: on call, if there is no module to capture from.
  """
  if isinstance(fn, type) and issubclass(fn, Variable):
    return functools.partial(
      _capture_swapped, (fn, *var_types), init, method_outputs
    )
  bound = fn if isinstance(fn, Module) else getattr(fn, "__self__", None)
  owner = bound if isinstance(bound, Module) else None

  def wrapper(*args, **kwargs):
    module = owner if owner is not None else (args[0] if args else None)
    modules = list(iter_modules(module)) if module is not None else []
    if not modules:
      raise TypeError(
        "A captured function must be a module, a method of one, or take one as"
        f" its first argument, but got `{type(module).__name__}`."
      )
    _begin_capture(modules, var_types, init)
    try:
      with _captured_methods(modules, method_outputs):
        result = fn(*args, **kwargs)
      kept = _collect_captures(modules, var_types)
    finally:
      for _, each in modules:
        vars(each).pop(_CAPTURES, None)
    if not var_types:
      return result
    states = split_state(kept, *var_types)
    if len(var_types) == 1:
      states = (states,)
    return (result, *states)

  if not isinstance(fn, Module):
    functools.update_wrapper(wrapper, fn)
  return wrapper


def _capture_swapped(var_types, init, method_outputs, fn):
  return capture(fn, *var_types, init=init, method_outputs=method_outputs)


def _begin_capture(
  modules: list[tuple[PathParts, Module]],
  var_types: tuple[type[Variable[Any]], ...],
  init: Mapping[Any, Any] | None,
) -> None:
  """Gives each module the Variables that its calls of `sow` write to."""
  for path, module in modules:
    contents: dict[type[Variable[Any]], dict[str, Any]] = {
      variable_type: {} for variable_type in var_types
    }
    for name, variable in _entries_at(init or {}, path):
      contents.setdefault(type(variable), {})[name] = variable.value
    # No trace check: a model that is closed over may be captured from, since
    # what is kept is taken away before the trace ends.
    module._setattr_raw(
      _CAPTURES, tuple(kind(values) for kind, values in contents.items())
    )


def _entries_at(
  state: Mapping[Any, Any], path: PathParts
) -> Iterator[tuple[Any, Variable[Any]]]:
  for key in path:
    if not isinstance(state, Mapping) or key not in state:
      return
    state = state[key]
  if isinstance(state, Mapping):
    for name, value in state.items():
      if isinstance(value, Variable):
        yield name, value


def _collect_captures(
  modules: list[tuple[PathParts, Module]],
  var_types: tuple[type[Variable[Any]], ...],
) -> State[Any, Any]:
  kept: dict[Any, Any] = {}
  for path, module in modules:
    for variable in vars(module).get(_CAPTURES, ()):
      if type(variable) in var_types:
        for name, value in variable.raw_value.items():
          node = kept
          for key in path:
            node = node.setdefault(key, {})
          node[name] = type(variable)(value)
  return State(kept, _copy=False)


_method_lock = threading.RLock()


class _captured_methods:
  """While it is open, the methods of modules' classes sow their outputs."""

  def __init__(
    self,
    modules: list[tuple[PathParts, Module]],
    variable_type: type[Variable[Any]] | None,
  ):
    self._classes = {type(module) for _, module in modules}
    self._variable_type = variable_type
    self._originals: list[tuple[type, str, Any]] = []

  def __enter__(self) -> None:
    if self._variable_type is None:
      return
    _method_lock.acquire()
    for cls in self._classes:
      for name, method in list(vars(cls).items()):
        public = not name.startswith("_") or name == "__call__"
        if public and inspect.isfunction(method):
          self._originals.append((cls, name, method))
          setattr(cls, name, _sowing(name, method, self._variable_type))

  def __exit__(self, *exc_info) -> None:
    if self._variable_type is None:
      return
    for cls, name, method in self._originals:
      setattr(cls, name, method)
    _method_lock.release()


def _sowing(
  name: str, method: Callable[..., Any], variable_type: type[Variable[Any]]
) -> Callable[..., Any]:
  @functools.wraps(method)
  def wrapper(self, *args, **kwargs):
    result = method(self, *args, **kwargs)
    if _CAPTURES in vars(self):
      self.sow(variable_type, name, result)
    return result

  return wrapper
