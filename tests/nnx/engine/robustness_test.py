"""What must not break the engine: odd inputs, re-entrancy, threads, cycles."""

import copy
import gc
import pickle
import resource
import sys
import threading
import tracemalloc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.engine import _engine
from tests.nnx.engine import graphs


class Model(nnx.Module):
  def __init__(self, n=3):
    self.layers = [nnx.Dict(w=nnx.Param(jnp.ones(2))) for _ in range(n)]
    self.count = nnx.Variable(jnp.zeros((), jnp.int32))
    self.name = "model"
    self.sizes = (1, 2)


# Graphdefs


def test_graphdef_is_equal_whatever_the_order_of_assignment():
  a, b = nnx.Dict(), nnx.Dict()
  a.x, a.y = nnx.Param(1), nnx.Param(2)
  b.y, b.x = nnx.Param(2), nnx.Param(1)
  assert nnx.graphdef(a) == nnx.graphdef(b)
  assert hash(nnx.graphdef(a)) == hash(nnx.graphdef(b))
  assert list(nnx.state(b)) == ["x", "y"]


@pytest.mark.parametrize(
  "change",
  [
    lambda m: setattr(m, "name", "other"),
    lambda m: setattr(m, "sizes", (1, True)),
    lambda m: setattr(m, "sizes", (1, 2.0)),
    lambda m: m.layers.append(1),
    lambda m: m.layers.reverse() or setattr(m.layers[0], "x", 1),
    lambda m: setattr(m.count, "axis", "a"),
    lambda m: setattr(m, "count", nnx.Param(m.count.value)),
    lambda m: m.layers.__setitem__(1, m.layers[0]),
    lambda m: vars(m).update(extra=nnx.Param(1)),
    lambda m: vars(m).pop("name"),
    lambda m: m.__dict__.__setitem__("name", None),
  ],
)
def test_graphdef_differs_after(change):
  model = Model()
  before = nnx.graphdef(model)
  structure, _, _ = _engine.flatten((model,))
  change(model)
  assert nnx.graphdef(model) != before
  assert not _engine.matches(structure, (model,))


def test_graphdef_is_no_leaf_and_static_under_jit():
  graphdef, state = nnx.split(Model())
  assert jax.tree.leaves(graphdef) == []

  @jax.jit
  def f(graphdef, state):
    return nnx.merge(graphdef, state).layers[0].w.value.sum()

  assert f(graphdef, state) == 2


def test_graphdef_pickles_with_hooks_and_marks():
  class_ = graphs.Node
  node = class_()
  node.a = nnx.static((1, "x"))
  node.b = nnx.data(3)
  node.c = graphs.Hooked(1)
  graphdef = nnx.graphdef(node)
  restored = pickle.loads(pickle.dumps(graphdef))
  assert restored == graphdef and hash(restored) == hash(graphdef)
  assert copy.deepcopy(graphdef) is graphdef
  assert type(restored) is nnx.graph.NodeDef


def test_a_pickle_names_no_type_of_the_engine():
  graphdef = nnx.graphdef(Model())
  data = pickle.dumps(graphdef)
  for name in (b"_engine", b"NodeRecord", b"NodeKind", b"HookFlags"):
    assert name not in data
  plain = tuple((str(record.kind), *record[1:]) for record in graphdef._records)
  assert nnx.graph.NodeDef._restore(plain, 1) == graphdef


@pytest.mark.parametrize("position", range(6))
def test_damaged_records_are_refused(position):
  graphdef = nnx.graphdef(Model())
  records = list(graphdef._records)
  good = records[position]
  replacements = [
    (*good[:1], 99, *good[2:]),
    (*good[:2], 99, *good[3:]),
    (*good[:3], good[3] + 1, *good[4:]),
    ("ref", 50, *good[2:]),
    ("object", good[1], good[2], good[3], None, None, None, False, False, 0),
    ("variable", good[1], good[2], good[3], int, None, None, False, False, 0),
    ("custom", 0, -1, 0, int, (), None, False, False, 0),
    ("state", -1, -1, 0, int, (), None, False, False, 0),
    ("nonsense", *good[1:]),
    (),
    None,
  ]
  for bad in replacements:
    records[position] = bad
    with pytest.raises((ValueError, TypeError)):
      nnx.graph.GraphDef._restore(tuple(records), 1)
  with pytest.raises(ValueError, match="must be those of a graph structure"):
    nnx.graph.NodeDef._restore(tuple(graphdef._records[:-1]), 1)
  with pytest.raises(ValueError, match="must be those of a graph structure"):
    nnx.graph.NodeDef._restore(graphdef._records, 2)


# Errors


class Odd:
  """Has no hash, and nothing to be seen in it."""

  __hash__ = None

  def __reduce_ex__(self, protocol):
    raise RuntimeError("no words")


def test_a_static_that_cannot_be_told_apart_raises_its_own_error():
  model = Model()
  model.layers[1].options = {"a": Odd()}
  with pytest.raises(RuntimeError, match="no words"):
    nnx.split(model)
  assert nnx.state(model)  # needs no hashes


def test_missing_state_names_its_path():
  graphdef, state = nnx.split(Model())
  del state.layers[1]["w"]
  with pytest.raises(ValueError, match=r"`layers\[1\].w` is missing"):
    nnx.merge(graphdef, state)


def test_extra_state_is_refused():
  graphdef, state = nnx.split(Model())
  state["more"] = nnx.Param(1)
  with pytest.raises(ValueError, match="must hold only what the graph has"):
    nnx.merge(graphdef, state)


def test_a_leaf_where_a_mapping_must_be_is_refused():
  graphdef, state = nnx.split(Model())
  state["layers"] = nnx.Param(1)
  with pytest.raises(ValueError, match="nested mapping at `layers`"):
    nnx.merge(graphdef, state)


def test_merge_wants_a_graphdef():
  with pytest.raises(TypeError, match="must be a graph structure"):
    nnx.merge(3, nnx.State({}))
  with pytest.raises(TypeError, match="must be given the states"):
    nnx.merge(nnx.graphdef(Model()))


def test_split_names_a_leaf_that_is_left():
  with pytest.raises(ValueError, match="none of them selects `count`"):
    nnx.split(Model(), nnx.Param)


def test_update_does_nothing_or_all():
  model = Model()
  with pytest.raises(ValueError, match=r"`layers\[0\].w`"):
    nnx.update(model, {"count": 5, "layers": {0: {"w": nnx.BatchStat(1)}}})
  assert model.count.value == 0
  with pytest.raises(ValueError, match="nested mapping at `layers`"):
    nnx.update(model, {"count": 5, "layers": 3})
  with pytest.raises(ValueError, match="is not there"):
    nnx.update(model, {"count": 5, "layers": {7: nnx.Param(1)}})
  assert model.count.value == 0


def test_update_of_an_array_in_a_tuple_is_refused():
  node = graphs.Node()
  node.a = nnx.Param(1)
  node.pair = (jnp.ones(1), 2)
  with pytest.raises(ValueError, match="which cannot change"):
    nnx.update(node, {"a": 5, "pair": {0: jnp.zeros(1)}})
  assert node.a.value == 1


def test_pop_from_a_sequence_is_refused():
  with pytest.raises(ValueError, match=r"`\[0\]` is in a sequence"):
    nnx.pop([nnx.Param(1)], nnx.Param)
  with pytest.raises(ValueError, match="at least one filter"):
    nnx.pop(Model())
  with pytest.raises(ValueError, match="it is one"):
    nnx.pop(nnx.Param(1), nnx.Param)


def test_attribute_names_that_are_no_names_are_refused():
  node = graphs.Node()
  vars(node)[(1, 2)] = 3
  with pytest.raises(TypeError, match="must be strings or ints"):
    nnx.split(node)


def test_a_custom_node_with_a_key_twice_is_refused():
  class Twice:
    pass

  nnx.register_graph_node_type(
    Twice, lambda x: ([("a", 1), ("a", 2)], None), *[None] * 4
  )
  with pytest.raises(ValueError, match="every key once"):
    nnx.split(Twice())
  with pytest.raises(ValueError, match="must be registered once"):
    nnx.register_graph_node_type(Twice, lambda x: ([], None), *[None] * 4)
  with pytest.raises(ValueError, match="know already"):
    nnx.register_graph_node_type(list, lambda x: ([], None), *[None] * 4)


@pytest.mark.parametrize(
  "result", [None, (1,), ([1], None), ([(1, 2, 3)], None)]
)
def test_a_custom_node_that_flattens_to_nonsense_is_refused(result):
  class Nonsense:
    pass

  nnx.register_graph_node_type(Nonsense, lambda x: result, *[None] * 4)
  with pytest.raises(TypeError, match="must return|not iterable"):
    nnx.split(Nonsense())


# Recursion


def _deep(depth, make):
  value = nnx.Param(1)
  for _ in range(depth):
    value = make(value)
  return value


@pytest.mark.parametrize(
  "make",
  [
    lambda x: [x],
    lambda x: (x,),
    lambda x: {"a": x},
    lambda x: nnx.Dict(a=x),
    lambda x: nnx.Param([x]),
    lambda x: graphs.Pair(x, 1),
    lambda x: nnx.State({"a": x}),
  ],
)
def test_deep_graphs_raise_recursion_errors(make):
  node = graphs.Node()
  node.a = _deep(100_000, make)
  for function in (nnx.split, nnx.state, nnx.clone, nnx.graphdef):
    with pytest.raises(RecursionError):
      function(node)
  with pytest.raises(RecursionError):
    _engine.flatten((node,))
  del node
  gc.collect()


def test_graphs_of_usual_depth_are_walked():
  node = graphs.Node()
  node.a = _deep(80, lambda x: nnx.Dict(a=[x]))
  graphdef, state = nnx.split(node)
  assert graphs.isomorphic(nnx.merge(graphdef, state), node, True)
  nnx.update(node, state)
  structure, _, _ = _engine.flatten((node,))
  assert _engine.matches(structure, (node,))
  assert pickle.loads(pickle.dumps(graphdef)) == graphdef


def test_cyclic_mappings_raise_recursion_errors():
  mapping = {}
  mapping["a"] = mapping
  for function in (
    lambda: _engine.split_mapping(mapping, (True,), False),
    lambda: _engine.merge_mappings(mapping),
    lambda: _engine.flatten_mapping(mapping),
  ):
    with pytest.raises(RecursionError):
      function()
  node = graphs.Node()
  node.a = node
  with pytest.raises(RecursionError):
    nnx.update(node, mapping)


def test_a_cycle_through_a_tuple_is_kept():
  node = graphs.Node()
  node.a = (node, [node])
  graphdef, state = nnx.split(node)
  merged = nnx.merge(graphdef, state)
  assert merged.a[0] is merged and merged.a[1][0] is merged
  items = []
  items.append((items,))
  node.b = items
  merged = nnx.clone(node)
  assert merged.b[0][0] is merged.b


# Python code that runs in the middle of a walk


class Evil:
  """A static value that changes the graph when it is hashed or compared."""

  def __init__(self, act):
    self.act = act

  def __hash__(self):
    self.act()
    return 1

  def __eq__(self, other):
    self.act()
    return isinstance(other, Evil)


def _evil_model(n=50):
  node = graphs.Node()

  def act():
    for name in list(vars(node)):
      if name.startswith("p"):
        del vars(node)[name]
    node.layers.clear()
    node.table.clear()
    gc.collect()

  node.layers = [nnx.Param(np.ones(i)) for i in range(n)]
  node.table = {f"k{i}": nnx.Param(np.ones(i)) for i in range(n)}
  for i in range(n):
    setattr(node, f"p{i}", nnx.Param(np.ones(i)))
  node.a = Evil(lambda: None)
  return node, act


@pytest.mark.parametrize(
  "function",
  [
    nnx.split,
    nnx.graphdef,
    nnx.state,
    nnx.clone,
    lambda n: _engine.flatten((n,)),
  ],
)
def test_a_hash_that_empties_the_graph(function):
  node, act = _evil_model()
  node.a.act = act
  try:
    function(node)
  except RuntimeError as e:
    assert "changed while it was walked" in str(e)


def test_an_equality_that_empties_the_graph():
  node, act = _evil_model()
  structure, _, _ = _engine.flatten((node,))
  other, other_act = _evil_model()
  other.a.act = other_act
  _engine.matches(structure, (other,))
  graphdef = nnx.graphdef(_evil_model()[0])
  other, other_act = _evil_model()
  second = nnx.graphdef(other)
  other.a.act = other_act
  assert graphdef == second


def test_a_filter_that_empties_the_graph():
  node, act = _evil_model()

  def select(path, leaf):
    if node.layers:
      act()
    return True

  assert nnx.state(node, select)
  mapping = {"a": {"b": nnx.Param(1), "c": nnx.Param(2)}, "d": nnx.Param(3)}

  def empty(path, leaf):
    mapping.clear()
    return True

  _engine.split_mapping(mapping, (empty,), False)


def test_a_custom_node_that_empties_the_graph():
  node, act = _evil_model()

  class Emptier:
    pass

  nnx.register_graph_node_type(
    Emptier,
    flatten=lambda x: act() or ([("w", nnx.Param(1))], None),
    set_key=lambda x, k, v: setattr(x, k, v),
    pop_key=lambda x, k: x.__dict__.pop(k),
    create_empty=lambda m: Emptier(),
    clear=lambda x: x.__dict__.clear(),
  )
  node.b = Emptier()
  graphdef, state = nnx.split(node)
  assert nnx.merge(graphdef, state).b.w.value == 1


def test_a_finaliser_that_empties_the_graph():
  node, act = _evil_model()

  class Finaliser:
    def __del__(self):
      act()

  # A cycle that the collector meets in the allocations of the walk.
  threshold = gc.get_threshold()
  gc.set_threshold(1, 1, 1)
  try:
    for _ in range(20):
      trap = Finaliser()
      trap.trap = trap
      del trap
      try:
        nnx.split(node)
      except RuntimeError as e:
        assert "changed while it was walked" in str(e)
      node, act = _evil_model()
  finally:
    gc.set_threshold(*threshold)


def test_a_hash_that_raises():
  node = graphs.Node()
  node.a = Evil(lambda: 1 / 0)
  with pytest.raises(ZeroDivisionError):
    nnx.split(node)
  node.a.act = lambda: None
  graphdef = nnx.graphdef(node)
  structure, _, _ = _engine.flatten((node,))
  node.a.act = lambda: 1 / 0
  with pytest.raises(ZeroDivisionError):
    _engine.matches(structure, (node,))
  other = graphs.Node()
  other.a = Evil(lambda: None)
  with pytest.raises(ZeroDivisionError):
    assert graphdef == nnx.graphdef(other)


def test_deleting_variables_while_iterating():
  model = Model(10)
  for path, _ in nnx.iter_graph(model):
    if path and path[0] == "layers":
      model.layers.clear()
      gc.collect()


# Garbage


def _gone(make):
  """Whether what `make` returns is collected with the cycle that it is in."""
  ref = weakref.ref(make())
  gc.collect()
  return ref() is None


def test_cycles_through_objects_are_collected():
  def cycle():
    node = graphs.Node()
    node.itself = node
    node.variable = nnx.Param([node])
    return node

  assert _gone(cycle)

  def variable():
    p = nnx.Param(None, note=[])
    p.raw_value = [p]
    p.get_metadata("note").append(p)
    return p

  assert _gone(variable)


def test_cycles_through_graphdefs_are_collected():
  class Key:
    pass

  def cycle():
    node = graphs.Node()
    key = node.key = Key()
    key.graphdef = nnx.graphdef(node)
    return key

  assert _gone(cycle)


def test_classes_are_collected():
  def make():
    class Local(nnx.Module):
      def __init__(self):
        self.w = nnx.Param(1)

    nnx.merge(*nnx.split(Local()))
    nnx.clone(Local())
    # jax's registry of pytrees keeps the classes that it knows; this one is
    # looked at by its entry in the engine alone.
    return Local

  make()

  class Static:
    pass

  def plain():
    class Attribute:
      pass

    node = graphs.Node()
    node.a = Attribute()
    nnx.split(node)
    return Attribute

  assert _gone(plain)


def test_jitted_functions_are_collected():
  def make():
    model = Model()

    def f(x):
      assert model is not x
      return x.layers[0].w.value

    jitted = nnx.jit(f)
    jitted(Model())
    model.jitted = jitted
    return model

  ref = weakref.ref(make())
  jax.clear_caches()
  gc.collect()
  assert ref() is None


def _rss_mb():
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize(
  "name, calls",
  [
    ("split", 20_000),
    ("merge", 20_000),
    ("update", 100_000),
    ("state", 20_000),
    ("clone", 20_000),
    ("pop", 20_000),
    ("jit", 100_000),
    ("graphdef", 20_000),
    ("mappings", 20_000),
    ("failures", 20_000),
  ],
)
def test_no_memory_is_lost(name, calls):
  model = Model(2)
  graphdef, state = nnx.split(model)
  add = nnx.jit(_add_one)
  add(model)
  bad = nnx.State({"count": 1, "layers": 2})

  def fail():
    for function in (
      lambda: nnx.merge(graphdef, bad),
      lambda: nnx.update(model, bad),
      lambda: nnx.split(model, nnx.Param),
    ):
      try:
        function()
      except ValueError:
        pass

  def pop():
    model.seen = nnx.Intermediate(1)
    nnx.pop(model, nnx.Intermediate)

  call = {
    "split": lambda: nnx.split(model, nnx.Param, ...),
    "merge": lambda: nnx.merge(graphdef, state, copy=True),
    "update": lambda: nnx.update(model, state),
    "state": lambda: nnx.state(model, nnx.Param),
    "clone": lambda: nnx.clone(model),
    "graphdef": lambda: nnx.graphdef(model),
    "pop": pop,
    "jit": lambda: add(model),
    "mappings": lambda: nnx.State.merge(*state.split(nnx.Param, ...)),
    "failures": fail,
  }[name]
  for _ in range(500):
    call()
  gc.collect()
  objects, memory = len(gc.get_objects()), _rss_mb()
  for _ in range(calls):
    call()
  gc.collect()
  assert len(gc.get_objects()) - objects < 200
  assert _rss_mb() - memory < 24
  tracemalloc.start()
  try:
    for _ in range(50):
      call()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(500):
      call()
    gc.collect()
    assert tracemalloc.get_traced_memory()[0] - before < 20_000
  finally:
    tracemalloc.stop()


def _add_one(model):
  model.count.value += 1


# Threads


def test_threads_walk_different_models():
  errors = []

  def work(seed):
    try:
      model = Model(seed + 1)
      add = nnx.jit(_add_one)
      for _ in range(200):
        graphdef, state = nnx.split(model)
        assert graphs.isomorphic(nnx.merge(graphdef, state), model, True)
        add(model)
      assert model.count.value == 200
    except BaseException as e:
      errors.append(e)

  interval = sys.getswitchinterval()
  sys.setswitchinterval(1e-5)
  try:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  finally:
    sys.setswitchinterval(interval)
  assert not errors


def test_threads_share_one_jitted_function():
  def double(model, x):
    return model.layers[0].w.value * x

  jitted = nnx.jit(double)
  models = [Model(i + 1) for i in range(4)]
  errors = []

  def work(model):
    try:
      for i in range(100):
        np.testing.assert_allclose(jitted(model, float(i)), [i, i])
    except BaseException as e:
      errors.append(e)

  threads = [threading.Thread(target=work, args=(m,)) for m in models]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not errors
  assert jitted._cache_size() == 4


# Traces


def test_no_trace_leaks():
  with jax.checking_leaks():
    model = Model()
    nnx.jit(_add_one)(model)
    nnx.jit(_add_one)(model)
    assert model.count.value == 2

    @jax.jit
    def f(graphdef, state):
      model = nnx.merge(graphdef, state)
      model.count.value += 1
      nnx.clone(model)
      return nnx.split(model)

    graphdef, state = f(*nnx.split(model))
    assert nnx.merge(graphdef, state).count.value == 3


def test_an_update_from_another_trace_is_refused():
  model = Model()

  @jax.jit
  def f(x):
    nnx.update(model, {"count": x})

  with pytest.raises(nnx.TraceContextError, match="different trace level"):
    f(1)
  assert model.count.value == 0
