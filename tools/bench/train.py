"""Suite `train`: a step of training ResNet-50, a ViT and a small GPT.

Forward pass, gradients and optimizer, jitted, model and optimizer donated.
Times are those of an image or of a token. Baselines are the same program on
`flax.nnx`, and PyTorch's models where it is installed: called as they are, and
compiled; channels last, under autocast for bfloat16.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import functools
import importlib.util
from typing import Any

import jax
from jax import numpy as jnp
import optax

import nnx
from tools.bench import compare, harness, models, train_models

NAME = "train"
_MODELS: dict[str, train_models.Spec] = {
  "resnet50": train_models.ResNet(),
  "vit_s16": train_models.ViT(),
  "gpt_10m": train_models.GPT(),
  "gpt_1m": train_models.GPT(12, 128, 4, 4, 64, 256),
}
_QUICK_MODELS: dict[str, train_models.Spec] = {
  "resnet": train_models.ResNet(2, 32, 8, (1, 1), 10),
  "vit": train_models.ViT(2, 16, 2, 1, 16, 8, 10),
  "gpt": train_models.GPT(2, 16, 2, 1, 8, 32),
}
# Learning rates at which two steps change the loss by much.
_SGD_RATE = 0.01
_ADAM_RATE = 1e-3
_WEIGHT_DECAY = 1e-4

# Losses of three steps, in different orders of sums.
_TOLERANCES = {
  "float32": compare.Tolerance(2e-3, 0.0),
  "bfloat16": compare.Tolerance(3e-2, 0.0),
}

Library = models.Library


def _is_convolutional(spec: train_models.Spec) -> bool:
  return isinstance(spec, train_models.ResNet)


def loss_of(model: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the mean cross entropy of a batch."""
  logits = model(inputs).astype(jnp.float32)
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
  return losses.mean()


def _transformation(spec: train_models.Spec) -> Any:
  if _is_convolutional(spec):
    return optax.sgd(_SGD_RATE, momentum=0.9)
  return optax.adamw(_ADAM_RATE, weight_decay=_WEIGHT_DECAY)


def _three_losses(step: Any, state: Any, loss: Any) -> jax.Array:
  """Returns the loss of a first step, and those of two more."""
  return jnp.array([float(loss), float(step(state)), float(step(state))])


def _observed(side: harness.Side) -> harness.Side:
  observe = functools.partial(_three_losses, side.call)
  return dataclasses.replace(side, observe=observe)


def _torch_sides(
  spec: train_models.Spec, dtype: str, arrays: dict[str, jax.Array]
) -> Iterator[harness.Side]:
  """Yields the sides of PyTorch, which start with our values."""
  import torch  # pyright: ignore[reportMissingImports]

  from tools.bench import train_torch

  if _is_convolutional(spec):
    make_optimizer = functools.partial(
      torch.optim.SGD, lr=_SGD_RATE, momentum=0.9
    )
  else:
    make_optimizer = functools.partial(
      torch.optim.AdamW, lr=_ADAM_RATE, weight_decay=_WEIGHT_DECAY
    )
  for name, compiled in (("torch", False), ("torch.compile", True)):
    step = train_torch.Step(spec, dtype, compiled, make_optimizer)
    yield harness.Side(
      name=name,
      fresh=functools.partial(step.start, arrays),
      call=step,
      optional=compiled,  # which needs a compiler
    )


def _build(spec: train_models.Spec, dtype: str) -> harness.Comparison:
  """Builds the row of a model and a dtype."""
  batch = train_models.batch(spec)

  def make(library: Library, name: str) -> harness.Side:
    return models.training(
      library,
      f"{name}.jit",
      functools.partial(train_models.model, library, spec, dtype),
      _transformation(spec),
      loss_of,
      batch,
    )

  comparison = models.comparison(
    make,
    in_a_call=batch[1].size,
    tolerance=_TOLERANCES[dtype],
  )
  sides = [*comparison.baselines]
  if importlib.util.find_spec("torch") is not None:
    model = train_models.model(nnx, spec, dtype)
    arrays = models.arrays(nnx, nnx.state(model))
    sides += _torch_sides(spec, dtype, arrays)
  return dataclasses.replace(
    comparison,
    ours=_observed(comparison.ours),
    baselines=[_observed(side) for side in sides],
  )


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every model in both dtypes."""
  specs = _QUICK_MODELS if settings.quick else _MODELS
  return [
    harness.Case(
      suite=NAME,
      op=op,
      case=train_models.describe(spec),
      dtype=dtype,
      build=functools.partial(_build, spec, dtype),
    )
    for op, spec in specs.items()
    for dtype in ("float32", "bfloat16")
  ]
