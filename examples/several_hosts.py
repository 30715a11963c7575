"""Trains on several hosts, and goes on after one of them is gone.

Every host runs this program. The processes find each other by
`jax.distributed`, see one mesh of all devices, and train a small transformer,
the same whatever the layout: each device has all parameters and a part of the
batch ("data"), parameters are split as well ("fsdp"), heads and hidden features
are ("tensor"), or all of it together ("all").

Checkpoints are written by all processes, while training goes on. A preemption
notice, SIGTERM to any of them, lets all of them save after the same step and
end. What was killed goes on from the last checkpoint, on as many processes and
devices as there are then.

Here, as four processes of one device each, that stand for four hosts:

    python -m examples.several_hosts --local=4 --layout=all --folder=run

On real hosts, each with its number, and a folder of files that all of them see:

    python -m examples.several_hosts --coordinator=host0:1234 --processes=4 \
      --process=2 --layout=all --folder=/shared/run
"""

import argparse
from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import orbax.checkpoint as ocp

import nnx

_VOCABULARY = 32
_SIZE = 32
_HEADS = 4
_BLOCKS = 1
_BATCH = 16
_LENGTH = 16

_NAMES = ("embed", "heads", "mlp")


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a model and a batch are split over devices.

  Attributes:
    model: devices along the axis "model" of the mesh; the others are along
      "data", over which the batch is always split.
    rules: the mesh axes of names of axes of parameters.
  """

  model: int = 1
  rules: dict[str, str] = dataclasses.field(default_factory=dict)

  def mesh(self) -> jax.sharding.Mesh:
    """Returns the mesh of all devices of all processes."""
    count = jax.device_count()
    if count % self.model:
      raise ValueError(
        f"The number of devices must be a multiple of {self.model} for this"
        f" layout, but is {count}."
      )
    auto = (jax.sharding.AxisType.Auto,) * 2
    shape = (count // self.model, self.model)
    return jax.make_mesh(shape, ("data", "model"), axis_types=auto)

  @contextlib.contextmanager
  def on(self, mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Lets what is made inside be split so."""
    rules = [(name, self.rules.get(name)) for name in _NAMES]
    with jax.set_mesh(mesh), nnx.logical_axis_rules(rules):
      yield


_FSDP = {"embed": "data"}
_TENSOR = {"heads": "model", "mlp": "model"}
LAYOUTS = {
  "data": Layout(),
  "fsdp": Layout(rules=_FSDP),
  "tensor": Layout(2, _TENSOR),
  "all": Layout(2, _FSDP | _TENSOR),
}


def _named(*names: str | None) -> dict[str, Any]:
  return {"out_sharding": names}


class Block(nnx.Module):
  """Attention and a perceptron, each around its norm."""

  def __init__(self, rngs: nnx.Rngs):
    self.norm = nnx.LayerNorm(_SIZE, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      _HEADS,
      _SIZE,
      decode=False,
      use_bias=False,
      rngs=rngs,
      kernel_metadata=_named("embed", "heads", None),
      out_kernel_metadata=_named("heads", None, "embed"),
    )
    self.up = nnx.Linear(
      _SIZE,
      4 * _SIZE,
      rngs=rngs,
      kernel_metadata=_named("embed", "mlp"),
      bias_metadata=_named("mlp"),
    )
    self.down = nnx.Linear(
      4 * _SIZE, _SIZE, rngs=rngs, kernel_metadata=_named("mlp", "embed")
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns `[b, t, size]`, as x is."""
    x += self.attention(self.norm(x), is_causal=True)
    return x + self.down(jax.nn.gelu(self.up(x)))


class Model(nnx.Module):
  """A transformer that predicts the next of a sequence of numbers."""

  def __init__(self, rngs: nnx.Rngs):
    self.embed = nnx.Embed(
      _VOCABULARY,
      _SIZE,
      rngs=rngs,
      embedding_metadata=_named(None, "embed"),
    )
    self.blocks = nnx.List([Block(rngs) for _ in range(_BLOCKS)])
    self.norm = nnx.LayerNorm(_SIZE, rngs=rngs)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Returns logits `[b, t, vocabulary]` for tokens `[b, t]`."""
    x = self.embed(tokens)
    for block in self.blocks:
      x = block(x)
    return self.embed.attend(self.norm(x))


def make() -> tuple[Model, nnx.Optimizer]:
  """Makes a model and its optimizer, on the mesh that is set.

  Under `nnx.jit` every array is made where it belongs, and no host ever holds
  all of a model.
  """
  model = Model(nnx.Rngs(0))
  return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def batch(step: int) -> np.ndarray:
  """Returns the tokens of a step, `[b, t + 1]`: multiples, each of some number.

  They depend on the step alone, so that a job that is restarted sees those
  that it would have seen. A real one would read the rows of its own devices.
  """
  rng = np.random.default_rng(step)
  start, factor = rng.integers(1, 6, (2, _BATCH, 1))
  return (start + factor * np.arange(_LENGTH + 1)) % _VOCABULARY


def place(rows: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
  """Splits rows over the devices; a process touches those of its own alone."""
  return jax.make_array_from_callback(
    rows.shape, NamedSharding(mesh, P("data")), lambda index: rows[index]
  )


@nnx.jit(donate_argnums=(0, 1))
def train_step(
  model: Model, optimizer: nnx.Optimizer, tokens: jax.Array
) -> jax.Array:
  """Does one step; returns the loss before it, the same on every device."""

  def loss(model):
    logits = model(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(
      logits, tokens[:, 1:]
    ).mean()

  value, grads = nnx.value_and_grad(loss)(model)
  optimizer.update(model, grads)
  return value


def restore(manager: ocp.CheckpointManager, objects: Any) -> int:
  """Reads the last checkpoint into objects, wherever those lie.

  It may have been written by another number of processes, in another layout:
  each process reads what its own devices want.

  Returns:
    The number of steps that were done; 0 without a checkpoint.
  """
  step = manager.latest_step()
  if step is None:
    return 0
  wanted = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    nnx.state(objects),
  )
  nnx.update(
    objects, manager.restore(step, args=ocp.args.StandardRestore(wanted))
  )
  return step


def train(
  layout: Layout,
  folder: str,
  steps: int,
  save_every: int,
  pause: float = 0.0,
) -> bool:
  """Trains from the last checkpoint on.

  Args:
    layout: how to split.
    folder: that all processes see, for checkpoints and `losses.jsonl`.
    steps: until so many are done, those before the checkpoint included.
    save_every: after so many steps a checkpoint is written.
    pause: seconds to wait after each step, to have time to watch.

  Returns:
    Whether all steps are done; False after a preemption notice.
  """
  mesh = layout.mesh()
  manager = ocp.CheckpointManager(
    os.path.join(os.path.abspath(folder), "checkpoints"),
    options=ocp.CheckpointManagerOptions(
      save_interval_steps=save_every,
      max_to_keep=3,
      enable_async_checkpointing=True,
    ),
  )
  with layout.on(mesh), manager:
    objects = nnx.jit(make)()
    done, preempted = restore(manager, objects), False
    while done < steps and not preempted:
      loss = float(train_step(*objects, place(batch(done), mesh)))
      done += 1
      _log(folder, done, loss)
      # All processes get the same answer, and the notice of any of them.
      preempted = manager.reached_preemption(done)
      # Copies to the host's memory; files are written while the next steps run.
      manager.save(
        done,
        args=ocp.args.StandardSave(nnx.state(objects)),
        force=preempted or done == steps,
      )
      time.sleep(pause)
    manager.wait_until_finished()
  return not preempted


def _log(folder, step, loss):
  if jax.process_index() == 0:
    line = {"step": step, "loss": loss, "processes": jax.process_count()}
    with open(os.path.join(folder, "losses.jsonl"), "a") as file:
      print(json.dumps(line), file=file, flush=True)


def launch(
  processes: int, devices: int, arguments: Sequence[str], **options: Any
) -> list[subprocess.Popen[str]]:
  """Starts processes on this machine, each with CPU devices of its own.

  Args:
    processes: how many.
    devices: of each of them.
    arguments: of this program.
    **options: of `subprocess.Popen`.
  """
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
  return [
    subprocess.Popen(
      [
        sys.executable,
        __file__,
        f"--coordinator=127.0.0.1:{port}",
        f"--processes={processes}",
        f"--process={i}",
        f"--devices={devices}",
        *arguments,
      ],
      text=True,
      **options,
    )
    for i in range(processes)
  ]


def wait(processes: Sequence[subprocess.Popen[str]]) -> int:
  """Waits for all, or until one fails: then the others wait for it in vain.

  Returns:
    The exit status of the first that failed, or 0.
  """
  try:
    while True:
      statuses = [process.poll() for process in processes]
      failed = next(filter(None, statuses), 0)
      if failed or None not in statuses:
        return failed
      time.sleep(0.1)
  finally:
    for process in processes:
      if process.poll() is None:
        process.kill()
        process.wait()


def _arguments(argv):
  parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
  parser.add_argument("--folder", required=True)
  parser.add_argument("--layout", choices=LAYOUTS, default="all")
  parser.add_argument("--steps", type=int, default=60)
  parser.add_argument("--save_every", type=int, default=10)
  parser.add_argument("--pause", type=float, default=0.0)
  parser.add_argument("--local", type=int, help="start so many processes here")
  parser.add_argument("--coordinator", help="host:port of process 0")
  parser.add_argument("--processes", type=int)
  parser.add_argument("--process", type=int)
  parser.add_argument("--devices", type=int, help="CPU devices of a process")
  return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
  """Runs one process of a job, or all of them on this machine."""
  options = _arguments(argv)
  pathlib.Path(options.folder).mkdir(parents=True, exist_ok=True)
  if options.local:
    given = list(sys.argv[1:] if argv is None else argv)
    rest = [a for a in given if not a.startswith(("--local", "--devices"))]
    env = os.environ | {
      "JAX_PLATFORMS": "cpu",
      "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    started = launch(options.local, options.devices or 1, rest, env=env)

    def notify(number, frame):
      del number, frame
      started[0].send_signal(signal.SIGTERM)  # one is enough

    signal.signal(signal.SIGTERM, notify)
    return wait(started)
  if options.devices:
    jax.config.update("jax_num_cpu_devices", options.devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
  # Without arguments, jax asks Slurm, Kubernetes or the cloud.
  jax.distributed.initialize(
    options.coordinator, options.processes, options.process
  )
  finished = train(
    LAYOUTS[options.layout],
    options.folder,
    options.steps,
    options.save_every,
    options.pause,
  )
  if jax.process_index() == 0:
    print("done" if finished else "saved, as there was a preemption notice")
  jax.distributed.shutdown()
  return 0


if __name__ == "__main__":
  sys.exit(main())
