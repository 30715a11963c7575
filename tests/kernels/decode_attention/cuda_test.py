"""What decode attention compiles to for GPUs; needs none, and runs nothing."""

import dataclasses
import functools

from absl.testing import parameterized
import jax
from jax import export, lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import kernels
from kernels import decode_attention as da
from kernels.common import dispatch
from kernels.decode_attention import arg_specs, ffi, primitive
from tests.testing import deviceless, hlo

SPEC = arg_specs.ArgSpec("llama_3_1_8b", 4, 4096, 8, 128, 4)


def size(shape):
  return int(np.prod(shape))


def nbytes(arrays):
  return sum(size(a.shape) * np.dtype(a.dtype).itemsize for a in arrays)


def struct(shape, dtype, sharding=None):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


def compile_step(args, donate=(0, 1), placement=None, **kwargs):
  return deviceless.compile_for(
    placement or deviceless.gpu_devices()[0],
    functools.partial(da.decode_attention, **kwargs), *args, donate=donate,
  )  # fmt: skip


def assert_fused(compiled, caches, parts=1):
  """Append and attend are one call, in place, beside a small workspace."""
  deviceless.assert_calls(compiled, ffi.APPEND_TARGET)
  deviceless.assert_in_place(compiled, nbytes(caches) // parts)
  deviceless.assert_nothing_moves(compiled, size(caches[0].shape) // parts)
  # Results of parts: a small share of the cache, unless that is small itself.
  deviceless.assert_small_temporaries(
    compiled, max(nbytes(caches) // parts // 10, 2 << 20)
  )


def four_gpus(axis):
  mesh = jax.sharding.Mesh(np.array(deviceless.gpu_devices(4)), ("x",))
  spec = P(*[None] * axis, "x")
  return NamedSharding(mesh, P()), NamedSharding(mesh, spec)


@pytest.mark.deviceless
class CompiledTest(parameterized.TestCase):
  @parameterized.parameters(*arg_specs.ARG_SPECS)
  def test_shapes_of_real_models(self, spec):
    args = spec.shapes()
    kwargs = {k: np.asarray(v) for k, v in spec.scales().items()}
    if spec.layers is not None:
      kwargs["layer"] = 1
    assert_fused(compile_step(args, **kwargs), args[:2])

  def test_a_plain_call_is_all_that_xla_launches(self):
    deviceless.assert_one_launch(compile_step(SPEC.shapes()))

  def test_the_other_float8(self):
    # What no real model above has.
    spec = dataclasses.replace(SPEC, dtype="float8_e5m2")
    args = spec.shapes()
    kwargs = {k: np.asarray(v) for k, v in spec.scales().items()}
    assert_fused(compile_step(args, **kwargs), args[:2])

  def test_every_option_at_once(self):
    cache_k, cache_v, q, new_k, new_v, _ = SPEC.shapes()
    b, s, heads = SPEC.batch, SPEC.length, SPEC.heads * SPEC.group

    def step(k, v, q, new_k, new_v, index, bias, mask, sinks, slopes, cos, sin):
      return da.decode_attention(
        k, v, q, new_k, new_v, index, lengths=1, left_padding=2, window=99,
        chunk=512, softcap=30.0, bias=bias, mask=mask, sinks=sinks,
        alibi_slopes=slopes, rope_cos=cos, rope_sin=sin, return_lse=True,
      )  # fmt: skip

    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0],
      step, cache_k, cache_v, q, new_k, new_v, struct((b,), "int32"),
      struct((1, heads, 1, s), "float32"), struct((b, 1, 1, s), "bool"),
      struct((heads,), "float32"), struct((heads,), "float32"),
      struct((s, 64), "float32"), struct((s, 64), "float32"),
      donate=(0, 1),
    )  # fmt: skip
    assert_fused(compiled, (cache_k, cache_v))

  def test_paged_ring_of_other_layout(self):
    caches = [struct((512, 8, 16, 128), "bfloat16")] * 2
    q = struct((4, 32, 1, 128), "bfloat16")
    new = struct((4, 8, 1, 128), "bfloat16")

    def step(k, v, q, new_k, new_v, index, table):
      return da.decode_attention(
        k, v, q, new_k, new_v, index, block_table=table, layout="bnsh",
        ring=True,
      )  # fmt: skip

    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0],
      step, *caches, q, new, new, struct((4,), "int32"),
      struct((4, 64), "int32"), donate=(0, 1),
    )  # fmt: skip
    assert_fused(compiled, caches)

  def test_layers_in_a_loop(self):
    cache_k, cache_v, q, new_k, new_v, index = SPEC.shapes()
    stacks = [struct((4, *cache_k.shape), "bfloat16")] * 2

    def layers(k, v, q, new_k, new_v, index):
      def step(layer, carry):
        k, v, q = carry
        return tuple(
          da.decode_attention(k, v, q, new_k, new_v, index, layer=layer)
        )

      return lax.fori_loop(0, 4, step, (k, v, q))

    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0], layers, *stacks, q, new_k, new_v, index,
      donate=(0, 1),
    )  # fmt: skip
    assert_fused(compiled, stacks)

  @parameterized.parameters(0, 1, 2)
  def test_four_gpus_keep_their_parts(self, axis):
    whole, parts = four_gpus(axis)
    cache, _, *rest = SPEC.shapes()
    caches = [struct(cache.shape, cache.dtype, parts)] * 2
    compiled = compile_step((*caches, *rest), placement=whole)
    assert_fused(compiled, caches, parts=4)
    # Only devices with other keys of one sequence have anything to exchange.
    sums = hlo.instructions(compiled.as_text(), "all-reduce")
    self.assertEqual(bool(sums), axis == 1)

  def test_attend_alone(self):
    cache, _, q, *_ = SPEC.shapes()
    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0], da.attend, cache, cache, q,
      struct((4,), "int32"),
    )  # fmt: skip
    deviceless.assert_calls(compiled, ffi.ATTEND_TARGET)
    deviceless.assert_nothing_moves(compiled, size(cache.shape))

  def test_one_artifact_serves_every_platform(self):
    args = SPEC.shapes()
    exported = export.export(
      jax.jit(da.decode_attention),
      platforms=("cpu", "cuda", "tpu"),
    )(*args)
    self.assertIn(deviceless.TPU_KERNEL, exported.mlir_module())
    restored = export.deserialize(exported.serialize())
    compiled = deviceless.compile_for(
      deviceless.gpu_devices()[0], restored.call, *args, donate=(0, 1)
    )
    assert_fused(compiled, args[:2])

  def test_auto_takes_the_kernel_where_there_is_one(self):
    [choice] = kernels.explain(
      da.decode_attention, *SPEC.shapes(), platform="cuda"
    )
    self.assertEqual(choice.implementation, "cuda")
    huge = arg_specs.ArgSpec("huge", 1, 256, 1, 2048)
    [choice] = kernels.explain(
      da.decode_attention, *huge.shapes(), platform="cuda"
    )
    self.assertEqual(choice.implementation, "xla")
    self.assertIn("multiple of 16 bytes", choice.reason)


@pytest.mark.deviceless
class BrokenProgramTest(parameterized.TestCase):
  """What the checks above catch."""

  def test_missing_donation_is_seen(self):
    args = SPEC.shapes()
    compiled = compile_step(args, donate=())
    with self.assertRaisesRegex(AssertionError, "bytes of the arguments"):
      assert_fused(compiled, args[:2])

  def test_fallback_is_seen(self):
    args = SPEC.shapes()
    compiled = compile_step(args, implementation="xla")
    with self.assertRaisesRegex(AssertionError, "does not call"):
      assert_fused(compiled, args[:2])

  def test_reference_moves_more_and_is_seen(self):
    args = SPEC.shapes()
    compiled = compile_step(args, implementation="xla")
    with self.assertRaisesRegex(AssertionError, "bytes of temporaries"):
      deviceless.assert_small_temporaries(compiled, nbytes(args[:2]) // 10)

  def test_handler_that_is_not_registered_does_not_compile(self):
    args = SPEC.shapes()
    primitive.APPEND.implementations["nowhere"] = dispatch.Implementation(
      name="nowhere",
      platforms=("cuda",),
      fn=functools.partial(ffi.cuda, targets=("nowhere", "nowhere")),
    )
    self.addCleanup(primitive.APPEND.implementations.pop, "nowhere")
    with self.assertRaisesRegex(Exception, "nowhere"):
      compile_step(args, implementation="nowhere")
