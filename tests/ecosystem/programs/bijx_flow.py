"""Fits a normalising flow of bijx."""

import json

import bijx
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

X = jax.random.normal(jax.random.key(0), (128, 2)) * jnp.array([2.0, 0.5]) + 1
flow = bijx.Transformed(
  bijx.IndependentNormal((2,)),
  bijx.Chain(bijx.Scaling(jnp.ones(2)), bijx.Shift(jnp.zeros(2))),
)
optimizer = nnx.Optimizer(flow, optax.adam(5e-2), wrt=nnx.Param)


@nnx.jit
def step(flow, optimizer):
  def loss(flow):
    return -flow.log_density(X).mean()

  value, grads = nnx.value_and_grad(loss)(flow)
  optimizer.update(flow, grads)
  return value


losses = [float(step(flow, optimizer)) for _ in range(20)]
params = nnx.to_flat_state(nnx.state(flow, nnx.Param))
samples, _ = flow.sample((4,), rng=jax.random.key(1))
print(
  json.dumps(
    {
      "losses": losses,
      "params": {
        "/".join(map(str, path)): np.asarray(param[...]).tolist()
        for path, param in params
      },
      "samples": np.asarray(samples).tolist(),
    }
  )
)
