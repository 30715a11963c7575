"""The TPU's `kv_cache.update`: its numbers, and its compiled programs.

Numbers come from the interpreter on the CPU, and from the device where there is
one; programs from libtpu, which wants no device.
"""

import functools
import subprocess
import sys
from unittest import mock

from absl.testing import parameterized
import jax
from jax import export
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import kernels
from kernels import kv_cache
from kernels.cache import layouts, rows_tpu
from kernels.kv_cache import arg_specs, ffi, primitive
from tests.kernels.kv_cache import cases
from tests.kernels.kv_cache import oracle as oracles
from tests.testing import deviceless, hlo, interpreted, op_contract

PLATFORM = op_contract.PLATFORM
interpreted.allow(primitive, "UPDATE")
IMPLEMENTATION = interpreted.NAME if PLATFORM == "cpu" else "pallas"
DTYPES = ("float32", "bfloat16", *oracles.QUANTIZED)
KERNEL = deviceless.TPU_KERNEL

SIZES, LAYOUTS = interpreted.CACHES, interpreted.LAYOUTS
CASES = tuple(SIZES)


def arguments(
  seed=0, b=3, s=32, t=1, n=4, h=128, h_v=None, dtype="float32", layout="bsnh",
  rows=None, lead=(),
):  # fmt: skip
  rng = np.random.default_rng(seed)
  order = (lambda x, y: (x, y)) if layout == "bsnh" else (lambda x, y: (y, x))
  kind = "float32" if dtype in oracles.QUANTIZED else dtype
  return tuple(
    oracles.random(rng, (*front, count, *order(length, n), dim), of)
    for front, count, length, of in (
      (lead, rows or b, s, dtype), ((), b, t, kind)
    )
    for dim in (h, h_v or h)
  )  # fmt: skip


def run(args, index, implementation=IMPLEMENTATION, **kwargs):
  update = functools.partial(
    kv_cache.update, implementation=implementation, **kwargs
  )
  index = np.asarray(index, np.int32)
  got = jax.jit(update)(*args, index)
  want = oracles.update(*args, index, **kwargs)
  for g, w in zip(got, want, strict=True):
    assert g.dtype == w.dtype and g.shape == w.shape
    np.testing.assert_array_equal(
      np.asarray(g).view(np.uint8), np.asarray(w).view(np.uint8)
    )
  assert not interpreted.races_found()


class NumbersTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if PLATFORM != "cpu":
      op_contract.need_device(PLATFORM)
    interpreted.reset()

  @parameterized.parameters(
    ("rows", "float32"),
    ("rows", "bfloat16"),
    ("rows", "int8"),
    ("tiles", "bfloat16"),
    ("tiles", "float8_e4m3fn"),
    ("columns", "float32"),
    ("columns", "bfloat16"),
    ("columns", "float8_e5m2"),
  )
  def test_each_sequence_at_its_index(self, case, dtype):
    sizes = SIZES[case]
    scales = {}
    if dtype in oracles.QUANTIZED:
      scales = {
        "k_scale": np.float32(0.05),
        "v_scale": np.float32([[0.1, 0.2, 0.3, 0.4]] * 3),
      }
    args = arguments(t=3, dtype=dtype, **sizes)
    layout = sizes.get("layout", "bsnh")
    last = sizes.get("s", 32) - 1
    run(args, [0, 13, last], layout=layout, **scales)

  @parameterized.parameters(*CASES)
  def test_runs_and_padding(self, case):
    args = arguments(**SIZES[case] | {"s": 256, "n": 4, "t": 67})
    lengths = np.int32([67, 0, 40])
    run(args, [0, 90, 226], lengths=lengths, layout=LAYOUTS[case])

  @parameterized.product(case=CASES, more=(0, 9))
  def test_ring(self, case, more):
    sizes = SIZES[case]
    tokens = 5 if not more else sizes.get("s", 32) + more
    args = arguments(t=tokens, **sizes)
    run(args, [0, 30, 777], layout=LAYOUTS[case], ring=True)

  @parameterized.parameters(*CASES)
  def test_pages_of_a_stack(self, case):
    sizes = {"s": 16} | SIZES[case] | {"t": 9, "rows": 7, "lead": (2,)}
    args = arguments(**sizes)
    table = np.int32([[5, 0], [3, -1], [1, 6]])
    run(
      args, [sizes["s"] - 6, 2, sizes["s"] - 4], layout=LAYOUTS[case], layer=1,
      block_table=table,
    )  # fmt: skip

  @parameterized.parameters(*CASES)
  def test_rows_by_index(self, case):
    args = arguments(rows=5, dtype="bfloat16", **SIZES[case])
    rows = np.int32([4, 0, 2])
    run(args, [3, 31, 400], layout=LAYOUTS[case], cache_batch_index=rows)

  @parameterized.parameters(*CASES)
  def test_rows_that_sequences_share(self, case):
    # Slots side by side: where these are in one tile, it is rewritten by one
    # sequence after the other.
    args = arguments(rows=2, **SIZES[case])
    rows = np.int32([1, 0, 1])
    run(args, [3, 3, 4], layout=LAYOUTS[case], cache_batch_index=rows)

  @parameterized.parameters(("tiles", 1 << 16), ("columns", 1 << 19))
  def test_more_sequences_than_are_rewritten_abreast(self, case, num_bytes):
    with mock.patch.object(rows_tpu, "_TILES_BYTES", num_bytes):  # of two
      args = arguments(b=5, **SIZES[case] | {"n": 2})
      run(args, [0, 13, 31, 2, 7], layout=LAYOUTS[case])

  @parameterized.product(case=CASES, ring=(False, True))
  def test_parts_of_a_sharded_cache(self, case, ring):
    layout = LAYOUTS[case]
    args = arguments(t=2, **SIZES[case])
    cases.check_parts(args, IMPLEMENTATION, layout, ring)
    assert not interpreted.races_found()

  @parameterized.parameters(*CASES)
  def test_what_vmap_makes_of_it(self, case):
    layout = LAYOUTS[case]
    args = arguments(lead=(2, 3), **SIZES[case])
    layer, first_slot = np.int32([5, 1, -1]), np.int32(0)
    index = count = np.ones(3, np.int32)
    table = np.arange(3, dtype=np.int32)[:, None]
    got = primitive.UPDATE(
      *args, index, count, layer, table, first_slot,
      layout=layouts.Layout(layout), ring=0, aligned=False, uniform=(),
      implementation=IMPLEMENTATION,
    )  # fmt: skip
    for cache, old, new in zip(got, args[:2], args[2:], strict=True):
      want = np.array(old)
      for sequence, place in enumerate(((1, 2), (0, 1))):
        slots = want[(*place, sequence)]
        if layout == "bsnh":
          slots[1] = new[sequence, 0]
        else:
          slots[:, 1] = new[sequence, :, 0]
      np.testing.assert_array_equal(cache, want)


class ChoiceTest(parameterized.TestCase):
  """What the rule says; nothing is compiled."""

  def setUp(self):
    super().setUp()
    if PLATFORM != "cpu":
      self.skipTest("the same on every platform")

  @parameterized.parameters(
    (
      {"h": 64},
      "`cache_k` is float32[3, 32, 4, 64], which does not fill tiles",
    ),
    ({"h": 20, "s": 128}, "does not fill tiles"),
    ({"s": 20, "layout": "bnsh"}, "does not fill tiles"),
    ({"s": 128, "h_v": 80}, "keys and values do not lie in the same order"),
    ({"t": 0}, "there are no new tokens"),
    ({"b": 2, "s": 8, "t": 1 << 15}, "65536 new tokens, more than 32768"),
  )
  def test_what_mosaic_cannot_serve_goes_to_xla(self, sizes, reason):
    layout = sizes.get("layout", "bsnh")
    b, s, t, n, h = (
      sizes.get(name, default)
      for name, default in (("b", 3), ("s", 32), ("t", 1), ("n", 4), ("h", 128))
    )
    shapes = [(b, s, n, h), (b, s, n, sizes.get("h_v", h))]
    shapes += [(b, t, *shape[2:]) for shape in shapes]
    if layout == "bnsh":
      shapes = [(x, z, y, w) for x, y, z, w in shapes]
    structs = [jax.ShapeDtypeStruct(shape, "float32") for shape in shapes]
    update = functools.partial(kv_cache.update, layout=layout, ring=t > s)
    index = jax.ShapeDtypeStruct((), "int32")
    [choice] = kernels.explain(update, *structs, index, platform="tpu")
    self.assertEqual(choice.implementation, "xla")
    self.assertIn(reason, choice.reason)

  def test_a_kernel_that_is_asked_for_must_fit(self):
    args = arguments(h=64)
    update = functools.partial(kv_cache.update, implementation="pallas")
    with self.assertRaisesRegex(ValueError, "does not fill tiles"):
      kernels.explain(update, *args, 0, platform="tpu")

  def test_importing_kernels_leaves_pallas_alone(self):
    program = (
      f"import sys; sys.path[:] = {sys.path!r}; import kernels;"
      " print([name for name in sys.modules if 'pallas' in name])"
    )
    done = subprocess.run(
      [sys.executable, "-c", program],
      capture_output=True, check=True, text=True,
    )  # fmt: skip
    self.assertEqual(done.stdout.strip(), "[]")

  def test_every_real_model_is_explained(self):
    for spec in arg_specs.ARG_SPECS:
      layer = None if spec.layers is None else 0
      update = functools.partial(kv_cache.update, layer=layer)
      [choice] = kernels.explain(update, *spec.shapes(), platform="tpu")
      served = spec.dtype != "float16"
      self.assertEqual(choice.implementation, "pallas" if served else "xla")

  def test_one_artifact_serves_every_platform(self):
    args = arguments()
    exported = export.export(
      jax.jit(kv_cache.update),
      platforms=("cpu", "cuda", "tpu"),
    )(*args, 5)
    text = exported.mlir_module()
    self.assertIn(KERNEL, text)
    self.assertIn(ffi.TARGET, text)
    loaded = export.deserialize(exported.serialize())
    for g, w in zip(loaded.call(*args, 5), oracles.update(*args, 5)):
      np.testing.assert_array_equal(g, w)


CHIPS = tuple(deviceless.TPU_TOPOLOGIES)


def structs(case="rows", dtype="bfloat16", tokens=1, layers=None, heads=8):
  """Returns the arguments of a layer whose cache no fast memory holds."""
  h = SIZES[case].get("h", 128)

  def shaped(length):
    by_token = LAYOUTS[case] == "bsnh"
    axes = (length, heads) if by_token else (heads, length)
    return (8, *axes, h)

  cache = shaped(16384)
  if layers is not None:
    cache = (layers, *cache)
  kind = "bfloat16" if dtype in oracles.QUANTIZED else dtype
  return (
    *(jax.ShapeDtypeStruct(cache, dtype),) * 2,
    *(jax.ShapeDtypeStruct(shaped(tokens), kind),) * 2,
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
    if dtype in oracles.QUANTIZED:
      scales = {"k_scale": 0.05, "v_scale": 0.05}
    update = functools.partial(kv_cache.update, layout=LAYOUTS[case], **scales)
    self.check(chip, update, *structs(case, dtype))

  @parameterized.parameters(("rows", 1), ("rows", 9), ("tiles", 1))
  def test_float16_is_left_to_xla(self, case, tokens):
    args = structs(case, "float16", tokens)
    update = functools.partial(kv_cache.update, layout=LAYOUTS[case])
    compiled = self.compile_for_one("v5e", update, *args)
    self.assertEqual(hlo.custom_calls(compiled.as_text(), KERNEL), 0)
    num_bytes = args[0].size * args[0].dtype.itemsize
    deviceless.assert_in_place(compiled, 2 * num_bytes)
    deviceless.assert_small_temporaries(compiled, num_bytes // 8)

  @parameterized.product(chip=CHIPS, case=CASES)
  def test_a_long_run_of_tokens(self, chip, case):
    update = functools.partial(kv_cache.update, layout=LAYOUTS[case])
    self.check(chip, update, *structs(case, tokens=130))

  @parameterized.product(chip=CHIPS, heads=(1, 2, 6))
  def test_few_heads(self, chip, heads):
    self.check(chip, kv_cache.update, *structs(heads=heads))

  @parameterized.product(chip=CHIPS, case=CASES)
  def test_stack_of_layers_in_a_scan(self, chip, case):
    def step(k, v, new_k, new_v, index):
      def body(carry, layer):
        return kv_cache.update(
          *carry, new_k, new_v, index, layer=layer, layout=LAYOUTS[case]
        ), None

      return jax.lax.scan(body, (k, v), jnp.arange(4))[0]

    self.check(chip, step, *structs(case, layers=4))

  @parameterized.product(chip=CHIPS, case=CASES)
  def test_ring_of_pages(self, chip, case):
    table = jax.ShapeDtypeStruct((8, 2), jnp.int32)

    def step(*args):
      *args, table = args
      return kv_cache.update(
        *args, block_table=table, layout=LAYOUTS[case], ring=True
      )

    self.check(chip, step, *structs(case, tokens=5), table)

  @parameterized.product(chip=CHIPS, case=CASES)
  def test_vmap(self, chip, case):
    args = [jax.ShapeDtypeStruct((2, *a.shape), a.dtype) for a in structs(case)]
    update = functools.partial(kv_cache.update, layout=LAYOUTS[case])
    self.check(chip, jax.vmap(update), *args)

  @parameterized.product(chip=CHIPS, case=("rows", "columns"), axis=(0, 1, 2))
  def test_four_chips_of_an_explicit_mesh(self, chip, case, axis):
    mesh = deviceless.tpu_mesh(chip, jax.sharding.AxisType.Explicit)
    spec = P(*("x" if i == axis else None for i in range(4)))
    args, specs = structs(case), (spec, spec, P(), P(), P())
    with jax.set_mesh(mesh):
      compiled = self.compile_for_four(mesh, kv_cache.update, args, specs)
    deviceless.assert_only_the_kernel_writes(compiled, args[0], parts=4)

  @parameterized.product(chip=CHIPS, case=("rows", "columns"))
  def test_four_chips_in_shard_map(self, chip, case):
    mesh = deviceless.tpu_mesh(chip)
    specs = (P("x"),) * 5
    update = jax.shard_map(
      kv_cache.update, mesh=mesh, in_specs=specs, out_specs=P("x")
    )
    args = structs(case)
    compiled = self.compile_for_four(mesh, update, args, specs)
    deviceless.assert_only_the_kernel_writes(compiled, args[0], parts=4)

  def test_a_kernel_that_the_compiler_would_have_to_split_is_refused(self):
    update = functools.partial(kv_cache.update, implementation="pallas")
    with self.assertRaisesRegex(ValueError, "cannot be split over devices by"):
      self.compile_for_four(
        deviceless.tpu_mesh("v5e"), update, structs(), (P("x"),) * 5
      )

  @parameterized.product(
    case=("rows", "tiles"), axis=(0, 1, 2), layers=(None, 3)
  )
  def test_plain_xla_splits_what_the_compiler_has_to(self, case, axis, layers):
    lead = [] if layers is None else [None]
    cache = P(*lead, *[None] * axis, "x")
    # New tokens lie on all chips where the length is split.
    new = P() if LAYOUTS[case][axis] == "s" else P(*[None] * axis, "x")
    args = structs(case, layers=layers)
    update = functools.partial(
      kv_cache.update, layout=LAYOUTS[case], layer=layers and 1
    )
    compiled = self.compile_for_four(
      deviceless.tpu_mesh("v5e"), update, args, (cache, cache, new, new, P())
    )
    self.assertEqual(hlo.custom_calls(compiled.as_text(), KERNEL), 0)
    num_bytes = args[0].size * args[0].dtype.itemsize // 4
    deviceless.assert_in_place(compiled, 2 * num_bytes)
    deviceless.assert_small_temporaries(compiled, num_bytes // 8)
    deviceless.assert_nothing_gathered(compiled)

  @parameterized.parameters(0, 2)
  def test_plain_xla_splits_a_paged_cache(self, axis):
    pages = jax.ShapeDtypeStruct((1024, 128, 8, 128), "bfloat16")
    _, _, *new, index = structs()
    table = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    cache = P(*[None] * axis, "x")
    rows = P(None, None, "x") if axis == 2 else P()

    def update(*args):
      *args, table = args
      return kv_cache.update(*args, block_table=table)

    compiled = self.compile_for_four(
      deviceless.tpu_mesh("v5e"), update, (pages, pages, *new, index, table),
      (cache, cache, rows, rows, P(), P()),
    )  # fmt: skip
    num_bytes = pages.size * pages.dtype.itemsize // 4
    deviceless.assert_in_place(compiled, 2 * num_bytes)
    deviceless.assert_small_temporaries(compiled, num_bytes // 8)
    deviceless.assert_nothing_gathered(compiled)
