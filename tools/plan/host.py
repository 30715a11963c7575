"""Measures this machine as a `Chip`: one whose devices are virtual.

All devices of a process on the CPU share its cores, its memory and what moves
between them. What is measured keeps the cores busy, on as many devices as there
are cores, or on fewer where there are fewer; more devices have a share of it
each. Kernels are measured alone, at the sizes at which a step uses them, never
the step.
"""

from __future__ import annotations

from collections.abc import Callable
import dataclasses
import functools
import itertools
import math
import os
import statistics
import time
from typing import Any

import jax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import optax

import kernels
import nnx
from tools.bench import harness
from tools.plan import chips, fabric, training
from tools.plan import model as model_lib

_SOURCE = "measured here"


@dataclasses.dataclass(frozen=True)
class Sizes:
  """At which sizes kernels are measured.

  Attributes:
    model: whose layers they are of.
    rows: sequences of a device. A product of one row is another kernel than one
      of four.
    length: tokens of each, or the context.
  """

  model: model_lib.Model
  rows: int
  length: int


@dataclasses.dataclass(frozen=True)
class Timer:
  """How time is taken.

  Attributes:
    clock: "wall", or "cpu": the time that all threads were on a core, over the
      number of cores. That is what the wall would show if all cores were busy
      with this alone, also where other programs want them.
    samples: of which the median counts.
    least: seconds of a sample, in which a call is repeated.
  """

  clock: str = "wall"
  samples: int = 5
  least: float = 0.05

  def seconds(self, call: Callable[[], Any]) -> float:
    """Returns the seconds of a call.

    Args:
      call: returns arrays, for which is waited.
    """
    clock = harness.WALL
    if self.clock == "cpu":
      clock = harness.Clock("cpu", _busy_ns, harness.Waits.EVERY_CALL)
    side = harness.Side("", fresh=lambda: None, call=lambda _: call())
    settings = harness.Settings(
      repeats=self.samples, sample_seconds=self.least, row_seconds=math.inf
    )
    (found,) = harness.measure([side], settings, clock)
    return statistics.median(found)


def _busy_ns() -> int:
  return time.process_time_ns() // cores()


def cores() -> int:
  """Returns the cores that this process may use."""
  return len(os.sched_getaffinity(0))


def mesh(**axes: int) -> jax.sharding.Mesh:
  """Returns a mesh of the first devices, whose axes the compiler decides on."""
  count = math.prod(axes.values())
  return jax.make_mesh(
    tuple(axes.values()),
    tuple(axes),
    axis_types=(jax.sharding.AxisType.Auto,) * len(axes),
    devices=jax.devices()[:count],
  )


class _Side:
  """Arrays and programs of which each device has its own."""

  def __init__(self, devices: int, timer: Timer):
    self.devices = devices
    self._timer = timer
    self._sharding = NamedSharding(mesh(own=devices), P("own"))

  def array(self, *shape: int) -> jax.Array:
    """Returns numbers, of which each device has so many."""
    whole = (self.devices * shape[0], *shape[1:])
    return jax.device_put(
      jax.random.normal(jax.random.key(0), whole), self._sharding
    )

  def _local(self, function: Callable, donated: tuple[int, ...]) -> Callable:
    return jax.jit(
      jax.shard_map(
        function,
        mesh=self._sharding.mesh,
        in_specs=P("own"),
        out_specs=P("own"),
      ),
      donate_argnums=donated,
    )

  def seconds(self, function: Callable, *arrays: jax.Array) -> float:
    """Returns the seconds of a function of each device's arrays."""
    compiled = self._local(function, ())
    return self._timer.seconds(lambda: compiled(*arrays))

  def gradient_seconds(self, function: Callable, *arrays: jax.Array) -> float:
    """Returns the seconds of a function and its gradient."""

    def run(*arrays):
      value, back = jax.vjp(function, *arrays)
      return back(value)

    return self.seconds(run, *arrays)

  def stepping(self, function: Callable, state: Any) -> float:
    """Returns the seconds of a function whose result is its next argument."""
    compiled = self._local(function, (0,))
    held = [state]

    def call():
      held[0] = compiled(held[0])
      return held[0]

    return self._timer.seconds(call)


def _products(side: _Side, sizes: Sizes) -> float:
  """Operations a second of a layer's products and their gradients.

  They are those of a perceptron with what is between its products, and of a
  projection into heads: XLA multiplies other layouts at other speeds.
  """
  model = sizes.model
  rows = sizes.rows
  x = side.array(rows, sizes.length, model.features)
  up = side.array(model.features, model.hidden)
  down = side.array(model.hidden, model.features)
  heads = side.array(model.features, model.heads, model.head_dim)

  def project(x, heads):
    return jnp.einsum("btf,fnh->btnh", x, heads)

  took = side.gradient_seconds(
    lambda x, up, down: jax.nn.gelu(x @ up) @ down, x, up, down
  ) + 4 * side.gradient_seconds(project, x, heads)
  tokens = rows * sizes.length
  return 6 * tokens * (model.attention + model.expert) / took


def _attention(side: _Side, sizes: Sizes) -> float:
  """Operations a second of attention and its gradient."""
  model = sizes.model
  rows = sizes.rows

  def attend(q, k, v):
    return nnx.dot_product_attention(q, k, v, is_causal=True)

  heads = (rows, sizes.length, model.heads, model.head_dim)
  took = side.gradient_seconds(attend, *(side.array(*heads) for _ in range(3)))
  attended = 2 * rows * sizes.length**2 * model.query_size
  return (1 + training.ATTENTION_GRADIENT) * attended / took


def _norms(side: _Side, sizes: Sizes) -> float:
  """Bytes a second of what is between a layer's products."""
  model = sizes.model
  tokens = sizes.rows * sizes.length

  def norm(x):
    x -= x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)

  def between(x, attended, hidden, out):
    x += attended
    return norm(x), jax.nn.gelu(hidden), norm(x + out)

  arrays = [
    side.array(tokens, size)
    for size in (model.features, model.features, model.hidden, model.features)
  ]
  moved = 4 * tokens * model.between() * 4
  return moved / side.gradient_seconds(between, *arrays)


def _optimizer(side: _Side, sizes: Sizes) -> float:
  """Bytes a second of Adam."""
  adam: Any = optax.adam(1e-3)
  features, hidden = sizes.model.features, sizes.model.hidden
  shape = (2 * sizes.model.layers, features, hidden)

  def run(weights, gradients, first, second):
    state = adam.init(weights)
    state = (state[0]._replace(mu=first, nu=second), *state[1:])
    change, state = adam.update(gradients, state, weights)
    return optax.apply_updates(weights, change), state[0].mu, state[0].nu

  arrays = [side.array(*shape) for _ in range(4)]
  return 28 * math.prod(shape) / side.seconds(run, *arrays)


def _weights(side: _Side, sizes: Sizes) -> float:
  """Bytes a second of products of few rows, over as many matrices as a step."""
  model = sizes.model
  rows = sizes.rows
  pairs = [
    (
      side.array(model.features, model.hidden),
      side.array(model.hidden, model.features),
    )
    for _ in range(model.layers)
  ]

  def run(x, *matrices):
    for matrix in matrices:
      x = x @ matrix
    return x

  x = side.array(rows, 1, model.features)
  took = side.seconds(run, x, *itertools.chain(*pairs))
  return 8 * model.layers * model.features * model.hidden / took


def _cache(side: _Side, sizes: Sizes) -> float:
  """Bytes a second at which our kernel reads the caches of a step."""
  model = sizes.model
  rows = sizes.rows
  shape = (rows, sizes.length, model.kv_heads, model.head_dim)
  caches = [
    (side.array(*shape), side.array(*shape)) for _ in range(model.layers)
  ]
  token = side.array(rows, 1, model.kv_heads, model.head_dim)

  def run(state):
    caches, token = state
    written = []
    for k, v in caches:
      k, v, token = kernels.decode_attention(
        k, v, token, token, token, sizes.length - 1
      )
      written.append((k, v))
    return written, token

  read = 8 * model.layers * math.prod(shape)
  return read / side.stepping(run, (caches, token))


def _kernel(side: _Side, sizes: Sizes) -> float:
  """Seconds of an operation in a program that has nearly nothing to do."""
  rows = sizes.rows
  count = 64

  def run(x, w):
    for _ in range(count):
      x = jnp.tanh(x @ w)
    return x

  took = side.seconds(run, side.array(rows, 8), side.array(8, 8))
  return took / count


def link(devices: int, timer: Timer) -> fabric.Link:
  """Returns what all devices together reach in an all-reduce."""
  if devices == 1:
    return fabric.Link(1e12, 0.0, 0.0, _SOURCE)
  group = mesh(all=devices)

  def took(size: int) -> float:
    x = jax.device_put(
      jnp.ones((devices, size // 4)), NamedSharding(group, P("all"))
    )
    compiled = jax.jit(
      jax.shard_map(
        lambda own: jax.lax.psum(own, "all"),
        mesh=group,
        in_specs=P("all"),
        out_specs=P(),
      )
    )
    return timer.seconds(lambda: compiled(x))

  small, large = 2**14, 2**22
  short, long = took(small), took(large)
  moved = 2 * (large - small) * (devices - 1) / devices
  each = moved / max(long - short, 1e-9)
  return fabric.Link(each * devices, 0.0, short / 2, _SOURCE)


@functools.cache
def speeds(
  devices: int, sizes: Sizes, decode: bool, timer: Timer
) -> dict[str, float]:
  """Returns what each of so many devices reaches, all of them at work.

  Args:
    devices: at most as many as there are cores.
    sizes: at which kernels are measured.
    decode: whether those of a step of decoding, else of training.
    timer: how time is taken.
  """
  side = _Side(devices, timer)
  wanted = _DECODING if decode else _TRAINING
  return {name: measure(side, sizes) for name, measure in wanted.items()}


_TRAINING = {
  "products": _products,
  "attention": _attention,
  "norms": _norms,
  "copy": _optimizer,
}
_DECODING = {"weights": _weights, "cache": _cache, "kernel": _kernel}


def chip(devices: int, sizes: Sizes, decode: bool, timer: Timer) -> chips.Chip:
  """Returns one of so many virtual devices.

  Args:
    devices: how many share the machine.
    sizes: at which kernels are measured.
    decode: whether for a step of decoding, else of training.
    timer: how time is taken.
  """
  busy = min(devices, cores())
  share = busy / devices
  found = speeds(busy, sizes, decode, timer)
  # What a step of the other kind needs is not waited for.
  rates = {
    name: chips.Rate(found.get(name, math.inf), share, _SOURCE)
    for name in {*_TRAINING, *_DECODING} - {"kernel"}
  }
  pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  return chips.Chip(
    name=f"1 of {devices} on {cores()} cores",
    memory=pages / devices,
    products={"float32": rates["products"]},
    attention=rates["attention"],
    copy=rates["copy"],
    weights=rates["weights"],
    cache={"float32": rates["cache"]},
    norms=rates["norms"],
    kernel=found.get("kernel", 0.0) / share,
    training_host=0.0,
    calling_host=0.0,
    queued=False,
    fabric=fabric.Shared(link(devices, timer)),
  )
