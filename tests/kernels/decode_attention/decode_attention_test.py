"""Contract of `decode_attention`: every implementation against float64."""

import functools
import itertools

from absl.testing import parameterized
import hypothesis
import jax
from jax import export, test_util
from jax.experimental import checkify
import jax.numpy as jnp
import numpy as np
import pytest

import kernels
from kernels import decode_attention as da
from kernels.decode_attention import arg_specs, ffi
from tests.kernels.decode_attention import cases, oracle
from tests.kernels.kv_cache import oracle as cache_oracle
from tests.testing import hlo, op_contract, tolerances

FLOATS, QUANTIZED = cache_oracle.FLOATS, cache_oracle.QUANTIZED
PLATFORM, OURS = op_contract.PLATFORM, op_contract.OURS
IMPLEMENTATIONS = (OURS, "xla")
random = cache_oracle.random
arguments, check, problems = cases.arguments, cases.check, cases.problems


def jitted(implementation, **kwargs):
  return jax.jit(
    functools.partial(
      da.decode_attention, implementation=implementation, return_lse=True,
      **kwargs,
    )
  )  # fmt: skip


def run(implementation, args, index, **kwargs):
  got = jitted(implementation, **kwargs)(*args, jnp.asarray(index))
  check(got, *args, np.asarray(index), **kwargs)
  return got


class DecodeAttentionTest(op_contract.PlatformTest):
  @parameterized.parameters(
    *itertools.product((OURS,), FLOATS, (1, 3, 8), (1, 4)),
    *itertools.product(("xla",), FLOATS, (3,), (4,)),
  )
  def test_grouped_heads(self, implementation, dtype, group, tokens):
    args = arguments(t=tokens, g=group, dtype=dtype)
    run(implementation, args, [0, 13, 24 - tokens])

  @parameterized.parameters(*arg_specs.ARG_SPECS)
  def test_shapes_of_real_models(self, spec):
    spec = spec.scaled(batch=1, length=64)
    *args, index = spec.make()
    kwargs = {k: np.asarray(v) for k, v in spec.scales().items()}
    if spec.layers is not None:
      kwargs["layer"] = 1
    run(OURS, args, index, **kwargs)

  @parameterized.parameters((OURS, 24), ("xla", 8))
  def test_every_feature_on_random_shapes(self, implementation, examples):
    @hypothesis.given(problems())
    @hypothesis.settings(
      max_examples=examples, deadline=None, derandomize=True, database=None
    )
    def each(problem):
      args, index, kwargs = problem
      run(implementation, args, index, **kwargs)

    each()

  @parameterized.product(
    level=("baseline", "avx2", "avx512"),
    dtype=FLOATS + QUANTIZED,
    shape=((1, 1, 64), (1, 4, 53), (3, 4, 32)),
  )
  def test_every_instruction_set(self, level, dtype, shape):
    op_contract.only_on("cpu")
    library = ffi.LIBRARY.load()
    try:
      library.set_simd_level(level)
    except ValueError:
      self.skipTest(f"this machine has no {level}")
    try:
      tokens, group, dim = shape
      args = arguments(s=80, t=tokens, g=group, h=dim, dtype=dtype)
      scales = (
        {"k_scale": np.float32(0.02), "v_scale": np.float32([0.03, 0.01])}
        if dtype in QUANTIZED
        else {}
      )
      run("cpu", args, [1, 70, 31], softcap=5.0, **scales)
    finally:
      library.set_simd_level("auto")

  @parameterized.parameters(1, 4, 40)
  def test_long_cache_is_split_and_joined(self, tokens):
    args = arguments(b=1, s=3000, t=tokens, n=2, g=2, h=64)
    args = (args[0], args[1], 4 * args[2], *args[3:])
    got = jitted(OURS)(*args, 2900)
    want = jitted("xla")(*args, 2900)
    for g, w in zip(got[2:], want[2:]):
      tolerances.assert_close(g, w, "float32", reduced=16)

  def test_what_is_not_valid_is_never_read(self):
    k, v, q, new_k, new_v = arguments(t=2)
    k, v = (
      jnp.where(jnp.arange(24)[:, None, None] < 5, x, jnp.nan) for x in (k, v)
    )
    for implementation in IMPLEMENTATIONS:
      got = jitted(implementation)(k, v, q, new_k, new_v, 5)
      assert np.isfinite(got[2]).all()

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_nan_among_the_valid_keys_shows(self, implementation):
    k, v, q, new_k, new_v = arguments(b=1)
    got = jitted(implementation)(
      k.at[0, 2, 1].set(jnp.nan), v, q, new_k, new_v, 5
    )
    assert np.isnan(got[2][0, 0, 2:]).all()
    assert np.isfinite(got[2][0, 0, :2]).all()

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_large_logits_do_not_overflow(self, implementation):
    k, v, q, new_k, new_v = arguments()
    run(implementation, (k, v, 1e4 * q, new_k, new_v), 9)

  @parameterized.product(
    implementation=IMPLEMENTATIONS, layout=("bsnh", "bnsh")
  )
  def test_query_that_sees_nothing_is_zero(self, implementation, layout):
    args = arguments(t=2, layout=layout)
    got = run(
      implementation, args, 3, layout=layout,
      lengths=np.array([0, 1, 2]), mask=np.zeros((1, 1, 1, 1), bool),
    )  # fmt: skip
    assert not np.asarray(got[2]).any()
    assert np.isneginf(got[3]).all()

  def test_package_can_be_called(self):
    args = arguments()
    got = kernels.decode_attention(*args, 4)
    want = da.decode_attention(*args, 4)
    for g, w in zip(got, want, strict=True):
      np.testing.assert_array_equal(g, w)

  def test_output_dtype(self):
    args = arguments(dtype="bfloat16")
    *_, out = da.decode_attention(*args, 4, out_dtype="float32")
    *_, rounded = da.decode_attention(*args, 4)
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out.astype("bfloat16"), rounded)

  def test_auto_runs_the_kernel(self):
    args = arguments()
    [choice] = kernels.explain(da.decode_attention, *args, 0, platform="cpu")
    assert choice.implementation == "cpu"
    op_contract.only_on("cpu", "gpu")
    [choice] = kernels.explain(da.decode_attention, *args, 0)
    assert choice.implementation == OURS
    text = jax.jit(da).lower(*args, 0).as_text()
    assert hlo.custom_calls(text, ffi.APPEND_TARGET) == 1


class AttendTest(op_contract.PlatformTest):
  @parameterized.product(
    implementation=IMPLEMENTATIONS,
    layout=("bsnh", "bnsh"),
    causal=(True, False),
  )
  def test_attends_without_appending(self, implementation, layout, causal):
    k, v, q, _, _ = arguments(t=3, layout=layout)
    index = np.array([3, 10, 24])
    got, lse = jax.jit(
      functools.partial(
        da.attend, layout=layout, causal=causal, return_lse=True,
        implementation=implementation,
      )
    )(k, v, q, index)  # fmt: skip
    out, want, *_ = oracle.attend(
      k, v, q, index - 3, [3, 3, 3], layout=layout, causal=causal
    )
    tolerances.assert_close(got, out, "float32", reduced=4)
    tolerances.assert_close(lse, want, "float32", reduced=4)

  def test_shared_prefix_joins_with_the_rest(self):
    k, v, q, _, _ = arguments()
    whole, want = da.attend(k, v, q, 20, return_lse=True)
    parts = [
      da.attend(k[:, part], v[:, part], q, size, return_lse=True, causal=False)
      for part, size in ((slice(0, 12), 12), (slice(12, 24), 8))
    ]
    lse = [p[1].swapaxes(1, 2) for p in parts]
    out, joined = da.merge(parts[0][0], lse[0], parts[1][0], lse[1])
    tolerances.assert_close(out, whole, "float32")
    tolerances.assert_close(joined.swapaxes(1, 2), want, "float32")

  def test_unknown_option_is_named(self):
    k, v, q, _, _ = arguments()
    with pytest.raises(TypeError, match="no keyword arguments `windows`"):
      da.attend(k, v, q, 3, windows=3)


class DecodeContract(op_contract.OpContract):
  def make_case(self):
    return (*arguments(t=2, s=200, h=64), jnp.array([0, 100, 198]))

  def call(self, *arrays):
    return da.decode_attention(*arrays, implementation=self.implementation)


class XlaContractTest(DecodeContract):
  implementation = "xla"


class CpuContractTest(DecodeContract):
  implementation = "cpu"
  target = ffi.APPEND_TARGET

  def setUp(self):
    op_contract.only_on("cpu")
    super().setUp()


class CudaContractTest(DecodeContract):
  implementation = "cuda"
  target = ffi.APPEND_TARGET

  def setUp(self):
    op_contract.only_on("gpu")
    super().setUp()


class InPlaceTest(op_contract.CpuOnlyTest):
  @parameterized.product(layer=(None, 1), dtype=("float32", "bfloat16", "int8"))
  def test_donated_cache_is_not_copied(self, layer, dtype):
    k, v, *rest = arguments(dtype=dtype)
    kwargs = {"k_scale": 0.1, "v_scale": 0.1} if dtype == "int8" else {}
    if layer is not None:
      k, v = jnp.stack([k] * 3), jnp.stack([v] * 3)
    step = jax.jit(
      functools.partial(da.decode_attention, layer=layer, **kwargs),
      donate_argnums=(0, 1),
    )
    compiled = hlo.compiled(step.lower(k, v, *rest, 0))
    assert not hlo.instructions(compiled.as_text(), "copy", k.shape)
    assert hlo.aliased_bytes(compiled) >= 2 * k.nbytes

  @parameterized.parameters("scan", "while_loop")
  def test_carry_is_not_copied(self, kind):
    k, v, q, new_k, new_v = arguments()

    def step(i, k, v):
      k, v, out = da.decode_attention(k, v, q, new_k + i, new_v, i)
      return k, v, jnp.sum(out)

    def loop(k, v):
      if kind == "scan":

        def body(carry, i):
          *carry, out = step(i, *carry)
          return tuple(carry), out

        return jax.lax.scan(body, (k, v), jnp.arange(5))

      def body(carry):
        i, k, v, total = carry
        k, v, out = step(i, k, v)
        return i + 1, k, v, total + out

      return jax.lax.while_loop(
        lambda c: c[0] < 5, body, (0, k, v, jnp.float32(0))
      )

    lowered = jax.jit(loop, donate_argnums=(0, 1)).lower(k, v)
    compiled = hlo.compiled(lowered)
    assert not hlo.instructions(compiled.as_text(), "copy", k.shape)

  def test_stack_of_layers_in_a_scan_is_not_copied(self):
    k, v, q, new_k, new_v = arguments()
    k, v = (jnp.stack([x + i for i in range(4)]) for x in (k, v))

    def loop(k, v, q):
      def body(carry, layer):
        k, v, x = carry
        k, v, out = da.decode_attention(k, v, x, new_k, new_v, 2, layer=layer)
        return (k, v, x + out), None

      return jax.lax.scan(body, (k, v, q), jnp.arange(4))[0]

    want_q = q
    for i in range(4):
      *_, out = da.decode_attention(k[i], v[i], want_q, new_k, new_v, 2)
      want_q += out
    step = jax.jit(loop, donate_argnums=(0, 1))
    compiled = hlo.compiled(step.lower(k, v, q))
    assert not hlo.instructions(compiled.as_text(), "copy", k.shape)
    tolerances.assert_close(step(k, v, q)[2], want_q, "float32")


class TransformTest(op_contract.PlatformTest):
  @parameterized.product(
    implementation=IMPLEMENTATIONS, layer=(None, 1), layout=("bsnh", "bnsh")
  )
  def test_vmap(self, implementation, layer, layout):
    stacked = [
      jnp.stack([x, x * 2, x + 1]) for x in arguments(t=2, layout=layout)
    ]
    if layer is not None:
      stacked[:2] = (jnp.stack([x] * 2, 1) for x in stacked[:2])
    index = jnp.array([[0, 1, 2], [3, 4, 5], [5, 3, 1]])
    rng = np.random.default_rng(0)
    kwargs = {
      "layout": layout,
      "layer": layer,
      "bias": rng.normal(size=(1, 4, 1, 24)).astype(np.float32),
      "alibi_slopes": np.float32([0.1, 0.2, 0.3, 0.4]),
      "sinks": np.float32([0.1, 0.2, 0.3, 0.4]),
    }
    fn = functools.partial(
      da.decode_attention, implementation=implementation, return_lse=True,
      **kwargs,
    )  # fmt: skip
    mapped = jax.jit(jax.vmap(fn))
    if implementation in ("cpu", "cuda"):
      text = mapped.lower(*stacked, index).as_text()
      assert hlo.custom_calls(text, ffi.APPEND_TARGET) == 1
      assert "while" not in text
    got = mapped(*stacked, index)
    for i in range(3):
      check([g[i] for g in got], *(x[i] for x in stacked), index[i], **kwargs)

  def test_vmap_over_what_a_batch_shares(self):
    args = arguments()
    sinks = jnp.array([[0.0, 1.0, 2.0, 3.0], [1.0, 0.0, 0.0, 9.0]])

    def fn(sinks):
      return da.decode_attention(*args, 4, sinks=sinks)[2]

    got = jax.jit(jax.vmap(fn))(sinks)
    for i in range(2):
      tolerances.assert_close(got[i], fn(sinks[i]), "float32")

  @parameterized.product(implementation=IMPLEMENTATIONS, rope=(False, True))
  def test_gradients_match_finite_differences(self, implementation, rope):
    args = arguments(b=2, s=6, t=2, h=4)
    rng = np.random.default_rng(3)
    kwargs = {"window": 4, "softcap": 3.0}
    if rope:
      cos, sin = da.rope_tables(8, 4)
      kwargs |= {"rope_cos": cos, "rope_sin": sin}
    bias = jnp.asarray(rng.normal(size=(2, 4, 2, 6)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=args[2].shape), jnp.float32)

    def loss(bias, *args):
      k, v, out = da.decode_attention(
        *args, jnp.array([1, 3]), bias=bias, implementation=implementation,
        **kwargs,
      )  # fmt: skip
      return jnp.vdot(out, weight) + jnp.sum(k**2) + jnp.sum(v**2)

    test_util.check_grads(
      jax.jit(loss), (bias, *args), order=1, modes=("fwd", "rev"),
      atol=2e-2, rtol=2e-2, eps=1e-2,
    )  # fmt: skip

  def test_gradient_of_a_query_over_a_quantised_cache(self):
    k, v, q, new_k, new_v = arguments(dtype="int8")

    def fn(q, new):
      return da.decode_attention(
        k, v, q, new, new_v, 3, k_scale=0.02, v_scale=0.02
      )[2].sum()

    assert np.isfinite(jax.grad(fn)(q, new_k)).all()
    with pytest.raises(TypeError, match="cannot be differentiated"):
      jax.grad(fn, argnums=1)(q, new_k)

  def test_export_with_symbolic_batch_and_length(self):
    b, s = export.symbolic_shape("b, s")
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    exported = export.export(
      jax.jit(da.decode_attention),
      platforms=("cpu", "cuda", "tpu"),
    )(
      f32((b, s, 2, 20)), f32((b, s, 2, 20)), f32((b, 1, 4, 20)),
      f32((b, 1, 2, 20)), f32((b, 1, 2, 20)),
      jax.ShapeDtypeStruct((b,), jnp.int32),
    )  # fmt: skip
    loaded = export.deserialize(exported.serialize())
    for b in (1, 3):
      args = arguments(b=b)
      index = np.arange(b, dtype=np.int32)
      check(loaded.call(*args, index), *args, index)

  def test_eval_shape(self):
    for spec in arg_specs.ARG_SPECS:
      k, v, out = jax.eval_shape(
        functools.partial(
          da.decode_attention, layer=None if spec.layers is None else 0,
          **spec.scales(),
        ),
        *spec.shapes(),
      )  # fmt: skip
      assert k.shape == v.shape == spec.cache_shape
      assert out.shape == spec.query_shape and out.dtype == spec.query_dtype


class WrongInputTest(op_contract.PlatformTest):
  def assert_raises(self, error, match, *args, **kwargs):
    with pytest.raises(error, match=match):
      da.decode_attention(*args, **kwargs)
    with pytest.raises(error, match=match):
      jax.eval_shape(functools.partial(da.decode_attention, **kwargs), *args)

  def test_arrays(self):
    k, v, q, new_k, new_v = arguments()
    self.assert_raises(
      ValueError, "`q` must have 4 axes", k, v, q[0], new_k, new_v, 0
    )
    for heads in (0, 3):
      self.assert_raises(
        ValueError,
        "heads a multiple of the cache's 2, and not 0",
        k,
        v,
        q[:, :, :heads],
        new_k,
        new_v,
        0,
      )
    self.assert_raises(
      TypeError,
      "`q` must have the dtype of the cache, float32",
      k,
      v,
      q.astype("bfloat16"),
      new_k,
      new_v,
      0,
    )
    self.assert_raises(
      ValueError,
      "`new_k` and `new_v` must have 4 axes",
      k,
      v,
      q,
      new_k[0],
      new_v,
      0,
    )
    self.assert_raises(
      ValueError,
      "`q` must have as many tokens as `new_k`",
      k,
      v,
      q,
      jnp.concatenate([new_k] * 2, 1),
      jnp.concatenate([new_v] * 2, 1),
      0,
    )
    self.assert_raises(
      TypeError,
      "`new_k` must have the dtype of `q`",
      k.astype("int8"),
      v.astype("int8"),
      q,
      new_k.astype("bfloat16"),
      new_v.astype("bfloat16"),
      0,
      k_scale=1.0,
      v_scale=1.0,
    )
    self.assert_raises(
      TypeError,
      "`q` must be one of float32",
      k.astype("int8"),
      v.astype("int8"),
      q.astype("int32"),
      new_k,
      new_v,
      0,
      k_scale=1.0,
      v_scale=1.0,
    )

  @parameterized.parameters(
    ({"window": 0}, ValueError, "`window` must be at least 1"),
    ({"window": (-2, 0)}, ValueError, "`window` must be a pair"),
    ({"chunk": 0}, ValueError, "`chunk` must be at least 1"),
    ({"softcap": 0.0}, ValueError, "`softcap` must be positive"),
    ({"out_dtype": "int8"}, TypeError, "`out_dtype` must be one of"),
    ({"out_dtype": "half?"}, TypeError, "`out_dtype` must be one of"),
    ({"bias": "x"}, TypeError, "`bias` must be an array, but got `str`"),
    ({"mask": "x"}, TypeError, "`mask` must be an array, but got `str`"),
    ({"bias": np.zeros((3, 4, 1, 5), np.float32)}, ValueError,
     r"`bias` must have the shape \[3, 4, 1, 24\]"),
    ({"bias": np.zeros((3, 4, 1, 24), bool)}, TypeError, "array as `mask`"),
    ({"mask": np.zeros((3, 4, 1, 24), np.float32)}, TypeError,
     "`mask` must be bool"),
    ({"alibi_slopes": np.zeros(3, np.float32)}, ValueError,
     r"`alibi_slopes` must be floating of shape \[4\] or \[3, 4\]"),
    ({"sinks": np.zeros((3, 4), np.float32)}, ValueError,
     r"`sinks` must be floating of shape \[4\]"),
    ({"rope_cos": np.zeros((30, 10), np.float32)}, ValueError,
     "must be given together"),
    ({"rope_cos": np.zeros((30, 11), np.float32),
      "rope_sin": np.zeros((30, 11), np.float32)}, ValueError,
     "with at most 10 pairs"),
    ({"rope_positions": 3}, ValueError, "must not be given without"),
    ({"rope_cached_keys": True}, ValueError, "must not be given without"),
    ({"qv": np.zeros((3, 1, 2, 20), np.float32)}, ValueError,
     "`qv` must have as many heads as `q`, 4"),
    ({"implementation": "gpu"}, ValueError, "must be one of auto, xla, cpu"),
  )  # fmt: skip
  def test_options(self, kwargs, error, match):
    self.assert_raises(error, match, *arguments(), 0, **kwargs)

  def test_ring_with_too_large_a_window(self):
    args = arguments(t=3)
    match = "`window` must be at most 22"
    self.assert_raises(ValueError, match, *args, 0, ring=True)
    self.assert_raises(ValueError, match, *args, 0, ring=True, window=23)
    da.decode_attention(*args, 0, ring=True, window=22)

  @parameterized.parameters(
    ({"layer": 3}, r"`layer` must lie in \[0, 3\), but got \[3\]"),
    ({"layer": -1}, r"`layer` must lie in \[0, 3\), but got \[-1\]"),
    ({"layer": 0, "lengths": 2}, r"`lengths` must lie in \[0, 1\]"),
    ({"layer": 0, "lengths": -1}, r"`lengths` must lie in \[0, 1\]"),
  )
  def test_attend_to_what_is_not_there_raises_where_known(self, kwargs, match):
    cache_k, cache_v, q, *_ = arguments()
    stacks = [jnp.stack([cache] * 3) for cache in (cache_k, cache_v)]
    with pytest.raises(ValueError, match=match):
      da.attend(*stacks, q, 5, **kwargs)
    static = {k: v for k, v in kwargs.items() if k != "layer"}
    error, _ = jax.jit(
      checkify.checkify(functools.partial(da.attend, **static))
    )(*stacks, q, 5, layer=jnp.int32(kwargs["layer"]))
    with pytest.raises(checkify.JaxRuntimeError, match=match):
      error.throw()

  @parameterized.parameters(
    (24, {}, r"`index` must lie in \[0, 24\)"),
    (-1, {}, r"`index` must lie in \[0, 24\)"),
    (0, {"lengths": 2}, r"`lengths` must lie in \[0, 1\]"),
    (9, {"rope_cos": np.zeros((9, 10), np.float32),
         "rope_sin": np.zeros((9, 10), np.float32)},
     "`rope_cos` must have a row for every token's position"),
    (23, {"block_table": np.int32([[-1], [1], [2]])}, "must name blocks"),
  )  # fmt: skip
  def test_values_outside_raise_where_known(self, index, kwargs, match):
    args = arguments()
    with pytest.raises(ValueError, match=match):
      da.decode_attention(*args, index, **kwargs)
    error, _ = jax.jit(
      checkify.checkify(functools.partial(da.decode_attention, **kwargs))
    )(*args, jnp.int32(index))
    with pytest.raises(ValueError, match=match):
      error.throw()

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_position_outside_writes_nothing_under_jit(self, implementation):
    args = arguments(t=2)
    index = np.array([23, -1, 1000], np.int32)
    got = jitted(implementation)(*args, index)
    want = cache_oracle.update(*args[:2], *args[3:], index)
    for g, w in zip(got[:2], want):
      np.testing.assert_array_equal(g, w)

  @parameterized.parameters(*IMPLEMENTATIONS)
  def test_empty_batch_and_no_tokens(self, implementation):
    for args in (arguments(b=0), arguments(t=0)):
      k, v, out, lse = jitted(implementation)(*args, 0)
      np.testing.assert_array_equal(k, args[0])
      assert out.size == 0 and lse.size == 0

  def test_rope_tables(self):
    with pytest.raises(ValueError, match="`dim` must be even"):
      da.rope_tables(4, 3)
