"""A program of flax.nnx, which says whose it runs on."""

import sys

from flax import linen, nnx
import flax.nnx.nn.linear as linear_lib
import jax.numpy as jnp


class Model(nnx.Module):
  def __init__(self, rngs):
    self.layer = linear_lib.Linear(2, 3, rngs=rngs)
    self.head = nnx.bridge.ToNNX(linen.Dense(1), rngs=rngs)

  def __call__(self, x):
    return self.head(self.layer(x))


model = Model(nnx.Rngs(0))
nnx.bridge.lazy_init(model, jnp.ones((1, 2)))
loss = nnx.jit(lambda m, x: m(x).sum())(model, jnp.ones((1, 2)))
print(type(model.layer).__module__, loss.shape, *sys.argv[1:])
