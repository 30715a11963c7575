"""Random graphs for the fuzzer of the engine, and what spoils them.

Built from a generator of numpy alone, so that a number makes the graph again.
The parts are those of `tests.nnx.engine.graphs`; more come that act when the
engine calls them.
"""

from collections.abc import Callable
import gc
from typing import Any

import jax
import numpy as np

import nnx
from nnx.engine import _engine
from tests.nnx.engine import graphs

_NAMES = ["a", "b", "c", "kernel", "x1", "x10"]
_TYPES = [nnx.Param, nnx.BatchStat, nnx.Variable, graphs.Hooked]
_STATICS = [
  None,
  True,
  1,
  -2.5,
  "relu",
  (1, "t"),
  frozenset({1}),
  len,
  np.tanh,
  np.float32,
  0.0,
  -0.0,
  2**70,
]

Act = Callable[[], None]


class Bomb:
  """A static value whose hash, equality and text run what `act` says."""

  act: Act = staticmethod(lambda: None)

  def __hash__(self):
    self.act()
    return 7

  def __eq__(self, other):
    self.act()
    return isinstance(other, Bomb)

  def __repr__(self):
    self.act()
    return "Bomb()"


class Mine:
  """A pytree of jax whose opening and closing run what `act` says."""

  act: Act = staticmethod(lambda: None)

  def __init__(self, *children):
    self.children = children


def _open_mine(mine):
  children = mine.children
  Mine.act()
  return children, None


def _close_mine(_, children):
  Mine.act()
  return Mine(*children)


jax.tree_util.register_pytree_node(Mine, _open_mine, _close_mine)


class Cellar:
  """A custom node whose functions run what `act` says."""

  act: Act = staticmethod(lambda: None)

  def __init__(self):
    self.contents: dict[Any, Any] = {}


def _acting(function):
  def call(*args):
    Cellar.act()
    return function(*args)

  return call


nnx.register_graph_node_type(
  Cellar,
  flatten=_acting(lambda node: (list(node.contents.items()), "cellar")),
  set_key=_acting(lambda node, key, value: node.contents.update({key: value})),
  pop_key=_acting(lambda node, key: node.contents.pop(key)),
  create_empty=_acting(lambda metadata: Cellar()),
  clear=_acting(lambda node: node.contents.clear()),
)


class Name(str):
  """A key whose comparison runs what `act` says."""

  act: Act = staticmethod(lambda: None)
  __hash__ = str.__hash__

  def __eq__(self, other):
    Name.act()
    return str(self) == other


def set_act(act: Act) -> None:
  """Makes every acting part do one thing."""
  for kind in (Bomb, Mine, Cellar, Name):
    kind.act = staticmethod(act)


def calm() -> None:
  """Makes every acting part do nothing."""
  set_act(lambda: None)


class Maker:
  """Makes graphs; `pool` has what can be referred to again."""

  def __init__(self, rng: np.random.Generator, spoiled: bool):
    self._rng = rng
    self._spoiled = spoiled
    self.pool: list[Any] = []

  def pick(self, items):
    return items[int(self._rng.integers(len(items)))]

  def array(self):
    size = int(self._rng.integers(0, 6))
    return np.full((size,), size, np.float32)

  def names(self):
    count = int(self._rng.integers(0, 5))
    return [_NAMES[i] for i in self._rng.permutation(len(_NAMES))[:count]]

  def variable(self):
    value = self.pick(
      [self.array(), self.array(), [1, {"k": np.ones(1)}, None], "inner"]
    )
    if isinstance(value, str):
      # A Variable, as only that cannot lead back here without an identity.
      inner = [x for x in self.pool if isinstance(x, nnx.Variable)]
      value = [self.pick(inner)] if inner else self.array()
    metadata = self.pick([{}, {}, {"tag": "frozen"}, {"axis": ("a", None)}])
    made = self.pick(_TYPES)(value, **metadata)
    if self._spoiled and self._rng.random() < 0.1:
      made._metadata[Name("tag")] = Bomb()
    self.pool.append(made)
    return made

  def value(self, depth):
    kinds = ["static", "array", "variable", "variable"]
    if self.pool:
      kinds += ["shared", "shared"]
    if depth > 0:
      kinds += ["node", "node", "list", "dict", "tuple", "point", "pair"]
      kinds += ["box", "state"]
    if self._spoiled:
      kinds += ["bomb", "mine", "cellar"]
    kind = self.pick(kinds)

    def below():
      return self.value(depth - 1)

    count = int(self._rng.integers(0, 4))
    if kind == "static":
      return self.pick(_STATICS)
    if kind == "array":
      return self.array()
    if kind == "variable":
      return self.variable()
    if kind == "shared":
      return self.pick(self.pool)
    if kind == "tuple":
      return tuple(below() for _ in range(count))
    if kind == "point":
      return graphs.Point(below(), below())
    if kind == "pair":
      return graphs.Pair(below(), below())
    if kind == "state":
      return nnx.State({name: self.array() for name in self.names()})
    if kind == "bomb":
      return Bomb()
    if kind == "mine":
      return Mine(*[below() for _ in range(min(count, 2))] if depth > 0 else [])
    return self.node(kind, depth)

  def node(self, kind, depth):
    """A node with an identity, which its own children can refer to."""
    if kind == "list":
      made: Any = []
      self.pool.append(made)
      made.extend(
        self.value(depth - 1) for _ in range(int(self._rng.integers(0, 4)))
      )
      return made
    names: list[Any] = self.names()
    if kind == "dict":
      made = {}
      self.pool.append(made)
      if self._spoiled and names and self._rng.random() < 0.1:
        names[0] = Name(names[0])
      for key in names + self.pick([[], [3, 1]]):
        made[key] = self.value(depth - 1)
      return made
    if kind in ("box", "cellar"):
      made = graphs.Box() if kind == "box" else Cellar()
      self.pool.append(made)
      for key in names:
        made.contents[key] = self.value(depth - 1) if depth > 0 else 1
      return made
    made = self.pick([graphs.Node, graphs.Other])()
    self.pool.append(made)
    for key in names:
      value = self.value(depth - 1)
      mark = self._rng.random()
      if mark < 0.05:
        value = nnx.static(self.pick(_STATICS))
      elif mark < 0.1:
        value = nnx.data(self.pick([1, "b", self.array(), self.variable()]))
      setattr(made, key, value)
    return made


def graph(rng: np.random.Generator, spoiled: bool = False) -> tuple[Any, Maker]:
  """A graph with shared references, cycles and, if spoiled, what acts."""
  maker = Maker(rng, spoiled)
  return maker.node("node", 3), maker


def vandal(rng: np.random.Generator, maker: Maker) -> Act:
  """What spoils the nodes of a graph, a little or all of it, when called."""
  targets = [x for x in maker.pool if not isinstance(x, tuple)]
  budget = [int(rng.integers(1, 30))]
  running = [False]

  def spoil(target):
    what = int(rng.integers(8))
    if isinstance(target, nnx.Variable):
      if what < 3:
        target._metadata.clear()
      elif what < 5:
        target._metadata[f"m{what}"] = [object()]
      else:
        _engine.VariableBase.raw_value.__set__(target, [object(), np.ones(2)])
    elif isinstance(target, nnx.Pytree):
      if what < 2:
        target.__dict__ = {}
      elif what < 4:
        vars(target).clear()
      elif what < 5:
        target._pytree_status = None
      elif what < 6:
        target._pytree_status = {"a": True, "b": False}
      else:
        vars(target)[f"n{what}"] = [object(), np.ones(1)]
    elif isinstance(target, (list, dict)):
      if what < 4:
        target.clear()
      elif isinstance(target, list):
        target[:] = [[object()] for _ in range(what * 5)]
      else:
        target.update({f"d{i}": [object()] for i in range(what)})
    elif hasattr(target, "contents"):
      target.contents = {"z": [object()]}

  def act():
    if budget[0] <= 0 or running[0] or not targets:
      return
    budget[0] -= 1
    running[0] = True
    try:
      for _ in range(int(rng.integers(1, 6))):
        spoil(targets[int(rng.integers(len(targets)))])
      if rng.random() < 0.1:
        gc.collect(0)
      if rng.random() < 0.05:
        raise Deliberate
    finally:
      running[0] = False

  return act


class Deliberate(Exception):
  """Raised in the middle of a walk."""
