"""Trains a neural cellular automaton of cax."""

import json

from cax.core.cs import ComplexSystem
from cax.core.perceive import ConvPerceive
from cax.core.update import NCAUpdate
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Automaton(ComplexSystem):
  def __init__(self, rngs):
    self.perceive = ConvPerceive(8, 24, rngs=rngs)
    self.update = NCAUpdate(8, 24, (16,), cell_dropout_rate=0.5, rngs=rngs)

  def _step(self, state, input=None, *, sow=False):
    return self.update(state, self.perceive(state), input)

  def render(self, state):
    return state[..., :3]


automaton = Automaton(nnx.Rngs(0))
start = jnp.zeros((12, 12, 8)).at[6, 6, 3:].set(1.0)
target = jax.random.uniform(jax.random.key(0), (12, 12, 4))
optimizer = nnx.Optimizer(automaton, optax.adam(1e-3), wrt=nnx.Param)


@nnx.jit
def step(automaton, optimizer):
  def loss(automaton):
    return jnp.mean((automaton(start, num_steps=8)[..., :4] - target) ** 2)

  value, grads = nnx.value_and_grad(loss)(automaton)
  optimizer.update(automaton, grads)
  return value


print(
  json.dumps(
    {
      "losses": [float(step(automaton, optimizer)) for _ in range(5)],
      "state": np.asarray(automaton(start, num_steps=4)).tolist(),
    }
  )
)
