"""How an op is defined: one primitive, and one lowering for each platform.

An op is written once as a plain JAX `reference`, which every platform can run,
and may have faster implementations for some platforms. Which one a program gets
is settled by rule when the program is lowered, because only then is the
platform known: one traced program, or one exported artifact, serves them all.

    op = dispatch.Op(
      "my_op",
      abstract_eval=lambda x, *, n: (dispatch.out_aval(x.shape, x.dtype, x),),
      reference=my_reference,
      implementations=(
        dispatch.Implementation(
          name="cpu", platforms=("cpu",), fn=my_ffi_call, library=_LIBRARY,
        ),
      ),
      batching=my_batching_rule,
      partitioning=MY_PARTITIONING,
    )
    (y,) = op(x, n=3, implementation="auto")
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import importlib
import operator
import threading
import types
from typing import Any

import jax
from jax.interpreters import ad, batching, mlir

from . import jax_private, partitioner

AUTO = "auto"
XLA = "xla"

# The platforms that can have an implementation of their own; any other one
# gets the reference.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

_OPS: dict[str, "Op"] = {}
_LIBRARIES: list["Library"] = []


class _Lowering(threading.local):
  xla_only = False


_lowering = _Lowering()


class Library:
  """A compiled extension module with XLA FFI handlers, loaded on first use.

  Args:
    module: Dotted name of the extension module, for example
      `kernels.my_op._my_op_cpu`.
    targets: Maps the FFI target name to the name of the function in the module
      that returns the handler's capsule.
    platform: The platform to register the handlers for.
  """

  def __init__(
    self, module: str, targets: Mapping[str, str], platform: str = "cpu"
  ):
    self.module = module
    self.platform = platform
    self._targets = dict(targets)
    self._lock = threading.Lock()
    self._loaded: types.ModuleType | None = None
    _LIBRARIES.append(self)

  def load(self) -> types.ModuleType:
    """Imports the module and registers its handlers, once.

    Returns:
      The extension module.

    Raises:
      ImportError: If the extension has not been built.
    """
    with self._lock:
      if self._loaded is None:
        module = importlib.import_module(self.module)
        for target, getter in self._targets.items():
          jax.ffi.register_ffi_target(
            target, getattr(module, getter)(), platform=self.platform
          )
        self._loaded = module
      return self._loaded

  def missing(self) -> str | None:
    """Returns why the library cannot be used, or None if it can."""
    try:
      self.load()
    except ImportError as error:
      return f"the extension {self.module} could not be imported ({error})"
    return None


def lazily(module: str, name: str) -> Callable[..., Any]:
  """Returns a function of a module that is imported when it is first called.

  For what is slow to import, as Pallas is, and only used by programs that are
  lowered for its platform.

  Args:
    module: Dotted name of the module.
    name: Of the function in it.
  """

  def call(*args: Any, **kwargs: Any) -> Any:
    return getattr(importlib.import_module(module), name)(*args, **kwargs)

  return call


@dataclasses.dataclass(frozen=True)
class Implementation:
  """One way to run an op on some platforms.

  Attributes:
    name: What users pass as `implementation=`.
    platforms: Where it can be lowered.
    fn: `fn(*args, **params) -> sequence of results`, in JAX; may call
      `jax.ffi.ffi_call` or Pallas.
    library: The extension it needs, if any.
    unsupported: `unsupported(avals, **params)` returns a clause that says why
      these arguments cannot be handled ("`x` is complex"), or None.
    slower: `slower(avals, **params)` returns a clause that says why the
      reference is expected to be faster here, or None. Only asked for "auto".
      Sizes may be symbolic under `jax.export`: see `static_size`.
    partitionable: Whether the platform's compiler splits it over devices by
      the op's `partitioning`. If not, it serves one device and `shard_map`;
      elsewhere "auto" means the reference.
  """

  name: str
  platforms: tuple[str, ...]
  fn: Callable[..., Sequence[jax.Array]]
  library: Library | None = None
  unsupported: Callable[..., str | None] | None = None
  slower: Callable[..., str | None] | None = None
  partitionable: bool = True

  def problem(self, avals: Sequence[Any], params: dict[str, Any]) -> str | None:
    """Returns why this cannot run on `avals`, or None."""
    if self.library is not None and (why := self.library.missing()):
      return why
    if self.unsupported is not None:
      return self.unsupported(avals, **params)
    return None


@dataclasses.dataclass(frozen=True)
class Partitioning:
  """How an implementation that XLA cannot look into is split over devices.

  Attributes:
    rule: `rule(avals, **params) -> (sharding_rule, need_replication_factors)`,
      a Shardy rule as JAX's `custom_partitioning` takes it; the factors
      in order of appearance.
    partition: `partition(mesh, arg_infos, result_infos, call, **params) ->
      (fn, result_specs, arg_specs)`. The infos have `shape`, `dtype` and
      `sharding.spec`, and there are none of the results. `fn` runs on each
      device's part and may use collectives over the mesh's axis names;
      `call(*args, **params)` is the op itself on the part. The specs are
      PartitionSpecs, one for each array. A dimension that the kernel cannot
      split must be left whole in `arg_specs` here, in addition to being named
      in the rule, or the result is silently wrong.
  """

  rule: Callable[..., tuple[str, Sequence[str]]]
  partition: Callable[..., tuple[Callable[..., Any], Any, Any]]


@dataclasses.dataclass(frozen=True)
class Choice:
  """What an op does, or would do, for some arguments; `explain` returns it.

  Attributes:
    op: Name of the op.
    implementation: Name of the chosen implementation.
    platform: The platform it was chosen for.
    reason: Why, as a sentence.
  """

  op: str
  implementation: str
  platform: str
  reason: str


@dataclasses.dataclass(frozen=True)
class Placement:
  """On what an op runs at some place in a program.

  Attributes:
    split: Whether the compiler splits the op over several devices: not so on
      one device, and not inside a `shard_map` over all axes of its mesh.
    mesh: The mesh whose axes are explicit, but for those of a `shard_map`
      around, or None.
  """

  split: bool = False
  mesh: Any = None


def out_aval(shape: Sequence[Any], dtype: Any, *inputs: Any) -> Any:
  """Returns the abstract value of a result computed from `inputs`.

  Inside `shard_map`, a result varies over every mesh axis that one of its
  inputs varies over. On a mesh with explicit axes, it is sharded like the first
  input if it has that one's shape, and not sharded otherwise.

  Args:
    shape: Of the result.
    dtype: Of the result.
    *inputs: Abstract values it depends on.
  """
  return jax_private.result_aval(tuple(shape), dtype, inputs)


def static_size(shape: Sequence[Any]) -> int | None:
  """Returns the number of elements, or None if a dimension is symbolic."""
  if not all(isinstance(size, int) for size in shape):
    return None
  return functools.reduce(operator.mul, shape, 1)


varying_axes = jax_private.varying_axes


def vary_like(x: Any, *arrays: Any) -> list[Any]:
  """Marks `arrays` as varying over the mesh axes that `x` varies over.

  Inside `shard_map`, an argument that all devices share must be marked so
  before it enters a `jax.custom_vjp` together with one that they do not; its
  gradient is then summed over the devices. Elsewhere this does nothing.

  Args:
    x: The array to follow.
    *arrays: Arrays or None.
  """
  varying = jax_private.varying_axes(jax.typeof(x))
  out = []
  for array in arrays:
    if array is not None and varying:
      missing = varying - jax_private.varying_axes(jax.typeof(array))
      if missing:
        array = jax.lax.pcast(array, tuple(sorted(missing)), to="varying")
    out.append(array)
  return out


def move_batch_to_front(
  args: Sequence[Any], dims: Sequence[int | None]
) -> tuple[list[Any], Any]:
  """Gives every argument of a batching rule a leading batch axis.

  Args:
    args: Arguments of the batching rule.
    dims: Their batch dimensions, None for those without.

  Returns:
    The arguments, each `[batch, ...]`, and the batch size.
  """
  size = next(arg.shape[dim] for arg, dim in zip(args, dims) if dim is not None)
  moved = [
    jax.numpy.broadcast_to(arg, (size, *arg.shape))
    if dim is None
    else jax.numpy.moveaxis(arg, dim, 0)
    for arg, dim in zip(args, dims)
  ]
  return moved, size


class Op:
  """An op: one primitive with a lowering rule for each platform.

  Args:
    name: Of the op and of its primitive.
    abstract_eval: `abstract_eval(*avals, **params) -> sequence of avals`; make
      them with `out_aval`. Argument checks belong into the caller.
    reference: `reference(*args, **params) -> sequence of arrays` in plain JAX,
      correct on every platform. Named "xla" among the implementations.
    implementations: The others; for "auto", the first one that fits the
      platform and the arguments and is not slower wins.
    batching: `batching(op, args, dims, **params) -> (results, dims)`; bind `op`
      again in it (it carries the `implementation` over). None: vmap raises.
    partitioning: How implementations other than the reference are split over
      devices under `jit`. None: XLA gathers their operands.
    static_types: Dataclasses among the parameters, by the parameter's name.
    not_differentiable: The sentence of the TypeError that differentiating
      raises. None: the reference is differentiated instead. Callers that want
      better wrap the op in `jax.custom_jvp` or `jax.custom_vjp`; the reference
      then still serves derivatives of derivatives.

  Every `params` value must be hashable; with `partitioning`, it must also be
  made of what `partitioner.encode` takes.
  """

  def __init__(
    self,
    name: str,
    *,
    abstract_eval: Callable[..., Sequence[Any]],
    reference: Callable[..., Sequence[jax.Array]],
    implementations: Sequence[Implementation] = (),
    batching: Callable[..., Any] | None = None,
    partitioning: Partitioning | None = None,
    static_types: Mapping[str, type] | None = None,
    not_differentiable: str | None = None,
  ):
    self.name = name
    self.reference = reference
    self.implementations = {impl.name: impl for impl in implementations}
    self.partitioning = partitioning
    self.static_types = dict(static_types or {})
    self.primitive = jax_private.Primitive(name)
    self.primitive.multiple_results = True
    self._define(abstract_eval, batching, not_differentiable)
    _OPS[name] = self

  def __call__(
    self, *args: Any, implementation: str = AUTO, **params: Any
  ) -> list[jax.Array]:
    """Runs or traces the op.

    Args:
      *args: Arrays.
      implementation: "auto", "xla" or the name of an implementation.
      **params: Static parameters.

    Returns:
      The results.

    Raises:
      ValueError: If `implementation` is not known, or cannot handle the
        arguments.
    """
    self.check_implementation(implementation)
    return self.primitive.bind(*args, implementation=implementation, **params)

  def check_implementation(self, implementation: str) -> None:
    """Raises ValueError unless `implementation` can be asked for."""
    names = (AUTO, XLA, *self.implementations)
    if not isinstance(implementation, str) or implementation not in names:
      raise ValueError(
        f"`implementation` of {self.name} must be one of {', '.join(names)},"
        f" but got {implementation!r}."
      )

  def choose(
    self,
    platform: str,
    avals: Sequence[Any],
    placement: Placement = Placement(),
    *,
    implementation: str = AUTO,
    **params: Any,
  ) -> Choice:
    """Decides what runs on `platform` for arguments like `avals`.

    Raises:
      ValueError: If the named `implementation` cannot run there.
    """
    choice = self._choose(
      platform, avals, implementation=implementation, **params
    )
    name = choice.implementation
    if self._can_be_placed(name, placement):
      return choice
    if implementation != AUTO:
      raise ValueError(
        f"`implementation={name!r}` of {self.name} cannot be split over"
        f" devices by the compiler for {platform}. Call it inside"
        " `shard_map` or on a mesh with explicit axes, or use"
        " implementation='auto'."
      )
    return dataclasses.replace(
      choice,
      implementation=XLA,
      reason=f"{name} is not used because the compiler for {platform} splits"
      f" the program over devices here and cannot split {name}.",
    )

  def _can_be_placed(self, name: str, placement: Placement) -> bool:
    if name == XLA or not placement.split:
      return True
    if self.implementations[name].partitionable:
      return True
    return placement.mesh is not None and self.partitioning is not None

  def _choose(self, platform, avals, *, implementation, **params) -> Choice:
    """Chooses for one device."""
    choice = functools.partial(Choice, self.name, platform=platform)
    if _lowering.xla_only:
      return choice(XLA, reason="Inside `xla_only`, nothing else is.")
    if implementation == XLA:
      return choice(XLA, reason="It was asked for.")
    if implementation != AUTO:
      impl = self.implementations[implementation]
      if platform not in impl.platforms:
        raise ValueError(
          f"`implementation={implementation!r}` of {self.name} runs on"
          f" {', '.join(impl.platforms)}, but the program is lowered for"
          f" {platform}. Use implementation='auto'."
        )
      if why := impl.problem(avals, params):
        raise ValueError(
          f"`implementation={implementation!r}` of {self.name} cannot be used"
          f" here: {why}. Use implementation='auto'."
        )
      return choice(implementation, reason="It was asked for.")
    rejected = []
    for impl in self.implementations.values():
      if platform not in impl.platforms:
        continue
      why = impl.problem(avals, params)
      if why is None and impl.slower is not None:
        why = impl.slower(avals, **params)
      if why is None:
        return choice(
          impl.name, reason=f"It is written for {platform} and takes these."
        )
      rejected.append(f"{impl.name} is not used because {why}")
    if rejected:
      return choice(XLA, reason="; ".join(rejected) + ".")
    return choice(XLA, reason=f"Nothing else is written for {platform}.")

  def _define(self, abstract_eval, batching_rule, not_differentiable):
    prim = self.primitive

    def abstract(*avals, implementation, **params):
      del implementation
      return list(abstract_eval(*avals, **params))

    prim.def_abstract_eval(abstract)
    prim.def_impl(self._run)
    mlir.register_lowering(prim, self._lowering_rule(None))
    for platform in PLATFORMS:
      mlir.register_lowering(
        prim, self._lowering_rule(platform), platform=platform
      )

    if batching_rule is not None:

      def batch(args, dims, *, implementation, **params):
        bound = functools.partial(self, implementation=implementation)
        return batching_rule(bound, args, dims, **params)

      batching.primitive_batchers[prim] = batch

    def jvp(primals, tangents, *, implementation, **params):
      del implementation
      if not_differentiable is not None:
        raise TypeError(not_differentiable)
      tangents = [
        ad.instantiate_zeros(tangent) if type(tangent) is ad.Zero else tangent
        for tangent in tangents
      ]
      out = jax.jvp(
        lambda *args: list(self.reference(*args, **params)),
        tuple(primals),
        tuple(tangents),
      )
      return out

    ad.primitive_jvps[prim] = jvp

  def _run(self, *args, **params):
    """Runs the op outside of any trace."""
    program = _jitted(
      self.primitive, tuple(sorted(params.items())), _lowering.xla_only
    )
    if not jax.config.jax_disable_jit:
      return program(*args)
    # The program is how the op runs, and no function of the user's.
    with jax.disable_jit(False):
      return program(*args)

  def _lowering_rule(self, platform: str | None):
    def rule(ctx, *args, implementation, **params):
      placement = Placement(
        jax_private.split_by_compiler(ctx),
        jax_private.explicit_mesh(ctx.avals_in),
      )
      name = self.choose(
        platform or "this platform",
        ctx.avals_in,
        placement,
        implementation=implementation,
        **params,
      ).implementation
      fn = self._function(name, params)
      if name != XLA and not placement.split:
        return jax_private.lower_plainly(fn, ctx, *args)
      if name != XLA and self.partitioning is not None:
        if self.implementations[name].partitionable:
          return jax_private.partitioned_call(
            ctx,
            args,
            partitioner.TARGET,
            partitioner.note(
              self.name, name, platform, params, jax_private.axes_around(ctx)
            ),
            *self.partitioning.rule(ctx.avals_in, **params),
          )
        fn = functools.partial(
          _call_on_mesh, self, name, params, placement.mesh
        )
      return mlir.lower_fun(fn, multiple_results=True)(ctx, *args)

    return rule

  def _function(self, name: str, params: Mapping[str, Any]):
    """Returns the positional function that runs implementation `name`."""
    fn = self.reference if name == XLA else self.implementations[name].fn
    return functools.partial(fn, **params)

  def split(
    self,
    implementation: str,
    params: Mapping[str, Any],
    mesh: Any,
    parts: Sequence[Any],
  ) -> tuple[Callable[..., Any], Any, Any]:
    """Splits one call over a mesh; see `Partitioning.partition`."""
    assert self.partitioning is not None
    call = functools.partial(self, implementation=implementation)
    return self.partitioning.partition(mesh, parts, None, call, **params)


def op_of(primitive: Any) -> Op | None:
  """Returns the op whose primitive this is, or None."""
  op = _OPS.get(primitive.name)
  return op if op is not None and op.primitive is primitive else None


def _split(parts, op, implementation, params):
  """Splits a call of which the compiler has the names and the parameters."""
  op = _OPS[op]
  params = {
    name: partitioner.decode(value, op.static_types.get(name))
    for name, value in params.items()
  }
  return op.split(implementation, params, parts[0].sharding.mesh, parts)


def _call_on_mesh(op: Op, name, params, mesh, *args):
  """Splits an op over a mesh whose axes are explicit, as XLA would be told."""
  avals = [jax.typeof(arg) for arg in args]
  local, result_specs, arg_specs = op.split(name, params, mesh, avals)
  args = [
    jax.sharding.reshard(arg, jax.sharding.NamedSharding(mesh, spec))
    for arg, spec in zip(args, arg_specs)
  ]
  return jax.shard_map(
    lambda *xs: tuple(local(*xs)),
    mesh=mesh,
    in_specs=tuple(arg_specs),
    out_specs=tuple(result_specs),
    axis_names=jax_private.free_axes(mesh),
    check_vma=False,
  )(*args)


# How many programs of ops that are called without `jit` are kept: a user may
# come with a new softcap at every call.
PROGRAMS = 256


@jax_private.cache(PROGRAMS)
def _jitted(prim, params, xla_only):
  del xla_only  # compiled apart, as it is lowered otherwise
  return jax.jit(functools.partial(prim.bind, **dict(params)))


def register() -> None:
  """Loads every extension that is built and registers its FFI handlers.

  Ops do this by themselves. Call it in a process that runs an artifact of
  `jax.export` without having traced the op.

  Example:
    >>> import kernels
    >>> kernels.register()
  """
  for library in _LIBRARIES:
    library.missing()


@contextlib.contextmanager
def _lowering_with(xla_only: bool) -> Iterator[None]:
  before = _lowering.xla_only
  _lowering.xla_only = xla_only
  try:
    yield
  finally:
    _lowering.xla_only = before


def xla_only() -> contextlib.AbstractContextManager[None]:
  """Programs that this thread lowers inside run every op as plain XLA.

  For tools that look into a program, such as `cost_analysis`, to which a fused
  kernel is a closed box; or to compare. It overrides `implementation=`. A
  function that `jit` has compiled stays as it is, inside and afterwards: lower
  a new one.

  Example:
    >>> import jax, kernels
    >>> x = jax.ShapeDtypeStruct((128, 256), "float32")
    >>> stat = jax.ShapeDtypeStruct((256,), "float32")
    >>> with kernels.xla_only():
    ...   lowered = jax.jit(
    ...     lambda x, mean, var: kernels.batch_stat.update(x, mean, var)
    ...   ).lower(x, stat, stat)
    >>> "custom_call" in lowered.as_text()
    False
  """
  return _lowering_with(xla_only=True)


# A call that is split was lowered outside of `xla_only`, wherever its parts
# are.
_PARTITIONER = partitioner.Partitioner(
  _split, functools.partial(_lowering_with, xla_only=False)
)


def implementations() -> dict[str, dict[str, str]]:
  """Lists what every op can run on.

  Returns:
    For each op, a dict from the name of an implementation to the platforms it
    is for, or to why it cannot be used in this process.

  Example:
    >>> import kernels
    >>> kernels.implementations()["batch_stat_update"]["xla"]
    'every platform'
  """
  table = {}
  for name, op in sorted(_OPS.items()):
    row = {XLA: "every platform"}
    for impl in op.implementations.values():
      missing = impl.library.missing() if impl.library else None
      row[impl.name] = missing or ", ".join(impl.platforms)
    table[name] = row
  return table
