"""Contract of `kv_cache.update`: implementations against a NumPy oracle."""

import functools
import math
import threading

from absl.testing import parameterized
import hypothesis
import jax
from jax import export
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import kv_cache
from kernels.kv_cache import arg_specs, ffi, primitive
from tests.kernels.kv_cache import cases
from tests.kernels.kv_cache import oracle as oracles
from tests.testing import hlo, op_contract

PLATFORM, OURS = op_contract.PLATFORM, op_contract.OURS
IMPLEMENTATIONS = (OURS, "xla")
FLOATS, QUANTIZED = oracles.FLOATS, oracles.QUANTIZED
oracle, random = oracles.update, oracles.random
arguments, assert_same, bits = cases.arguments, cases.assert_same, cases.bits
problems = cases.problems


def jitted(implementation, **kwargs):
  return jax.jit(
    functools.partial(kv_cache.update, implementation=implementation, **kwargs)
  )


class PlatformTest(parameterized.TestCase):
  """Runs where the device of TEST_PLATFORM is."""

  def setUp(self):
    super().setUp()
    if PLATFORM != "cpu":
      op_contract.need_device(PLATFORM)


class CpuOnlyTest(parameterized.TestCase):
  """About the CPU's handler and the programs around it."""

  def setUp(self):
    super().setUp()
    op_contract.only_on("cpu")


class UpdateTest(PlatformTest):
  @parameterized.product(
    implementation=IMPLEMENTATIONS,
    dtype=FLOATS,
    tokens=(1, 3),
    index=(2, (0, 5, 3)),
  )
  def test_writes_at_index(self, implementation, dtype, tokens, index):
    args = arguments(t=tokens, dtype=dtype)
    got = jitted(implementation)(*args, jnp.array(index))
    assert_same(got, oracle(*args, np.array(index)))

  @parameterized.parameters(*arg_specs.ARG_SPECS)
  def test_shapes_of_real_models(self, spec):
    spec = spec.scaled(batch=2, length=16)
    *args, index = spec.make()
    layer = None if spec.layers is None else 1
    got = jitted(OURS, layer=layer)(*args, index)
    assert_same(got, oracle(*args, np.asarray(index), layer=layer))

  @parameterized.product(
    implementation=IMPLEMENTATIONS,
    layout=("bsnh", "bnsh"),
    ring=(False, True),
  )
  def test_parts_of_a_sharded_cache(self, implementation, layout, ring):
    args = arguments(t=2, layout=layout)
    cases.check_parts(args, implementation, layout, ring)

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_every_feature_on_random_shapes(self, implementation):
    @hypothesis.given(problems())
    @hypothesis.settings(max_examples=24, deadline=None, derandomize=True)
    def check(problem):
      args, kwargs = problem
      got = jitted(implementation, **kwargs)(*args)
      assert_same(got, oracle(*args, **kwargs))

    check()

  @parameterized.product(
    level=("baseline", "avx2", "avx512"), dtype=FLOATS + QUANTIZED
  )
  def test_every_instruction_set(self, level, dtype):
    op_contract.only_on("cpu")
    library = ffi.LIBRARY.load()
    try:
      library.set_simd_level(level)
    except ValueError:
      self.skipTest(f"this machine has no {level}")
    try:
      args = arguments(t=2, h=53, dtype=dtype)
      scales = (
        {"k_scale": 0.01, "v_scale": np.float32([0.003, 1.0])}
        if dtype in QUANTIZED
        else {}
      )
      index = np.array([0, 6, 3])
      got = jitted("cpu", **scales)(*args, index)
      assert_same(got, oracle(*args, index, **scales))
    finally:
      library.set_simd_level("auto")

  @parameterized.product(implementation=IMPLEMENTATIONS, dtype=QUANTIZED)
  def test_quantises_special_values(self, implementation, dtype):
    special = np.float32(
      [0.0, -0.0, np.inf, -np.inf, np.nan, 1e30, -1e30, 1e-30, 0.5, 1.5, 2.5,
       2.0**-9, 2.0**-10, 3 * 2.0**-10, 2.0**-16, 2.0**-17, 464.0, 465.0,
       61439.0, 61441.0, 0.99 * 2.0**-6,
       *np.uint32([0x7FFFFFFF, 0xFFFFFFFF]).view(np.float32)]
    )  # fmt: skip
    new = jnp.asarray(special)[None, None, None]
    cache = jnp.ones((1, 2, 1, special.size), dtype)
    got, _ = jitted(implementation, k_scale=1.0, v_scale=1.0)(
      cache, cache, new, new, 1
    )
    want = oracles.quantize(
      np.nan_to_num(special, nan=0.0, posinf=np.inf, neginf=-np.inf), 1.0, dtype
    )
    got = np.asarray(got)[0, 1, 0]
    nan = np.isnan(special)
    np.testing.assert_array_equal(
      got[~nan].astype(np.float32), want[~nan].astype(np.float32)
    )
    if dtype == "int8":
      assert (got[nan] == 0).all()
    else:
      assert np.isnan(got[nan].astype(np.float32)).all()

  def test_auto_runs_the_kernel(self):
    args = arguments()
    [choice] = kernels.explain(kv_cache.update, *args, 0, platform="cpu")
    assert choice.implementation == "cpu"
    [choice] = kernels.explain(kv_cache.update, *args, 0, platform="tpu")
    assert choice.implementation == "xla"
    op_contract.only_on("cpu", "gpu")
    [choice] = kernels.explain(kv_cache.update, *args, 0)
    assert choice.implementation == OURS
    text = jax.jit(kv_cache.update).lower(*args, 0).as_text()
    assert hlo.custom_calls(text, ffi.TARGET) == 1

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_same_result_eagerly(self, implementation):
    args = arguments(t=2)
    got = kv_cache.update(*args, 3, implementation=implementation)
    assert_same(got, oracle(*args, 3))

  def test_same_bits_every_time(self):
    args = arguments(b=4, s=64, t=33, n=4, h=64, dtype="bfloat16")
    index = np.arange(4)
    first = jitted(OURS)(*args, index)
    for _ in range(3):
      assert_same(jitted(OURS)(*args, index), first)


class UpdateContract(op_contract.OpContract):
  def make_case(self):
    return (*arguments(t=2), jnp.array([0, 6, 3]))

  def call(self, *arrays):
    return kv_cache.update(*arrays, implementation=self.implementation)


class XlaContractTest(UpdateContract):
  implementation = "xla"


class CpuContractTest(UpdateContract):
  implementation = "cpu"
  target = ffi.TARGET

  def setUp(self):
    op_contract.only_on("cpu")
    super().setUp()


class CudaContractTest(UpdateContract):
  implementation = "cuda"
  target = ffi.TARGET

  def setUp(self):
    op_contract.only_on("gpu")
    super().setUp()


class InPlaceTest(CpuOnlyTest):
  def assert_no_copy_of(self, compiled, *caches):
    text = compiled.as_text()
    for cache in caches:
      shape = ",".join(map(str, cache.shape))
      for line in text.splitlines():
        if f"[{shape}]" in line and " copy(" in line:
          raise AssertionError(f"the cache is copied: {line.strip()}")

  @parameterized.product(layer=(None, 1), dtype=("float32", "bfloat16"))
  def test_donated_cache_is_not_copied(self, layer, dtype):
    k, v, *new = arguments(dtype=dtype)
    if layer is not None:
      k, v = jnp.stack([k] * 3), jnp.stack([v] * 3)
    step = jax.jit(
      functools.partial(kv_cache.update, layer=layer), donate_argnums=(0, 1)
    )
    compiled = hlo.compiled(step.lower(k, v, *new, 0))
    self.assert_no_copy_of(compiled, k)
    assert compiled.memory_analysis().alias_size_in_bytes == 2 * k.nbytes
    where = k.unsafe_buffer_pointer()
    got, _ = step(k, v, *new, 0)
    assert got.unsafe_buffer_pointer() == where

  def test_not_donated_cache_keeps_its_values(self):
    args = arguments()
    before = [np.array(x) for x in args]
    jax.jit(kv_cache.update)(*args, 0)
    assert_same(args, before)

  @parameterized.parameters("scan", "while_loop")
  def test_carry_is_not_copied(self, kind):
    k, v, new_k, new_v = arguments()

    def run(k, v):
      if kind == "scan":

        def body(carry, i):
          return kv_cache.update(*carry, new_k + i, new_v, i), None

        return jax.lax.scan(body, (k, v), jnp.arange(5))[0]

      def step(carry):
        i, k, v = carry
        return i + 1, *kv_cache.update(k, v, new_k + i, new_v, i)

      return jax.lax.while_loop(lambda c: c[0] < 5, step, (0, k, v))[1:]

    want = [np.array(k), np.array(v)]
    for i in range(5):
      want = oracle(*want, np.asarray(new_k + i), new_v, i)
    step = jax.jit(run, donate_argnums=(0, 1))
    self.assert_no_copy_of(hlo.compiled(step.lower(k, v)), k)
    assert_same(step(k, v), want)

  def test_stack_of_layers_in_a_scan_is_not_copied(self):
    k, v, new_k, new_v = arguments()
    k, v = (jnp.stack([x + i for i in range(4)]) for x in (k, v))

    def run(k, v):
      def body(carry, layer):
        return kv_cache.update(*carry, new_k, new_v, 2, layer=layer), None

      return jax.lax.scan(body, (k, v), jnp.arange(4))[0]

    want = [np.array(k), np.array(v)]
    for i in range(4):
      want = oracle(*want, new_k, new_v, 2, layer=i)
    step = jax.jit(run, donate_argnums=(0, 1))
    self.assert_no_copy_of(hlo.compiled(step.lower(k, v)), k)
    assert_same(step(k, v), want)

  def test_vmapped_donated_cache_is_not_copied(self):
    k, v, new_k, new_v = (jnp.stack([x, x + 1]) for x in arguments())
    step = jax.jit(jax.vmap(kv_cache.update), donate_argnums=(0, 1))
    index = jnp.array([0, 3])
    lowered = step.lower(k, v, new_k, new_v, index)
    self.assert_no_copy_of(hlo.compiled(lowered), k)


class TransformTest(PlatformTest):
  @parameterized.product(
    implementation=IMPLEMENTATIONS,
    layer=(None, 1),
    paged=(False, True),
    layout=("bsnh", "bnsh"),
  )
  def test_vmap(self, implementation, layer, paged, layout):
    args = [jnp.stack([x, x * 2, x + 1]) for x in arguments(t=2, layout=layout)]
    if layer is not None:
      args[:2] = (jnp.stack([x] * 2, 1) for x in args[:2])
    index = jnp.array([[0, 1, 2], [3, 4, 5], [5, 3, 1]])
    kwargs = {"layout": layout, "layer": layer}
    if paged:
      kwargs["block_table"] = jnp.array([[2], [0], [1]])
    update = functools.partial(
      kv_cache.update, implementation=implementation, **kwargs
    )
    got = jax.jit(jax.vmap(update))(*args, index)
    for i in range(3):
      kwargs["block_table"] = np.array([[2], [0], [1]]) if paged else None
      want = oracle(*(x[i] for x in args), index[i], **kwargs)
      assert_same([g[i] for g in got], want)

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_vmap_keeps_layers_that_do_not_exist_apart(self, implementation):
    args = [jnp.stack([x, x * 2, x + 1]) for x in arguments()]
    args[:2] = (jnp.stack([x] * 2, 1) for x in args[:2])

    def update(*args):
      *args, layer = args
      return kv_cache.update(
        *args, 0, layer=layer, implementation=implementation
      )

    # Those of the next, and of the one before, do exist.
    got = jax.jit(jax.vmap(update))(*args, jnp.array([2, 5, -1]))
    assert_same(got, args[:2])

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_nested_vmap_over_other_axes(self, implementation):
    k, v, new_k, new_v = arguments()
    update = functools.partial(kv_cache.update, implementation=implementation)
    inner = jax.vmap(update, (None, None, None, None, 0), (1, 2))
    got = jax.jit(jax.vmap(inner, (None, None, 0, None, None), 0))(
      k, v, jnp.stack([new_k, -new_k]), new_v, jnp.arange(4)
    )
    for i, sign in enumerate((1, -1)):
      for j in range(4):
        want = oracle(k, v, sign * new_k, new_v, j)
        assert_same((got[0][i, :, j], got[1][i, :, :, j]), want)

  def test_vmap_is_one_call(self):
    op_contract.only_on("cpu", "gpu")
    args = [jnp.stack([x, x]) for x in arguments()]
    text = (
      jax.jit(jax.vmap(kv_cache.update)).lower(*args, jnp.arange(2)).as_text()
    )
    assert text.count(f"@{ffi.TARGET}") == 1
    assert "while" not in text

  @parameterized.product(
    implementation=IMPLEMENTATIONS, ring=(False, True), layer=(None, 0)
  )
  def test_gradients_are_those_of_the_definition(
    self, implementation, ring, layer
  ):
    k, v, new_k, new_v = arguments(t=3)
    if layer is not None:
      k, v = k[None], v[None]
    index = jnp.array([0, 6, 2])
    rng = np.random.default_rng(1)
    weight = [jnp.asarray(rng.normal(size=x.shape)) for x in (k, v)]

    def loss(*arrays):
      out = kv_cache.update(
        *arrays,
        index,
        ring=ring,
        layer=layer,
        implementation=implementation,
      )
      return sum(jnp.vdot(w, o**2) for w, o in zip(weight, out))

    with jax.numpy_dtype_promotion("standard"):
      grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(k, v, new_k, new_v)
    # d(out)/d(cache) is 1 where nothing was written, d(out)/d(new) is 1 where
    # the row went: read both off the oracle with marked inputs.
    mark = [np.zeros(k.shape, np.int32), np.zeros(v.shape, np.int32)]
    ids = [
      np.arange(1, x.size + 1, dtype=np.int32).reshape(x.shape)
      for x in (new_k, new_v)
    ]
    where = oracle(*mark, *ids, np.asarray(index), ring=ring, layer=layer)
    out = oracle(k, v, new_k, new_v, np.asarray(index), ring=ring, layer=layer)
    for i in range(2):
      upstream = 2 * np.asarray(weight[i]) * out[i]
      np.testing.assert_allclose(
        grads[i], np.where(where[i] == 0, upstream, 0), rtol=1e-6
      )
      want = np.zeros(ids[i].size + 1)
      want[where[i].ravel()] = upstream.ravel()
      np.testing.assert_allclose(grads[2 + i].ravel(), want[1:], rtol=1e-6)

  def test_forward_mode_and_checkpoint(self):
    args = arguments()

    def update(*a):
      return kv_cache.update(*a, 1)

    _, tangents = jax.jvp(update, args, args)
    assert_same(tangents, update(*args))

    def loss(*a):
      return sum(jnp.sum(x**2) for x in update(*a))

    plain = jax.grad(loss, argnums=(0, 1, 2, 3))(*args)
    saved = jax.grad(jax.checkpoint(loss), argnums=(0, 1, 2, 3))(*args)
    assert_same(saved, plain)

  def test_gradient_of_quantised_cache_raises(self):
    k, v, new_k, new_v = arguments(dtype="int8")

    def loss(new):
      return (
        kv_cache.update(k, v, new, new_v, 0, k_scale=1.0, v_scale=1.0)[0]
        .astype(jnp.float32)
        .sum()
      )

    with pytest.raises(TypeError, match="cannot be differentiated"):
      jax.grad(loss)(new_k)

  def test_export_with_symbolic_batch(self):
    b, s = export.symbolic_shape("b, s")
    cache = jax.ShapeDtypeStruct((b, s, 2, 20), jnp.float32)
    new = jax.ShapeDtypeStruct((b, 1, 2, 20), jnp.float32)
    index = jax.ShapeDtypeStruct((b,), jnp.int32)
    exported = export.export(
      jax.jit(kv_cache.update),
      platforms=("cpu", "cuda", "tpu"),
    )(cache, cache, new, new, index)
    loaded = export.deserialize(exported.serialize())
    for b in (1, 3):
      args = arguments(b=b)
      index = np.arange(b, dtype=np.int32)
      assert_same(loaded.call(*args, index), oracle(*args, index))

  def test_eval_shape(self):
    spec = arg_specs.ARG_SPECS[0]
    k, v = jax.eval_shape(kv_cache.update, *spec.shapes())
    assert k.shape == v.shape == spec.cache_shape
    assert k.dtype == v.dtype == jnp.dtype(spec.dtype)

  def test_many_python_threads(self):
    args = arguments(b=4, s=64, t=40, n=4, h=64)
    step = jitted(OURS)
    want = oracle(*args, 3)
    failures = []

    def work():
      try:
        for _ in range(20):
          assert_same(step(*args, 3), want)
      except AssertionError as error:
        failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert not failures


class WrongInputTest(PlatformTest):
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
    got = jitted(implementation)(*args, index)
    assert_same(got, oracle(*args, index))
    np.testing.assert_array_equal(got[0][2], args[0][2])

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_empty_batch_and_no_tokens(self, implementation):
    args = arguments(b=0)
    assert_same(jitted(implementation)(*args, 0), args[:2])
    args = arguments(t=0)
    assert_same(jitted(implementation)(*args, 0), args[:2])

  def test_handler_refuses_what_python_would_not_pass(self):
    op_contract.only_on("cpu", "gpu")
    k, v, new_k, new_v = arguments()
    b = jnp.zeros(3, jnp.int32)
    scale = jnp.zeros((0, 0))
    good = [k, v, new_k, new_v, b, b, b, b[:, None], b[0], scale, scale]
    primitive.UPDATE.implementations[OURS].library.load()

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
