"""The cache update on eight virtual devices: same bits, nothing gathered."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from kernels import kv_cache
from kernels.kv_cache import ffi
from tests.kernels.kv_cache import oracle as oracles
from tests.testing import devices, hlo

devices.use_cpu_devices(8)

COLLECTIVES = (
  "all-gather", "all-to-all", "collective-permute", "all-reduce",
  "reduce-scatter",
)  # fmt: skip


def arguments(layout="bsnh", b=4, s=16, t=2, n=4, h=8, dtype="float32"):
  rng = np.random.default_rng(0)
  order = (lambda x, y: (x, y)) if layout == "bsnh" else (lambda x, y: (y, x))
  new = "float32" if dtype in oracles.QUANTIZED else dtype
  return [
    oracles.random(rng, (b, *order(length, n), h), kind)
    for length, kind in ((s, dtype), (s, dtype), (t, new), (t, new))
  ]


class ShardingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  def check(self, mesh, cache_spec, new_spec, args, index, **kwargs):
    """Runs the update under jit with these shardings."""

    def place(x, spec):
      return jax.device_put(x, NamedSharding(mesh, spec))

    caches = [place(x, cache_spec) for x in args[:2]]
    new = [place(x, new_spec) for x in args[2:]]
    index = np.asarray(index, np.int32)
    step = jax.jit(
      functools.partial(kv_cache.update, **kwargs), donate_argnums=(0, 1)
    )
    compiled = hlo.compiled(step.lower(*caches, *new, index))
    text = compiled.as_text()
    plain = kwargs.pop("implementation", None) == "xla"
    assert bool(hlo.custom_calls(text, ffi.TARGET)) != plain
    for name in COLLECTIVES:
      assert not hlo.instructions(text, name), name
    local = caches[0].sharding.shard_shape(caches[0].shape)
    assert not hlo.instructions(text, "copy", local)
    assert hlo.aliased_bytes(compiled) >= 2 * np.prod(local) * (
      caches[0].dtype.itemsize
    )
    got = compiled(*caches, *new, index)
    for g, w in zip(got, oracles.update(*args, index, **kwargs)):
      assert g.sharding.is_equivalent_to(
        NamedSharding(mesh, cache_spec), g.ndim
      )
      np.testing.assert_array_equal(g, w)

  @parameterized.parameters("float32", "bfloat16", "int8")
  def test_batch_and_heads(self, dtype):
    mesh = devices.auto_mesh((4, 2), ("x", "y"))
    spec = P("x", None, "y", None)
    scales = (
      {"k_scale": 0.25, "v_scale": np.float32([0.5, 1, 2, 4])}
      if dtype == "int8"
      else {}
    )
    self.check(
      mesh, spec, spec, arguments(dtype=dtype), [0, 3, 14, 7], **scales
    )

  @parameterized.product(ring=(False, True), layout=("bsnh", "bnsh"))
  def test_length(self, ring, layout):
    mesh = devices.auto_mesh((2, 4), ("x", "y"))
    spec = P("x", "y") if layout == "bsnh" else P("x", None, "y")
    # Positions that straddle two devices' parts, and wrap around.
    index = [3, 15, 33, 7] if ring else [3, 14, 11, 7]
    self.check(
      mesh, spec, P("x"), arguments(layout), index, ring=ring, layout=layout
    )

  def test_length_over_two_axes(self):
    mesh = devices.auto_mesh((2, 4), ("x", "y"))
    self.check(mesh, P(None, ("y", "x")), P(), arguments(), [0, 3, 14, 7])

  @parameterized.product(
    axis=tuple("bsn"), layout=("bsnh", "bnsh"), stacked=(0, 1)
  )
  def test_plain_xla(self, axis, layout, stacked):
    mesh = devices.auto_mesh((4,), ("x",))
    k, v, *new = arguments(layout)
    spec = P(*[None] * layout.index(axis), "x")
    rows = P() if axis == "s" else spec
    kwargs = {"implementation": "xla", "layout": layout}
    if stacked:
      k, v, kwargs["layer"] = jnp.stack([k, v]), jnp.stack([v, k]), 1
      spec = P(None, *spec)
    self.check(mesh, spec, rows, [k, v, *new], [0, 3, 14, 7], **kwargs)

  def test_stacked_layers(self):
    mesh = devices.auto_mesh((4, 2), ("x", "y"))
    k, v, *new = arguments()
    args = [jnp.stack([k, v]), jnp.stack([v, k]), *new]
    self.check(
      mesh, P(None, "x", None, "y"), P("x", None, "y"), args, 5, layer=1
    )

  def test_blocks_of_a_paged_cache(self):
    mesh = devices.auto_mesh((4, 2), ("x", "y"))
    k, v, new_k, new_v = arguments(b=8, s=4)
    table = np.int32([[5, 0], [2, 7], [1, 6], [4, -1]])
    self.check(
      mesh, P("x", None, "y"), P(None, None, "y"),
      [k, v, new_k[:4], new_v[:4]], [0, 3, 6, 1], block_table=table,
    )  # fmt: skip

  def test_head_dim_is_made_whole(self):
    mesh = devices.auto_mesh((8,), ("x",))
    args = arguments()
    spec = NamedSharding(mesh, P(None, None, None, "x"))
    got = jax.jit(kv_cache.update)(*(jax.device_put(x, spec) for x in args), 3)
    for g, w in zip(got, oracles.update(*args, 3)):
      np.testing.assert_array_equal(g, w)

  @parameterized.parameters("cpu", "xla")
  def test_shard_map(self, implementation):
    mesh = devices.auto_mesh((4, 2), ("x", "y"))
    args = arguments()
    index = np.int32([0, 3, 14, 7])
    cache, new = P("x", None, "y"), P("x", None, "y")
    step = jax.jit(
      jax.shard_map(
        functools.partial(kv_cache.update, implementation=implementation),
        mesh=mesh,
        in_specs=(cache, cache, new, new, P("x")),
        out_specs=(cache, cache),
      ),
      donate_argnums=(0, 1),
    )

    def place(x, spec):
      return jax.device_put(x, NamedSharding(mesh, spec))

    arrays = [place(x, cache) for x in args]
    text = hlo.compiled(step.lower(*arrays, index)).as_text()
    for name in COLLECTIVES:
      assert not hlo.instructions(text, name), name
    for g, w in zip(step(*arrays, index), oracles.update(*args, index)):
      np.testing.assert_array_equal(g, w)

  def test_length_by_hand_in_shard_map(self):
    mesh = devices.auto_mesh((8,), ("x",))
    args = arguments()

    def local(k, v, new_k, new_v, index):
      first = jax.lax.axis_index("x") * k.shape[1]
      return kv_cache.update(k, v, new_k, new_v, index - first)

    spec = P(None, "x")
    step = jax.jit(
      jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, P(), P(), P()),
        out_specs=(spec, spec),
      )
    )  # fmt: skip
    index = np.int32([0, 3, 14, 7])
    for g, w in zip(step(*args, index), oracles.update(*args, index)):
      np.testing.assert_array_equal(g, w)
