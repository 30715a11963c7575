"""Trains, saves with orbax, and goes on later as if nothing had happened.

One run goes through. A second one trains for the first half, saves model,
optimizer and random streams, and forgets all of it; a third one reads that and
trains the other half. Its losses are those of the run that went through, to the
bit: dropout draws on from where it was.

    bazel run //examples:checkpoint -- --plot checkpoint.png
"""

from collections.abc import Sequence
import pathlib
import tempfile

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import tqdm

from examples import digits, shared
import nnx


class Dropped(shared.Mlp):
  """The same model, with dropout: its random streams are state as well."""

  def __init__(self, *, rngs: nnx.Rngs):
    super().__init__(rngs=rngs)
    self.drop = nnx.Dropout(0.2, rngs=rngs)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images `[b, 8, 8, 1]` to logits `[b, 10]`."""
    return super().__call__(self.drop(images))


def make() -> tuple[Dropped, nnx.Optimizer]:
  """Returns a new model, and its optimizer."""
  model = Dropped(rngs=nnx.Rngs(0))
  return model, nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


def train(
  data: digits.Data,
  objects: tuple[Dropped, nnx.Optimizer],
  steps: range,
  what: str,
) -> list[float]:
  """Takes some steps of one long run, and returns their losses."""
  batches = list(shared.batches(data, steps.stop))[steps.start :]
  bar = tqdm.tqdm(batches, what)
  return [float(shared.train_step(*objects, *batch)) for batch in bar]


def save(folder: pathlib.Path, objects: tuple, step: int) -> None:
  """Writes the state of objects, under the number of a step."""
  with ocp.CheckpointManager(folder) as manager:
    manager.save(step, args=ocp.args.StandardSave(nnx.state(objects)))


def resume(folder: pathlib.Path) -> tuple[int, tuple[Dropped, nnx.Optimizer]]:
  """Returns the step of the last checkpoint, and the objects as they were."""
  objects = nnx.eval_shape(make)  # shapes; nothing is computed to be replaced
  with ocp.CheckpointManager(folder) as manager:
    step = manager.latest_step()
    target = ocp.args.StandardRestore(nnx.state(objects))
    nnx.update(objects, manager.restore(step, args=target))
  return step, objects


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains three times, and compares."""
  options = shared.options(__doc__, arguments, steps=200)
  data = digits.load()
  half = (options.steps + 1) // 2
  through = train(data, make(), range(options.steps), "through")
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    objects = make()
    before = train(data, objects, range(half), "first half")
    save(folder, objects, half)
    del objects

    step, objects = resume(folder)
  after = train(data, objects, range(step, options.steps), "resumed")
  np.testing.assert_array_equal(through, before + after)
  images, labels = data.test_images, data.test_labels
  objects[0].eval()
  print(
    f"resumed at step {step}; the losses of all {options.steps} steps are those"
    " of the run that went through"
  )
  print(f"test accuracy {shared.accuracy(objects[0], images, labels):.1%}")
  resumed = [float("nan")] * half + after
  lines = {"through": through, "resumed": resumed}
  shared.plot(options.plot, "training loss", lines)


if __name__ == "__main__":
  main()
