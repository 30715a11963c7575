"""What the cache update compiles to for GPUs; needs none, and runs nothing."""

import functools

from absl.testing import parameterized
import jax
from jax import export, lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import kernels
from kernels import kv_cache
from kernels.cache import layouts
from kernels.kv_cache import arg_specs, ffi
from tests.testing import deviceless

CACHE = (8, 1024, 8, 128)
# What addresses the rows: a few integers a sequence.
SMALL = 64 << 10

SCALES = np.linspace(0.1, 0.2, 64, dtype=np.float32).reshape(8, 8)


def struct(shape, dtype="bfloat16", sharding=None):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def arguments(cache=CACHE, tokens=1, dtype="bfloat16", layout="bsnh"):
  b, s, n, h = cache
  order = (s, n) if layout == "bsnh" else (n, s)
  new = (tokens, n) if layout == "bsnh" else (n, tokens)
  kind = dtype if dtype in ("float32", "bfloat16", "float16") else "bfloat16"
  caches = [struct((b, *order, h), dtype)] * 2
  return [*caches, *[struct((b, *new, h), kind)] * 2, struct((b,), "int32")]


def size(shape):
  return int(np.prod(shape))


def nbytes(arrays):
  return sum(size(a.shape) * np.dtype(a.dtype).itemsize for a in arrays)


def compile_update(args, *more, donate=(0, 1), placement=None, **kwargs):
  return deviceless.compile_for(
    placement or deviceless.gpu_devices()[0],
    functools.partial(kv_cache.update, **kwargs), *args, *more, donate=donate,
  )  # fmt: skip


def assert_only_writes_rows(compiled, caches, parts=1):
  deviceless.assert_calls(compiled, ffi.TARGET)
  deviceless.assert_in_place(compiled, nbytes(caches) // parts)
  deviceless.assert_nothing_moves(compiled, size(caches[0].shape) // parts)
  deviceless.assert_small_temporaries(compiled, SMALL)


def four_gpus(spec):
  mesh = jax.sharding.Mesh(np.array(deviceless.gpu_devices(4)), ("x",))
  return NamedSharding(mesh, P()), NamedSharding(mesh, spec)


@pytest.mark.deviceless
class CompiledTest(parameterized.TestCase):
  @parameterized.parameters(
    ("float32", "bsnh", 1, False), ("bfloat16", "bnsh", 64, True),
    ("float16", "bsnh", 64, True), ("int8", "bnsh", 1, False),
    ("float8_e4m3fn", "bsnh", 1, True), ("float8_e5m2", "bsnh", 64, False),
  )  # fmt: skip
  def test_every_dtype_is_written_in_place(self, dtype, layout, tokens, ring):
    args = arguments(tokens=tokens, dtype=dtype, layout=layout)
    scales = {"k_scale": 0.1, "v_scale": 0.1} if "8" in dtype else {}
    compiled = compile_update(args, layout=layout, ring=ring, **scales)
    assert_only_writes_rows(compiled, args[:2])

  @parameterized.parameters(*arg_specs.ARG_SPECS)
  def test_shapes_of_real_models(self, spec):
    args = spec.shapes()
    layer = None if spec.layers is None else 1
    assert_only_writes_rows(compile_update(args, layer=layer), args[:2])

  @parameterized.parameters(
    ("bfloat16", (8,), None, {}), ("bfloat16", (), (), {}),
    ("int8", (8,), (8,), {"k_scale": 0.1, "v_scale": 0.1}),
    ("int8", (), None, {"k_scale": SCALES[0], "v_scale": SCALES}),
  )  # fmt: skip
  def test_a_call_is_all_that_runs(self, dtype, index, lengths, scales):
    def update(*args):
      *args, lengths = args
      return kv_cache.update(*args, lengths=lengths, **scales)

    args = [*arguments(dtype=dtype)[:4], struct(index, "int32")]
    args.append(lengths if lengths is None else struct(lengths, "int32"))
    deviceless.assert_one_launch(
      deviceless.compile_for(
        deviceless.gpu_devices()[0], update, *args, donate=(0, 1)
      )
    )

  def test_paged_with_lengths(self):
    caches = [struct((512, 16, 8, 128))] * 2
    rows = [struct((8, 4, 8, 128))] * 2

    def update(k, v, new_k, new_v, index, lengths, table):
      return kv_cache.update(
        k, v, new_k, new_v, index, lengths=lengths, block_table=table
      )

    ints = struct((8,), "int32")
    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0],
      update, *caches, *rows, ints, ints, struct((8, 64), "int32"),
      donate=(0, 1),
    )  # fmt: skip
    assert_only_writes_rows(compiled, caches)

  def test_layers_in_a_loop(self):
    args = [struct((4, *CACHE))] * 2 + arguments()[2:]

    def layers(k, v, new_k, new_v, index):
      def step(layer, caches):
        return kv_cache.update(*caches, new_k, new_v, index, layer=layer)

      return lax.fori_loop(0, 4, step, (k, v))

    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0], layers, *args, donate=(0, 1)
    )
    assert_only_writes_rows(compiled, args[:2])

  @parameterized.parameters(0, 1, 2)
  def test_four_gpus_keep_their_parts(self, axis):
    whole, parts = four_gpus(P(*[None] * axis, "x"))
    args = arguments()
    args[:2] = [struct(CACHE, sharding=parts)] * 2
    compiled = compile_update(args, placement=whole)
    assert_only_writes_rows(compiled, args[:2], parts=4)

  def test_auto_takes_the_kernel(self):
    [choice] = kernels.explain(kv_cache.update, *arguments(), platform="cuda")
    self.assertEqual(choice.implementation, "cuda")

  def test_one_artifact_serves_every_platform(self):
    args = arguments()
    exported = export.export(
      jax.jit(kv_cache.update),
      platforms=("cpu", "cuda", "tpu"),
    )(*args)
    self.assertIn(deviceless.TPU_KERNEL, exported.mlir_module())
    restored = export.deserialize(exported.serialize())
    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0], restored.call, *args, donate=(0, 1)
    )
    assert_only_writes_rows(compiled, args[:2])


@pytest.mark.deviceless
class BrokenProgramTest(parameterized.TestCase):
  """What the checks above catch."""

  def test_missing_donation_is_seen(self):
    args = arguments()
    compiled = compile_update(args, donate=())
    with self.assertRaisesRegex(AssertionError, "0 bytes of the arguments"):
      deviceless.assert_in_place(compiled, nbytes(args[:2]))
    with self.assertRaisesRegex(AssertionError, "moves data"):
      deviceless.assert_nothing_moves(compiled, size(CACHE))

  def test_launch_of_operands_is_seen(self):
    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0],
      lambda *args: kv_cache.update(*args[:4], args[4] + 1), *arguments(),
    )  # fmt: skip
    with self.assertRaisesRegex(AssertionError, "XLA launches .*add"):
      deviceless.assert_one_launch(compiled)

  def test_fallback_is_seen(self):
    compiled = compile_update(arguments(), implementation="xla")
    with self.assertRaisesRegex(AssertionError, "does not call"):
      deviceless.assert_calls(compiled, ffi.TARGET)

  def test_handler_that_is_not_registered_does_not_compile(self):
    call = functools.partial(
      ffi.update,
      layout=layouts.Layout.BSNH,
      ring=0,
      aligned=True,
      uniform=(),
      target="nowhere",
    )
    *args, index = arguments()
    with self.assertRaisesRegex(Exception, "nowhere"):
      deviceless.compile_for(
        deviceless.gpu_devices()[0],
        call, *args, index, index, index, struct((8, 1), "int32"),
        struct((), "int32"),
      )  # fmt: skip

  def test_handler_without_partitioning_gathers_and_is_seen(self):
    whole, parts = four_gpus(P("x"))
    ffi.CUDA_LIBRARY.load()
    *args, index = arguments()
    args[:2] = [struct(CACHE, sharding=parts)] * 2
    call = functools.partial(
      ffi.update, layout=layouts.Layout.BSNH, ring=0, aligned=True, uniform=()
    )
    compiled = deviceless.compile_for(
      whole, call, *args, index, index, index, struct((8, 1), "int32"),
      struct((), "int32"), donate=(0, 1),
    )  # fmt: skip
    with self.assertRaisesRegex(AssertionError, "all-gather"):
      deviceless.assert_nothing_moves(compiled, size(CACHE) // 4)

  def test_cache_that_is_read_before_the_write_is_seen(self):
    def late(k, v, new_k, new_v, index):
      updated = kv_cache.update(k, v, new_k, new_v, index)
      return *updated, jnp.einsum("bsnh,btnh->bnts", k, new_k)

    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0], late, *arguments(), donate=(0, 1)
    )
    with self.assertRaisesRegex(AssertionError, "moves data"):
      deviceless.assert_nothing_moves(compiled, size(CACHE))
