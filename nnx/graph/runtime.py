"""Gives the C++ engine what it needs of the Python side, at import."""

from __future__ import annotations

import os

import jax
import numpy as np

from nnx import errors, pytree, restored, state, variables
from nnx.graph import _engine, definitions, pytrees, tracing

_ARRAY_TYPES = (
  jax.Array,
  jax.core.Tracer,
  jax.ShapeDtypeStruct,
  jax.Ref,
  np.ndarray,
)


def is_array_type(cls: type) -> bool | None:
  """What instances of a class are to the graph functions.

  Returns:
    True for arrays, which are leaves; False for scalars of numpy, which are
    static as attributes and leaves as arguments; None for all else.
  """
  if issubclass(cls, _ARRAY_TYPES) or cls in pytree.data_types:
    return True
  return False if issubclass(cls, np.generic) else None


def configure() -> None:
  """Connects the engine; called once, when `nnx` is imported."""
  _engine.configure(
    trace_context=tracing.trace_context(),
    eval_trace=tracing.eval_trace(),
    trace_error=errors.trace_error,
    is_array_type=is_array_type,
    flatten_pytree=pytrees.flatten_pytree,
    array_type=tracing.array_type(),
    variable_metadata=variables.VariableMetadata,
    attribute_marker=pytree.Marker,
    state=state.State,
    structure=definitions.NodeDef,
    library_prefix=os.path.dirname(os.path.dirname(__file__)) + os.sep,
    restored_value=restored.restored_value,
    shape_message=restored.shape_message,
    restored_leaf=restored.LEAF,
    jax_prefix=tracing.directory() + os.sep,
  )


configure()
pytrees.register_static_type(definitions.NodeDef)
jax.tree_util.register_pytree_node(
  _engine.Packed, _engine.packed_flatten, _engine.packed_unflatten
)
