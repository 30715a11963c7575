"""Linen inside of nnx, nnx inside of Linen, and a custom gradient, trained."""

import json

from flax import linen as nn
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax

X = jax.random.normal(jax.random.key(0), (16, 5))
Y = jnp.sin(X).sum(-1, keepdims=True)


class Normed(nn.Module):
  features: int

  @nn.compact
  def __call__(self, x, train: bool = True):
    x = nn.Dense(self.features)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    return nn.Dropout(0.1, deterministic=not train)(nn.gelu(x))


@nnx.custom_vjp
def clipped(model, x):
  return model(x)


def clipped_fwd(model, x):
  return model(x), (model, x)


def clipped_bwd(saved, given):
  _, g = given
  model, x = saved
  g = jnp.clip(g, -0.05, 0.05)
  return nnx.grad(lambda m, x: (m(x) * g).sum(), argnums=(0, 1))(model, x)


clipped.defvjp(clipped_fwd, clipped_bwd)


class Mixed(nnx.Module):
  def __init__(self, rngs):
    self.linen = nnx.bridge.ToNNX(Normed(12), rngs=rngs)
    self.head = nnx.Linear(12, 1, rngs=rngs)

  def __call__(self, x):
    return clipped(self.head, self.linen(x, mutable=["batch_stats"]))


model = Mixed(nnx.Rngs(0, dropout=1))
nnx.bridge.lazy_init(model.linen, X)
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
  loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
  optimizer.update(model, grads)
  return loss


class Inner(nnx.Module):
  def __init__(self, features, rngs):
    self.dense = nnx.Linear(5, features, rngs=rngs)
    self.norm = nnx.LayerNorm(features, rngs=rngs)
    self.calls = nnx.BatchStat(jnp.zeros(()))

  def __call__(self, x):
    self.calls[...] += 1
    return nnx.relu(self.norm(self.dense(x)))


class Outer(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nnx.bridge.to_linen(Inner, 8, name="inner")(x)
    return nn.Dense(1)(x)


linen = Outer()
variables = linen.init(jax.random.key(0), X)
state = train_state.TrainState.create(
  apply_fn=linen.apply, params=variables["params"], tx=optax.sgd(0.1)
)
stats = variables["batch_stats"]


@jax.jit
def linen_step(state, stats):
  def loss(params):
    out, updates = state.apply_fn(
      {"params": params, "batch_stats": stats, "nnx": variables.get("nnx", {})},
      X,
      mutable=["batch_stats"],
    )
    return jnp.mean((out - Y) ** 2), updates["batch_stats"]

  (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
  return value, state.apply_gradients(grads=grads), stats


linen_losses = []
for _ in range(5):
  value, state, stats = linen_step(state, stats)
  linen_losses.append(float(value))


class Bridged(nnx.bridge.Module):
  width: int

  @nnx.bridge.compact
  def __call__(self, x):
    w = self.param("w", nnx.initializers.ones_init(), (x.shape[-1], self.width))
    return x @ w


bridged = Bridged(3)
bridged_variables = bridged.init(0, X)
print(
  json.dumps(
    {
      "losses": [float(step(model, optimizer)) for _ in range(5)],
      "kernel": np.asarray(model.linen.Dense_0["kernel"][...]).tolist(),
      "mean": np.asarray(model.linen.BatchNorm_0["mean"][...]).tolist(),
      "linen losses": linen_losses,
      "linen params": {
        "/".join(k.key for k in path): np.asarray(x).tolist()
        for path, x in jax.tree_util.tree_leaves_with_path(state.params)
      },
      "calls": float(jax.tree.leaves(stats)[0]),
      "bridged": np.asarray(bridged.apply(bridged_variables, X)).tolist(),
    }
  )
)
