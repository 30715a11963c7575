"""The TPU's `decode_attention`: its numbers, and its compiled programs.

Numbers come from the interpreter on the CPU, and from the device where there is
one; programs from libtpu, which wants no device.
"""

import contextlib
import functools
from unittest import mock

from absl.testing import parameterized
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import kernels
from kernels import decode_attention as da
from kernels.cache import layouts
from kernels.decode_attention import (
  arg_specs,
  ffi,
  flash_tpu,
  pallas_tpu,
  primitive,
  reference,
)
from tests.kernels.decode_attention import oracle
from tests.kernels.kv_cache import oracle as cache_oracle
from tests.testing import (
  deviceless,
  hlo,
  interpreted,
  op_contract,
  tolerances,
)

PLATFORM = op_contract.PLATFORM
interpreted.allow(primitive, "APPEND", "ATTEND")
IMPLEMENTATION = interpreted.NAME if PLATFORM == "cpu" else "pallas"
DTYPES = ("float32", "bfloat16", *cache_oracle.QUANTIZED)
KERNEL = deviceless.TPU_KERNEL

SIZES, LAYOUTS = interpreted.CACHES, interpreted.LAYOUTS
CASES = tuple(SIZES)


def arguments(
  seed=0, b=3, s=64, t=1, n=4, g=2, h=128, h_v=None, dtype="float32",
  layout="bsnh", rows=None, lead=(), kind=None,
):  # fmt: skip
  rng = np.random.default_rng(seed)
  order = (lambda x, y: (x, y)) if layout == "bsnh" else (lambda x, y: (y, x))
  kind = kind or ("float32" if dtype in cache_oracle.QUANTIZED else dtype)
  h_v = h_v or h
  return [
    cache_oracle.random(rng, (*front, count, *order(length, heads), dim), of)
    for front, count, length, heads, dim, of in (
      (lead, rows or b, s, n, h, dtype), (lead, rows or b, s, n, h_v, dtype),
      ((), b, t, n * g, h, kind), ((), b, t, n, h, kind),
      ((), b, t, n, h_v, kind),
    )
  ]  # fmt: skip


def spoil(args, used, layout="bsnh"):
  """Fills what lies after `used[i]` slots of row i with NaN."""
  out = []
  for cache in args[:2]:
    cache = np.array(cache)
    for row, first in enumerate(used):
      if layout == "bsnh":
        cache[row, first:] = np.nan
      else:
        cache[row, :, first:] = np.nan
    out.append(jnp.asarray(cache))
  return out + list(args[2:])


def run(args, index, **kwargs):
  index = np.asarray(index, np.int32)
  decode = functools.partial(
    da.decode_attention, implementation=IMPLEMENTATION, return_lse=True,
    **kwargs,
  )  # fmt: skip
  got = jax.jit(decode)(*args, index)
  assert not interpreted.races_found()
  cache_k, cache_v, q, new_k, new_v = args
  layout = kwargs.get("layout", "bsnh")
  tokens = q.shape[1 if layout == "bsnh" else 2]
  counts = np.broadcast_to(kwargs.pop("lengths", tokens), q.shape[:1])
  update_options = {
    name: kwargs[name]
    for name in (
      "layer", "layout", "ring", "k_scale", "v_scale", "block_table",
      "cache_batch_index",
    )
    if name in kwargs
  }  # fmt: skip
  tolerance = 0.0
  if "rope_cos" in kwargs:
    tolerance = tolerances.eps(cache_k.dtype)
    where = index[:, None] + np.arange(tokens)
    new_k = oracle.rotate_tokens(
      new_k, where, layout=layout,
      **{name: kwargs[name] for name in kwargs if name.startswith("rope_")},
    ).astype(cache_k.dtype)  # fmt: skip
  elif "k_scale" in kwargs:
    tolerance = 1.0  # XLA divides by multiplying: the last bit may differ
  want = cache_oracle.update(
    cache_k, cache_v, new_k, new_v, index, lengths=counts, **update_options
  )
  for cache, expected in zip(got[:2], want):
    assert cache.dtype == expected.dtype
    np.testing.assert_allclose(
      np.asarray(cache, np.float32), expected.astype(np.float32),
      rtol=tolerance, atol=tolerance,
    )  # fmt: skip
  out, lse, *_ = oracle.attend(
    *(np.asarray(c).astype(np.float32) for c in got[:2]), q, index, counts,
    **kwargs,
  )  # fmt: skip
  assert got[2].dtype == q.dtype
  # A logit is a sum over head_dim.
  reduced = max(4, q.shape[-1] // 64)
  tolerances.assert_close(got[2], out, q.dtype, reduced=reduced, what="out")
  finite = np.isfinite(lse)
  np.testing.assert_array_equal(np.isfinite(got[3]), finite)
  tolerances.assert_close(
    np.asarray(got[3])[finite], lse[finite], "float32", reduced=64,
    scale=10.0, what="lse",
  )  # fmt: skip
  return got


@contextlib.contextmanager
def few_rows_at_a_time():
  """Makes steps short; yields a list of how the work is cut."""
  cut, made = pallas_tpu._tiling, []

  def spy(*args):
    made.append(cut(*args))
    return made[-1]

  with (
    mock.patch.object(pallas_tpu, "_ROW_BYTES", 310_000),
    mock.patch.object(pallas_tpu, "_tiling", spy),
  ):
    yield made


class NumbersTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if PLATFORM != "cpu":
      op_contract.need_device(PLATFORM)
    interpreted.reset()

  @parameterized.parameters(
    ("rows", "bfloat16"),
    ("rows", "int8"),
    ("tiles", "float8_e4m3fn"),
    ("columns", "bfloat16"),
    ("columns", "float8_e5m2"),
  )
  def test_each_sequence_at_its_index(self, case, dtype):
    layout = LAYOUTS[case]
    scales = {}
    if dtype in cache_oracle.QUANTIZED:
      scales = {
        "k_scale": np.float32(0.02),
        "v_scale": np.float32([[0.1, 0.2, 0.3, 0.4]] * 3),
      }
    args = arguments(dtype=dtype, **SIZES[case])
    if not scales:
      args = spoil(args, [0, 13, 63], layout)
    run(args, [0, 13, 63], layout=layout, **scales)

  @parameterized.parameters(*CASES)
  def test_several_tiles_and_tokens(self, case):
    # More slots than one tile has, and not a whole number of tiles.
    sizes = SIZES[case] | {"s": 600, "h": 1024, "n": 1}
    if case == "columns":
      sizes |= {"s": 640, "n": 4, "h": 192}
    args = arguments(t=3, g=3, b=2, **sizes)
    run(args, [sizes["s"] - 3, 300], layout=LAYOUTS[case])

  @parameterized.product(case=CASES, dtype=("float32", "bfloat16", "int8"))
  def test_prompts_in_several_steps(self, case, dtype):
    scales = {}
    if dtype == "int8":
      scales = {"k_scale": np.float32(0.02), "v_scale": np.float32(0.03)}
    layout = LAYOUTS[case]
    args = arguments(t=21, dtype=dtype, **SIZES[case])
    if not scales:
      args = spoil(args, [0, 13, 40], layout)
    with few_rows_at_a_time() as cut:
      run(
        args, [0, 13, 40], layout=layout, lengths=np.int32([21, 0, 15]),
        window=11, **scales,
      )  # fmt: skip
    self.assertGreater(cut[-1].steps, 2)

  @parameterized.parameters(*CASES)
  def test_prompts_in_pages_and_in_a_ring(self, case):
    sizes = {"s": 32} | SIZES[case] | {"t": 21, "rows": 7, "lead": (2,)}
    layout = LAYOUTS[case]
    table = np.int32([[5, 0, 2], [3, -1, -1], [1, 6, 4]])
    size = 128 if case == "columns" else sizes["s"]
    args = arguments(**sizes | {"s": size})
    with few_rows_at_a_time() as cut:
      for ring in ({}, {"ring": True, "window": 9}):
        run(
          args, [size - 8, 2, 3 * size - 21], layout=layout, layer=1,
          block_table=table, **ring,
        )  # fmt: skip
    self.assertGreater(cut[-1].steps, 2)

  def test_slots_that_two_tiles_have(self):
    # The last tile of a block begins before the one before it ends, here in
    # what left padding hides.
    args = arguments(b=1, s=600, rows=2)
    for cache in (0, 1):
      args[cache] = np.array(args[cache])
      args[cache][0, :100] = np.nan
    with mock.patch.object(pallas_tpu, "_SLOTS", 512):
      run(
        args, [900], block_table=np.int32([[0, 1]]),
        left_padding=np.int32([100]),
      )  # fmt: skip

  @parameterized.parameters(1, 4)
  def test_prompts_whose_heads_are_taken_apart(self, heads):
    # In one step: as many rows as no kernel of a decode step has.
    run(arguments(t=35, b=2, n=heads, g=4), [3, 20], softcap=5.0)

  @parameterized.parameters(*CASES)
  def test_what_a_query_sees(self, case):
    args = arguments(t=4, **SIZES[case])
    slopes = np.linspace(0.1, 0.5, 8, dtype=np.float32)
    run(
      args, [0, 20, 60], layout=LAYOUTS[case], window=7, softcap=3.0,
      lengths=np.int32([4, 2, 3]), left_padding=np.int32([0, 18, 2]),
      alibi_slopes=slopes, sinks=1 - 5 * slopes,
    )  # fmt: skip

  def test_chunks_that_are_not_causal(self):
    run(arguments(t=4), [0, 20, 60], causal=False, chunk=9)

  def test_window_on_both_sides(self):
    run(arguments(t=6), [0, 20, 58], causal=False, window=(5, 2))

  @parameterized.parameters(*CASES)
  def test_ring(self, case):
    sizes = SIZES[case]
    args = arguments(t=2, **sizes)
    last = sizes.get("s", 64)
    run(
      args, [0, last - 1, 3 * last + 5], layout=LAYOUTS[case], ring=True,
      window=20,
    )  # fmt: skip

  @parameterized.parameters(*CASES)
  def test_pages_of_a_stack(self, case):
    sizes = {"s": 16} | SIZES[case] | {"t": 3, "rows": 7, "lead": (2,)}
    if case == "columns":
      sizes["s"] = 128
    args = arguments(**sizes)
    table = np.int32([[5, 0, 2], [3, -1, -1], [1, 6, 4]])
    size = sizes["s"]
    run(
      args, [2 * size - 2, 2, 3 * size - 5], layout=LAYOUTS[case], layer=1,
      block_table=table,
    )  # fmt: skip

  @parameterized.product(case=CASES, paged=(False, True))
  def test_parts_of_a_sharded_cache(self, case, paged):
    """A part has some of the slots, or of the blocks, and leaves others out."""
    layout, h = LAYOUTS[case], SIZES[case].get("h", 128)
    half = 128 if case == "columns" else 32
    slots_axis = layout.index("s")
    axis = 0 if paged else slots_axis
    index = np.int32([half + 9, half - 5])  # with the query's own key
    table = np.int32([[3, 1], [2, 0]]) if paged else np.int32([[0], [1]])
    sizes = SIZES[case] | {"b": 2, "s": half if paged else 2 * half}
    k, v, q, *_ = arguments(rows=4 if paged else 2, **sizes)
    want = oracle.attend(
      k, v, q, index - 1, [1, 1], layout=layout,
      block_table=table if paged else None,
    )  # fmt: skip
    # A sequence of `half` keys and more fills its first half.
    used = [0, 9, half - 5, half] if paged else index
    k, v, q = spoil((k, v, q), used, layout)
    q = q.reshape((2, 4, 2, 1, h) if layout == "bnsh" else (2, 1, 4, 2, h))
    options = reference.Options(
      fields=("cache_k", "cache_v", "q", "index", "count", "layer", "table",
              "first_slot"),
      layout=layouts.Layout(layout), ring=0, aligned=not paged, uniform=(),
      scale=1 / np.sqrt(h), causal=True, window_left=-1, window_right=-1,
      chunk=0, softcap=0.0, interleaved=False, rotate_keys=False,
      out_dtype="float32",
    )  # fmt: skip
    ones = np.ones(2, np.int32)
    outs, lses = [], []
    for first in (0, k.shape[axis] // 2):
      part = np.arange(first, first + k.shape[axis] // 2)
      out, lse = primitive.ATTEND(
        jnp.take(k, part, axis), jnp.take(v, part, axis), q, index, ones,
        0 * ones, table - first if paged else table,
        np.int32(0 if paged else first),
        options=options, implementation=IMPLEMENTATION,
      )  # fmt: skip
      assert np.isfinite(np.asarray(out)).all()
      outs.append(out)
      lses.append(lse)
    assert not interpreted.races_found()
    lse = np.logaddexp(*lses)
    weights = [np.exp(each - lse)[..., None] for each in lses]
    if layout == "bsnh":
      weights = [w.transpose(0, 3, 1, 2, 4) for w in weights]
    out = sum(w * each for w, each in zip(weights, outs))
    for got, expected, reduced in zip((out, lse), want, (4, 64)):
      tolerances.assert_close(
        got.reshape(expected.shape), expected, "float32", reduced=reduced
      )

  @parameterized.parameters(False, True)
  def test_rotation(self, interleaved):
    cos, sin = (np.asarray(a) for a in da.rope_tables(64, 128))
    args = arguments(t=2, dtype="bfloat16")
    run(
      args, [3, 0, 50], rope_cos=cos, rope_sin=sin,
      rope_interleaved=interleaved,
    )  # fmt: skip

  def test_attend_alone(self):
    k, v, q, *_ = arguments(t=2)
    index = np.int32([2, 40, 64])
    attend = functools.partial(
      da.attend, implementation=IMPLEMENTATION, return_lse=True
    )
    out, lse = jax.jit(attend)(k, v, q, index)
    want, want_lse, *_ = oracle.attend(k, v, q, index - 2, [2] * 3)
    tolerances.assert_close(out, want, "float32", reduced=4)
    tolerances.assert_close(lse, want_lse, "float32", reduced=64)


class PlacesTest(parameterized.TestCase):
  """Which tiles of a cache are read; nothing is compiled."""

  def setUp(self):
    super().setUp()
    if PLATFORM != "cpu":
      self.skipTest("the same on every platform")

  @parameterized.parameters(
    ({}, [(0, 0), (0, 3), (0, 7)]),
    ({"window": 100}, [(0, 0), (3, 3), (7, 7)]),
    ({"window": 600}, [(0, 0), (2, 3), (6, 7)]),
    ({"left_padding": np.int32([0, 700, 4000])}, [(0, 0), (1, 3), (7, 7)]),
    ({"ring": True}, [(0, 0), (0, 3), (0, 7)]),
  )
  def test_tiles_without_a_visible_key_are_not(self, kwargs, want):
    args = structs(slots=4096)
    index = np.int32([0, 1900, 4095])
    tiles = []

    def keep(places, table, numbers, q, caches, options, tiling, interpret):
      del table, numbers, q, caches, options, interpret
      self.assertEqual(tiling.slots, 512)
      tiles.extend(zip(places.first.tolist(), places.last.tolist()))
      raise InterruptedError

    arrays = [jnp.zeros((3, *a.shape[1:]), a.dtype) for a in args[:5]]
    with (
      mock.patch.object(flash_tpu, "flash", keep),
      self.assertRaises(InterruptedError),
    ):
      da.attend(
        *arrays[:3], index + 1, implementation=interpreted.NAME, **kwargs
      )
    self.assertEqual(tiles, want)


class ChoiceTest(parameterized.TestCase):
  """What the rule says; nothing is compiled."""

  def setUp(self):
    super().setUp()
    if PLATFORM != "cpu":
      self.skipTest("the same on every platform")

  @parameterized.parameters(
    ({"h": 64}, {}, "does not fill tiles"),
    ({"dtype": "float16"}, {}, "float16, which Mosaic does not take"),
    ({"t": 0}, {}, "there are no queries"),
    ({"g": 600}, {}, "600 query rows for each key, more than the 496"),
    ({}, {"bias": np.zeros((1, 1, 1, 64), np.float32)}, "`bias` is given"),
    ({}, {"mask": np.ones((1, 1, 1, 64), bool)}, "`mask` is given"),
    ({}, {"qv": np.zeros((3, 1, 8, 128), np.float32)}, "`qv` is given"),
    (
      {},
      {
        "rope_cos": np.zeros((99, 8), np.float32),
        "rope_sin": np.zeros((99, 8), np.float32),
        "rope_cached_keys": True,
      },
      "`rope_cached_keys` is set",
    ),
  )
  def test_what_mosaic_cannot_serve_goes_to_xla(self, sizes, kwargs, reason):
    args = arguments(**sizes)
    decode = functools.partial(da.decode_attention, **kwargs)
    [choice] = kernels.explain(decode, *args, 0, platform="tpu")
    self.assertEqual(choice.implementation, "xla")
    self.assertIn(reason, choice.reason)

  def test_more_steps_than_scalars_can_be_kept_for_go_to_xla(self):
    k, v, q, *_ = (
      jax.ShapeDtypeStruct((1 << 15, *a.shape[1:]), a.dtype)
      for a in arguments()
    )
    [choice] = kernels.explain(da.attend, k, v, q, 5, platform="tpu")
    self.assertEqual(choice.implementation, "xla")
    self.assertIn("32768 steps, more than 16384", choice.reason)

  def test_every_real_model_is_explained(self):
    for spec in arg_specs.ARG_SPECS:
      layer = None if spec.layers is None else 0
      decode = functools.partial(
        da.decode_attention, layer=layer, **spec.scales()
      )
      [choice] = kernels.explain(decode, *spec.shapes(), platform="tpu")
      served = spec.dtype != "float16"
      self.assertEqual(
        choice.implementation, "pallas" if served else "xla", spec.name
      )

  def test_one_artifact_serves_every_platform(self):
    args = arguments()
    exported = export.export(
      jax.jit(da.decode_attention),
      platforms=("cpu", "cuda", "tpu"),
    )(*args, 5)
    text = exported.mlir_module()
    self.assertIn(KERNEL, text)
    self.assertIn(ffi.APPEND_TARGET, text)
    loaded = export.deserialize(exported.serialize())
    got = loaded.call(*args, 5)
    out, *_ = oracle.attend(*got[:2], args[2], [5] * 3, [1] * 3)
    tolerances.assert_close(got[2], out, "float32", reduced=4)


CHIPS = tuple(deviceless.TPU_TOPOLOGIES)


def structs(
  case="rows", dtype="bfloat16", tokens=1, layers=None, group=4, slots=16384
):
  """Returns the arguments of a layer whose cache no fast memory holds."""
  h = SIZES[case].get("h", 128)

  def shaped(length, heads):
    by_token = LAYOUTS[case] == "bsnh"
    axes = (length, heads) if by_token else (heads, length)
    return (8, *axes, h)

  cache = shaped(slots, 8)
  if layers is not None:
    cache = (layers, *cache)
  kind = "bfloat16" if dtype in cache_oracle.QUANTIZED else dtype
  return (
    *(jax.ShapeDtypeStruct(cache, dtype),) * 2,
    jax.ShapeDtypeStruct(shaped(tokens, 8 * group), kind),
    *(jax.ShapeDtypeStruct(shaped(tokens, 8), kind),) * 2,
    jax.ShapeDtypeStruct((8,), jnp.int32),
  )


@pytest.mark.deviceless
class CompiledTest(deviceless.TpuTest):
  def check(self, chip, fn, *args):
    compiled = self.compile_for_one(chip, fn, *args)
    deviceless.assert_only_the_kernel_writes(compiled, args[0])

  @parameterized.product(chip=CHIPS, case=CASES, dtype=DTYPES)
  def test_dtypes(self, chip, case, dtype):
    scales = {}
    if dtype in cache_oracle.QUANTIZED:
      scales = {"k_scale": 0.05, "v_scale": 0.05}
    step = functools.partial(
      da.decode_attention, layout=LAYOUTS[case], **scales
    )
    self.check(chip, step, *structs(case, dtype))

  @parameterized.product(chip=CHIPS, dtype=DTYPES)
  def test_prompts(self, chip, dtype):
    scales = {}
    if dtype in cache_oracle.QUANTIZED:
      scales = {"k_scale": 0.05, "v_scale": 0.05}
    step = functools.partial(da.decode_attention, **scales)
    self.check(chip, step, *structs(dtype=dtype, tokens=96))

  @parameterized.product(chip=CHIPS, case=("tiles", "columns"))
  def test_prompts_in_other_orders(self, chip, case):
    step = functools.partial(da.decode_attention, layout=LAYOUTS[case])
    self.check(chip, step, *structs(case, tokens=96))

  def test_shapes_of_real_models(self):
    for spec in arg_specs.ARG_SPECS:
      layer = None if spec.layers is None else 1
      step = functools.partial(
        da.decode_attention, layer=layer, **spec.scales()
      )
      args = spec.shapes()
      [choice] = kernels.explain(step, *args, platform="tpu")
      if choice.implementation == "pallas":
        compiled = self.compile_for_one("v5e", step, *args)
        num_bytes = args[0].size * args[0].dtype.itemsize
        deviceless.assert_calls(compiled, KERNEL)
        deviceless.assert_in_place(compiled, 2 * num_bytes)
        deviceless.assert_nothing_moves(compiled, args[0].size)

  @parameterized.parameters(
    ("float16", {}),
    ("bfloat16", {"bias": np.zeros((1, 1, 1, 16384), np.float32)}),
    ("bfloat16", {"mask": np.ones((1, 1, 1, 16384), bool)}),
    ("bfloat16", {"qv": np.zeros((8, 1, 32, 128), jnp.bfloat16)}),
    ("bfloat16", {"rope_cached_keys": True}),
  )
  def test_what_is_left_to_xla(self, dtype, kwargs):
    if "rope_cached_keys" in kwargs:
      cos, sin = da.rope_tables(16384, 64)
      kwargs |= {"rope_cos": cos, "rope_sin": sin}
    args = structs(dtype=dtype)
    step = functools.partial(da.decode_attention, **kwargs)
    compiled = self.compile_for_one("v5e", step, *args)
    self.assertEqual(hlo.custom_calls(compiled.as_text(), KERNEL), 0)
    deviceless.assert_in_place(
      compiled, 2 * args[0].size * args[0].dtype.itemsize
    )

  @parameterized.product(chip=CHIPS, case=CASES)
  def test_options(self, chip, case):
    cos, sin = da.rope_tables(4096, 64)
    step = functools.partial(
      da.decode_attention, layout=LAYOUTS[case], ring=True, window=512,
      softcap=30.0, alibi_slopes=np.linspace(0.1, 0.5, 32, dtype=np.float32),
      sinks=np.zeros(32, np.float32), rope_cos=cos, rope_sin=sin,
    )  # fmt: skip
    self.check(chip, step, *structs(case, tokens=5))

  @parameterized.product(chip=CHIPS, case=CASES)
  def test_pages_of_a_stack_in_a_scan(self, chip, case):
    table = jax.ShapeDtypeStruct((8, 1), jnp.int32)

    def step(k, v, q, new_k, new_v, index, table):
      def body(carry, layer):
        k, v, x = carry
        k, v, out = da.decode_attention(
          k, v, x, new_k, new_v, index,
          layer=layer, layout=LAYOUTS[case], block_table=table,
        )  # fmt: skip
        return (k, v, x + out), None

      return jax.lax.scan(body, (k, v, q), jnp.arange(4))[0]

    self.check(chip, step, *structs(case, layers=4), table)

  @parameterized.product(chip=CHIPS, case=("rows", "columns"))
  def test_length_over_four_chips_of_an_explicit_mesh(self, chip, case):
    mesh = deviceless.tpu_mesh(chip, jax.sharding.AxisType.Explicit)
    cache = P(None, "x")
    args, specs = structs(case), (cache, cache, *(P(),) * 4)
    with jax.set_mesh(mesh):
      compiled = self.compile_for_four(mesh, da.decode_attention, args, specs)
    deviceless.assert_only_the_kernel_writes(compiled, args[0], parts=4)

  @parameterized.product(chip=CHIPS, case=("rows", "columns"))
  def test_batch_over_four_chips_in_shard_map(self, chip, case):
    mesh = deviceless.tpu_mesh(chip)
    specs = (P("x"),) * 6
    step = jax.shard_map(
      da.decode_attention, mesh=mesh, in_specs=specs, out_specs=P("x")
    )
    args = structs(case)
    compiled = self.compile_for_four(mesh, step, args, specs)
    deviceless.assert_only_the_kernel_writes(compiled, args[0], parts=4)

  @parameterized.product(
    case=("rows", "tiles"), axis=(0, 1, 2), layers=(None, 3)
  )
  def test_plain_xla_splits_what_the_compiler_has_to(self, case, axis, layers):
    lead = [] if layers is None else [None]
    cache = P(*lead, *[None] * axis, "x")
    # Queries and new tokens lie on all chips where the length is split.
    new = P() if LAYOUTS[case][axis] == "s" else P(*[None] * axis, "x")
    args = structs(case, layers=layers)
    step = functools.partial(
      da.decode_attention, layout=LAYOUTS[case], layer=layers and 1
    )
    compiled = self.compile_for_four(
      deviceless.tpu_mesh("v5e"), step, args, (cache, cache, *[new] * 3, P())
    )
    deviceless.assert_in_place(
      compiled, 2 * args[0].size * args[0].dtype.itemsize // 4
    )
    deviceless.assert_nothing_gathered(compiled)
