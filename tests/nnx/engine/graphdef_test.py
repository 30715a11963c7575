"""GraphDefs: when two are equal, how they are pickled, which are refused."""

import copy
import pickle

import jax
import pytest

import nnx
from nnx.engine import _engine
from tests.nnx.engine import graphs


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
  model = graphs.Model()
  before = nnx.graphdef(model)
  structure, _, _ = _engine.flatten((model,))
  change(model)
  assert nnx.graphdef(model) != before
  assert not _engine.matches(structure, (model,))


def test_graphdef_is_no_leaf_and_static_under_jit():
  graphdef, state = nnx.split(graphs.Model())
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
  graphdef = nnx.graphdef(graphs.Model())
  data = pickle.dumps(graphdef)
  for name in (b"_engine", b"NodeRecord", b"NodeKind", b"HookFlags"):
    assert name not in data
  plain = tuple((str(record.kind), *record[1:]) for record in graphdef._records)
  assert nnx.graph.NodeDef._restore(plain, 1) == graphdef


@pytest.mark.parametrize("position", range(6))
def test_damaged_records_are_refused(position):
  graphdef = nnx.graphdef(graphs.Model())
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
