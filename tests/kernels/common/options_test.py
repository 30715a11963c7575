"""Options of every op: what is no setting is refused in one sentence."""

from absl.testing import parameterized
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import batch_stat, decode_attention, kv_cache
from kernels.common import options

NAN, INF = float("nan"), float("inf")
TYPE, VALUE = TypeError, ValueError


def attention(**kwargs):
  cache, new = jnp.zeros((1, 8, 1, 4)), jnp.zeros((1, 1, 1, 4))
  return decode_attention.decode_attention(
    cache, cache, new, new, new, 0, **kwargs
  )


def attend(**kwargs):
  cache = jnp.zeros((1, 8, 1, 4))
  return decode_attention.attend(cache, cache, cache[:, :1], 3, **kwargs)


def update_cache(**kwargs):
  cache, new = jnp.zeros((1, 8, 1, 4)), jnp.zeros((1, 1, 1, 4))
  return kv_cache.update(cache, cache, new, new, 0, **kwargs)


def batch_norm(**kwargs):
  x, stat = jnp.ones((4, 3)), jnp.ones(3)
  return batch_stat.batch_norm(x, stat, stat, stat, stat, **kwargs)


def update_stats(**kwargs):
  x, stat = jnp.ones((4, 3)), jnp.ones(3)
  return batch_stat.update(x, stat, stat, **kwargs)


def rope(**kwargs):
  return decode_attention.rope_tables(**({"positions": 4, "dim": 8} | kwargs))


SWITCHES = tuple(
  (fn, name, value, TYPE, "must be True or False")
  for fn, names in (
    (attention, ("ring", "causal", "return_lse", "rope_interleaved",
                 "rope_cached_keys")),
    (attend, ("ring", "causal", "return_lse")),
    (update_cache, ("ring",)),
    (batch_norm, ("use_fast_variance", "use_running_average")),
    (update_stats, ("use_fast_variance",)),
  )
  for name in names
  for value in (1, 0, None, "no", NAN, 2.0)
)  # fmt: skip

NUMBERS = tuple(
  (fn, name, value, error, "must")
  for fn, name, low in (
    (attention, "scale", ()), (attend, "scale", ()),
    (attention, "softcap", (0, -1.0)), (attend, "softcap", (0.0, -0.5)),
    (batch_norm, "epsilon", (-1e-9,)), (batch_norm, "momentum", (-0.1, 1.1)),
    (update_stats, "momentum", (-0.1, 1.1)),
    (rope, "theta", (0, -1.0)), (rope, "scale", (0, -1.0)),
  )
  for error, values in (
    (VALUE, (NAN, INF, -INF, np.float32(NAN), 10**400, *low)),
    (TYPE, (True, "1", np.True_, 1j)),
  )
  for value in values
)  # fmt: skip

INTEGERS = tuple(
  (fn, name, value, error, "must be")
  for fn, name, low in (
    (attention, "chunk", (0, -3)), (attend, "chunk", (0, -3)),
    (attention, "window", (0, -3)), (attend, "window", (0, -3)),
    (rope, "positions", (0, -1)), (rope, "dim", (0, -2, 7)),
  )
  for error, values in (
    (VALUE, low), (TYPE, (2.7, 2.0, NAN, True, np.float32(2), "2")),
  )
  for value in values
)  # fmt: skip

REST = (
  (attention, "window", (1.9, 0), TYPE, "must be an integer"),
  (attention, "window", (True, 0), TYPE, "must be an integer"),
  (attention, "window", (1, -2), VALUE, "must be a pair of numbers"),
  (attention, "window", (1,), VALUE, "must be a pair of numbers"),
  (attention, "window", (1, 2, 3), VALUE, "must be a pair of numbers"),
  (attention, "window", (), VALUE, "must be a pair of numbers"),
  (attention, "scale", 1e39, VALUE, "must be a finite float32"),
  (attention, "softcap", 1e-50, VALUE, "must be a positive and finite"),
  (attention, "layout", "shnb", VALUE, "must be 'bsnh' or 'bnsh'"),
  (attention, "layout", None, VALUE, "must be 'bsnh' or 'bnsh'"),
  (attention, "rope_interleaved", True, VALUE, "without `rope_cos`"),
  (attention, "implementation", None, VALUE, "must be one of auto"),
  (attention, "sinks", np.ones(1, np.int32), VALUE, "must be floating"),
  (update_cache, "layout", ["bsnh"], VALUE, "must be 'bsnh' or 'bnsh'"),
  (batch_norm, "activation", "Relu", VALUE, "must be None or 'relu'"),
  (batch_norm, "activation", True, VALUE, "must be None or 'relu'"),
  (batch_norm, "feature_axis", True, TYPE, "must be one integer"),
  (batch_norm, "feature_axis", 1.0, TYPE, "must be one integer"),
  (update_stats, "feature_axis", False, TYPE, "must be one integer"),
  (rope, "dtype", "int32", TYPE, "must be floating"),
)


class RefusedTest(parameterized.TestCase):
  @parameterized.parameters(*SWITCHES, *NUMBERS, *INTEGERS, *REST)
  def test_in_one_sentence(self, fn, name, value, error, message):
    with pytest.raises(error) as caught:
      fn(**{name: value})
    text = str(caught.value)
    self.assertIn(f"`{name}", text)
    self.assertIn(message, text)
    self.assertLess(len(text), 220)

  def test_number_that_is_not_known(self):
    with pytest.raises(TypeError, match="`scale` must be a number that is"):
      jax.jit(lambda s: attention(scale=s))(1.0)
    with pytest.raises(TypeError, match="`chunk` must be an integer that is"):
      jax.jit(lambda n: attention(chunk=n))(3)


class TakenTest(parameterized.TestCase):
  @parameterized.parameters(
    {"scale": 2}, {"scale": np.float64(0.5)}, {"scale": -1.0}, {"scale": 0.0},
    {"softcap": 3}, {"softcap": np.float32(3)}, {"chunk": np.int64(3)},
    {"window": np.int32(2)}, {"window": [1, -1]}, {"causal": np.False_},
  )  # fmt: skip
  def test_numbers_of_any_kind(self, **kwargs):
    attention(**kwargs)

  @parameterized.parameters("xla", "cpu")
  def test_what_is_larger_than_any_position_is_no_limit(self, implementation):
    rng = np.random.default_rng(0)
    cache = rng.normal(size=(1, 8, 1, 4)).astype(np.float32)

    def call(**kwargs):
      return decode_attention.attend(
        cache, cache, cache[:, :2], 7, implementation=implementation, **kwargs
      )

    want = call()
    for most in (2**31 - 2, 2**31 - 1, 2**31, 2**40, 2**70):
      np.testing.assert_array_equal(call(window=most), want)
      np.testing.assert_array_equal(call(chunk=most), want)
      every = call(causal=False, window=(most, most))
      np.testing.assert_array_equal(every, call(causal=False))

  def test_options(self):
    self.assertEqual(options.integer("n", np.int8(3), 1), 3)
    self.assertIs(options.boolean("flag", np.True_), True)
    self.assertEqual(options.number("x", jnp.float32(0.5)), 0.5)

  def test_what_is_no_array(self):
    with pytest.raises(ValueError, match="`x` must hold numbers of JAX's"):
      options.array("x", 10**40)
    with pytest.raises(TypeError, match="`x` must be an array, but got `dict`"):
      options.array("x", {})

  def test_implementation_is_a_name(self):
    x, zeros = jnp.ones((2, 3)), jnp.zeros(3)
    for wrong in (np.ones(2), ["cpu"], None, 1):
      with pytest.raises(ValueError, match="`implementation` of .* must be"):
        batch_stat.update(x, zeros, zeros, implementation=wrong)


class MergeTest(parameterized.TestCase):
  @parameterized.parameters(
    # Logarithms as they come, [b, n, t], beside results [b, t, n, h].
    ({"lse_a": (2, 4, 3)}, VALUE, r"`lse_a` must have the shape of `out_a`"),
    ({"lse_b": (2, 4, 3)}, VALUE, r"`lse_b` must have the shape of `out_a`"),
    ({"lse_a": (1, 3, 4)}, VALUE, "`lse_a` must have the shape"),
    ({"lse_a": ()}, VALUE, "`lse_a` must have the shape"),
    ({"out_b": (2, 3, 4, 1)}, VALUE, "`out_a` and `out_b` must have the same"),
    ({"out_b": (1, 3, 4, 5)}, VALUE, "`out_a` and `out_b` must have the same"),
    ({"out_a": (), "out_b": ()}, VALUE, "must have the same shape"),
  )  # fmt: skip
  def test_nothing_is_broadcast(self, shapes, error, message):
    named = {
      "out_a": (2, 3, 4, 5), "lse_a": (2, 3, 4),
      "out_b": (2, 3, 4, 5), "lse_b": (2, 3, 4),
    } | shapes  # fmt: skip
    with pytest.raises(error, match=message):
      decode_attention.merge(*(np.zeros(s, np.float32) for s in named.values()))

  def test_dtypes(self):
    out, lse = jnp.zeros((2, 3)), jnp.zeros(2)
    with pytest.raises(TypeError, match="must have the same dtype"):
      decode_attention.merge(out, lse, out.astype("bfloat16"), lse)
    with pytest.raises(TypeError, match="`lse_b` must be floating"):
      decode_attention.merge(out, lse, out, lse.astype(int))
