"""Eager calls of ToNNX are replayed, and nobody can tell but by the clock."""

import functools
import random
import sys
import time
import types
from typing import Any

from absl.testing import absltest, parameterized
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bridge
from bridge import purity, replay
import nnx

X = jnp.arange(6.0).reshape(3, 2)
SCALE = 2.0
CONFIG = {"scale": 2.0}
SEEN = []
OFFSET = np.array([1.0, 2.0], np.float32)
GENERATOR = np.random.default_rng(0)
box = types.SimpleNamespace(scale=2.0)


class Plain(nn.Module):
  features: Any = 4
  activation: Any = nn.relu

  @nn.compact
  def __call__(self, x, train=False, scale=1.0):
    x = nn.Dense(4, name="dense")(x)
    x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
    x = nn.Dropout(0.5, deterministic=not train, name="drop")(x)
    return self.activation(x) * scale

  def halved(self, x):
    return 0.5 * x


class UsesGlobal(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(x) * SCALE


class UsesDict(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(x) * CONFIG["scale"] + OFFSET


class UsesClassAttribute(nn.Module):
  factor = 2.0

  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(x) * self.factor


def helper(x):
  return x * SCALE


class UsesHelper(nn.Module):
  @nn.compact
  def __call__(self, x):
    return helper(nn.Dense(2)(x))


def make(module, *args, **rngs):
  return bridge.ToNNX(module, rngs=nnx.Rngs(0, **rngs)).lazy_init(
    *(args or (X,))
  )


def calls_of(model):
  return len(replay._record(model.module).programs)


def linen_result(model, *args, **kwargs):
  variables = bridge.nnx_attrs_to_linen_vars(
    {
      k: v
      for k, v in vars(model).items()
      if not k.startswith("to_nnx__") and isinstance(v, (dict, nnx.Variable))
    }
  )
  return model.module.apply(variables, *args, **kwargs)


class ReplayedTest(parameterized.TestCase):
  """Calls that are replayed give what Linen gives."""

  def check(self, model, *args, **kwargs):
    expected = linen_result(model, *args, **kwargs)
    for _ in range(2):
      jax.tree.map(
        np.testing.assert_array_equal, model(*args, **kwargs), expected
      )
    self.assertTrue(replay.is_replayed(model.module))

  def test_values(self):
    model = make(Plain())
    self.check(model, X)
    self.check(model, X.astype(jnp.bfloat16))
    self.check(model, X[:1])
    self.check(model, X, scale=3)
    self.check(model, X, scale=3.0)
    self.check(model, X, scale=jnp.float32(3.0))

  def test_weak_types_are_told_apart(self):
    class Add(nn.Module):
      @nn.compact
      def __call__(self, x, y):
        return nn.Dense(2)(x).astype(jnp.bfloat16) + y

    model = make(Add(), X, 1.0)
    for y in (1.0, jnp.float32(1), jnp.asarray(1.0)):
      expected = linen_result(model, X, y)
      self.assertEqual(model(X, y).dtype, expected.dtype)
      self.assertEqual(model(X, y).weak_type, expected.weak_type)

  def test_state_comes_back_into_the_same_variables(self):
    model, other = make(Plain(), dropout=1), make(Plain(), dropout=1)
    mean = model.norm["mean"]
    for _ in range(3):
      y = model(X, train=True)
      with jax.disable_jit():
        expected = other(X, train=True)
    self.assertIs(model.norm["mean"], mean)
    np.testing.assert_allclose(y, expected, rtol=1e-6)
    np.testing.assert_allclose(mean.value, other.norm["mean"].value, rtol=1e-6)

  def test_flags_methods_and_collections_have_programs_of_their_own(self):
    model = make(Plain(), dropout=1)
    for _ in range(2):
      model(X)
      model(X, train=True)
      model(X, train=True, mutable=["batch_stats", "intermediates"])
      np.testing.assert_array_equal(model.halved(X), 0.5 * X)
      model(X, method="halved")
    self.assertEqual(calls_of(model), 5)

  def test_dropout_draws_anew(self):
    model = make(Plain(), dropout=1)
    draws = [np.asarray(model(X, train=True)) == 0 for _ in range(8)]
    self.assertFalse(all(np.array_equal(draws[0], d) for d in draws))

  def test_equal_modules_share_programs_but_not_sharing(self):
    shared = nn.Dense(2)
    one = nn.Sequential([shared, shared])
    two = nn.Sequential([nn.Dense(2), nn.Dense(2)])
    keys = [purity.Dependencies().key(m) for m in (one, two)]
    self.assertNotEqual(*keys)
    keys = [purity.Dependencies().key(nn.Dense(2)) for _ in range(2)]
    self.assertEqual(*keys)
    self.assertNotEqual(
      purity.Dependencies().key(nn.Dropout(1)),
      purity.Dependencies().key(nn.Dropout(1.0)),
    )

  def test_train_and_eval_change_fields(self):
    model = bridge.ToNNX(
      nn.BatchNorm(use_running_average=False), rngs=nnx.Rngs(0)
    ).lazy_init(X)
    first = model(X)
    model.eval()
    self.check(model, X)
    model.train()
    np.testing.assert_array_equal(model(X), first)

  def test_results_keep_their_structure(self):
    class Many(nn.Module):
      @nn.compact
      def __call__(self, x):
        y = nn.Dense(2)(x)
        return {"y": y, "x": x, "n": 3, "none": None, "name": ("a", True)}

    model = make(Many())
    for _ in range(2):
      result = model(X)
      self.assertIs(result["x"], X)
      self.assertEqual((result["n"], result["none"]), (3, None))
      self.assertEqual(result["name"], ("a", True))

  def test_dicts_keep_their_order(self):
    class Ordered(nn.Module):
      @nn.compact
      def __call__(self, batch, **more):
        x = nn.Dense(2)(jnp.concatenate([*batch.values(), *more.values()]))
        return {"z": x, "a": list(batch), "m": {"y": x, "b": list(more)}}

    batch = {"b": X, "a": 2 * X}
    model = bridge.ToNNX(Ordered(), rngs=nnx.Rngs(0))
    model.lazy_init(batch, z=X, c=X)
    for _ in range(2):
      result = model(batch, z=3 * X, c=X)
      expected = linen_result(model, batch, z=3 * X, c=X)
      self.assertEqual(str(result), str(expected))
    self.assertTrue(replay.is_replayed(model.module))
    other = {"a": 2 * X, "b": X}
    self.assertEqual(model(other, z=X, c=X)["a"], ["a", "b"])

  def test_what_never_comes_again_is_not_recorded_for_ever(self):
    model = make(nn.Dense(11))
    for n in range(1, 40):
      model(jnp.ones((n, 2)))
    self.assertLess(calls_of(model), 20)

  def test_sown_values_grow(self):
    class Sows(nn.Module):
      @nn.compact
      def __call__(self, x):
        self.sow("intermediates", "x", x)
        return nn.Dense(2)(x)

    model = make(Sows())
    for n in range(1, 4):
      model(X, mutable=["intermediates"])
      self.assertLen(model.x.value, n)

  def test_calls_that_are_traced_are_not_recorded(self):
    model = make(nn.Dense(2))
    model(X)
    grads = nnx.grad(lambda m: m(X).sum())(model)
    np.testing.assert_allclose(
      grads["kernel"].value, np.tile(X.sum(0)[:, None], 2)
    )
    self.assertEqual(calls_of(model), 1)

  def test_settings_have_programs_of_their_own(self):
    model = make(nn.Dense(2))
    model(X)
    with jax.default_matmul_precision("float32"):
      self.check(model, X)
    with jax.enable_x64(True):
      self.check(model, X)
    self.assertEqual(calls_of(model), 3)

  @parameterized.parameters(
    lambda: nn.Conv(3, (2,)),
    lambda: nn.LayerNorm(),
    lambda: nn.Embed(9, 3),
    lambda: nn.RNN(nn.LSTMCell(3)),
    lambda: nn.remat(nn.Dense)(3),
    lambda: nn.Sequential([nn.Dense(3), nn.gelu, nn.Dense(2), jnp.sin]),
    lambda: nn.Sequential([nn.Dense(3), functools.partial(nn.elu, alpha=2)]),
  )
  def test_layers(self, new):
    module = new()
    x = jnp.arange(24.0).reshape(2, 4, 3)
    if isinstance(module, nn.Embed):
      x = jnp.arange(3)
    self.check(make(module, x), x)


class ChangedTest(absltest.TestCase):
  """What a module reads may change between calls."""

  def check(self, model, change):
    for _ in range(2):
      np.testing.assert_array_equal(model(X), linen_result(model, X))
    self.assertTrue(replay.is_replayed(model.module))
    before = model(X)
    change()
    np.testing.assert_array_equal(model(X), linen_result(model, X))
    self.assertFalse(np.array_equal(model(X), before))

  def test_a_global(self):
    def change():
      globals()["SCALE"] = SCALE + 1

    self.check(make(UsesGlobal()), change)

  def test_a_global_of_a_function(self):
    def change():
      globals()["SCALE"] = SCALE + 1

    self.check(make(UsesHelper()), change)

  def test_a_function(self):
    self.addCleanup(globals().__setitem__, "helper", helper)

    def change():
      globals()["helper"] = lambda x: x - 1

    self.check(make(UsesHelper()), change)

  def test_an_item_of_a_dict(self):
    self.check(
      make(UsesDict()), lambda: CONFIG.update(scale=CONFIG["scale"] + 1)
    )

  def test_an_item_of_a_numpy_array(self):
    def change():
      OFFSET[0] += 1

    self.check(make(UsesDict()), change)

  def test_an_attribute_of_the_class(self):
    def change():
      UsesClassAttribute.factor += 1

    self.check(make(UsesClassAttribute()), change)

  def test_a_method(self):
    class Patched(nn.Module):
      @nn.compact
      def __call__(self, x):
        return self.twice(nn.Dense(2)(x))

      def twice(self, x):
        return 2 * x

    self.check(
      make(Patched()),
      lambda: setattr(Patched, "twice", lambda self, x: 3 * x),
    )

  def test_a_variable_of_a_function_around_it(self):
    factor = 2.0

    class Closed(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.Dense(2)(x) * factor

    def change():
      nonlocal factor
      factor = 5.0

    self.check(make(Closed()), change)

  def test_an_item_of_a_list_that_is_a_field(self):
    class Layers(nn.Module):
      features: Any

      @nn.compact
      def __call__(self, x):
        return nn.Dense(2)(x) * sum(self.features)

    features = [1, 2]
    self.check(make(Layers(features)), lambda: features.append(3))


class RefusedTest(parameterized.TestCase):
  """Modules whose Python must run at every call."""

  def check(self, module, *args):
    model = make(module, *args)
    for _ in range(2):
      model(*(args or (X,)))
    self.assertFalse(replay.is_replayed(model.module))
    return model

  def test_printing(self):
    class Prints(nn.Module):
      @nn.compact
      def __call__(self, x):
        print("called")
        return nn.Dense(2)(x)

    self.check(Prints())

  def test_counting_in_a_variable_around_it(self):
    calls = 0

    class Counts(nn.Module):
      @nn.compact
      def __call__(self, x):
        nonlocal calls
        calls += 1
        return nn.Dense(2)(x)

    self.check(Counts())
    self.assertEqual(calls, 3)

  def test_counting_in_a_global(self):
    class Counts(nn.Module):
      @nn.compact
      def __call__(self, x):
        global SCALE
        SCALE += 1
        return nn.Dense(2)(x)

    before = SCALE
    self.check(Counts())
    self.assertEqual(SCALE, before + 3)

  def test_counting_in_the_class(self):
    class Counts(nn.Module):
      calls = 0

      @nn.compact
      def __call__(self, x):
        type(self).calls += 1
        return nn.Dense(2)(x)

    self.check(Counts())
    self.assertEqual(Counts.calls, 3)

  def test_appending_to_a_list(self):
    class Appends(nn.Module):
      @nn.compact
      def __call__(self, x):
        SEEN.append(x.shape)
        return nn.Dense(2)(x)

    SEEN.clear()
    model = make(Appends())
    for n in range(2, 12):
      model(X)
      # A call may be traced and then run: Linen's code at least once a call.
      self.assertGreaterEqual(len(SEEN), n)
    self.assertFalse(replay.is_replayed(model.module))

  @parameterized.parameters(
    lambda: random.random(),
    lambda: np.random.normal(),
    lambda: GENERATOR.normal(),
    lambda: time.time() % 1,
    lambda: box.scale,
  )
  def test_what_is_new_each_time(self, number):
    class Noisy(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.Dense(2)(x) + number()

    self.check(Noisy())

  def test_changing_settings(self):
    class Sets(nn.Module):
      @nn.compact
      def __call__(self, x):
        jax.config.update("jax_enable_x64", jax.config.jax_enable_x64)
        return nn.Dense(2)(x)

    self.check(Sets())

  def test_control_flow_on_values(self):
    class Branches(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.Dense(2)(x) if x.sum() > 0 else x

    model = self.check(Branches())
    np.testing.assert_array_equal(model(-X), -X)

  def test_arguments_that_are_changed(self):
    class Pops(nn.Module):
      @nn.compact
      def __call__(self, batch):
        return nn.Dense(2)(batch.pop("x"))

    model = make(Pops(), {"x": X})
    for _ in range(2):
      batch = {"x": X}
      model(batch)
      self.assertEmpty(batch)

  def test_arguments_of_numpy(self):
    class Mean(nn.Module):
      @nn.compact
      def __call__(self, x):
        assert isinstance(x, np.ndarray)
        return nn.Dense(2)(x)

    self.check(Mean(), np.asarray(X))

  def test_effects_of_jax(self):
    class Debugs(nn.Module):
      @nn.compact
      def __call__(self, x):
        jax.debug.callback(lambda x: None, x)
        return nn.Dense(2)(x)

    self.check(Debugs())

  def test_unhashable_and_unknown_fields(self):
    class Field(nn.Module):
      field: Any

      @nn.compact
      def __call__(self, x):
        return nn.Dense(2)(x)

    self.check(Field(types.SimpleNamespace(a=1)))
    self.check(Field(bytearray(3)))
    self.check(Field(object()))

  def test_interceptors_and_summaries_see_every_call(self):
    model = make(nn.Dense(2))
    model(X)
    names = []

    def interceptor(call, args, kwargs, context):
      names.append(context.method_name)
      return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
      model(X)
    self.assertIn("__call__", names)

  def test_disable_jit_and_debuggers_run_the_code(self):
    class Traced(nn.Module):
      @nn.compact
      def __call__(self, x):
        return nn.Dense(2)(x)

    model = make(Traced())
    model(X)
    lines = set()

    def tracer(frame, event, arg):
      del event, arg
      lines.add(frame.f_code.co_qualname)
      return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
      model(X)
    finally:
      sys.settrace(before)
    self.assertTrue(any("Traced.__call__" in name for name in lines))

  def test_errors_are_those_of_linen(self):
    class Fails(nn.Module):
      @nn.compact
      def __call__(self, x, fail=False):
        if fail:
          raise KeyError("on purpose")
        return nn.Dense(2)(x)

    model = make(Fails())
    for _ in range(2):
      with self.assertRaisesRegex(KeyError, "on purpose"):
        model(X, fail=True)


if __name__ == "__main__":
  absltest.main()
