"""The engine against the reference in Python, on random graphs."""

import collections.abc
import copy
import dataclasses
import functools
import pickle
import types
import typing

from hypothesis import given, settings
from hypothesis import strategies as st
import numpy as np
import pytest

import nnx
from nnx.engine import _engine
from nnx.graphlib import reference
from tests.nnx.engine import graphs

PROPERTY = settings(derandomize=True, deadline=None, max_examples=120)


def assert_records_equal(given, expected):
  assert len(given) == len(expected)
  for a, b in zip(given, expected):
    assert a == b


@PROPERTY
@given(graphs.graphs())
def test_flatten_is_that_of_the_reference(graph):
  records, leaves, objects = reference.flatten(graph)
  graphdef, found = nnx.graph.flatten(graph)
  assert_records_equal(graphdef._records, records)
  assert graphdef.num_leaves == len(leaves)
  assert graphdef.num_nodes == len(objects)


@PROPERTY
@given(graphs.graphs())
def test_flatten_of_arguments_is_that_of_the_reference(graph):
  arguments = (graph, [graph, 1], {"b": 2, "a": (graph,)})
  structure, leaves, objects = _engine.flatten(arguments)
  walk = reference.Flattener()
  for argument in arguments:
    walk.add(argument, attributes=False)
  assert_records_equal(structure._records, walk.records)
  assert all(a is b for a, b in zip(leaves, walk.leaves, strict=True))
  assert all(a is b for a, b in zip(objects, walk.objects, strict=True))


@PROPERTY
@given(graphs.graphs())
def test_unflatten_is_that_of_the_reference(graph):
  structure, leaves, _ = _engine.flatten((graph,))
  (ours,), _ = _engine.unflatten(structure, leaves)
  walk = reference.Flattener()
  walk.add(graph, attributes=False)
  theirs = reference.unflatten(walk.records, walk.leaves)
  assert graphs.isomorphic(ours, theirs)
  assert graphs.isomorphic(ours, graph)


@PROPERTY
@given(graphs.graphs())
def test_merge_is_the_inverse_of_split(graph):
  graphdef, state = nnx.split(graph)
  merged = nnx.merge(graphdef, state)
  assert graphs.isomorphic(merged, graph, shares_variables=True)
  copied = nnx.merge(graphdef, state, copy=True)
  assert graphs.isomorphic(copied, graph)
  assert nnx.graphdef(merged) == nnx.graphdef(copied) == graphdef
  assert hash(nnx.graphdef(merged)) == hash(graphdef)


@PROPERTY
@given(graphs.graphs())
def test_clone_keeps_references(graph):
  assert graphs.isomorphic(nnx.clone(graph), graph)
  assert graphs.isomorphic(
    nnx.clone(graph, variables=False), graph, shares_variables=True
  )


@PROPERTY
@given(graphs.graphs())
def test_split_by_filters_covers_the_state(graph):
  state = nnx.state(graph)
  graphdef, *parts = nnx.split(
    graph, nnx.Param, lambda path, x: len(path) > 2, ...
  )
  joined = nnx.State.merge(*parts)
  assert joined.flat_state().paths == state.flat_state().paths
  for a, b in zip(joined.flat_state().leaves, state.flat_state().leaves):
    assert a is b
  assert graphs.isomorphic(
    nnx.merge(graphdef, *parts), graph, shares_variables=True
  )


@PROPERTY
@given(graphs.graphs())
def test_graphdefs_pickle_and_copy(graph):
  graphdef = nnx.graphdef(graph)
  copies = [pickle.loads(pickle.dumps(graphdef))] if _pickles(graph) else []
  copies += [copy.copy(graphdef), copy.deepcopy(graphdef)]
  for other in copies:
    assert other == graphdef
    assert hash(other) == hash(graphdef)
    assert_records_equal(other._records, graphdef._records)


def _pickles(graph):
  return not any(
    record.kind == "pytree" for record in nnx.graphdef(graph)._records
  )


@PROPERTY
@given(graphs.graphs())
def test_a_known_structure_matches_itself_alone(graph):
  structure, _, _ = _engine.flatten((graph,))
  assert _engine.matches(structure, (graph,))
  assert _engine.matches(structure, (nnx.clone(graph),))
  graph.one_more = 1
  assert not _engine.matches(structure, (graph,))


@PROPERTY
@given(graphs.graphs(), st.data())
def test_any_change_of_a_static_or_reference_is_seen(graph, data):
  structure, _, _ = _engine.flatten((graph,))
  owners = [
    node
    for _, node in nnx.iter_graph(graph)
    if isinstance(node, (nnx.Pytree, list, dict)) and len(_items(node))
  ]
  if not owners:
    return
  owner = data.draw(st.sampled_from(owners))
  key = data.draw(st.sampled_from([key for key, _ in _items(owner)]))
  contents = vars(owner) if isinstance(owner, nnx.Pytree) else owner
  contents[key] = "changed"
  assert not _engine.matches(structure, (graph,))


def _items(node):
  return _engine.items(node)


def test_a_plan_says_which_output_each_leaf_is():
  node = nnx.Dict(a=nnx.Param(1.0), b=nnx.Param(2.0))
  flattened = _engine.flatten((node,))
  copies = _engine.unflatten(flattened.structure, flattened.leaves)
  copies.values[0].b.value = 3.0
  packed = _engine.pack(
    flattened.structure, copies.objects, flattened.leaves, 4.0
  )
  plan = packed.plan
  assert packed.outputs == (3.0, 4.0)
  assert plan.output_of == (-1, 0, 1)  # of `a`, `b` and the result
  assert plan.matches == (0, 1)
  (write,) = plan.writes
  assert flattened.objects[write.index] is node.b and write.output == 0


def test_records_have_names_and_members_of_enums():
  root, *_, variable = nnx.graphdef([1, graphs.Hooked(2)])._records
  assert root.kind is _engine.NodeKind.LIST and root.children == 2
  assert variable.kind is _engine.NodeKind.VARIABLE
  assert isinstance(variable.hook_flags, _engine.HookFlags)
  assert variable.hook_flags and variable.leaf == 0


@PROPERTY
@given(graphs.graphs())
def test_a_jitted_identity_changes_nothing(graph):
  def seen():
    return [id(x) for _, x in nnx.iter_graph(graph)]

  before, values = seen(), [x for _, x in nnx.state(graph).flat_state()]
  values = [nnx.as_pure(x) for x in values]
  structure, leaves, objects = _engine.flatten((graph,))
  copies, inner = _engine.unflatten(structure, leaves)
  packed = _engine.pack(structure, inner, leaves, None)
  assert packed.plan.writes == ()
  assert _engine.apply(packed, objects, leaves) is None
  assert seen() == before
  for value, (_, x) in zip(values, nnx.state(graph).flat_state()):
    assert graphs.isomorphic(value, nnx.as_pure(x))


def _draw_change(graph, data):
  """Returns a function that does to a graph what a lifted function may do."""
  nodes = st.sampled_from(range(len(_nodes(graph))))
  steps = data.draw(
    st.lists(
      st.tuples(
        st.sampled_from(["static", "variable", "share", "delete", "write"]),
        nodes,
        nodes,
        graphs.NAMES,
      ),
      max_size=4,
    )
  )

  def change(graph):
    nodes = _nodes(graph)
    for kind, i, j, name in steps:
      node = nodes[i]
      if kind == "static":
        setattr(node, name, "static")
      elif kind == "variable":
        setattr(node, name, nnx.Param(np.zeros(2)))
      elif kind == "share":
        setattr(node, name, nodes[j])
      elif kind == "delete" and name in vars(node):
        delattr(node, name)
      elif kind == "write":
        for child in vars(node).values():
          if isinstance(child, nnx.Variable):
            child.value = np.full(3, 7.0)
    return nodes[0]

  return change


@PROPERTY
@given(graphs.graphs(), st.data())
def test_what_is_done_to_the_copies_is_done_to_the_originals(graph, data):
  change = _draw_change(graph, data)
  expected = nnx.clone(graph)
  change(expected)
  root = graph
  structure, leaves, objects = _engine.flatten((graph,))
  (copied,), inner = _engine.unflatten(structure, leaves)
  packed = _engine.pack(structure, inner, leaves, change(copied))
  result = _engine.apply(packed, objects, leaves)
  assert result is root
  assert graphs.isomorphic(root, expected)


@PROPERTY
@given(graphs.graphs(), st.data())
def test_with_the_leaves_given_it_is_done_to_the_variables_alone(graph, data):
  change = _draw_change(graph, data)
  expected = nnx.clone(graph)
  # A view has nothing but the Variables in common.
  expected_result = change(nnx.clone(expected, variables=False))
  structure, leaves, objects = _engine.flatten((graph,))
  (copied,), inner = _engine.unflatten(structure, leaves)
  packed = _engine.pack(structure, inner, leaves, change(copied), leaves)
  result = _engine.apply(packed, objects, leaves)
  assert graphs.isomorphic((graph, result), (expected, expected_result))


def test_leaves_that_are_not_as_given_count_as_written():
  node = nnx.Dict(a=nnx.Param(1.0), b=nnx.data(np.zeros(2)))
  structure, leaves, _ = _engine.flatten((node,))
  _, inner = _engine.unflatten(structure, leaves)
  packed = _engine.pack(structure, inner, (None, None), None, leaves)
  assert packed.outputs == leaves
  with pytest.raises(ValueError, match="`given` must be a tuple of 2 items"):
    _engine.pack(structure, inner, leaves, None, leaves[:1])


def _nodes(graph):
  return (
    sorted(
      (
        (path, node)
        for path, node in nnx.iter_graph(graph)
        if isinstance(node, nnx.Pytree)
      ),
      key=lambda item: str(item[0]),
    )
    and [
      node for _, node in nnx.iter_graph(graph) if isinstance(node, nnx.Pytree)
    ][::-1]
  )


@PROPERTY
@given(graphs.graphs())
def test_items_are_in_canonical_order(graph):
  for _, node in nnx.iter_graph(graph):
    items = _engine.items(node)
    if items is None or isinstance(node, (tuple, graphs.Pair)):
      continue
    keys = [key for key, _ in items]
    assert tuple(keys) == reference.canonical_keys(keys)


@pytest.mark.parametrize(
  "keys",
  [["b", "a"], [2, 10, 1], ["a", 1, "B", -1], [], ["x10", "x2", "x1"], [2**70]],
)
def test_canonical_keys(keys):
  given = dict.fromkeys(keys, 0)
  assert tuple(key for key, _ in _engine.items(given)) == (
    reference.canonical_keys(keys)
  )


def test_graphdefs_are_static_as_arguments():
  graphdef, state = nnx.split(nnx.Dict(a=nnx.Param(1)))
  structure, leaves, _ = _engine.flatten((graphdef, state))
  assert leaves == (1,)
  # A walk in C++ alone: an equal one, not the same.
  assert _engine.matches(
    structure, (nnx.graphdef(nnx.Dict(a=nnx.Param(2))), state)
  )
  assert not _engine.matches(structure, (nnx.graphdef(nnx.Dict()), state))


def test_scalars_are_leaves_as_arguments_and_static_as_attributes():
  for scalar in (1, 2.0, True, np.float32(3)):
    structure, leaves, _ = _engine.flatten((scalar,))
    assert leaves == (scalar,)
    assert _engine.matches(structure, (np.ones(1),))
    assert not _engine.matches(structure, ([scalar],))
    node = graphs.Node()
    node.a = scalar
    structure, leaves, _ = _engine.flatten((node,))
    assert leaves == ()
    node.a = np.ones(1)
    assert not _engine.matches(structure, (node,))


def test_marked_scalars_are_leaves():
  node = graphs.Node()
  node.a = nnx.data(1)
  structure, leaves, _ = _engine.flatten((node,))
  assert leaves == (1,)
  vars(node)["a"] = np.ones(1)
  assert _engine.matches(structure, (node,))
  assert _engine.flatten((node,)).structure == structure


class Pair(typing.NamedTuple):
  value: object


@dataclasses.dataclass(frozen=True, slots=True)
class Slots:
  value: object


@dataclasses.dataclass(frozen=True)
class Weighed:
  """Compares what no field of it is."""

  name: dataclasses.InitVar[str]
  value: object

  def __post_init__(self, name):
    vars(self)["other"] = name

  def __eq__(self, other):
    return self.other == other.other

  def __hash__(self):
    return hash(self.other)


class Attributes:
  """What the package attrs makes."""

  __attrs_attrs__ = (
    types.SimpleNamespace(name="value", eq=True),
    types.SimpleNamespace(name="note", eq=False),
  )

  def __init__(self, value):
    self.value = value
    self.note = object()

  def __eq__(self, other):
    return self.value == other.value

  def __hash__(self):
    return hash(self.value)


class Frozen(collections.abc.Mapping):
  def __init__(self, value):
    self.items_ = {"value": value}

  def __getitem__(self, key):
    return self.items_[key]

  def __iter__(self):
    return iter(self.items_)

  def __len__(self):
    return len(self.items_)

  def __hash__(self):
    return hash(tuple(self.items_.items()))


class Number(float):
  pass


STATICS_OF_A_VALUE = [
  Pair,
  Slots,
  functools.partial(Weighed, "a"),
  Attributes,
  Frozen,
  lambda value: Slots(Frozen(value)),
  lambda value: Number(0.0 if isinstance(value, int) else -0.0),
  lambda value: Slots(np.float32(0.0 if isinstance(value, int) else -0.0)),
  lambda value: np.dtype("int32" if isinstance(value, int) else "float32"),
]


def test_a_static_is_also_compared_by_its_own_equality():
  node = graphs.Node()
  node.a = Weighed("a", 1)
  structure, _, _ = _engine.flatten((node,))
  node.a = Weighed("b", 1)
  assert not _engine.matches(structure, (node,))


def test_equal_statics_of_other_types_do_not_match():
  for a, b in [(1, True), (1, 1.0), ((1,), (True,)), (0.0, -0.0)]:
    node = graphs.Node()
    node.a = a
    structure, _, _ = _engine.flatten((node,))
    node.a = b
    assert not _engine.matches(structure, (node,))
  for make in STATICS_OF_A_VALUE:
    node.a = make(1)
    structure, _, _ = _engine.flatten((node,))
    node.a = make(1)
    assert _engine.matches(structure, (node,)), make
    node.a = make(1.0)
    assert not _engine.matches(structure, (node,)), make
  nan = float("nan")
  node.a = nan
  structure, _, _ = _engine.flatten((node,))
  node.a = float("nan")
  assert _engine.matches(structure, (node,))


def test_a_static_that_is_changed_in_place_does_not_match():
  class Options:
    def __init__(self):
      self.rate = 1

    def __hash__(self):
      return hash(self.rate)

    def __eq__(self, other):
      return self.rate == other.rate

  node = graphs.Node()
  node.a = Options()
  structure, _, _ = _engine.flatten((node,))
  assert _engine.matches(structure, (node,))
  node.a.rate = 2
  assert not _engine.matches(structure, (node,))


def test_layouts_of_one_class_are_many():
  structures = []
  for i in range(40):  # more than the engine keeps
    node = graphs.Node()
    for j in range(i, -1, -1):
      setattr(node, f"a{j}", nnx.Param(j))
    structures.append((node, _engine.flatten((node,)).structure))
  for node, structure in structures:
    assert _engine.matches(structure, (node,))
    assert [path[0] for path, _ in nnx.state(node).flat_state()] == sorted(
      vars(node)
    )
