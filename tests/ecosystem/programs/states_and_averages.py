"""Works on the states of a model: averages, surgery, LoRA, pure dicts."""

import json

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax


class Teacher(nnx.Variable):
  pass


class Net(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    # No bias: what the norm takes away has a gradient of rounding errors.
    self.stem = nnx.Linear(6, 8, use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(8, use_running_average=False, rngs=rngs)
    self.head = nnx.LinearGeneral(8, (2, 3), rngs=rngs)
    self.scale = Teacher(jnp.ones(()))
    self.name = "net"

  def __call__(self, x):
    return self.head(nnx.relu(self.norm(self.stem(x)))) * self.scale[...]


X = jax.random.normal(jax.random.key(0), (32, 6))
Y = jax.random.normal(jax.random.key(1), (32, 2, 3))
model = Net(nnx.Rngs(0))
graphdef, params, stats, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
tx = optax.adamw(1e-2, weight_decay=0.1)


@jax.jit
def step(params, stats, rest, opt_state, averaged):
  def loss(params):
    model = nnx.merge(graphdef, params, stats, rest, copy=True)
    value = jnp.mean((model(X) - Y) ** 2)
    return value, nnx.state(model, nnx.BatchStat)

  (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
  updates, opt_state = tx.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  averaged = jax.tree.map(lambda a, p: 0.8 * a + 0.2 * p, averaged, params)
  return value, params, stats, opt_state, averaged


opt_state, averaged, losses = tx.init(params), params, []
for _ in range(6):
  value, params, stats, opt_state, averaged = step(
    params, stats, rest, opt_state, averaged
  )
  losses.append(float(value))
nnx.update(model, params, stats)
average = nnx.merge(graphdef, averaged, stats, rest)

# What a State is, and what it can be made of.
difference = jax.tree.map(jnp.subtract, averaged, params)
flat = nnx.to_flat_state(difference)
pure = nnx.to_pure_dict(nnx.state(model))
again = Net(nnx.Rngs(3))
before = nnx.merge(graphdef, params, stats, rest)(X)
state = nnx.state(again)
nnx.replace_by_pure_dict(state, pure)
nnx.update(again, state)
abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
shapes = {
  "/".join(map(str, path)): list(leaf.shape)
  for path, leaf in nnx.to_flat_state(nnx.state(abstract))
}
paths = [
  ["/".join(map(str, path)), type(value).__name__]
  for path, value in nnx.iter_graph(model)
  if isinstance(value, nnx.Variable)
]
halved = nnx.map_state(
  lambda path, p: p.replace(p[...] / 2) if "kernel" in path else p,
  nnx.state(model, nnx.Param),
)
joined = nnx.merge_state(
  nnx.filter_state(nnx.state(model), nnx.BatchStat), halved
)
kernels, others = nnx.split_state(halved, nnx.PathContains("kernel"), ...)

# Surgery: another head, an adapter, and the old parts by reference.
model.head = nnx.LinearGeneral((8,), (4,), rngs=nnx.Rngs(7))
model.stem = nnx.LoRA(6, 2, 8, base_module=model.stem, rngs=nnx.Rngs(8))
optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)


@nnx.jit
def adapt(model, optimizer):
  grads = nnx.grad(
    lambda m: jnp.mean(m(X) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam)
  )(model)
  optimizer.update(model, grads)
  return optax.global_norm(grads)


model.norm.use_running_average = True
norms = [float(adapt(model, optimizer)) for _ in range(3)]
shared = nnx.Dict(a=model.stem, b=model.stem, c=nnx.Dict(d=model.scale))
copied = nnx.clone(shared)
print(
  json.dumps(
    {
      "losses": losses,
      "average": np.asarray(average(X)).ravel().tolist(),
      "differences": {
        ".".join(path): float(jnp.abs(leaf[...]).sum()) for path, leaf in flat
      },
      "as it was": bool((again(X) == before).all()),
      "shapes": shapes,
      "paths": paths,
      "halved": float(jnp.abs(halved["stem"]["kernel"][...]).sum()),
      "joined": sorted(joined),
      "split": [len(nnx.to_flat_state(s)) for s in (kernels, others)],
      "norms": norms,
      "adapted": np.asarray(model.stem.lora_b[...]).ravel().tolist(),
      "shares": copied.a is copied.b,
      "size": sum(x.size for x in jax.tree.leaves(nnx.state(shared))),
    }
  )
)  # fmt: skip
