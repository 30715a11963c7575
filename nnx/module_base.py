"""Module, the base class of models, and walks over Modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from nnx import environment, filterlib
from nnx.engine import _engine
from nnx.graphlib import traversal
from nnx.pytreelib import Pytree
from nnx.variablelib import Perturbation, Variable, variable_type_from_name

A = TypeVar("A")
B = TypeVar("B")
M = TypeVar("M", bound="Module")

Filter = filterlib.Filter
Key = filterlib.Key
PathParts = filterlib.PathParts

# The name that it has in Flax, whose guides show it.
CAPTURES = "__captures__"


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

  def __init_subclass__(cls, **kwargs: Any) -> None:
    super().__init_subclass__(**kwargs)
    _engine.name_calls(cls)

  def sow(
    self,
    variable_type: type[Variable[Any]] | str,
    name: str,
    value: A,
    reduce_fn: Callable[[Any, A], Any] = _append,
    init_fn: Callable[[], Any] = tuple,
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
    captures = vars(self).get(CAPTURES)
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
    captures = vars(self).get(CAPTURES)
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
    """Walks over the modules below, and itself; see `nnx.iter_modules`.

    Example:

      >>> import nnx
      >>> model = nnx.Sequential(abs)
      >>> [path for path, _ in model.iter_modules()]
      [('layers',), ()]
    """
    return iter_modules(self)

  def iter_children(self) -> Iterator[tuple[Key, Module]]:
    """Walks over the modules that are attributes, with their names.

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
      graph: `False` refuses what is no tree; None stands for
        `nnx.set_graph_mode`.
      **attributes: names and values.

    Raises:
      ValueError: if no selected module has one of the attributes.
    """
    environment.check_flags(raise_if_not_found=raise_if_not_found)
    selected = filterlib.to_predicate(filters or ...)
    remaining = set(attributes)
    for path, module in list(iter_modules(self, graph=graph)):
      if selected(path, module):
        for name, value in attributes.items():
          if hasattr(module, name):
            remaining.discard(name)
            setattr(module, name, value)
    if remaining and raise_if_not_found:
      raise not_found_error(remaining)

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


def not_found_error(names: set[str]) -> ValueError:
  return ValueError(
    "Could not find at least one instance of the following attributes:"
    f" {sorted(names)}. Pass `raise_if_not_found=False` if they may be missing."
  )


def first_from(*args: A | None, error_msg: str) -> A:
  """Returns the first argument that is not None.

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
  """Walks over the modules of an object with their paths, itself included.

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
    graph: `False` refuses what is no tree; None stands for
      `nnx.set_graph_mode`.

  Yields:
    Pairs of path and module.
  """
  for path, value in traversal.iter_graph(node, graph=graph):
    if isinstance(value, Module):
      yield path, value


def iter_children(
  node: Any, /, *, graph: bool | None = None
) -> Iterator[tuple[Key, Any]]:
  """Walks over the objects and Variables that are attributes of an object.

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
    graph: `False` takes pytrees alone; None stands for `nnx.set_graph_mode`.

  Yields:
    Pairs of name and value, in the order of the names.

  Raises:
    ValueError: if `node` has no children, or in tree mode is no pytree.
  """
  traversal.check_opened(node, graph, "iter_children")
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
  """Walks over the objects that are attributes of an object.

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
    graph: `False` takes pytrees alone; None stands for `nnx.set_graph_mode`.

  Yields:
    Pairs of name and object, in the order of the names.

  Raises:
    ValueError: if `node` has no children, or in tree mode is no pytree.
  """
  for key, value in iter_children(node, graph=graph):
    if isinstance(value, Pytree):
      yield key, value


Module.__module__ = "nnx.module"
