"""What the graph functions refuse, and that they then change nothing."""

import jax.numpy as jnp
import pytest

import nnx
from tests.nnx.engine import graphs


class Odd:
  """Has no hash, and nothing to be seen in it."""

  __hash__ = None

  def __reduce_ex__(self, protocol):
    raise RuntimeError("no words")


def test_a_static_that_cannot_be_told_apart_raises_its_own_error():
  model = graphs.Model()
  model.layers[1].options = {"a": Odd()}
  with pytest.raises(RuntimeError, match="no words"):
    nnx.split(model)
  assert nnx.state(model)  # needs no hashes


def test_missing_state_names_its_path():
  graphdef, state = nnx.split(graphs.Model())
  del state.layers[1]["w"]
  with pytest.raises(ValueError, match=r"`layers\[1\].w` is missing"):
    nnx.merge(graphdef, state)


def test_extra_state_is_refused():
  graphdef, state = nnx.split(graphs.Model())
  state["more"] = nnx.Param(1)
  with pytest.raises(ValueError, match="must hold only what the graph has"):
    nnx.merge(graphdef, state)


def test_a_leaf_where_a_mapping_must_be_is_refused():
  graphdef, state = nnx.split(graphs.Model())
  state["layers"] = nnx.Param(1)
  with pytest.raises(ValueError, match="nested mapping at `layers`"):
    nnx.merge(graphdef, state)


def test_merge_wants_a_graphdef():
  with pytest.raises(TypeError, match="must be a graph structure"):
    nnx.merge(3, nnx.State({}))
  with pytest.raises(TypeError, match="must be given the states"):
    nnx.merge(nnx.graphdef(graphs.Model()))


def test_split_names_a_leaf_that_is_left():
  with pytest.raises(ValueError, match="none of them selects `count`"):
    nnx.split(graphs.Model(), nnx.Param)


def test_update_does_nothing_or_all():
  model = graphs.Model()
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
    nnx.pop(graphs.Model())
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
