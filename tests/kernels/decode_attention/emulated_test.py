"""The CUDA kernels of decode attention and their binding, run on the CPU.

The kernels' sources under tests/testing/cuda_emulation.h: their logic, not a
run on a GPU.
"""

import functools

from absl.testing import parameterized
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import decode_attention as da
from kernels.cache import layouts
from kernels.common import dispatch, libraries
from kernels.decode_attention import arg_specs, ffi, primitive, reference
from tests.kernels.decode_attention import cases, lies, oracle
from tests.testing import tolerances

TARGETS = ("emulated_decode_append_1", "emulated_decode_attend_1")
LIBRARY = libraries.Library(
  "tests.kernels.decode_attention._decode_attention_cuda",
  dict(zip(TARGETS, ("append_and_attend", "attend"))),
)

# A few: each costs a second, and what they share is tested above.
MODELS = ("gemma_2_2b", "falcon_7b", "llama_3_1_8b_fp8", "llama_3_1_8b_prefill")


@pytest.fixture(autouse=True, scope="module")
def emulated():
  """Adds the emulated handlers to the ops' implementations."""
  impl = dispatch.Implementation(
    name="emulated",
    platforms=("cpu",),
    fn=functools.partial(ffi.cuda, targets=TARGETS),
    library=LIBRARY,
  )
  for op in (primitive.APPEND, primitive.ATTEND):
    op.implementations["emulated"] = impl
  yield
  for op in (primitive.APPEND, primitive.ATTEND):
    del op.implementations["emulated"]


def run(args, index, **kwargs):
  call = functools.partial(
    da.decode_attention, implementation="emulated", return_lse=True, **kwargs
  )
  got = jax.jit(call)(*args, jnp.asarray(index))
  cases.check(got, *args, np.asarray(index), **kwargs)
  return got


def scales(dtype):
  if dtype in cases.FLOATS:
    return {}
  return {"k_scale": np.float32([0.02, 0.05]), "v_scale": np.float32(0.03)}


class EmulatedTest(parameterized.TestCase):
  def test_every_feature_on_random_shapes(self):
    @hypothesis.given(cases.problems())
    @hypothesis.settings(
      max_examples=24, deadline=None, derandomize=True, database=None
    )
    def each(problem):
      args, index, kwargs = problem
      run(args, index, **kwargs)

    each()

  @parameterized.product(dtype=cases.FLOATS + cases.QUANTIZED, h=(64, 80, 256))
  def test_widths_of_heads(self, dtype, h):
    layout = "bnsh" if h == 80 else "bsnh"
    args = cases.arguments(b=2, s=70, g=3, h=h, dtype=dtype, layout=layout)
    run(args, [69, 20], layout=layout, **scales(dtype))

  @parameterized.parameters(
    ("float32", 512), ("bfloat16", 320), ("float16", 576), ("int8", 272),
    ("float8_e5m2", 640), ("int8", 1040), ("bfloat16", 300),
  )  # fmt: skip
  def test_heads_too_wide_for_tensor_cores(self, dtype, h):
    args = cases.arguments(b=1, s=40, g=2, h=h, dtype=dtype)
    run(args, [33], **scales(dtype))

  def test_sequences_may_share_a_row(self):
    args = cases.arguments(b=2, s=90, n=2, g=2, h=64, dtype="bfloat16")
    caches = [cache[:1] for cache in args[:2]]
    run([*caches, *args[2:]], [80, 33], cache_batch_index=np.int32([0, 0]))

  @parameterized.parameters(
    ("bfloat16", 1, 17), ("bfloat16", 5, 4), ("bfloat16", 9, 8),
    ("int8", 6, 5), ("float32", 3, 5), ("float16", 40, 2),
  )  # fmt: skip
  def test_many_rows_for_each_key(self, dtype, tokens, group):
    args = cases.arguments(b=2, s=90, t=tokens, g=group, h=32, dtype=dtype)
    run(args, [90 - tokens, 3], **scales(dtype))

  @parameterized.parameters("float32", "bfloat16", "float8_e4m3fn")
  def test_long_sequences_are_split_and_short_ones_are_not(self, dtype):
    # Those of up to 256 keys are not.
    args = cases.arguments(b=4, s=700, n=2, g=2, h=32, dtype=dtype)
    run(args, [699, 3, 300, 0], sinks=np.float32([0.5, 1, -3, 2]),
        **scales(dtype))  # fmt: skip

  @parameterized.parameters("float32", "bfloat16")
  def test_more_sequences_than_a_block_has_threads(self, dtype):
    # Six blocks for two heads: each has some 150 sequences, and 128 threads.
    args = cases.arguments(b=450, s=300, n=2, g=1, h=16, dtype=dtype)
    index = np.zeros(450, np.int32)
    index[[0, 7, 150, 300, 449]] = [5, 299, 64, 280, 290]
    run(args, index)

  def test_parts_of_a_sharded_cache(self):
    """A shard sees slots from `first_slot` on, and leaves the others out."""
    args = cases.arguments(b=2, s=200, h=16, dtype="bfloat16")
    cache_k, cache_v, q, *_ = args
    want, *_ = oracle.attend(cache_k, cache_v, q, [199, 120], [1, 1])
    parts = []
    for first in (0, 100):
      fields = ("cache_k", "cache_v", "q", "index", "count", "layer", "table",
                "first_slot")  # fmt: skip
      options = reference.Options(
        fields=fields, layout=layouts.Layout.BSNH, ring=0, aligned=True,
        uniform=(),
        scale=1 / np.sqrt(16), causal=True, window_left=-1, window_right=-1,
        chunk=0, softcap=0.0, interleaved=False, rotate_keys=False,
        out_dtype="float32",
      )  # fmt: skip
      ones = jnp.ones((2,), jnp.int32)
      part = slice(first, first + 100)
      parts += primitive.ATTEND(
        cache_k[:, part], cache_v[:, part], q.reshape(2, 1, 2, 2, 16),
        jnp.array([200, 121], jnp.int32), ones, 0 * ones,
        jnp.arange(2, dtype=jnp.int32)[:, None], jnp.int32(first),
        options=options, implementation="emulated",
      )  # fmt: skip
    out_a, lse_a, out_b, lse_b = parts
    lse_a, lse_b = (a.transpose(0, 3, 1, 2) for a in (lse_a, lse_b))
    got, _ = da.merge(out_a, lse_a, out_b, lse_b)
    tolerances.assert_close(
      got.reshape(2, 1, 4, 16), want, "bfloat16", reduced=4
    )

  @parameterized.parameters(
    *(spec for spec in arg_specs.ARG_SPECS if spec.name in MODELS)
  )
  def test_shapes_of_real_models(self, spec):
    spec = spec.scaled(batch=1, length=48)
    *args, index = spec.make()
    kwargs = {k: np.asarray(v) for k, v in spec.scales().items()}
    if spec.layers is not None:
      kwargs["layer"] = 1
    run(args, index, **kwargs)

  def test_large_values_neither_overflow_nor_vanish(self):
    # As float16, q and the weights would leave the range.
    args = cases.arguments(b=1, s=40, h=32, dtype="int8")
    cache_k, cache_v, q, new_k, new_v = args
    run(
      (cache_k, cache_v, q * 1e6, new_k, new_v), [30], k_scale=np.float32(1e-7),
      v_scale=np.float32(0.1),
    )  # fmt: skip

  def test_what_is_not_valid_is_never_read(self):
    args = cases.arguments(b=2, s=70, h=32, dtype="bfloat16")
    dirty = [
      jnp.where(jnp.arange(70)[None, :, None, None] > 20, jnp.nan, cache)
      for cache in args[:2]
    ]
    call = functools.partial(da.decode_attention, implementation="emulated")
    *_, out = jax.jit(call)(*dirty, *args[2:], jnp.array([20, 3]))
    assert np.isfinite(np.asarray(out, np.float32)).all()

  def test_results_repeat_to_the_bit(self):
    args = cases.arguments(b=3, s=300, h=32, dtype="float16")
    call = jax.jit(
      functools.partial(da.decode_attention, implementation="emulated")
    )
    want = call(*args, jnp.array([299, 5, 140]))
    for _ in range(2):
      got = call(*args, jnp.array([299, 5, 140]))
      for a, b in zip(got, want):
        np.testing.assert_array_equal(
          np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)
        )

  def test_workspace_that_is_too_small_is_refused(self):
    args = cases.arguments(b=1, s=300, h=32)
    original = ffi._cuda_workspace
    ffi._cuda_workspace = lambda *_: jax.ShapeDtypeStruct((9, 16), jnp.float32)
    try:
      with pytest.raises(Exception, match="The workspace must have shape"):
        jax.block_until_ready(
          da.decode_attention(*args, 0, implementation="emulated")
        )
    finally:
      ffi._cuda_workspace = original


class HandlersTest(parameterized.TestCase):
  @parameterized.parameters(
    ("float32", "bsnh", True, True), ("int8", "bnsh", False, True),
    ("bfloat16", "bnsh", True, False),
  )  # fmt: skip
  def test_every_lie_is_refused_by_name(self, dtype, layout, many, appends):
    told = lies.check("emulated", dtype, layout, many, appends)
    self.assertGreater(told, 250)


class WorkersTest(parameterized.TestCase):
  @parameterized.parameters(
    # Few long sequences: as many blocks as a large GPU runs, or more than it
    # has multiprocessors.
    (1, 8, 4, 32768, "bfloat16", 37),
    (4, 8, 4, 32768, "float32", 74),
    (64, 8, 4, 2048, "bfloat16", 37),
    (2, 1, 8, 4096, "float32", 64),
    (1, 8, 512, 4096, "bfloat16", 2),
    # Short ones, and enough query rows.
    (128, 8, 8, 256, "bfloat16", 0),
    (8, 8, 512, 4096, "bfloat16", 0),
  )
  def test_long_caches_are_divided(self, b, n, rows, capacity, dtype, want):
    got = ffi._most_workers(b, n, rows, capacity, jnp.dtype(dtype))
    self.assertEqual(got, want)


class UnsupportedTest(parameterized.TestCase):
  @parameterized.parameters(
    ("float32", 640, False, "multiple of 16 bytes"),
    ("bfloat16", 514, False, "multiple of 16 bytes"),
    ("bfloat16", 576, True, "`rope_cached_keys` is written for"),
  )
  def test_what_has_no_kernel_is_said(self, dtype, h, rotate_keys, message):
    *args, new_k, new_v = cases.arguments(b=1, s=8, g=1, h=h, dtype=dtype)
    options = {}
    if rotate_keys:
      cos, sin = da.rope_tables(8, 64)
      options = {"rope_cos": cos, "rope_sin": sin, "rope_cached_keys": True}
    call = functools.partial(da.decode_attention, **options)
    jaxpr = jax.make_jaxpr(call)(*args, new_k, new_v, 0)
    [eqn] = [
      e for e in jaxpr.jaxpr.eqns if e.primitive is primitive.APPEND.primitive
    ]
    params = {k: v for k, v in eqn.params.items() if k != "implementation"}
    why = primitive.APPEND.implementations["cuda"].unsupported(
      [v.aval for v in eqn.invars], **params
    )
    assert message in why, why
