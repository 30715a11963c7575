"""Decode attention on eight devices: same numbers, no cache gathered."""

import functools

from absl.testing import parameterized
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from kernels import decode_attention as da
from kernels.decode_attention import ffi
from tests.kernels.kv_cache import oracle as cache_oracle
from tests.testing import devices, hlo, tolerances

devices.use_cpu_devices(8)

MOVES = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def arguments(layout="bsnh", b=4, s=32, t=2, n=4, g=2, h=16, dtype="float32"):
  rng = np.random.default_rng(0)
  order = (lambda x, y: (x, y)) if layout == "bsnh" else (lambda x, y: (y, x))
  new = "float32" if dtype in cache_oracle.QUANTIZED else dtype
  return [
    cache_oracle.random(rng, (b, *order(length, heads), h), kind)
    for length, heads, kind in (
      (s, n, dtype), (s, n, dtype), (t, n * g, new), (t, n, new), (t, n, new)
    )
  ]  # fmt: skip


class ShardingTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    devices.need_devices(8)

  def check(
    self, mesh, cache_spec, new_spec, args, index, reduces=False, **kwargs
  ):
    """Compares a run on the mesh with the reference on one device."""

    def place(x, spec):
      return jax.device_put(x, NamedSharding(mesh, spec))

    caches = [place(x, cache_spec) for x in args[:2]]
    new = [place(x, new_spec) for x in args[2:]]
    index = np.asarray(index, np.int32)
    fn = functools.partial(da.decode_attention, return_lse=True, **kwargs)
    step = jax.jit(fn, donate_argnums=(0, 1))
    compiled = hlo.compiled(step.lower(*caches, *new, index))
    text = compiled.as_text()
    plain = kwargs.get("implementation") == "xla"
    assert bool(hlo.custom_calls(text, ffi.APPEND_TARGET)) != plain
    for name in MOVES:
      assert not hlo.instructions(text, name), name
    assert bool(hlo.instructions(text, "all-reduce")) == reduces
    local = caches[0].sharding.shard_shape(caches[0].shape)
    assert plain or not hlo.instructions(text, "copy", local)
    want = jax.jit(functools.partial(fn, implementation="xla"))(*args, index)
    got = compiled(*caches, *new, index)
    for g, w in zip(got[:2], want[:2]):
      rotated = 1e-6 if "rope_cos" in kwargs else 0.0
      np.testing.assert_allclose(
        np.asarray(g, np.float32), np.asarray(w, np.float32), atol=rotated
      )
    for g, w in zip(got[2:], want[2:]):
      finite = np.isfinite(np.asarray(w, np.float32))
      np.testing.assert_array_equal(np.isfinite(g), finite)
      tolerances.assert_close(
        np.asarray(g)[finite], np.asarray(w)[finite], args[2].dtype, reduced=8
      )

  @parameterized.product(axis=tuple("bsn"), layout=("bsnh", "bnsh"))
  def test_plain_xla(self, axis, layout):
    mesh = devices.auto_mesh((4,), ("x",))
    k, v, *new = arguments(layout)
    spec = P(*[None] * layout.index(axis), "x")
    rows = P() if axis == "s" else spec
    kwargs = {"implementation": "xla", "layout": layout}
    if layout == "bnsh":  # a stack of layers as well
      k, v, kwargs["layer"] = jnp.stack([k, v]), jnp.stack([v, k]), 1
      spec = P(None, *spec)
    self.check(
      mesh, spec, rows, [k, v, *new], [0, 3, 30, 17], reduces=axis == "s",
      **kwargs,
    )  # fmt: skip

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
      mesh, spec, spec, arguments(dtype=dtype), [0, 3, 30, 7], softcap=3.0,
      sinks=np.arange(8, dtype=np.float32), **scales,
    )  # fmt: skip

  @parameterized.product(ring=(False, True), layout=("bsnh", "bnsh"))
  def test_length(self, ring, layout):
    mesh = devices.auto_mesh((2, 4), ("x", "y"))
    spec = P("x", "y") if layout == "bsnh" else P("x", None, "y")
    rng = np.random.default_rng(1)
    self.check(
      mesh, spec, P("x"), arguments(layout),
      [3, 31, 70, 7] if ring else [3, 30, 15, 7],
      reduces=True, layout=layout, ring=ring, window=20,
      sinks=np.arange(8, dtype=np.float32),
      lengths=np.int32([2, 1, 2, 0]),
      bias=rng.normal(size=(4, 1, 2, 32)).astype(np.float32),
      mask=rng.random((1, 8, 1, 32)) < 0.8,
      alibi_slopes=np.linspace(0, 0.3, 8, dtype=np.float32),
    )  # fmt: skip

  def test_length_and_heads_of_one_sequence(self):
    mesh = devices.auto_mesh((2, 4), ("x", "y"))
    cos, sin = da.rope_tables(64, 16)
    self.check(
      mesh, P(None, "x", "y"), P(None, None, "y"), arguments(b=1), 20,
      reduces=True, rope_cos=cos, rope_sin=sin,
    )  # fmt: skip

  def test_stacked_layers(self):
    mesh = devices.auto_mesh((4, 2), ("x", "y"))
    k, v, *new = arguments()
    args = [jnp.stack([k, v]), jnp.stack([v, k]), *new]
    self.check(
      mesh, P(None, "x", None, "y"), P("x", None, "y"), args, 5, layer=1
    )

  def test_blocks_of_a_paged_cache(self):
    mesh = devices.auto_mesh((4, 2), ("x", "y"))
    k, v, *new = arguments(b=8, s=4)
    table = np.int32([[5, 0], [2, 7], [1, 6], [4, -1]])
    self.check(
      mesh, P("x", None, "y"), P(None, None, "y"),
      [k, v, *(x[:4] for x in new)], [0, 3, 6, 1], reduces=True,
      block_table=table,
    )  # fmt: skip

  def test_attend_only(self):
    mesh = devices.auto_mesh((8,), ("x",))
    k, v, q, _, _ = arguments()
    want = da.attend(k, v, q, 30, implementation="xla")
    sharded = NamedSharding(mesh, P(None, "x"))
    step = jax.jit(da.attend)
    k, v = jax.device_put(k, sharded), jax.device_put(v, sharded)
    text = hlo.compiled(step.lower(k, v, q, 30)).as_text()
    for name in MOVES:
      assert not hlo.instructions(text, name), name
    tolerances.assert_close(step(k, v, q, 30), want, "float32")

  @parameterized.parameters("cpu", "xla")
  def test_shard_map(self, implementation):
    mesh = devices.auto_mesh((4, 2), ("x", "y"))
    args = arguments()
    index = np.int32([0, 3, 14, 7])
    spec = P("x", None, "y")
    step = jax.jit(
      jax.shard_map(
        functools.partial(da.decode_attention, implementation=implementation),
        mesh=mesh,
        in_specs=(spec,) * 5 + (P("x"),),
        out_specs=(spec,) * 3,
      )
    )
    want = da.decode_attention(*args, index, implementation="xla")
    for g, w in zip(step(*args, index), want):
      tolerances.assert_close(g, w, "float32")
