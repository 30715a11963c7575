"""Trains, saves with orbax, restores into an abstract model, and goes on."""

import json
import pathlib
import tempfile

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

mesh = jax.make_mesh(
  (1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
)
X = jax.random.normal(jax.random.key(0), (4, 10, 6))
Y = jnp.cumsum(X, axis=1)[..., :2]


class Recurrent(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.both = nnx.Bidirectional(
      nnx.RNN(nnx.OptimizedLSTMCell(6, 8, rngs=rngs)),
      nnx.RNN(nnx.GRUCell(6, 8, rngs=rngs)),
    )
    self.dropout = nnx.Dropout(0.2, rngs=rngs.fork())
    self.out = nnx.Linear(
      16,
      2,
      kernel_init=nnx.with_partitioning(
        nnx.initializers.lecun_normal(), (None, "model")
      ),
      rngs=rngs,
    )

  def __call__(self, x):
    return self.out(self.dropout(self.both(x)))


def make():
  model = Recurrent(nnx.Rngs(0, dropout=1))
  return model, nnx.Optimizer(
    model, optax.adamw(optax.linear_schedule(1e-2, 1e-3, 10)), wrt=nnx.Param
  )


@nnx.jit
def step(model, optimizer):
  loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - Y) ** 2))(model)
  optimizer.update(model, grads)
  return loss


def train(model, optimizer, steps):
  return [float(step(model, optimizer)) for _ in range(steps)]


with jax.set_mesh(mesh):
  model, optimizer = make()
  first = train(model, optimizer, 3)
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "checkpoint")
    with ocp.StandardCheckpointer() as checkpointer:
      state = nnx.state((model, optimizer))
      keys, rest = nnx.split_state(state, nnx.RngKey, ...)
      keys = jax.tree.map(jax.random.key_data, keys)
      checkpointer.save(path, {"keys": keys, "rest": rest})
    second = train(model, optimizer, 3)
    pair = nnx.eval_shape(make)
    graphdef, abstract = nnx.split(pair)
    specs = nnx.get_partition_spec(nnx.state(pair[0], nnx.Param))
    abstract_keys, abstract_rest = nnx.split_state(abstract, nnx.RngKey, ...)
    abstract_rest = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      abstract_rest,
      nnx.get_named_sharding(abstract_rest, mesh),
    )
    abstract_keys = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((*x.shape, 2), jnp.uint32), abstract_keys
    )
    with ocp.StandardCheckpointer() as checkpointer:
      restored = checkpointer.restore(
        path, {"keys": abstract_keys, "rest": abstract_rest}
      )
  keys = jax.tree.map(jax.random.wrap_key_data, restored["keys"])
  again_model, again_optimizer = nnx.merge(graphdef, keys, restored["rest"])
  again = train(again_model, again_optimizer, 3)
print(
  json.dumps(
    {
      "losses": first + second,
      "again": again,
      "spec": str(specs["out"]["kernel"].get_value()),
      "params": {
        "/".join(map(str, path)): np.asarray(leaf[...]).tolist()
        for path, leaf in nnx.to_flat_state(nnx.state(again_model, nnx.Param))
      },
    }
  )
)
