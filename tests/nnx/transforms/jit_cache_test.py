"""What nnx.jit keeps: found by hash, bounded, cleared, and told apart."""

import dataclasses
import enum
import gc
import math
import threading
import types
import weakref

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from nnx.engine import _engine

_BOUND = 256


class Scale(nnx.Module):
  def __init__(self, factor):
    self.w = nnx.Param(jnp.ones(2))
    self.factor = factor


def compiled_by_number():
  """A function of the engine's that knows how often it made an entry."""
  made = []

  def make_entry(structure, leaves, names, objects):
    made.append(structure)
    copies = _engine.unflatten(structure, leaves).objects
    packed = _engine.pack(structure, copies, leaves, None)
    return _engine.JitEntry((lambda leaves: packed, None, None))

  return _engine.JitFunction(make_entry, lambda x: x, frozenset()), made


@dataclasses.dataclass(frozen=True)
class Frozen:
  value: object


@dataclasses.dataclass
class Nested:
  inner: object = None
  hidden: object = dataclasses.field(default=None, repr=False, compare=False)

  def __repr__(self):
    return "Nested"


class Opaque:
  """Has no hash, and prints nothing of what it holds."""

  __hash__ = None

  def __init__(self, value):
    self.value = value

  def __repr__(self):
    return "Opaque"


class Slotted:
  __slots__ = ("value",)
  __hash__ = None

  def __init__(self, value):
    self.value = value

  def __repr__(self):
    return "Slotted"


class Closed:
  __hash__ = None

  def __repr__(self):
    return "Closed()"

  def __reduce_ex__(self, protocol):
    raise TypeError("closed")


class Color(enum.Enum):
  RED = 1


class CacheTest(parameterized.TestCase):
  def test_is_bounded_and_drops_the_least_recently_used(self):
    function, made = compiled_by_number()
    first = Scale(-1.0)
    for i in range(2 * _BOUND):
      function(Scale(float(i)))
      function(first)
    self.assertLen(made, 2 * _BOUND + 1)
    self.assertEqual(function._cache_size(), _BOUND)
    function(Scale(2.0 * _BOUND - 1))
    self.assertLen(made, 2 * _BOUND + 1)
    function(Scale(0.0))
    self.assertLen(made, 2 * _BOUND + 2)

  @parameterized.parameters(
    lambda i: float(i),
    lambda i: (1, i),
    lambda i: Frozen(i),
    lambda i: {"a": [i]},
    lambda i: Opaque(i),
    lambda i: Nested(i),
    lambda i: slice(0, i),
    lambda i: {i},
  )
  def test_round_robin_makes_nothing_anew(self, static):
    function, made = compiled_by_number()
    for _ in range(3):
      for i in range(_BOUND):
        function(Scale(static(i)))
    self.assertLen(made, _BOUND)

  def test_round_robin_over_what_only_python_can_open(self):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Batch:
      x: object
      size: int = dataclasses.field(metadata={"static": True})

    function, made = compiled_by_number()
    for _ in range(2):
      for i in range(20):
        function(Scale(1), Batch(jnp.ones(1), i), size=i)
    self.assertLen(made, 20)

  def test_order_of_keys_does_not_matter(self):
    function, made = compiled_by_number()
    for _ in range(2):
      function({"a": jnp.ones(1), "b": Scale(1)})
      function({"b": Scale(1), "a": jnp.ones(1)})
    self.assertLen(made, 1)

  def test_static_arguments(self):
    calls = []

    def fun(x, size):
      calls.append(size)
      return x * size

    jitted = nnx.jit(fun, static_argnames="size")
    for _ in range(2):
      for i in range(5):
        self.assertEqual(jitted(1.0, i), i)
        self.assertEqual(jitted(1.0, size=i), i)
    self.assertLen(calls, 10)

  def test_clear(self):
    traces = []
    jitted = nnx.jit(lambda m: traces.append(1))
    part = nnx.jit_partial(lambda m: traces.append(1), Scale(1))
    scale = Scale(1)
    for clear in (
      lambda: (jitted.clear_cache(), part.clear_cache()),
      jax.clear_caches,
    ):
      jitted(scale)
      part()
      self.assertEqual((jitted._cache_size(), part._cache_size()), (1, 1))
      clear()
      self.assertEqual((jitted._cache_size(), part._cache_size()), (0, 0))
    jitted(scale)
    self.assertLen(traces, 5)

  def test_keeps_no_models_and_no_arrays(self):
    jitted = nnx.jit(lambda m: m.w + 0)
    donating = nnx.jit(lambda m: m.w.set_value(m.w + 1), donate_argnums=0)
    for function in (jitted, donating):
      scale = Scale(1)
      array = scale.w.value
      refs = [weakref.ref(x) for x in (scale, scale.w, array)]
      function(scale)
      del scale, array
      gc.collect()
      self.assertEqual([ref() for ref in refs], [None] * 3)

  def test_dropped_function_is_collected(self):
    jitted = nnx.jit(lambda m: m.w + 0)
    jitted(Scale(1))
    ref = weakref.ref(jitted)
    del jitted
    gc.collect()
    self.assertIsNone(ref())

  def test_threads_share_one_entry(self):
    barrier = threading.Barrier(8)
    made = []

    def make_entry(structure, leaves, names, objects):
      made.append(1)
      barrier.wait()  # all threads make one
      copies = _engine.unflatten(structure, leaves).objects
      packed = _engine.pack(structure, copies, leaves, None)
      return _engine.JitEntry((lambda leaves: packed, None, None))

    function = _engine.JitFunction(make_entry, lambda x: x, frozenset())
    models = [Scale(Frozen(1)) for _ in range(8)]
    threads = [
      threading.Thread(target=function, args=(model,)) for model in models
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    self.assertLen(made, 8)
    self.assertEqual(function._cache_size(), 1)


class StaticValuesTest(parameterized.TestCase):
  """Values that a function can tell apart have programs of their own."""

  def traces(self, *models):
    seen = []
    jitted = nnx.jit(lambda model: seen.append(model.factor))
    for model in models:
      jitted(model)
    return seen

  VALUES = [
    1, True, 1.0, 0.0, -0.0, 0, False, 1j, np.float32(1), np.int32(1),
    0j, complex(0.0, -0.0), complex(-0.0, 0.0), complex(-0.0, -0.0),
  ]  # fmt: skip

  @parameterized.parameters(
    lambda x: x,
    lambda x: (x,),
    lambda x: Frozen(x),
    lambda x: Frozen(Frozen((x,))),
    lambda x: frozenset([x]),
    lambda x: Nested(Nested(x)),
    lambda x: Nested(hidden=x),
    lambda x: Opaque([x]),
    lambda x: {x},
    lambda x: types.SimpleNamespace(a=x),
    lambda x: slice(None, x),
  )
  def test_types_and_signs(self, wrap):
    models = [Scale(wrap(value)) for value in self.VALUES]
    self.assertLen(self.traces(*models, *models), len(models))
    graphdefs = [nnx.graphdef(model) for model in models]
    for i, a in enumerate(graphdefs):
      for j, b in enumerate(graphdefs):
        self.assertEqual(a == b, i == j)

  @parameterized.parameters(
    1, True, 1.0, -0.0, math.nan, Color.RED, "a", b"a", np.float32(1)
  )
  def test_equal_ones_share(self, value):
    for wrap in (Frozen, Nested, Opaque, Slotted, lambda x: [(x,)]):
      models = [Scale(wrap(value)) for _ in range(3)]
      self.assertLen(self.traces(*models), 1)

  def test_nan_of_its_own(self):
    for kind in (float, complex):
      models = [Scale(kind("nan")) for _ in range(3)]
      self.assertLen(self.traces(*models), 1)
      self.assertLen(self.traces(models[0], Scale(2), *models[1:]), 2)
      self.assertLen({nnx.graphdef(model) for model in models}, 1)

  @parameterized.parameters(
    lambda: Opaque([1]), lambda: Opaque({"a": Opaque([1])}),
    lambda: Nested(Nested(inner=[1])), lambda: Nested(hidden=[1]),
    lambda: Slotted([1]), lambda: types.SimpleNamespace(a=[1]),
  )  # fmt: skip
  def test_change_deep_inside_is_seen(self, make):
    def innermost(value):
      while not isinstance(value, list):
        if isinstance(value, dict):
          (value,) = value.values()
        else:
          names = [*getattr(value, "__dict__", ()), "value"]
          value = next(
            x for x in (getattr(value, n, None) for n in names) if x is not None
          )
      return value

    scale = Scale(make())
    sums = []

    def fun(model):
      sums.append(sum(innermost(model.factor)))

    jitted = nnx.jit(fun)
    jitted(scale)
    jitted(scale)
    before = nnx.graphdef(scale)
    innermost(scale.factor).append(2)
    jitted(scale)
    jitted(scale)
    self.assertEqual(sums, [1, 3])
    self.assertNotEqual(before, nnx.graphdef(scale))
    innermost(scale.factor).pop()
    jitted(scale)
    self.assertEqual(sums, [1, 3])
    self.assertEqual(before, nnx.graphdef(scale))

  def test_new_shapes_see_the_value_of_this_call(self):
    jitted = nnx.jit(lambda m, x: x * m.factor.value)
    first, second = Scale(Opaque(2)), Scale(Opaque(2))
    np.testing.assert_array_equal(jitted(first, jnp.ones(1)), [2])
    np.testing.assert_array_equal(jitted(second, jnp.ones(1)), [2])
    first.factor.value = 5
    np.testing.assert_array_equal(jitted(second, jnp.ones(2)), [2, 2])
    np.testing.assert_array_equal(jitted(first, jnp.ones(2)), [5, 5])

  def test_metadata(self):
    seen = []
    jitted = nnx.jit(lambda w: seen.append(w.tag))
    for tag in self.VALUES * 2:
      jitted(nnx.Param(jnp.ones(1), tag=tag))
    self.assertLen(seen, len(self.VALUES))
    w = nnx.Param(jnp.ones(1), tag=["a"])
    jitted(w)
    jitted(w)
    jitted(nnx.Param(jnp.ones(1), tag=["a"]))
    self.assertLen(seen, len(self.VALUES) + 1)
    w.tag.append("b")
    jitted(w)
    jitted(w)
    self.assertLen(seen, len(self.VALUES) + 2)

  def test_static_argument(self):
    seen = []
    jitted = nnx.jit(lambda x, s: seen.append(s), static_argnums=1)
    for value in self.VALUES * 2:
      jitted(1.0, Frozen(value))
      jitted(1.0, value)
    self.assertLen(seen, 2 * len(self.VALUES))

  def test_odd_equality(self):
    class Raises:
      def __eq__(self, other):
        raise RuntimeError("cannot say")

      def __hash__(self):
        return 1

    one = Scale(Raises())
    self.assertLen(self.traces(one, one), 1)
    with self.assertRaisesRegex(RuntimeError, "cannot say"):
      self.traces(one, Scale(Raises()))

    class Never:
      __hash__ = None

      def __eq__(self, other):
        return False

      def __repr__(self):
        return "Never"

    self.assertLen(self.traces(Scale(Never()), Scale(Never())), 1)

  def test_values_that_cannot_be_looked_into(self):
    with self.assertRaisesRegex(
      TypeError, r"or hold only what can be compared, but `.*factor` is Closed"
    ):
      nnx.jit(lambda m: None)(Scale(Closed()))
    for value in (Opaque([np.ones(1)]), Nested(Nested({"a": jnp.ones(1)}))):
      with self.assertRaisesRegex(
        ValueError, "A static attribute must hold no data, but `.*factor` is"
      ):
        nnx.jit(lambda m: None)(Scale(value))

  def test_value_that_holds_itself(self):
    values = [Opaque(None), Opaque(None)]
    for value in values:
      value.value = [value]
    self.assertLen(self.traces(*map(Scale, values)), 1)


if __name__ == "__main__":
  absltest.main()
