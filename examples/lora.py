"""Teaches a trained classifier turned digits by training few numbers: LoRA.

A small network learns digits that stand upright, then meets the same digits
turned by a quarter. Its own weights stay as they are. Each of its two linear
layers gets a product of two thin matrices beside it, and those alone learn.
Taken away, they leave the old network, to the bit.

    bazel run //examples:lora -- --plot lora.png
"""

from collections.abc import Sequence
import dataclasses

import jax
import numpy as np
import optax
import tqdm

from examples import digits, shared
import nnx

RANK = 4


def turned(data: digits.Data) -> digits.Data:
  """Returns the same digits, turned by a quarter."""
  return dataclasses.replace(
    data,
    train_images=np.rot90(data.train_images, axes=(1, 2)),
    test_images=np.rot90(data.test_images, axes=(1, 2)),
  )


def adapt(model: shared.Mlp, rngs: nnx.Rngs) -> shared.Mlp:
  """Returns a model with the same Variables, and LoRA beside its layers."""
  adapted = nnx.view(model, use_running_average=True)  # its averages stay
  for name in ("hidden", "out"):
    layer = getattr(adapted, name)
    inputs, outputs = layer.kernel.shape
    lora = nnx.LoRA(inputs, RANK, outputs, base_module=layer, rngs=rngs)
    setattr(adapted, name, lora)
  return adapted


@nnx.jit
def lora_step(model, optimizer, images, labels) -> jax.Array:
  """Takes one step that moves the new matrices alone, and returns the loss."""
  only = nnx.DiffState(0, nnx.LoRAParam)
  loss, grads = nnx.value_and_grad(shared.loss_fn, argnums=only)(
    model, images, labels
  )
  optimizer.update(model, grads)
  return loss


def count(model: nnx.Module, kind: type[nnx.Variable]) -> int:
  """Returns how many numbers there are in the Variables of a kind."""
  return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, kind)))


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains, adapts, and prints what both models get right."""
  options = shared.options(__doc__, arguments, steps=300)
  upright = digits.load()
  other = turned(upright)

  model = shared.Mlp(rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
  bar = tqdm.tqdm(shared.batches(upright, options.steps), total=options.steps)
  first = [shared.train_step(model, optimizer, *batch) for batch in bar]
  base = nnx.to_pure_dict(nnx.state(model))

  adapted = adapt(model, nnx.Rngs(1))
  optimizer = nnx.Optimizer(adapted, optax.adam(3e-2), wrt=nnx.LoRAParam)
  bar = tqdm.tqdm(shared.batches(other, options.steps), total=options.steps)
  second = [lora_step(adapted, optimizer, *batch) for batch in bar]

  jax.tree.map(
    np.testing.assert_array_equal, base, nnx.to_pure_dict(nnx.state(model))
  )
  test = (upright.test_images, upright.test_labels)
  turned_test = (other.test_images, other.test_labels)
  print(f"upright digits:            {shared.accuracy(model, *test):.1%}")
  print(
    f"turned, before:            {shared.accuracy(model, *turned_test):.1%}"
  )
  print(
    f"turned, with LoRA:         {shared.accuracy(adapted, *turned_test):.1%}"
  )
  print(
    f"numbers trained: {count(adapted, nnx.LoRAParam)} beside"
    f" {count(model, nnx.Param)}, which did not move"
  )
  lines = {"upright, all": first, "turned, LoRA alone": second}
  shared.plot(options.plot, "training loss", lines)


if __name__ == "__main__":
  main()
