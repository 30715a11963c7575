"""The one place that touches what JAX does not promise to keep.

Tried with jax 0.10.2 and 0.12.0.1.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
import functools
import math
from typing import Any

import jax
from jax import core
from jax._src import checkify as _checkify
from jax._src import config as _config
from jax._src import core as _core
from jax._src import custom_partitioning_sharding_rule as _rules
from jax._src import sharding_impls as _sharding_impls
from jax._src import source_info_util as _source_info_util
from jax._src import util as _util
from jax._src import xla_bridge as _xla_bridge
from jax._src.export import _export
from jax._src.interpreters import mlir as _mlir
from jax._src.lib import (
  xla_client as _xla_client,  # pyright: ignore[reportPrivateImportUsage]
)
from jax.interpreters import mlir
import jax.numpy as jnp
import numpy as np


def cache(size: int) -> Callable[..., Any]:
  """Returns a decorator like `functools.lru_cache`; `jax.clear_caches` clears.

  Args:
    size: How many results are kept.
  """

  def decorate(fn):
    # `jax._src.util.cache` of jax 0.12 divides its places among parts that do
    # not lend each other any, and forgets results before it is full.
    cached = functools.lru_cache(size)(fn)
    _util.register_cache(cached, fn.__name__)
    return cached

  return decorate


def as_primitive(fun: Callable[..., Any]) -> Callable[..., Any]:
  """Marks a function that does nothing but bind a primitive, for `jit`.

  With `jax_debug_nans` jax runs a function whose result has NaN again, step by
  step, and tells at once that a primitive made it.
  """

  def bind(*args):
    return fun(*args)

  bind._apply_primitive = True  # type: ignore[attr-defined]
  bind.__name__ = bind.__qualname__ = fun.__name__
  return bind


def devices_to_split_over(ctx: Any) -> int:
  """Returns over how many devices the compiler splits the program.

  That is 1 for one device, and inside a `shard_map` over a whole mesh.

  Args:
    ctx: Of a lowering rule.
  """
  axes = ctx.module_context.axis_context
  manual = getattr(axes, "manual_axes", None)
  if manual is not None:
    return free_devices(axes.mesh, manual)
  return getattr(axes, "num_devices", 1) or 1


def is_exported(ctx: Any) -> bool:
  """Returns whether a program is lowered for `jax.export`.

  Args:
    ctx: Of a lowering rule.
  """
  return ctx.module_context.lowering_parameters.for_export


def free_devices(mesh: Any, manual: Collection[str]) -> int:
  """Returns over how many devices the compiler splits by a mesh.

  Args:
    mesh: Concrete or abstract.
    manual: Its axes that `shard_map` splits by.
  """
  # An axis of size 1 still is one that the compiler splits by.
  free = [size for name, size in mesh.shape.items() if name not in manual]
  return max(math.prod(free), 2) if free else 1


def explicit_mesh(avals: Sequence[Any]) -> Any:
  """Returns the mesh of values whose shardings are part of their types.

  Args:
    avals: Abstract values.

  Returns:
    An abstract mesh all axes of which are explicit, but for those of a
    `shard_map` around; or None.
  """
  explicit = jax.sharding.AxisType.Explicit
  for aval in avals:
    mesh = aval.sharding.mesh
    if set(_free(mesh).values()) == {explicit}:
      return mesh
  return None


def free_axes(mesh: Any) -> set[str]:
  """Returns the axes of an abstract mesh that no `shard_map` around splits by.

  Args:
    mesh: An abstract mesh.
  """
  return set(_free(mesh))


def _free(mesh: Any) -> dict[str, Any]:
  kinds = zip(mesh.axis_names, mesh.axis_types)
  return {n: k for n, k in kinds if k != jax.sharding.AxisType.Manual}


def named_scopes(eqn: Any) -> list[str]:
  """Returns the names of the `jax.named_scope`s around an equation of a jaxpr.

  Those of the transforms that it was traced under are left out.

  Args:
    eqn: The equation.
  """
  stack = eqn.source_info.name_stack.stack
  scope = _source_info_util.Scope
  return [part.name for part in stack if isinstance(part, scope)]


def newly_manual_axes(eqn: Any) -> frozenset[str]:
  """Returns the mesh axes that a `shard_map` in a jaxpr splits by.

  Args:
    eqn: Its equation.
  """
  return frozenset(eqn.params["newly_manual_axes"])


def lower_plainly(
  fn: Callable[..., Any], ctx: Any, *args: Any
) -> Sequence[Any]:
  """Lowers a function of plain arrays, also inside `shard_map`.

  There, values have mesh axes that they vary over, of which Pallas would have
  to be told. They mean nothing to what is lowered.

  Args:
    fn: Returns a sequence of arrays.
    ctx: Of the lowering rule.
    *args: Of the lowering rule.
  """
  plain = [core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
  rule = mlir.lower_fun(without_mesh(fn), multiple_results=True)
  with _config._check_vma(False):
    return rule(ctx.replace(avals_in=plain), *args)


def varying_axes(aval: Any) -> frozenset[str]:
  """Returns the mesh axes that a value varies over inside `shard_map`.

  Args:
    aval: Its abstract value.
  """
  manual = getattr(aval, "manual_axis_type", None)
  return frozenset(getattr(manual, "varying", ()))


def result_aval(
  shape: tuple[Any, ...], dtype: Any, inputs: Sequence[Any]
) -> Any:
  """Returns the abstract value of a result; see `arrays.out_aval`.

  Args:
    shape: Of the result.
    dtype: Of the result.
    inputs: Abstract values that it depends on.
  """
  varying = frozenset().union(*map(varying_axes, inputs))
  like = next((aval for aval in inputs if varying_axes(aval)), inputs[0])
  mesh = like.sharding.mesh
  if mesh.empty:
    return core.ShapedArray(shape, dtype)
  spec = jax.sharding.PartitionSpec(*(None for _ in shape))
  if inputs[0].shape == shape and not inputs[0].sharding.mesh.empty:
    spec = inputs[0].sharding.spec
  return core.ShapedArray(
    shape,
    dtype,
    sharding=jax.sharding.NamedSharding(mesh, spec),
    manual_axis_type=like.manual_axis_type.update(varying=varying),
  )


def typed_mesh(avals: Sequence[Any]) -> Any:
  """Returns the mesh of values whose types say how they are split.

  Args:
    avals: Abstract values.

  Returns:
    An abstract mesh some axes of which are explicit, or None.
  """
  explicit = jax.sharding.AxisType.Explicit
  for aval in avals:
    if explicit in aval.sharding.mesh.axis_types:
      return aval.sharding.mesh
  return None


def with_specs(
  avals: Sequence[Any], specs: Sequence[Any], mesh: Any
) -> list[Any]:
  """Returns abstract values whose types say how they are split.

  Args:
    avals: Abstract values.
    specs: A PartitionSpec for each.
    mesh: An abstract mesh; see `typed_mesh`.
  """
  return [
    aval.update(sharding=jax.sharding.NamedSharding(mesh, spec))
    for aval, spec in zip(avals, specs, strict=True)
  ]


def constrain_results(ctx: Any, results: Sequence[Any]) -> Sequence[Any]:
  """Has the compiler split results as their types say.

  Args:
    ctx: Of a lowering rule.
    results: Of the lowering rule.
  """
  return [
    _mlir.lower_with_sharding_in_types(ctx, result, aval)
    for result, aval in zip(results, ctx.avals_out, strict=True)
  ]


def without_mesh(fn: Callable[..., Any]) -> Callable[..., Any]:
  """Makes a function forget the mesh that `jax.set_mesh` has set.

  Under a mesh with explicit axes, jax 0.12 annotates every value that is
  traced with its sharding. A device's part of a partitioned program has none,
  and cannot be compiled with such annotations.

  Args:
    fn: Any function.
  """

  def wrapped(*args: Any) -> Any:
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
      return fn(*args)

  return wrapped


def axes_around(ctx: Any) -> tuple[tuple[str, int, bool], ...]:
  """Returns the mesh of the `shard_map`s that a lowering rule is inside of.

  Args:
    ctx: Of the lowering rule.

  Returns:
    For each axis its name, its size and whether one of them splits it by hand.
    Nothing outside of `shard_map`.
  """
  axes = ctx.module_context.axis_context
  manual = getattr(axes, "manual_axes", ())
  if not manual:
    return ()
  return tuple((n, size, n in manual) for n, size in axes.mesh.shape.items())


def auto_mesh(sizes: Sequence[int], names: Sequence[str]) -> Any:
  """Returns an abstract mesh whose axes the compiler splits by.

  Args:
    sizes: Of the axes.
    names: Of the axes.
  """
  # By default, axes are explicit in jax 0.12.
  kinds = (jax.sharding.AxisType.Auto,) * len(names)
  return jax.sharding.AbstractMesh(tuple(sizes), tuple(names), kinds)


def promise(targets: Iterable[str]) -> None:
  """Lets `jax.export` write programs that call some custom calls.

  jax refuses those that it does not know to mean the same tomorrow. Each name
  here ends in a version: what it takes and does never changes.

  Args:
    targets: Names of custom calls.
  """
  _export._CUSTOM_CALL_TARGETS_GUARANTEED_STABLE.update(targets)


def tile_assignment(sharding: Any, rank: int) -> np.ndarray:
  """Reads how the compiler assigns an array's tiles to devices.

  Args:
    sharding: An HloSharding, or None for an array that is not split.
    rank: Of the array.

  Returns:
    Numbers of the devices, with an axis for each axis of the array and perhaps
    one more, along which devices hold the same.
  """
  if sharding is not None:
    sharding = _xla_client.HloSharding.v3_to_v2_sharding(sharding)
  if sharding is None or not sharding.is_tiled():
    return np.zeros((1,) * rank, int)
  return np.reshape(
    sharding.tile_assignment_devices(), sharding.tile_assignment_dimensions()
  )


def hlo_sharding(sharding: jax.sharding.NamedSharding, rank: int) -> Any:
  """Returns the HloSharding that a sharding stands for.

  Args:
    sharding: Of an array, perhaps on an abstract mesh.
    rank: Of the array.
  """
  return sharding._to_xla_hlo_sharding(rank)


def register_partitioner(
  target: str, partition: Callable[..., Any], infer: Callable[..., Any]
) -> None:
  """Has the compiler ask how custom calls of `target` are split.

  Both functions are given, for the operands, their shapes, their dtypes and
  their HloShardings, and the text that the call has.

  Args:
    target: Name of the custom call.
    partition: Returns the module that runs on each device, as `lower_part`
      makes it, the operands' NamedShardings and the results'.
    infer: Returns the results' NamedShardings. Only asked without Shardy.
  """

  def called(fn, arg_shapes, shardings, text):
    shapes = [shape.dimensions() for shape in arg_shapes]
    dtypes = [shape.numpy_dtype() for shape in arg_shapes]
    return fn(shapes, dtypes, shardings, text.decode())

  def to_hlo(shardings, shapes):
    return [
      hlo_sharding(sharding, len(shape.dimensions()))
      for sharding, shape in zip(shardings, shapes, strict=True)
    ]

  def of_results(shardings, shape):
    if not shape.is_tuple():
      return to_hlo(shardings, [shape])[0]
    return _xla_client.HloSharding.tuple_sharding(
      shape, to_hlo(shardings, shape.tuple_shapes())
    )

  def on_partition(arg_shapes, arg_shardings, shape, sharding, text):
    del sharding
    module, args, results = called(partition, arg_shapes, arg_shardings, text)
    return module, to_hlo(args, arg_shapes), of_results(results, shape)

  def on_infer(arg_shapes, arg_shardings, shape, text):
    return of_results(called(infer, arg_shapes, arg_shardings, text), shape)

  register = functools.partial(
    _xla_client.register_custom_call_partitioner,
    target,
    lambda sharding, shape, text: sharding,
    on_partition,
    on_infer,
    can_side_effecting_have_replicated_sharding=True,
  )
  register()
  _xla_bridge.register_plugin_callbacks(register)


def partitioned_call(
  ctx: Any,
  args: Sequence[Any],
  target: str,
  text: str,
  rule: str,
  whole: Sequence[str],
) -> Sequence[Any]:
  """Lowers to a custom call that the compiler asks how to split.

  Inside a `shard_map` over some of a mesh's axes, the compiler splits the call
  over the others' devices, and numbers those in the order in which the first
  result lies on them. A result more, of which nothing else is known, makes that
  the mesh's order.

  Args:
    ctx: Of the lowering rule.
    args: Of the lowering rule.
    target: Name of the custom call; see `register_partitioner`.
    text: Of the call.
    rule: Shardy's rule for it, as `custom_partitioning` takes it.
    whole: Factors of the rule that cannot be split.
  """
  avals = list(ctx.avals_out)
  around = axes_around(ctx)
  if around:
    free = [(name, size) for name, size, manual in around if not manual]
    count = math.prod(size for _, size in free)
    avals.insert(0, core.ShapedArray((count,), np.bool_))
    rule = rule.replace("-> ", "-> numbering, ")
  types = [_mlir.aval_to_ir_type(ctx.module_context, aval) for aval in avals]
  call = _mlir.custom_call(
    target, result_types=types, operands=args, backend_config=text
  )
  call.attributes["sdy.sharding_rule"] = _rules.sdy_sharding_rule_to_mlir(
    _rules.str_to_sdy_sharding_rule(
      rule, need_replication_factors=tuple(whole)
    ),
    [arg.type for arg in args],
    types,
  )
  if not around:
    return call.results
  names, sizes, _ = zip(*around)
  mesh = auto_mesh(sizes, names)
  specs = [jax.sharding.PartitionSpec(tuple(name for name, _ in free))]
  for aval in ctx.avals_out:
    open_ = (jax.sharding.PartitionSpec.UNCONSTRAINED,) * len(aval.shape)
    specs.append(jax.sharding.PartitionSpec(*open_))
  shardings = _sharding_impls.SdyArrayList(
    tuple(
      jax.sharding.NamedSharding(mesh, spec)._to_sdy_sharding(len(aval.shape))
      for spec, aval in zip(specs, avals)
    )
  )
  _mlir.set_sharding(ctx.module_context, call, shardings)
  return call.results[1:]


def lower_part(
  fn: Callable[..., Any],
  avals: Sequence[Any],
  axes: Sequence[tuple[str, int]],
  platform: str,
) -> bytes:
  """Lowers what runs on each device of a partitioned call.

  Args:
    fn: Returns a sequence of arrays; may use collectives over the mesh's axes.
    avals: Of its arguments, this device's parts.
    axes: Names and sizes of the axes of a mesh of all devices, in order.
    platform: To lower for.

  Returns:
    The module's bytecode.
  """
  plain = without_mesh(lambda *args: tuple(fn(*args)))
  jaxpr = jax.make_jaxpr(plain, axis_env=list(axes))(*avals)
  names, sizes = zip(*axes) if axes else ((), ())
  mesh = auto_mesh(sizes, names)
  # Stack frames are numbered anew in each module, and this one becomes part of
  # another.
  with (
    _core.extend_axis_env_nd(axes),
    _config.traceback_in_locations_limit(0),
  ):
    module = _mlir.build_mlir_module_helper(
      jaxpr,
      name="partitioned",
      platforms=(platform,),
      backend=None,
      axis_context=_sharding_impls.SPMDAxisContext(mesh, frozenset(names)),
    )
  return _mlir.module_to_bytecode(module)


def _no_violations(*operands, **params):
  del operands, params
  return ()


def add_checkify_rule(
  primitive: Any,
  violations: Callable[
    ..., Iterable[tuple[Any, str, dict[str, Any]]]
  ] = _no_violations,
  *,
  results: bool = False,
) -> None:
  """Makes `checkify.checkify` check a primitive.

  Args:
    primitive: Of an op.
    violations: `violations(*operands, **params)` with traced operands yields
      whether something is wrong, the sentence that says so, and the values that
      the sentence names.
    results: Whether NaN in a result is an error, among those of `nan_checks`.
  """

  def rule(*args, **params):
    # jax 0.12 passes a context in front, which `assert_func` wants as well.
    context = () if isinstance(args[0], _checkify.Error) else args[:1]
    assert_func = functools.partial(_checkify.assert_func, *context)
    error, enabled_errors, *operands = args[len(context) :]
    if _checkify.FailedCheckError in enabled_errors:
      static = {k: v for k, v in params.items() if k != "implementation"}
      for wrong, message, values in violations(*operands, **static):
        failure = _checkify.FailedCheckError(
          _checkify.get_traceback(), message, **values
        )
        error = assert_func(error, wrong, failure)
    found = primitive.bind(*operands, **params)
    if results and _checkify.NaNError in enabled_errors:
      wrong = jnp.any(jnp.array([jnp.isnan(x).any() for x in found]))
      failure = _checkify.NaNError(_checkify.get_traceback(), primitive.name)
      error = assert_func(error, wrong, failure)
    return error, found

  _checkify.error_checks[primitive] = rule


# `jax.extend.core` has this class too, but its package imports Pallas, which
# takes a tenth of the time that importing jax takes.
Primitive = _core.Primitive
