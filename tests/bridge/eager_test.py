"""Eager calls of ToNNX run Linen itself: results and effects are Linen's."""

import dataclasses
import enum
import functools
import os
import random
import subprocess
import sys
import textwrap
import types
from typing import Any

from absl.testing import absltest, parameterized
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bridge
import nnx

X = jnp.arange(6.0).reshape(3, 2)
CONFIG = {"scale": 2.0}
SEEN: list[Any] = []
GENERATOR = np.random.default_rng(0)
box = types.SimpleNamespace(scale=2.0)


class Mode(enum.Enum):
  TWICE = "twice"
  THRICE = "thrice"


@dataclasses.dataclass(frozen=True)
class Options:
  scale: float = 2.0
  items: Any = dataclasses.field(default_factory=lambda: [1.0])


def scaled(x, scale=2.0):
  return x * scale


def module(body):
  """A Linen module whose call is `body(self, x)` after a dense layer."""

  class Module(nn.Module):
    @nn.compact
    def __call__(self, x, *args, **kwargs):
      return body(self, nn.Dense(2, name="dense")(x), *args, **kwargs)

  return Module()


def is_concrete(self, x):
  return -x if isinstance(x, jax.core.Tracer) else x


def branches_on_errors(self, x):
  try:
    return x if float(x.sum()) > -1e9 else -x
  except jax.errors.ConcretizationTypeError:
    return 100 * x


def asserts(self, x):
  try:
    assert bool((x == x).all())
    return x
  except Exception:
    return 100 * x


def branches_on_values(self, x):
  return x if x.sum() > 0 else -x


# What a module sees of its arrays, and of the Python around it.
SEES = {
  "tracer": is_concrete,
  "concretization": branches_on_errors,
  "assertion": asserts,
  "control_flow": branches_on_values,
  "item": lambda self, x: x * x.sum().item(),
  "numpy": lambda self, x: x + np.asarray(x).mean(),
  "devices": lambda self, x: x * len(x.devices()),
  "format": lambda self, x: x * len(f"{x}") + len(f"{x.sum():.2f}"),
  "type_name": lambda self, x: x * len(type(x).__name__),
  "type": lambda self, x: x * (type(x) is type(X)),
  "weak": lambda self, x: (x * 2).astype(jnp.bfloat16) + 1,
  "tolist": lambda self, x: x + len(x.tolist()),
  "hash": lambda self, x: x + (x.unsafe_buffer_pointer() > 0),
  "shared_dict": lambda self, x: {"z": x, "a": x, "n": 3, "none": None},
}


# What may change between two calls: a body, and a change.
def default_of_a_function():
  def changed():
    scaled.__defaults__ = (scaled.__defaults__[0] + 1,)

  return lambda self, x: scaled(x), changed


def attribute_of_a_function():
  def times(x):
    return x * times.scale

  times.scale = 2.0
  return lambda self, x: times(x), lambda: setattr(times, "scale", 5.0)


def keywords_of_a_partial():
  times = functools.partial(scaled, scale=2.0)
  return lambda self, x: times(x), lambda: times.keywords.update(scale=7.0)


def member_of_an_enum():
  def changed():
    Mode.TWICE._value_ = "thrice" if Mode.TWICE.value == "twice" else "twice"

  return lambda self, x: x * (2 if Mode.TWICE.value == "twice" else 3), changed


def field_of_a_frozen_dataclass():
  options = Options()
  return lambda self, x: x * options.scale * sum(options.items), lambda: (
    object.__setattr__(options, "scale", 3.0),
    options.items.append(2.0),
  )


def item_of_a_dict():
  return lambda self, x: x * CONFIG["scale"], lambda: CONFIG.update(
    scale=CONFIG["scale"] + 1
  )


def attribute_of_an_object():
  return lambda self, x: x * box.scale, lambda: setattr(
    box, "scale", box.scale + 1
  )


def a_global():
  def changed():
    globals()["scaled"] = lambda x, before=scaled: before(x) + 1

  return lambda self, x: scaled(x), changed


def a_closure():
  factor = 2.0

  def changed():
    nonlocal factor
    factor += 1

  return lambda self, x: x * factor, changed


def item_of_numpy():
  offset = np.ones(2, np.float32)
  return lambda self, x: x + offset, lambda: offset.__setitem__(0, 5)


def code_of_a_function():
  def one(x):
    return x + 1

  def two(x):
    return x + 2

  return lambda self, x: one(x), lambda: setattr(one, "__code__", two.__code__)


CHANGES = (
  default_of_a_function,
  attribute_of_a_function,
  keywords_of_a_partial,
  member_of_an_enum,
  field_of_a_frozen_dataclass,
  item_of_a_dict,
  attribute_of_an_object,
  a_global,
  a_closure,
  item_of_numpy,
  code_of_a_function,
)


def make(linen_module, *args):
  return bridge.ToNNX(linen_module, rngs=nnx.Rngs(0)).lazy_init(*(args or (X,)))


def linen_result(model, *args, **kwargs):
  return model.module.apply(bridge.linen_variables(model), *args, **kwargs)


def assert_same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    np.testing.assert_array_equal(x, y)
    if isinstance(y, jax.Array):
      assert x.dtype == y.dtype and x.weak_type == y.weak_type


class ResultsTest(parameterized.TestCase):
  @parameterized.parameters(*SEES)
  def test_what_a_module_sees(self, name):
    model = make(module(SEES[name]))
    for x in (X, X, -X, X[:1], X.astype(jnp.bfloat16), X):
      assert_same(model(x), linen_result(model, x))

  @parameterized.parameters((new,) for new in CHANGES)
  def test_what_changes_between_calls(self, new):
    body, change = new()
    self.addCleanup(globals().__setitem__, "scaled", scaled)
    self.addCleanup(setattr, scaled, "__defaults__", scaled.__defaults__)
    self.addCleanup(setattr, Mode.TWICE, "_value_", Mode.TWICE.value)
    model = make(module(body))
    for _ in range(3):
      before = model(X)
      assert_same(before, linen_result(model, X))
    change()
    after = model(X)
    assert_same(after, linen_result(model, X))
    self.assertFalse(np.array_equal(before, after))

  def test_identity_of_arguments(self):
    def body(self, x, q, kv):
      return x if q is kv else -x

    model = make(module(body), X, X, X)
    other = X + 0
    for q, kv in ((X, X), (X, other), (other, other), (X, X)):
      assert_same(model(X, q, kv), linen_result(model, X, q, kv))
    self.assertFalse(np.array_equal(model(X, X, X), model(X, X, other)))

  def test_results_are_the_very_objects(self):
    items = [1]
    model = make(
      module(lambda self, x, y: {"y": y, "items": items, "n": 3}), X, X
    )
    for _ in range(2):
      result = model(X, X)
      self.assertIs(result["y"], X)
      self.assertIs(result["items"], items)
      self.assertEqual(list(result), ["y", "items", "n"])

  def test_order_of_dicts(self):
    def body(self, x, batch, **more):
      return {"z": x, "keys": [*batch, *more]}

    model = make(module(body), X, {"b": X, "a": X})
    for batch in ({"b": X, "a": X}, {"a": X, "b": X}):
      self.assertEqual(model(X, batch, d=X, c=X)["keys"], [*batch, "d", "c"])

  def test_arguments_that_are_changed(self):
    model = make(module(lambda self, x, batch: x + batch.pop("x")), X, {"x": X})
    for _ in range(2):
      batch = {"x": X}
      model(X, batch)
      self.assertEmpty(batch)

  def test_fields_that_are_changed(self):
    class Field(nn.Module):
      field: Any

      @nn.compact
      def __call__(self, x):
        return nn.Dense(2)(x) * self.field.scale

    model = make(Field(types.SimpleNamespace(scale=2.0)))
    before = model(X)
    model.module.field.scale = 4.0
    assert_same(model(X), 2 * before)

  @parameterized.parameters(
    lambda: random.random(),
    lambda: np.random.normal(),
    lambda: GENERATOR.normal(),
  )
  def test_what_is_new_each_time(self, number):
    model = make(module(lambda self, x: x + number()))
    self.assertLen({float(model(X).sum()) for _ in range(4)}, 4)

  def test_errors_are_those_of_linen(self):
    def body(self, x, fail=False):
      if fail:
        raise KeyError("on purpose")
      return x

    model = make(module(body))
    for _ in range(2):
      with self.assertRaisesRegex(KeyError, "on purpose"):
        model(X, fail=True)

  def test_settings(self):
    model = make(module(lambda self, x: x + jnp.arange(2)))
    assert_same(model(X), linen_result(model, X))
    with jax.enable_x64(True):
      assert_same(model(X), linen_result(model, X))
    with jax.disable_jit():
      assert_same(model(X), linen_result(model, X))


class EffectsTest(absltest.TestCase):
  """Each call has its effects exactly once."""

  def check(self, body, count):
    model = make(module(body))
    for _ in range(4):
      before = count()
      model(X)
      self.assertEqual(count() - before, 1)
    model.train()  # no effect on the count
    before = count()
    model(X, mutable=["intermediates"])
    self.assertEqual(count() - before, 1)

  def test_appending(self):
    def body(self, x):
      SEEN.append(x.shape)
      return x

    self.check(body, lambda: len(SEEN))

  def test_a_closure(self):
    calls = 0

    def body(self, x):
      nonlocal calls
      calls += 1
      return x

    self.check(body, lambda: calls)

  def test_a_class(self):
    def body(self, x):
      Options.calls = getattr(Options, "calls", 0) + 1
      return x

    self.check(body, lambda: getattr(Options, "calls", 0))

  def test_a_callback(self):
    calls = []

    def body(self, x):
      jax.debug.callback(lambda x: calls.append(1), x)
      return x

    def count():
      jax.effects_barrier()
      return len(calls)

    self.check(body, count)

  def test_an_interceptor(self):
    names = []

    def interceptor(call, args, kwargs, context):
      names.append(context.method_name)
      return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
      self.check(lambda self, x: x, lambda: names.count("__call__") / 2)

  def test_a_failure(self):
    calls = []

    def body(self, x, fail=False):
      calls.append(1)
      if fail:
        raise ValueError("on purpose")
      return x

    model = make(module(body))
    del calls[:]
    with self.assertRaisesRegex(ValueError, "on purpose"):
      model(X, fail=True)
    self.assertLen(calls, 1)

  def test_state(self):
    def body(self, x):
      count = self.variable("state", "count", lambda: 0)
      count.value += 1
      return x

    model = make(module(body))
    for i in range(1, 4):
      model(X)
      self.assertEqual(model.count.value, i + 1)


_FRESH = """
  import jax, jax.numpy as jnp, numpy as np
  from flax import linen as nn
  import bridge, nnx

  class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
      return nn.BatchNorm(use_running_average=False)(nn.Dense(3)(x))

  x = jnp.arange(6.0).reshape(3, 2)
  m = bridge.ToNNX(Net(), rngs=nnx.Rngs(0)).lazy_init(x)
  {first}
  for _ in range(2):
    expected, updates = Net().apply(
      bridge.linen_variables(m), x, mutable=["batch_stats"]
    )
    y = m(x)
    np.testing.assert_array_equal(y, expected)
    mean = m.BatchNorm_0["mean"].value
    np.testing.assert_array_equal(
      mean, updates["batch_stats"]["BatchNorm_0"]["mean"]
    )
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(m, x), y, rtol=1e-5)
    assert not np.array_equal(mean, m.BatchNorm_0["mean"].value)
"""

_AXES = "in_axes=(nnx.StateAxes({nnx.Param: None, ...: None}), 0)"


class FreshProcessTest(parameterized.TestCase):
  """Whatever is called first, later calls work."""

  @parameterized.parameters(
    "nnx.jit(lambda m, x: m(x))(m, x)",
    "nnx.eval_shape(lambda m, x: m(x), m, x)",
    "jax.eval_shape(lambda x: nnx.clone(m)(x), x)",
    "nnx.remat(lambda m, x: m(x))(m, x)",
    "nnx.grad(lambda m: m(x).sum())(m)",
    f"nnx.vmap(lambda m, x: nnx.clone(m)(x), {_AXES})(m, x[None])",
    "nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0),"
    " out_axes=(nnx.Carry, 0))(m, x[None])",
    "nnx.jit(lambda m, x: m.lazy_init(x) and None)(m, x)",
    "m = nnx.jit(lambda: bridge.ToNNX(Net(), nnx.Rngs(0)).lazy_init(x))()",
    "nnx.tabulate(m, x)",
    "bridge.ToLinen(lambda rngs: bridge.ToNNX(Net(), rngs)).tabulate("
    "jax.random.key(0), x)",
  )
  def test_first(self, first):
    code = textwrap.dedent(_FRESH).format(first=first)
    result = subprocess.run(
      [sys.executable, "-c", code],
      capture_output=True,
      text=True,
      env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    self.assertEqual(result.returncode, 0, result.stderr)


if __name__ == "__main__":
  absltest.main()
