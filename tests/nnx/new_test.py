"""Bases with a `__new__` of their own, before and after ours."""

import abc
import copy
import dataclasses
import inspect
import pickle
from typing import Generic, TypeVar

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp

import nnx

T = TypeVar("T")


class Recorded:
  """A mixin that keeps what its objects were made of."""

  def __new__(cls, *args, **kwargs):
    self = super().__new__(cls)
    object.__setattr__(self, "made_of", (args, kwargs))
    return self


class Named:
  """One that registers its classes, and names its objects."""

  def __init_subclass__(cls, title="", **kwargs):
    super().__init_subclass__(**kwargs)
    cls.title = title or cls.__name__

  def __new__(cls, *args, **kwargs):
    self = super().__new__(cls, *args, **kwargs)
    object.__setattr__(self, "name", cls.title.lower())
    return self


def models(lib):
  class Model(lib.Module):
    def __init__(self, size, *, scale=1.0):
      self.w = lib.Param(jnp.full(size, scale))

  class After(Model, Recorded):
    pass

  class Before(Recorded, Model):
    pass

  class BothSides(Named, Model, Recorded, title="Sides"):
    pass

  class Last(Model, Named, Recorded):
    pass

  return {c.__name__: c for c in (After, Before, BothSides, Last)}


class Kept(nnx.Module, Recorded):
  def __init__(self, size=1):
    self.w = nnx.Param(jnp.ones(size))


class Noted(Recorded, nnx.Param):
  pass


class NewTest(parameterized.TestCase):
  @parameterized.product(
    lib=[nnx, flax_nnx], name=["After", "Before", "BothSides", "Last"]
  )
  def test_is_called_with_the_arguments(self, lib, name):
    cls = models(lib)[name]
    model = cls(2, scale=3.0)
    self.assertEqual(model.made_of, ((2,), {"scale": 3.0}))
    self.assertEqual(model.w[...].tolist(), [3, 3])
    if issubclass(cls, Named):
      self.assertEqual(model.name, cls.title.lower())
    # What is put together again is not made.
    merged = lib.merge(*lib.split(model))
    self.assertEqual(merged.made_of, model.made_of)

  @parameterized.product(lib=[nnx, flax_nnx])
  def test_of_a_variable(self, lib):
    made = []

    class Mixin:
      def __new__(cls, *args, **kwargs):
        made.append((args, kwargs))
        return super().__new__(cls)

    class Before(Mixin, lib.Param):
      pass

    variable = Before(jnp.ones(2), note="x")
    self.assertEqual(variable[...].tolist(), [1, 1])
    self.assertEqual(variable.note, "x")
    self.assertEqual(made[-1][1], {"note": "x"})
    variable[...] = jnp.zeros(2)
    self.assertEqual(variable[...].tolist(), [0, 0])

  def test_after_a_variable_is_refused(self):
    with self.assertRaisesRegex(
      TypeError, "before `Variable`, but `Recorded` comes after it in `Wrong`"
    ):

      class Wrong(nnx.Param, Recorded):
        pass

    class Marked:
      pass

    class Fine(nnx.Param, Marked, Generic[T]):
      pass

    self.assertEqual(Fine(3).value, 3)
    for cls in (nnx.Param, Fine):
      with self.assertRaisesRegex(TypeError, "is not safe"):
        object.__new__(cls)

  def test_without_the_init_subclass_of_ours(self):
    class Alone:
      def __init_subclass__(cls): ...

    class Model(Alone, nnx.Module, Recorded):
      pass

    for model in (object.__new__(Model), Model()):
      model.w = nnx.Param(1)
      self.assertEqual(nnx.state(model).w.value, 1)

    def inside():
      model = Model()
      model.w = 2
      return model.w

    self.assertEqual(jax.jit(inside)(), 2)

  @parameterized.product(lib=[nnx, flax_nnx])
  def test_may_return_another_object(self, lib):
    class Single:
      one = None

      def __new__(cls):
        if cls.one is None:
          cls.one = super().__new__(cls)
        return cls.one

    class Model(lib.Module, Single):
      pass

    self.assertIs(Model(), Model())

  @parameterized.product(lib=[nnx, flax_nnx])
  def test_metaclass_of_a_mixin(self, lib):
    calls = []
    # Flax has a metaclass of its own.
    meta = type(lib.Module)

    class Meta(meta if issubclass(meta, abc.ABCMeta) else abc.ABCMeta):
      def __call__(cls, *args):
        calls.append(args)
        return super().__call__(*args)

    class Sized(metaclass=Meta):
      @abc.abstractmethod
      def size(self): ...

    class Model(lib.Module, Recorded, Sized):
      def __init__(self, n):
        self.n = n

    with self.assertRaisesRegex(TypeError, "abstract.* size"):
      Model(3)

    class Whole(Model):
      def size(self):
        return self.n

    whole = Whole(3)
    self.assertEqual((whole.size(), whole.made_of), (3, ((3,), {})))
    self.assertEqual(calls, [(3,), (3,)])

  @parameterized.product(lib=[nnx, flax_nnx], with_abc=[True, False])
  def test_abstract_methods(self, lib, with_abc):
    class Shape(lib.Module, *([abc.ABC] if with_abc else [])):
      def __init__(self, n):
        self.n = n

      @abc.abstractmethod
      def area(self): ...

      @property
      @abc.abstractmethod
      def name(self): ...

    class Half(Shape):
      name = "half"

    @dataclasses.dataclass
    class Square(Half):
      n: int

      def area(self):
        return self.n**2

    for cls in (Shape, Half):
      self.assertTrue(inspect.isabstract(cls))
      with self.assertRaisesRegex(TypeError, "abstract.* area"):
        cls(3)
    self.assertFalse(inspect.isabstract(Square))
    self.assertEqual((Square(3).area(), Square(3).name), (9, "half"))
    square = lib.merge(*lib.split(Square(3)))
    self.assertEqual(square.area(), 9)

  @parameterized.parameters("After", "Before")
  def test_is_of_the_trace_that_makes_it(self, name):
    class Early:
      def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.early = nnx.Param(1.0)
        return self

    bases = (nnx.Module, Early)
    cls = type("Model", bases if name == "After" else bases[::-1], {})

    def inside():
      model = cls()
      self.assertTrue(model._can_update)
      model.late = 2
      kept.append(model)
      return model.early[...]

    kept = []
    jax.jit(inside)()
    with self.assertRaises(nnx.TraceContextError):
      kept[0].late = 3
    outside = cls()
    outside.late = 3
    with self.assertRaises(nnx.TraceContextError):
      jax.jit(lambda: setattr(outside, "late", 4))()

  def test_declared_attributes(self):
    class Declared(nnx.Pytree, Recorded):
      a: nnx.Data[int]

      def __init__(self):
        object.__setattr__(self, "a", 1)

    self.assertEqual(jax.tree.leaves(Declared()), [1])

  def test_origin_is_the_line_of_the_call(self):
    model = Kept(2)
    self.assertEqual(model._origin.filename, __file__)

  def test_copies_and_pickles(self):
    model = Kept(2)
    for other in (
      copy.copy(model),
      copy.deepcopy(model),
      nnx.clone(model),
      pickle.loads(pickle.dumps(model)),
      jax.tree.map(lambda x: x, model),
    ):
      self.assertEqual(other.made_of, ((2,), {}))
      self.assertEqual(other.w[...].tolist(), [1, 1])
    variable = pickle.loads(pickle.dumps(Noted(3)))
    self.assertEqual((type(variable), variable.value), (Noted, 3))

  @parameterized.product(lib=[nnx, flax_nnx])
  def test_arguments_that_nobody_takes(self, lib):
    class Passing:
      def __new__(cls, *args):
        return super().__new__(cls, *args)

    class Model(lib.Module, Passing):
      def __init__(self, n): ...

    with self.assertRaisesRegex(TypeError, "object.__new__.* takes exactly"):
      Model(3)
    with self.assertRaises(TypeError):
      lib.Module(3)

  def test_wrong_calls(self):
    base = nnx.Module.__new__
    for args in ((), (3,), (int,)):
      with self.assertRaisesRegex(
        TypeError, "`__new__` must get the class first"
      ):
        base(*args)
    with self.assertRaises(TypeError):
      nnx.Variable.__new__(nnx.Module)


if __name__ == "__main__":
  absltest.main()
