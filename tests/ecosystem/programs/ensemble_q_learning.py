"""Learns to balance by an ensemble of Q functions, and targets that follow."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

MEMBERS, BATCH = 4, 16


class Q(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.hidden = nnx.List(
      [nnx.Linear(4, 16, rngs=rngs), nnx.Linear(16, 16, rngs=rngs)]
    )
    self.out = nnx.Linear(16, 2, rngs=rngs)

  def __call__(self, x):
    for layer in self.hidden:
      x = nnx.tanh(layer(x))
    return self.out(x)


class Buffer(nnx.Module):
  def __init__(self, size):
    self.items = nnx.Variable(jnp.zeros((size, 11)))
    self.next = nnx.Variable(jnp.int32(0))

  def add(self, item):
    at = self.next[...] % self.items.shape[0]
    self.items[...] = self.items[...].at[at].set(item)
    self.next[...] += 1

  def sample(self, key):
    limit = jnp.minimum(self.next[...], self.items.shape[0])
    rows = jax.random.randint(key, (BATCH,), 0, limit)
    return self.items[rows]


@nnx.split_rngs(splits=MEMBERS)
@nnx.vmap
def ensemble(rngs):
  return Q(rngs)


def physics(state, action):
  x, v, angle, spin = state
  force = jnp.where(action == 1, 10.0, -10.0)
  push = (force + 0.05 * spin**2 * jnp.sin(angle)) / 1.1
  turn = (9.8 * jnp.sin(angle) - jnp.cos(angle) * push) / 0.65
  step = jnp.stack([v, push - 0.05 * turn, spin, turn])
  return state + 0.02 * step


values = nnx.vmap(lambda model, x: model(x), in_axes=(0, None))


@nnx.jit
def play(model, buffer, rngs, state):
  def one(carry, _):
    model, buffer, rngs, state = carry
    q = values(model, state).mean(0)
    greedy = q.argmax()
    action = nnx.cond(
      jax.random.uniform(rngs.act()) < 0.2,
      lambda rngs: jax.random.randint(rngs.act(), (), 0, 2),
      lambda rngs: greedy.astype(jnp.int32),
      rngs,
    )
    new = physics(state, action)
    fell = (jnp.abs(new[2]) > 0.2).astype(float)
    row = jnp.concatenate([state, new, jnp.stack([action, 1.0 - fell, fell])])
    buffer.add(row)
    new = jnp.where(fell, jnp.zeros(4), new)
    return (model, buffer, rngs, new), fell

  carry, falls = nnx.scan(one, length=12)((model, buffer, rngs, state), None)
  return carry[-1], falls.sum()


@nnx.jit(donate_argnames=("optimizer",))
def learn(model, target, optimizer, buffer, rngs):
  rows = buffer.sample(rngs.sample())
  state, new = rows[:, :4], rows[:, 4:8]
  action, reward, fell = rows[:, 8].astype(int), rows[:, 9], rows[:, 10]
  future = values(target, new).min(0).max(-1)
  goal = reward + 0.9 * (1 - fell) * future

  def loss(model):
    q = values(model, state)
    q = jnp.take_along_axis(q, action[None, :, None].repeat(MEMBERS, 0), -1)
    return optax.huber_loss(q[..., 0], goal[None]).mean()

  value, grads = nnx.value_and_grad(loss)(model)
  optimizer.update(model, grads)
  moved = jax.tree.map(
    lambda t, m: 0.9 * t + 0.1 * m, nnx.state(target), nnx.state(model)
  )
  nnx.update(target, moved)
  return value


model = ensemble(nnx.Rngs(0))
target = nnx.clone(model)
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
buffer, rngs = Buffer(64), nnx.Rngs(act=1, sample=2)
state, losses, falls = jnp.zeros(4), [], []
for _ in range(8):
  state, fallen = play(model, buffer, rngs, state)
  falls.append(float(fallen))
  losses.append(float(learn(model, target, optimizer, buffer, rngs)))
first = nnx.merge(
  nnx.graphdef(Q(nnx.Rngs(0))),
  jax.tree.map(lambda x: x[0], nnx.state(model)),
)
_, looped = nnx.fori_loop(
  0, 3, lambda i, c: (c[0], c[1] + c[0](jnp.ones(4)).sum()), (first, 0.0)
)
print(
  json.dumps(
    {
      "falls": falls,
      "losses": losses,
      "state": np.asarray(state).tolist(),
      "target": np.asarray(target.out.kernel[...]).tolist(),
      "written": int(buffer.next[...]),
      "looped": float(looped),
    }
  )
)
