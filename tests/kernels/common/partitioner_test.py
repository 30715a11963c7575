"""How calls are split: meshes of shardings that have none, and the text."""

import itertools

from absl.testing import absltest, parameterized
import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

import kernels
from kernels import batch_stat, kv_cache
from kernels.cache import layouts
from kernels.common import jax_private, partitioner
from kernels.decode_attention import reference
from tests.testing import devices, hlo, oracles

devices.use_cpu_devices(8)

SHAPE = (48, 48, 48)


def _holders(sharding):
  tiles = jax_private.tile_assignment(sharding, 3)
  return np.sort(tiles.reshape(*tiles.shape[:3], -1))


class MeshTest(parameterized.TestCase):
  @parameterized.parameters(
    (8,), (2, 4), (4, 2), (2, 2, 2), (2, 3), (3, 2, 2), (1, 8), (5, 3, 2)
  )
  def test_every_spec_is_read_back(self, *sizes):
    names = tuple("abc"[: len(sizes)])
    mesh = AbstractMesh(sizes, names)
    beside = jax_private.hlo_sharding(NamedSharding(mesh, P(None, "a")), 3)
    for order in itertools.permutations(names):
      for count in range(len(names) + 1):
        for spec in (P(*order[:count]), P(None, order[:count] or None)):
          want = jax_private.hlo_sharding(NamedSharding(mesh, spec), 3)
          for given in ((want,), (want, beside, None), (beside, want)):
            read = partitioner.read_shardings([SHAPE] * len(given), given)
            got = jax_private.hlo_sharding(read[given.index(want)], 3)
            np.testing.assert_array_equal(_holders(got), _holders(want))

  def test_shardings_that_no_mesh_has_in_common(self):
    first, second = (
      jax_private.hlo_sharding(
        NamedSharding(AbstractMesh(sizes, ("a", "b")), P("a")), 3
      )
      for sizes in ((2, 3), (3, 2))
    )
    read = partitioner.read_shardings([SHAPE] * 2, [first, second])
    self.assertEqual(read[0].shard_shape(SHAPE), (24, 48, 48))
    self.assertEqual(read[1].shard_shape(SHAPE), SHAPE)


class NoteTest(absltest.TestCase):
  def test_parameters_come_back(self):
    options = reference.Options(
      fields=("q", "index"), layout=layouts.Layout.BSNH, ring=0, aligned=True,
      uniform=(("index", 0),), scale=0.1, causal=False, window_left=-1,
      window_right=2, chunk=0, softcap=float("inf"), interleaved=False,
      rotate_keys=True, out_dtype="bfloat16",
    )  # fmt: skip
    encoded = partitioner.encode(options)
    decoded = partitioner.decode(encoded, reference.Options)
    self.assertEqual(decoded, options)
    self.assertIs(decoded.layout, layouts.Layout.BSNH)
    self.assertIs(
      partitioner.decode("bnsh", layouts.Layout), layouts.Layout.BNSH
    )
    for value in (None, True, 3, 1e-5, "x", (1, (2.5, "y")), np.dtype("int8")):
      self.assertEqual(partitioner.decode(partitioner.encode(value)), value)
    bfloat16 = jnp.dtype(jnp.bfloat16)
    self.assertEqual(partitioner.decode(partitioner.encode(bfloat16)), bfloat16)

  def test_what_has_no_text_is_refused(self):
    with self.assertRaisesRegex(TypeError, "must be a number, a string, a dty"):
      partitioner.encode(object())


class SplitTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)
    self.x = np.random.default_rng(0).normal(size=(8, 6, 4)).astype("float32")
    self.mesh = devices.auto_mesh((8,), ("a",))
    self.sharded = jax.device_put(self.x, NamedSharding(self.mesh, P("a")))

  def check(self, got, x=None):
    want = oracles.batch_norm(self.x if x is None else x)
    np.testing.assert_allclose(got.batch_mean, want.mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.batch_var, want.var, rtol=1e-5)

  def test_an_array_that_was_reshaped(self):
    run = jax.jit(lambda x: _update(x.reshape(4, 2, 6, 4)))
    text = run.lower(self.sharded).compile().as_text()
    self.assertEmpty(hlo.instructions(text, "all-gather"))
    self.check(run(self.sharded))

  def test_meshes_of_several_shapes_in_one_program(self):
    other = devices.auto_mesh((2, 4), ("b", "c"))

    def run(x):
      return _update(
        lax.with_sharding_constraint(x, NamedSharding(other, P(None, "b", "c")))
      )

    self.check(jax.jit(run)(self.sharded))

  def test_compiled_elsewhere_than_lowered(self):
    # Where a program is compiled does not matter, only where it was lowered.
    x = self.x.astype(np.float64)
    with jax.enable_x64(True):
      wide = jax.device_put(x, NamedSharding(self.mesh, P("a")))
      lowered = jax.jit(_update).lower(wide)
    compiled = lowered.compile()
    with jax.enable_x64(True):
      got = compiled(wide)
    self.assertEqual(got.batch_mean.dtype, np.float64)
    np.testing.assert_allclose(got.batch_mean, x.mean((0, 1)), rtol=1e-12)
    lowered = jax.jit(_update).lower(self.sharded)
    with kernels.xla_only(), jax.disable_jit():
      compiled = lowered.compile()
    self.check(compiled(self.sharded))
    calls = hlo.custom_calls(
      compiled.as_text(), "fused_nnx_batch_stat_moments_1"
    )
    self.assertEqual(calls, 1)

  def test_an_artifact_is_split_in_a_program_of_its_own(self):
    exported = jax.export.export(
      jax.jit(_update),
    )(self.sharded)
    data = exported.serialize()
    del exported
    jax.clear_caches()
    self.check(jax.export.deserialize(data).call(self.sharded))

  def test_without_shardy(self):
    cache = jax.device_put(
      jnp.zeros((8, 4, 2, 2)), NamedSharding(self.mesh, P("a"))
    )
    rows = jnp.ones((8, 1, 2, 2))
    jax.config.update("jax_use_shardy_partitioner", False)
    try:
      self.check(jax.jit(_update)(self.sharded))
      k, _ = jax.jit(kv_cache.update)(cache, cache, rows, rows, 1)
    finally:
      jax.config.update("jax_use_shardy_partitioner", True)
    np.testing.assert_array_equal(k[:, :, 0, 0].sum(0), [0, 8, 0, 0])


def _update(x):
  return batch_stat.update(
    x, jnp.zeros(4, x.dtype), jnp.ones(4, x.dtype), implementation="cpu"
  )


if __name__ == "__main__":
  absltest.main()
