"""Measures this machine as a `Chip`: one whose devices are virtual.

All devices of a process on the CPU share its cores, its memory and what moves
between them. What each has of them is no even part of what fewer devices reach:
where one waits another is at work, and narrow arrays go at speeds of their own.
So kernels are timed on all devices at once, alone, at the sizes which a device
has of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

# Runs what is timed.
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
  """At which sizes kernels are measured: what a device has of a step.

  Attributes:
    model: whose layers they are of, with heads and hidden features of a device.
    rows: sequences of it. A product of one row is another kernel than one of
      four.
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

  def seconds(self, calls: Sequence[Call]) -> list[float]:
    """Returns the seconds of each call, timed in turns.

    A machine that others share is faster at one time than at another: in turns,
    all calls have of it what it is.

    Args:
      calls: each returns arrays, for which is waited.
    """
    clock = harness.WALL
    if self.clock == "cpu":
      clock = harness.Clock("cpu", _busy_ns, harness.Waits.EVERY_CALL)
    sides = [_timed(call) for call in calls]
    settings = harness.Settings(
      repeats=self.samples, sample_seconds=self.least, row_seconds=math.inf
    )
    return [
      statistics.median(found)
      for found in harness.measure(sides, settings, clock)
    ]


def _timed(call: Call) -> harness.Side:
  return harness.Side("", fresh=lambda: None, call=lambda _: call())


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


@dataclasses.dataclass(frozen=True)
class _Work:
  """What is timed, and how much of something it is.

  Attributes:
    amount: operations, bytes or kernels of all that is run.
    calls: each with how often it is run.
  """

  amount: float
  calls: tuple[tuple[Call, int], ...]


class _Side:
  """Arrays and programs of which each device has its own."""

  def __init__(self, devices: int):
    self.devices = devices
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

  def call(self, function: Callable, *arrays: jax.Array) -> Call:
    """Returns the call of a function of each device's arrays."""
    return functools.partial(self._local(function, ()), *arrays)

  def gradient(self, function: Callable, *arrays: jax.Array) -> Call:
    """Returns the call of a function and its gradient."""

    def run(*arrays):
      value, back = jax.vjp(function, *arrays)
      return back(value)

    return self.call(run, *arrays)

  def stepping(self, function: Callable, state: Any) -> Call:
    """Returns the call of a function whose result is its next argument."""
    compiled = self._local(function, (0,))
    held = [state]

    def call():
      held[0] = compiled(held[0])
      return held[0]

    return call


def _products(side: _Side, sizes: Sizes) -> _Work:
  """Operations of a layer's products and their gradients.

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

  def perceptron(x, up, down):
    return jax.nn.gelu(x @ up) @ down

  tokens = rows * sizes.length
  return _Work(
    6 * tokens * (model.attention + model.expert),
    (
      (side.gradient(perceptron, x, up, down), 1),
      (side.gradient(project, x, heads), 4),
    ),
  )


def _attention(side: _Side, sizes: Sizes) -> _Work:
  """Operations of attention and its gradient."""
  model = sizes.model
  rows = sizes.rows

  def attend(q, k, v):
    return nnx.dot_product_attention(q, k, v, is_causal=True)

  heads = (rows, sizes.length, model.heads, model.head_dim)
  attended = 2 * rows * sizes.length**2 * model.query_size
  call = side.gradient(attend, *(side.array(*heads) for _ in range(3)))
  return _Work((1 + training.ATTENTION_GRADIENT) * attended, ((call, 1),))


def _norms(side: _Side, sizes: Sizes) -> _Work:
  """Bytes of what is between a layer's products."""
  model = sizes.model
  tokens = sizes.rows * sizes.length

  def norm(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    variance = (x * x).mean(-1, keepdims=True) - mean * mean
    return (x - mean) * (jax.lax.rsqrt(variance + 1e-6) * scale) + bias

  def between(x, attended, hidden, out, *learned):
    x += attended
    gelu = jax.nn.gelu(hidden)
    return norm(x, *learned[:2]), gelu, norm(x + out, *learned[2:])

  arrays = [
    side.array(tokens, size)
    for size in (model.features, model.features, model.hidden, model.features)
  ]
  arrays += [side.array(model.features) for _ in range(4)]
  moved = 4 * tokens * model.between() * 4
  return _Work(moved, ((side.gradient(between, *arrays), 1),))


def _optimizer(side: _Side, sizes: Sizes) -> _Work:
  """Bytes of Adam."""
  adam: Any = optax.adam(1e-3)
  features, hidden = sizes.model.features, sizes.model.hidden
  shape = (2 * sizes.model.layers, features, hidden)

  def run(weights, gradients, first, second):
    state = adam.init(weights)
    state = (state[0]._replace(mu=first, nu=second), *state[1:])
    change, state = adam.update(gradients, state, weights)
    return optax.apply_updates(weights, change), state[0].mu, state[0].nu

  arrays = [side.array(*shape) for _ in range(4)]
  return _Work(28 * math.prod(shape), ((side.call(run, *arrays), 1),))


def _weights(side: _Side, sizes: Sizes) -> _Work:
  """Bytes of products of few rows, over as many matrices as a step."""
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
  call = side.call(run, x, *itertools.chain(*pairs))
  return _Work(8 * model.layers * model.features * model.hidden, ((call, 1),))


def _cache(side: _Side, sizes: Sizes) -> _Work:
  """Bytes of the caches of a step, which our kernel reads."""
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
  return _Work(read, ((side.stepping(run, (caches, token)), 1),))


def _kernel(side: _Side, sizes: Sizes) -> _Work:
  """Operations of a program that has nearly nothing to do."""
  rows = sizes.rows
  count = 64

  def run(x, w):
    for _ in range(count):
      x = jnp.tanh(x @ w)
    return x

  call = side.call(run, side.array(rows, 8), side.array(8, 8))
  return _Work(count, ((call, 1),))


_SHORT, _LONG = 2**14, 2**22


def _reduce(devices: int, size: int) -> Call:
  """Returns the call of an all-reduce of so many bytes on each device."""
  group = mesh(all=devices)
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
  return lambda: compiled(x)


def _link(devices: int, short: float, long: float) -> fabric.Link:
  """Returns what all devices together reach in an all-reduce."""
  moved = 2 * (_LONG - _SHORT) * (devices - 1) / devices
  each = moved / max(long - short, 1e-9)
  return fabric.Link(each * devices, 0.0, short / 2, _SOURCE)


_TRAINING = {
  "products": _products,
  "attention": _attention,
  "norms": _norms,
  "copy": _optimizer,
}
_DECODING = {"weights": _weights, "cache": _cache, "kernel": _kernel}


class Machine:
  """Virtual devices, and what has to be timed to know how fast they are.

  Attributes:
    calls: what has to be timed.
  """

  def __init__(self, devices: int, sizes: Sizes, decode: bool):
    """Makes the arrays and the programs.

    Args:
      devices: how many share the machine.
      sizes: at which kernels are measured.
      decode: whether for a step of decoding, else of training.
    """
    side = _Side(devices)
    self._devices = devices
    self._works = {
      name: make(side, sizes)
      for name, make in (_DECODING if decode else _TRAINING).items()
    }
    self.calls: list[Call] = [
      call for work in self._works.values() for call, _ in work.calls
    ]
    if devices > 1:
      self.calls += [_reduce(devices, size) for size in (_SHORT, _LONG)]

  def chip(self, seconds: Sequence[float]) -> chips.Chip:
    """Returns one of the devices.

    Args:
      seconds: of each of `calls`.
    """
    left = iter(seconds)
    # What a step of the other kind needs is not waited for.
    reached = dict.fromkeys({*_TRAINING, *_DECODING}, math.inf)
    for name, work in self._works.items():
      took = sum(times * next(left) for _, times in work.calls)
      reached[name] = work.amount / took
    rates = {
      name: chips.Rate(rate, 1.0, _SOURCE) for name, rate in reached.items()
    }
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    alone = fabric.Link(1e12, 0.0, 0.0, _SOURCE)
    return chips.Chip(
      name=f"1 of {self._devices} on {cores()} cores",
      memory=pages / self._devices,
      products={"float32": rates["products"]},
      attention=rates["attention"],
      copy=rates["copy"],
      weights=rates["weights"],
      cache={"float32": rates["cache"]},
      norms=rates["norms"],
      kernel=1 / reached["kernel"],
      training_host=0.0,
      calling_host=0.0,
      queued=False,
      fabric=fabric.Shared(
        _link(self._devices, *left) if self._devices > 1 else alone
      ),
    )
