"""A profile's trace names layers, kernels and the optimizer."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import nnx


class Attention(nnx.Module):
  def __init__(self, rngs):
    self.query = nnx.Linear(16, 16, rngs=rngs)

  def __call__(self, x):
    return self.query(x)


class Block(nnx.Module):
  def __init__(self, rngs):
    self.attn = Attention(rngs)
    self.norm = nnx.BatchNorm(16, rngs=rngs)

  def __call__(self, x):
    return self.norm(self.attn(x))


class Net(nnx.Module):
  def __init__(self, rngs):
    self.blocks = nnx.List([Block(rngs) for _ in range(2)])

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return x


class Decoder(nnx.Module):
  def __init__(self, rngs):
    self.attn = nnx.MultiHeadAttention(2, 64, decode=True, rngs=rngs)
    self.attn.init_cache((1, 8, 64))

  def __call__(self, x):
    return self.attn(x)


@nnx.jit
def train_step(model, optimizer, x):
  loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
  optimizer.update(model, grads)
  return loss


@nnx.jit
def decode_step(model, token):
  return model(token)


def traced(function, *arguments, folder: pathlib.Path) -> tuple[set, bytes]:
  """Where a call spends its time by its trace, and the trace."""
  text = function.lower(*arguments).compile().as_text()
  name = f"jit_{function.__name__}"
  where = dict(
    re.findall(
      rf'%(\S+) = .*op_name="jit\({function.__name__}\)/([^"]*)"', text
    )
  )
  function(*arguments)
  with jax.profiler.trace(folder):
    jax.block_until_ready(function(*arguments))
  (file,) = folder.rglob("*.xplane.pb")
  events = {
    event.name
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes
    for line in plane.lines
    for event in line.events
    if dict(event.stats).get("hlo_module") == name
  }
  # XLA says of some instructions not for what they are: copies, for instance.
  return {where[e] for e in events & where.keys()}, file.read_bytes()


def test_a_training_step(tmp_path):
  model = Net(nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
  x = jnp.ones((64, 16))
  places, trace = traced(train_step, model, optimizer, x, folder=tmp_path)
  for index in range(2):
    block = f"(Net)/blocks_{index}"
    assert any(f"jvp{block}/attn/query/" in place for place in places)
    back = f"transpose(jvp(Net))/blocks_{index}/norm/batch_stat_"
    assert any(place.startswith(back) for place in places)
  assert any(place.startswith("Optimizer/") for place in places)
  # No layer, and no optimizer: the loss.
  outside = {p for p in places if "Net" not in p and "Optimizer" not in p}
  assert all("jvp()" in place for place in outside), outside
  # Viewers read the names off the program, which is in the trace.
  assert b"jit(train_step)/jvp(Net)/blocks_1/attn/query/dot_general" in trace


def test_a_decode_step(tmp_path):
  model = Decoder(nnx.Rngs(0))
  token = jnp.ones((1, 1, 64))
  places, trace = traced(decode_step, model, token, folder=tmp_path)
  for part in ("query", "key", "value", "out", "decode_attention"):
    assert any(p.startswith(f"Decoder/attn/{part}/") for p in places), part
  assert all(place.startswith("Decoder/attn/") for place in places), places
  assert b"jit(decode_step)/Decoder/attn/decode_attention/" in trace


@pytest.mark.parametrize("on", [True, False])
def test_the_optimizer_is_named_as_modules_are(on):
  model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
  with nnx.set_named_scopes(on):
    lowered = nnx.jit(
      lambda m, o, x: o.update(m, nnx.grad(lambda m: m(x).sum())(m))
    )
    text = lowered.lower(model, optimizer, jnp.ones((1, 2))).as_text(
      debug_info=True
    )
  assert ("/Optimizer/" in text) == on
