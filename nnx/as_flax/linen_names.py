"""Helpers of `flax.nnx.bridge` that programs call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from flax import linen

from nnx.variablelib import Variable, normalize_metadata


def get_col_name(keypath: Sequence[Any]) -> str:
  """Returns the Linen collection that a path of jax leads through first.

  Example:

    >>> import jax
    >>> from nnx.as_flax.linen_names import get_col_name
    >>> get_col_name((jax.tree_util.DictKey("params"),))
    'params'
  """
  return str(keypath[0].key)


def is_vanilla_variable(vs: Variable[Any]) -> bool:
  """Tells whether a Variable has no metadata and no hooks.

  Example:

    >>> import nnx
    >>> from nnx.as_flax.linen_names import is_vanilla_variable
    >>> (
    ...   is_vanilla_variable(nnx.Param(1)),
    ...   is_vanilla_variable(nnx.Param(1, a=2)),
    ... )
    (True, False)
  """
  metadata = normalize_metadata(vs.get_metadata())
  return metadata.keys() <= Variable.required_metadata


def sort_variable_types(types: Iterable[type]) -> list[type]:
  """Sorts kinds of Variables, each before the kinds that it derives from.

  Example:

    >>> import nnx
    >>> from nnx.as_flax.linen_names import sort_variable_types
    >>> sort_variable_types([nnx.Variable, nnx.LoRAParam, nnx.Param])[0]
    <class 'nnx.nn.lora.LoRAParam'>
  """
  return sorted(types, key=lambda cls: -_depth(cls))


def _depth(cls: type) -> int:
  return sum(issubclass(base, Variable) for base in cls.__mro__)


def current_linen_module() -> linen.Module | None:
  """Returns the Linen module whose method is running, or None.

  Example:

    >>> from nnx.as_flax.linen_names import current_linen_module
    >>> current_linen_module() is None
    True
  """
  stack = linen.module._context.module_stack
  return stack[-1] if stack else None


def linen_rngs_dict(
  linen_module: linen.Module, add_default: bool = False
) -> dict[str, Any]:
  """Returns a new key of each of the streams that a running Linen module has.

  Args:
    linen_module: a module that is bound.
    add_default: whether there must be one called `default`.
  """
  if linen_module.scope is None:
    raise ValueError(
      "`linen_rngs_dict` must be called in a method of a Linen module that is"
      f" bound, but `{type(linen_module).__name__}` is not."
    )
  rngs: dict[str, Any] = {
    name: linen_module.make_rng(name) for name in linen_module.scope.rngs
  }
  if add_default:
    rngs.setdefault("default", 0)
  return rngs
