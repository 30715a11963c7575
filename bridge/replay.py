"""Calls of Linen modules, recorded once and replayed.

Nearly all the time of an eager call of a Linen module is Python: scopes and
modules are made anew, and every initializer is traced to check a shape. The
operations themselves take a small part. So the first call with arguments of
some shapes is traced into a jaxpr, and later ones evaluate it, an operation at
a time as without `jit`: nothing is compiled but single operations.

A call is replayed only if that cannot be told from running the Python again,
see `purity`; all others run Linen. What is recorded is kept by the class and
fields of the module, the method, the collections that may be written, the names
of the keys, the shapes and dtypes of all arrays, the values of all other
arguments, and the settings of jax and flax that tracing reads.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
import functools
import sys
from typing import Any, cast
import weakref

import flax
from flax import linen
import jax
from jax.extend import core as extend_core

from bridge import purity

_MODULES = 256  # of which records are kept by key
_PROGRAMS = 64  # kept of each module
_RENEWALS = 4  # a module whose globals change more often is left alone
_MISSES = 16  # one that is called with something new each time as well
_SETTINGS = (
  "jax_enable_x64",
  "jax_default_matmul_precision",
  "jax_numpy_dtype_promotion",
  "jax_numpy_rank_promotion",
  "jax_default_prng_impl",
  "jax_threefry_partitionable",
  "jax_softmax_custom_jvp",
  "jax_legacy_prng_key",
  "jax_default_device",
  "jax_random_seed_offset",
  "jax_enable_custom_prng",
)
# Those that make every operation do more than compute its result.
_REFUSED_SETTINGS = (
  "jax_disable_jit",
  "jax_debug_nans",
  "jax_debug_infs",
  "jax_enable_checks",
  "jax_log_compiles",
)
_FLAX_SETTINGS = (
  "flax_preserve_adopted_names",
  "flax_return_frozendict",
  "flax_fix_rng_separator",
)
_REFUSED = object()  # in place of a program

with jax.core.eval_context():
  _EAGER = extend_core.get_opaque_trace_state()


class Program:
  """A recorded call, from the arrays of its arguments to what Linen returned.

  Args:
    run: from these arrays to those of the result.
    treedef: the structure of the result.
    rest: its leaves that are no arrays, and `_HOLE` for each array.
  """

  def __init__(
    self, run: Callable[[list[Any]], list[Any]], treedef: Any, rest: list[Any]
  ):
    self._run = run
    self._treedef = treedef
    self._rest = rest

  def __call__(self, arrays: list[Any]) -> Any:
    results = iter(self._run(arrays))
    leaves = [next(results) if x is _HOLE else x for x in self._rest]
    return self._treedef.unflatten(leaves)


_HOLE = object()


class _Ordered(dict):
  """A dict on its way through a pytree, which comes out in the same order."""


jax.tree_util.register_pytree_node(
  cast(Any, _Ordered),
  lambda items: (tuple(items.values()), tuple(items)),
  lambda keys, values: dict(zip(keys, values)),
)


def _ordered(tree: Any) -> Any:
  """A pytree whose dicts keep their order, which jax would sort."""
  cls = type(tree)
  if cls is dict:
    return _Ordered({key: _ordered(value) for key, value in tree.items()})
  if cls in (list, tuple):
    return cls([_ordered(item) for item in tree])
  return tree


class _Record:
  """What is known of one Linen module: what it depends on, and its programs."""

  def __init__(self, module: linen.Module):
    self.dependencies = purity.Dependencies()
    self.programs: collections.OrderedDict[Any, Any] = collections.OrderedDict()
    self.renewals = 0  # how often what it depends on has changed
    self.hits = self.misses = 0
    try:
      self.key = self.dependencies.key(module)
    except purity.UnsettledError:
      self.key = None


_by_identity: dict[int, tuple[Any, _Record]] = {}
_by_key: collections.OrderedDict[Any, _Record] = collections.OrderedDict()


def apply(
  module: linen.Module,
  variables: Mapping[str, Any],
  args: tuple[Any, ...],
  kwargs: Mapping[str, Any],
  rngs: Mapping[str, jax.Array],
  method: Any,
  mutable: Any,
) -> Any:
  """`module.apply`, replayed where that makes no difference.

  Example:

    >>> import jax.numpy as jnp
    >>> from flax import linen as nn
    >>> from bridge import replay
    >>> dense = nn.Dense(3)
    >>> variables = dense.init(jax.random.key(0), jnp.ones((1, 2)))
    >>> args = dense, variables, (jnp.ones((1, 2)),), {}, {}, None, False
    >>> bool((replay.apply(*args) == dense.apply(*args[1:2], *args[2])).all())
    True
    >>> replay.is_replayed(dense)
    True

  Args:
    module: an unbound Linen module.
    variables: its variables.
    args: its arguments.
    kwargs: its keyword arguments.
    rngs: keys by name.
    method: see `linen.Module.apply`.
    mutable: likewise.

  Returns:
    What `module.apply` returns.
  """
  program = None
  given = (variables, rngs, _ordered(args), _ordered(kwargs))
  leaves, treedef = jax.tree.flatten(given)
  signature = _signature(leaves)
  if signature is not None and _is_plain_context():
    record = _record(module)
    if record.key is not None:
      program = _program(
        record, module, method, mutable, leaves, treedef, signature
      )
  if program is None:
    return module.apply(
      variables, *args, rngs=rngs, method=method, mutable=mutable, **kwargs
    )
  return program([x for x in leaves if type(x) in _ARRAYS])


def is_replayed(module: linen.Module) -> bool:
  """Whether a call of the module has been recorded.

  Example:

    >>> from flax import linen as nn
    >>> from bridge import replay
    >>> replay.is_replayed(nn.Dense(3))
    False
  """
  entry = _by_identity.get(id(module))
  if entry is None or entry[0]() is not module:
    return False
  return any(p is not _REFUSED for p in entry[1].programs.values())


# Which arguments


def _array_types() -> frozenset[type]:
  """The classes of concrete arrays, numbers and keys."""
  return frozenset(type(x) for x in (jax.numpy.zeros(()), jax.random.key(0)))


class _Types:
  """`_array_types`, found at first use: making an array starts jax."""

  def __contains__(self, cls: type) -> bool:
    global _ARRAYS
    _ARRAYS = _array_types()
    return cls in _ARRAYS


_ARRAYS: Any = _Types()
_PLAIN = (bool, int, float, complex, str, bytes)


def _signature(leaves: list[Any]) -> tuple[Any, ...] | None:
  """Shapes and dtypes of arrays, types and values of the rest.

  Returns:
    None where a leaf is traced, spread over devices, or of an unknown type.
  """
  signature: list[Any] = []
  for leaf in leaves:
    cls = type(leaf)
    if cls in _ARRAYS:
      if type(leaf.sharding) is not jax.sharding.SingleDeviceSharding:
        return None
      signature += (
        leaf.shape,
        leaf.dtype,
        leaf.aval.weak_type,
      )
    elif cls in _PLAIN:
      signature += (cls, repr(leaf) if cls in (float, complex) else leaf)
    else:
      return None
  return tuple(signature)


# Where


def _is_plain_context() -> bool:
  """Whether nothing but the arguments changes what a Linen module does."""
  if extend_core.get_opaque_trace_state() != _EAGER or _is_debugged():
    return False
  config = jax.config
  if any(getattr(config, name, False) for name in _REFUSED_SETTINGS):
    return False
  context = linen.module._context
  if context.module_stack[-1] is not None or context.call_info_stack:
    return False
  if context.capture_stack or linen.module._global_interceptor_stack:
    return False
  if linen.get_logical_axis_rules():
    return False
  return not flax.core.meta.global_mesh_defined()


def _is_debugged() -> bool:
  """Whether somebody looks at every line that runs."""
  monitoring = getattr(sys, "monitoring", None)  # of Python 3.12 and later
  return sys.gettrace() is not None or (
    monitoring is not None
    and (
      monitoring.get_tool(monitoring.DEBUGGER_ID) is not None
      or monitoring.get_tool(monitoring.COVERAGE_ID) is not None
    )
  )


def _settings() -> tuple[Any, ...]:
  config = jax.config
  return tuple(
    [getattr(config, name, None) for name in _SETTINGS]
    + [getattr(flax.config, name, None) for name in _FLAX_SETTINGS]
  )


# What is kept


def _record(module: linen.Module) -> _Record:
  entry = _by_identity.get(id(module))
  renewals = 0
  if entry is not None and entry[0]() is module:
    record = entry[1]
    if record.key is None or record.dependencies.hold():
      return record
    _by_key.pop(record.key, None)
    renewals = record.renewals + 1
  record = _Record(module)
  record.renewals = renewals
  if renewals > _RENEWALS:
    record.key = None
  if record.key is not None:
    known = _by_key.get(record.key)
    if known is not None and known.dependencies.hold():
      # Its guards see what was found in another module of the same fields,
      # among them lists of its own; those of this one must hold as well.
      record.programs = known.programs
    _by_key[record.key] = record
    if len(_by_key) > _MODULES:
      _by_key.popitem(last=False)
  address = id(module)
  reference = weakref.ref(module, lambda _: _by_identity.pop(address, None))
  _by_identity[address] = (reference, record)
  return record


def _program(
  record: _Record,
  module: linen.Module,
  method: Any,
  mutable: Any,
  leaves: list[Any],
  treedef: Any,
  signature: tuple[Any, ...],
) -> Program | None:
  """The recorded program of a call, recorded now if it is new."""
  try:
    how = (_method_key(method), purity.Dependencies().key(mutable))
    key = (how, treedef, signature, _settings())
    program = record.programs.get(key)
  except (purity.UnsettledError, TypeError):  # of aux data without a hash
    return None
  if program is not None:
    record.hits += 1
  elif record.misses > max(_MISSES, record.hits):
    return None
  else:
    record.misses += 1
    program = _recorded(record, module, method, mutable, leaves, treedef)
    record.programs[key] = program
    if len(record.programs) > _PROGRAMS:
      record.programs.popitem(last=False)
  return None if program is _REFUSED else program


_methods: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _method_key(method: Any) -> Any:
  if method is None or isinstance(method, str):
    return method
  known = _methods.get(method)
  if known is None or not known.hold():
    known = purity.Dependencies()
    known.key(method)
    _methods[method] = known
  # New dependencies make a new key.
  return (purity.Identity(method), purity.Identity(known))


def _recorded(
  record: _Record,
  module: linen.Module,
  method: Any,
  mutable: Any,
  leaves: list[Any],
  treedef: Any,
) -> Any:
  is_array = [type(x) in _ARRAYS for x in leaves]
  result: list[Any] = []

  def flat(*arrays):
    given = iter(arrays)
    values = [next(given) if a else x for a, x in zip(is_array, leaves)]
    variables, rngs, args, kwargs = treedef.unflatten(values)
    returned = module.apply(
      variables, *args, rngs=rngs, method=method, mutable=mutable, **kwargs
    )
    after, same = jax.tree.flatten(
      (variables, rngs, _ordered(args), _ordered(kwargs))
    )
    if same != treedef or any(a is not b for a, b in zip(after, values)):
      raise purity.UnsettledError("the module changes its arguments")
    outputs, outputs_treedef = jax.tree.flatten(_ordered(returned))
    rest = [_HOLE if isinstance(x, jax.Array) else x for x in outputs]
    if not all(x is _HOLE or type(x) in _PLAIN for x in rest):
      raise purity.UnsettledError("the module returns what is no array")
    result[:] = outputs_treedef, rest
    return [x for x in outputs if isinstance(x, jax.Array)]

  try:
    closed = jax.make_jaxpr(flat)(*(x for a, x in zip(is_array, leaves) if a))
    if closed.effects or not record.dependencies.hold():
      return _REFUSED
    return Program(evaluator(closed), *result)
  except Exception:
    # Errors of the module itself come again, from the call that follows.
    return _REFUSED


# Evaluating


def evaluator(closed: Any) -> Callable[[list[Any]], list[Any]]:
  """A function of lists of arrays that evaluates a jaxpr.

  Like evaluating it equation by equation, but what can be known beforehand is.
  An array is let go after its last use.

  Example:

    >>> import jax.numpy as jnp
    >>> from bridge import replay
    >>> jaxpr = jax.make_jaxpr(lambda x: [jnp.sin(x) + 1, x])(1.0)
    >>> replay.evaluator(jaxpr)([jnp.zeros(())])
    [Array(1., dtype=float32), Array(0., dtype=float32)]

  Args:
    closed: a jaxpr without effects.

  Returns:
    The function.
  """
  table = _Table()
  inputs = [table.new(v) for v in closed.jaxpr.invars]
  for variable, value in zip(closed.jaxpr.constvars, closed.consts):
    table.constants[table.new(variable)] = value
  table.add(closed.jaxpr)
  outputs = [table.read(atom) for atom in closed.jaxpr.outvars]
  constants, size = table.constants, table.size
  kept = {*outputs, *constants}
  steps = []
  last_seen = set(kept)
  for function, sources, targets, is_single in reversed(table.steps):
    over = tuple({*sources, *targets} - last_seen)
    last_seen.update(over)
    steps.append((function, sources, targets, is_single, over))
  steps.reverse()
  template: list[Any] = [None] * size
  for slot, value in constants.items():
    template[slot] = value

  def run(arrays: list[Any]) -> list[Any]:
    values = template.copy()
    for slot, array in zip(inputs, arrays):
      values[slot] = array
    for function, sources, targets, is_single, over in steps:
      result = function(*[values[s] for s in sources])
      if is_single:
        values[targets[0]] = result
      else:
        for slot, value in zip(targets, result):
          values[slot] = value
      for slot in over:
        values[slot] = None
    return [values[slot] for slot in outputs]

  return run


class _Table:
  """The equations of a jaxpr as steps on numbered values."""

  def __init__(self):
    self.size = 0
    self.constants: dict[int, Any] = {}
    self.steps: list[tuple[Any, tuple[int, ...], tuple[int, ...], bool]] = []
    self._slots: dict[Any, int] = {}

  def new(self, variable: Any) -> int:
    slot = self.size
    self.size += 1
    self._slots[variable] = slot
    return slot

  def read(self, atom: Any) -> int:
    if isinstance(atom, extend_core.Literal):
      slot = self.size
      self.size += 1
      self.constants[slot] = atom.val
      return slot
    return self._slots[atom]

  def add(self, jaxpr: Any) -> None:
    for equation in jaxpr.eqns:
      sources = tuple(self.read(atom) for atom in equation.invars)
      inner = _inlined(equation)
      if inner is not None:
        self._inline(inner, sources, equation.outvars)
        continue
      targets = tuple(self.new(v) for v in equation.outvars)
      is_single = not equation.primitive.multiple_results
      self.steps.append((_function(equation), sources, targets, is_single))

  def _inline(
    self, closed: Any, sources: tuple[int, ...], outvars: list[Any]
  ) -> None:
    """The equations of a function that is called, in place of the call."""
    outer, self._slots = self._slots, {}
    self._slots.update(zip(closed.jaxpr.invars, sources))
    for variable, value in zip(closed.jaxpr.constvars, closed.consts):
      self.constants[self.new(variable)] = value
    self.add(closed.jaxpr)
    results = [self.read(atom) for atom in closed.jaxpr.outvars]
    self._slots = outer
    self._slots.update(zip(outvars, results))


def _inlined(equation: Any) -> Any:
  """The function of a call that is evaluated equation by equation, if it is."""
  name = equation.primitive.name
  if name in ("custom_jvp_call", "custom_vjp_call"):
    return equation.params["call_jaxpr"]
  if name in ("checkpoint", "remat", "remat2"):
    return extend_core.ClosedJaxpr(equation.params["jaxpr"], ())
  return None


def _function(equation: Any) -> Callable[..., Any]:
  """What evaluates an equation outside of `jit`."""
  primitive, params = equation.primitive, equation.params
  if primitive.name in ("jit", "pjit"):
    return _called(params["jaxpr"], tuple(sorted(_options(params).items())))
  try:
    return _single(primitive, tuple(sorted(params.items())))
  except TypeError:  # a parameter without a hash
    return functools.partial(
      primitive.bind, **primitive.get_bind_params(params)
    )


def _options(params: Mapping[str, Any]) -> dict[str, Any]:
  return {
    name: params[name]
    for name in ("in_shardings", "out_shardings", "name")
    if name in params
  }


@functools.lru_cache(maxsize=4096)
def _single(primitive: Any, params: tuple[tuple[str, Any], ...]) -> Any:
  """One operation, compiled as jax does when it is called without `jit`."""
  bound = primitive.get_bind_params(dict(params))

  def operation(*args):
    return primitive.bind(*args, **bound)

  operation.__name__ = operation.__qualname__ = primitive.name
  return jax.jit(operation)


@functools.lru_cache(maxsize=4096)
def _called(closed: Any, options: tuple[tuple[str, Any], ...]) -> Any:
  """A call of a compiled function."""

  def function(*args):
    return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *args)

  function.__name__ = function.__qualname__ = dict(options)["name"]
  return jax.jit(function)
