"""Quantises a model after and in training, and adapts it, with qwix."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix

X = jax.random.normal(jax.random.key(0), (64, 16))
Y = jnp.sin(X[:, :8])
INT8 = {"module_path": ".*", "weight_qtype": "int8", "act_qtype": "int8"}


class Mlp(nnx.Module):
  def __init__(self, rngs):
    self.first = nnx.Linear(16, 32, rngs=rngs)
    self.second = nnx.Linear(32, 8, rngs=rngs)

  def __call__(self, x):
    return self.second(nnx.relu(self.first(x)))


def losses(model, wrt):
  optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=wrt)

  @nnx.jit
  def step(model, optimizer):
    def loss(model):
      return jnp.mean((model(X) - Y) ** 2)

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(
      model
    )
    optimizer.update(model, grads)
    return value

  return [float(step(model, optimizer)) for _ in range(5)]


def make():
  return Mlp(nnx.Rngs(0))


after = qwix.quantize_model(
  make(), qwix.PtqProvider([qwix.QuantizationRule(**INT8)]), X
)
during = qwix.quantize_model(make(), qwix.QtProvider([qwix.QtRule(**INT8)]), X)
adapted = qwix.apply_lora_to_model(
  make(),
  qwix.LoraProvider(module_path=".*", rank=4, alpha=2.0),
  X,
  rngs=nnx.Rngs(1),
)
print(
  json.dumps(
    {
      "float": np.asarray(make()(X)).tolist(),
      "int8": np.asarray(after(X)).tolist(),
      "int8, jitted": np.asarray(nnx.jit(lambda m, x: m(x))(after, X)).tolist(),
      "dtypes": sorted(str(x.dtype) for x in jax.tree.leaves(nnx.state(after))),
      "losses, quantised": losses(during, nnx.Param),
      "losses, LoRA": losses(adapted, nnx.LoRAParam),
    }
  )
)
