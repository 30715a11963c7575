"""Attributes: what is data, what is static, and what is refused when strict."""

import abc
import copy
import dataclasses
import pickle

from absl.testing import absltest, parameterized
import flax
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx


class Base(nnx.Pytree):
  pass


class Strict(nnx.Pytree, strict=True):
  pass


class Annotated(nnx.Pytree):
  a: nnx.Data[int]
  b: nnx.Static[int]
  c: "nnx.Data[list]"

  def __init__(self):
    self.a, self.b, self.c, self.d = 1, 2, [3], 4


@nnx.dataclass
class Record(nnx.Pytree):
  a: int = nnx.data()
  b: str = "x"
  c: tuple = nnx.static(default=(1, 2))
  d: list = nnx.data(default_factory=list)


class Node(nnx.Pytree):
  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def leaves(x):
  return jax.tree.leaves(x)


class StatusTest(parameterized.TestCase):
  @parameterized.parameters(
    (lambda lib: jnp.zeros(2),),
    (lambda lib: np.zeros(2),),
    (lambda lib: lib.Param(1),),
    (lambda lib: lib.Rngs(0),),
    (lambda lib: jax.random.key(0),),
    (lambda lib: 3,),
    (lambda lib: 1.5,),
    (lambda lib: "a",),
    (lambda lib: None,),
    (lambda lib: [jnp.zeros(2)],),
    (lambda lib: {"a": lib.Param(1)},),
    (lambda lib: jax.nn.relu,),
    (lambda lib: np.float32(1),),
  )
  def test_is_data_as_in_flax(self, build):
    self.assertEqual(nnx.is_data(build(nnx)), flax_nnx.is_data(build(flax_nnx)))
    self.assertLen(
      nnx.has_data(build(nnx)), len(flax_nnx.has_data(build(flax_nnx)))
    )

  def test_has_data_in_containers_that_contain_themselves(self):
    x = [jnp.zeros(1)]
    x.append(x)
    self.assertLen(nnx.has_data(x), 1)

  def test_marks(self):
    node = Node(a=nnx.data(1), b=nnx.static("x"), c=2, d=jnp.zeros(1))
    self.assertEqual((node.a, node.b, node.c), (1, "x", 2))
    self.assertEqual(leaves(node), [1, 0])
    node.a = 5  # keeps its mark
    self.assertEqual(leaves(node), [5, 0])
    node.a = nnx.static(5)
    self.assertEqual(leaves(node), [0])
    node.c = nnx.data(7)
    self.assertEqual(leaves(node), [7, 0])
    del node.c
    node.c = 8
    self.assertEqual(leaves(node), [0])

  def test_annotations(self):
    self.assertEqual(leaves(Annotated()), [1, 3])

  def test_inherited_annotations(self):
    class Child(Annotated):
      d: nnx.Data[int]

    self.assertEqual(leaves(Child()), [1, 3, 4])

  def test_dataclass(self):
    record = Record(5)
    self.assertEqual(leaves(record), [5])
    self.assertEqual(leaves(Record(5, d=[1, 2])), [5, 1, 2])
    self.assertEqual(record.c, (1, 2))
    self.assertEqual(Record(1), Record(1))
    self.assertIn("Record(", repr(record))
    self.assertTrue(dataclasses.is_dataclass(Record))

  def test_dataclass_options(self):
    @nnx.dataclass(eq=False, kw_only=True)
    class Other(nnx.Pytree):
      a: int = nnx.data(default=3)

    self.assertNotEqual(Other(), Other())
    self.assertEqual(leaves(Other(a=4)), [4])

  @parameterized.parameters("frozen", "slots")
  def test_refused_dataclass_options(self, option):
    with self.assertRaisesRegex(
      TypeError, f"`nnx.dataclass` got `{option}=True`. Leave it out"
    ):
      nnx.dataclass(**{option: True})(type("Other", (nnx.Pytree,), {}))

  def test_declared_in_a_plain_class(self):
    class Plain(nnx.Pytree):
      a: list = nnx.data()

      def __init__(self):
        self.a = [1, 2]

    self.assertEqual(leaves(Plain()), [1, 2])

  def test_conflicting_declarations(self):
    with self.assertRaisesRegex(
      ValueError,
      "`Bad.a` must be marked one way, but its annotation says static and its"
      " field says data",
    ):

      class Bad(nnx.Pytree):
        a: nnx.Static[int] = nnx.data()

    with self.assertRaisesRegex(ValueError, "must be a bool, but got `3`"):

      class Worse(nnx.Pytree):
        a: int = dataclasses.field(metadata={"static": 3})

  def test_wrong_calls(self):
    with self.assertRaisesRegex(TypeError, "`nnx.data` must be called with a"):
      nnx.data(1, default=2)
    with self.assertRaisesRegex(ValueError, "must not have the key `static`"):
      nnx.static(metadata={"static": True})
    self.assertEqual(
      dict(nnx.static(metadata={"a": 1}).metadata), {"a": 1, "static": True}
    )

  def test_registered_data_that_jax_opens_are_opened(self):
    @nnx.register_data_type
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Quantized:
      whole: object
      scale: object
      how: str = dataclasses.field(metadata={"static": True}, default="int8")

    for make in (lambda x: x, nnx.Param):
      model = nnx.Dict(
        kernel=Quantized(make(jnp.arange(2.0)), make(jnp.ones(1)))
      )
      self.assertEqual(
        [path for path, _ in nnx.to_flat_state(nnx.state(model))],
        [("kernel", "scale"), ("kernel", "whole")],
      )
      doubled = nnx.jit(lambda m: m.kernel.whole[...] * 2)(model)
      self.assertEqual(doubled.tolist(), [0.0, 2.0])
      copy = nnx.clone(model).kernel
      self.assertIs(type(copy), Quantized)
      self.assertEqual(copy.how, "int8")

  def test_registered_types(self):
    @nnx.register_data_type
    @dataclasses.dataclass(frozen=True)
    class Handle:
      value: int

    self.assertTrue(nnx.is_data(Handle(1)))
    self.assertEqual(leaves(Node(a=Handle(1), b=2)), [Handle(1)])

  def test_static_with_data_is_refused(self):
    with self.assertRaisesRegex(
      ValueError,
      "A static attribute must hold no data, but `a` of `Node` holds"
      " `ArrayImpl`.*`self.a = nnx.data",
    ):
      Node(a=nnx.static([jnp.zeros(1)]))
    node = Annotated()
    with self.assertRaisesRegex(ValueError, "`b` of `Annotated` holds `Param`"):
      node.b = nnx.Param(1)

  def test_marks_inside_containers_are_refused(self):
    node = Node(a=[nnx.data(1)])
    with self.assertRaisesRegex(
      ValueError, "`a` of `Node` holds one inside a `list`. Wrap the whole"
    ):
      nnx.check_pytree(node)
    with self.assertRaisesRegex(
      ValueError, r"a container holds `nnx.data\(1\)`. Wrap the whole"
    ):
      nnx.split(node)

  def test_static_that_cannot_be_looked_into_needs_a_hash(self):
    class Equal:
      def __eq__(self, other):
        return type(other) is type(self)

    self.assertEqual(
      nnx.graphdef(Node(a=Equal())), nnx.graphdef(Node(a=Equal()))
    )

    class Closed(Equal):
      def __reduce_ex__(self, protocol):
        raise TypeError("closed")

    with self.assertRaisesRegex(
      TypeError,
      "a hash or hold only what can be compared, but `a` is <.*Closed",
    ):
      nnx.split(Node(a=Closed()))

  def test_data_under_a_mark_that_says_static_is_refused(self):
    @dataclasses.dataclass
    class Holder:
      table: object

    for value in (
      jnp.ones(1), nnx.Param(1), nnx.State({"a": jnp.ones(1)}),
      Holder(np.ones(1)),
    ):  # fmt: skip
      node = Node(a=nnx.static((1, 2)))
      node.a = value
      for function in (nnx.split, nnx.graphdef, nnx.jit(lambda node: None)):
        with self.assertRaisesRegex(
          ValueError, "A static attribute must hold no data, but `.*a` is"
        ):
          function(node)

  def test_check_pytree(self):
    nnx.check_pytree(Record(1))
    with self.assertRaisesRegex(
      TypeError, "must be a `Pytree`, but got a `int`"
    ):
      nnx.check_pytree(3)
    node = Node(a=nnx.static([]))
    node.a.append(jnp.zeros(1))
    with self.assertRaisesRegex(ValueError, "A static attribute must hold no"):
      nnx.check_pytree(node)


class StrictTest(parameterized.TestCase):
  """What a strict class refuses, flax.nnx refuses, and the other way round."""

  ATTRIBUTES = [
    lambda lib: [lib.Param(1)],
    lambda lib: {"a": jnp.zeros(1)},
    lambda lib: (1, [np.zeros(1)]),
    lambda lib: [1, "a"],
    lambda lib: jnp.zeros(1),
    lambda lib: lib.data([lib.Param(1)]),
    lambda lib: lib.data(1),
    lambda lib: lib.static("a"),
    lambda lib: lib.static(jnp.zeros(1)),
    lambda lib: [lib.data(1)],
    lambda lib: lib.List([lib.Param(1)]),
    lambda lib: 3,
  ]

  @parameterized.parameters(*[(f,) for f in ATTRIBUTES])
  def test_assignment(self, build):
    class Theirs(flax_nnx.Pytree):
      pass

    refused = []
    for lib, node in ((nnx, Strict()), (flax_nnx, Theirs())):
      try:
        node.a = build(lib)
        refused.append(False)
      except ValueError:
        refused.append(True)
    self.assertEqual(refused[0], refused[1])

  @parameterized.parameters(
    (1, lambda: jnp.zeros(1)),
    (lambda: jnp.zeros(1), 1),
    (lambda: jnp.zeros(1), lambda: np.zeros(1)),
    (1, 2),
  )
  def test_change_of_status(self, first, second):
    class Theirs(flax_nnx.Pytree):
      pass

    refused = []
    for node in (Strict(), Theirs()):
      node.a = first() if callable(first) else first
      try:
        node.a = second() if callable(second) else second
        refused.append(False)
      except ValueError:
        refused.append(True)
    self.assertEqual(refused[0], refused[1])

  def test_messages(self):
    node = Strict()
    with self.assertRaisesRegex(
      ValueError,
      "In a strict class a container that holds data must be marked, but `a` of"
      " `Strict` is a `list` that holds `Param`. Use `self.a = nnx.data",
    ):
      node.a = [nnx.Param(1)]
    node.b = 1
    with self.assertRaisesRegex(
      ValueError, "must stay what it was, but `b` was static and got a `Param`"
    ):
      node.b = nnx.Param(1)

  def test_inherited(self):
    class Child(Strict):
      pass

    class Lenient(Strict, strict=False):
      pass

    with self.assertRaises(ValueError):
      Child().a = [nnx.Param(1)]
    Lenient().a = [nnx.Param(1)]

  def test_container_filled_later(self):
    node = Strict()
    node.a = []
    node.a.append(nnx.Param(1))
    with self.assertRaisesRegex(ValueError, "In a strict class a container"):
      nnx.check_pytree(node)


class ObjectTest(parameterized.TestCase):
  def test_pytree(self):
    node = Node(a=jnp.zeros(2), b="x", c=[nnx.Param(1), Node(d=np.ones(1))])
    other = jax.tree.map(lambda x: x + 1, node)
    self.assertIsInstance(other, Node)
    self.assertEqual(other.b, "x")
    np.testing.assert_array_equal(other.a, [1.0, 1.0])
    self.assertEqual(other.c[0].value, 2)
    np.testing.assert_array_equal(other.c[1].d, [2.0])
    paths = [
      jax.tree_util.keystr(path)
      for path, _ in jax.tree_util.tree_leaves_with_path(node)
    ]
    self.assertEqual(paths, [".a", ".c[0].value", ".c[1].d"])

  def test_objects_are_no_pytrees(self):
    class Counter(nnx.Object):
      def __init__(self):
        self.count = nnx.Variable(0)

    counter = Counter()
    self.assertEqual(leaves(counter), [counter])
    self.assertEqual(nnx.state(counter).count.value, 0)
    with self.assertRaisesRegex(ValueError, "An `Object` is not a pytree, but"):

      class Bad(nnx.Object, pytree=True):
        pass

  def test_no_slots(self):
    with self.assertRaisesRegex(TypeError, "`Bad` has `__slots__="):

      class Bad(nnx.Pytree):
        __slots__ = ("a",)

  def test_constructor_takes_no_arguments(self):
    with self.assertRaises(TypeError):
      Base(1)
    with self.assertRaises(TypeError):
      Base(a=1)

  def test_abstract_classes(self):
    class Abstract(nnx.Pytree, abc.ABC):
      @abc.abstractmethod
      def f(self):
        pass

    class Concrete(Abstract):
      def f(self):
        return 3

    with self.assertRaisesRegex(TypeError, "abstract method"):
      Abstract()
    self.assertEqual(Concrete().f(), 3)

  def test_mixins(self):
    class Mixin:
      def __init__(self, *, b):
        self.b = b

    class Both(nnx.Pytree, Mixin):
      def __init__(self):
        super().__init__(b=3)

    self.assertEqual(Both().b, 3)

  def test_properties(self):
    class WithProperty(nnx.Pytree):
      @property
      def x(self):
        return self._x

      @x.setter
      def x(self, value):
        self._x = value + 1

    node = WithProperty()
    node.x = 1
    self.assertEqual(node.x, 2)

  def test_missing_attribute(self):
    with self.assertRaisesRegex(AttributeError, "has no attribute 'x'"):
      _ = Node().x

  def test_pickle_and_copies(self):
    shared = nnx.Param(np.ones(2))
    node = Node(a=shared, b=[shared], c=nnx.data(3), d="x")
    for other in (pickle.loads(pickle.dumps(node)), copy.deepcopy(node)):
      self.assertIs(other.a, other.b[0])
      self.assertIsNot(other.a, shared)
      self.assertEqual(other.d, "x")
      self.assertLen(leaves(other), 3)
      other.c = 4
      self.assertEqual(node.c, 3)
    other = copy.copy(node)
    self.assertIs(other.a, shared)
    self.assertLen(leaves(other), 3)
    other.d = "y"
    self.assertEqual(node.d, "x")

  def test_cycles_are_copied(self):
    node = Node()
    node.me = node
    other = copy.deepcopy(node)
    self.assertIs(other.me, other)

  def test_changed_under_another_trace(self):
    node = Node(a=1)

    def f():
      node.a = 2

    with self.assertRaisesRegex(
      nnx.TraceContextError, "Cannot change `Node` from a different trace level"
    ):
      jax.jit(f)()

    def g():
      del node.a

    with self.assertRaises(nnx.TraceContextError):
      jax.jit(g)()
    self.assertEqual(node.a, 1)
    self.assertTrue(issubclass(flax.errors.TraceContextError, Exception))

  def test_made_and_changed_inside_a_trace(self):
    @jax.jit
    def f(x):
      node = Node(a=x)
      node.a = node.a + 1
      return node.a

    self.assertEqual(f(1), 2)


if __name__ == "__main__":
  absltest.main()
