"""Compares plans with what virtual devices of this machine take.

    python -m tools.plan.check --json tools/plan/checked.json

A small transformer is trained and decodes on 1, 2, 4 and 8 devices, with the
batch split over them, or heads, hidden features and vocabulary. In turns with
each step, kernels are timed alone (`host.py`), and the plan is made of those.
The exit status is 1 if a plan is off by more than the tolerance.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import json
import pathlib
import sys
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

import nnx
from tools.plan import chips, decoding, host, parts, report, training
from tools.plan import mesh as mesh_lib
from tools.plan import model as model_lib

_RULES = (("wide", "tensor"),)


@dataclasses.dataclass(frozen=True)
class Trial:
  """What is run, and planned.

  Attributes:
    decode: whether it decodes, else it trains.
    axis: of the mesh.
    devices: along it.
    model: what runs.
    batch: sequences of a step.
    length: tokens of each, or the context.
  """

  decode: bool
  axis: str
  devices: int
  model: model_lib.Model
  batch: int
  length: int

  @property
  def job(self) -> str:
    """Its name in a table."""
    kind = "decoding" if self.decode else "training"
    return f"{kind}, {self.batch} x {self.length}"

  def sizes(self) -> host.Sizes:
    """Returns what a device has of the step."""
    model = self.model
    if self.axis == "data":
      return host.Sizes(model, self.batch // self.devices, self.length)
    part = {
      name: getattr(model, name) // self.devices
      for name in ("heads", "kv_heads", "hidden", "vocabulary")
    }
    return host.Sizes(
      dataclasses.replace(model, **part), self.batch, self.length
    )

  def plan(self, chip: chips.Chip) -> parts.Plan:
    """Returns the step on paper."""
    axes = mesh_lib.Mesh(**{self.axis: self.devices})
    if self.decode:
      return decoding.plan(
        self.model,
        chip,
        axes,
        decoding.Job(
          self.batch,
          self.length,
          weights="float32",
          cache="float32",
          compute="float32",
        ),
      )
    return training.plan(
      self.model,
      chip,
      axes,
      training.Job(
        self.batch,
        self.length,
        recompute="elementwise",
        compute="float32",
        projections=3,
        # Cores that send do not calculate.
        overlap=0.0,
      ),
    )

  def step(self) -> host.Call:
    """Returns the step of a new model."""
    group = host.mesh(
      **{
        axis: self.devices if axis == self.axis else 1
        for axis in ("data", "tensor")
      }
    )

    @contextlib.contextmanager
    def there():
      with jax.set_mesh(group), nnx.logical_axis_rules(_RULES):
        yield

    with there():
      step = _step(self, group)

    def call():
      with there():
        return step()

    return call

  def compare(self, timer: host.Timer) -> tuple[float, parts.Plan]:
    """Returns the seconds of a step, and the plan of it."""
    machine = host.Machine(self.devices, self.sizes(), self.decode)
    *kernels, step = timer.seconds([*machine.calls, self.step()])
    return step, self.plan(machine.chip(kernels))


def _named(*names: str | None) -> dict[str, Any]:
  return {"out_sharding": names}


class _Block(nnx.Module):
  """Attention and a perceptron, each behind its norm."""

  def __init__(self, sizes: model_lib.Model, decode: bool, rngs: nnx.Rngs):
    self.before = nnx.LayerNorm(sizes.features, rngs=rngs)
    self.attention = nnx.MultiHeadAttention(
      sizes.heads,
      sizes.features,
      decode=decode,
      use_bias=False,
      rngs=rngs,
      kernel_metadata=_named(None, "wide", None),
      out_kernel_metadata=_named("wide", None, None),
    )
    self.between = nnx.LayerNorm(sizes.features, rngs=rngs)
    self.up = nnx.Linear(
      sizes.features,
      sizes.hidden,
      use_bias=False,
      rngs=rngs,
      kernel_metadata=_named(None, "wide"),
    )
    self.down = nnx.Linear(
      sizes.hidden,
      sizes.features,
      use_bias=False,
      rngs=rngs,
      kernel_metadata=_named("wide", None),
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    causal: dict[str, Any] = {}
    if not self.attention.decode:
      causal["is_causal"] = True
    x += self.attention(self.before(x), **causal)
    return x + self.down(jax.nn.gelu(self.up(self.between(x))))


class _Decoder(nnx.Module):
  """A transformer whose sizes are those of a plan."""

  def __init__(self, sizes: model_lib.Model, decode: bool, rngs: nnx.Rngs):
    self.embed = nnx.Embed(
      sizes.vocabulary,
      sizes.features,
      rngs=rngs,
      embedding_metadata=_named("wide", None),
    )
    self.blocks = nnx.List(
      [_Block(sizes, decode, rngs) for _ in range(sizes.layers)]
    )
    self.norm = nnx.LayerNorm(sizes.features, rngs=rngs)
    self.head = nnx.Linear(
      sizes.features,
      sizes.vocabulary,
      use_bias=False,
      rngs=rngs,
      kernel_metadata=_named(None, "wide"),
    )

  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = self.embed(tokens)
    for block in self.blocks:
      x = block(x)
    return self.head(self.norm(x))


def _step(trial: Trial, group: jax.sharding.Mesh) -> Callable[[], jax.Array]:
  """Returns a step of a new model."""
  rows = NamedSharding(group, P("data"))

  def make():
    model = _Decoder(trial.model, trial.decode, nnx.Rngs(0))
    if trial.decode:
      return model, None
    return model, nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)

  model, optimizer = nnx.jit(make)()
  if trial.decode:
    return _decode_step(trial, model, rows)
  tokens = jax.device_put(
    jnp.ones((trial.batch, trial.length), jnp.int32), rows
  )

  @nnx.jit(donate_argnums=(0, 1))
  def step(model, optimizer, tokens):
    def loss(model):
      return optax.softmax_cross_entropy_with_integer_labels(
        model(tokens), tokens
      ).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value

  return lambda: step(model, optimizer, tokens)


def _decode_step(
  trial: Trial, model: _Decoder, rows: NamedSharding
) -> Callable[[], jax.Array]:
  for block in model.blocks:
    block.attention.init_cache(
      (trial.batch, trial.length, trial.model.features),
      sharding=("data", None, "tensor", None),
    )
  tokens = jax.device_put(jnp.ones((trial.batch, 1), jnp.int32), rows)

  @nnx.jit(donate_argnums=(0,))
  def step(model, tokens):
    for block in model.blocks:
      # The same place at every step, so that each reads a whole cache.
      block.attention.cache_index[...] = jnp.int32(trial.length - 1)
    return model(tokens).argmax(-1)

  return lambda: step(model, tokens)


TRAINED = model_lib.Model(4, 256, 8, 8, 32, 1024, 512, gated=False)
DECODED = model_lib.Model(4, 512, 8, 8, 64, 2048, 512, gated=False)


def trials(devices: Sequence[int], only: str = "") -> Iterator[Trial]:
  """Returns what is compared: each kind on each number of devices."""
  for decode in (False, True):
    if only == ("training" if decode else "decoding"):
      continue
    for count in devices:
      for axis in ("data", "tensor"):
        if count > 1 or axis == "data":
          sizes = (DECODED, 8, 512) if decode else (TRAINED, 8, 128)
          yield Trial(decode, axis, count, *sizes)


def main(arguments: Sequence[str] | None = None) -> int:
  """Prints measured and planned times, and returns the exit status."""
  parser = argparse.ArgumentParser(
    prog="check",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--devices", default="1,2,4,8", metavar="N,N")
  parser.add_argument(
    "--clock",
    choices=("wall", "cpu"),
    default="wall",
    help="cpu: time on cores over their number, where others want them too",
  )
  parser.add_argument("--only", choices=("training", "decoding"), default="")
  parser.add_argument("--samples", type=int, default=5)
  parser.add_argument("--tolerance", type=float, default=0.3)
  parser.add_argument("--json", metavar="FILE", help="write the rows here")
  parser.add_argument("--parts", action="store_true", help="print whole plans")
  options = parser.parse_args(arguments)
  timer = host.Timer(options.clock, options.samples)
  devices = [int(count) for count in options.devices.split(",")]
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", max(devices))
  rows: list[dict[str, Any]] = []
  for trial in trials(devices, options.only):
    measured, plan = trial.compare(timer)
    row = {
      "job": trial.job,
      "mesh": f"{trial.axis}={trial.devices}",
      "measured": measured,
      "predicted": plan.seconds,
    }
    rows.append(row)
    print(
      f"{row['job']:22} {row['mesh']:10}"
      f" {report.seconds(measured):>9} measured,"
      f" {report.seconds(plan.seconds):>9} on paper:"
      f" {plan.seconds / measured:.2f}",
      flush=True,
    )
    if options.parts:
      print(report.text(plan), flush=True)
  if options.json:
    found = {
      "clock": options.clock,
      "cores": host.cores(),
      "jax": jax.__version__,
      "rows": rows,
    }
    pathlib.Path(options.json).write_text(
      json.dumps(found, indent=1) + "\n", encoding="utf-8"
    )
  off = [
    row
    for row in rows
    if not 1 - options.tolerance
    <= row["predicted"] / row["measured"]
    <= 1 + options.tolerance
  ]
  for row in off:
    print(f"off: {row['job']}, {row['mesh']}", file=sys.stderr)
  return 1 if off else 0


if __name__ == "__main__":
  sys.exit(main())
