"""cond, switch, while_loop and fori_loop on graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
import functools
from typing import Any, TypeVar

import jax

from nnx.engine import _engine, boxes, jax_private
from nnx.graphlib import modes
from nnx.transforms import callables, lift, mapped, outcomes, prefix
from nnx.transforms import carry as carry_lib
from nnx.variable_operators import unwrap
from nnx.variablelib import is_ref

T = TypeVar("T")


def cond(
  pred: Any,
  true_fun: Callable[..., T],
  false_fun: Callable[..., T],
  *operands: Any,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> T:
  """Calls one of two functions.

  As `jax.lax.cond`, but operands and results may hold Modules and Variables,
  and what the chosen function does to them is done to the caller's. A branch
  need not write the Variables that the other one writes.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> count = nnx.Variable(jnp.array(0))
    >>> def increment(count):
    ...   count[...] += 1
    >>> nnx.cond(True, increment, lambda count: None, count)
    >>> print(count.value)
    1

  Args:
    pred: a scalar, which selects `true_fun` if it is not zero.
    true_fun: a function of the operands.
    false_fun: another, whose result has the same structure, shapes and dtypes.
    *operands: the arguments.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    The result of the function that was called.

  Raises:
    ValueError: if the functions return, or leave behind, other structures.
    TypeError: as `jax.lax.cond`, if shapes or dtypes differ.
  """
  choice = functools.partial(jax.lax.cond, unwrap(pred))
  names = ("true_fun", "false_fun")
  policy = lift.Policy(modes.resolve(graph, graph_updates), "cond")
  return _select(policy, choice, (true_fun, false_fun), names, operands)


def switch(
  index: Any,
  branches: Sequence[Callable[..., T]],
  *operands: Any,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> T:
  """Calls one of several functions.

  As `jax.lax.switch`, with Modules and Variables as in `cond`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> v = nnx.Variable(jnp.array(1.0))
    >>> def scale(by):
    ...   def f(v):
    ...     v[...] *= by
    ...
    ...   return f
    >>> nnx.switch(1, [scale(2.0), scale(3.0)], v)
    >>> print(v.value)
    3.0

  Args:
    index: an integer scalar, clamped to the branches there are.
    branches: functions of the operands.
    *operands: the arguments.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    The result of the function that was called.

  Raises:
    ValueError: if there are no branches, or if they return, or leave behind,
      other structures.
    TypeError: as `jax.lax.switch`, if shapes or dtypes differ.
  """
  branches = tuple(branches)
  if not branches:
    raise ValueError("`branches` must hold a function, but got none.")
  names = tuple(f"branches[{i}]" for i in range(len(branches)))

  def choice(*functions_and_operand):
    *functions, operand = functions_and_operand
    return jax.lax.switch(unwrap(index), functions, operand)

  policy = lift.Policy(modes.resolve(graph, graph_updates), "switch")
  return _select(policy, choice, branches, names, operands)


def _select(
  policy: lift.Policy,
  choice: Callable[..., Any],
  branches: Sequence[Callable[..., Any]],
  names: Sequence[str],
  operands: Sequence[Any],
) -> Any:
  """Traces the branches, unites what they write, and selects one."""
  transform = policy.transform
  for branch in branches:
    if not callable(branch):
      raise TypeError(
        f"`nnx.{transform}` must be given functions, but got `{branch!r}`."
      )
  branches, owners = _with_owners(names, branches)
  call = lift.Call(policy, branches[0], operands, owners)
  inputs = [i for i, leaf in enumerate(call.leaves) if lift.is_array(leaf)]
  traced = [_trace(call, transform, inputs, branch) for branch in branches]
  plans = [plan for plan, _ in traced]
  for name, plan in zip(names[1:], plans[1:]):
    _check_same_plan(transform, names[0], plans[0], name, plan, call)
  # Every branch has as outputs what any of them has.
  wanted = tuple(
    leaf
    for leaf, outputs_of in enumerate(zip(*(p.output_of for p in plans)))
    if max(outputs_of) >= 0
  )

  def branch_function(plan, jaxpr):
    def run(values):
      leaves = call.with_leaves(inputs, values)
      outputs = lift.run_jaxpr(jaxpr, *values)
      after = outcomes.leaf_values(plan, outputs, leaves)
      return tuple(after[leaf] for leaf in wanted)

    return run

  functions = [branch_function(plan, jaxpr) for plan, jaxpr in traced]
  plan = _engine.with_outputs(plans[0], wanted)
  _check_same_types(transform, names, traced, wanted, plan, call)
  selected = choice(*functions, call.pick(inputs))
  outputs: list[Any] = [None] * len(wanted)
  output_of = plan.output_of
  for leaf, value in zip(wanted, selected):
    outputs[output_of[leaf]] = value
  return call.apply_outputs(plan, outputs)


def _with_owners(
  names: Sequence[str], functions: Sequence[Callable[..., Any]]
) -> tuple[list[Callable[..., Any]], dict[str, Any]]:
  """Makes all functions take the objects that some of them are bound to.

  Args:
    names: what the functions are called.
    functions: the functions.

  Returns:
    The functions, and the objects, which are keyword arguments of each.
  """
  methods = list(map(callables.method_of, functions))
  owners = {n: m.owner for n, m in zip(names, methods) if m is not None}
  if not owners:
    return list(functions), owners

  def taking_owners(name, function, method):
    @functools.wraps(function if method is None else method)
    def call(*args, **owners):
      if method is None:
        return function(*args)
      return method.function(owners[name], *args)

    return call

  return list(map(taking_owners, names, functions, methods)), owners


def _trace(
  call: lift.Call,
  transform: str,
  inputs: Sequence[int],
  branch: Callable[..., Any],
):
  """Traces a branch: its plan and jaxpr. A branch runs once in Python."""
  lifted = call.lifted.of(branch)
  plans = []

  def flat(*values):
    packed = lifted(call.with_leaves(inputs, values))
    plans.append(packed.plan)
    return packed.outputs

  call.described(flat, transform, inputs, lifted)
  jaxpr = call.framed(jax.make_jaxpr(flat), *call.pick(inputs))
  return plans[-1], jaxpr


def _walk_operands(call: lift.Call) -> prefix.Walk:
  """Walks over operands for the paths in errors."""
  walk = prefix.Walk(
    call.structure, call.leaves, call.objects, lambda entry: True
  )
  for i in range(call.num_args):
    walk.visit_root(prefix.Root(None, "operands", f"operands[{i}]"))
  for name in call.lifted.names:
    walk.visit_root(prefix.Root(None, "operands", name))
  return walk


def _check_same_types(transform, names, traced, wanted, merged, call) -> None:
  """Refuses branches whose outputs differ in shape or dtype."""

  def types_of(plan, jaxpr):
    values = outcomes.leaf_values(plan, jaxpr.out_avals, call.leaves)
    output_of = plan.output_of
    return {
      leaf: values[leaf] if output_of[leaf] >= 0 else jax.typeof(values[leaf])
      for leaf in wanted
    }

  first_types, *other_types = (types_of(*each) for each in traced)
  for leaf in wanted:
    first = first_types[leaf]
    for name, types in zip(names[1:], other_types):
      other = types[leaf]
      if carry_lib.same_type(first, other):
        continue
      root = prefix.Root(None, "result", "result")
      paths = mapped.output_paths(merged, _walk_operands(call), root)
      raise TypeError(
        f"The functions given to `nnx.{transform}` must give the same shapes"
        f" and"
        f" dtypes, but `{paths[merged.output_of[leaf]]}` is {first.str_short()}"
        f" after `{names[0]}` and {other.str_short()} after `{name}`."
      )


def _check_same_plan(transform, first_name, first, name, plan, call) -> None:
  if (
    first.structure == plan.structure
    and first.origin == plan.origin
    and first.matches == plan.matches
  ):
    return
  walk = _walk_operands(call)
  names = [prefix.text(top.where, top.path) for top in walk.tops]
  path, one, two = carry_lib.difference(
    first.structure, plan.structure, [*names, "result"]
  )
  if not path:
    path, one, two = " or ".join(names), "some objects", "others"
  raise ValueError(
    f"The functions given to `nnx.{transform}` must return, and leave behind,"
    f" the same structure, but `{path}` is {one} after `{first_name}` and {two}"
    f" after `{name}`."
  )


def while_loop(
  cond_fun: Callable[[T], Any],
  body_fun: Callable[[T], T],
  init_val: T,
  *,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> T:
  """Calls a function for as long as a condition holds.

  As `jax.lax.while_loop`, but the value may hold Modules and Variables: what
  the function does to them is carried on, and is done to the caller's.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> def double(val):
    ...   v, n = val
    ...   v[...] *= 2
    ...   return v, n - 1
    >>> v = nnx.Variable(jnp.array(1.0))
    >>> _ = nnx.while_loop(lambda val: val[1] > 0, double, (v, 3))
    >>> print(v.value)
    8.0

  Args:
    cond_fun: a function of the value that returns a boolean scalar, and changes
      nothing.
    body_fun: a function from the value to the next one, which has the same
      structure and holds the same objects.
    init_val: the value before the first iteration.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    The last value, with the objects that were in the first one.

  Raises:
    ValueError: if `body_fun` changes the structure or returns other objects, or
      if `cond_fun` writes.
    TypeError: if an array changes its shape or dtype.
  """
  names = ("body_fun", "cond_fun")
  policy = lift.Policy(modes.resolve(graph, graph_updates), "while_loop")
  loop = _Loop(policy, names, (body_fun, cond_fun), init_val)
  cond_fun = loop.functions[1]

  def condition(values):
    call = loop.call
    leaves = call.with_leaves(loop.carried, values)
    values, objects = tested.open(leaves)
    result = tested.call(values)
    plan = tested.pack(objects, leaves, None).plan
    if plan.writes != ():
      path = loop.first_change(plan)
      raise ValueError(
        "`cond_fun` of `nnx.while_loop` must not change its argument, but it"
        f" changes `{path}`. Change it in `body_fun`."
      )
    return unwrap(result)

  call, carried = loop.call, loop.carried
  tested = call.lifted.of(cond_fun)
  call.described(condition, jax_private.CONDITION, carried, tested)
  body = call.described(lambda values: loop.body(values), "while_loop", carried)
  if not loop.writes_in_place:
    return loop.finish(
      call.framed(jax.lax.while_loop, condition, body, call.pick(carried))
    )

  # What is written in place no condition of jax may read; the body may.
  def body_and_condition(state):
    values = body(state[1])
    return jax.numpy.asarray(condition(values)), values

  def run(values):
    first = jax.numpy.asarray(condition(values))
    return jax.lax.while_loop(
      lambda state: state[0], body_and_condition, (first, values)
    )

  return loop.finish(call.framed(run, call.pick(carried))[1])


def fori_loop(
  lower: Any,
  upper: Any,
  body_fun: Callable[[Any, T], T],
  init_val: T,
  *,
  unroll: int | bool | None = None,
  graph: bool | None = None,
  graph_updates: bool | None = None,
) -> T:
  """Calls a function for each index of a range.

  As `jax.lax.fori_loop`, with Modules and Variables as in `while_loop`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> def add(i, v):
    ...   v[...] += i
    ...   return v
    >>> v = nnx.Variable(jnp.array(0))
    >>> nnx.fori_loop(0, 4, add, v) is v, int(v.value)
    (True, 6)

  Args:
    lower: the first index.
    upper: one more than the last index.
    body_fun: a function from an index and the value to the next value, which
      has the same structure and holds the same objects.
    init_val: the value before the first iteration.
    unroll: how many iterations to unroll in one, as in `jax.lax.fori_loop`.
    graph: as in `nnx.jit`.
    graph_updates: as in `nnx.jit`.

  Returns:
    The last value, with the objects that were in the first one.

  Raises:
    ValueError: if `body_fun` changes the structure or returns other objects.
    TypeError: if an array changes its shape or dtype.
  """
  policy = lift.Policy(modes.resolve(graph, graph_updates), "fori_loop")
  loop = _Loop(policy, ("body_fun",), (body_fun,), init_val)
  call, carried = loop.call, loop.carried
  return loop.finish(
    call.framed(
      functools.partial(jax.lax.fori_loop, unroll=unroll),
      unwrap(lower),
      unwrap(upper),
      call.described(
        lambda i, values: loop.body(values, i), "fori_loop", carried, first=1
      ),
      call.pick(carried),
    )
  )


class _Loop:
  """A loop with one value, all arrays of which are carried."""

  def __init__(
    self,
    policy: lift.Policy,
    names: Sequence[str],
    functions: Sequence[Callable[..., Any]],
    init_val: Any,
  ):
    for function in functions:
      callables.function_of(function, policy.transform)
    self.policy = policy
    self.functions, owners = _with_owners(names, functions)
    self.call = call = lift.Call(policy, self.functions[0], (init_val,), owners)
    self.roots = ["init_val", *call.lifted.names]
    in_place = [is_ref(leaf) or boxes.is_box(leaf) for leaf in call.leaves]
    self.writes_in_place = any(in_place)
    self.carried = [
      i
      for i, leaf in enumerate(call.leaves)
      if lift.is_array(leaf) and not in_place[i]
    ]
    self.walk = prefix.Walk(
      call.structure, call.leaves, call.objects, lambda entry: True
    )
    for name in self.roots:
      self.walk.visit_root(prefix.Root(None, "init_val", name))
    self.plain = carry_lib.returned_leaves(
      call, self.walk, lift.leaves_of_roots(call.structure, (0,))
    )
    self.plan: Any = None

  def body(self, carry_leaves: Sequence[Any], *index: Any) -> tuple[Any, ...]:
    """Runs one iteration on the leaves."""
    call = self.call
    leaves = call.with_leaves(self.carried, carry_leaves)
    values, objects = call.lifted.open(leaves)
    before = list(map(carry_lib.Opened, values))
    result = call.lifted.call(values, *index)
    after = map(carry_lib.Opened, (result, *values[1:]))
    for name, first, last in zip(self.roots, before, after):
      carry_lib.check_same(self.policy, first, last, name)
    packed = call.lifted.pack(objects, leaves, result, ())
    plan = self.plan = packed.plan
    new = carry_lib.next_values(
      self.carried,
      leaves,
      plan,
      packed.outputs,
      self.plain,
      outcomes.result_leaves(plan).start,
    )
    for leaf, old, value in zip(self.carried, carry_leaves, new):
      place = self.walk.places[leaf]
      assert place is not None
      carry_lib.check_type(old, value, self.policy.transform, place.text)
    return tuple(new)

  def finish(self, final: Sequence[Any]) -> Any:
    """Writes the last values and builds the result."""
    plan = self.plan
    last = self.call.with_leaves(self.carried, final)
    outputs: list[Any] = [None] * (1 + max(plan.output_of, default=-1))
    in_place_of = (*plan.matches, *self.plain)
    for leaf, output in zip(in_place_of, plan.output_of):
      if output >= 0:
        outputs[output] = last[leaf]
    return self.call.apply_outputs(plan, outputs)

  def first_change(self, plan: Any) -> str:
    """Returns the path of the first thing that is not as it was."""
    root = prefix.Root(None, "init_val", "init_val")
    paths = mapped.output_paths(plan, self.walk, root)
    if paths:
      return paths[0]
    names = [prefix.text(top.where, top.path) for top in self.walk.tops]
    return " or ".join(names) or "init_val"
