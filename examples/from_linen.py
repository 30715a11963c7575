"""Trains a model in Flax Linen, moves it to `nnx`, and goes on training there.

Half of the steps are Linen's: a module, its variables, and a step that carries
them around. Then the bridge makes a Module of it, with the same variables and
so the same answers. Last, its weights go into a model that is written in `nnx`,
which trains on from where Linen stopped.

    bazel run //examples:from_linen -- --plot from_linen.png
"""

from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm

from examples import digits, shared
import nnx


class LinenMlp(nn.Module):
  """The model of `shared.Mlp`, as it is written in Linen."""

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    """Maps images `[b, 8, 8, 1]` to logits `[b, 10]`."""
    x = images.reshape(images.shape[0], 64)
    x = nn.Dense(128, name="hidden")(x)
    norm = nn.BatchNorm(
      use_running_average=not train, momentum=0.9, name="norm"
    )
    return nn.Dense(10, name="out")(nn.relu(norm(x)))


TX = optax.adam(1e-3)


@jax.jit
def linen_step(
  variables: Any, opt_state: Any, images: jax.Array, labels: jax.Array
) -> tuple[Any, Any, jax.Array]:
  """Takes one step in Linen: everything that changes goes in and comes out."""

  def loss_fn(params):
    logits, updates = LinenMlp().apply(
      {**variables, "params": params}, images, train=True, mutable="batch_stats"
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updates

  (loss, updates), grads = jax.value_and_grad(loss_fn, has_aux=True)(
    variables["params"]
  )
  steps, opt_state = TX.update(grads, opt_state)
  params = optax.apply_updates(variables["params"], steps)
  return {"params": params, **updates}, opt_state, loss


def in_a_bridge(variables: Any) -> nnx.bridge.ToNNX:
  """Returns the Linen module as a Module, with these variables."""
  model = nnx.bridge.ToNNX(LinenMlp(), rngs=nnx.Rngs(0))
  nnx.bridge.load_linen_variables(model, variables)
  return model


def written_anew(variables: Any) -> shared.Mlp:
  """Returns a model of `nnx`, whose attributes have Linen's names."""
  model = shared.Mlp(rngs=nnx.Rngs(0))
  nnx.update(model, nnx.bridge.linen_vars_to_nnx_attrs(variables))
  return model


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains in both, and prints what the three models get right."""
  options = shared.options(__doc__, arguments, steps=200)
  data = digits.load()
  half = max(1, options.steps // 2)

  images, labels = data.test_images, data.test_labels
  variables = LinenMlp().init(jax.random.key(0), images[:1], train=True)
  opt_state = TX.init(variables["params"])
  first = []
  for batch in tqdm.tqdm(shared.batches(data, half), "Linen", half):
    variables, opt_state, loss = linen_step(variables, opt_state, *batch)
    first.append(loss)
  theirs = LinenMlp().apply(variables, images, train=False)

  bridged = in_a_bridge(variables)
  same = nnx.jit(lambda model, x: model(x, train=False))(bridged, images)
  np.testing.assert_allclose(same, theirs, atol=1e-4)

  model = written_anew(variables)
  moved = nnx.view(model, use_running_average=True)(images)
  np.testing.assert_allclose(moved, theirs, atol=1e-4)
  print(f"in Linen:      {jnp.mean(theirs.argmax(-1) == labels):.1%}")
  print(f"in a bridge:   {jnp.mean(same.argmax(-1) == labels):.1%}")
  print(f"written anew:  {shared.accuracy(model, images, labels):.1%}")

  optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
  steps = shared.batches(data, half, seed=1)
  second = [
    shared.train_step(model, optimizer, *batch)
    for batch in tqdm.tqdm(steps, "nnx", half)
  ]
  print(f"trained on:    {shared.accuracy(model, images, labels):.1%}")
  alone = [float("nan")] * half
  lines = {"Linen": first, "nnx, from there": [*alone, *second]}
  shared.plot(options.plot, "training loss", lines)


if __name__ == "__main__":
  main()
