"""Suite `batch_stat`: batch statistics and batch norm on ResNet-50's layers.

The baseline is the expression that flax.nnx's BatchNorm evaluates, in plain
JAX: jitted, with the running averages donated.

Where XLA normalises, it does so for what follows: `..._residual` adds x to the
result and ends in a ReLU. `batch_norm_inference_residual` does with the running
averages.

`..._relu` is the batch norm with its ReLU in one, by `activation`.

What comes before can be elementwise as well (`..._prologue`): XLA computes it
anew wherever x is read, and a custom call reads x from memory.

A call of one small layer (`..._small`) is mostly dispatch, for which XLA has
fewer steps in its own program than in one with custom calls; 16 of them in one
program (`..._small_16`) are what a model has.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

from kernels import batch_stat
from kernels.batch_stat import arg_specs
from tools.bench import choice, compare, harness

NAME = "batch_stat"

# `(x, scale, bias, mean, var) -> (mean, var, y)`; of several layers, mean and
# var are tuples.
BatchNorm = Callable[..., tuple[Any, ...]]

_MOMENTUM = 0.99
_EPSILON = 1e-5
_DTYPES = ("float32", "bfloat16")
# Few and many channels.
_QUICK_ROWS = tuple(zip(arg_specs.resnet50(4)[1::8], _DTYPES, strict=True))


def _flax_statistics(
  x: jax.Array, mask: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
  """Returns mean and variance as flax.nnx's BatchNorm does by default."""
  x = x.astype(jnp.float32)
  axes = tuple(range(x.ndim - 1))
  mean = x.mean(axes, where=mask)
  mean_of_squares = jnp.square(x).mean(axes, where=mask)
  return mean, jnp.maximum(0.0, mean_of_squares - jnp.square(mean))


def _blend(mean, var, batch_mean, batch_var):
  return (
    _MOMENTUM * mean + (1 - _MOMENTUM) * batch_mean,
    _MOMENTUM * var + (1 - _MOMENTUM) * batch_var,
  )


def _flax_update(x, mean, var, mask=None):
  return _blend(mean, var, *_flax_statistics(x, mask))


def _flax_batch_norm(x, scale, bias, mean, var):
  """Takes a training step of flax.nnx's BatchNorm: averages, then output."""
  batch_mean, batch_var = _flax_statistics(x)
  y = (x - batch_mean) * (lax.rsqrt(batch_var + _EPSILON) * scale) + bias
  averages = _blend(mean, var, batch_mean, batch_var)
  return *averages, y.astype(x.dtype)


def _ours_batch_norm(x, scale, bias, mean, var, **options):
  return batch_stat.batch_norm(
    x, scale, bias, mean, var, momentum=_MOMENTUM, epsilon=_EPSILON, **options
  )[:3]


def _flax_inference(x, scale, bias, mean, var):
  """Does the same in evaluation mode."""
  y = (x - mean) * (lax.rsqrt(var + _EPSILON) * scale) + bias
  return mean, var, y.astype(x.dtype)


_ours_relu = functools.partial(_ours_batch_norm, activation="relu")


def _flax_relu(*args):
  *averages, y = _flax_batch_norm(*args)
  return *averages, jax.nn.relu(y)


_ours_inference = functools.partial(_ours_batch_norm, use_running_average=True)


def _forward(batch_norm: BatchNorm, x, dy, scale, bias, mean, var):
  """Runs the layer; the gradient `dy` is there to have one signature."""
  del dy
  return batch_norm(x, scale, bias, mean, var)


def _forward_backward(batch_norm: BatchNorm, x, dy, scale, bias, mean, var):
  """Runs the layer and its gradient: `y` goes to the next layer as well."""

  def normalise(x, scale, bias):
    *averages, y = batch_norm(x, scale, bias, mean, var)
    return y, averages

  y, pull_back, averages = jax.vjp(normalise, x, scale, bias, has_aux=True)
  return *averages, y, *pull_back(dy)


def _with_residual(batch_norm: BatchNorm) -> BatchNorm:
  """Returns the end of a residual block whose branch is the batch norm."""

  def block(x, *args):
    *averages, y = batch_norm(x, *args)
    return *averages, jax.nn.relu(y + x)

  return block


def _with_prologue(batch_norm: BatchNorm) -> BatchNorm:
  """Returns the batch norm of what is elementwise in x."""
  return lambda x, *args: batch_norm(jax.nn.relu(x), *args)


def _as_it_is(part: Any) -> Any:
  return part


def _in_layers(batch_norm: BatchNorm) -> BatchNorm:
  """Returns the batch norm of several layers, one after another."""

  def layers(x, scale, bias, means, variances):
    averages = []
    for mean, var in zip(means, variances, strict=True):
      *new, x = batch_norm(x, scale, bias, mean, var)
      averages.append(new)
    return *zip(*averages, strict=True), x

  return layers


def _make_input(shape: tuple[int, ...], dtype: str, seed: int) -> jax.Array:
  """Returns normal data with a different mean and scale in every channel."""
  # NumPy's generator, because jax.random would compile for every shape.
  random = np.random.default_rng(seed)
  channels = shape[-1:]
  x = random.standard_normal(shape, np.float32)
  x *= random.uniform(0.5, 2.0, channels).astype(np.float32)
  x += random.standard_normal(channels, np.float32)
  return jnp.asarray(x.astype(dtype))


def _build_update(
  mask_of: Callable[[tuple[int, ...]], tuple[int, ...]] | None,
  prologue: Callable[[jax.Array], jax.Array],
  layer: arg_specs.LayerSpec,
  dtype: str,
) -> harness.Comparison:
  """Builds the row of one layer for the op `update`.

  Args:
    mask_of: the shape of a mask for an x of some shape; None for no mask.
    prologue: makes of an array the x whose statistics are taken.
    layer: its shape.
    dtype: of x.
  """
  x = _make_input(layer.shape, dtype, seed=0)
  channels = layer.shape[-1]
  masks = []
  if mask_of is not None:
    random = np.random.default_rng(1)
    masks.append(jnp.asarray(random.random(mask_of(layer.shape)) < 0.8))

  def ours(x, mean, var, mask=None):
    x = prologue(x)
    return batch_stat.update(x, mean, var, momentum=_MOMENTUM, mask=mask)[:2]

  def side(name: str, function: Callable[..., Any]) -> harness.Side:
    step = jax.jit(function, donate_argnums=(1, 2))
    return harness.Side(
      name=name,
      fresh=lambda: (x, jnp.zeros(channels), jnp.ones(channels), *masks),
      call=lambda state: step(*state),
      advance=lambda state, result: (state[0], *result, *state[3:]),
    )

  def expression(x, *args):
    return _flax_update(prologue(x), *args)

  baseline = side("flax.nnx expression, jit", expression)
  return harness.Comparison(
    ours=side("kernels.batch_stat.update", ours),
    baselines=[baseline],
    floor_traffic=harness.Traffic(
      read=x.nbytes + sum(mask.nbytes for mask in masks), written=0
    ),
    floor_name=f"one read of x{' and the mask' if masks else ''} at memory"
    " bandwidth",
    details=choice.chosen(ours, *baseline.fresh()),
  )


def _per_element(state: tuple[Any, ...], result: tuple[Any, ...]) -> Any:
  """Divides gradients of scale and bias by the values that were summed."""
  averages_and_arrays, sums = result[:4], result[4:]
  count = state[0].size // state[2].size
  return *averages_and_arrays, *(total / count**0.5 for total in sums)


def _tolerance(dtype: str, layers: int) -> compare.Tolerance:
  """Returns the tolerance after some layers, whose roundings add up."""
  if dtype == "float32":
    return compare.Tolerance(1e-4, 1e-4)
  # XLA rounds the two terms of dx to bfloat16 before it adds them.
  grown = layers**0.5
  return compare.Tolerance(2e-2 * grown, 2e-2 * grown, of_largest=2**-7 * grown)


def _build_batch_norm(
  step: Callable[..., Any],
  passes_read: int,
  passes_written: int,
  model: Callable[[BatchNorm], BatchNorm],
  layers: int | None,
  sides: tuple[BatchNorm, BatchNorm],
  layer: arg_specs.LayerSpec,
  dtype: str,
) -> harness.Comparison:
  """Builds the row of one layer for the ops that normalise.

  Args:
    step: `_forward` or `_forward_backward`.
    passes_read: how often arrays like `x` must be read.
    passes_written: how often they must be written.
    model: makes of the batch norm what is measured.
    layers: how many layers that has; None for one, as it is.
    sides: ours and the baseline.
    layer: its shape.
    dtype: of `x`, `y` and their gradients.
  """
  channels = layer.shape[-1]
  x, dy = (_make_input(layer.shape, dtype, seed) for seed in (0, 1))
  scale, bias = jnp.linspace(0.5, 1.5, channels), jnp.linspace(-1, 1, channels)

  def fresh() -> tuple[Any, ...]:
    averages: tuple[Any, ...] = jnp.zeros(channels), jnp.ones(channels)
    if layers is not None:
      averages = tuple(
        tuple(map(jnp.copy, (one,) * layers)) for one in averages
      )
    return x, dy, scale, bias, *averages

  ours, baseline = map(model, sides)

  def side(name: str, batch_norm: BatchNorm) -> harness.Side:
    jitted = jax.jit(functools.partial(step, batch_norm), donate_argnums=(4, 5))
    return harness.Side(
      name=name,
      fresh=fresh,
      call=lambda state: jitted(*state),
      advance=lambda state, result: (*state[:4], *result[:2]),
      observe=_per_element,
    )

  return harness.Comparison(
    ours=side("kernels.batch_stat.batch_norm", ours),
    baselines=[side("flax.nnx expression, jit", baseline)],
    floor_traffic=harness.Traffic(
      read=(layers or 1) * passes_read * x.nbytes,
      written=(layers or 1) * passes_written * x.nbytes,
    ),
    floor_name=(
      f"{passes_read} reads and {passes_written} writes of arrays like x at "
      "memory bandwidth"
    ),
    tolerance=_tolerance(dtype, layers or 1),
    details=choice.chosen(functools.partial(step, ours), *fresh()),
  )


# Forward: x for the statistics, x again to normalise it, y. Backward: x and dy
# for the sums, x and dy again, dx.
_PASSES = {
  "batch_norm_fwd": (_forward, 2, 1),
  "batch_norm_fwd_bwd": (_forward_backward, 6, 2),
}
_INFERENCE_PASSES = {"batch_norm_inference": (_forward, 1, 1)}


def _builders(
  passes: dict[str, Any],
  model: Callable[[BatchNorm], BatchNorm] = _as_it_is,
  layers: int | None = None,
  sides: tuple[BatchNorm, BatchNorm] = (_ours_batch_norm, _flax_batch_norm),
) -> dict[str, Callable[..., harness.Comparison]]:
  return {
    op: functools.partial(
      _build_batch_norm, step, read, written, model, layers, sides
    )
    for op, (step, read, written) in passes.items()
  }


_UPDATE = {"update": functools.partial(_build_update, None, _as_it_is)}
# A mask for each position, and one for each element.
_MASKED = {
  "update_mask": functools.partial(
    _build_update, lambda shape: (*shape[:-1], 1), _as_it_is
  ),
  "update_feature_mask": functools.partial(
    _build_update, lambda shape: shape, _as_it_is
  ),
}
_SOME_LAYERS = arg_specs.BENCH_LAYERS[1::5]
# Of a few examples, as of a perceptron.
_SMALL_LAYERS = tuple(
  arg_specs.LayerSpec(f"{rows}x1x1x{channels}", (rows, 1, 1, channels), 1)
  for rows, channels in ((8, 64), (32, 512), (128, 64), (256, 256))
)


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every op on every layer in every dtype; quick, in one."""

  def rows(builders, layers, suffix=""):
    pairs = [(layer, dtype) for dtype in _DTYPES for layer in layers]
    return [
      harness.Case(
        NAME,
        op + suffix,
        layer.name,
        dtype,
        functools.partial(build, layer, dtype),
      )
      for op, build in builders.items()
      for layer, dtype in (_QUICK_ROWS if settings.quick else pairs)
    ]

  one = _UPDATE | _builders(_PASSES)
  whole = rows(one, arg_specs.BENCH_LAYERS)
  if settings.quick:
    return whole
  relu = _builders(_PASSES, sides=(_ours_relu, _flax_relu))
  residual = _builders(_PASSES, _with_residual) | _builders(
    _INFERENCE_PASSES,
    _with_residual,
    sides=(_ours_inference, _flax_inference),
  )
  prologue = {
    "update": functools.partial(_build_update, None, jax.nn.relu)
  } | _builders(_PASSES, _with_prologue)
  return (
    whole
    + rows(_MASKED, _SOME_LAYERS)
    + rows(prologue, _SOME_LAYERS, "_prologue")
    + rows(relu, _SOME_LAYERS, "_relu")
    + rows(residual, _SOME_LAYERS, "_residual")
    + rows(one, _SMALL_LAYERS, "_small")
    + rows(_builders(_PASSES, _in_layers, 16), _SMALL_LAYERS, "_small_16")
  )
