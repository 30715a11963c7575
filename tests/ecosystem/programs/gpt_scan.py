"""Trains a GPT whose blocks are one scan, then writes with its caches."""

import functools
import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 32, 32, 4, 3, 16


class Block(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      HEADS, WIDTH, decode=False, use_bias=False, rngs=rngs
    )
    self.norm2 = nnx.RMSNorm(WIDTH, rngs=rngs)
    self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
    self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x, mask=None):
    x = x + self.dropout(self.attention(self.norm1(x), mask=mask))
    return x + self.dropout(self.down(nnx.gelu(self.up(self.norm2(x)))))


class GPT(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=(0,), out_axes=0, transform_metadata={"sharding": None})
    def blocks(rngs):
      return Block(rngs)

    self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
    self.positions = nnx.Param(
      nnx.initializers.normal(0.02)(rngs.params(), (LENGTH, WIDTH))
    )
    self.blocks = blocks(rngs)
    self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

  def __call__(self, tokens, first=0, mask=None):
    positions = jax.lax.dynamic_slice_in_dim(
      self.positions[...], first, tokens.shape[1]
    )
    x = self.embed(tokens) + positions

    @nnx.scan(in_axes=(0, nnx.Carry, None), out_axes=nnx.Carry)
    @nnx.remat
    def through(block, x, mask):
      return block(x, mask)

    return self.embed.attend(self.norm(through(self.blocks, x, mask)))


def loss_of(model, tokens):
  mask = nnx.make_causal_mask(tokens[:, :-1])
  logits = model(tokens[:, :-1], mask=mask)
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, tokens[:, 1:]
  )
  return losses.mean(), logits


@nnx.jit
def step(model, optimizer, metrics, tokens):
  (loss, logits), grads = nnx.value_and_grad(loss_of, has_aux=True)(
    model, tokens
  )
  metrics.update(loss=loss, logits=logits, labels=tokens[:, 1:])
  optimizer.update(model, grads)


@functools.partial(nnx.jit, static_argnames="count")
def write(model, token, count):
  @nnx.scan(
    in_axes=(nnx.StateAxes({...: nnx.Carry}), nnx.Carry, 0),
    out_axes=(nnx.Carry, 0),
  )
  def one(model, token, index):
    token = model(token, index)[:, -1:].argmax(-1)
    return token, token[:, 0]

  return one(model, token, jnp.arange(count))[1].T


def decay(params):
  return jax.tree.map(lambda p: p.ndim > 1, params)


model = GPT(nnx.Rngs(0, params=1, dropout=2))
schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 3, 20)
optimizer = nnx.Optimizer(
  model,
  optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule)),
  wrt=nnx.Param,
)
metrics = nnx.MultiMetric(
  accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss")
)
tokens = jax.random.randint(jax.random.key(0), (8, LENGTH + 1), 0, VOCABULARY)
tokens = tokens.at[:, 1:].set((tokens[:, :1] + jnp.arange(1, 17)) % VOCABULARY)
history: dict[str, list[float]] = {"accuracy": [], "loss": []}
for _ in range(10):
  step(model, optimizer, metrics, tokens)
  for name, value in metrics.compute().items():
    history[name].append(float(value))
  metrics.reset()
model.eval()
for _, module in model.iter_modules():
  if isinstance(module, nnx.MultiHeadAttention):
    module.decode = True


@nnx.vmap(in_axes=(nnx.StateAxes({...: 0}),))
def with_caches(block):
  block.attention.init_cache((8, LENGTH, WIDTH))


with_caches(model.blocks)
written = write(model, tokens[:, :1], 6)
counts = {
  kind.__name__: sum(x.size for x in jax.tree.leaves(nnx.state(model, kind)))
  for kind in (nnx.Param, nnx.Cache, nnx.RngKey, nnx.RngCount)
}
print(
  json.dumps(
    {
      "history": history,
      "written": np.asarray(written).tolist(),
      "counts": counts,
      "steps": int(optimizer.step[...]),
    }
  )
)
