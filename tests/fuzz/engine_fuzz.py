"""Fuzzes the graph engine: what Python code does to it while it walks.

    python -m tests.fuzz.engine_fuzz --seconds=60
    python -m tests.fuzz.engine_fuzz --hours=2 --workers=2
    python -m tests.fuzz.engine_fuzz --case=vandals:17:3

`graphs` compares with the oracle in Python. In the other families an engine
that trusts what it must not dies, or raises `SystemError`; they look at all
that is left as well.
"""

from collections.abc import Callable
import copy
import io
import pickle
import sys
import threading
from typing import Any

import numpy as np

import nnx
from nnx.engine import _engine
from nnx.graphlib import reference
from tests.fuzz import engine_graphs, engine_in_place, worker
from tests.nnx.engine import graphs
from tests.testing import threads

# What a spoiled graph may end in. Above all no SystemError, which says that the
# engine failed without saying why.
_ALLOWED = (
  engine_graphs.Deliberate,
  AttributeError,
  IndexError,
  KeyError,
  OverflowError,
  RecursionError,
  TypeError,
  ValueError,
)


def _allowed(error: BaseException) -> bool:
  words = ("changed while it was walked", "elements for TreeDef node")
  return isinstance(error, _ALLOWED) or (
    isinstance(error, RuntimeError) and any(x in str(error) for x in words)
  )


def _attempt(function: Callable[..., Any], *args: Any) -> Any:
  """Calls a function that may fail, but not in any way."""
  try:
    return function(*args)
  except Exception as e:
    if not _allowed(e):
      raise
    return None


def _look(value: Any, seen: set[int]) -> None:
  """Reads every field below a value, as far as it can be reached."""
  if id(value) in seen or len(seen) > 2000:
    return
  seen.add(id(value))
  children: list[Any] = []
  if isinstance(value, _engine.VariableBase):
    children = [value.raw_value, *value._metadata.values()]
    _ = value._hook_flags, value._origin, value._can_update
  elif isinstance(value, _engine.ObjectBase):
    children = [*vars(value).values(), *(value._pytree_status or {}).values()]
  elif isinstance(value, dict):
    children = [*value.keys(), *value.values()]
  elif isinstance(value, (list, tuple)):
    children = list(value)
  elif isinstance(value, _engine.StructureBase):
    children = list(value._records)
  for child in children:
    _look(child, seen)


# Calls of the engine on a graph: (graph, another, generator) -> result.


def _apply(graph, rng, variables_alone=False):
  structure, leaves, objects = _engine.flatten((graph,))
  values, inner = _engine.unflatten(structure, leaves)
  _change(values[0], rng)
  given = leaves if variables_alone else None
  packed = _engine.pack(structure, inner, leaves, values[0], given)
  return _engine.apply(packed, objects, leaves)


def _change(graph, rng):
  """Does to a graph what a lifted function may do."""
  nodes = [graph]
  for _, node in nnx.iter_graph(graph):
    if isinstance(node, nnx.Pytree):
      nodes.append(node)
  for _ in range(int(rng.integers(0, 4))):
    node = nodes[int(rng.integers(len(nodes)))]
    name = "abcd"[int(rng.integers(4))]
    what = int(rng.integers(5))
    if (node._pytree_status or {}).get(name) is False:
      continue  # marked as static: no place for nodes
    if what == 0:
      setattr(node, name, "static")
    elif what == 1:
      setattr(node, name, nnx.Param(np.zeros(2)))
    elif what == 2:
      setattr(node, name, nodes[int(rng.integers(len(nodes)))])
    elif what == 3:
      vars(node).pop(name, None)
    else:
      for child in list(vars(node).values()):
        if isinstance(child, nnx.Variable):
          child.value = np.full(3, 7.0)


def _jit(graph, rng):
  """The repeated call, with a function of Python in the place of a program."""
  numbers = rng.integers(1 << 30, size=2)

  def make_entry(structure, leaves, names, objects):
    def compiled(leaves):
      values, inner = _engine.unflatten(structure, leaves)
      _change(values[0], np.random.default_rng(numbers))
      return _engine.pack(structure, inner, leaves, values[0])

    return _engine.JitEntry((compiled, None, None))

  jitted = _engine.JitFunction(make_entry, copy.copy, frozenset())
  for _ in range(int(rng.integers(1, 4))):
    result = jitted(graph)
  return result


def _roundtrip(graph, rng):
  graphdef, state = nnx.split(graph)
  return nnx.merge(graphdef, state, copy=bool(rng.integers(2)))


def _update(graph, rng):
  state = nnx.state(graph)
  nnx.update(graph, state)
  nnx.update(graph, nnx.to_pure_dict(nnx.state(graph)))


def _compare(graph, rng):
  a, b = nnx.graphdef(graph), nnx.graphdef(graph)
  structure, _, _ = _engine.flatten((graph, [graph]))
  _engine.matches(structure, (graph, [graph]))
  return a == b, hash(a), a._records, _engine.matches(structure, (graph, []))


def _mappings(graph, rng):
  mapping = nnx.state(graph).raw_mapping
  parts = _engine.split_mapping(
    mapping, (nnx.Param, lambda path, x: len(path) > 1, True), True
  )
  return _engine.merge_mappings(*parts), _engine.flatten_mapping(mapping)


def _tree(graph, rng):
  # One level: jaxlib borrows the items of lists and dicts that it walks, so
  # that it dies itself where one is cleared meanwhile.
  children, aux = _engine.object_flatten(graph)
  return _engine.make_object_unflatten(type(graph))(aux, children)


def _set(graph, rng):
  name = "abcd"[int(rng.integers(4))]
  graph._pytree_status = {engine_graphs.Name(name): True, "b": False}
  setattr(graph, name, [engine_graphs.Bomb()])
  return _engine.object_flatten(graph)


_CALLS: list[Callable[[Any, np.random.Generator], Any]] = [
  _apply,
  _compare,
  _jit,
  _mappings,
  _roundtrip,
  _set,
  _tree,
  _update,
  lambda graph, rng: nnx.split(graph, nnx.Param, lambda p, x: True, ...),
  lambda graph, rng: nnx.state(graph, nnx.Param),
  lambda graph, rng: nnx.clone(graph, variables=bool(rng.integers(2))),
  lambda graph, rng: nnx.pop(graph, nnx.Param),
  lambda graph, rng: _engine.holds_data([graph, {"a": [graph]}]),
  lambda graph, rng: _engine.holds_data([*vars(graph).values()]),
  lambda graph, rng: _engine.items(graph),
]


def _vandals(_: np.random.Generator) -> worker.Case:
  """Code that the engine calls changes what it walks, and raises."""

  def case(rng):
    graph, maker = engine_graphs.graph(rng, spoiled=True)
    call = _CALLS[int(rng.integers(len(_CALLS)))]
    engine_graphs.set_act(engine_graphs.vandal(rng, maker))
    try:
      result = _attempt(lambda: call(graph, rng))
    finally:
      engine_graphs.calm()
    _look([graph, result, maker.pool], set())
    _attempt(lambda: nnx.state(graph))

  return case


def _threads(_: np.random.Generator) -> worker.Case:
  """Threads change what others walk."""

  def case(rng):
    graph, maker = engine_graphs.graph(rng, spoiled=True)
    vandal = engine_graphs.vandal(rng, maker)

    def work(number):
      inner = np.random.default_rng(number)
      for _ in range(6):
        call = _CALLS[int(inner.integers(len(_CALLS)))]
        # A race in Python code that the calls run is not the engine's.
        _attempt(call, graph, inner)
        _attempt(vandal)

    threads.race(work, [int(rng.integers(1 << 30)) for _ in range(3)])
    _look([graph, maker.pool], set())

  return case


def _oracle(_: np.random.Generator) -> worker.Case:
  """The engine in C++ and the one in Python say the same."""

  def case(rng):
    graph, _ = engine_graphs.graph(rng, spoiled=bool(rng.integers(2)))
    records, leaves, objects = reference.flatten(graph)
    graphdef, state = nnx.split(graph)
    assert graphdef._records == records
    assert graphdef.num_leaves == len(leaves)
    assert graphdef.num_nodes == len(objects)
    structure, leaves, objects = _engine.flatten((graph,))
    walk = reference.Flattener()
    walk.add(graph, attributes=False)
    assert structure._records == tuple(walk.records)
    assert all(a is b for a, b in zip(leaves, walk.leaves, strict=True))
    assert all(a is b for a, b in zip(objects, walk.objects, strict=True))
    (ours,), _ = _engine.unflatten(structure, leaves)
    theirs = reference.unflatten(walk.records, walk.leaves)
    assert nnx.graphdef(ours) == nnx.graphdef(theirs) == graphdef
    merged = nnx.merge(graphdef, state)
    assert nnx.graphdef(merged) == graphdef
    assert hash(nnx.graphdef(merged)) == hash(graphdef)
    assert nnx.graphdef(nnx.clone(graph)) == graphdef
    assert _engine.matches(structure, (graph,))
    # What is done to copies is done to the originals.
    number = int(rng.integers(1 << 30))
    expected = nnx.clone(graph)
    _change(expected, np.random.default_rng(number))
    result = _apply(graph, np.random.default_rng(number))
    assert result is graph
    after, expected_after = nnx.graphdef(graph), nnx.graphdef(expected)
    assert after == expected_after

  return case


def _content(graph):
  """What a graph holds, to compare after a call that failed."""
  records, leaves, objects = reference.flatten(graph)
  return records, [id(x) for x in leaves], [id(x) for x in objects]


def _failures(_: np.random.Generator) -> worker.Case:
  """What raises in the middle leaves a graph as it was."""

  def case(rng):
    graph, _ = engine_graphs.graph(rng, spoiled=True)
    state = nnx.to_pure_dict(nnx.state(graph))
    before = _content(graph)
    count = int(rng.integers(1, 8))

    def act():
      nonlocal count
      count -= 1
      if count == 0:
        raise engine_graphs.Deliberate

    engine_graphs.set_act(act)
    failed = False
    try:
      if rng.integers(2):
        nnx.update(graph, state)
      else:
        _apply(graph, rng, bool(rng.integers(2)))
    except (engine_graphs.Deliberate, ValueError):
      failed = True
    finally:
      engine_graphs.calm()
    # What the functions of a custom node do before they raise is their own.
    custom = any(record[0] == "custom" for record in before[0])
    if failed and not custom:
      assert _content(graph) == before

  return case


class _Unpickler(pickle._Unpickler):
  """Finds only what an honest pickle of the engine's names.

  The one in Python, as that in C allocates what broken data ask for.
  """

  def __init__(self, data: bytes, known: set[tuple[str, str]]):
    super().__init__(io.BytesIO(data))
    self._known = known

  def find_class(self, module, name):
    if (module, name) not in self._known:
      raise pickle.UnpicklingError(f"{module}.{name}")
    return super().find_class(module, name)


def _known_names(data: bytes) -> set[tuple[str, str]]:
  known = set()

  class Recorder(pickle.Unpickler):
    def find_class(self, module, name):
      known.add((module, name))
      return super().find_class(module, name)

  Recorder(io.BytesIO(data)).load()
  return known


def _tamper(records, rng):
  """Records with a few fields that are not what they were."""
  records = [list(record) for record in records]
  for _ in range(int(rng.integers(1, 4))):
    what = int(rng.integers(8))
    if what == 0 and records:
      del records[int(rng.integers(len(records)))]
    elif what == 1 and records:
      at = int(rng.integers(len(records)))
      records.insert(at, list(records[int(rng.integers(len(records)))]))
    elif records:
      record = records[int(rng.integers(len(records)))]
      other = records[int(rng.integers(len(records)))]
      field = int(rng.integers(len(record)))
      values = [other[field], 0, -1, 1, 2**31 - 1, -(2**31), 2**70, None, (),
                ("a",), ("a", "b"), {}, {"a": 1}, int, list, dict, tuple, str,
                nnx.Param, graphs.Node, graphs.Point, nnx.State, True, "ref",
                "list", "dict", "tuple", "leaf", "static", "variable", "object",
                "state", "custom", "namedtuple", "pytree", engine_graphs.Cellar,
                (engine_graphs.Name("a"),)]  # fmt: skip
      record[field] = values[int(rng.integers(len(values)))]
  return tuple(map(tuple, records))


def _use(structure, graph, state, rng):
  """Uses a structure that may be anything."""
  _attempt(lambda: hash(structure))
  _attempt(lambda: structure == nnx.graphdef(graph))
  _attempt(lambda: repr(structure))
  _attempt(lambda: structure.leaf_records())
  _attempt(lambda: nnx.merge(structure, state))
  leaves = tuple(np.ones(1) for _ in range(min(structure.num_leaves, 1000)))
  made = _attempt(lambda: _engine.unflatten(structure, leaves))
  _attempt(lambda: nnx.merge(structure, list(leaves)))
  _attempt(lambda: _engine.matches(structure, (graph,)))
  if made is None:
    return
  values, objects = made
  _look(values, set())
  _attempt(lambda: _engine.matches(structure, values))
  _attempt(lambda: _engine.pack(structure, objects, leaves, values, leaves))
  packed = _attempt(lambda: _engine.pack(structure, objects, leaves, values))
  if packed is not None:
    _attempt(lambda: _engine.apply(packed, objects, leaves))
    wrong = tuple(reversed(objects)) + (1, [])
    _attempt(lambda: _engine.apply(packed, wrong, leaves[:1]))
    _attempt(lambda: _engine.framed(structure, wrong[: len(objects)], len, ""))


def _pickles(_: np.random.Generator) -> worker.Case:
  """Records and pickles that were tampered with."""

  def case(rng):
    graph, _ = engine_graphs.graph(rng, spoiled=bool(rng.integers(2)))
    graphdef, state = nnx.split(graph)
    numbers = [0, 1, 2, -1, -(2**31), 2**31 - 1, 2**31, 10**6]
    extra = [numbers[int(i)] for i in rng.integers(len(numbers), size=2)]
    roots = extra[0] if rng.random() < 0.2 else 1
    outer = extra[1] if rng.random() < 0.2 else 0
    updates = [None, (), (0,) * graphdef.num_nodes, ("a",) * graphdef.num_nodes]
    structure = _attempt(
      lambda: nnx.graph.NodeDef._restore(
        _tamper(graphdef._records, rng), roots, outer, updates[outer % 4]
      )
    )
    if structure is not None:
      _use(structure, graph, state, rng)
    # Without arrays: numpy's own way of reading pickles can be led astray.
    data = _attempt(lambda: pickle.dumps((graphdef, [graphdef, 1])))
    if data is None:
      return
    known = _known_names(data)
    broken = bytearray(data)
    for _ in range(int(rng.integers(1, 6))):
      broken[int(rng.integers(len(broken)))] = int(rng.integers(256))
    if pickle.BYTEARRAY8 in broken:
      return  # as above
    try:
      value = _Unpickler(bytes(broken), known).load()
    except Exception as e:
      if isinstance(e, SystemError):
        raise
      return
    found = value[0] if isinstance(value, tuple) and value else value
    if isinstance(found, _engine.StructureBase):
      _use(found, graph, state, rng)

  return case


def _arguments(graph):
  graphdef, state = nnx.split(graph)
  structure, leaves, objects = _engine.flatten((graph,))
  values, inner = _engine.unflatten(structure, leaves)
  packed = _engine.pack(structure, inner, leaves, values[0])
  plain = [None, True, 0, -1, 2**31, 2**70, 1.5, "a", b"", (), [], {}, len, int]
  return plain + [
    graph, graphdef, state, state.raw_mapping, structure, leaves, objects,
    packed, packed.plan, packed.outputs, packed.plan.writes, (True,), (graph,),
    (nnx.Param, True), [graph], {"a": graph}, nnx.Param(1), nnx.Param,
    graphs.Node, graphs.Box, graphs.Box(), np.ones(2), lambda *args: args,
    _engine.VariableBase(1), _engine.ObjectBase(), _engine.VariableBase,
    engine_graphs.Mine(1), engine_graphs.Bomb(), graphs.Point(1, 2),
    _engine.JitFunction.__new__(_engine.JitFunction), frozenset(), object(),
    ((), (), (), ()), (("a",), ("b",), (), (("a", True),)), (np.ones(1),),
    graphdef._records,
  ]  # fmt: skip


# `configure` changes the engine for all that follows; types that are registered
# stay so.
_SPARED = ("configure", "register_node_type", "forget_type")
_FUNCTIONS = sorted(
  name
  for name in dir(_engine)
  if callable(getattr(_engine, name)) and name not in _SPARED
)


def _calls(_: np.random.Generator) -> worker.Case:
  """Every function, type and method with arguments that it does not want."""

  def case(rng):
    graph, _ = engine_graphs.graph(rng, spoiled=bool(rng.integers(2)))
    arguments = _arguments(graph)

    def some(count):
      return [
        arguments[int(i)] for i in rng.integers(len(arguments), size=count)
      ]

    for _ in range(10):
      function = getattr(
        _engine, _FUNCTIONS[int(rng.integers(len(_FUNCTIONS)))]
      )
      what = int(rng.integers(6))
      target: Any = function
      if what == 0 and isinstance(function, type):
        target = _attempt(function.__new__, function, *some(1))
      elif what < 3:
        target = some(1)[0]
      if isinstance(target, _engine.VariableBase | _engine.ObjectBase):
        names = [n for n in dir(target) if n not in ("__class__", "__del__")]
        name = names[int(rng.integers(len(names)))]
        _attempt(setattr, target, name, some(1)[0])
      if target is not function and what < 3:
        _attempt(target.__init__, *some(int(rng.integers(4))))
        for each in (copy.copy, copy.deepcopy, pickle.dumps, hash, repr):
          _attempt_any(each, target)
      if callable(target):
        count = int(rng.integers(6))
        _attempt_any(target, *some(count))

  return case


def _attempt_any(function, *args):
  """As `_attempt`, where Python's own errors may come as well."""
  try:
    return function(*args)
  except SystemError:
    raise
  except Exception:
    return None


def _in_a_thread(family: worker.Family) -> worker.Family:
  """Runs each case in a thread, which counts its own stack.

  Jaxlib loses count of the stack that is left when it meets a cycle.
  """

  def threaded(rng):
    case = family(rng)

    def run(rng):
      errors: list[BaseException] = []

      def work():
        try:
          case(rng)
        except BaseException as e:
          errors.append(e)

      thread = threading.Thread(target=work)
      thread.start()
      thread.join()
      if errors:
        raise errors[0]

    return run

  return threaded


FAMILIES: dict[str, worker.Family] = {
  "graphs": _oracle,
  "vandals": _vandals,
  "threads": _threads,
  "failures": _failures,
  "pickles": _pickles,
  "calls": _in_a_thread(_calls),
  "in_place": engine_in_place.programs,
  "in_place_threads": engine_in_place.threads,
}


if __name__ == "__main__":
  sys.exit(worker.main("tests.fuzz.engine_fuzz"))
