"""The graph functions against those of flax.nnx, and their own promises."""

import functools

import flax.nnx as flax_nnx
from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.engine import graphs

PROPERTY = settings(derandomize=True, deadline=None, max_examples=60)


def build(lib, spec, pool):
  """A graph of the objects of one library; `pool` holds what can be shared."""
  kind, *rest = spec
  if kind == "shared":
    return pool[rest[0] % len(pool)] if pool else None
  if kind == "static":
    return rest[0]
  if kind == "array":
    return np.full((2,), rest[0], np.float32)
  if kind == "variable":
    made = getattr(lib, rest[0])(np.full((2,), rest[1], np.float32))
    pool.append(made)
    return made
  if kind == "list":
    return lib.List([build(lib, item, pool) for item in rest[0]])
  made = lib.Dict()
  pool.append(made)
  for name, item in rest[0]:
    value = build(lib, item, pool)
    setattr(made, name, value)
  return made


LEAF_SPECS = st.one_of(
  st.tuples(st.just("shared"), st.integers(0, 5)),
  st.tuples(st.just("static"), st.sampled_from([1, "relu", 0.5])),
  st.tuples(st.just("array"), st.integers(0, 3)),
  st.tuples(
    st.just("variable"),
    st.sampled_from(["Param", "BatchStat", "Variable"]),
    st.integers(0, 9),
  ),
)
SPECS = st.recursive(
  LEAF_SPECS,
  lambda inner: st.one_of(
    st.tuples(st.just("list"), st.lists(inner, max_size=3)),
    st.tuples(
      st.just("dict"),
      st.lists(
        st.tuples(graphs.NAMES, inner), max_size=4, unique_by=lambda x: x[0]
      ),
    ),
  ),
  max_leaves=10,
)
ROOTS = st.tuples(
  st.just("dict"),
  st.lists(
    st.tuples(graphs.NAMES, SPECS),
    min_size=1,
    max_size=5,
    unique_by=lambda x: x[0],
  ),
)


def flat(lib, state):
  """Paths, kinds and values of a State."""
  return [
    (
      path,
      type(leaf).__name__ if isinstance(leaf, lib.Variable) else None,
      np.asarray(
        leaf[...] if isinstance(leaf, lib.Variable) else leaf
      ).tolist(),
    )
    for path, leaf in lib.to_flat_state(state)
  ]


def _filters(names, lib):
  """The filters of one library that have these names."""
  if names is ... or isinstance(names, str):
    return names if names is ... else getattr(lib, names)
  return type(names)(_filters(name, lib) for name in names)


@PROPERTY
@given(ROOTS)
def test_state_and_split_are_those_of_flax(spec):
  ours, theirs = build(nnx, spec, []), build(flax_nnx, spec, [])
  assert flat(nnx, nnx.state(ours)) == flat(flax_nnx, flax_nnx.state(theirs))
  for names in (["Param", ...], [("Param", "BatchStat"), "Variable", ...]):
    of = functools.partial(_filters, names)
    graphdef, *parts = nnx.split(ours, *of(nnx))
    _, *flax_parts = flax_nnx.split(theirs, *of(flax_nnx))
    for part, flax_part in zip(parts, flax_parts, strict=True):
      assert flat(nnx, part) == flat(flax_nnx, flax_part)
    selected = nnx.state(ours, *of(nnx)[:1])
    flax_selected = flax_nnx.state(theirs, *of(flax_nnx)[:1])
    assert flat(nnx, selected) == flat(flax_nnx, flax_selected)


@PROPERTY
@given(ROOTS)
def test_walks_are_those_of_flax(spec):
  ours, theirs = build(nnx, spec, []), build(flax_nnx, spec, [])

  def seen(lib, node):
    return [
      (path, type(value).__name__)
      for path, value in lib.iter_graph(node)
      if not _is_internal(path)
    ]

  assert seen(nnx, ours) == seen(flax_nnx, theirs)
  assert nnx.find_duplicates(ours) == flax_nnx.find_duplicates(theirs)
  if nnx.find_duplicates(ours):
    return  # both refuse cycles, and Flax maps shared lists twice
  visited = {nnx: [], flax_nnx: []}
  for lib, node in ((nnx, ours), (flax_nnx, theirs)):

    def visit(path, x, paths=visited[lib]):
      paths.append(path)
      return x

    lib.recursive_map(visit, node)
  assert visited[nnx] == [
    path for path in visited[flax_nnx] if not _is_internal(path)
  ]


def _is_internal(path):
  """Whether a path leads to what Flax's own objects keep for themselves."""
  return bool(path) and str(path[-1]).startswith("_")


@PROPERTY
@given(ROOTS, st.integers(0, 9))
def test_update_is_that_of_flax(spec, n):
  ours, theirs = build(nnx, spec, []), build(flax_nnx, spec, [])
  for lib, node in ((nnx, ours), (flax_nnx, theirs)):
    new = jax.tree.map(lambda x: np.full_like(x, n), lib.state(lib.clone(node)))
    lib.update(node, new)
  assert flat(nnx, nnx.state(ours)) == flat(flax_nnx, flax_nnx.state(theirs))


@PROPERTY
@given(ROOTS, st.sampled_from(["Param", "arrays", "all"]))
def test_pop_is_that_of_flax(spec, what):
  ours, theirs = build(nnx, spec, []), build(flax_nnx, spec, [])
  if any(
    isinstance(key, int)
    for path, _ in nnx.state(ours).flat_state()
    for key in path
  ):
    return

  def selected(lib):
    if what == "arrays":
      return lambda path, x: not isinstance(x, lib.Variable)
    return lib.Param if what == "Param" else ...

  popped = nnx.pop(ours, selected(nnx))
  flax_popped = flax_nnx.pop(theirs, selected(flax_nnx))
  assert flat(nnx, popped) == flat(flax_nnx, flax_popped)
  assert flat(nnx, nnx.state(ours)) == flat(flax_nnx, flax_nnx.state(theirs))


# Roots


@pytest.mark.parametrize(
  "make",
  [
    lambda: nnx.Param(jnp.ones(2)),
    lambda: (nnx.Param(1), [nnx.Dict(a=nnx.Param(2))]),
    lambda: {"b": nnx.Dict(a=nnx.Param(2)), 1: nnx.BatchStat(3)},
    lambda: nnx.State({"a": {"b": nnx.Param(1)}}),
    lambda: graphs.Pair(nnx.Param(1), 2),
    lambda: graphs.Point(nnx.Param(1), np.ones(1)),
    lambda: jnp.ones(2),
    lambda: 3,
    lambda: None,
    list,
  ],
)
def test_any_root_is_split_and_merged(make):
  root = make()
  graphdef, state = nnx.split(root)
  assert graphs.isomorphic(nnx.merge(graphdef, state), root, True)
  assert graphs.isomorphic(nnx.clone(root), root)
  graphdef, params, rest = nnx.split(root, nnx.Param, ...)
  assert graphs.isomorphic(nnx.merge(graphdef, params, rest), root, True)


def test_the_state_of_a_variable_is_it_itself():
  p = nnx.Param(jnp.ones(2))
  assert nnx.state(p) is p
  graphdef, params, rest = nnx.split(p, nnx.Param, ...)
  assert params is p and len(rest) == 0
  nnx.update(p, jnp.zeros(2))
  assert (p.value == 0).all()
  nnx.update(p, nnx.State({}), nnx.Param(jnp.ones(2)))
  assert (p.value == 1).all()
  with pytest.raises(ValueError, match="must be one leaf"):
    nnx.merge(graphdef, p, p)


# States in all forms


def test_merge_takes_states_in_every_form():
  model = nnx.Dict(a=nnx.Param(1.0, axis="x"), b=nnx.Dict(c=nnx.BatchStat(2.0)))
  graphdef, state = nnx.split(model)
  forms = {
    "State": state,
    "pure dict": nnx.to_pure_dict(state),
    "dict of Variables": state.raw_mapping,
    "FlatState": state.flat_state(),
    "list": [leaf for _, leaf in state.flat_state()],
    "list of values": [1.0, 2.0],
    "State of arrays": nnx.as_pure(state),
  }
  for name, form in forms.items():
    merged = nnx.merge(graphdef, form)
    assert merged.a.value == 1.0 and merged.b.c.value == 2.0, name
    assert merged.a.axis == "x" and type(merged.b.c) is nnx.BatchStat, name
  with pytest.raises(ValueError, match="must hold the 2 leaves of the graph"):
    nnx.merge(graphdef, [1.0])
  kept = nnx.merge(graphdef, [5.0, 6.0], recreate_variables=False)
  assert kept.a == 5.0


def test_update_takes_states_in_every_form():
  def fresh():
    return nnx.Dict(a=nnx.Param(0.0), b=nnx.Dict(c=nnx.BatchStat(0.0)))

  source = nnx.state(
    nnx.Dict(a=nnx.Param(1.0), b=nnx.Dict(c=nnx.BatchStat(2.0)))
  )
  for form in (
    (source,),
    (nnx.to_pure_dict(source),),
    source.split(nnx.Param, ...),
    (source.flat_state(),),
    ({"a": 1.0}, {"b": {"c": 2.0}}),
    nnx.unpack(nnx.merge(nnx.graphdef(fresh()), source), nnx.Param, ...),
  ):
    model = fresh()
    nnx.update(model, *form)
    assert model.a.value == 1.0 and model.b.c.value == 2.0


def test_update_adds_what_is_new_as_a_copy():
  model = nnx.Dict(a=nnx.Param(1))
  b = nnx.Param(2)
  nnx.update(model, {"b": b})
  assert model.b.value == 2 and model.b is not b


def test_update_takes_over_metadata_and_hooks():
  model = nnx.Dict(a=nnx.Param(1))
  nnx.update(model, {"a": nnx.Param(2, axis="x", on_get_value=lambda v, x: -x)})
  assert model.a.value == -2 and model.a.axis == "x"
  nnx.update(model, {"a": nnx.Param(3)})
  assert model.a.value == 3 and not model.a.has_metadata("axis")


def test_filters_must_end_with_an_ellipsis():
  model = nnx.Dict(a=nnx.Param(1))
  for function in (nnx.split, nnx.state, nnx.pop):
    with pytest.raises(ValueError, match="`...`"):
      function(model, ..., nnx.Param)


def test_clone_of_arrays_has_its_own():
  model = nnx.Dict(a=nnx.Param(jnp.ones(2)))
  assert nnx.clone(model).a.raw_value is model.a.raw_value
  pointer = nnx.clone(model, arrays=True).a.raw_value.unsafe_buffer_pointer()
  assert pointer != model.a.raw_value.unsafe_buffer_pointer()
  with pytest.raises(ValueError, match="variables=False"):
    nnx.clone(model, variables=False, arrays=True)


# Calls


class Counter(nnx.Module):
  def __init__(self):
    self.count = nnx.Variable(jnp.zeros((), jnp.int32))
    self.step = 1

  def __call__(self, x):
    self.count.value += self.step
    return x + self.count.value

  def reset(self):
    self.count.value = jnp.zeros((), jnp.int32)


def test_call_names_methods_by_attributes_and_items():
  nodes = {"a": [Counter()], "b": Counter()}
  state = nnx.split(nodes)
  y, state = jax.jit(lambda state, x: nnx.call(state)["a"][0](x))(state, 1)
  _, state = nnx.call(state)["b"].reset()
  nodes = nnx.merge(*state)
  assert y == 2 and nodes["a"][0].count.value == 1
  graphdef, *states = nnx.split(Counter(), nnx.Variable)
  y, (graphdef, _) = graphdef.apply(*states)(1)
  assert y == 2 and graphdef == nnx.graphdef(Counter())


def test_graph_states_are_mappings_and_pytrees():
  packed = nnx.unpack(Counter())
  doubled = jax.tree.map(lambda x: x + 2, packed)
  assert nnx.merge(doubled).count.value == 2
  assert list(doubled) == ["count"] and "count" in doubled
  assert jax.jit(lambda p: nnx.merge(p)(1))(doubled) == 4
  with pytest.raises(ValueError, match="must be a `State`"):
    nnx.unpack(nnx.Param(1))
  with pytest.raises(ValueError, match="graphdefs differ"):
    nnx.merge(packed, nnx.unpack(nnx.Dict()))
  with pytest.raises(ValueError, match="must be `GraphState`s"):
    nnx.merge(packed, nnx.State({}))


# cached_partial


def test_cached_partial_writes_to_the_original():
  counter = Counter()
  step = nnx.cached_partial(nnx.jit(lambda c, x: c(x)), counter)
  assert [int(step(1)) for _ in range(3)] == [2, 3, 4]
  assert counter.count.value == 3
  counter.count.value = jnp.asarray(10)
  assert step(1) == 12


def test_cached_partial_shows_the_compiled_function():
  step = nnx.cached_partial(nnx.jit(lambda c, x: c(x)), Counter())
  step(1.0)
  assert step.jitted_fn._cache_size() == 1


def test_cached_partial_keeps_what_arguments_share():
  counter = Counter()

  @nnx.jit
  def step(a, b, x):
    assert a is b
    return a(x)

  assert nnx.cached_partial(step, counter, counter)(1) == 2
  assert counter.count.value == 1


def test_cached_partial_does_not_see_later_changes_of_structure():
  counter = Counter()
  step = nnx.cached_partial(nnx.jit(lambda c, x: c(x)), counter)
  counter.step = 100
  assert step(1) == 2


def test_cached_partial_refuses_changes_of_structure():
  @nnx.jit
  def step(counter):
    counter.extra = nnx.Param(jnp.ones(1))

  with pytest.raises(ValueError, match="must leave the structure"):
    nnx.cached_partial(step, Counter())()

  @nnx.jit
  def sow_and_pop(counter):
    counter.sow(nnx.Intermediate, "x", 1)
    return nnx.pop(counter, nnx.Intermediate)["x"].value

  assert nnx.cached_partial(sow_and_pop, Counter())() == (1,)


# Contexts and trees


def test_split_contexts_share_references():
  shared = nnx.Param(jnp.ones(1))
  a, b = nnx.Dict(p=shared), nnx.Dict(p=shared, a=[shared])
  b.itself = b
  with nnx.split_context() as ctx:
    first, second = ctx.split(a), ctx.split(b, nnx.Param, ...)
    third = ctx.split(a)
  assert [len(state) for state in second[1:]] == [0, 0]
  with nnx.merge_context() as ctx:
    new_a = ctx.merge(*first)
    new_b = ctx.merge(*second)
    assert ctx.merge(*third) is new_a
  assert new_b.p is new_a.p is new_b.a[0] and new_b.itself is new_b
  with nnx.merge_context() as ctx:
    with pytest.raises(ValueError, match="of earlier splits of its context"):
      ctx.merge(*second)
  with pytest.raises(ValueError, match="of earlier splits of its context"):
    nnx.merge(*second)


def test_update_context_does_to_the_originals_what_was_done_inside():
  traces = []

  @jax.jit
  def inside(graphdef, state):
    traces.append(1)
    with nnx.merge_context("t", inner=True) as ctx:
      model = ctx.merge(graphdef, state)
    model.count.value += 1
    model.new = nnx.Param(jnp.ones(2))
    model.alias = model.count
    model.itself = model
    del model.old
    with nnx.split_context("t") as ctx:
      return ctx.split(model)

  @nnx.update_context("t")
  def step(model):
    with nnx.split_context("t") as ctx:
      graphdef, state = ctx.split(model)
    graphdef, state = inside(graphdef, state)
    with nnx.merge_context("t", inner=False) as ctx:
      return ctx.merge(graphdef, state)

  for _ in range(3):
    model = Counter()
    model.old = 1
    count = model.count
    assert step(model) is model
    assert model.count is count is model.alias and count.value == 1
    assert model.itself is model and not hasattr(model, "old")
    assert model.new.shape == (2,)
  assert len(traces) == 1
  with pytest.raises(ValueError, match="must be an `nnx.update_context`"):
    nnx.current_update_context("t")
  with pytest.raises(ValueError, match="`inner` must say"):
    with nnx.update_context("t"), nnx.merge_context("t"):
      pass


def test_trees_keep_references_and_prefixes():
  counter = Counter()
  tree = nnx.to_tree({"a": counter, "b": [counter, 3]})
  assert jax.tree.leaves(tree)[-1] == 3
  restored = nnx.from_tree(jax.tree.map(lambda x: x, tree))
  assert restored["a"] is restored["b"][0]
  seen = []

  def split_fn(ctx, path, prefix, leaf):
    seen.append((jax.tree_util.keystr(path), prefix))
    return nnx.NodeStates.from_split(*ctx.split(leaf), metadata=prefix)

  nnx.to_tree((counter, [Counter()]), prefix=(0, None), split_fn=split_fn)
  assert seen == [("[0]", 0), ("[1][0]", None)]
  with pytest.raises(ValueError, match="must hold `NodeStates` at"):
    nnx.from_tree([1], map_non_graph_nodes=True)


def test_a_prefix_says_one_thing_of_a_shared_variable():
  counter = Counter()
  both = (counter, 1, {"b": [counter.count]})
  nnx.to_tree(both, prefix=(0, None, 0))
  nnx.to_tree(both, prefix=None)
  nnx.to_tree(both, prefix=(0, None, 1), check_aliasing=False)
  axes = nnx.StateAxes({nnx.PathContains("count"): 1, ...: 0})
  nnx.to_tree(both, prefix=(axes, None, 1))
  with pytest.raises(
    ValueError,
    match=r"`tree\[0\]\.count` and `tree\[2\]\['b'\]\[0\]` has both 0 and 1",
  ):
    nnx.to_tree(both, prefix=(0, None, 1))


@pytest.mark.parametrize("graph", (True, False))
def test_a_number_alone_is_a_leaf(graph):
  for leaf in (42, 1.5, "text", np.float32(2)):
    graphdef, state = nnx.split(leaf, graph=graph)
    assert state is leaf
    assert nnx.merge(graphdef, 3) == 3
    assert nnx.state(leaf, graph=graph) is leaf
    assert nnx.clone(leaf, graph=graph) == leaf
  assert nnx.split([42])[1] == nnx.State({})


def test_flatten_continues_the_numbers_of_earlier_calls():
  p = nnx.Param(1.0)
  refs, index = nnx.graph.RefMap(), nnx.graph.IndexMap()
  first, leaves = nnx.graph.flatten([p], ref_index=refs)
  second, rest = nnx.graph.flatten({"a": p}, ref_index=refs)
  assert len(refs) == 3 and len(rest) == 0
  a = nnx.graph.unflatten(first, leaves, index_ref=index)
  b = nnx.graph.unflatten(second, rest, index_ref=index)
  assert a[0] is b["a"] is p and len(index) == 3


# Maps


def test_recursive_map_shares_variables_and_maps_once():
  counter = Counter()
  calls = []

  def visit(path, x):
    calls.append(path)
    return x + 1 if type(x) is int else x

  a, b = nnx.recursive_map(visit, [counter, counter])
  assert a is b is not counter and a.count is counter.count
  assert a.step == 2 and counter.step == 1
  assert calls == [(0, "count"), (0, "step"), (0,), ()]
  assert nnx.recursive_map(visit, (1, (2,))) == (2, (3,))
  counter.itself = counter
  with pytest.raises(ValueError, match="must have no cycle"):
    nnx.recursive_map(visit, counter)


def test_map_takes_variables_and_values():
  model = nnx.Dict(a=nnx.Param(1.0), b=np.ones(2))
  new = nnx.map(lambda path, x: x * 2, model)
  assert new.a.value == 2.0 and isinstance(new.a, nnx.Param)
  assert new.b.tolist() == [2.0, 2.0] and model.a.value == 1.0


def test_with_vars_refuses_shared_variables():
  p = nnx.Param(jnp.ones(2))
  with pytest.raises(ValueError, match="must not be shared"):
    nnx.with_vars([p, p], ref=True)
  first, second = nnx.with_vars([p, p], ref=True, allow_duplicates=True)
  assert first is second and first.ref
  assert nnx.vars_as(first, ref=False).ref is False


def test_custom_nodes_update_pop_and_go_through_jit():
  box = graphs.Box()
  box.contents = {"a": nnx.Param(jnp.ones(1)), "b": jnp.zeros(1), "c": "static"}
  nnx.update(box, {"b": jnp.ones(1), "a": jnp.zeros(1)})
  assert box.contents["b"] == 1 and box.contents["a"].value == 0

  @nnx.jit
  def step(box):
    box.contents["a"].value += 1
    box.contents["d"] = "new"
    return box

  assert step(box) is box
  assert box.contents["a"].value == 1 and box.contents["d"] == "new"
  assert nnx.pop(box, nnx.Param)["a"].value == 1
  assert "a" not in box.contents
