"""Variables of `nnx` as those of Linen, and back; flax.nnx is the oracle."""

from flax.core import meta
import flax.linen as nn
import flax.nnx as fnnx
from flax.nnx.bridge import variables as oracle
import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import bridge
import nnx


class Classifier(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(4, name="hidden")(x)
    x = nn.BatchNorm(use_running_average=False, name="norm")(x)
    return nn.Dense(2, name="out")(x)


@pytest.fixture(scope="module")
def variables():
  return Classifier().init(jax.random.key(0), jnp.ones((3, 5)))


def kinds(tree):
  return {
    "/".join(key.key for key in path): type(leaf).__name__
    for path, leaf in jax.tree_util.tree_leaves_with_path(
      tree, is_leaf=lambda x: not isinstance(x, dict)
    )
  }


def test_a_model_goes_to_attributes_and_back(variables):
  attributes = bridge.linen_vars_to_nnx_attrs(variables)
  assert isinstance(attributes["norm"]["mean"], nnx.BatchStat)
  assert isinstance(attributes["norm"]["scale"], nnx.Param)
  back = bridge.nnx_attrs_to_linen_vars(attributes)
  assert jax.tree.structure(back) == jax.tree.structure(variables)
  jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_attributes_are_those_of_flax(variables):
  ours = bridge.linen_vars_to_nnx_attrs(variables)
  theirs = oracle.linen_vars_to_nnx_attrs(variables)
  assert kinds(ours) == kinds(theirs)


def test_a_plain_variable_needs_no_box():
  value = jnp.ones(3)
  assert bridge.to_linen_var(nnx.Param(value)) is value
  assert oracle.to_linen_var(fnnx.Param(value)) is value


def test_metadata_travels_in_a_box():
  box = bridge.to_linen_var(nnx.Cache(jnp.ones(3), unit="m"))
  theirs = oracle.to_linen_var(fnnx.Cache(jnp.ones(3), unit="m"))
  assert isinstance(box, bridge.NNXMeta)
  assert box.var_type is nnx.Cache
  assert box.metadata == {"unit": "m"}
  assert box.metadata.items() <= theirs.metadata.items()
  back = bridge.to_nnx_var("cache", box)
  assert isinstance(back, nnx.Cache)
  assert back.unit == "m"


def test_a_box_is_a_pytree_of_its_value():
  box = bridge.NNXMeta(nnx.Param, jnp.ones(3), {"unit": "m"})
  doubled = jax.tree.map(lambda x: 2 * x, box)
  assert doubled.metadata == {"unit": "m"}
  np.testing.assert_array_equal(meta.unbox(doubled), [2, 2, 2])
  assert box.replace_boxed(5).value == 5


def test_linen_boxes_come_back_as_they_were():
  box = nn.Partitioned(jnp.ones((2, 3)), names=("rows", None))
  back = bridge.to_linen_var(bridge.to_nnx_var("params", box))
  assert isinstance(back, nn.Partitioned)
  assert back.names == ("rows", None)
  np.testing.assert_array_equal(back.value, box.value)


def test_a_custom_box_comes_back_as_it_was():
  class Labelled(nn.Partitioned):
    pass

  box = Labelled(jnp.ones(2), names=("rows",))
  assert type(bridge.to_linen_var(bridge.to_nnx_var("params", box))) is Labelled


def test_partition_spec():
  box = bridge.NNXMeta(
    nnx.Param, jnp.ones((2, 3)), {"out_sharding": ("a", None)}
  )
  assert box.get_partition_spec() == jax.sharding.PartitionSpec("a", None)


@pytest.mark.parametrize(
  "given", ["sharding", "sharding_names", "out_sharding"]
)
def test_an_annotation_is_found_by_each_of_its_names(given):
  box = bridge.to_linen_var(
    nnx.Param(jnp.ones((2, 3)), unit="m", **{given: ("a", None)})
  )
  added = box.add_axis(0, {nn.PARTITION_NAME: "layers"})
  for name in ("sharding", "sharding_names", "out_sharding"):
    assert box.metadata[name] == ("a", None)
    assert added.metadata[name] == ("layers", "a", None)
  assert box.metadata == {"out_sharding": ("a", None), "unit": "m"}
  plain = bridge.to_linen_var(nnx.Param(1.0, unit="m"))
  for metadata, name in ((box.metadata, "u"), (plain.metadata, "sharding")):
    with pytest.raises(KeyError, match=name):
      metadata[name]


def test_axes_are_added_and_removed():
  box = bridge.NNXMeta(
    nnx.Param, jnp.ones((2, 3)), {"out_sharding": ("a", None)}
  )
  params = {nn.PARTITION_NAME: "layers"}
  added = box.add_axis(0, params)
  assert added.metadata["out_sharding"] == ("layers", "a", None)
  removed = added.remove_axis(0, params)
  assert removed.metadata["out_sharding"] == ("a", None)


_NAMES = st.one_of(st.none(), st.sampled_from(["data", "model", "layers"]))


def _fields(box):
  # From Python 3.13 on `==` of two boxes asks their arrays, be they one.
  return box.var_type, id(box.value), box.metadata


@hypothesis.settings(derandomize=True, max_examples=200, deadline=None)
@hypothesis.given(data=st.data())
def test_adding_and_removing_an_axis_are_inverse(data):
  shape = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
  names = data.draw(
    st.lists(_NAMES, min_size=len(shape), max_size=len(shape)).map(tuple)
  )
  key = data.draw(
    st.sampled_from(["sharding", "sharding_names", "out_sharding"])
  )
  metadata = {key: names, "unit": "m"}
  calls = []
  if data.draw(st.booleans()):
    metadata["on_add_axis"] = (lambda v, i, name: calls.append((i, name)),)
    metadata["on_remove_axis"] = (lambda v, i, name: calls.append((i, name)),)
  box = bridge.NNXMeta(nnx.Param, np.zeros(shape), metadata)
  params = {nn.PARTITION_NAME: data.draw(_NAMES)}
  index = data.draw(st.integers(-len(shape) - 1, len(shape)))
  added = box.add_axis(index, params)
  assert len(added.metadata[key]) == len(shape) + 1
  assert added.metadata[key][index] == params[nn.PARTITION_NAME]
  assert _fields(added.remove_axis(index, params)) == _fields(box)
  index = data.draw(st.integers(-len(shape), len(shape) - 1))
  params = {nn.PARTITION_NAME: names[index]}
  removed = box.remove_axis(index, params)
  assert len(removed.metadata[key]) == len(shape) - 1
  assert _fields(removed.add_axis(index, params)) == _fields(box)
  assert len(calls) in (0, 4)


def test_a_new_collection_makes_a_kind():
  variable = bridge.to_nnx_var("bridge_test_counts", 3)
  assert type(variable).__name__ == "bridge_test_counts"
  assert nnx.variable_name_from_type(type(variable)) == "bridge_test_counts"


def test_a_box_in_the_wrong_collection_is_refused():
  box = bridge.NNXMeta(nnx.Param, 1.0, {})
  with pytest.raises(ValueError) as error:
    bridge.to_nnx_var("cache", box)
  assert str(error.value) == (
    "The kind of Variable in an `NNXMeta` must be that of its collection, but"
    " got `Param` in `cache`, which is of `Cache`. Register the name by"
    " `nnx.register_variable_name`."
  )


def test_one_path_in_two_collections_is_refused():
  with pytest.raises(ValueError) as error:
    bridge.linen_vars_to_nnx_attrs(
      {"params": {"a": {"b": 1.0}}, "cache": {"a": {"b": 2.0}}}
    )
  assert str(error.value) == (
    "A path must be in one collection, since it names one attribute, but `a/b`"
    " is in `params` and in `cache`. Rename one of the two."
  )


def test_a_leaf_that_is_no_variable_is_refused():
  with pytest.raises(ValueError) as error:
    bridge.nnx_attrs_to_linen_vars({"a": {"b": 1.0}})
  assert str(error.value) == (
    "Every leaf must be a Variable, whose kind says the collection, but `a/b`"
    " is `1.0`. Wrap it in a kind of Variable."
  )
