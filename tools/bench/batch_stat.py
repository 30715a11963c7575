"""Suite `batch_stat`: batch statistics and batch norm on ResNet-50's layers.

The baseline is the expression that flax.nnx's BatchNorm evaluates, in plain
JAX: jitted, with the running averages donated.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from kernels import batch_stat
from kernels.batch_stat import arg_specs
from tools.bench import choice, harness

NAME = "batch_stat"
_MOMENTUM = 0.99
_EPSILON = 1e-5
_DTYPES = ("float32", "bfloat16")
# Few and many channels.
_QUICK_LAYERS = arg_specs.resnet50(4)[1::8]


def _flax_statistics(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns mean and variance as flax.nnx's BatchNorm does by default."""
  x = x.astype(jnp.float32)
  axes = tuple(range(x.ndim - 1))
  mean = x.mean(axes)
  mean_of_squares = jnp.square(x).mean(axes)
  return mean, jnp.maximum(0.0, mean_of_squares - jnp.square(mean))


def _flax_update(x, mean, var):
  batch_mean, batch_var = _flax_statistics(x)
  return (
    _MOMENTUM * mean + (1 - _MOMENTUM) * batch_mean,
    _MOMENTUM * var + (1 - _MOMENTUM) * batch_var,
  )


def _make_input(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
  """Returns normal data with a different mean and scale in every channel."""
  # NumPy's generator, because jax.random would compile for every shape.
  random = np.random.default_rng(seed)
  channels = shape[-1:]
  x = random.standard_normal(shape, np.float32)
  x *= random.uniform(0.5, 2.0, channels).astype(np.float32)
  x += random.standard_normal(channels, np.float32)
  return jnp.asarray(x.astype(dtype))


def _build_update(layer: arg_specs.LayerSpec, dtype: str) -> harness.Comparison:
  """Builds the row of one layer for the op `update`."""
  x = _make_input(layer.shape, dtype, seed=0)
  channels = layer.shape[-1]

  def ours(x, mean, var):
    return batch_stat.update(x, mean, var, momentum=_MOMENTUM)[:2]

  def side(name: str, function: Callable[..., Any]) -> harness.Side:
    step = jax.jit(function, donate_argnums=(1, 2))
    return harness.Side(
      name=name,
      fresh=lambda: (x, jnp.zeros(channels), jnp.ones(channels)),
      call=lambda state: step(*state),
      advance=lambda state, result: (state[0], *result),
    )

  return harness.Comparison(
    ours=side("kernels.batch_stat.update", ours),
    baselines=[side("flax.nnx expression, jit", _flax_update)],
    floor_traffic=harness.Traffic(read=x.nbytes, written=0),
    floor_name="one read of x at memory bandwidth",
    details=choice.chosen(ours, x, jnp.zeros(channels), jnp.ones(channels)),
  )


_BUILDERS = {"update": _build_update}


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every op on every layer in every dtype."""
  layers = _QUICK_LAYERS if settings.quick else arg_specs.BENCH_LAYERS
  return [
    harness.Case(
      NAME, op, layer.name, dtype, functools.partial(build, layer, dtype)
    )
    for op, build in _BUILDERS.items()
    for dtype in _DTYPES
    for layer in layers
  ]
