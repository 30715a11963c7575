"""What `kv_cache.update` refuses, and what it does where it cannot."""

import functools
import math

from absl.testing import parameterized
import jax
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import kv_cache
from kernels.kv_cache import ffi, primitive
from tests.kernels.kv_cache import cases
from tests.kernels.kv_cache import oracle as oracles
from tests.testing import op_contract

IMPLEMENTATIONS = (op_contract.OURS, "xla")
oracle, random = oracles.update, oracles.random
arguments, assert_same = cases.arguments, cases.assert_same


class WrongInputTest(op_contract.PlatformTest):
  def assert_raises(self, error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
      kv_cache.update(*args, **kwargs)
    if kwargs.get("implementation") is None:
      with pytest.raises(error, match=match):
        jax.eval_shape(functools.partial(kv_cache.update, **kwargs), *args)

  def test_rank(self):
    k, v, new_k, new_v = arguments()
    self.assert_raises(
      ValueError, "`cache_k` must have 4 axes", k[0], v, new_k, new_v, 0
    )
    self.assert_raises(
      ValueError,
      "Pass `layer` with a stacked cache",
      k[None],
      v[None],
      new_k,
      new_v,
      0,
    )
    self.assert_raises(
      ValueError, "must have 5 axes", k, v, new_k, new_v, 0, layer=0
    )
    self.assert_raises(
      ValueError,
      "`new_k` and `new_v` must have 4 axes",
      k,
      v,
      new_k[:, 0],
      new_v,
      0,
    )

  def test_dtype(self):
    k, v, new_k, new_v = arguments()
    self.assert_raises(
      TypeError,
      "`new_k` must have the dtype of `cache_k`, float32",
      k,
      v,
      new_k.astype("bfloat16"),
      new_v,
      0,
    )
    self.assert_raises(
      ValueError,
      "`cache_k` and `cache_v` must have the same dtype",
      k,
      v.astype("bfloat16"),
      new_k,
      new_v,
      0,
    )
    self.assert_raises(
      TypeError,
      "`cache_k` must be one of float32",
      k.astype("int32"),
      v.astype("int32"),
      new_k,
      new_v,
      0,
    )
    self.assert_raises(
      TypeError, "`index` must hold integers", k, v, new_k, new_v, 0.5
    )
    self.assert_raises(
      TypeError,
      "to be quantised to int8",
      k.astype("int8"),
      v.astype("int8"),
      new_k.astype("int32"),
      new_v.astype("int32"),
      0,
      k_scale=1.0,
      v_scale=1.0,
    )

  def test_shape(self):
    k, v, new_k, new_v = arguments()
    self.assert_raises(
      ValueError,
      r"`new_v` must have the shape \[3, 1, 2, 20\]",
      k,
      v,
      new_k,
      new_v[..., :3],
      0,
    )
    self.assert_raises(
      ValueError,
      "must have the same dtype and the same shape",
      k,
      v[:, :4],
      new_k,
      new_v,
      0,
    )
    self.assert_raises(
      ValueError,
      "must have the batch size of the new tokens, 2",
      k,
      v,
      new_k[:2],
      new_v[:2],
      0,
    )
    self.assert_raises(
      ValueError,
      r"`index` must be a scalar or of shape \[3\]",
      k,
      v,
      new_k,
      new_v,
      jnp.zeros(2, jnp.int32),
    )
    self.assert_raises(
      ValueError,
      "`block_table` must have 2 axes",
      k,
      v,
      new_k,
      new_v,
      0,
      block_table=jnp.zeros(3, jnp.int32),
    )
    self.assert_raises(
      TypeError,
      "`layer` must be an integer scalar",
      k[None],
      v[None],
      new_k,
      new_v,
      0,
      layer=jnp.zeros(1, jnp.int32),
    )

  def test_options(self):
    k, v, new_k, new_v = arguments()
    self.assert_raises(
      ValueError, "`layout` must be", k, v, new_k, new_v, 0, layout="sbnh"
    )
    self.assert_raises(
      ValueError,
      "`implementation` of kv_cache_update must be one of",
      k,
      v,
      new_k,
      new_v,
      0,
      implementation="gpu",
    )
    self.assert_raises(
      ValueError,
      "must not be given with a cache of float32",
      k,
      v,
      new_k,
      new_v,
      0,
      k_scale=1.0,
      v_scale=1.0,
    )
    self.assert_raises(
      ValueError,
      "`k_scale` and `v_scale` must be given with a cache of int8",
      k.astype("int8"),
      v.astype("int8"),
      new_k,
      new_v,
      0,
      k_scale=1.0,
    )
    self.assert_raises(
      ValueError,
      r"`k_scale` must be a scalar, \[2\]",
      k.astype("int8"),
      v.astype("int8"),
      new_k,
      new_v,
      0,
      k_scale=jnp.ones(3),
      v_scale=1.0,
    )
    self.assert_raises(
      ValueError,
      "must not be given together",
      k,
      v,
      new_k,
      new_v,
      0,
      block_table=jnp.zeros((3, 1), jnp.int32),
      cache_batch_index=[0, 1, 2],
    )

  def test_of_quantisation(self):
    x, stored = jnp.ones((2, 3)), jnp.ones((2, 3), jnp.int8)
    for function in (
      lambda x: kv_cache.quantize(x, 0.1, "int8"),
      lambda x: kv_cache.scale_for(x, "int8"),
    ):
      with self.assertRaisesRegex(TypeError, "`x` must be an array, but"):
        function("x")
      for wrong in (stored, jnp.ones(3, bool)):
        with self.assertRaisesRegex(TypeError, "`x` must be floating, but got"):
          function(wrong)
    with self.assertRaisesRegex(ValueError, "`x` must be int8, .*`float32`"):
      kv_cache.dequantize(x, 0.1)
    with self.assertRaisesRegex(
      ValueError, "`dtype` must be one of int8, .*16"
    ):
      kv_cache.scale_for(x, "int16")
    with self.assertRaisesRegex(ValueError, r"must have elements, .* \(0, 3\)"):
      kv_cache.scale_for(x[:0], "int8")
    self.assertTrue(jnp.isnan(kv_cache.scale_for(x * jnp.nan, "int8")))
    self.assertEqual(float(kv_cache.scale_for(x * 0, "int8")), 1.0)
    for function in (
      lambda scale: kv_cache.quantize(x, scale, "int8"),
      lambda scale: kv_cache.dequantize(stored, scale),
    ):
      for scale in (0.0, -1, math.nan, math.inf):
        with self.assertRaisesRegex(ValueError, "`scale` must be positive and"):
          function(scale)
      with self.assertRaisesRegex(TypeError, "`scale` must be a number, but"):
        function(True)
      with self.assertRaisesRegex(TypeError, "`scale` must be floating, but"):
        function(jnp.ones(3, int))
      for shape in ((2,), (4, 2, 3), (1, 2, 3)):
        with self.assertRaisesRegex(ValueError, r"broadcast to .*\(2, 3\) of"):
          function(jnp.ones(shape))
      for shape in ((), (3,), (2, 1), (1, 3)):
        self.assertEqual(function(jnp.ones(shape)).shape, (2, 3))

  @parameterized.parameters(
    (8, {}, r"`index` must lie in \[0, 8\)"),
    (-1, {}, r"`index` must lie in \[0, 8\)"),
    (7, {"lengths": 2}, "leave room for the new tokens"),
    (0, {"lengths": 3}, r"`lengths` must lie in \[0, 2\]"),
    (0, {"lengths": -1}, r"`lengths` must lie in \[0, 2\]"),
    (0, {"layer": 2}, r"`layer` must lie in \[0, 2\)"),
    (0, {"cache_batch_index": (0, 1, 3)}, r"must name blocks in \[0, 3\)"),
    (7, {"block_table": ((0, -1), (1, 1), (2, 2))}, "must name blocks"),
  )
  def test_position_outside_raises_where_known(self, index, kwargs, match):
    k, v, new_k, new_v = arguments(t=2)
    kwargs = {name: np.array(value, np.int32) for name, value in kwargs.items()}
    if "layer" in kwargs:
      k, v = jnp.stack([k, k]), jnp.stack([v, v])
    with pytest.raises(ValueError, match=match):
      kv_cache.update(k, v, new_k, new_v, index, **kwargs)
    error, _ = jax.jit(checkify.checkify(kv_cache.update))(
      k, v, new_k, new_v, jnp.int32(index), **kwargs
    )
    with pytest.raises(ValueError, match=match):
      error.throw()

  def test_checkify_is_silent_when_all_is_well(self):
    args = arguments()
    error, got = jax.jit(checkify.checkify(kv_cache.update))(*args, 7)
    error.throw()
    assert_same(got, oracle(*args, 7))

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_position_outside_writes_nothing_under_jit(self, implementation):
    args = arguments(t=2)
    index = np.array([7, -1, 2**31 - 1], np.int32)
    got = cases.jitted(implementation)(*args, index)
    assert_same(got, oracle(*args, index))
    np.testing.assert_array_equal(got[0][2], args[0][2])

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_empty_batch_and_no_tokens(self, implementation):
    args = arguments(b=0)
    assert_same(cases.jitted(implementation)(*args, 0), args[:2])
    args = arguments(t=0)
    assert_same(cases.jitted(implementation)(*args, 0), args[:2])

  def test_handler_refuses_what_python_would_not_pass(self):
    op_contract.only_on("cpu", "gpu")
    k, v, new_k, new_v = arguments()
    b = jnp.zeros(3, jnp.int32)
    scale = jnp.zeros((0, 0))
    good = [k, v, new_k, new_v, b, b, b, b[:, None], b[0], scale, scale]
    primitive.UPDATE.implementations[op_contract.OURS].library.load()

    def call(**changes):
      args = [changes.get(str(i), arg) for i, arg in enumerate(good)]
      out = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args[:2]]
      return jax.ffi.ffi_call(ffi.TARGET, out)(
        *args,
        ring=np.int64(changes.get("ring", 0)),
        heads_first=np.bool_(False),
      )

    call()
    for changes, match in (
      ({"0": k[0]}, "must have 4 axes or more"),
      ({"1": v[:, :2]}, "the same shape but for the last axis"),
      ({"0": k.astype("int32"), "1": v.astype("int32")}, "`cache_k` must be"),
      ({"2": new_k[0]}, "`new_k` must have 4 axes"),
      ({"2": new_k.astype("bfloat16")}, "must have the dtype of the cache"),
      ({"3": new_v[..., :1]}, "`new_v` must have shape"),
      ({"4": b[:2]}, "`index` must have shape"),
      ({"5": b[:2]}, "`count` must have shape"),
      ({"6": b[:2]}, "`layer` must have shape"),
      ({"8": b}, "`first_slot` must be a scalar"),
      ({"ring": -1}, "`ring` must not be negative"),
      ({"0": k.astype("int8"), "1": v.astype("int8")}, "`k_scale` must have"),
    ):
      with pytest.raises(Exception, match=match):
        jax.block_until_ready(call(**changes))
