"""What the short examples share: a classifier of digits, its steps, a plot."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
import os
import pathlib

import jax
import numpy as np
import optax

from examples import digits
import nnx

BATCH = 64


class Mlp(nnx.Module):
  """One hidden layer with a batch norm; small enough to train in seconds."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.hidden = nnx.Linear(64, 128, rngs=rngs)
    self.norm = nnx.BatchNorm(128, momentum=0.9, rngs=rngs)
    self.out = nnx.Linear(128, 10, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images `[b, 8, 8, 1]` to logits `[b, 10]`."""
    x = images.reshape(images.shape[0], 64)
    return self.out(nnx.relu(self.norm(self.hidden(x))))


def loss_fn(
  model: nnx.Module, images: jax.Array, labels: jax.Array
) -> jax.Array:
  """Returns the mean cross entropy of a classifier."""
  return optax.softmax_cross_entropy_with_integer_labels(
    model(images), labels
  ).mean()


@nnx.jit
def train_step(
  model: nnx.Module,
  optimizer: nnx.Optimizer,
  images: jax.Array,
  labels: jax.Array,
) -> jax.Array:
  """Takes one step; model and optimizer change in place. Returns the loss."""
  loss, grads = nnx.value_and_grad(loss_fn)(model, images, labels)
  optimizer.update(model, grads)
  return loss


@nnx.jit
def accuracy(
  model: nnx.Module, images: jax.Array, labels: jax.Array
) -> jax.Array:
  """Returns the share of images that a model in evaluation mode gets right."""
  seen = nnx.view(model, use_running_average=True)
  return (seen(images).argmax(-1) == labels).mean()


def batches(
  data: digits.Data, steps: int, seed: int = 0
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Draws batches of the training images; the same ones for the same seed."""
  random = np.random.default_rng(seed)
  for _ in range(steps):
    chosen = random.integers(len(data.train_labels), size=BATCH)
    yield data.train_images[chosen], data.train_labels[chosen]


def options(
  about: str, arguments: Sequence[str] | None, **defaults: int
) -> argparse.Namespace:
  """Reads options: whole numbers of at least 1, and `--plot`.

  Args:
    about: the program's docstring, whose first line its help shows.
    arguments: those of the program, if None.
    **defaults: the numbers by their names, as `steps=100`.
  """
  parser = argparse.ArgumentParser(description=about.splitlines()[0])
  for name, default in defaults.items():
    parser.add_argument(f"--{name}", type=int, default=default)
  parser.add_argument(
    "--plot", metavar="FILE.png", help="draw what was seen into this file"
  )
  found = parser.parse_args(arguments)
  for name in defaults:
    if getattr(found, name) < 1:
      parser.error(
        f"--{name} must be at least 1, but got {getattr(found, name)}"
      )
  return found


def plot(
  file: str | None,
  title: str,
  lines: Mapping[str, Sequence[float]],
  what: str = "step",
) -> None:
  """Draws lines into a PNG file, if one is wanted, and says where it is.

  Args:
    file: its name, or None.
    title: what the lines are of.
    lines: by their names.
    what: there is one value for each of these.
  """
  if file is None:
    return
  from matplotlib import figure as figure_lib  # only those who draw pay for it

  figure = figure_lib.Figure(figsize=(6, 3.5), layout="constrained")
  axes = figure.subplots()
  for (name, line), style in zip(lines.items(), ("-", "--", ":", "-.")):
    axes.plot(range(1, len(line) + 1), line, style, label=name)
  axes.set(title=title, xlabel=what)
  axes.grid(alpha=0.3)
  axes.legend()
  # Under `bazel run` the program starts in another folder.
  path = pathlib.Path(os.environ.get("BUILD_WORKING_DIRECTORY", "."), file)
  figure.savefig(path, dpi=120, format="png")
  print(f"wrote {path}")
