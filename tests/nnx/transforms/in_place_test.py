"""Updates in place under nnx.jit: they happen, and nobody can tell."""

import copy
import gc
import pickle
from typing import Any
from unittest import mock
import warnings
import weakref

from absl.testing import absltest, parameterized
import jax
from jax.experimental import layout
import jax.numpy as jnp
import numpy as np

import nnx
from nnx import in_place
from nnx.engine import _engine
from nnx.transforms import in_place_programs
from tests.nnx.transforms.in_place_steps import SIZE, Case, started, step


def address(variable):
  """Where the array of a Variable lies; nobody has read it for that."""
  (array,) = (x for x in gc.get_referents(variable) if isinstance(x, jax.Array))
  return array.unsafe_buffer_pointer()


def is_own(variable):
  """Whether the next step takes over the array of a Variable.

  Where the new one lies says so: the old one is held until it is written.
  """
  before = address(variable)
  step(variable, 1.0)
  return address(variable) == before


class Pair(nnx.Module):
  def __init__(self):
    self.a = nnx.Param(jnp.zeros(SIZE))
    self.b = nnx.Param(jnp.ones(SIZE))


ROUTES = {
  "value": lambda v: v.value,
  "subscript": lambda v: v[...],
  "raw_value": lambda v: v.raw_value,
  "get_value": lambda v: v.get_value(),
  "get_raw_value": lambda v: v.get_raw_value(),
  "numpy": lambda v: np.asarray(v.value),
  "numpy_of_variable": lambda v: np.asarray(v),
  "numpy_without_the_array": lambda v: np.asarray(v.value)[:],
  "dlpack": lambda v: np.from_dlpack(v.value),
  "jax_dlpack": lambda v: jnp.from_dlpack(v.value),
  "shard": lambda v: v.value.addressable_shards[0].data,
  "device_put": lambda v: jax.device_put(v.value),
  "device_put_to": lambda v: jax.device_put(v.value, jax.devices()[0]),
  "pending": lambda v: jnp.sqrt(jnp.square(v.value)),
  "leaves": lambda v: jax.tree.leaves(v)[0],
  "state": lambda v: nnx.state(Holder(v))["v"].value,
  "split": lambda v: nnx.split(Holder(v))[1]["v"].value,
  "pure_dict": lambda v: nnx.to_pure_dict(nnx.state(Holder(v)))["v"],
  "clone": lambda v: nnx.clone(Holder(v)).v.value,
  "copy": lambda v: copy.copy(v).value,
  "deepcopy": lambda v: copy.deepcopy(v).value,
  "method_copy": lambda v: v.copy().value,
  "pickle": lambda v: pickle.loads(pickle.dumps(v)).value,
  "copy_from": lambda v: copied_from(v).value,
  "new_variable": lambda v: nnx.Param(v).value,
  "read_by_jit": lambda v: nnx.jit(lambda v: v.value)(v),
  "tree_map": lambda v: jax.tree.map(lambda x: x, v).value,
  "closure": lambda v: closure(v)(),
  "vmap": lambda v: nnx.vmap(lambda v: v.value)(v),
  "grad": lambda v: nnx.grad(lambda v: (v.value**2).sum() / 2)(v).value,
  "jaxpr": lambda v: jax.make_jaxpr(lambda: v.value * 1)().consts[0],
}


class Holder(nnx.Module):
  def __init__(self, v):
    self.v = v


def copied_from(variable):
  other = nnx.Param(jnp.zeros(SIZE))
  other.copy_from(variable)
  return other


def closure(variable):
  array = variable.value
  return jax.jit(lambda: array + 0)


class HappensTest(Case):
  def test_repeated_steps_stay_where_they_are(self):
    variable = started()
    before = address(variable)
    for _ in range(5):
      step(variable, 1.0)
      self.assertEqual(address(variable), before)
    np.testing.assert_array_equal(variable.value, 7.0)

  def test_reading_calls_take_nothing_away(self):
    variable, read = started(), nnx.jit(lambda v: v.value.sum())
    read(variable)
    step(variable, 1.0)
    for _ in range(3):
      before = address(variable)
      read(variable)
      step(variable, 1.0)
      self.assertEqual(address(variable), before)

  def test_traces_and_compiles_once(self):
    traces = []

    @nnx.jit
    def count(variable):
      traces.append(variable)
      variable.value = variable.value + 1

    variable = nnx.Param(jnp.zeros(SIZE))
    for _ in range(5):
      count(variable)
    self.assertLen(traces, 1)
    self.assertEqual(count._cache_size(), 1)

  def test_small_and_idle_programs_are_left_alone(self):
    for name, value in (
      ("LEAST_ARRAY", 1 << 30),
      ("LEAST_TOTAL", 1 << 30),
      ("LEAST_FLOPS", 1e12),
    ):
      with mock.patch.object(in_place_programs, name, value):
        step.clear_cache()
        variable = started()
        held = gc.get_referents(variable)
        step(variable, 1.0)
        self.assertFalse(held[0].is_deleted(), name)

  def test_where_others_mostly_have_the_arrays_nothing_is_copied(self):
    variable = started()
    with mock.patch.object(in_place, "copied") as copied:
      for _ in range(6):
        old = variable.value
        step(variable, 1.0)
        self.assertFalse(old.is_deleted())
    copied.assert_not_called()
    self.assertTrue(is_own(variable))

  def test_off(self):
    with nnx.use_updates_in_place(False):
      self.assertFalse(nnx.using_updates_in_place())
      variable = started()
      held = gc.get_referents(variable)[0]
      step(variable, 1.0)
      self.assertFalse(held.is_deleted())
    self.assertTrue(nnx.using_updates_in_place())

  def test_a_switch_is_true_or_false(self):
    for value in ("no", 0, None):
      with self.assertRaisesRegex(TypeError, "must be True or False, but got"):
        nnx.use_updates_in_place(value)
    self.assertTrue(nnx.using_updates_in_place())

  def test_off_for_what_was_compiled_while_it_was_on(self):
    variable = started()
    held = address(variable)
    with nnx.use_updates_in_place(False):
      step(variable, 1.0)
      self.assertNotEqual(address(variable), held)

  def test_other_shapes(self):
    small, large = started(), nnx.Param(jnp.zeros(4 * SIZE))
    for _ in range(3):
      step(large, 1.0)
      step(small, 1.0)
    self.assertTrue(is_own(small))
    self.assertTrue(is_own(large))

  def test_shapes_for_which_the_function_does_other_things(self):
    def host(x):
      return np.asarray(x) + 1

    @nnx.jit
    def odd(variable):
      if variable.shape[0] == SIZE:
        variable.value = variable.value + 1
      elif variable.shape[0] == 2 * SIZE:
        variable.value = jax.pure_callback(host, variable.value, variable.value)
      else:
        variable.value = variable.value[1:]

    for size, after in ((SIZE, SIZE), (2 * SIZE, 2 * SIZE), (8, 5)):
      variable = nnx.Param(jnp.zeros(size))
      for _ in range(3):
        odd(variable)
      self.assertEqual(variable.shape, (after,))

  def test_another_device(self):
    if jax.device_count() < 2:
      self.skipTest("There is one device.")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      for place in (jax.devices()[0], jax.devices()[1], spread):
        variable = nnx.Param(jax.device_put(jnp.zeros(SIZE), place))
        for _ in range(3):
          step(variable, 1.0)
        np.testing.assert_array_equal(variable.value, 3.0)
        self.assertEqual(
          variable.value.sharding.device_set,
          {place} if isinstance(place, jax.Device) else spread.device_set,
        )

  def test_an_argument_that_is_spread_out(self):
    if jax.device_count() < 2:
      self.skipTest("There is one device.")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    variable, x = started(), jax.device_put(jnp.ones(SIZE), spread)
    with warnings.catch_warnings():
      warnings.simplefilter("error")
      for _ in range(3):
        step(variable, x)
    np.testing.assert_array_equal(variable.value, 5.0)

  def test_the_first_arrays_are_not_kept(self):
    @nnx.jit
    def add(variable, x):
      variable.value = variable.value + x

    variable, x = nnx.Param(jnp.zeros(SIZE)), jnp.ones(SIZE)
    first = [weakref.ref(variable.value), weakref.ref(x)]
    add(variable, x)
    add(variable, 2 * x)
    del x
    gc.collect()
    self.assertEqual([array() for array in first], [None, None])

  def test_no_warnings(self):
    @nnx.jit
    def shrink(pair):
      pair.a.value = pair.a.value[1:]
      pair.b.value = pair.b.value.astype(jnp.int32)

    with warnings.catch_warnings():
      warnings.simplefilter("error")
      pair = Pair()
      for _ in range(3):
        shrink(pair)
      step(started(), 1.0)


class UnseenTest(Case):
  @parameterized.parameters(*ROUTES)
  def test_what_was_read_stays(self, route):
    variable = started()
    seen = ROUTES[route](variable)
    expected = np.array(seen)
    np.testing.assert_array_equal(expected, 2.0)
    for _ in range(4):
      step(variable, 1.0)
    np.testing.assert_array_equal(seen, expected)
    np.testing.assert_array_equal(variable.value, 6.0)

  @parameterized.parameters(*ROUTES)
  def test_what_is_left_of_what_was_read_stays(self, route):
    # Views of what nobody holds any longer, while steps go on before.
    variable = started()
    seen = []
    for count in range(2, 6):
      seen.append((count, ROUTES[route](variable)))
      gc.collect()
      step(variable, 1.0)
      step(variable, -1.0)
      step(variable, 1.0)
    for count, value in seen:
      np.testing.assert_array_equal(value, count)

  def test_shared_arrays(self):
    @nnx.jit
    def both(pair):
      pair.a.value = pair.a.value + 1
      pair.b.value = pair.b.value + 2

    pair = Pair()
    both(pair)
    both(pair)
    pair.a.value = pair.b.value
    other = nnx.Param(pair.b.value)
    for _ in range(3):
      both(pair)
    np.testing.assert_array_equal(other.value, 5.0)
    np.testing.assert_array_equal(pair.a.value, 8.0)
    np.testing.assert_array_equal(pair.b.value, 11.0)

  def test_forwarded_arrays(self):
    @nnx.jit
    def move(pair):
      pair.a.value = pair.b.value
      pair.b.value = pair.b.value + 1
      return pair.b.value

    pair = Pair()
    results = [move(pair) for _ in range(5)]
    np.testing.assert_array_equal(pair.a.value, 5.0)
    for i, result in enumerate(results):
      np.testing.assert_array_equal(result, i + 2.0)

  def test_what_is_only_read_is_not_given_up(self):
    @nnx.jit
    def mixed(pair):
      pair.a.value = pair.a.value + pair.b.value

    pair = Pair()
    b = gc.get_referents(pair.b)[0]
    for _ in range(4):
      mixed(pair)
    self.assertFalse(b.is_deleted())

  def test_an_argument_that_is_the_array_as_well(self):
    @nnx.jit
    def add(variable, x):
      variable.value = variable.value + x
      return x

    variable = started(1.0)
    for _ in range(3):
      array = variable.value
      result = add(variable, array)
      np.testing.assert_array_equal(result, array)
    np.testing.assert_array_equal(variable.value, 24.0)

  def test_under_a_trace(self):
    variable = started()

    @jax.jit
    def outer(x):
      inner = nnx.merge(*nnx.split(Holder(variable)))
      step(inner.v, x)
      return inner.v.value

    np.testing.assert_array_equal(outer(1.0), 3.0)
    np.testing.assert_array_equal(variable.value, 2.0)

  def test_read_under_a_trace(self):
    variable = started()

    @jax.jit
    def outer(x):
      return variable.value + x

    expected = np.array(outer(1.0))
    for _ in range(3):
      step(variable, 1.0)
    np.testing.assert_array_equal(outer(1.0), expected)

  @parameterized.parameters(jax.disable_jit, jax.debug_nans, jax.debug_infs)
  def test_where_jax_runs_functions_as_they_are_written(self, setting):
    variable, kept = started(), []

    @nnx.jit
    def keep(variable):
      if not isinstance(variable.value, jax.core.Tracer):
        kept.append(variable.value.addressable_shards[0].data)
      variable.value = variable.value + 1
      if not isinstance(variable.value, jax.core.Tracer):
        kept.append(variable.value.addressable_shards[0].data)

    with setting(True):
      keep(variable)
    for _ in range(3):
      step(variable, 1.0)
      keep(variable)
    for i, value in enumerate(kept):
      np.testing.assert_array_equal(value, i + 2.0)

  def test_a_nan_that_is_found(self):
    @nnx.jit
    def log(variable, x):
      variable.value = jnp.log(variable.value + x)

    variable = started(1.0)
    log(variable, 1.0)
    log(variable, 1.0)
    before = np.array(copy.deepcopy(variable).value)
    with jax.debug_nans(True), self.assertRaises(FloatingPointError):
      log(variable, -100.0)
    np.testing.assert_array_equal(variable.value, before)

  def test_errors_while_tracing(self):
    @nnx.jit
    def fail(variable, x):
      variable.value = variable.value + x
      raise ZeroDivisionError

    variable = started()
    for _ in range(3):
      with self.assertRaises(ZeroDivisionError):
        fail(variable, 1.0)
      step(variable, 1.0)
    np.testing.assert_array_equal(variable.value, 5.0)

  def test_arguments_that_are_refused(self):
    variable, gone = started(), jnp.ones(SIZE)
    step(variable, gone)
    step(variable, gone)
    gone.delete()
    with self.assertRaisesRegex(RuntimeError, "deleted"):
      step(variable, gone)
    np.testing.assert_array_equal(variable.value, 4.0)
    with self.assertRaises(TypeError):
      step(variable, jnp.ones(SIZE + 1))
    np.testing.assert_array_equal(variable.value, 4.0)

  def test_programs_that_call_python_are_left_alone(self):
    variable = nnx.Param(jnp.zeros(SIZE))
    fails = False

    def host(x):
      # It would wait for the call that waits for it.
      if fails:
        raise ValueError("as it was told to")
      return np.asarray(x) + np.asarray(variable.value)[0]

    @nnx.jit
    def call(variable):
      more = jax.pure_callback(
        host, jax.ShapeDtypeStruct((), "float32"), variable.value[0]
      )
      variable.value = variable.value + more + 1

    for _ in range(3):
      call(variable)
    np.testing.assert_array_equal(variable.value, 13.0)
    fails = True
    with self.assertRaises((jax.errors.JaxRuntimeError, ValueError)):
      call(variable)
    np.testing.assert_array_equal(variable.value, 13.0)

  def test_hooks(self):
    seen = []

    def get(variable, value):
      seen.append(value)
      return value

    variable = nnx.Param(jnp.zeros(SIZE), on_get_value=get)
    step(variable, 1.0)
    for i in range(1, 5):
      np.testing.assert_array_equal(variable.value, float(i))
      step(variable, 1.0)
    arrays = [x for x in seen if not isinstance(x, jax.core.Tracer)]
    for i, value in enumerate(arrays, start=1):
      np.testing.assert_array_equal(value, float(i))

  def test_boxed_variables_are_left_alone(self):
    with nnx.var_defaults(ref=True):
      variable = nnx.Param(jnp.zeros(SIZE))
    for _ in range(3):
      step(variable, 1.0)
    np.testing.assert_array_equal(variable.value, 3.0)

  @parameterized.parameters("disallow", "disallow_explicit")
  def test_copies_are_no_transfers(self, guard):
    variable, x = nnx.Param(jnp.zeros(SIZE)), jnp.ones(())
    with jax.transfer_guard(guard):
      for _ in range(3):
        old = variable.value
        step(variable, x)
        step(variable, x)
    np.testing.assert_array_equal(variable.value, 6.0)
    np.testing.assert_array_equal(old, 4.0)

  def test_layouts(self):
    expected = np.arange(12.0).reshape(3, 4)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    turned = layout.Format(layout.Layout((1, 0)), place)
    variable = nnx.Param(jax.device_put(expected, turned))
    for i in range(3):
      step(variable, 1.0)
      if i:
        variable.value = jax.device_put(variable.value, turned)
    np.testing.assert_array_equal(variable.value, expected + 3.0)

  def test_another_jit_in_the_place_of_jax_jit(self):
    seen = []

    class Logged:
      def __init__(self, fun, **options):
        self.jitted = jit(fun, **options)

      def __call__(self, *args):
        result = self.jitted(*args)
        seen.append(variable.value)
        return result

      def __getattr__(self, name):
        return getattr(self.jitted, name)

    jit, variable = jax.jit, started()
    with mock.patch.object(jax, "jit", Logged):
      step.clear_cache()
      for _ in range(3):
        step(variable, 1.0)
    seen.append(variable.value)
    for i, value in enumerate(seen):
      np.testing.assert_array_equal(value, i + 2.0)

  def test_ahead_of_time(self):
    variable = started()
    compiled = step.lower(variable, 1.0).compile()
    array = variable.value
    for _ in range(3):
      compiled(variable, 1.0)
    np.testing.assert_array_equal(array, 2.0)
    np.testing.assert_array_equal(variable.value, 5.0)
    self.assertEmpty(step.lower(variable, 1.0).call.donated)

  def test_explicit_donation_stays_as_it_is(self):
    @nnx.jit(donate_argnames="variable")
    def give(variable):
      variable.value = variable.value + 1

    variable = nnx.Param(jnp.zeros(SIZE))
    give(variable)
    array = variable.value
    give(variable)
    self.assertTrue(array.is_deleted())

  def test_caches_that_jax_clears(self):
    variable = started()
    for _ in range(3):
      jax.clear_caches()
      step(variable, 1.0)
      step(variable, 1.0)
    np.testing.assert_array_equal(variable.value, 8.0)


class LoanTest(absltest.TestCase):
  def test_is_opened_once(self):
    arrays = (jnp.ones(2), jnp.zeros(3))
    loan = _engine.loan(arrays, True)
    self.assertIs(_engine.loan_flatten(loan)[0], arrays)
    for _ in range(2):
      copies, aux = _engine.loan_flatten(loan)
      self.assertIsNone(aux)
      for copied, array in zip(copies, arrays):
        self.assertIsNot(copied, array)
        np.testing.assert_array_equal(copied, array)

  def test_of_copies_may_be_opened_again(self):
    arrays: tuple[Any, ...] = (jnp.ones(2),)
    loan = _engine.loan(arrays, False)
    for _ in range(3):
      self.assertIs(_engine.loan_flatten(loan)[0], arrays)

  def test_this_jax_opens_it_as_the_engine_needs_it(self):
    self.assertTrue(in_place_programs._works("cpu"))

  def test_wrong_arguments(self):
    with self.assertRaises(TypeError):
      _engine.loan([1], True)
    with self.assertRaises(TypeError):
      _engine.loan_flatten(1)
    with self.assertRaises(TypeError):
      _engine.loan_unflatten(None)

  def test_copies_under_a_trace_are_concrete(self):
    array, copies = jnp.ones(2), []
    jax.make_jaxpr(lambda: copies.append(in_place.copied(array)))()
    np.testing.assert_array_equal(copies[0], 1.0)


if __name__ == "__main__":
  absltest.main()
