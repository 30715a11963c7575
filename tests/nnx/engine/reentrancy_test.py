"""Python code that runs in the middle of a walk and changes the graph."""

import gc

import numpy as np
import pytest

import nnx
from nnx.engine import _engine
from tests.nnx.engine import graphs


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
  model = graphs.Model(10)
  for path, _ in nnx.iter_graph(model):
    if path and path[0] == "layers":
      model.layers.clear()
      gc.collect()
