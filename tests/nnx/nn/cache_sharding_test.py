"""Caches of attention layers on meshes: where they lie, and what steps cost."""

import contextlib

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import nnx
from tests.testing import devices, hlo

devices.use_cpu_devices(8)

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MOVES = ("all-gather", "all-to-all", "collective-permute")
ANNOTATIONS = {
  "kernel_metadata": {"out_sharding": (None, "heads", None)},
  "bias_metadata": {"out_sharding": ("heads", None)},
  "out_kernel_metadata": {"out_sharding": ("heads", None, None)},
  "out_bias_metadata": {"out_sharding": (None,)},
}
ROWS = ("data", None, "model", None)


@pytest.fixture
def compiled_programs():
  names = []

  def listen(name, duration, **kwargs):
    del duration, kwargs
    if "backend_compile" in name:
      names.append(name)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield names
  jax.monitoring.unregister_event_duration_listener(listen)


def layer_on(mesh, annotated):
  metadata = ANNOTATIONS if annotated else {}
  with jax.set_mesh(mesh), nnx.logical_axis_rules([("heads", "model")]):
    layer = nnx.MultiHeadAttention(
      8, 32, num_kv_heads=4, decode=True, rngs=nnx.Rngs(0), **metadata
    )
  if not annotated:
    for projection in (layer.query, layer.key, layer.value):
      kernel = projection.kernel
      spec = NamedSharding(mesh, P(None, "model", None))
      kernel.value = jax.device_put(kernel.value, spec)
    spec = NamedSharding(mesh, P("model"))
    layer.out.kernel.value = jax.device_put(layer.out.kernel.value, spec)
  return layer


@pytest.mark.parametrize(
  "kind, annotated, sharding, dtype",
  [
    (AUTO, True, None, "float32"),
    (AUTO, True, ROWS, "int8"),
    (AUTO, False, None, "int8"),
    (EXPLICIT, True, None, "float32"),
    (EXPLICIT, True, ROWS, "int8"),
  ],
)
def test_steps_compile_once_and_move_nothing(
  compiled_programs, kind, annotated, sharding, dtype
):
  devices.need_devices(8)
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
  layer = layer_on(mesh, annotated)
  rows = P("data") if sharding else P()
  options = {"out_sharding": rows} if kind == EXPLICIT else {}
  x = jax.random.normal(jax.random.key(0), (4, 1, 32))
  placed = jax.device_put(x, NamedSharding(mesh, rows))
  step = nnx.jit(lambda layer, x: layer(x, **options))
  with jax.set_mesh(mesh), nnx.logical_axis_rules([("heads", "model")]):
    layer.init_cache(
      (4, 16, 32), jnp.dtype(dtype), per_sequence=True, sharding=sharding
    )
    lies = NamedSharding(mesh, P(*(sharding or (None, None, "model"))))
    for cache in (layer.cached_key, layer.cached_value):
      assert cache.value.sharding.is_equivalent_to(lies, 4)
    assert len(layer.cache_index.value.sharding.device_set) == 8
    graphdef, state = nnx.split(layer)

    def pure(state, x):
      layer = nnx.merge(graphdef, state)
      return layer(x, **options), nnx.state(layer)

    compiled = jax.jit(pure, donate_argnums=0).lower(state, placed).compile()
    text = compiled.as_text()
    for move in MOVES:
      assert not hlo.instructions(text, move), move
    step(layer, placed)
    compiled_programs.clear()
    y = step(layer, placed)
  assert not compiled_programs
  assert layer.cached_key.value.sharding.is_equivalent_to(lies, 4)

  alone = nnx.MultiHeadAttention(
    8, 32, num_kv_heads=4, decode=True, rngs=nnx.Rngs(0)
  )
  alone.init_cache((4, 16, 32), jnp.dtype(dtype), per_sequence=True)
  alone(x)
  np.testing.assert_allclose(y, alone(x), rtol=1e-4, atol=1e-5)


def test_without_a_mesh_annotations_are_kept():
  layer = nnx.MultiHeadAttention(
    4, 8, decode=True, rngs=nnx.Rngs(0), **ANNOTATIONS
  )
  layer.init_cache((2, 5, 8))
  assert layer.cached_key.out_sharding == P(None, None, "heads", None)
  assert layer.cache_index.out_sharding == P()
  layer(jnp.ones((2, 1, 8)))


def test_a_kernel_that_is_a_plain_array_or_a_shape():
  devices.need_devices(8)
  mesh = devices.auto_mesh((2,), ("heads",))
  layer = nnx.MultiHeadAttention(4, 8, decode=True, rngs=nnx.Rngs(0))
  layer.key.kernel = jax.device_put(
    layer.key.kernel.value, NamedSharding(mesh, P(None, "heads"))
  )
  layer.init_cache((2, 5, 8))
  assert layer.cached_key.value.sharding.spec[2] == "heads"

  def make():
    layer = nnx.MultiHeadAttention(
      4, 8, decode=True, rngs=nnx.Rngs(0), **ANNOTATIONS
    )
    layer.init_cache((2, 5, 8))
    return layer

  assert nnx.eval_shape(make).cached_key.shape == (2, 5, 4, 2)
  with jax.set_mesh(mesh):
    layer = nnx.jit(make)()
    nnx.eval_shape(make).init_cache((2, 5, 8))
  lies = NamedSharding(mesh, P(None, None, "heads"))
  assert layer.cached_key.value.sharding.is_equivalent_to(lies, 4)


def test_a_sharding_that_brings_its_mesh():
  devices.need_devices(8)
  mesh = devices.auto_mesh((8,), ("rows",))
  layer = nnx.MultiHeadAttention(4, 8, decode=True, rngs=nnx.Rngs(0))
  layer.init_cache(
    (8, 5, 8), per_sequence=True, sharding=NamedSharding(mesh, P("rows"))
  )
  assert layer.cached_value.value.sharding.spec[0] == "rows"
  assert layer.cache_index.value.sharding.spec == P("rows")


@pytest.mark.parametrize("places", [True, False])
def test_caches_are_placed_where_variables_are(places):
  devices.need_devices(8)
  mesh = devices.auto_mesh((2,), ("heads",))
  switch = contextlib.nullcontext() if places else nnx.use_eager_sharding(False)
  with jax.set_mesh(mesh), switch:
    layer = nnx.MultiHeadAttention(
      4, 8, decode=True, rngs=nnx.Rngs(0), **ANNOTATIONS
    )
    layer.init_cache((2, 5, 8))
  assert ("heads" in layer.cached_key.value.sharding.spec) == places


@pytest.mark.parametrize("sharding", ["data", 1, ("data",) * 5, P(*"abcde")])
def test_a_sharding_that_cannot_be_meant_is_refused(sharding):
  layer = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="each of the 4 axes of a cache"):
    nnx.init_cache(layer, 2, 8, sharding=sharding)
  assert layer.cached_key is None
