"""Python code that takes away what the engine is looking at, by name.

Each case is a function that would read freed memory if the engine borrowed what
it must own; `lifetime_test` runs each in a process of its own, whose allocator
fills what is freed.
"""

import gc
import itertools
import sys
import threading
from typing import Any

import jax
import numpy as np

import nnx
from nnx.engine import _engine
from tests.nnx.engine import graphs


class Acting:
  """A pytree of jax that does something when it is opened."""

  def __init__(self, act=lambda: None, *children):
    self.act = act
    self.children = children


def _flatten_acting(value):
  value.act()
  return value.children, None


jax.tree_util.register_pytree_node(
  Acting, _flatten_acting, lambda aux, children: Acting()
)


class Name(str):
  """A string that does something when it is compared."""

  act = staticmethod(lambda: None)

  __hash__ = str.__hash__

  def __eq__(self, other):
    self.act()
    return str(self) == other


class Finaliser:
  """Does something when the collector takes it, and leaves another one."""

  def __init__(self, act, more=0):
    self.act, self.more = act, more
    self.itself = self

  def __del__(self):
    self.act()
    if self.more:
      Finaliser(self.act, self.more - 1)


def _while_collecting(act, function, times=200):
  """Calls a function while the collector meets finalisers in allocations."""
  threshold = gc.get_threshold()
  gc.set_threshold(1, 10**6, 10**6)  # the young alone, which is fast
  try:
    for _ in range(times):
      Finaliser(act, more=20)
      try:
        function()
      except (RuntimeError, ValueError, KeyError):
        pass  # it changed while it was walked
  finally:
    gc.set_threshold(*threshold)


def _fresh(count=20):
  """Lists of new objects, which only what holds the list keeps alive."""
  return [[object()] for _ in range(count)]


def list_cleared_by_a_pytree():
  items: list[Any] = []
  items += [Acting(items.clear), *_fresh()]
  assert not _engine.holds_data(items)
  items += [Acting(lambda: items.append(Acting(items[0].act)))]
  assert not _engine.holds_data(items)  # and it ends


def dict_cleared_by_a_pytree():
  table: dict[int, Any] = {}
  table.update(enumerate([Acting(table.clear), *_fresh()]))
  assert not _engine.holds_data(table)


def list_changed_by_a_thread():
  items: list[Any] = []
  stop = threading.Event()

  def change():
    while not stop.is_set():
      items[:] = [Acting(), *_fresh(5)]
      items.clear()

  interval = sys.getswitchinterval()
  sys.setswitchinterval(1e-6)
  thread = threading.Thread(target=change)
  thread.start()
  node = graphs.Node()
  vars(node)["a"] = items
  try:
    for _ in range(3000):
      _engine.holds_data(items)
      _engine.state(node, (True,))
      jax.tree.leaves(node)
  finally:
    stop.set()
    thread.join()
    sys.setswitchinterval(interval)


def attributes_replaced_by_a_pytree():
  node = graphs.Node()

  def act():
    node.__dict__ = {}
    node._pytree_status = None

  node.a = Acting(lambda: None, np.ones(1))
  node.b = nnx.static([object()])
  for i in range(20):
    setattr(node, f"c{i}", [object()])
  node.a.act = act
  children, _ = jax.tree.flatten(node)
  assert len(children) == 1
  for function in (nnx.split, nnx.state, nnx.clone, _engine.object_flatten):
    node.a = Acting(act, np.ones(1))
    node.b = nnx.static([object()])
    try:
      function(node)
    except RuntimeError as e:
      assert "changed while it was walked" in str(e)


def attributes_replaced_by_the_collector():
  node = graphs.Node()

  number = itertools.count()

  def act():
    node.__dict__ = {f"k{next(number) % 7}": np.ones(3), "b": object()}

  act()
  for function in (
    lambda: nnx.state(node),
    lambda: nnx.graphdef(node),
    lambda: jax.tree.leaves(node),
    lambda: _engine.items(node),
    lambda: nnx.update(node, {"b": np.ones(1)}),
  ):
    _while_collecting(act, function)


def marks_replaced_when_a_name_is_compared():
  node = graphs.Node()

  def act():
    node._pytree_status = {f"x{i}": True for i in range(9)}

  for _ in range(50):
    name = Name("b")
    node._pytree_status = {name: True, "c": False}
    name.act = act
    for function in (
      lambda: setattr(node, "b", 1),
      lambda: jax.tree.leaves(node),
      lambda: nnx.state(node),
    ):
      function()


def attributes_dropped_when_a_name_is_compared_in_a_call():
  call = nnx.jit(lambda node: None)
  for _ in range(50):
    node = graphs.Node()
    node.b = [nnx.Param(1.0)]
    name = Name("b")
    node._pytree_status = {name: True}
    name.act = vars(node).clear
    try:
      call(node)
    except RuntimeError:
      pass  # it changed while it was walked


def value_replaced_when_its_shape_is_read():
  class Array:
    @property
    def aval(self):
      variable.raw_value = None
      gc.collect()
      return (self.__class__, [object()])

  _engine.configure(array_type=Array)
  variable = nnx.Param(0)
  for _ in range(20):
    variable.raw_value = Array()
    try:
      variable[...] = Array()
    except TypeError:
      pass  # it is no array that a Variable can set


def class_that_goes_with_its_objects():
  """A finaliser uses structures of a class that goes in the same collection."""
  used = []

  def make():
    class Box:
      pass

    class Local(_engine.ObjectBase):
      pass

    _engine.register_node_type(
      Box,
      lambda box: ([("a", 1)], None),
      None,
      None,
      lambda metadata: [],
      None,
      lambda box, items: box.extend(items),
    )
    local = Local()
    local.a, local.box = np.ones(1), Box()
    structure, leaves, _ = _engine.flatten((local,))
    copied = Local()
    copied.a, copied.box = np.ones(1), None
    plain, _, _ = _engine.flatten((copied,))

    def act():
      for i in range(20):
        blocks = [bytearray(64 + i) for _ in range(50)]
        assert _engine.unflatten(structure, leaves).values[0].box == [("a", 1)]
        assert _engine.matches(plain, (copied,))
        del blocks
      used.append(True)

    Local.trap = Finaliser(act)

  make()
  gc.collect()
  gc.collect()
  assert used == [True]


def objects_seen_while_they_are_made():
  def look():
    for value in gc.get_objects():
      if isinstance(value, _engine.VariableBase):
        _ = value._metadata, value.raw_value, value._hook_flags
      elif isinstance(value, _engine.ObjectBase):
        _ = vars(value), value._pytree_status
      elif isinstance(value, _engine.StructureBase):
        _ = hash(value), value._records, value.num_nodes

  graph = nnx.Dict(a=nnx.Param(np.ones(1), tag="x"), b=nnx.data(1))
  graphdef, state = nnx.split(graph)

  class Static:
    def __hash__(self):
      look()
      return 1

    def __repr__(self):
      look()
      return "Static"

  for function in (
    lambda: nnx.Param(np.ones(1)),
    lambda: nnx.merge(graphdef, state, copy=True),
    lambda: graphs.Node(),
    lambda: nnx.clone(graph),
  ):
    _while_collecting(look, function, times=3)
  node = graphs.Node()
  node.a = Static()
  node.b = nnx.Param(1)
  records = nnx.graphdef(node)._records
  assert nnx.graph.NodeDef._restore(records, 1)._records == records


def states_emptied_by_the_collector():
  model = nnx.List([nnx.Param(np.ones(i)) for i in range(20)])
  graphdef, _ = nnx.split(model)
  mapping: dict[int, Any] = {}

  def act():
    mapping.clear()
    mapping.update((i, np.ones(i + 1)) for i in range(20))

  act()
  for function in (
    lambda: _engine.merge(graphdef, mapping, False, False),
    lambda: _engine.merge(graphdef, {**mapping}, True, False),
    lambda: _engine.update(model, mapping, False, False, False),
    lambda: _engine.split_mapping(mapping, (np.ndarray, True), False),
    lambda: _engine.merge_mappings(mapping, {"a": mapping}),
    lambda: _engine.flatten_mapping(mapping),
  ):
    _while_collecting(act, function, times=50)


def mappings_emptied_by_filters():
  for function in (
    lambda m, f: _engine.split_mapping(m, (f,), False),
    lambda m, f: _engine.state(m, (f,)),
    lambda m, f: _engine.split(m, (f, True), True),
  ):
    inner = {i: nnx.Param([object()]) for i in range(9)}
    mapping = {"a": inner, "b": nnx.Param([object()]), "c": {"d": inner}}

    def empty(path, leaf, mapping=mapping, inner=inner):
      inner.clear()
      mapping.clear()
      gc.collect()
      return True

    assert function(mapping, empty)


def keys_that_are_compared_in_a_match():
  """The fast walk runs no Python code, whatever the keys are."""
  node = graphs.Node()
  node.table = {"a": nnx.Param(np.ones(1))}
  node.variable = nnx.Param(np.ones(1), tag=1)
  for i in range(10):
    setattr(node, f"z{i}", nnx.Param(np.ones(i)))
  structure, _, _ = _engine.flatten((node,))

  def act():
    for i in range(10):
      vars(node).pop(f"z{i}", None)
    gc.collect()

  name = Name("a")
  node.table = {name: nnx.Param(np.ones(1))}
  name.act = act
  _engine.matches(structure, (node,))
  node.table = {"a": nnx.Param(np.ones(1))}
  tag = Name("tag")
  node.variable._metadata.clear()
  node.variable._metadata[tag] = 1
  structure, _, _ = _engine.flatten((node,))
  node.variable._metadata.clear()
  node.variable._metadata["tag"] = 1
  tag.act = act
  _engine.matches(structure, (node,))


def jit_initialised_again_by_itself():
  def make_entry(*args):
    jitted.__init__(lambda *args: 1 / 0, None, frozenset([Name("x")]))
    gc.collect()
    raise KeyError("made")

  for _ in range(20):
    jitted = _engine.JitFunction(
      lambda *args: make_entry(*args), None, frozenset()
    )
    try:
      jitted(1)
    except KeyError:
      pass
    try:
      jitted(1)
    except ZeroDivisionError:
      pass


def chains_that_are_taken_apart():
  value: Any = 1
  for _ in range(300_000):
    variable = _engine.VariableBase.__new__(_engine.VariableBase)
    variable.raw_value = value
    value = variable
  del value, variable
  jitted: Any = len
  for _ in range(300_000):
    jitted = _engine.JitFunction(jitted, None, frozenset())
  del jitted


def _call_at(depth: int, function: Any) -> None:
  """Calls a function with that many calls through C around it."""

  def go_down(depth):
    return list(map(go_down, (depth - 1,))) if depth else function()

  go_down(depth)


def _deepest() -> int:
  """The depth at which `_call_at` has used up what it may."""
  reached = 0

  def go_down(depth):
    nonlocal reached
    reached = depth
    list(map(go_down, (depth + 1,)))

  try:
    go_down(0)
  except RecursionError:
    return reached
  raise AssertionError("there is no limit")


def structures_deeper_than_the_stack():
  """Made where there is much stack, used where there is little."""
  made = []

  def make():
    sys.setrecursionlimit(10**6)
    # Python 3.12 and 3.13 have a limit of their own for C, which none can set.
    for depth in (20_000, 700):
      value = nnx.Param(np.ones(1))
      for _ in range(depth):
        value = nnx.Dict(a=value)
      try:
        graphdef, mappings = _engine.split(value, (True,), True)
        flat = _engine.flatten((value,))
      except RecursionError:
        continue
      made.extend([value, graphdef, mappings[0], flat])
      return

  limit = sys.getrecursionlimit()
  threading.stack_size(1 << 29)
  thread = threading.Thread(target=make)
  thread.start()
  thread.join()
  sys.setrecursionlimit(limit)
  depth = _deepest() - 50
  value, graphdef, mapping, (structure, leaves, objects) = made
  for function in (
    lambda: _engine.merge(graphdef, mapping, False, False),
    lambda: _engine.update(value, mapping, False, False, False),
    lambda: _engine.pop(value, (True,)),
    lambda: _engine.state(value, (True,)),
    lambda: _engine.clone(value, True),
    lambda: _engine.matches(structure, (value,)),
    lambda: _engine.unflatten(structure, leaves),
    lambda: _engine.pack(structure, objects, leaves, None),
    lambda: _engine.split_mapping(mapping, (True,), True),
    lambda: _engine.merge_mappings(mapping, mapping),
    lambda: _engine.flatten_mapping(mapping),
    lambda: _engine.holds_data([{"a": mapping}]) and 1 / 0,
    lambda: graphdef.__reduce__()[0](*graphdef.__reduce__()[1]),
  ):
    try:
      _call_at(depth, function)
    except (RecursionError, ZeroDivisionError):
      continue
    raise AssertionError("there was enough of the stack")
  assert hash(graphdef) == hash(graphdef) and graphdef == graphdef


CASES = [
  list_cleared_by_a_pytree,
  dict_cleared_by_a_pytree,
  list_changed_by_a_thread,
  attributes_replaced_by_a_pytree,
  attributes_replaced_by_the_collector,
  marks_replaced_when_a_name_is_compared,
  attributes_dropped_when_a_name_is_compared_in_a_call,
  value_replaced_when_its_shape_is_read,
  class_that_goes_with_its_objects,
  objects_seen_while_they_are_made,
  states_emptied_by_the_collector,
  mappings_emptied_by_filters,
  keys_that_are_compared_in_a_match,
  jit_initialised_again_by_itself,
  chains_that_are_taken_apart,
  structures_deeper_than_the_stack,
]
