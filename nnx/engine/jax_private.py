"""What jax alone knows: the current trace and mesh, types of pytrees, caches.

`jax.extend.core.get_opaque_trace_state` answers the same question, but makes an
object each time and runs Python on every comparison; the engine asks on every
write to a Variable, so it reads the attribute behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
import os
from typing import Any
import weakref

import jax
from jax import api_util, export
from jax._src import array as _array
from jax._src import config as _config
from jax._src import core as _core
from jax._src import mesh as _mesh
from jax._src import source_info_util as _source_info_util
from jax._src import tree_util as _tree_util
from jax._src import util as _util
from jax._src import xla_bridge as _xla_bridge
from jax._src.export import _export
from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]
from jax._src.lib.mlir import (
  ir as _ir,  # pyright: ignore[reportPrivateImportUsage]
)
from jax._src.lib.mlir.dialects import sdy as _sdy
from jax.interpreters import ad, batching, mlir

_CONFIG: Any = jax.config  # whose options have no types


def trace_context() -> Any:
  """Returns the object whose attribute `trace` is the current trace."""
  return _core.trace_ctx


def eval_trace() -> Any:
  """Returns the trace that is current outside of all transformations."""
  return _core.eval_trace


def outside_of_traces() -> bool:
  """Tells whether arrays are concrete here: no transform of jax runs."""
  return _core.trace_ctx.trace is _core.eval_trace


def runs_compiled() -> bool:
  """Tells whether jitted functions run their programs, and nothing besides."""
  return not (
    _config.disable_jit.value
    or _config.debug_nans.value
    or _config.debug_infs.value
    or _config.debug_key_reuse.value
  )


def dispatches_asynchronously() -> bool:
  """Tells whether calls on the CPU return before their programs have run."""
  return _xla_bridge._CPU_ENABLE_ASYNC_DISPATCH.value


def run_jaxpr(jaxpr: Any, values: Sequence[Any]) -> tuple[Any, ...]:
  """Evaluates a closed jaxpr under the current trace.

  Args:
    jaxpr: the closed jaxpr.
    values: its arguments.
  """
  return tuple(_core.jaxpr_as_fun(jaxpr)(*values))


# What a walk over operations of a program is told at each.
CONTINUE_WALK = _ir.WalkResult.ADVANCE


def opaque_trace(trace: Any) -> Any:
  """Wraps a trace as `jax.extend.core.get_opaque_trace_state` does.

  Args:
    trace: the trace, or None where it is no more.
  """
  return _core.OpaqueTraceState(None if trace is None else weakref.ref(trace))


def debug_info(
  traced_for: str, fun: Callable[..., Any], names: Sequence[str]
) -> Any:
  """Makes what jax's errors say of a function, to be kept as `DEBUG_INFO`.

  Args:
    traced_for: the transform.
    fun: the function that the user wrote.
    names: what the user calls each array.
  """
  info = api_util.debug_info(traced_for, fun, (), {})
  return info._replace(traced_for=traced_for, arg_names=names)


# Where jax looks for it.
DEBUG_INFO = "__fun_debug_info__"


# What jax traces the condition of a `while_loop` for.
CONDITION = "while_cond"


def in_condition_of(trace: Any) -> bool:
  """Tells whether a trace is in the condition of a `jax.lax.while_loop`."""
  while trace is not None:
    frame = getattr(trace, "frame", None)
    info = getattr(frame, "debug_info", None)
    if info is not None and info.traced_for == CONDITION:
      return True
    trace = getattr(trace, "parent_trace", None)
  return False


def directory() -> str:
  """Finds the directory of jax's own code."""
  return os.path.dirname(jax.__file__)


def hide_lines(folder: str) -> None:
  """Lets jax name the lines that call code in a folder, not those in it.

  In errors, in the text of programs and in profiles.
  """
  _source_info_util.register_exclusion(folder)


def array_type() -> type:
  """Returns the class of concrete arrays, without starting jax."""
  return _array.ArrayImpl


def jitted_type() -> type:
  """Returns the class of what `jax.jit` returns, whoever replaces that."""
  return _jax.PjitFunction


def is_pytree_type(cls: type) -> bool:
  """Tells whether jax opens instances of a class."""
  return cls in _tree_util._registry


def primitive_type() -> Any:
  """Returns the class of primitives; `jax.extend.core` imports Pallas."""
  return _core.Primitive


def context_mesh() -> Any:
  """Returns the mesh of `with mesh:`, which jax has deprecated, or None."""
  resources = getattr(_mesh, "thread_resources", None)
  mesh = None if resources is None else resources.env.physical_mesh
  return None if mesh is None or mesh.empty else mesh


def register_cache(cache: Any, name: str) -> None:
  """Has `jax.clear_caches` call `cache.cache_clear()`, while `cache` lives."""
  _util.register_cache(cache, name)


def register_serialization(
  cls: type,
  name: str,
  dump: Callable[[Any], bytes],
  load: Callable[[bytes], Any],
) -> None:
  """Lets `jax.export` write a type of pytree nodes.

  Args:
    cls: the type.
    name: under which it is read. The type that was registered under it last is
      meant: classes are defined anew in notebooks.
    dump: writes the static part of a node.
    load: reads it.
  """
  _export.deserialization_registry.pop(name, None)
  export.register_pytree_node_serialization(
    cls,
    serialized_name=name,
    serialize_auxdata=dump,
    deserialize_auxdata=load,
  )


@functools.cache
def _alike() -> Any:
  """Makes the primitive of `sharded_alike`."""
  primitive = _core.Primitive("sharded_alike")
  primitive.def_abstract_eval(lambda value, like: value)
  primitive.def_impl(lambda value, like: value)

  def lower(ctx, value, like):
    # Numbers of a module: the same program always reads the same.
    group = ctx.module_context.new_channel()
    if _CONFIG.jax_use_shardy_partitioner:
      _sdy.sharding_group(value, group)
      _sdy.sharding_group(like, group)
    return [value]

  def batch(args, dims):
    size = next(a.shape[d] for a, d in zip(args, dims) if d is not None)
    args = [
      jax.numpy.broadcast_to(arg, (size, *arg.shape))
      if dim is None
      else jax.numpy.moveaxis(arg, dim, 0)
      for arg, dim in zip(args, dims)
    ]
    return primitive.bind(*args), 0

  def jvp(primals, tangents):
    return primitive.bind(*primals), tangents[0]

  mlir.register_lowering(primitive, lower)
  batching.primitive_batchers[primitive] = batch
  ad.primitive_jvps[primitive] = jvp
  return primitive


def sharded_alike(value: Any, like: Any) -> Any:
  """Makes the compiler place a traced array where it places another.

  Without Shardy, which jax has given up, it may lie elsewhere.

  Args:
    value: an array.
    like: one of the same shape.
  """
  return _alike().bind(value, like)


def hijax() -> Any:
  """Returns jax's module of mutable types, or None if this jax has none."""
  try:
    from jax.experimental import hijax as module
  except ImportError:
    return None
  return module if hasattr(module, "MutableHiType") else None


def effect_type() -> Any:
  """Returns the class of effects; `jax.extend.core` imports Pallas."""
  return _core.Effect
