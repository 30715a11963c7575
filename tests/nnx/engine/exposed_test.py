"""What the extension exposes refuses what it cannot use: it never crashes."""

import copy
import gc
import pickle
import weakref

from absl.testing import absltest, parameterized
import jax
import numpy as np

import nnx
from nnx.engine import _engine
from tests.nnx.engine import graphs

_TYPES = [
  _engine.JitFunction,
  _engine.ObjectBase,
  _engine.Packed,
  _engine.Plan,
  _engine.StructureBase,
  _engine.VariableBase,
]
_FUNCTIONS = sorted(
  name
  for name in dir(_engine)
  if callable(getattr(_engine, name))
  and not isinstance(getattr(_engine, name), type)
)


def _attempt(function, *args):
  """Calls a function; what it raises must be an error with words."""
  try:
    return function(*args)
  except SystemError:
    raise
  except Exception as e:
    assert str(e)
    return None


def _use(value):
  """Everything that can be done with any object."""
  for each in (
    repr,
    hash,
    dir,
    copy.copy,
    copy.deepcopy,
    pickle.dumps,
    weakref.ref,
    gc.get_referents,
    gc.get_referrers,
    lambda x: x == x,
    lambda x: x(),
    lambda x: x.anything,
    lambda x: x[...],
    lambda x: x.__reduce_ex__(4),
    lambda x: jax.tree.leaves(x),
    lambda x: setattr(x, "a", 1),
    lambda x: delattr(x, "a"),
    lambda x: delattr(x, "value"),
    lambda x: x.__setitem__(..., 1),
    lambda x: x.__delitem__(0),
    lambda x: x.__init__(),
    lambda x: x.__init__(1, 2, 3),
    lambda x: x.__init__(x),
    _engine.holds_data,
    lambda x: _engine.split(x, (True,), True),
    lambda x: _engine.flatten((x, [x])),
  ):
    _attempt(each, value)
  for name in dir(value):
    if name not in ("__class__", "__init_subclass__", "__subclasshook__"):
      method = _attempt(getattr, value, name)
      if callable(method):
        _attempt(method)
        _attempt(method, 1, 2)


def _packed():
  graph = nnx.Dict(a=nnx.Param(np.ones(1)), b=nnx.Dict())
  structure, leaves, objects = _engine.flatten((graph,))
  values, inner = _engine.unflatten(structure, leaves)
  values[0].a.value = np.zeros(1)
  packed = _engine.pack(structure, inner, leaves, values[0])
  return structure, leaves, objects, packed


class TypesTest(parameterized.TestCase):
  @parameterized.parameters(*_TYPES)
  def test_an_instance_that_nothing_was_given(self, cls):
    for make in (
      lambda: cls(),
      lambda: cls.__new__(cls),
      lambda: object.__new__(cls),
      lambda: type("Sub", (cls,), {})(),
      lambda: type("Slotted", (cls,), {"__slots__": ("a",)})(),
    ):
      value = _attempt(make)
      if value is not None:
        _use(value)

  def test_a_bare_variable_is_used(self):
    variable = _engine.VariableBase(3)
    self.assertEqual((variable.value, variable.raw_value), (3, 3))
    for function in (
      lambda: _engine.VariableBase(),
      lambda: variable.missing,
      lambda: variable[0],
      lambda: setattr(variable, "missing", 1),
    ):
      with self.assertRaises((AttributeError, TypeError)):
        function()
    with self.assertRaisesRegex(AttributeError, "_init_slow"):
      _engine.VariableBase()

  def test_a_function_that_was_not_initialised_is_not_called(self):
    jitted = _engine.JitFunction.__new__(_engine.JitFunction)
    for function in (jitted, jitted._prepare):
      with self.assertRaisesRegex(
        TypeError, "must be initialised before it is called"
      ):
        function(1)
    self.assertEqual(jitted._cache_size(), 0)
    jitted.clear_cache()

  def test_a_function_that_calls_itself_without_end(self):
    jitted = _engine.JitFunction(len, copy.copy, frozenset())
    for make_entry in (
      jitted,
      lambda *args: _engine.JitEntry((jitted, None, None)),
    ):
      jitted.__init__(make_entry, copy.copy, frozenset())
      with self.assertRaises(RecursionError):
        jitted(np.ones(1))

  def test_a_compiled_function_must_return_what_fits(self):
    *_, packed = _packed()
    jitted = _engine.JitFunction(
      lambda *args: _engine.JitEntry((lambda leaves: packed, None, None)),
      copy.copy,
      frozenset(),
    )
    with self.assertRaisesRegex(ValueError, "must be those of the structure"):
      jitted(np.ones(1))
    jitted = _engine.JitFunction(
      lambda *args: _engine.JitEntry((lambda leaves: 1, None, None)),
      copy.copy,
      frozenset(),
    )
    with self.assertRaisesRegex(TypeError, "must return a Packed"):
      jitted(np.ones(1))


class FunctionsTest(parameterized.TestCase):
  @parameterized.parameters(*_FUNCTIONS)
  def test_wrong_arguments(self, name):
    if name == "configure":
      return  # below
    function = getattr(_engine, name)
    structure, leaves, objects, packed = _packed()
    graphdef, state = nnx.split(nnx.Dict(a=nnx.Param(1)))
    good = [structure, leaves, objects, packed, packed.plan, graphdef, state]
    bad = [None, 1, -1, "a", (), [], {}, int, object(), (1, 2), ((),) * 4]
    values = good + bad + [nnx.Param, nnx.Param(1), nnx.Dict(), graphs.Box()]
    _attempt(function)
    for a in values:
      if name == "register_node_type":
        continue  # it would stay
      _attempt(function, a)
      for b in values:
        _attempt(function, a, b)
        for c in (None, 0, (), (True,), objects, leaves, 1):
          _attempt(function, a, b, c)
          _attempt(function, a, b, c, packed)
          _attempt(function, a, b, c, [1], [None, 2])

  def test_configure_refuses_what_would_be_written_into(self):
    with self.assertRaisesRegex(TypeError, "must be a subclass of Structure"):
      _engine.configure(structure=int)
    for name in ("array_type", "state", "variable_metadata"):
      with self.assertRaisesRegex(TypeError, "must be a class"):
        _engine.configure(**{name: 1})

  def test_objects_of_another_kind_are_refused(self):
    structure, leaves, objects, packed = _packed()
    for wrong in ((1,) * len(objects), (None,) * len(objects)):
      for function in (
        lambda x: _engine.apply(packed, x, leaves),
        lambda x: _engine.pack(structure, x, leaves, None),
        lambda x: _engine.framed(structure, x, len, ""),
      ):
        with self.assertRaisesRegex(ValueError, "must be those of the"):
          function(wrong)
    with self.assertRaisesRegex(ValueError, "`objects` must be those"):
      _engine.apply(packed, (), leaves)

  def test_leaves_that_are_missing_are_refused(self):
    graph = nnx.Dict(a=nnx.Param(np.ones(1)))
    structure, leaves, objects = _engine.flatten((graph,))
    _, inner = _engine.unflatten(structure, leaves)
    packed = _engine.pack(structure, inner, leaves, None)
    with self.assertRaisesRegex(ValueError, "`leaves` must be those"):
      _engine.apply(packed, objects, ())

  def test_a_static_that_is_neither_true_nor_false(self):
    with self.assertRaisesRegex(ValueError, "ambiguous"):
      _engine.flatten((1,), static=(np.ones(2),))

  def test_a_state_is_asked_for(self):
    with self.assertRaisesRegex(TypeError, "`state` must be a State or a dict"):
      _engine.state_flatten(1)
    with self.assertRaisesRegex(TypeError, "`type` must be a class"):
      _engine.forget_type(1)

  def test_static_attributes_have_values(self):
    unflatten = _engine.make_object_unflatten(graphs.Node)
    with self.assertRaisesRegex(ValueError, "a value for each static"):
      unflatten(((), ("a", "b"), (1,), ()), ())

  @parameterized.parameters((None,), (1,), ([],), ("",))
  def test_aux_of_an_object_is_a_tuple(self, aux):
    unflatten = _engine.make_object_unflatten(graphs.Node)
    text = "`aux` of a Pytree must be a tuple, but got"
    with self.assertRaisesRegex(TypeError, text):
      unflatten(aux, ())


class RestoreTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    node = graphs.Node()
    node.a = nnx.Param(np.ones(1))
    node.b = [node.a, {"c": (1, graphs.Point(1, 2))}]
    self.graphdef = nnx.graphdef(node)

  @parameterized.product(
    roots=[-(2**31), -1, 0, 2, 2**31 - 1],
    outer=[-(2**31), -1, 0, 2**31 - 1],
  )
  def test_counts_that_cannot_be(self, roots, outer):
    for records in ((), self.graphdef._records):
      if records == () and roots == 0 and outer >= 0:
        continue
      with self.assertRaisesRegex(ValueError, "must be those of a graph"):
        nnx.graph.NodeDef._restore(records, roots, outer)

  def test_objects_of_earlier_splits_are_not_made_up(self):
    structure = nnx.graph.NodeDef._restore(
      self.graphdef._records[:0], 0, 2**31 - 1
    )
    for function in (
      lambda: _engine.unflatten(structure, ()),
      lambda: _engine.matches(structure, ()),
      lambda: _engine.pack(structure, (), (), None),
      lambda: _engine.framed(structure, (), len, ""),
    ):
      with self.assertRaisesRegex(ValueError, "`structure` must be complete"):
        function()

  @parameterized.parameters(
    (("a",),), ((1, 2**70, 1, 1, 1),), ((1,),), ((None,) * 5,)
  )
  def test_updates_that_are_no_numbers(self, updates):
    with self.assertRaisesRegex(ValueError, "must be those of a graph"):
      nnx.graph.NodeDef._restore(self.graphdef._records, 1, 0, updates)

  def test_kinds_that_are_not_what_they_say(self):
    for kind, field, value in (
      ("list", 4, str),  # a walk would read its items
      ("list", 1, -1),
      ("list", 5, ()),
      ("list", 7, False),
      ("dict", 4, list),
      ("dict", 1, -1),
      ("dict", 7, False),
      ("tuple", 4, str),
      ("tuple", 1, 3),
      ("namedtuple", 4, list),
      ("static", 1, 4),
      ("static", 2, 1),
      ("variable", 5, ()),
      ("object", 5, ((1,), (2,))),
    ):
      records = list(self.graphdef._records)
      at = next(i for i, record in enumerate(records) if record.kind == kind)
      record = list(records[at])
      record[field] = value
      records[at] = tuple(record)
      with self.assertRaisesRegex(ValueError, "must be those of a graph"):
        nnx.graph.NodeDef._restore(tuple(records), 1)

  def test_a_structure_cannot_be_changed_through_its_records(self):
    graphdef = nnx.graphdef(nnx.Dict(a=nnx.Param(1, tag="x")))
    before = hash(graphdef)
    for record in graphdef._records:
      if isinstance(record.aux, dict):
        record.aux.clear()
    self.assertEqual(hash(graphdef), before)
    self.assertEqual(graphdef, nnx.graphdef(nnx.Dict(a=nnx.Param(1, tag="x"))))


class FailureTest(parameterized.TestCase):
  """What raises in the middle leaves everything as it was."""

  def test_update(self):
    class Refusing:
      def __init__(self):
        self.contents = {"w": np.ones(1)}

      def set_key(self, key, value):
        if value is wrong:
          raise RuntimeError("no")
        self.contents[key] = value

    nnx.register_graph_node_type(
      Refusing,
      flatten=lambda node: (list(node.contents.items()), None),
      set_key=Refusing.set_key,
      pop_key=lambda node, key: node.contents.pop(key),
      create_empty=lambda metadata: Refusing(),
      clear=lambda node: node.contents.clear(),
    )
    wrong = np.zeros(1)
    model = nnx.Dict(
      a=nnx.Param(1.0),
      arrays=nnx.List([np.ones(1)]),
      first=Refusing(),
      second=Refusing(),
      table={"x": np.ones(1)},
    )
    old = [model.arrays[0], model.table["x"], model.first.contents["w"]]
    new = np.full(1, 7.0)
    with self.assertRaisesRegex(RuntimeError, "no"):
      nnx.update(
        model,
        {
          "a": 2.0,
          "arrays": {0: new},
          "first": {"w": new},
          "more": nnx.Variable(new),
          "table": {"x": new, "y": nnx.Variable(new)},
          "second": {"w": wrong},
        },
      )
    self.assertEqual(model.a.value, 1.0)
    self.assertFalse(hasattr(model, "more"))
    self.assertEqual(list(model.table), ["x"])
    now = [model.arrays[0], model.table["x"], model.first.contents["w"]]
    for a, b in zip(old, now, strict=True):
      self.assertIs(a, b)

  def test_apply(self):
    class Refusing:
      pass

    def unflatten(_, children):
      if refuse:
        raise RuntimeError("no")
      return Refusing()

    refuse = False
    jax.tree_util.register_pytree_node(
      Refusing, lambda x: ((np.ones(1),), None), unflatten
    )

    def change(model):
      model.first.extra = nnx.Param(np.zeros(1))
      model.items.append(1)
      model.w.value = np.zeros(1)

    model = nnx.Dict(first=nnx.Dict(), w=nnx.Param(np.ones(1)))
    model.items = [np.ones(1)]
    model.z = Refusing()
    before = nnx.graphdef(model)
    structure, leaves, objects = _engine.flatten((model,))
    (copied,), inner = _engine.unflatten(structure, leaves)
    change(copied)
    packed = _engine.pack(structure, inner, leaves, None)
    refuse = True
    with self.assertRaisesRegex(RuntimeError, "no"):
      _engine.apply(packed, objects, leaves)
    self.assertEqual(nnx.graphdef(model), before)
    np.testing.assert_array_equal(model.w.value, np.ones(1))
    refuse = False
    _engine.apply(packed, objects, leaves)
    self.assertLen(model.items, 2)
    np.testing.assert_array_equal(model.first.extra.value, np.zeros(1))

  def test_a_write_that_is_refused_leaves_the_others_undone(self):
    outside = nnx.Dict(a=nnx.Dict())

    @jax.jit
    def f(x):
      pair = nnx.Dict(first=nnx.Dict(), second=outside)
      structure, leaves, objects = _engine.flatten((pair,))
      (copied,), inner = _engine.unflatten(structure, leaves)
      copied.first.extra = 1
      copied.second.a.extra = 1
      packed = _engine.pack(structure, inner, leaves, None)
      with self.assertRaises(nnx.TraceContextError):
        _engine.apply(packed, objects, leaves)
      self.assertFalse(hasattr(pair.first, "extra"))
      return x

    f(1)
    self.assertFalse(hasattr(outside.a, "extra"))


class NestedVariablesTest(parameterized.TestCase):
  """A Variable in the value of another, which the graph refers to as well."""

  @parameterized.parameters(True, False)
  def test_merge(self, copied):
    inner = nnx.Param(np.ones(1))
    model = graphs.Node()
    model.a = nnx.Param([1, {"x": inner}])
    model.b = inner
    merged = nnx.merge(*nnx.split(model), copy=copied)
    self.assertIs(merged.b, merged.a.raw_value[1]["x"])
    self.assertIs(merged.b, inner)
    cloned = nnx.clone(model, variables=copied)
    self.assertIs(cloned.b, cloned.a.raw_value[1]["x"])

  def test_merge_of_a_state_that_holds_another(self):
    inner = nnx.Param(np.ones(1))
    model = graphs.Node()
    model.a, model.b = nnx.Param([inner]), inner
    graphdef, state = nnx.split(model)
    with self.assertRaisesRegex(
      ValueError, "must hold the node that it refers"
    ):
      nnx.merge(graphdef, {"a": nnx.Param(np.ones(1))})
    del state

  def test_update_of_containers_in_a_pytree(self):
    model = graphs.Node()
    model.pair = graphs.Pair((nnx.Param(1.0), 2), [nnx.Param(3.0)])
    nnx.update(model, nnx.state(model))
    nnx.update(model, {"pair": {0: {0: 5.0}, 1: {0: 6.0}}})
    self.assertEqual(model.pair.a[0].value, 5.0)
    self.assertEqual(model.pair.b[0].value, 6.0)


if __name__ == "__main__":
  absltest.main()
