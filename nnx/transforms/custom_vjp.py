"""custom_vjp: functions of graphs with a derivative of the user's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
from typing import (
  Any,
  Generic,
  ParamSpec,
  TypedDict,
  TypeVar,
  Unpack,
  overload,
)

import jax
import jax.numpy as jnp
import numpy as np

from nnx import environment
from nnx.engine import _engine
from nnx.graphlib import modes
from nnx.statelib import State, to_flat_state
from nnx.transforms import callables, diff_states, lift, outcomes
from nnx.transforms import carry as carry_lib
from nnx.transforms.diff_states import DiffState

P = ParamSpec("P")
R = TypeVar("R")


class CustomVjpOptions(TypedDict, total=False):
  """Options of `custom_vjp`."""

  nondiff_argnums: Sequence[int | DiffState]
  graph: bool | None
  graph_updates: bool | None


@overload
def custom_vjp(
  fun: Callable[P, R], **options: Unpack[CustomVjpOptions]
) -> CustomVjp[P, R]: ...
@overload
def custom_vjp(
  fun: None = None, **options: Unpack[CustomVjpOptions]
) -> Callable[[Callable[P, R]], CustomVjp[P, R]]: ...
def custom_vjp(
  fun: Callable[..., Any] | None = None,
  *,
  nondiff_argnums: Sequence[int | DiffState] = (),
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> Any:
  """Lets a function of Modules and Variables have a derivative of one's own.

  As `jax.custom_vjp`. State that the function writes is an output too, so there
  are two kinds of cotangents, those of the state and those of the result. The
  rule `bwd` gets them as a pair; in it, and in what `bwd` returns, a `State`
  stands for each Module and `None` for all else of the state.

  With `graph=False` or `graph_updates=False`, `bwd` gets the cotangent of the
  result alone and returns Modules for Modules; if it has a keyword-only
  parameter `updates_g`, it gets the others there, in the form of the arguments
  and `None` where nothing was written.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> @nnx.custom_vjp
    ... def clipped(w, x):
    ...   return w * x
    >>> def fwd(w, x):
    ...   return clipped(w, x), (w, x)
    >>> def bwd(residual, g):
    ...   w, x = residual
    ...   state_g, out_g = g
    ...   return w.replace(jnp.clip(out_g * x, -1, 1)), out_g * w
    >>> clipped.defvjp(fwd, bwd)
    >>> w = nnx.Param(jnp.array(2.0))
    >>> print(nnx.grad(clipped)(w, 30.0).value)
    1.0

  Args:
    fun: the function; without it, `custom_vjp` is a decorator.
    nondiff_argnums: positions of arguments that have no derivative, which `bwd`
      gets first; or `DiffState`s, which select what of an argument has one.
    graph: as in `nnx.jit`; see above.
    graph_updates: as in `nnx.jit`; see above.

  Returns:
    A `CustomVjp`, whose `defvjp` must be called before it is.

  Raises:
    ValueError: if an argument is named twice, or a `DiffState` is given where
      Modules stand for Modules.
  """
  mode = modes.resolve(graph, graph_updates)
  if fun is None:
    return functools.partial(
      custom_vjp,
      nondiff_argnums=nondiff_argnums,
      **mode.arguments,
    )
  if isinstance(callables.function_of(fun, "custom_vjp"), callables.Method):
    raise ValueError(
      "`nnx.custom_vjp` must be given a function that takes its Module as an"
      " argument, as its rule must, but got"
      f" `{callables.name_of(fun)}`, which is bound to one."
    )
  return CustomVjp(fun, nondiff_argnums, lift.Policy(mode, "custom_vjp"))


class CustomVjp(Generic[P, R]):
  """A function with a derivative of its own; see `custom_vjp`.

  Example:

    >>> import nnx
    >>> f = nnx.custom_vjp(lambda x: 2 * x)
    >>> f.defvjp(lambda x: (f(x), None), lambda _, g: (3 * g[1],))
    >>> float(nnx.grad(f)(1.0))
    3.0
  """

  def __init__(
    self,
    fun: Callable[P, R],
    nondiff_argnums: Sequence[int | DiffState],
    policy: lift.Policy,
  ):
    functools.update_wrapper(self, fun)
    self.fun = fun
    self.argnums = diff_states.as_tuple(nondiff_argnums, "nondiff_argnums")
    self.policy = policy
    self.rules: tuple[Any, ...] = ()
    numbers = diff_states.numbers(self.argnums)
    for number in numbers:
      if numbers.count(number) > 1:
        raise ValueError(
          f"`nondiff_argnums` must name an argument once, but got {number}"
          " twice."
        )
    diff_states.check_states(policy, "nondiff_argnums", self.argnums)

  def __get__(self, instance: Any, owner: Any = None) -> Any:
    return self if instance is None else functools.partial(self, instance)

  def defvjp(
    self,
    fwd: Callable[..., Any],
    bwd: Callable[..., Any],
    symbolic_zeros: bool = False,
  ) -> None:
    """Sets the rule.

    Args:
      fwd: a function of the same arguments that returns a pair of the result
        and a residual, which may hold Modules.
      bwd: a function of the arguments without a derivative, the residual and
        the cotangents, that returns one cotangent for each other argument.
      symbolic_zeros: as in `jax.custom_vjp`: the leaves that `fwd` gets say
        whether they are perturbed, and cotangents may be symbolic zeros.
    """
    environment.check_flags(symbolic_zeros=symbolic_zeros)
    self.rules = (fwd, bwd, symbolic_zeros)

  def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
    if not self.rules:
      raise ValueError(
        f"`{callables.name_of(self.fun)}` must be given its derivative before"
        " it is called. Call `defvjp(fwd, bwd)`."
      )
    values, named_values = callables.bind(self.fun, args, kwargs)
    if named_values:
      raise TypeError(
        "The arguments of a function with a custom derivative must be"
        f" positional, but {sorted(named_values)} are not."
      )
    fwd, bwd, symbolic_zeros = self.rules
    application = _Application(self, values, fwd, bwd)
    call, inputs = application.call, [*application.diff, *application.rest]

    def named(function, fun):
      lifted = call.lifted.of(fun)
      return call.described(
        lambda *args: function(*args), "custom_vjp", inputs, lifted
      )

    flat = jax.custom_vjp(named(application.primal, self.fun))
    flat.defvjp(
      named(application.forward, fwd),
      application.backward,
      symbolic_zeros=symbolic_zeros,
    )
    outputs = call.framed(flat, *application.inputs())
    return call.apply_outputs(application.plan, outputs)


class _Application:
  """One call: its arguments opened, and the rule as functions of leaves."""

  def __init__(
    self, owner: CustomVjp[..., Any], args: tuple[Any, ...], fwd, bwd
  ):
    self.tree = not owner.policy.mode.updates
    self.fwd = fwd
    self.bwd = bwd
    self.call = call = lift.Call(owner.policy, owner.fun, args)
    entries: list[Any] = [True] * len(args)
    self.nondiff: list[int] = []
    positions = callables.positions(
      diff_states.numbers(owner.argnums), len(args), "nondiff_argnums"
    )
    for position, argnum in zip(positions, owner.argnums):
      if isinstance(argnum, DiffState):
        entries[position] = diff_states.Selection(argnum.filter)
      else:
        entries[position] = False
        self.nondiff.append(position)
    self.nondiff.sort()
    self.walk = diff_states.walk_selected(call, entries, "nondiff_argnums")
    arrays = [i for i, leaf in enumerate(call.leaves) if lift.is_array(leaf)]
    self.diff = [i for i in arrays if self.walk.entries[i]]
    # Inputs too, since a rule may not close over traced values.
    self.rest = [i for i in arrays if not self.walk.entries[i]]
    self.plan: Any = None

  def inputs(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns the arguments of the flat function."""
    return self.call.pick(self.diff), self.call.pick(self.rest)

  def leaves(self, diff: Sequence[Any], rest: Sequence[Any]) -> tuple[Any, ...]:
    """Returns all leaves of the arguments."""
    return self.call.with_leaves([*self.diff, *self.rest], [*diff, *rest])

  def primal(self, diff: Sequence[Any], rest: Sequence[Any]) -> tuple[Any, ...]:
    """Runs the function itself."""
    packed = self.call.lifted(self.leaves(diff, rest))
    self.plan = packed.plan
    return packed.outputs

  def forward(self, diff: Sequence[Any], rest: Sequence[Any]) -> Any:
    """Runs the first half of the rule."""
    call = self.call
    leaves = self.leaves(diff, rest)
    values, objects = call.lifted.open(leaves)
    result = self.fwd(*values)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
      raise TypeError(
        f"`{callables.name_of(self.fwd)}` must return a pair of the result and"
        f" a residual, but got a `{type(result).__name__}`."
      )
    output, residual = result
    nondiff = tuple(values[i] for i in self.nondiff)
    structure, residual_leaves, _ = _engine.flatten((*nondiff, residual))
    packed = call.lifted.pack(objects, leaves, output)
    self.plan = packed.plan
    arrays = [lift.is_array(leaf) for leaf in residual_leaves]
    others = [
      None if is_array else leaf
      for leaf, is_array in zip(residual_leaves, arrays)
    ]
    passed = tuple(
      leaf for leaf, is_array in zip(residual_leaves, arrays) if is_array
    )
    box = lift.Static((structure, others, arrays, packed.plan))
    return packed.outputs, (box, passed)

  def backward(self, residuals: Any, cotangents: Sequence[Any]) -> Any:
    """Runs the second half of the rule."""
    box, passed = residuals
    structure, others, arrays, plan = box.value
    stream = iter(passed)
    filled = [
      next(stream) if is_array else other
      for other, is_array in zip(others, arrays)
    ]
    *nondiff, residual = _engine.unflatten(structure, tuple(filled)).values
    written = {
      leaf: cotangents[output]
      for leaf, output in outcomes.written(plan).items()
    }
    zeros = [_zero(leaf) for leaf in self.call.leaves]
    state_g = [written.get(i, zero) for i, zero in enumerate(zeros)]
    out_g = outcomes.result_of(plan, cotangents, zeros)
    if self.tree:
      extra: Mapping[str, Any] = {}
      if "updates_g" in inspect.signature(self.bwd).parameters:
        extra = {"updates_g": self.updates(written)}
      result = self.bwd(*nondiff, residual, out_g, **extra)
    else:
      result = self.bwd(*nondiff, residual, (self.states(state_g), out_g))
    return self.flat_cotangents(result), None

  def wanted(self) -> list[int]:
    """Returns the arguments that `bwd` returns cotangents of."""
    count = self.call.num_args
    return [i for i in range(count) if i not in self.nondiff]

  def states(self, leaves: Sequence[Any]) -> tuple[Any, ...]:
    """Returns the cotangents of the state, and `None` for all else."""
    everything = range(len(leaves))
    built = diff_states.Gradients(self.call, self.walk, False).build(
      leaves, everything
    )

    def is_state(x):
      return isinstance(x, (State, _engine.VariableBase))

    return tuple(
      jax.tree.map(
        lambda x: x if is_state(x) else None, built[i], is_leaf=is_state
      )
      for i in self.wanted()
    )

  def updates(self, written: Mapping[int, Any]) -> tuple[Any, ...]:
    """Returns cotangents of what was written, in the form of the arguments."""
    leaves = tuple(written.get(i) for i in range(len(self.call.leaves)))
    values, objects = _engine.unflatten(self.call.structure, leaves)
    kept = {
      id(objects[place.variable])
      for leaf, place in enumerate(self.walk.places)
      if leaf in written and place.variable >= 0
    }

    def is_leaf(x):
      return x is None or isinstance(x, _engine.VariableBase)

    return tuple(
      jax.tree.map(
        lambda x: x if id(x) in kept else None, values[i], is_leaf=is_leaf
      )
      for i in self.wanted()
    )

  def flat_cotangents(self, result: Any) -> tuple[Any, ...]:
    """Returns the cotangents that `bwd` returned, by leaf."""
    wanted = self.wanted()
    if not isinstance(result, (tuple, list)) or len(result) != len(wanted):
      given = f"a `{type(result).__name__}`"
      if isinstance(result, (tuple, list)):
        given += f" of {len(result)}"
      raise TypeError(
        f"`{callables.name_of(self.bwd)}` must return a tuple of {len(wanted)},"
        " one cotangent for each argument that has one, but it returned"
        f" {given}."
      )
    found: dict[int, Any] = {}
    for position, cotangent in zip(wanted, result):
      self.read(position, cotangent, found)
    for leaf, cotangent in found.items():
      shape = jnp.shape(self.call.leaves[leaf])
      given = getattr(cotangent, "shape", shape)
      if leaf in self.diff and given != shape:
        raise ValueError(
          f"The cotangent of `{self.call.path(leaf)}` must have its shape"
          f" {shape}, but `{callables.name_of(self.bwd)}` returned one of shape"
          f" {given}."
        )
    return tuple(found.get(leaf) for leaf in self.diff)

  def read(self, position: int, cotangent: Any, found: dict[int, Any]) -> None:
    """Reads one cotangent along the structure of its argument."""
    leaves = lift.leaves_of_roots(self.call.structure, (position,))
    if cotangent is None:
      return
    by_top: dict[int, list[int]] = {}
    plain: list[int] = []
    for leaf in leaves:
      top = self.walk.places[leaf].top
      is_node = top >= 0 and not isinstance(
        self.call.objects[top], _engine.VariableBase
      )
      (by_top.setdefault(top, []) if is_node else plain).append(leaf)
    if by_top and not self.tree:
      cotangent = self.read_states(position, cotangent, by_top, found)
      leaves = tuple(plain)
    given = self.call.lifted.policy.leaves(cotangent)
    if len(given) != len(leaves):
      raise ValueError(
        f"The cotangent of `args[{position}]` must have the form of it, with"
        f" {len(leaves)} leaves, but `{callables.name_of(self.bwd)}` returned"
        f" one with {len(given)}."
      )
    found.update(zip(leaves, given))

  def read_states(self, position, cotangent, by_top, found) -> Any:
    """Reads the States in a cotangent; returns it without them."""
    states: list[Any] = []

    def collect(value):
      if isinstance(value, (State, _engine.ObjectBase)):
        states.append(value)
        return None
      return value

    rest = jax.tree.map(
      collect,
      cotangent,
      is_leaf=lambda x: isinstance(x, (State, *_LEAVES)),
    )
    if len(states) != len(by_top):
      raise ValueError(
        f"The cotangent of `args[{position}]` must have a State for each"
        f" Module, {len(by_top)} of them, but `{callables.name_of(self.bwd)}`"
        f" returned {len(states)}."
      )
    for state, leaves in zip(states, by_top.values()):
      if isinstance(state, _engine.ObjectBase):
        opened = carry_lib.Opened(state).leaves
        found.update(zip(leaves, opened))
        continue
      by_path = dict(to_flat_state(state))
      for leaf in leaves:
        place = self.walk.places[leaf]
        if not self.walk.entries[leaf] or not lift.is_array(
          self.call.leaves[leaf]
        ):
          continue
        if place.path not in by_path:
          raise ValueError(
            "The cotangent of a Module must have everything that is"
            f" differentiated, but the one that `{callables.name_of(self.bwd)}`"
            f" returned for `args[{position}]` has no `{place.text}`. Leave it"
            " out of the derivative by a `DiffState` in `nondiff_argnums`."
          )
        value = by_path[place.path]
        if isinstance(value, _engine.VariableBase):
          value = value.raw_value
        found[leaf] = value
    return rest


_LEAVES = (_engine.VariableBase, _engine.ObjectBase)


def _zero(leaf: Any) -> Any:
  """Returns the cotangent of a leaf that nothing depends on."""
  if not lift.is_array(leaf):
    return None
  dtype = jnp.result_type(leaf)
  if jnp.issubdtype(dtype, jnp.inexact):
    return jnp.zeros(jnp.shape(leaf), dtype)
  return np.zeros(jnp.shape(leaf), jax.dtypes.float0)
