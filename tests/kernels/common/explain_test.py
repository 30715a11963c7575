"""`kernels.explain` says what the compiler does, on every kind of mesh."""

import contextlib

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import kernels
from kernels import kv_cache
from tests.testing import devices

devices.use_cpu_devices(8)

CACHE = jax.ShapeDtypeStruct((8, 128, 2, 128), "float32")
ROWS = jax.ShapeDtypeStruct((8, 1, 2, 128), "float32")


def update(cache, rows):
  return kv_cache.update(cache, cache, rows, rows, 3)


def named(cache, rows):
  return kv_cache.update(cache, cache, rows, rows, 3, implementation="pallas")


def lowered_to(fn, args, platform):
  """Returns what a program that is lowered for a platform really calls."""
  traced = jax.jit(fn).trace(*args)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  if "tpu_custom_call" in text:
    return "pallas"
  if (
    "@fused_nnx_kv_cache_update" in text
    or "implementation\\22: \\22cpu" in text
  ):
    return "cpu"
  return "xla"


def on(mesh):
  sharding = NamedSharding(mesh, P("a"))
  return [
    jax.device_put(jnp.zeros(x.shape, x.dtype), sharding) for x in (CACHE, ROWS)
  ]


def mesh_of(*kinds):
  return jax.make_mesh((4, 2), ("a", "b"), axis_types=kinds)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit


class ExplainTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  def test_a_row_has_shapes_and_the_scope(self):
    @jax.jit
    def step(cache, rows):
      with jax.named_scope("attn"):
        return update(cache, rows)

    def model(cache, rows):
      with jax.named_scope("Net"):
        return jax.grad(lambda rows: step(cache, rows)[0].sum())(rows)

    choice = kernels.explain(model, CACHE, ROWS)[0]
    self.assertEqual(choice.scope, "Net/attn")
    self.assertEqual(choice.shapes[0], "f32[8,128,2,128]")
    self.assertEqual(choice.shapes[2], "f32[8,1,2,128]")

  def check(self, fn, args, platform, want):
    [choice] = kernels.explain(fn, *args, platform=platform)
    self.assertEqual(choice.implementation, lowered_to(fn, args, platform))
    self.assertEqual(choice.implementation, want)
    self.assertNotIn("depends", choice.reason)
    return choice

  @parameterized.parameters("cpu", "tpu")
  def test_one_device(self, platform):
    want = {"cpu": "cpu", "tpu": "pallas"}[platform]
    args = [jnp.zeros(x.shape, x.dtype) for x in (CACHE, ROWS)]
    choice = self.check(update, args, platform, want)
    self.assertEqual(choice.split, "")

  @parameterized.parameters("cpu", "tpu")
  def test_arrays_on_several_devices(self, platform):
    want = {"cpu": "cpu", "tpu": "xla"}[platform]
    choice = self.check(update, on(mesh_of(AUTO, AUTO)), platform, want)
    self.assertEqual(choice.split, "compiler" if platform == "cpu" else "")
    if platform == "tpu":
      self.assertEqual(
        choice.reason,
        "pallas is not used because the compiler for tpu splits the program"
        " over devices here and cannot split pallas.",
      )

  @parameterized.parameters("cpu", "tpu")
  def test_shapes_with_shardings(self, platform):
    mesh = mesh_of(AUTO, AUTO)
    args = [
      x.update(sharding=NamedSharding(mesh, P("a"))) for x in (CACHE, ROWS)
    ]
    self.check(update, args, platform, {"cpu": "cpu", "tpu": "xla"}[platform])

  @parameterized.product(platform=("cpu", "tpu"), set_mesh=(False, True))
  def test_explicit_axes(self, platform, set_mesh):
    mesh = mesh_of(EXPLICIT, EXPLICIT)
    want = {"cpu": "cpu", "tpu": "pallas"}[platform]
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
      choice = self.check(update, on(mesh), platform, want)
    self.assertEqual(choice.split, {"cpu": "compiler", "tpu": "mesh"}[platform])

  @parameterized.parameters("cpu", "tpu")
  def test_a_mesh_that_is_set(self, platform):
    args = [jnp.zeros(x.shape, x.dtype) for x in (CACHE, ROWS)]
    with jax.set_mesh(mesh_of(AUTO, AUTO)):
      self.check(update, args, platform, {"cpu": "cpu", "tpu": "xla"}[platform])

  @parameterized.parameters("cpu", "tpu")
  def test_a_constraint_inside(self, platform):
    sharding = NamedSharding(mesh_of(AUTO, AUTO), P("a"))

    def fn(cache, rows):
      return update(jax.lax.with_sharding_constraint(cache, sharding), rows)

    args = [jnp.zeros(x.shape, x.dtype) for x in (CACHE, ROWS)]
    self.check(fn, args, platform, {"cpu": "cpu", "tpu": "xla"}[platform])

  @parameterized.product(
    platform=("cpu", "tpu"),
    manual=(("a", "b"), ("a",)),
    kinds=((AUTO, AUTO), (EXPLICIT, EXPLICIT), (AUTO, EXPLICIT)),
  )
  def test_shard_map(self, platform, manual, kinds):
    mesh = mesh_of(*kinds)
    fn = jax.shard_map(
      update, mesh=mesh, in_specs=P("a"), out_specs=P("a"),
      axis_names=set(manual), check_vma=False,
    )  # fmt: skip
    whole = len(manual) == 2 or kinds[1] == EXPLICIT
    want = {"cpu": "cpu", "tpu": "pallas" if whole else "xla"}[platform]
    context = jax.set_mesh(mesh) if EXPLICIT in kinds else None
    with context or contextlib.nullcontext():
      self.check(fn, on(mesh), platform, want)

  def test_shard_map_in_shard_map(self):
    mesh = mesh_of(AUTO, AUTO)

    def inner(cache, rows):
      return jax.shard_map(
        update, in_specs=P(None, None, "b"), out_specs=P(None, None, "b"),
        axis_names={"b"}, check_vma=False,
      )(cache, rows)  # fmt: skip

    fn = jax.shard_map(
      inner, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"},
      check_vma=False,
    )  # fmt: skip
    self.check(fn, on(mesh), "tpu", "pallas")

  def test_shapes_that_lie_nowhere_depend(self):
    [choice] = kernels.explain(update, CACHE, ROWS, platform="tpu")
    self.assertEqual(choice.implementation, "pallas")
    self.assertRegex(
      choice.reason,
      "^It is written for tpu and takes these. It depends on the arguments'"
      " shardings: where the compiler splits the program over several devices,"
      " xla runs: pallas is not used because",
    )
    [choice] = kernels.explain(update, CACHE, ROWS, platform="cpu")
    self.assertEqual(choice.reason, "It is written for cpu and takes these.")
    [choice] = kernels.explain(named, CACHE, ROWS, platform="tpu")
    self.assertRegex(choice.reason, "^It was asked for. It depends .* this is")

  def test_what_is_refused_is_refused(self):
    args = on(mesh_of(AUTO, AUTO))
    for call in (kernels.explain, None):
      with self.assertRaisesRegex(
        ValueError, "cannot be split over devices by the compiler for tpu. Call"
      ):
        if call:
          call(named, *args, platform="tpu")
        else:
          lowered_to(named, args, "tpu")


if __name__ == "__main__":
  absltest.main()
