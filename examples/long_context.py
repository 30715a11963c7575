"""Trains on long texts and writes, with each text split over eight devices.

Every device has an eighth of the tokens. Attention goes around a ring (Liu et
al., 2023, arXiv:2310.01889): keys and values visit device after device, and
each adds to its queries' results what they see. No device ever has all keys, of
the gradient neither, so a text may be as long as all devices together can hold.
For writing, the cache is split by its length: each device attends to what it
has, and the results are joined.

The model is that of `char_transformer`; eight virtual devices of the CPU stand
for eight real ones. Losses and text are compared with those of one device.

    bazel run //examples:long_context -- --plot long_context.png
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import tqdm

from examples import char_transformer, shared
import nnx
from nnx import kernels

AXIS = "sequence"
DEVICES = 8
BATCH = 2
SIZE = char_transformer.Size(layers=2, features=64, heads=4, context=1024)

Pair = tuple[jax.Array, jax.Array]


def _logits(q: jax.Array, k: jax.Array, ahead: Any, causal: bool) -> jax.Array:
  """Returns `[b, n, g, t, s]`; -inf for keys that are not seen.

  Args:
    q: `[b, n, g, t, h]`.
    k: `[b, s, n, h]`.
    ahead: how many positions the first query stands behind the first key.
    causal: whether later keys are not seen.
  """
  x = jnp.einsum("bngth,bsnh->bngts", q, k, preferred_element_type=jnp.float32)
  x *= q.shape[-1] ** -0.5
  if not causal:
    return x
  queries, keys = jnp.arange(x.shape[-2]), jnp.arange(x.shape[-1])
  return jnp.where(ahead + queries[:, None] >= keys, x, -jnp.inf)


def _attend(q, k, v, ahead, causal) -> Pair:
  """Attends to some of the keys; returns also the logarithms of the sums."""
  x = _logits(q, k, ahead, causal)
  lse = jax.nn.logsumexp(x, -1)
  weights = jnp.exp(x - lse[..., None])
  return jnp.einsum("bngts,bsnh->bngth", weights, v.astype(jnp.float32)), lse


def _pull(q, k, v, lse, delta, to_out, ahead, causal):
  """Returns the gradients of q, k and v that come from some of the keys.

  Args:
    q: as for `_logits`, and so k, ahead and causal.
    k: some of the keys.
    v: their values.
    lse: `[b, n, g, t]`, the logarithms of the sums over all keys.
    delta: `[b, n, g, t]`, the products of results and their gradients.
    to_out: `[b, n, g, t, h]`, the gradients of the results.
    ahead: where the queries stand.
    causal: whether later keys are not seen.
  """
  weights = jnp.exp(_logits(q, k, ahead, causal) - lse[..., None])
  to_v = jnp.einsum("bngts,bngth->bsnh", weights, to_out)
  to_weights = jnp.einsum("bngth,bsnh->bngts", to_out, v.astype(jnp.float32))
  to_x = weights * (to_weights - delta[..., None]) * q.shape[-1] ** -0.5
  to_q = jnp.einsum("bngts,bsnh->bngth", to_x, k.astype(jnp.float32))
  to_k = jnp.einsum("bngts,bngth->bsnh", to_x, q.astype(jnp.float32))
  return to_q, to_k, to_v


def _around(axis: str, causal: bool, visit: Callable, kept: Any, visitors: Any):
  """Lets arrays visit all devices of a ring, one after the other.

  Args:
    axis: of the mesh.
    causal: whether those who come from later devices are not looked at.
    visit: `(kept, visitors, ahead) -> (kept, visitors)`; ahead, in devices, is
      how far this one is behind where the visitors come from.
    kept: what stays here.
    visitors: what goes around, and is home again in the end.
  """
  devices, here = lax.axis_size(axis), lax.axis_index(axis)
  onward = [(i, (i + 1) % devices) for i in range(devices)]

  def hop(carry, hops):
    ahead = here - (here - hops) % devices

    def skip():
      return carry

    def look():
      return visit(*carry, ahead)

    kept, visitors = lax.cond(ahead < 0, skip, look) if causal else look()
    return (kept, lax.ppermute(visitors, axis, onward)), None

  (kept, visitors), _ = lax.scan(hop, (kept, visitors), jnp.arange(devices))
  return kept, visitors


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _ring(q, k, v, axis, causal):
  return _ring_forward(q, k, v, axis, causal)[0]


def _ring_forward(q, k, v, axis, causal):
  def visit(kept, visitors, ahead):
    there = _attend(q, *visitors, ahead * q.shape[-2], causal)
    return kernels.decode_attention.merge(*kept, *there), visitors

  nothing = jnp.zeros_like(q, jnp.float32)
  kept = nothing, nothing[..., 0] - jnp.inf
  (out, lse), _ = _around(axis, causal, visit, kept, (k, v))
  return out, (q, k, v, out, lse)


def _ring_back(axis, causal, saved, to_out):
  q, k, v, out, lse = saved
  delta = (out * to_out).sum(-1)

  def visit(to_q, visitors, ahead):
    k, v, *gradients = visitors
    new_q, *new = _pull(
      q, k, v, lse, delta, to_out, ahead * q.shape[-2], causal
    )
    return to_q + new_q, (k, v, *map(jnp.add, gradients, new))

  zeros = [jnp.zeros_like(x, jnp.float32) for x in (q, k, v)]
  to_q, (_, _, to_k, to_v) = _around(
    axis, causal, visit, zeros[0], (k, v, *zeros[1:])
  )
  return to_q.astype(q.dtype), to_k.astype(k.dtype), to_v.astype(v.dtype)


_ring.defvjp(_ring_forward, _ring_back)


def ring_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, axis: str, causal: bool = True
) -> jax.Array:
  """Attends to the tokens of all devices, inside of a `shard_map`.

  A causal ring takes as long as one that is not: the last device looks at the
  keys of all.

  Args:
    q: `[b, t, n * g, h]`, the queries of this device's tokens; g in a row share
      a key-value head.
    k: `[b, t, n, h]`, the keys of this device's tokens.
    v: like `k`.
    axis: of the mesh, along which devices have one part of each text after the
      other.
    causal: whether no token sees a later one.

  Returns:
    `[b, t, n * g, h]`. Sums are in float32.
  """
  batch, length, heads, size = q.shape
  grouped = q.reshape(batch, length, k.shape[2], -1, size)
  out = _ring(grouped.transpose(0, 2, 3, 1, 4), k, v, axis, causal)
  return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def ring_layers(mesh: jax.sharding.Mesh) -> Callable[..., jax.Array]:
  """Returns an `attention_fn` of layers whose tokens are split over a mesh."""

  def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    dropout_rate: float = 0.0,
    precision: Any = None,
    module: Any = None,
    **unused: Any,
  ) -> jax.Array:
    # Those of dropout, and the dtype that the three have already.
    others = {"broadcast_dropout", "deterministic", "dropout_rng", "dtype"}
    if (
      dropout_rate
      or any(x is not None for x in (mask, precision, module))
      or unused.keys() - others
    ):
      raise ValueError(
        "Ring attention must be causal or whole, but got a `mask`, dropout, a"
        " `precision`, weights to sow, or"
        f" {sorted(unused.keys() - others)}. It takes `is_causal` alone."
      )
    ring = functools.partial(ring_attention, axis=AXIS, causal=is_causal)
    tokens = P(None, AXIS)
    return jax.shard_map(
      ring, mesh=mesh, in_specs=(tokens,) * 3, out_specs=tokens
    )(query, key, value)

  return attend


def attend_to_parts(
  cache_k: jax.Array, cache_v: jax.Array, q: jax.Array, filled: Any, axis: str
) -> jax.Array:
  """Attends to a cache that is split by its length, inside of a `shard_map`.

  So does `kernels.decode_attention` by itself under `jit`, and so do layers.

  Args:
    cache_k: `[b, s, n, h]`, the slots that this device has.
    cache_v: like `cache_k`.
    q: `[b, 1, n * g, h]`, of the last token, the same on all devices.
    filled: how many tokens the whole cache has, at least 1.
    axis: of the mesh.

  Returns:
    `[b, 1, n * g, h]`, the same on all devices.
  """
  slots = cache_k.shape[1]
  here = jnp.clip(filled - lax.axis_index(axis) * slots, 0, slots)
  out, lse = kernels.decode_attention.attend(
    cache_k, cache_v, q, here, out_dtype=jnp.float32, return_lse=True
  )
  # As `decode_attention.merge` does for two.
  weight = jnp.exp(lse - lax.pmax(lse, axis)).swapaxes(1, 2)[..., None]
  return (lax.psum(out * weight, axis) / lax.psum(weight, axis)).astype(q.dtype)


def make_mesh() -> jax.sharding.Mesh:
  """Returns the mesh of all devices."""
  return jax.make_mesh(
    (DEVICES,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
  )


def set_attention(model: Any, attention: Callable[..., jax.Array]) -> None:
  """Lets all layers attend by a function."""
  for block in model.blocks:
    block.attention.attention_fn = attention


@nnx.jit(donate_argnums=(0, 1))
def train_step(
  model: Any, optimizer: nnx.Optimizer, tokens: jax.Array, following: jax.Array
) -> jax.Array:
  """Takes a step; returns the loss before it."""

  def loss(model):
    return optax.softmax_cross_entropy_with_integer_labels(
      model(tokens), following
    ).mean()

  value, grads = nnx.value_and_grad(loss)(model)
  optimizer.update(model, grads)
  return value


def make(symbols: int) -> tuple[Any, nnx.Optimizer]:
  """Returns a model and its optimizer."""
  model = char_transformer.transformer_type()(symbols, SIZE, nnx.Rngs(0))
  return model, nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


def train(
  data: char_transformer.Data,
  steps: int,
  what: str,
  objects: tuple,
  sharding: Any = None,
) -> list[float]:
  """Trains in place; returns the losses. Texts are laid out by `sharding`."""
  random, losses = np.random.default_rng(0), []
  for _ in tqdm.trange(steps, desc=what):
    first = random.integers(len(data.train) - SIZE.context, size=(BATCH, 1))
    text = data.train[first + np.arange(SIZE.context + 1)]
    batch = jax.device_put((text[:, :-1], text[:, 1:]), sharding)
    losses.append(float(train_step(*objects, *batch)))
  return losses


@nnx.jit(donate_argnums=0)
def write_step(model: Any, tokens: jax.Array, start: jax.Array) -> jax.Array:
  """Appends tokens to the caches; returns the likeliest next, `[b, 1]`."""
  logits = model(tokens, start, decode=True)[:, -1:]
  return jnp.argmax(logits, -1).astype(jnp.int32)


def write(
  model: Any, prompt: np.ndarray, tokens: int, sharding: Any = None
) -> list[int]:
  """Goes on with a text; the caches are split by `sharding`."""
  set_attention(model, nnx.dot_product_attention)
  nnx.init_cache(model, 1, SIZE.context, sharding=sharding)
  token, position, written = jnp.asarray(prompt)[None], 0, []
  for _ in range(tokens):
    count = token.shape[1]
    token = write_step(model, token, jnp.int32(position))
    position += count
    written.append(token)
  return [int(token[0, 0]) for token in written]


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains and writes on the ring and on one device, and compares."""
  options = shared.options(__doc__, arguments, steps=40, tokens=64)
  data, mesh = char_transformer.load(), make_mesh()
  symbols = len(data.alphabet)
  prompt = data.test[: SIZE.context - options.tokens]
  with jax.set_mesh(mesh):
    objects = nnx.jit(make, static_argnums=0, out_shardings=P())(symbols)
    set_attention(objects[0], ring_layers(mesh))
    tokens = NamedSharding(mesh, P(None, AXIS))
    many = train(data, options.steps, "8 devices", objects, tokens)
    text = write(objects[0], prompt, options.tokens, P(None, AXIS))
  cache = objects[0].blocks[0].attention.cached_key.value
  part = cache.addressable_shards[0].data.shape
  print(f"cached keys {cache.shape}, {part} a device")
  alone = make(symbols)
  one = train(data, options.steps, "1 device", alone)
  np.testing.assert_allclose(many, one, rtol=0.02)
  nnx.update(alone[0], jax.device_get(nnx.state(objects[0], nnx.Param)))
  same = (
    "the same" if write(alone[0], prompt, options.tokens) == text else "another"
  )
  print(f"one device writes {same} text: {data.decode(text)!r}")
  lines = {"8 devices": many, "1 device": one}
  shared.plot(options.plot, "training loss, nats a character", lines)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", DEVICES)
  main()
