"""Trains a deep model as a pipeline of devices, each with some of its layers.

A batch is cut into microbatches that follow each other through the devices.
Two schedules get the same loss and gradients:

- GPipe (Huang et al., 2019, arXiv:1811.06965): all microbatches go forward,
  then all go back. Until then a device keeps what it got of each of them.
- 1F1B (Narayanan et al., 2021, arXiv:2104.04473): a microbatch goes back as
  soon as it has reached the end, so a device keeps no more of them than there
  are devices, however many microbatches there are. It idles for as long.

Both keep the input of a device's layers alone and compute the layers again on
the way back. Eight virtual devices of the CPU stand for eight real ones.

    bazel run //examples:pipeline -- --plot pipeline.png
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import tqdm

from examples import digits, shared
import nnx

AXIS = "stage"
STAGES = 8
SIZE = 32
LAYERS = 16

# Of blocks, which are stacked, a device has some; it has all of the rest, which
# the first and the last device use.
LAYOUT = nnx.StateSharding({nnx.PathContains("blocks"): P(AXIS), ...: P()})

Stage = Callable[[Any, jax.Array, Any], tuple[jax.Array, jax.Array]]
Schedule = Callable[
  [Stage, Any, jax.ShapeDtypeStruct, Any, str], tuple[jax.Array, Any]
]


def _pick(batches: Any, number: jax.Array) -> Any:
  return jax.tree.map(lambda leaves: leaves[number], batches)


def _zeros(axis: str, shape: tuple[int, ...] = (), dtype: Any = jnp.float32):
  """Makes zeros that each device has of its own."""
  return lax.pcast(jnp.zeros(shape, dtype), axis, to="varying")


def gpipe(
  stage: Stage,
  params: Any,
  between: jax.ShapeDtypeStruct,
  batches: Any,
  axis: str,
) -> tuple[jax.Array, Any]:
  """Computes a loss and its gradients by GPipe, inside of a `shard_map`.

  Args:
    stage: what a device does with a microbatch: `(params, x, batch) -> (y,
      loss)`, where x is the y of the device before. Only the last loss counts;
      the others are 0. The first device takes its input from the batch.
    params: of the device, and varying over the axis, as are the gradients.
    between: shape and dtype of what goes from a device to the next.
    batches: arrays `[microbatches, ...]`, the same on all devices.
    axis: of the mesh, along which the devices follow each other.

  Returns:
    The mean of the losses, and its gradients with respect to `params`.
  """
  stages, here = lax.axis_size(axis), lax.axis_index(axis)
  count = len(jax.tree.leaves(batches)[0])
  onward = [(i, i + 1) for i in range(stages - 1)]

  def total(params):
    def tick(carry, t):
      x, total = carry
      number = t - here
      y, loss = jax.checkpoint(stage)(
        params, x, _pick(batches, jnp.clip(number, 0, count - 1))
      )
      # What runs before the first microbatch and after the last is for nothing.
      total += jnp.where((0 <= number) & (number < count), loss, 0)
      return (lax.ppermute(y, axis, onward), total), None

    start = _zeros(axis, between.shape, between.dtype), _zeros(axis)
    (_, total), _ = lax.scan(tick, start, jnp.arange(count + stages - 1))
    return lax.psum(total, axis) / count

  return jax.value_and_grad(total)(params)


def job(t: Any, here: Any, stages: int) -> tuple[Any, Any]:
  """Says what a device does at a tick of 1F1B.

  A microbatch moves on by a device each tick: forward from the first to the
  last, and at once back again. A new one starts every other tick, so that a
  device goes forward and back in turns, and what it gets is what it needs next.

  Args:
    t: the tick, from 0 to `2 * (microbatches + stages - 1)`.
    here: the number of the device.
    stages: how many devices there are.

  Returns:
    1 for back and 0 for forward, and the number of the microbatch. If there is
    no such microbatch, the device idles.
  """
  back = (t - here) % 2
  return back, (t - here) // 2 + back * (here + 1 - stages)


def one_forward_one_back(
  stage: Stage,
  params: Any,
  between: jax.ShapeDtypeStruct,
  batches: Any,
  axis: str,
) -> tuple[jax.Array, Any]:
  """Does what `gpipe` does by 1F1B; it keeps no more inputs than stages."""
  stages, here = lax.axis_size(axis), lax.axis_index(axis)
  count = len(jax.tree.leaves(batches)[0])

  def tick(carry, t, partners):
    got, kept, total, grads = carry
    back, number = job(t, here, stages)
    valid = (0 <= number) & (number < count)
    batch = _pick(batches, jnp.clip(number, 0, count - 1))
    slot = number % stages

    def idle():
      return got, kept, total, grads  # whoever gets it does not look at it

    def go_forward():
      y, _ = stage(params, got, batch)
      return y, kept.at[slot].set(got), total, grads

    def go_back():
      (_, loss), pull = jax.vjp(
        lambda params, x: stage(params, x, batch), params, kept[slot]
      )
      # The last device got zeros for its y, which nobody asked for.
      new, to_x = pull((got, jnp.ones_like(loss)))
      return to_x, kept, total + loss, jax.tree.map(jnp.add, grads, new)

    sent, *carry = lax.switch(
      jnp.where(valid, 1 + back, 0), (idle, go_forward, go_back)
    )
    return lax.ppermute(sent, axis, partners), *carry

  # At a tick every other device goes forward, and the one after it back: the
  # two exchange activations for gradients.
  pairs = [
    [(i, j) for i in range(stages) if 0 <= (j := i ^ 1) < stages],
    [(i, j) for i in range(stages) if 0 <= (j := (i + 1 ^ 1) - 1) < stages],
  ]

  def two_ticks(carry, t):
    for late, partners in enumerate(pairs):
      carry = tick(carry, 2 * t + late, partners)
    return carry, None

  start = (
    _zeros(axis, between.shape, between.dtype),
    _zeros(axis, (stages, *between.shape), between.dtype),
    _zeros(axis),
    jax.tree.map(lambda leaf: _zeros(axis, leaf.shape, leaf.dtype), params),
  )
  (_, _, total, grads), _ = lax.scan(
    two_ticks, start, jnp.arange(count + stages - 1)
  )
  return lax.psum(total, axis) / count, jax.tree.map(
    lambda leaf: leaf / count, grads
  )


SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_forward_one_back}


class Block(nnx.Module):
  """A residual block of two linear maps."""

  def __init__(self, rngs: nnx.Rngs):
    self.norm = nnx.LayerNorm(SIZE, rngs=rngs)
    self.up = nnx.Linear(SIZE, 2 * SIZE, rngs=rngs)
    self.down = nnx.Linear(2 * SIZE, SIZE, rngs=rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    return x + self.down(nnx.relu(self.up(self.norm(x)))) / LAYERS**0.5


@nnx.split_rngs(splits=LAYERS)
@nnx.vmap
def _stack(rngs: nnx.Rngs) -> Block:
  return Block(rngs)


@nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
def _run(block: Block, x: jax.Array) -> jax.Array:
  return block(x)


class Model(nnx.Module):
  """A classifier of digits, deep enough to be cut into eight."""

  def __init__(self, *, rngs: nnx.Rngs):
    self.first = nnx.Linear(64, SIZE, rngs=rngs)
    self.blocks = _stack(rngs)
    self.last = nnx.Linear(SIZE, 10, rngs=rngs)

  def enter(self, images: jax.Array) -> jax.Array:
    """Maps images `[b, 8, 8, 1]` to features `[b, size]`."""
    return self.first(images.reshape(images.shape[0], 64))

  def run(self, x: jax.Array) -> jax.Array:
    """Applies those blocks that are here."""
    return _run(self.blocks, x)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Maps images `[b, 8, 8, 1]` to logits `[b, 10]`."""
    return self.last(self.run(self.enter(images)))


def _stage(model: Model, x: jax.Array, batch: Any) -> tuple[Any, Any]:
  """Does what a device does with a microbatch."""
  images, labels = batch
  here, last = lax.axis_index(AXIS), lax.axis_size(AXIS) - 1
  x = lax.cond(here == 0, lambda: model.enter(images), lambda: x)
  x = model.run(x)

  def loss():
    return optax.softmax_cross_entropy_with_integer_labels(
      model.last(x), labels
    ).mean()

  return x, lax.cond(here == last, loss, lambda: _zeros(AXIS))


def make_mesh() -> jax.sharding.Mesh:
  """Returns the mesh of all stages."""
  return jax.make_mesh(
    (STAGES,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,)
  )


def make() -> tuple[Model, nnx.Optimizer]:
  """Returns a model and its optimizer."""
  model = Model(rngs=nnx.Rngs(0))
  return model, nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


def pipelined(
  mesh: jax.sharding.Mesh, schedule: Schedule
) -> Callable[[Model, Any], tuple[jax.Array, nnx.State]]:
  """Returns what computes a loss and gradients on the stages of a mesh.

  Args:
    mesh: with an axis of stages.
    schedule: in which order.

  Returns:
    `(model, batches) -> (loss, gradients)`; batches are `[microbatches, ...]`.
  """

  @nnx.shard_map(
    mesh=mesh, in_specs=(LAYOUT, P()), out_specs=(P(), P(AXIS), P())
  )
  def split(model, batches):
    graphdef, blocks, ends = nnx.split(model, nnx.PathContains("blocks"), ...)
    # To each device as if they were its own; their gradients are added up last.
    ends = lax.pcast(ends, AXIS, to="varying")
    loss, (blocks, ends) = schedule(
      lambda params, x, batch: _stage(nnx.merge(graphdef, *params), x, batch),
      (blocks, ends),
      jax.ShapeDtypeStruct((batches[0].shape[1], SIZE), jnp.float32),
      batches,
      AXIS,
    )
    return loss, blocks, lax.psum(ends, AXIS)

  def run(model, batches):
    loss, *grads = split(model, batches)
    return loss, nnx.merge_state(*grads)

  return run


def train(
  batches: Iterable, steps: int, what: str, objects: tuple, loss_and_grads: Any
) -> list[float]:
  """Trains a model and its optimizer in place; returns the losses."""

  @nnx.jit
  def step(model, optimizer, batch):
    loss, grads = loss_and_grads(model, batch)
    optimizer.update(model, grads)
    return loss

  return [
    float(step(*objects, batch)) for batch in tqdm.tqdm(batches, what, steps)
  ]


def main(arguments: Sequence[str] | None = None) -> None:
  """Trains by both schedules and on one device, and compares."""
  options = shared.options(__doc__, arguments, steps=60, microbatches=16)
  if shared.BATCH % options.microbatches:
    raise SystemExit(f"--microbatches must divide {shared.BATCH}")
  data, mesh = digits.load(), make_mesh()
  whole = list(shared.batches(data, options.steps))
  cut = [
    tuple(x.reshape(options.microbatches, -1, *x.shape[1:]) for x in batch)
    for batch in whole
  ]
  losses, memory = {}, {}
  for name, schedule in SCHEDULES.items():
    run = pipelined(mesh, schedule)
    with jax.set_mesh(mesh):
      objects = nnx.jit(make, out_shardings=(LAYOUT, LAYOUT))()
      losses[name] = train(cut, options.steps, name, objects, run)
      compiled = nnx.jit(run).lower(objects[0], cut[0]).compile()
    memory[name] = compiled.memory_analysis().temp_size_in_bytes

  def alone(model, batch):
    return nnx.value_and_grad(shared.loss_fn)(model, *batch)

  one = losses["1 device"] = train(
    whole, options.steps, "1 device", make(), alone
  )
  for name in SCHEDULES:
    np.testing.assert_allclose(losses[name], one, rtol=0.02, atol=0.02)
    print(f"{name}: {memory[name] / 1024:.0f} KiB of temporary memory a device")
  kernel = objects[0].blocks.up.kernel.value
  here = kernel.addressable_shards[0].data.shape
  print(f"blocks.up.kernel {kernel.shape}, {here} a device")
  shared.plot(options.plot, "training loss", losses)


if __name__ == "__main__":
  jax.config.update("jax_num_cpu_devices", STAGES)
  main()
