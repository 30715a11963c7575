"""Trains a small vision transformer of jimmy."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
from jimmy.models.vit import DinoV2
import numpy as np
import optax

model = DinoV2(
  img_size=32,
  patch_size=8,
  embed_dim=32,
  depth=2,
  num_heads=4,
  rngs=nnx.Rngs(0),
)
images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
before = np.asarray(nnx.jit(lambda m, x: m(x))(model, images)).tolist()
optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
  def loss(model):
    return jnp.mean(model(images) ** 2)

  value, grads = nnx.value_and_grad(loss)(model)
  optimizer.update(model, grads)
  return value


print(
  json.dumps(
    {
      "features": before,
      "losses": [float(step(model, optimizer)) for _ in range(3)],
    }
  )
)
