"""Suite `batch_stat`: batch statistics and batch norm on ResNet-50's layers.

The baseline is the expression that flax.nnx's BatchNorm evaluates, in plain
JAX: jitted, with the running averages donated.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import numpy as jnp

from kernels import batch_stat
from tools.bench import harness

NAME = "batch_stat"
_MOMENTUM = 0.99
_EPSILON = 1e-5
_DTYPES = ("float32", "bfloat16")
# (height and width, channels) of the inputs of ResNet-50's batch norms.
_LAYERS = (
  (112, 64),
  (56, 64),
  (56, 256),
  (28, 128),
  (28, 512),
  (14, 256),
  (14, 1024),
  (7, 512),
  (7, 2048),
)
_QUICK_LAYERS = ((56, 64), (14, 256), (7, 2048))
_BATCH = 32
_QUICK_BATCH = 8


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
  keys = jax.random.split(jax.random.key(seed), 3)
  channels = shape[-1:]
  shift = jax.random.normal(keys[0], channels)
  scale = jax.random.uniform(keys[1], channels, minval=0.5, maxval=2.0)
  x = jax.random.normal(keys[2], shape) * scale + shift
  return jax.block_until_ready(x.astype(dtype))


def _fresh_statistics(channels: int) -> tuple[jax.Array, jax.Array]:
  return jnp.zeros(channels), jnp.ones(channels)


def _build_update(
  settings: harness.Settings, size: int, channels: int, dtype: str
) -> harness.Comparison:
  """Builds the row of one layer for the op `update`."""
  x = _make_input(_shape(settings, size, channels), dtype, seed=0)

  def side(name: str, function: Callable[..., Any]) -> harness.Side:
    step = jax.jit(function, donate_argnums=(1, 2))
    return harness.Side(
      name=name,
      fresh=lambda: (x, *_fresh_statistics(channels)),
      call=lambda state: step(*state),
      advance=lambda state, result: (state[0], *result),
    )

  return harness.Comparison(
    ours=side(
      "kernels.batch_stat.update",
      functools.partial(batch_stat.update, momentum=_MOMENTUM),
    ),
    baselines=[side("flax expression, jit", _flax_update)],
    floor_traffic=harness.Traffic(read=x.nbytes, written=0),
    floor_name="one read of x at memory bandwidth",
  )


def _shape(
  settings: harness.Settings, size: int, channels: int
) -> tuple[int, ...]:
  return (_QUICK_BATCH if settings.quick else _BATCH, size, size, channels)


_BUILDERS = {"update": _build_update}


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every op on every layer in every dtype."""
  layers = _QUICK_LAYERS if settings.quick else _LAYERS
  rows = []
  for op, build in _BUILDERS.items():
    for dtype in _DTYPES:
      for size, channels in layers:
        batch = _shape(settings, size, channels)[0]
        rows.append(
          harness.Case(
            suite=NAME,
            op=op,
            case=f"N{batch}_{size}x{size}x{channels}",
            dtype=dtype,
            build=functools.partial(build, settings, size, channels, dtype),
          )
        )
  return rows
