"""Trains a small convolutional classifier on scikit-learn's handwritten digits.

Plain JAX: parameters and running averages are dictionaries of arrays, and
`kernels.batch_stat` keeps the running averages of the batch norms. The 1,797
images come with scikit-learn; nothing is downloaded. Takes some seconds on two
cores and reaches over 95% on images it has not seen.

    bazel run //examples:digits -- --plot digits.png
"""

import argparse
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import os
import pathlib
import time
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np
from sklearn import datasets, model_selection
import tqdm

from kernels import batch_stat

Params = dict[str, Any]
_CHANNELS = (1, 16, 32, 64)
_CLASSES = 10
_MOMENTUM = 0.9
_EPSILON = 1e-5
_BATCH = 64
_LEARNING_RATE = 0.08
_WEIGHT_DECAY = 1e-4


@dataclasses.dataclass(frozen=True)
class Data:
  """Images `[b, 8, 8, 1]` in [0, 1], float32, and labels `[b]`, int32."""

  train_images: np.ndarray
  train_labels: np.ndarray
  test_images: np.ndarray
  test_labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class History:
  """What was measured after each epoch."""

  loss: list[float]
  accuracy: list[float]
  seconds: float


def load() -> Data:
  """Returns the digits, a fifth of each class kept for the test."""
  images, labels = datasets.load_digits(return_X_y=True)
  images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
  parts = model_selection.train_test_split(
    images,
    labels.astype(np.int32),
    test_size=0.2,
    stratify=labels,
    random_state=0,
  )
  return Data(parts[0], parts[2], parts[1], parts[3])


def init(seed: int) -> tuple[Params, Params]:
  """Returns parameters and running averages of a new classifier."""
  keys = jax.random.split(jax.random.key(seed), len(_CHANNELS))
  params, averages = {}, {}
  for layer, (inputs, outputs) in enumerate(itertools.pairwise(_CHANNELS)):
    deviation = (2 / (9 * inputs)) ** 0.5
    params[f"conv_{layer}"] = {
      "kernel": deviation
      * jax.random.normal(keys[layer], (3, 3, inputs, outputs)),
      "scale": jnp.ones(outputs),
      "bias": jnp.zeros(outputs),
    }
    averages[f"conv_{layer}"] = {
      "mean": jnp.zeros(outputs),
      "var": jnp.ones(outputs),
    }
  params["head"] = {
    "kernel": jax.random.normal(keys[-1], (_CHANNELS[-1], _CLASSES))
    / _CHANNELS[-1] ** 0.5,
    "bias": jnp.zeros(_CLASSES),
  }
  return params, averages


def _convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
  return lax.conv_general_dilated(
    x,
    kernel,
    (stride, stride),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def apply(
  params: Params, averages: Params, images: jax.Array, *, train: bool
) -> tuple[jax.Array, Params]:
  """Runs the classifier.

  Args:
    params: from `init`.
    averages: running averages, from `init`.
    images: `[b, 8, 8, 1]`, float32.
    train: normalise with the batch's statistics and move the running averages,
      instead of normalising with the running averages.

  Returns:
    Logits `[b, 10]`, and the running averages, moved if `train`.
  """
  x = images
  new_averages = {}
  for layer in range(len(_CHANNELS) - 1):
    name = f"conv_{layer}"
    weights, running = params[name], averages[name]
    # Halves the image in the later layers: 8x8, 4x4, 2x2.
    x = _convolve(x, weights["kernel"], stride=1 if layer == 0 else 2)
    if train:
      mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
      # The averages take no part in the gradient.
      moved = batch_stat.update(
        lax.stop_gradient(x),
        running["mean"],
        running["var"],
        momentum=_MOMENTUM,
      )
      new_averages[name] = {"mean": moved[0], "var": moved[1]}
    else:
      mean, var = running["mean"], running["var"]
      new_averages[name] = running
    x = (x - mean) * lax.rsqrt(var + _EPSILON)
    x = jax.nn.relu(x * weights["scale"] + weights["bias"])
  x = x.mean((1, 2))
  head = params["head"]
  return x @ head["kernel"] + head["bias"], new_averages


def _loss(params, averages, images, labels):
  logits, averages = apply(params, averages, images, train=True)
  likelihood = jnp.take_along_axis(
    jax.nn.log_softmax(logits), labels[:, None], axis=1
  )
  return -likelihood.mean(), averages


@functools.partial(jax.jit, donate_argnums=(0, 1, 2))
def train_step(
  params: Params,
  averages: Params,
  velocity: Params,
  images: jax.Array,
  labels: jax.Array,
  rate: jax.Array,
) -> tuple[Params, Params, Params, jax.Array]:
  """Takes one step of gradient descent with Nesterov momentum.

  Args:
    params: from `init`; donated.
    averages: running averages; donated.
    velocity: same structure as `params`; donated.
    images: `[b, 8, 8, 1]`, float32.
    labels: `[b]`, int32.
    rate: learning rate of this step, scalar float32.

  Returns:
    New parameters, averages and velocity, and the loss of this batch.
  """
  (loss, averages), gradient = jax.value_and_grad(_loss, has_aux=True)(
    params, averages, images, labels
  )
  gradient = jax.tree.map(lambda g, p: g + _WEIGHT_DECAY * p, gradient, params)
  velocity = jax.tree.map(lambda v, g: 0.9 * v + g, velocity, gradient)
  params = jax.tree.map(
    lambda p, v, g: p - rate * (g + 0.9 * v), params, velocity, gradient
  )
  return params, averages, velocity, loss


@jax.jit
def accuracy(
  params: Params, averages: Params, images: jax.Array, labels: jax.Array
) -> jax.Array:
  """Returns the share of images that are classified correctly."""
  logits, _ = apply(params, averages, images, train=False)
  return (logits.argmax(1) == labels).mean()


def train(data: Data, *, epochs: int, seed: int = 0) -> History:
  """Trains a new classifier, behind a progress bar.

  Args:
    data: from `load`.
    epochs: at least 1.
    seed: of the initial weights and of the order of the images.

  Returns:
    Mean loss and test accuracy of every epoch.

  Raises:
    ValueError: if `epochs` is less than 1.
  """
  if epochs < 1:
    raise ValueError(f"`epochs` must be at least 1, but got {epochs}.")
  start = time.perf_counter()
  params, averages = init(seed)
  velocity = jax.tree.map(jnp.zeros_like, params)
  order = np.random.default_rng(seed)
  steps_per_epoch = len(data.train_labels) // _BATCH
  history = History([], [], 0.0)
  with tqdm.tqdm(total=epochs * steps_per_epoch, unit="step") as bar:
    for epoch in range(epochs):
      # The rate falls to zero along half a cosine.
      rate = jnp.float32(
        _LEARNING_RATE * (1 + np.cos(np.pi * epoch / epochs)) / 2
      )
      shuffled = order.permutation(len(data.train_labels))
      losses = []
      for step in range(steps_per_epoch):
        batch = shuffled[step * _BATCH : (step + 1) * _BATCH]
        params, averages, velocity, loss = train_step(
          params,
          averages,
          velocity,
          data.train_images[batch],
          data.train_labels[batch],
          rate,
        )
        losses.append(loss)
        bar.update()
      history.loss.append(float(np.mean(jax.device_get(losses))))
      history.accuracy.append(
        float(accuracy(params, averages, data.test_images, data.test_labels))
      )
      bar.set_postfix(
        loss=f"{history.loss[-1]:.4f}",
        test_accuracy=f"{history.accuracy[-1]:.1%}",
      )
  return dataclasses.replace(history, seconds=time.perf_counter() - start)


def write_plot(history: History, path: pathlib.Path) -> None:
  """Draws loss and test accuracy by epoch into a PNG file."""
  # Imported here: a run without --plot does not pay for it.
  from matplotlib import figure as figure_lib

  epochs = range(1, len(history.loss) + 1)
  figure = figure_lib.Figure(figsize=(8, 3.5), layout="constrained")
  left, right = figure.subplots(1, 2)
  left.semilogy(epochs, history.loss, color="#b5482a", marker=".")
  left.set_title("training loss")
  right.plot(
    epochs,
    [100 * value for value in history.accuracy],
    color="#2a7f62",
    marker=".",
  )
  right.set_title("test accuracy, %")
  right.axhline(95, color="black", linewidth=0.8, linestyle=":")
  for panel in (left, right):
    panel.set_xlabel("epoch")
    panel.grid(alpha=0.3)
  figure.savefig(path, dpi=120, format="png")


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains, prints the final accuracy, and draws it if asked to."""
  parser = argparse.ArgumentParser(
    description="Trains a convolutional classifier on scikit-learn's digits."
  )
  parser.add_argument("--epochs", type=int, default=20)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--plot", metavar="FILE.png", help="draw loss and accuracy into this file"
  )
  options = parser.parse_args(arguments)
  if options.epochs < 1:
    parser.error(f"--epochs must be at least 1, but got {options.epochs}")
  data = load()
  history = train(data, epochs=options.epochs, seed=options.seed)
  print(
    f"test accuracy {history.accuracy[-1]:.2%} on "
    f"{len(data.test_labels)} images after {options.epochs} epochs, "
    f"{history.seconds:.1f} s"
  )
  if options.plot is not None:
    # Under `bazel run` the program starts in another folder.
    folder = os.environ.get("BUILD_WORKING_DIRECTORY", ".")
    path = pathlib.Path(folder, options.plot)
    write_plot(history, path)
    print(f"wrote {path}")


if __name__ == "__main__":
  main()
