"""Trains a mixture of experts, one on each device.

Every row of pixels of a digit is a token, and a router sends it to the experts
that it finds best: tokens travel to the devices of their experts and back, each
way by one `all_to_all`. An expert takes only so many of a device's tokens, its
capacity. A token that comes too late is dropped by that expert, and only what
goes around the expert is left of it. A further loss keeps the experts about
equally busy.

Eight virtual devices of the CPU stand for eight real ones; losses are those of
one device that has all experts. Printed is how many choices were dropped, and
what share of the tokens each expert gets.

    bazel run //examples:experts -- --plot experts.png
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import tqdm

from examples import digits, shared
import nnx

AXIS = "expert"
EXPERTS = 8
SIZE = 32
CHOICES = 2
CAPACITY = 1.25
BALANCE = 0.01

# A device has some of the experts, and all of the rest.
LAYOUT = nnx.StateSharding({nnx.PathContains("experts"): P(AXIS), ...: P()})


class Routes(NamedTuple):
  """Where tokens go.

  Attributes:
    expert: `[k, t]`, the choices of each token, the best first.
    place: `[k, t]`, which of the expert's places the token gets; the capacity
      or more, if it is dropped.
    weight: `[k, t]`, what the expert's result is multiplied by.
  """

  expert: jax.Array
  place: jax.Array
  weight: jax.Array


def route(probabilities: jax.Array, choices: int) -> Routes:
  """Chooses the experts of each token.

  First choices get their places before second ones, and earlier tokens before
  later ones (GShard, Lepikhin et al., 2020, arXiv:2006.16668).

  Args:
    probabilities: `[t, experts]`.
    choices: k, how many experts a token is sent to.
  """
  weight, expert = lax.top_k(probabilities, choices)
  weight, expert = weight.T, expert.T
  taken = jax.nn.one_hot(expert.ravel(), probabilities.shape[1], dtype=int)
  place = (jnp.cumsum(taken, 0) * taken).sum(1) - 1
  return Routes(expert, place.reshape(expert.shape), weight)


def dispatch(
  x: jax.Array, routes: Routes, experts: int, capacity: int
) -> jax.Array:
  """Lays tokens `[t, c]` out for their experts, `[experts, capacity, c]`."""
  x = jnp.broadcast_to(x, (*routes.expert.shape, x.shape[-1]))
  empty = jnp.zeros((experts, capacity, x.shape[-1]), x.dtype)
  return empty.at[routes.expert, routes.place].set(x, mode="drop")


def combine(y: jax.Array, routes: Routes) -> jax.Array:
  """Adds up what experts made of tokens; zeros where they were dropped."""
  y = y.at[routes.expert, routes.place].get(mode="fill", fill_value=0)
  return (y * routes.weight[..., None]).sum(0)


def balance_loss(probabilities: jax.Array, routes: Routes) -> jax.Array:
  """Returns 1 where all experts get equally much, and more elsewhere.

  As in Switch Transformers (Fedus et al., 2021, arXiv:2101.03961, eq. 4): the
  share of the first choices of each expert, times its mean probability, times
  the number of experts, added up.
  """
  experts = probabilities.shape[1]
  share = jax.nn.one_hot(routes.expert[0], experts).mean(0)
  return experts * (share * probabilities.mean(0)).sum()


class Load(NamedTuple):
  """How tokens were spread over experts.

  Attributes:
    balance: the loss that is 1 if they are spread evenly.
    dropped: the share of choices that found no place.
    share: `[experts]`, of all choices, dropped ones included.
  """

  balance: jax.Array
  dropped: jax.Array
  share: jax.Array


class Mixture(nnx.Module):
  """Experts of two linear maps each, and a router.

  Args:
    size: c, features of a token.
    experts: how many.
    choices: of each token.
    capacity: how many places an expert has, compared with what it needs if all
      get the same number of tokens.
    axis: of the mesh, along which experts and tokens are split, in a
      `shard_map`; None if all are here.
    rngs: random streams.
  """

  def __init__(
    self,
    size: int,
    experts: int,
    choices: int = CHOICES,
    capacity: float = CAPACITY,
    *,
    axis: str | None = None,
    rngs: nnx.Rngs,
  ):
    self.choices, self.capacity, self.axis = choices, capacity, axis
    self.router = nnx.Linear(size, experts, use_bias=False, rngs=rngs)

    @nnx.split_rngs(splits=experts)
    @nnx.vmap
    def make(rngs):
      return nnx.Sequential(
        nnx.Linear(size, 2 * size, rngs=rngs),
        nnx.relu,
        nnx.Linear(2 * size, size, rngs=rngs),
      )

    self.experts = make(rngs)

  def __call__(self, x: jax.Array) -> tuple[jax.Array, Load]:
    """Maps tokens `[t, c]` of one device; returns also how they were spread."""
    probabilities = jax.nn.softmax(self.router(x).astype(jnp.float32))
    tokens, experts = probabilities.shape
    fair = tokens * self.choices / experts
    capacity = max(1, round(self.capacity * fair))
    routes = route(probabilities, self.choices)
    y = dispatch(x, routes, experts, capacity)
    if self.axis is not None:
      # `[experts, capacity, c]` to `[experts here, devices * capacity, c]`.
      y = lax.all_to_all(y, self.axis, 0, 1, tiled=True)
    y = _run(self.experts, y)
    if self.axis is not None:
      y = lax.all_to_all(y, self.axis, 1, 0, tiled=True)
    load = Load(
      balance_loss(probabilities, routes),
      (routes.place >= capacity).mean(),
      jax.nn.one_hot(routes.expert, experts).mean((0, 1)),
    )
    return combine(y, routes).astype(x.dtype), load


@nnx.vmap
def _run(expert: nnx.Module, x: jax.Array) -> jax.Array:
  return expert(x)


class Model(nnx.Module):
  """A classifier of digits, row by row of pixels."""

  def __init__(self, *, axis: str | None = None, rngs: nnx.Rngs):
    self.first = nnx.Linear(8, SIZE, rngs=rngs)
    self.row = nnx.Param(jax.random.normal(rngs.params(), (8, SIZE)))
    self.norm = nnx.LayerNorm(SIZE, rngs=rngs)
    self.mixture = Mixture(SIZE, EXPERTS, axis=axis, rngs=rngs)
    self.last = nnx.Linear(8 * SIZE, 10, rngs=rngs)

  def __call__(self, images: jax.Array) -> tuple[jax.Array, Load]:
    """Maps images `[b, 8, 8, 1]` to logits `[b, 10]`, and says the load."""
    x = self.first(images[..., 0]) + self.row[...]
    y, load = self.mixture(self.norm(x).reshape(-1, SIZE))
    x += y.reshape(x.shape)
    return self.last(nnx.relu(x).reshape(len(x), -1)), load


def loss_fn(
  model: Model, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, Load]:
  """Returns the loss of one device's images, with the load of its experts."""
  logits, load = model(images)
  loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
  return loss + BALANCE * load.balance, load


def make_mesh() -> jax.sharding.Mesh:
  """Returns the mesh of all experts."""
  return jax.make_mesh(
    (EXPERTS,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
  )


def split_loss(mesh: jax.sharding.Mesh) -> Callable[..., tuple]:
  """Returns `loss_fn` for a batch and experts that are split over a mesh."""

  @nnx.shard_map(mesh=mesh, in_specs=(LAYOUT, P(AXIS), P(AXIS)), out_specs=P())
  def run(model, images, labels):
    return lax.pmean(loss_fn(model, images, labels), AXIS)

  return run


def grouped_loss(
  model: Model, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, Load]:
  """Returns what `split_loss` does, on one device.

  As there, a batch is of eight groups, and places are given out in each.
  """
  groups = (x.reshape(EXPERTS, -1, *x.shape[1:]) for x in (images, labels))
  each = nnx.vmap(loss_fn, in_axes=(None, 0, 0))(model, *groups)
  return jax.tree.map(lambda x: x.mean(0), each)


def make(axis: str | None = None) -> tuple[Model, nnx.Optimizer]:
  """Returns a model and its optimizer."""
  model = Model(axis=axis, rngs=nnx.Rngs(0))
  return model, nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


def train(
  data: digits.Data, steps: int, what: str, objects: tuple, loss_fn: Callable
) -> tuple[list[float], Load]:
  """Trains in place; returns the losses, and the load of the last step."""

  @nnx.jit
  def step(model, optimizer, images, labels):
    (loss, load), grads = nnx.value_and_grad(loss_fn, has_aux=True)(
      model, images, labels
    )
    optimizer.update(model, grads)
    return loss, load

  losses, bar = [], tqdm.tqdm(shared.batches(data, steps), what, steps)
  for batch in bar:
    loss, load = step(*objects, *batch)
    losses.append(float(loss))
    bar.set_postfix(dropped=f"{float(load.dropped):.0%}")
  return losses, load


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains on the mesh and on one device, and compares."""
  options = shared.options(__doc__, arguments, steps=100)
  data, mesh = digits.load(), make_mesh()
  with jax.set_mesh(mesh):
    objects = nnx.jit(lambda: make(AXIS), out_shardings=(LAYOUT, LAYOUT))()
    many, load = train(
      data, options.steps, "8 devices", objects, split_loss(mesh)
    )
  alone = make()
  one, _ = train(data, options.steps, "1 device", alone, grouped_loss)
  np.testing.assert_allclose(many, one, rtol=0.02, atol=0.02)

  kernel = objects[0].mixture.experts.layers[0].kernel.value
  here = kernel.addressable_shards[0].data.shape
  print(f"experts' first kernel {kernel.shape}, {here} a device")
  print(f"dropped at last {float(load.dropped):.1%} of the choices")
  print(
    "experts get", " ".join(f"{share:.0%}" for share in load.share.tolist())
  )
  nnx.update(alone[0], jax.device_get(nnx.state(objects[0])))
  logits, _ = nnx.jit(lambda model, x: model(x))(alone[0], data.test_images)
  right = (np.argmax(logits, -1) == data.test_labels).mean()
  print(f"test accuracy {right:.1%}")
  shared.plot(
    options.plot, "training loss", {"8 devices": many, "1 device": one}
  )


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", EXPERTS)
  main()
