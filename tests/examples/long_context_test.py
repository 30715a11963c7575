"""Tests of attention over texts that are split over devices."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from examples import char_transformer, long_context
import nnx
from nnx import kernels
from tests.testing import devices, hlo

devices.use_cpu_devices(8)

TOKENS = P(None, long_context.AXIS)
SMALL = char_transformer.Size(layers=2, features=32, heads=4, context=64)


@pytest.fixture(autouse=True)
def enough_devices():
  devices.need_devices(8)


def arrays(tokens=64, heads=2, group=2, size=8):
  keys = jax.random.split(jax.random.key(0), 4)
  shapes = [(2, tokens, n, size) for n in (heads * group, heads, heads)]
  return [jax.random.normal(*x) for x in zip(keys, [*shapes, shapes[0]])]


def ring(causal):
  return jax.shard_map(
    functools.partial(
      long_context.ring_attention, axis=long_context.AXIS, causal=causal
    ),
    mesh=long_context.make_mesh(),
    in_specs=(TOKENS,) * 3,
    out_specs=TOKENS,
  )


def pulled(attend, q, k, v, to_out):
  out, pull = jax.vjp(attend, q, k, v)
  return out, pull(to_out)


@pytest.mark.parametrize("causal", (True, False))
@pytest.mark.parametrize("group", (1, 4))
def test_the_ring_is_attention_in_value_and_gradient(causal, group):
  q, k, v, to_out = arrays(group=group)

  def whole(q, k, v):
    k, v = (jnp.repeat(x, group, 2) for x in (k, v))
    return nnx.dot_product_attention(q, k, v, is_causal=causal)

  ours, theirs = (
    jax.jit(functools.partial(pulled, attend))(q, k, v, to_out)
    for attend in (ring(causal), whole)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    ours,
    theirs,
  )


def test_16_bit_queries_give_16_bit_results():
  q, k, v, to_out = (x.astype(jnp.bfloat16) for x in arrays())
  out, gradients = jax.jit(functools.partial(pulled, ring(True)))(
    q, k, v, to_out
  )
  assert {x.dtype for x in (out, *gradients)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("causal", (True, False))
def test_keys_and_values_go_around_and_are_never_gathered(causal):
  placed = NamedSharding(long_context.make_mesh(), TOKENS)
  args = [jax.device_put(x, placed) for x in arrays()]
  step = jax.jit(functools.partial(pulled, ring(causal)))
  text = step.lower(*args).compile().as_text()
  assert hlo.instructions(text, "collective-permute")
  for opcode in ("all-gather", "all-to-all", "all-reduce"):
    assert not hlo.instructions(text, opcode)
  for whole in (args[0].shape, args[1].shape):
    stacked = (8, whole[0], whole[1] // 8, *whole[2:])
    for shape in (whole, stacked):
      assert hlo.shape_text(shape) not in text


def test_a_model_on_a_ring_learns_as_on_one_device():
  mesh, symbols = long_context.make_mesh(), 11
  text = np.random.default_rng(0).integers(symbols, size=(2, 65))
  batch = text[:, :-1].astype(np.int32), text[:, 1:].astype(np.int32)

  def losses(step):
    return [float(step(*objects, *batch)) for _ in range(3)]

  with mock.patch.object(long_context, "SIZE", SMALL):
    objects = long_context.make(symbols)
    one = losses(long_context.train_step)
    with jax.set_mesh(mesh):
      make = nnx.jit(long_context.make, static_argnums=0, out_shardings=P())
      objects = make(symbols)
      long_context.set_attention(objects[0], long_context.ring_layers(mesh))
      batch = jax.device_put(batch, NamedSharding(mesh, TOKENS))
      compiled = long_context.train_step.lower(*objects, *batch).compile()
      many = losses(compiled)
  np.testing.assert_allclose(many, one, rtol=1e-4)
  program = compiled.as_text()
  assert hlo.instructions(program, "collective-permute")
  assert not hlo.instructions(program, "all-gather")


def test_layers_refuse_what_a_ring_cannot_do():
  attend = long_context.ring_layers(long_context.make_mesh())
  q, k, v, _ = arrays(group=1)
  for options in (
    {"mask": jnp.ones((64, 64), bool)},
    {"dropout_rate": 0.5},
    {"window": (3, 0)},
  ):
    with pytest.raises(ValueError, match="must be causal or whole, but got"):
      attend(q, k, v, **options)


@pytest.mark.parametrize("filled", (1, 8, 9, 64))
def test_parts_of_a_cache_are_attended_to_where_they_lie(filled):
  q, k, v, _ = arrays()
  q = q[:, :1]
  mesh = long_context.make_mesh()
  attend = jax.jit(
    jax.shard_map(
      functools.partial(long_context.attend_to_parts, axis=long_context.AXIS),
      mesh=mesh,
      in_specs=(TOKENS, TOKENS, P(), P()),
      out_specs=P(),
    )
  )
  k, v = (jax.device_put(x, NamedSharding(mesh, TOKENS)) for x in (k, v))
  out = attend(k, v, q, jnp.int32(filled))
  want = kernels.decode_attention.attend(
    *map(np.asarray, (k, v, q)), filled, implementation="xla"
  )
  np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
  text = attend.lower(k, v, q, jnp.int32(filled)).compile().as_text()
  for opcode in ("all-gather", "all-to-all", "collective-permute"):
    assert not hlo.instructions(text, opcode)
  assert hlo.shape_text(k.shape) not in text


def test_program_writes_the_same_text_with_a_cache_in_parts(capsys, tmp_path):
  with mock.patch.object(long_context, "SIZE", SMALL):
    long_context.main(
      ["--steps=2", "--tokens=9", f"--plot={tmp_path / 'ring.png'}"]
    )
    said = capsys.readouterr().out
    assert "cached keys (1, 64, 1, 8), (1, 8, 1, 8) a device" in said
    assert "one device writes the same text" in said
  assert (tmp_path / "ring.png").exists()


def test_a_step_of_writing_gathers_no_cache():
  mesh = long_context.make_mesh()
  with mock.patch.object(long_context, "SIZE", SMALL), jax.set_mesh(mesh):
    make = nnx.jit(long_context.make, static_argnums=0, out_shardings=P())
    model, _ = make(11)
    nnx.init_cache(model, 1, SMALL.context, sharding=TOKENS)
    lowered = long_context.write_step.lower(
      model, jnp.zeros((1, 1), jnp.int32), jnp.int32(3)
    )
    cache = model.blocks[0].attention.cached_key.value
  text = hlo.compiled(lowered).as_text()
  assert hlo.shape_text(cache.shape) not in text
  for opcode in ("all-gather", "all-to-all", "collective-permute"):
    for part in (cache.shape, cache.addressable_shards[0].data.shape):
      assert not hlo.instructions(text, opcode, part)
