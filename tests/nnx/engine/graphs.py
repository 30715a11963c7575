"""Random graphs of objects for the tests, and comparisons of graphs."""

import collections

from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import nnx

Point = collections.namedtuple("Point", ["x", "y"])


class Node(nnx.Module):
  """A module with whatever attributes a test gives it."""


class Model(nnx.Module):
  """A module with layers in a list, a count and what is static."""

  def __init__(self, n=3):
    self.layers = [nnx.Dict(w=nnx.Param(jnp.ones(2))) for _ in range(n)]
    self.count = nnx.Variable(jnp.zeros((), jnp.int32))
    self.name = "model"
    self.sizes = (1, 2)


class Other(nnx.Pytree):
  """Another class of objects."""


class Hooked(nnx.Variable):
  def on_get_value(self, value):
    return value


class Box:
  """A custom node."""

  def __init__(self):
    self.contents = {}


nnx.register_graph_node_type(
  Box,
  flatten=lambda box: (list(box.contents.items()), "box"),
  set_key=lambda box, key, value: box.contents.update({key: value}),
  pop_key=lambda box, key: box.contents.pop(key),
  create_empty=lambda metadata: Box(),
  clear=lambda box: box.contents.clear(),
)


@jax.tree_util.register_pytree_node_class
class Pair:
  """A pytree of jax."""

  def __init__(self, a, b):
    self.a, self.b = a, b

  def tree_flatten(self):
    return (self.a, self.b), "pair"

  @classmethod
  def tree_unflatten(cls, aux, children):
    return cls(*children)


NAMES = st.sampled_from(["a", "b", "c", "kernel", "x1", "x10"])
STATICS = st.one_of(
  st.none(),
  st.booleans(),
  st.integers(-3, 3),
  st.floats(allow_nan=False, width=16),
  st.sampled_from(["relu", "b"]),
  st.just((1, "t")),
  st.just(frozenset({1})),
  st.just(len),
  st.just(np.tanh),
  st.just(np.float32),
)
ARRAYS = st.integers(0, 5).map(lambda n: np.full((n,), n, np.float32))
VARIABLE_TYPES = st.sampled_from(
  [nnx.Param, nnx.BatchStat, nnx.Variable, Hooked]
)


@st.composite
def graphs(draw, custom=True, max_nodes=12):
  """A graph with shared references, and cycles through objects."""
  pool = []  # what can be referred to

  def variable():
    kind = draw(VARIABLE_TYPES)
    value = draw(
      st.one_of(ARRAYS, ARRAYS, ARRAYS, st.just([1, {"k": np.ones(1)}, None]))
    )
    metadata = draw(
      st.sampled_from([{}, {}, {"tag": "frozen"}, {"axis": ("a", None)}])
    )
    made = kind(value, **metadata)
    pool.append(made)
    return made

  def value(depth):
    choices = ["static", "array", "variable", "variable"]
    if pool:
      choices += ["shared", "shared"]
    if depth > 0:
      choices += ["node", "node", "list", "dict", "tuple", "point", "pair"]
      if custom:
        choices += ["box"]
    kind = draw(st.sampled_from(choices))
    count = draw(st.integers(0, 3))
    if kind == "static":
      return draw(STATICS)
    if kind == "array":
      return draw(ARRAYS)
    if kind == "variable":
      return variable()
    if kind == "shared":
      return draw(st.sampled_from(pool))
    if kind == "tuple":
      return tuple(value(depth - 1) for _ in range(count))
    if kind == "point":
      return Point(value(depth - 1), value(depth - 1))
    if kind == "pair":
      return Pair(value(depth - 1), value(depth - 1))
    return node(kind, depth, count)

  def node(kind, depth, count):
    if kind == "list":
      made = []
      pool.append(made)
      made.extend(value(depth - 1) for _ in range(count))
      return made
    names = draw(st.lists(NAMES, max_size=4, unique=True))
    if kind == "dict":
      made = {}
      pool.append(made)
      keys = names + draw(st.sampled_from([[], [3, 1]]))
      for key in keys:
        made[key] = value(depth - 1)
      return made
    if kind == "box":
      made = Box()
      pool.append(made)
      for key in names:
        made.contents[key] = value(depth - 1)
      return made
    made = draw(st.sampled_from([Node, Other]))()
    pool.append(made)
    for key in names:
      setattr(made, key, value(depth - 1))
    return made

  return node("node", 3, 2)


def isomorphic(a, b, shares_variables=False):
  """Whether two graphs are alike, with references in the same places."""
  forward, backward = {}, {}

  def same(a, b):
    if isinstance(a, nnx.Variable):
      if type(a) is not type(b) or a.get_metadata() != b.get_metadata():
        return False
      if not paired(a, b):
        return False
      if shares_variables:
        return a is b
      return a is b or same(a.raw_value, b.raw_value)
    if isinstance(a, (np.ndarray, jax.Array)):
      return a is b or (
        type(a) is type(b) and np.array_equal(np.asarray(a), np.asarray(b))
      )
    items = nnx.engine._engine.items(a)
    if items is None:
      return type(a) is type(b) and (a is b or a == b)
    if type(a) is not type(b):
      return False
    if not isinstance(a, (tuple, Pair)):
      if id(a) in forward:
        return forward[id(a)] is b
      if not paired(a, b):
        return False
    others = nnx.engine._engine.items(b)
    return [key for key, _ in items] == [key for key, _ in others] and all(
      same(x, y) for (_, x), (_, y) in zip(items, others)
    )

  def paired(a, b):
    if id(a) in forward or id(b) in backward:
      return forward.get(id(a)) is b and backward.get(id(b)) is a
    forward[id(a)], backward[id(b)] = b, a
    return True

  return same(a, b)
