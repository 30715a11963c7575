"""Variables: mutable boxes around the arrays of a model.

The class is in `variable_base`, what it does with metadata in
`variable_metadata`, what initializers say of one in `variable_initial`; all of
it can be imported from here. Here are the kinds of Variables, and the names
that they go by.
"""

from __future__ import annotations

import functools
from typing import Any, TypeVar

from nnx import environment
from nnx.missing import MISSING as MISSING
from nnx.variable_base import Variable as Variable
from nnx.variable_initial import VariableMetadata as VariableMetadata
from nnx.variable_initial import with_metadata as with_metadata
from nnx.variable_metadata import CREATE_HOOK
from nnx.variable_metadata import HOOK_ALIASES as HOOK_ALIASES
from nnx.variable_metadata import as_hooks as as_hooks
from nnx.variable_metadata import is_hook_name as is_hook_name
from nnx.variable_metadata import is_ref as is_ref
from nnx.variable_metadata import normalize_metadata as normalize_metadata
from nnx.variable_settings import VarDefaults as VarDefaults
from nnx.variable_settings import settings
from nnx.variable_settings import using_eager_sharding as using_eager_sharding

A = TypeVar("A")

VariableState = Variable


class Param(Variable[A]):
  """A parameter that is learned.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Affine(nnx.Module):
    ...   def __init__(self):
    ...     self.kernel = nnx.Param(jnp.ones((2, 3)))
    ...     self.bias = nnx.Param(jnp.zeros(3))
    >>> print(jax.tree.map(jnp.shape, nnx.state(Affine(), nnx.Param)))
    State({
      'bias': VariableState(
        type=Param,
        value=(3,)
      ),
      'kernel': VariableState(
        type=Param,
        value=(2, 3)
      )
    })
  """

  __slots__ = ()


class BatchStat(Variable[A]):
  """A running statistic of a batch normalization, which is not learned.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> mean = nnx.BatchStat(jnp.zeros(3))
    >>> mean[...] += 0.1 * (jnp.ones(3) - mean)
    >>> mean.value
    Array([0.1, 0.1, 0.1], dtype=float32)
  """

  __slots__ = ()


class Cache(Variable[A]):
  """What a layer keeps from earlier steps, such as the keys and values seen.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> nnx.Cache(jnp.zeros((1, 8, 2, 4))).shape
    (1, 8, 2, 4)
  """

  __slots__ = ()
  _fixed_shape = False


class Intermediate(Variable[A]):
  """A value on its way through the model, kept by `Module.sow`.

  Example:

    >>> import nnx
    >>> class Model(nnx.Module):
    ...   def __call__(self, x):
    ...     self.sow(nnx.Intermediate, "x", x)
    ...     return x
    >>> model = Model()
    >>> _ = model(3)
    >>> model.x.value
    (3,)
  """

  __slots__ = ()
  _fixed_shape = False


class Perturbation(Intermediate[A]):
  """A zero added by `Module.perturb`, whose gradient is that of the value.

  Example:

    >>> import nnx
    >>> issubclass(nnx.Perturbation, nnx.Intermediate)
    True
  """

  __slots__ = ()


def var_defaults(
  *, hijax: bool | None = None, ref: bool | None = None
) -> VarDefaults:
  """Sets what new Variables are made with; without arguments tells it.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> with nnx.var_defaults(ref=True):
    ...   nnx.Param(jnp.zeros(2)).ref
    True
    >>> nnx.Param(jnp.zeros(2)).ref
    False

  Args:
    hijax: whether traces of jax itself can write new Variables. What that is at
      first, `NNX_HIJAX_VARIABLE` in the environment says.
    ref: whether new Variables hold their value in a mutable array of jax.

  Returns:
    The defaults: a mapping, a context manager and a decorator.
  """
  changes = {
    name: value
    for name, value in (("hijax", hijax), ("ref", ref))
    if value is not None
  }
  defaults = VarDefaults(changes)
  if any(changes.values()):
    heed_defaults()
  return defaults


class use_eager_sharding(environment.ForBlock):
  """Sets whether new Variables with a sharding annotation are placed at once.

  Works from the call on, and as a context manager for a block.

  Example:

    >>> import nnx
    >>> with nnx.use_eager_sharding(False):
    ...   nnx.using_eager_sharding()
    False
    >>> nnx.using_eager_sharding()
    True

  Args:
    value: whether arrays are placed when there is a mesh to place them on.
  """

  def __init__(self, value: bool, /):
    self._change = environment.Change(settings, {"eager_sharding": value})
    if not value:
      heed_defaults()


def heed_defaults() -> None:
  """Has constructors of Variables look at the defaults from now on.

  They need not as long as no program has changed them, and run in the engine
  alone.

  Example:

    >>> from nnx import variablelib
    >>> variablelib.heed_defaults()
  """
  if not Variable._defaults_changed:
    Variable._defaults_changed = True
    classes: list[Any] = [Variable]
    while classes:
      cls = classes.pop()
      cls._class_hook_flags |= CREATE_HOOK
      classes.extend(cls.__subclasses__())


# Names of kinds of Variables, as Linen calls its collections

_types_by_name: dict[str, type[Variable[Any]]] = {}


def variable_type_from_name(
  name: str,
  /,
  *,
  base: type[Variable[Any]] = Variable,
  allow_register: bool = False,
) -> type[Variable[Any]]:
  """Finds the kind of Variable with a given name.

  Example:

    >>> import nnx
    >>> nnx.variable_type_from_name("params") is nnx.Param
    True

  Args:
    name: the name, such as that of a Linen collection.
    base: the base class of a kind that is made.
    allow_register: whether to make and register a kind if the name is new.

  Returns:
    The class.

  Raises:
    ValueError: if the name is new and no kind may be made.
  """
  environment.check_flags(allow_register=allow_register)
  if name not in _types_by_name:
    if not allow_register:
      raise ValueError(
        f"`name` must be that of a registered kind of Variable, one of"
        f" {sorted(_types_by_name)}, but got `{name}`. Register it by"
        " `nnx.register_variable_name` or pass `allow_register=True`."
      )
    _types_by_name[name] = type(name, (base,), {"__slots__": ()})
  return _types_by_name[name]


def variable_name_from_type(
  typ: type[Variable[Any]], /, *, allow_register: bool = False
) -> str:
  """Finds the name of a kind of Variable.

  Example:

    >>> import nnx
    >>> nnx.variable_name_from_type(nnx.BatchStat)
    'batch_stats'

  Args:
    typ: the class.
    allow_register: whether to register it by its own name if it has none.

  Returns:
    The name.

  Raises:
    ValueError: if it has none and may get none, or if its own name is taken.
  """
  environment.check_flags(allow_register=allow_register)
  for name, known in _types_by_name.items():
    if known is typ:
      return name
  if not allow_register:
    raise ValueError(
      f"`typ` must be a registered kind of Variable, but got `{typ.__name__}`."
      " Register it by `nnx.register_variable_name` or pass"
      " `allow_register=True`."
    )
  name = typ.__name__
  if name in _types_by_name:
    raise ValueError(
      f"The name of a kind of Variable must be its own, but `{name}` is that of"
      f" `{_types_by_name[name]}` already. Register `{typ}` by another name."
    )
  _types_by_name[name] = typ
  return name


def register_variable_name_type_pair(
  name: str, typ: type[Variable[Any]], overwrite: bool = False
) -> None:
  """Registers a kind of Variable by the name that Flax 0.10 had for it.

  Example:

    >>> import nnx
    >>> class Offset(nnx.Variable):
    ...   pass
    >>> nnx.register_variable_name_type_pair("offsets", Offset, overwrite=True)
    >>> nnx.variable_name_from_type(Offset)
    'offsets'

  Args:
    name: the name, such as that of a Linen collection.
    typ: the class.
    overwrite: whether the name may be taken from another class.

  Raises:
    ValueError: if the name is taken and must not be overwritten.
  """
  register_variable_name(name, typ, overwrite=overwrite)


def register_variable_name(
  name: str,
  typ: type[Variable[Any]] | None = None,
  *,
  overwrite: bool = False,
) -> Any:
  """Registers the name of a kind of Variable; also a decorator.

  Example:

    >>> import nnx
    >>> @nnx.register_variable_name("gains", overwrite=True)
    ... class Gain(nnx.Variable):
    ...   pass
    >>> nnx.variable_type_from_name("gains") is Gain
    True

  Args:
    name: the name, such as that of a Linen collection.
    typ: the class; without it a decorator is returned.
    overwrite: whether the name may be taken from another class.

  Returns:
    The class.

  Raises:
    ValueError: if the name is taken and must not be overwritten.
  """
  environment.check_flags(overwrite=overwrite)
  if typ is None:
    return functools.partial(register_variable_name, name, overwrite=overwrite)
  if not overwrite and name in _types_by_name:
    raise ValueError(
      f"`name` must be new, but `{name}` is that of `{_types_by_name[name]}`."
      " Pass `overwrite=True` to give it to another class."
    )
  _types_by_name[name] = typ
  return typ


if settings.hijax:
  heed_defaults()

register_variable_name("params", Param)
register_variable_name("batch_stats", BatchStat)
register_variable_name("cache", Cache)
register_variable_name("intermediates", Intermediate)
register_variable_name("perturbations", Perturbation)
