"""Where the names of `flax.nnx` are here.

Most modules of Flax are here by the same name. What Flax keeps in other modules
is listed, and is put there when the first module of `flax.nnx` is asked for:
`flax.nnx` is then complete by attribute and by import alike.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import Any

from nnx.as_flax import agreement

_OLD, _PROXIES = "nnx.as_flax.old", "nnx.as_flax.proxies"

# Module of Flax: {module here: the names of it that Flax has there}.
NAMES: dict[str, dict[str, str]] = {
  "nnx.bridge": {"nnx": "register_variable_name_type_pair"},
  "nnx.bridge.interop": {
    "bridge": "linen_in_bridge_mdl nnx_in_bridge_mdl",
  },
  "nnx.bridge.variables": {
    "nnx": "register_variable_name_type_pair",
    "nnx.as_flax.linen_names": (
      "get_col_name is_vanilla_variable sort_variable_types"
    ),
  },
  "nnx.bridge.wrappers": {
    "bridge": (
      "Functional ToLinen ToNNX functional lazy_init to_linen to_linen_class"
    ),
    "nnx": "GraphDef Module Object Pytree Rngs State",
    "nnx.as_flax.linen_names": "current_linen_module linen_rngs_dict",
  },
  "nnx.deprecations": {_OLD: "deprecated"},
  "nnx.extract": {
    "nnx": "NodeStates State from_tree prefix to_tree",
    _OLD: (
      "GraphDefState broadcast_prefix check_consistent_aliasing"
      " clear_non_graph_nodes default_split_fn is_tree_node merge_tree_node"
    ),
  },
  "nnx.filterlib": {_OLD: "FilterLiteral HasTag"},
  "nnx.graphlib": {
    "nnx": (
      "FlatState State Variable VariableState iter_module_children map_state"
    ),
    _OLD: (
      "is_array_ref is_node_leaf is_node_module is_node_type is_pytree_node"
      " is_state_leaf jax_to_nnx_path"
    ),
    _PROXIES: "ApplyCaller CallableProxy DelayedAccessor",
  },
  "nnx.helpers": {
    "nnx": (
      "Dict GraphDef List Module Rngs Sequential State TrainState Variable"
    ),
    _OLD: "ModuleDefApply has_keyword_arg",
    _PROXIES: "ApplyCaller",
  },
  "nnx.ids": {_OLD: "UUID UUIDManager uuid"},
  "nnx.module": {
    "nnx": "GraphDef GraphState Object",
    _OLD: "ModuleMeta ObjectMeta PytreeMeta tuple_init tuple_reduce",
  },
  "nnx.nn.attention": {"nnx.module": "first_from"},
  "nnx.nn.linear": {
    "nnx": "Conv ConvTranspose Embed initializers",
    "nnx.module": "first_from",
    _OLD: "canonicalize_padding",
    "nnx.nn.embed": "default_embed_init",
  },
  "nnx.nn.normalization": {
    "nnx": "SpectralNorm WeightNorm",
    "nnx.module": "first_from",
  },
  "nnx.nn.stochastic": {"nnx.module": "first_from"},
  "nnx.object": {
    "nnx": "GraphDef Object State Variable VariableState",
    "nnx.pytreelib": "ObjectState",
    _OLD: "ObjectMeta",
  },
  "nnx.proxy_caller": {
    _PROXIES: "ApplyCaller CallableProxy DelayedAccessor GetAttr GetItem",
  },
  "nnx.pytreelib": {"nnx": "Variable", _OLD: "ObjectMeta PytreeMeta"},
  "nnx.statelib": {_OLD: "create_path_filters"},
  "nnx.transforms.autodiff": {
    "nnx": (
      "CustomVjp DiffState State custom_vjp grad jvp prefix remat"
      " value_and_grad vjp"
    ),
    _OLD: "resolve_kwargs",
  },
  "nnx.transforms.compilation": {
    "nnx": "JitWrapped StateSharding jit jit_partial shard_map",
    "nnx.transforms.jit": "Compiled Lowered",
  },
  "nnx.transforms.deprecated": {
    "nnx": "GraphDef Jit Module Pmap Remat Scan State Vmap",
    "nnx.as_flax.earlier": "grad pmap scan value_and_grad vmap",
    "nnx.transforms.combinators": "LiftedModule",
  },
  "nnx.transforms.general": {_OLD: "merge_inputs split_inputs"},
  "nnx.transforms.iteration": {
    "nnx": (
      "Carry Module State StateAxes fori_loop pmap scan transform_metadata vmap"
      " while_loop"
    ),
    _OLD: "resolve_kwargs",
  },
  "nnx.transforms.transforms": {
    "nnx": "Module checkify cond eval_shape make_jaxpr switch",
    "nnx.transforms.combinators": "LiftedModule",
    _PROXIES: "CallableProxy DelayedAccessor",
    _OLD: "resolve_kwargs",
  },
  "nnx.variablelib": {
    _OLD: "HijaxVariable VariableMeta VariableTypeCache is_array_ref"
  },
}


class _Empty(importlib.abc.Loader):
  """Makes a module that Flax has and `nnx` has not; its names come later."""

  def exec_module(self, module: types.ModuleType) -> None:
    module.__doc__ = "Names that Flax has in this module."


class _Finder(importlib.abc.MetaPathFinder):
  def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
    if name not in NAMES:
      return None
    return importlib.machinery.ModuleSpec(name, _Empty())


def _is_here(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:
    return False


def place(name: str) -> str | None:
  """Returns the module that answers for one of Flax, or None.

  Example:

    >>> from nnx.as_flax import places
    >>> places.place("flax.nnx.nn.linear"), places.place("flax.nnx.helpers")
    ('nnx.nn.linear', 'nnx.helpers')
    >>> places.place("flax.linen")

  Args:
    name: the full name of a module of Flax.
  """
  if name != "flax.nnx" and not name.startswith("flax.nnx."):
    return None
  found = name.removeprefix("flax.")
  return found if found in NAMES or _is_here(found) else None


def module(name: str) -> types.ModuleType:
  """Returns the module that answers for one of Flax, with all its names.

  Example:

    >>> import nnx
    >>> from nnx.as_flax import places
    >>> places.module("flax.nnx.nn.linear").Conv is nnx.Conv
    True

  Args:
    name: the full name of a module of Flax that has a place here.
  """
  complete()
  return _complete(name.removeprefix("flax."))


@functools.cache
def complete() -> None:
  """Puts the names in their places, but for the bridge, which imports Linen.

  Example:

    >>> import nnx
    >>> from nnx.as_flax import places
    >>> places.complete()
    >>> nnx.helpers.TrainState is nnx.TrainState
    True
  """
  agreement.hold_options()
  sys.meta_path.append(_Finder())  # the last: for what no other finds
  for name in NAMES:
    if name.split(".")[:2] != ["nnx", "bridge"]:
      _complete(name)


@functools.cache
def _complete(name: str) -> types.ModuleType:
  result = importlib.import_module(name)
  for source, names in NAMES.get(name, {}).items():
    origin = importlib.import_module(source)
    for item in names.split():
      # What is here by the name already is that name's own.
      if not hasattr(result, item):
        setattr(result, item, getattr(origin, item))
  return result
