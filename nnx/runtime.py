"""Gives the C++ engine what it needs of the Python side, at import."""

from __future__ import annotations

import gc
import os
from typing import Any

import jax
from jax import core
import numpy as np

from nnx import (
  errors,
  in_place,
  pytreelib,
  restored,
  statelib,
  tracers,
  variablelib,
)
from nnx.engine import _engine, boxes, jax_private, pytrees, serialization
from nnx.graphlib import definitions, modes, statics

_ARRAY_TYPES = (
  jax.Array,
  core.Tracer,
  jax.ShapeDtypeStruct,
  jax.Ref,
  np.ndarray,
  boxes.Box,
)


_FLAX_NNX = frozenset(
  (
    "FlatState",
    "GraphDef",
    "GraphState",
    "HijaxVariable",
    "NodeDef",
    "Object",
    "Pytree",
    "State",
    "TreeNodeDef",
    "Variable",
    "VariableDef",
    "VariableState",
  )
)


def is_of_flax_nnx(cls: type) -> bool:
  """Tells whether a class is a Module, Variable or State of `flax.nnx`.

  By the names of the bases: nothing of Flax is imported here.
  """
  return any(
    base.__name__ in _FLAX_NNX
    and str(getattr(base, "__module__", "")).startswith(
      ("flax.nnx.", "_flax_nnx.")  # the latter under `nnx.as_flax`
    )
    for base in cls.__mro__
  )


def is_array_type(cls: type) -> Any:
  """Tells what instances of a class are to the graph functions.

  Returns:
    Ellipsis for objects of `flax.nnx`; True for arrays, and for data of other
    kinds that jax does not open, which are leaves; False for scalars of numpy,
    which are static as attributes and leaves as arguments; None for all else.
  """
  if issubclass(cls, _ARRAY_TYPES):
    return True
  foreign = is_of_flax_nnx(cls)
  if cls in pytreelib.data_types and (
    foreign or not jax_private.is_pytree_type(cls)
  ):
    return True
  if issubclass(cls, np.generic):
    return False
  return ... if foreign else None


def trace_error(target: Any) -> Exception | None:
  """Returns the error for a change from another trace; None allows it.

  A class may have Flax's `_check_valid_context`, which raises or does not.
  """
  if tracers.may_change(target):
    return None
  check = getattr(type(target), "_check_valid_context", None)
  if check in (None, pytreelib.Pytree._check_valid_context):
    return errors.trace_error(target)
  check(target, lambda: str(errors.trace_error(target)))
  return None


def _unboxed(value: Any) -> Any:
  """Returns the array in a mutable array or box; anything else as it is."""
  if variablelib.is_ref(value):
    return value[...]
  opened = boxes.opened(value)
  return opened if isinstance(opened, jax.Array) else value


def configure() -> None:
  """Connects the engine; called once, when `nnx` is imported."""
  library = os.path.dirname(__file__) + os.sep
  jax_private.hide_lines(library)
  _engine.configure(
    trace_context=jax_private.trace_context(),
    eval_trace=jax_private.eval_trace(),
    trace_error=trace_error,
    is_array_type=is_array_type,
    flatten_pytree=pytrees.flatten_pytree,
    new_ref=jax.new_ref,
    unboxed=_unboxed,
    array_type=jax_private.array_type(),
    jitted_type=jax_private.jitted_type(),
    ref_type=jax.Ref,
    tracer_type=core.Tracer,
    variable_metadata=variablelib.VariableMetadata,
    attribute_marker=pytreelib.Marker,
    state=statelib.State,
    structure=definitions.NodeDef,
    freeze_static=statics.freeze,
    library_prefix=library,
    restored_value=restored.restored_value,
    shape_message=restored.shape_message,
    restored_leaf=restored.LEAF,
    jax_prefix=jax_private.directory() + os.sep,
    named_scope=jax.named_scope,
    settings=modes.settings,
    explain_error=errors.note_module,
    copy_array=in_place.copied,
    check_loan=in_place.check_loan,
    may_lend=in_place.may_lend,
    get_threshold=gc.get_threshold,
    set_threshold=gc.set_threshold,
  )


def _refuse_export(plan: _engine.Plan) -> bytes:
  """Says that arguments are changed, which `jax.export` cannot write down."""
  raise ValueError(
    "An exported function returns what it changes, but one of `nnx.jit` changes"
    " its arguments. Export `jax.jit` of a function of States, which may call"
    " the other: `model = nnx.merge(graphdef, state)`, the call, and then"
    " `return result, nnx.state(model)`."
  )


configure()
pytrees.register_static_type(definitions.NodeDef)
jax.tree_util.register_pytree_node(
  _engine.Packed, _engine.packed_flatten, _engine.packed_unflatten
)
serialization.register(_engine.Packed, dump=_refuse_export)
jax.tree_util.register_pytree_node(
  _engine.Loan, _engine.loan_flatten, _engine.loan_unflatten
)
