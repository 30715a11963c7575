"""Contract of `kv_cache.update`: implementations against a NumPy oracle."""

import functools
import threading

from absl.testing import parameterized
import hypothesis
import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import kv_cache
from kernels.kv_cache import arg_specs, ffi
from tests.kernels.kv_cache import cases
from tests.kernels.kv_cache import oracle as oracles
from tests.testing import hlo, op_contract

PLATFORM, OURS = op_contract.PLATFORM, op_contract.OURS
IMPLEMENTATIONS = (OURS, "xla")
FLOATS, QUANTIZED = oracles.FLOATS, oracles.QUANTIZED
oracle, random = oracles.update, oracles.random
arguments, assert_same, bits = cases.arguments, cases.assert_same, cases.bits
problems = cases.problems


class UpdateTest(op_contract.PlatformTest):
  @parameterized.product(
    implementation=IMPLEMENTATIONS,
    dtype=FLOATS,
    tokens=(1, 3),
    index=(2, (0, 5, 3)),
  )
  def test_writes_at_index(self, implementation, dtype, tokens, index):
    args = arguments(t=tokens, dtype=dtype)
    got = cases.jitted(implementation)(*args, jnp.array(index))
    assert_same(got, oracle(*args, np.array(index)))

  @parameterized.parameters(*arg_specs.ARG_SPECS)
  def test_shapes_of_real_models(self, spec):
    spec = spec.scaled(batch=2, length=16)
    *args, index = spec.make()
    layer = None if spec.layers is None else 1
    got = cases.jitted(OURS, layer=layer)(*args, index)
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
      got = cases.jitted(implementation, **kwargs)(*args)
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
      got = cases.jitted("cpu", **scales)(*args, index)
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
    got, _ = cases.jitted(implementation, k_scale=1.0, v_scale=1.0)(
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
    first = cases.jitted(OURS)(*args, index)
    for _ in range(3):
      assert_same(cases.jitted(OURS)(*args, index), first)


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


class InPlaceTest(op_contract.CpuOnlyTest):
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


class TransformTest(op_contract.PlatformTest):
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
    step = cases.jitted(OURS)
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
