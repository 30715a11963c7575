"""The graph functions in every mode, against flax.nnx; and what they refuse."""

import copy
import functools

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import optax

import nnx
from tests.nnx.modes import programs

LIBRARIES = programs.LIBRARIES


def with_rngs(lib):
  model = programs.tree(lib)
  model.rngs = lib.Rngs(0, dropout=1)
  return model


def shared_rngs(lib):
  model = with_rngs(lib)
  model.again = model.rngs
  return model


def pytree(lib):
  return {
    "b": [lib.Param(jnp.ones(2)), 3, None],
    "a": (programs.tree(lib), 2.5),
  }


ARGUMENTS = (
  programs.tree,
  programs.shared_variable,
  programs.shared_module,
  programs.shared_plain,
  with_rngs,
  shared_rngs,
  pytree,
)


def split(lib, node, **mode):
  graphdef, state = lib.split(node, **mode)
  return state, lib.merge(graphdef, state)


def split_by_filter(lib, node, **mode):
  _, params, rest = lib.split(node, lib.Param, ..., **mode)
  return params, rest


def state(lib, node, **mode):
  return lib.state(node, **mode), lib.state(node, lib.Param, **mode)


def graphdef(lib, node, **mode):
  return lib.merge(lib.graphdef(node, **mode), lib.split(node, **mode)[1])


def clone(lib, node, **mode):
  return lib.clone(node, **mode), lib.clone(node, variables=False, **mode)


def unpack(lib, node, **mode):
  params, rest = lib.unpack(node, lib.Param, ..., **mode)
  return lib.merge(params, rest)


def map_(lib, node, **mode):
  def double(path, leaf):
    del path
    if isinstance(leaf, lib.RngState):
      return leaf
    return leaf.replace(2 * leaf[...]) if isinstance(leaf, lib.Param) else leaf

  return lib.map(double, node, **mode)


def iter_graph(lib, node, **mode):
  return [
    ([*path], type(value).__name__)
    for path, value in lib.iter_graph(node, **mode)
    if isinstance(value, (lib.Module, lib.Variable, jax.Array))
  ]


def recursive_map(lib, node, **mode):
  def note(path, value):
    if isinstance(value, lib.Module):
      value.path = "/".join(map(str, path))
    return value

  return lib.recursive_map(note, node, **mode)


def iter_modules(lib, node, **mode):
  return [
    ([*path], type(value).__name__)
    for path, value in lib.iter_modules(node, **mode)
  ]


def set_attributes(lib, node, **mode):
  programs_model = node if isinstance(node, lib.Module) else node["a"][0]
  programs_model.set_attributes(size=9, **mode)


def with_attributes(lib, node, **mode):
  return lib.with_attributes(node, size=9, **mode)


def view_info(lib, node, **mode):
  if hasattr(node, "rngs"):
    return None  # Streams look to Flax as if they had a `set_view`.
  return lib.view_info(node, **mode)


def prefix(lib, node, **mode):
  if mode["graph"]:
    return None  # In Flax a structure of its own.
  return lib.prefix(node, {lib.Param: 0, ...: None}, **mode)


def backup_keys(lib, node, **mode):
  return [key for _, key in lib.rnglib.backup_keys(node, **mode)]


def reseed(lib, node, **mode):
  lib.reseed(node, dropout=5, **mode)


def as_abstract(lib, node, **mode):
  return lib.as_abstract(node, **mode)


def ema(lib, node, **mode):
  if not isinstance(node, lib.Module):
    return None
  average = lib.EMA(node, 0.5, only=lib.Param, **mode)
  return average.apply_to(node)


def optimizer(lib, node, **mode):
  step = lib.Optimizer(node, optax.sgd(0.5), wrt=lib.Param, **mode)
  grads = jax.tree.map(jnp.ones_like, lib.state(node, lib.Param, **mode))
  step.update(node, grads)
  return step.step[...]


def variables(lib, node, **mode):
  return lib.variables(node, lib.Param, ..., **mode)


def flatten(lib, node, **mode):
  structure, leaves = lib.graphlib.flatten(node, **mode)
  return [[*path] for path in leaves.paths], lib.graphlib.unflatten(
    structure, leaves
  )


def iter_children(lib, node, **mode):
  return [
    (key, type(child).__name__)
    for key, child in lib.iter_children(node, **mode)
  ]


def iter_module_children(lib, node, **mode):
  if not isinstance(node, lib.Module):
    return None
  return [
    (key, type(child).__name__)
    for key, child in lib.iter_children(node, **mode)
    if isinstance(child, lib.Module)
  ]


def view(lib, node, **mode):
  if hasattr(node, "rngs") or not isinstance(node, lib.Module):
    return None  # as for `view_info`
  node.dropout = lib.Dropout(0.5)
  node.norm = lib.BatchNorm(2, rngs=lib.Rngs(0))
  return lib.view(node, deterministic=True, use_running_average=True, **mode)


def apply(lib, node, **mode):
  structure, parts = lib.split(node, **mode)
  call = structure.apply(parts)
  if not isinstance(node, lib.Module):
    return None
  out, (structure, parts) = call(jnp.array(2.0))
  return out, lib.merge(structure, parts)


def jit_partial(lib, node, **mode):
  if mode == {"graph": True}:
    mode["graph_updates"] = False  # Flax has no other.

  def step(node, x):
    for variable in jax.tree.leaves(
      node, is_leaf=lambda value: isinstance(value, lib.Variable)
    ):
      if isinstance(variable, lib.Param):
        variable[...] = variable[...] + x
    return 2 * x

  run = lib.jit_partial(step, node, **mode)
  return run(1.0), run(2.0)


def abstract_model(lib, node, **mode):
  mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
  return lib.get_abstract_model(lambda: lib.clone(node), mesh, **mode)[1]


FUNCTIONS = (
  variables,
  flatten,
  iter_children,
  iter_module_children,
  view,
  apply,
  jit_partial,
  abstract_model,
  split,
  split_by_filter,
  state,
  graphdef,
  clone,
  unpack,
  map_,
  iter_graph,
  recursive_map,
  iter_modules,
  set_attributes,
  with_attributes,
  view_info,
  prefix,
  backup_keys,
  reseed,
  as_abstract,
  ema,
  optimizer,
)

# Functions that the mode of the setters alone reaches, if any does.


def pop(lib, node):
  return lib.pop(node, lib.BatchStat)


def find_duplicates(lib, node):
  return [
    sorted([*map(str, path)] for path in paths)
    for paths in lib.find_duplicates(node)
  ]


def update(lib, node):
  lib.update(node, jax.tree.map(lambda x: x, lib.state(node)))


def pure(lib, node):
  return lib.pure(lib.state(node))


def as_pure(lib, node):
  return lib.as_pure(lib.state(node))


def with_vars(lib, node):
  return lib.with_vars(node, only=lib.Param, ref=True)


def set_metadata(lib, node):
  lib.set_metadata(node, only=lib.Param, note="changed")


def deep_copy(lib, node):
  # Of a Variable alone Flax copies the value.
  return copy.deepcopy(node) if isinstance(node, lib.Module) else None


def containers(lib, node):
  if not isinstance(node, lib.Module):
    return None  # Of a plain dict Flax makes one for each place.
  made = lib.Dict(items=lib.List([node, lib.Dict(a=node)]), n=lib.data([1]))
  made.items.append(lib.Param(jnp.ones(1)))
  return lib.split(made)[1], [*lib.clone(made).items]


def metrics(lib, node):
  del node
  metric = lib.MultiMetric(
    loss=lib.metrics.Average("loss"),
    accuracy=lib.metrics.Accuracy(),
    spread=lib.metrics.Welford("loss"),
  )

  @lib.jit
  def step(metric, x):
    metric.update(
      loss=x, logits=jnp.eye(3) * x.sum(), labels=jnp.array([0, 1, 1])
    )

  step(metric, jnp.arange(3.0))
  step(metric, jnp.arange(4.0))
  return jax.tree.leaves(metric.compute()), lib.state(metric)


def fork(lib, node):
  if not hasattr(node, "rngs"):
    return None
  forked = node.rngs.fork(split={"dropout": 2})

  @lib.jit
  def draw(rngs):
    return rngs.dropout()

  return forked, draw(node.rngs), node.rngs.default(), node.rngs.params()


SETTLED = (
  pop,
  find_duplicates,
  update,
  pure,
  as_pure,
  with_vars,
  set_metadata,
  deep_copy,
  containers,
  metrics,
  fork,
)

# Functions of streams, which have both arguments.


def split_rngs(lib, node, **mode):
  result = lib.split_rngs(node, splits=2, **mode)
  return None if mode == programs.MODES["graph"] else result


def split_rngs_decorator(lib, node, **mode):
  seen = []

  @lib.split_rngs(splits=2, **mode)
  def look(node):
    seen.append(lib.clone(node, graph=True))

  look(node)
  return seen


def fork_rngs(lib, node, **mode):
  result = lib.fork_rngs(node, split=3, **mode)
  return None if mode == programs.MODES["graph"] else result


def fork_rngs_decorator(lib, node, **mode):
  seen = []

  @lib.fork_rngs(split={"dropout": 2}, **mode)
  def look(node):
    seen.append(lib.clone(node, graph=True))

  look(node)
  return seen


def with_rngs_split(lib, node, **mode):
  if mode == programs.MODES["graph"]:
    mode = programs.MODES["values"]  # Flax has no other.
  return lib.with_rngs(node, split={"dropout": 2}, fork="default", **mode)


STREAMS = (
  split_rngs,
  split_rngs_decorator,
  fork_rngs,
  fork_rngs_decorator,
  with_rngs_split,
)


def in_mode(lib, mode, program):
  with lib.set_graph_mode(mode["graph"]):
    with lib.set_graph_updates(mode.get("graph_updates", True)):
      return program(lib)


def outcome(lib, function, argument, mode):
  def program():
    node = argument(lib)
    return node, function(lib, node, **mode)

  return programs.outcome(lib, program)


class FunctionsTest(parameterized.TestCase):
  def check(self, function, argument, mode):
    ours, error = outcome(nnx, function, argument, mode)
    theirs, their_error = outcome(flax_nnx, function, argument, mode)
    if their_error is not None:
      self.assertIsInstance(error, ValueError, f"Flax: {their_error}")
      return
    self.assertIsNone(error)
    self.assertEqual(ours, theirs)

  @parameterized.named_parameters(
    (f"{f.__name__}_{graph}", f, graph)
    for f in FUNCTIONS
    for graph in (True, False)
  )
  def test_does_what_flax_does(self, function, graph):
    for argument in ARGUMENTS:
      with self.subTest(argument.__name__):
        self.check(function, argument, {"graph": graph})

  @parameterized.named_parameters(
    (f"{f.__name__}_{mode}", f, mode)
    for f in STREAMS
    for mode in programs.MODES
  )
  def test_streams_do_what_those_of_flax_do(self, function, mode):
    for argument in (with_rngs, shared_rngs, pytree):
      with self.subTest(argument.__name__):
        self.check(function, argument, programs.MODES[mode])

  @parameterized.named_parameters(
    (f"{f.__name__}_{mode}", f, mode)
    for f in SETTLED
    for mode in programs.MODES
  )
  def test_does_what_flax_does_once_the_mode_is_set(self, function, mode):
    def program(argument, lib):
      node = argument(lib)
      return node, function(lib, node)

    for argument in ARGUMENTS:
      with self.subTest(argument.__name__):
        (ours, error), (theirs, their_error) = (
          programs.outcome(
            lib,
            functools.partial(
              in_mode,
              lib,
              programs.MODES[mode],
              functools.partial(program, argument),
            ),
          )
          for lib in LIBRARIES
        )
        if their_error is not None:
          self.assertIsInstance(error, ValueError, f"Flax: {their_error!r}")
        else:
          self.assertIsNone(error)
          self.assertEqual(ours, theirs)

  def test_what_captures_keep_is_the_same(self):
    def program(lib):
      class Sower(lib.Module):
        def __init__(self):
          self.w = lib.Param(jnp.array(2.0))

        def __call__(self, x):
          y = self.w * x
          self.sow(lib.Intermediate, "y", y)
          return self.perturb("p", y) ** 2

      def loss(perturbations, model, x):
        forward = lib.capture(
          lambda m, x: m(x), lib.Intermediate, init=perturbations
        )
        return forward(model, x)

      model = Sower()
      forward = lib.capture(lambda m, x: m(x), lib.Perturbation)
      _, perturbations = forward(model, 3.0)
      grads, kept = lib.grad(loss, has_aux=True)(perturbations, model, 3.0)
      return lib.as_pure(grads), lib.as_pure(kept), model

    for mode in programs.MODES.values():
      seen = []
      for lib in LIBRARIES:
        result, error = programs.outcome(
          lib, functools.partial(in_mode, lib, mode, program)
        )
        self.assertIsNone(error)
        seen.append(result)
      self.assertEqual(*seen)


class ErrorsTest(parameterized.TestCase):
  @parameterized.parameters(
    "split", "state", "graphdef", "clone", "iter_graph", "unpack", "flatten"
  )
  def test_shared_variables_are_named_with_the_ways_out(self, name):
    text = (
      f"`nnx.{name}` is in tree mode (`graph=False`), where nothing may be"
      " shared, but `node.again` and `node.w` are one `Param`. Give each place"
      " its own, by `nnx.clone`, or pass `graph=True`"
    )
    if hasattr(nnx.compat, name):
      text += f", or call `nnx.compat.{name}`"
    function = getattr(nnx.graphlib, name)
    with self.assertRaises(ValueError) as caught:
      function(programs.shared_variable(nnx), graph=False)
    self.assertEqual(str(caught.exception), text + ".")

  def test_what_a_shared_module_holds_is_named(self):
    with self.assertRaisesRegex(
      ValueError,
      "but `node.again.mean` and `node.child.mean` are one `BatchStat`",
    ):
      nnx.split(programs.shared_module(nnx), graph=False)

  def test_a_cycle_is_named(self):
    with self.assertRaisesRegex(
      ValueError,
      "may be no cycles, but `node.plain.parent` is `node` again. Remove the"
      " reference, or",
    ):
      nnx.split(programs.cycle(nnx), graph=False)

  def test_an_object_that_is_no_pytree_is_named(self):
    class Opaque(nnx.Pytree, pytree=False):
      pass

    node = programs.tree(nnx)
    node.opaque = Opaque()
    for function in (nnx.split, nnx.jit(lambda node: None, graph=False)):
      keywords = {"graph": False} if function is nnx.split else {}
      with self.assertRaisesRegex(
        ValueError,
        "objects must be pytrees, but `node.opaque` is a `Opaque`, which is"
        " none. Leave `pytree=False` out",
      ):
        function(node, **keywords)
    with self.assertRaisesRegex(ValueError, "`nnx.iter_children` is in tree"):
      list(nnx.iter_children(Opaque(), graph=False))

  @parameterized.parameters("values", "tree")
  def test_a_variable_of_an_argument_is_not_returned(self, mode):
    model = programs.tree(nnx)
    call = nnx.jit(lambda model: {"w": model.w}, **programs.MODES[mode])
    with self.assertRaisesRegex(
      ValueError,
      "the result must hold no Variable that the function did not make, but"
      r" `result.w` is the `Param` at `model.w`. Return its value or a copy"
      r" \(`nnx.clone`\), or pass `graph=True, graph_updates=True`, or call"
      " `nnx.compat.jit`",
    ):
      call(model)

  def test_a_variable_from_outside_is_not_returned(self):
    variable = nnx.Param(jnp.ones(2))
    call = nnx.jit(lambda: variable, graph_updates=False)
    with self.assertRaisesRegex(
      ValueError, "but `result` is a `Param` from outside of it. Return"
    ):
      call()

  @parameterized.parameters("values", "tree")
  def test_filters_are_refused_with_what_to_write(self, mode):
    arguments = programs.MODES[mode]
    axes = nnx.StateAxes({nnx.Param: 0, ...: None})
    for make in (
      functools.partial(nnx.vmap, in_axes=(axes,)),
      functools.partial(nnx.vmap, out_axes=axes),
      functools.partial(nnx.pmap, in_axes=(axes,)),
      functools.partial(nnx.scan, in_axes=(axes,), out_axes=0),
    ):
      with self.assertRaisesRegex(
        ValueError,
        r"must hold no filters, but has a `StateAxes`. Use"
        r" `nnx.prefix\(node, \{filter: entry, ...\}\)` in its place, or pass",
      ):
        make(lambda x: x, **arguments)
    sharding = nnx.StateSharding({...: jax.sharding.PartitionSpec()})
    with self.assertRaisesRegex(
      ValueError, "filters, but has a `StateSharding`"
    ):
      nnx.jit(lambda x: x, in_shardings=(sharding,), **arguments)
    select = nnx.DiffState(0, nnx.Param)
    for make in (
      functools.partial(nnx.grad, argnums=select),
      functools.partial(nnx.value_and_grad, argnums=select),
      functools.partial(nnx.custom_vjp, nondiff_argnums=(select,)),
    ):
      with self.assertRaisesRegex(
        ValueError,
        "is a whole Module, but got .*Select a part of the derivative, by",
      ):
        make(lambda x: x, **arguments)

  @parameterized.parameters(*LIBRARIES)
  def test_what_comes_from_outside_is_not_returned(self, lib):
    outside = programs.tree(lib)
    x = jnp.zeros(2)
    for transform in (
      lib.jit,
      functools.partial(lib.vmap, in_axes=0, out_axes=0),
      functools.partial(lib.scan, in_axes=0, out_axes=0),
    ):
      with self.assertRaises(ValueError):
        transform(lambda x: outside)(x)
    for run in (
      lambda f: lib.remat(f)(x),
      lambda f: lib.cond(True, f, f, x),
      lambda f: lib.switch(0, [f, f], x),
    ):
      copy = run(lambda x: outside)
      self.assertIsNot(copy, outside)
      for ours, theirs in zip(
        jax.tree.leaves(copy), jax.tree.leaves(outside), strict=True
      ):
        self.assertTrue((ours == theirs).all())

  def test_a_variable_that_was_not_given_is_named(self):
    outside = programs.tree(nnx)
    scan = functools.partial(nnx.scan, in_axes=0, out_axes=0)
    for transform in (nnx.jit, scan):
      with self.assertRaisesRegex(
        ValueError, "must hold no Variable that it was not given, but `result"
      ):
        transform(lambda x: outside)(jnp.zeros(2))

  @parameterized.product(
    option=("in_axes", "out_axes", "in_shardings", "out_shardings", "argnums"),
    lib=LIBRARIES,
  )
  def test_objects_are_no_prefixes(self, option, lib):
    transform = {"axes": "vmap", "shardings": "jit", "argnums": "grad"}
    name = transform[option.rpartition("_")[2]]
    # What is no argument number is a TypeError here.
    expected = TypeError if option == "argnums" and lib is nnx else ValueError
    with self.assertRaises(expected):
      getattr(lib, name)(lambda x: x, **{option: programs.tree(lib)})

  @parameterized.parameters("values", "tree")
  def test_variables_are_no_prefixes(self, mode):
    axes = jax.tree.map(lambda _: 0, programs.tree(nnx))
    with self.assertRaisesRegex(
      ValueError, "one entry for a whole Variable, but has a `BatchStat`"
    ):
      nnx.vmap(lambda x: x, in_axes=(axes,), **programs.MODES[mode])

  def test_prefixes_stand_for_filters(self):
    for mode in ("values", "tree"):
      model = programs.tree(nnx)
      axes = nnx.prefix(model, {nnx.Param: 0, ...: None})
      run = nnx.vmap(
        lambda model: model.w + model.mean.sum(),
        in_axes=(axes,),
        **programs.MODES[mode],
      )
      self.assertEqual(run(model).tolist(), [8.0, 9.0])

  @parameterized.parameters("values", "tree")
  def test_cached_partial_is_refused(self, mode):
    with self.assertRaisesRegex(
      ValueError, "works in graph mode with updates only.*Use `nnx.jit_partial`"
    ):
      nnx.cached_partial(lambda x: x, 1, **programs.MODES[mode])


if __name__ == "__main__":
  absltest.main()
