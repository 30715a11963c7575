"""How an op is defined: one primitive, and one lowering for each platform.

An op is written once as a plain JAX `reference`, which every platform can run,
and may have faster implementations for some platforms. Which one a program gets
is settled by rule when the program is lowered, because only then is the
platform known: one traced program, or one exported artifact, serves them all.

    op = dispatch.Op(
      "my_op",
      abstract_eval=lambda x, *, n: (arrays.out_aval(x.shape, x.dtype, x),),
      reference=my_reference,
      implementations=(
        dispatch.Implementation(
          name="cpu", platforms=("cpu",), fn=my_ffi_call, library=LIBRARY,
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
import threading
from typing import Any

import jax
from jax.interpreters import ad, batching, mlir

from . import jax_private, libraries, partitioner

_CONFIG: Any = jax.config  # whose options have no types

AUTO = "auto"
XLA = "xla"
# "auto", but for where a program shows what it calls: exported, or split over
# devices by the compiler. There it is "xla", so that plain layers stay plain.
UNSEEN = "unseen"

# The platforms that can have an implementation of their own; any other one
# gets the reference.
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

_OPS: dict[str, "Op"] = {}


class _Lowering(threading.local):
  xla_only = False


_lowering = _Lowering()


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
      Sizes may be symbolic under `jax.export`: see `arrays.static_size`.
    partitionable: Whether the platform's compiler splits it over devices by
      the op's `partitioning`. If not, it serves one device and `shard_map`;
      elsewhere "auto" means the reference.
  """

  name: str
  platforms: tuple[str, ...]
  fn: Callable[..., Sequence[jax.Array]]
  library: libraries.Library | None = None
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
    split: Who splits it over devices by its `partitioning`: "compiler", or
      "mesh" for a `shard_map` over a mesh with explicit axes. "" if nobody
      does: it runs on one device, or it is the reference and the compiler
      looks into it.
    shapes: Of its operands, as jax writes types: "f32[128,256]". Only `explain`
      knows them.
    scope: The `jax.named_scope`s around it, which Modules of `nnx` make too:
      "Net/blocks_0/norm". Only `explain` knows them.
  """

  op: str
  implementation: str
  platform: str
  reason: str
  split: str = ""
  shapes: tuple[str, ...] = ()
  scope: str = ""


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where in a program an op runs.

  Attributes:
    platform: That it is lowered for.
    devices: Over how many the compiler splits it: 1 also inside a `shard_map`
      over all axes of its mesh.
    mesh: The mesh whose axes are explicit, but for those of a `shard_map`
      around, or None.
    exported: Whether `jax.export` lowers it.
  """

  platform: str
  devices: int = 1
  mesh: Any = None
  exported: bool = False


class Op:
  """An op: one primitive with a lowering rule for each platform.

  Args:
    name: Of the op and of its primitive.
    abstract_eval: `abstract_eval(*avals, **params) -> sequence of avals`; make
      them with `arrays.out_aval`. Argument checks belong into the caller.
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
    if not isinstance(implementation, str) or (
      implementation not in (*names, UNSEEN)
    ):
      raise ValueError(
        f"`implementation` of {self.name} must be one of {', '.join(names)},"
        f" but got {implementation!r}."
      )

  def choose(
    self,
    placement: Placement,
    avals: Sequence[Any],
    *,
    implementation: str = AUTO,
    **params: Any,
  ) -> Choice:
    """Decides what runs at a place in a program, and who splits it.

    The lowering only does what this says, and `explain` only reports it.

    Args:
      placement: All that depends on the place.
      avals: Of the arguments.
      implementation: As in `__call__`.
      **params: Of the op.

    Raises:
      ValueError: If the named `implementation` cannot run there.
    """
    if implementation == UNSEEN:
      if placement.exported or placement.devices != 1:
        return Choice(
          self.name,
          XLA,
          placement.platform,
          "A plain layer calls no kernel in an exported program, nor where the"
          " compiler splits it over devices.",
        )
      implementation = AUTO
    choice = self._choose(
      placement.platform, avals, implementation=implementation, **params
    )
    name = choice.implementation
    if placement.devices == 1:
      return choice
    by_mesh = placement.mesh is not None and self.partitioning is not None
    if name == XLA:
      # Under explicit axes its every operation would have to say how it is
      # split.
      return dataclasses.replace(choice, split="mesh" if by_mesh else "")
    impl = self.implementations[name]
    if impl.partitionable:
      by = "compiler" if self.partitioning is not None else ""
      return dataclasses.replace(choice, split=by)
    if by_mesh:
      return dataclasses.replace(choice, split="mesh")
    platform = placement.platform
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
      results = list(abstract_eval(*avals, **params))
      mesh = jax_private.typed_mesh(avals)
      if mesh is None or self.partitioning is None:
        return results
      specs = self.split(implementation, params, mesh, avals)[1]
      return jax_private.with_specs(results, specs, mesh)

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
    if not _CONFIG.jax_disable_jit:
      return program(*args)
    # The program is how the op runs, and no function of the user's.
    with jax.disable_jit(False):
      return program(*args)

  def _lowering_rule(self, platform: str | None):
    def rule(ctx, *args, implementation, **params):
      placement = Placement(
        platform or "this platform",
        jax_private.devices_to_split_over(ctx),
        jax_private.explicit_mesh(ctx.avals_in),
        jax_private.is_exported(ctx),
      )
      choice = self.choose(
        placement, ctx.avals_in, implementation=implementation, **params
      )
      name = choice.implementation
      if choice.split == "compiler":
        assert self.partitioning is not None
        note = partitioner.note(
          self.name,
          name,
          placement.platform,
          params,
          jax_private.axes_around(ctx),
        )
        rule = self.partitioning.rule(ctx.avals_in, **params)
        results = jax_private.partitioned_call(
          ctx, args, partitioner.TARGET, note, *rule
        )
        return jax_private.constrain_results(ctx, results)
      # Or the program would say only that it is a call of something.
      scope = jax.named_scope(self.name)
      if choice.split == "mesh":
        fn = scope(
          functools.partial(_call_on_mesh, self, name, params, placement.mesh)
        )
      else:
        fn = scope(self._function(name, params))
        if name != XLA and placement.devices == 1:
          return jax_private.lower_plainly(fn, ctx, *args)
      results = mlir.lower_fun(fn, multiple_results=True)(ctx, *args)
      return jax_private.constrain_results(ctx, results)

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
  placed = [
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
  )(*placed)


# How many programs of ops that are called without `jit` are kept: a user may
# come with a new softcap at every call.
PROGRAMS = 256


@jax_private.cache(PROGRAMS)
def _jitted(prim, params, xla_only):
  del xla_only  # compiled apart, as it is lowered otherwise

  def bind(*args):
    return prim.bind(*args, **dict(params))

  bind.__name__ = prim.name
  return jax.jit(jax_private.as_primitive(bind))


@contextlib.contextmanager
def _lowering_with(xla_only: bool) -> Iterator[None]:
  before = _lowering.xla_only
  _lowering.xla_only = xla_only
  try:
    yield
  finally:
    _lowering.xla_only = before


def xla_only() -> contextlib.AbstractContextManager[None]:
  """Makes programs that this thread lowers inside run every op as plain XLA.

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
