"""Suite `bridge`: what bridged models cost in Python, against flax.nnx.bridge.

Both sides wrap the same model of 20 layers; times are CPU time of the calling
thread. Cases `eager` run without `jit`; cases `traced` are one tracing, by
`jax.make_jaxpr`, with no compilation; cases `jitted` are calls of a compiled
function of the model. The floor is the same model without a bridge, called the
same way.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

from flax import linen
from flax import nnx as flax_nnx
import jax
from jax import numpy as jnp

import bridge
import nnx
from tools.bench import harness

NAME = "bridge"
_LAYERS = 20
_QUICK_LAYERS = 4
_WIDTH = 16


class Dense(linen.Module):
  """Dense layers."""

  layers: int

  @linen.compact
  def __call__(self, x, train=False):
    del train
    for _ in range(self.layers):
      x = linen.relu(linen.Dense(_WIDTH)(x))
    return x


class Normed(linen.Module):
  """Dense layers with batch norms, whose averages are written in training."""

  layers: int

  @linen.compact
  def __call__(self, x, train=False):
    for _ in range(self.layers):
      x = linen.Dense(_WIDTH)(x)
      x = linen.BatchNorm(use_running_average=not train)(x)
      x = linen.relu(x)
    return x


@functools.cache
def _stack_type(library: Any) -> type:
  """Returns the class of a model of dense layers."""

  class Stack(library.Module):
    """Dense layers."""

    def __init__(self, layers, *, rngs):
      self.layers = library.List(
        [library.Linear(_WIDTH, _WIDTH, rngs=rngs) for _ in range(layers)]
      )

    def __call__(self, x):
      for layer in self.layers:
        x = jnp.maximum(layer(x), 0)
      return x

  return Stack


_X = functools.partial(jnp.ones, (4, _WIDTH))


# A function of arrays, those of the model and an input, and the model's arrays.
Call = Callable[[Any, jax.Array], Any]


def _side(name: str, call: Call, arrays: Any, how: str) -> harness.Side:
  """Makes a side that calls, traces a call, or calls what is compiled."""
  x = _X()
  if how != "traced":
    compiled = jax.jit(call) if how == "jitted" else call
    return harness.Side(
      name=name, fresh=lambda: (arrays, x), call=lambda state: compiled(*state)
    )

  def trace(state):
    # A new function each time: jax remembers what it has traced.
    return jax.make_jaxpr(lambda *state: call(*state))(*state)

  return harness.Side(
    name=name,
    fresh=lambda: (arrays, x),
    call=trace,
    observe=lambda state, _: jax.jit(call)(*state),
  )


def _build_to_nnx(
  model: type[linen.Module], layers: int, train: bool, how: str
) -> harness.Comparison:
  """Builds the row of a call of `ToNNX`."""
  x, module = _X(), model(layers)
  mutable = ["batch_stats"] if train else False

  def side(library: Any, wrap: Any, name: str) -> harness.Side:
    wrapped = wrap(module, rngs=library.Rngs(0)).lazy_init(x)

    def apply(wrapped, x):
      return wrapped(x, train=train, mutable=mutable)

    if how != "traced":
      compiled = library.jit(apply) if how == "jitted" else apply
      return _side(name, lambda _, x: compiled(wrapped, x), (), "eager")
    graphdef, state = library.split(wrapped)

    def call(state, x):
      return apply(library.merge(graphdef, state), x)

    return _side(name, call, state, how)

  def floor(variables, x):
    result = module.apply(variables, x, train=train, mutable=mutable)
    if how == "jitted":
      return result  # what is written is an output of the program
    return result[0] if train else result

  variables = module.init(jax.random.key(0), x)
  return harness.Comparison(
    ours=side(nnx, bridge.ToNNX, "bridge.ToNNX"),
    baselines=[side(flax_nnx, flax_nnx.bridge.ToNNX, "flax.nnx.bridge.ToNNX")],
    floor_side=_side("linen apply", floor, variables, how),
    floor_name="the Linen module's own apply",
    clock=harness.THREAD_CPU,
  )


def _build_to_linen(layers: int, how: str) -> harness.Comparison:
  """Builds the row of `ToLinen.apply`."""
  x = _X()

  def side(library: Any, to_linen: Any, name: str) -> harness.Side:
    model = to_linen(_stack_type(library), layers)
    variables = model.init(jax.random.key(0), x)
    # From one seed the two libraries draw different weights.
    params = jax.tree.map(
      lambda p: jnp.full(p.shape, 1 / _WIDTH), variables["params"]
    )
    rest = {k: v for k, v in variables.items() if k != "params"}

    def call(params, x):
      return model.apply({**rest, "params": params}, x)

    return _side(name, call, params, how)

  ours: Any = nnx
  graphdef, state = nnx.split(_stack_type(ours)(layers, rngs=nnx.Rngs(0)))
  module = nnx.merge(graphdef, state)
  compiled = nnx.jit(lambda module, x: module(x))

  def floor(state, x):
    if how == "traced":
      return nnx.merge(graphdef, state)(x)
    return compiled(module, x) if how == "jitted" else module(x)

  return harness.Comparison(
    ours=side(nnx, bridge.to_linen, "bridge.ToLinen"),
    baselines=[
      side(flax_nnx, flax_nnx.bridge.to_linen, "flax.nnx.bridge.ToLinen")
    ],
    floor_side=_side(
      "nnx call", floor, state, "traced" if how == "traced" else "eager"
    ),
    floor_name="the Module's own call",
    clock=harness.THREAD_CPU,
  )


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: both directions, called, traced and compiled."""
  layers = _QUICK_LAYERS if settings.quick else _LAYERS
  rows = []
  for case in ("eager", "traced", "jitted"):
    builds: dict[str, tuple[Any, ...]] = {
      f"{case}_dense": (_build_to_nnx, Dense, layers, False, case),
    }
    if not settings.quick:
      normed = (_build_to_nnx, Normed, layers)
      builds[f"{case}_batch_norm"] = (*normed, False, case)
      builds[f"{case}_batch_norm_train"] = (*normed, True, case)
    rows += [
      harness.Case(
        NAME, "to_nnx_call", name, "", functools.partial(build[0], *build[1:])
      )
      for name, build in builds.items()
    ]
    rows.append(
      harness.Case(
        NAME,
        "to_linen_apply",
        f"{case}_dense",
        "",
        functools.partial(_build_to_linen, layers, case),
      )
    )
  return rows
