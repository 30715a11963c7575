"""Trains on eight devices: data along one axis, the model along the other.

Eight virtual devices of the CPU stand for eight real ones. Batches are split in
four, the hidden layer in two; the program of a step is the one of a single
device, and so are the losses. Printed is where each parameter lies.

    bazel run //examples:parallel -- --plot parallel.png
"""

from collections.abc import Sequence

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import tqdm

from examples import digits, shared
import nnx

SHAPE = {"data": 4, "model": 2}


class Mlp(nnx.Module):
  """The classifier of `shared`, whose parameters say how they are split."""

  def __init__(self, *, rngs: nnx.Rngs):
    init = nnx.initializers.lecun_normal()
    over = nnx.with_partitioning
    zeros = nnx.initializers.zeros_init()
    ones = nnx.initializers.ones_init()
    self.hidden = nnx.Linear(
      64,
      128,
      kernel_init=over(init, (None, "model")),
      bias_init=over(zeros, ("model",)),
      rngs=rngs,
    )
    self.norm = nnx.BatchNorm(
      128,
      momentum=0.9,
      scale_init=over(ones, ("model",)),
      bias_init=over(zeros, ("model",)),
      rngs=rngs,
    )
    self.out = nnx.Linear(
      128, 10, kernel_init=over(init, ("model", None)), rngs=rngs
    )

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images `[b, 8, 8, 1]` to logits `[b, 10]`."""
    x = images.reshape(images.shape[0], 64)
    return self.out(nnx.relu(self.norm(self.hidden(x))))


def make_mesh() -> jax.sharding.Mesh:
  """Returns the mesh; the compiler decides what the program does not say."""
  auto = (jax.sharding.AxisType.Auto,) * len(SHAPE)
  return jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE), axis_types=auto)


def make() -> tuple[Mlp, nnx.Optimizer]:
  """Returns a model and its optimizer, placed as they say on a mesh around."""
  model = Mlp(rngs=nnx.Rngs(0))
  return model, nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


def train(
  data: digits.Data, objects: tuple, steps: int, what: str, sharding=None
) -> list[float]:
  """Trains, and returns the losses; batches are laid out by `sharding`."""
  losses = []
  for batch in tqdm.tqdm(shared.batches(data, steps), what, steps):
    if sharding is not None:
      batch = jax.device_put(batch, sharding)
    # Each step is waited for. With steps under way all the time, a process that
    # is stopped for a while, or gets no turn, is so within a collective, and
    # after 40 seconds of that XLA's CPU ends it.
    losses.append(float(shared.train_step(*objects, *batch)))
  return losses


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains on the mesh and on one device, and compares."""
  options = shared.options(__doc__, arguments, steps=100)
  data = digits.load()
  mesh = make_mesh()
  with jax.set_mesh(mesh):
    objects = nnx.jit(make)()  # each part is made where it belongs
    batch = NamedSharding(mesh, P("data"))
    many = train(data, objects, options.steps, "8 devices", batch)
  one = train(data, make(), options.steps, "1 device")
  np.testing.assert_allclose(many, one, rtol=0.02, atol=0.02)

  for path, leaf in nnx.to_flat_state(nnx.state(objects[0], nnx.Param)):
    spec = leaf.value.sharding.spec
    part = leaf.value.addressable_shards[0].data.shape
    print(f"{'.'.join(path):14} {leaf.shape!s:10} {spec!s:30} {part} a device")
  test = (data.test_images, data.test_labels)
  print(f"test accuracy {shared.accuracy(objects[0], *test):.1%}")
  lines = {"8 devices": many, "1 device": one}
  shared.plot(options.plot, "training loss", lines)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", 8)
  main()
