"""Trains ten networks at once by `nnx.vmap`, and lets them vote.

One call makes ten models with ten seeds: a Module whose Variables have one more
axis. One call trains them all, each on batches of its own. They see few digits,
so each is often wrong; where they differ, they are right more often together
than one by one, and how far they agree tells how sure to be.

    bazel run //examples:ensemble -- --plot ensemble.png
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from examples import digits, shared
import nnx

FEW = 150  # training images
MEMBERS = nnx.StateAxes({...: 0})


def make(members: int) -> tuple[shared.Mlp, nnx.Optimizer]:
  """Returns an ensemble and its optimizer: all that they hold has an axis."""

  @nnx.vmap(in_axes=0, out_axes=0)
  def one(rngs):
    model = shared.Mlp(rngs=rngs)
    return model, nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)

  return one(nnx.Rngs(0).fork(split=members))


@nnx.jit
@nnx.vmap(in_axes=(MEMBERS, MEMBERS, 0, 0))
def train_step(model, optimizer, images, labels) -> jax.Array:
  """Takes a step with each member, and returns their losses."""
  loss, grads = nnx.value_and_grad(shared.loss_fn)(model, images, labels)
  optimizer.update(model, grads)
  return loss


@nnx.jit
@nnx.vmap(in_axes=(MEMBERS, None))
def probabilities(model, images) -> jax.Array:
  """Returns what each member says of images, `[members, b, 10]`."""
  return nnx.softmax(nnx.view(model, use_running_average=True)(images))


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains, votes, and prints who was right how often."""
  options = shared.options(__doc__, arguments, steps=150, members=10)
  data = digits.load()
  model, optimizer = make(options.members)
  random = np.random.default_rng(0)
  losses = []
  for _ in tqdm.trange(options.steps, unit="step"):
    chosen = random.integers(FEW, size=(options.members, shared.BATCH))
    images, labels = data.train_images[chosen], data.train_labels[chosen]
    losses.append(train_step(model, optimizer, images, labels))

  said = probabilities(model, data.test_images)
  right = (said.argmax(-1) == data.test_labels).mean(-1)
  vote = said.mean(0)
  voted = vote.argmax(-1) == data.test_labels
  sure = vote.max(-1) > 0.9
  print(f"one by one:   {right.min():.1%} to {right.max():.1%}")
  print(f"together:     {voted.mean():.1%}")
  print(
    f"when sure:    {jnp.mean(voted, where=sure):.1%}"
    f" ({sure.mean():.0%} of the images)"
  )
  columns = np.asarray(losses).T
  lines = {f"member {i + 1}": line for i, line in enumerate(columns[:3])}
  lines["mean"] = columns.mean(0)
  shared.plot(options.plot, "training loss", lines)


if __name__ == "__main__":
  main()
