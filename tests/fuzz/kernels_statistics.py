"""A fuzzer of `batch_stat.update` and `batch_norm`, gradients included."""

from typing import Any

import jax
import numpy as np

from kernels import batch_stat
from tests.fuzz import kernels_data as data
from tests.fuzz import worker
from tests.testing import oracles

pick, chance = data.pick, data.chance


def _shape(rng):
  rank = int(rng.integers(1, 5))
  most = pick(rng, 6, 9, 40 if rank < 4 else 12)
  shape = [int(size) for size in rng.integers(1, most, rank)]
  if chance(rng, 0.15):
    shape[int(rng.integers(rank))] = int(pick(rng, 64, 129, 257, 300))
  while np.prod(shape) > 2**14:
    shape[int(np.argmax(shape))] //= 2
  return tuple(shape)


def _per_channel(rng, channels, dtype):
  return data.normal(rng, (channels,), "float32").astype(dtype)


def _batch(rng, shape, axis, dtype, size, steady):
  """Draws x: channels of any mean, of the size of their deviation or more."""
  along = [1] * len(shape)
  along[axis] = shape[axis]
  mean = data.normal(rng, along, "float32")
  mean = mean * (pick(rng, 0.0, 1.0, 1.0, 10.0) if steady else 300.0)
  x = (data.normal(rng, shape, "float32") + mean) * np.float32(size)
  if chance(rng, 0.1):
    x = np.broadcast_to(mean * np.float32(size), shape).copy()
  return x.astype(data.dtype_of(dtype))


class _Problem:
  """What a program of batch statistics is compiled for."""

  def __init__(self, rng: np.random.Generator):
    self.dtype = pick(rng, "float64", *data.FLOATS, *data.FLOATS)
    self.wide = self.dtype == "float64"
    self.compute = "float64" if self.wide else "float32"
    self.shape = _shape(rng)
    self.axis = int(rng.integers(len(self.shape)))
    self.channels = self.shape[self.axis]
    self.implementation = pick(rng, "cpu", "cpu", "cpu", "auto", "xla")
    self.accurate = chance(rng, 0.3)
    self.mask = pick(rng, None, None, "positions", "all", "some")
    self.negative_axis = chance(rng)
    self.stat_dtype = pick(rng, "float32", "float32", "bfloat16", "float64")
    if not self.wide and self.stat_dtype == "float64":
      self.stat_dtype = "float32"
    # What one pass loses where a mean is large, only XLA's does.
    self.steady = self.implementation != "cpu" or chance(rng, 0.7)

  def options(self) -> dict[str, Any]:
    axis = self.axis - len(self.shape) * self.negative_axis
    return {
      "feature_axis": axis,
      "use_fast_variance": not self.accurate,
      "implementation": self.implementation,
    }

  def draw(self, rng: np.random.Generator) -> dict[str, Any]:
    size = data.some_size(rng, self.dtype if not self.wide else "float32")
    if size > 2.0**20:
      size = 2.0**12 if self.dtype != "float16" else 4.0
    if size < 2.0**-30:
      size = 2.0**-30  # squares of what is smaller are subnormal
    if not self.steady and self.dtype == "float16":
      size = min(size, 64.0)
    x = _batch(rng, self.shape, self.axis, self.dtype, size, self.steady)
    mask = None
    if self.mask is not None:
      shape = list(self.shape)
      if self.mask == "positions":
        shape[self.axis] = 1
      elif self.mask == "some":
        shape = [n if chance(rng) else 1 for n in shape]
      mask = rng.random(shape) < pick(rng, 0.3, 0.9)
      if chance(rng, 0.9):
        # Values of every channel, most often.
        mask |= rng.random(shape) < 0.5
    return {"x": x, "mask": mask, "size": size}


def _errors(problem, x, mask):
  """Bounds the errors of the mean and the variance, each `[c]`."""
  eps = 2.0**-52 if problem.wide else 2.0**-23
  last = np.moveaxis(x.astype(np.float64), problem.axis, -1)
  keep = np.ones(last.shape, bool)
  if mask is not None:
    keep = np.moveaxis(np.broadcast_to(mask, x.shape), problem.axis, -1)
  axes = tuple(range(last.ndim - 1))
  count = keep.sum(axes)
  top = np.where(keep, np.abs(last), 0).max(axes, initial=0)
  # XLA adds equal values, whose roundings go one way.
  ours = problem.implementation == "cpu"
  grow = 4 + (2 * np.sqrt(count) if ours else count)
  with np.errstate(invalid="ignore", divide="ignore"):
    mean = np.where(keep, last, 0).sum(axes) / count
    var = np.where(keep, (last - mean) ** 2, 0).sum(axes) / count
  if ours or problem.accurate:
    spread = np.sqrt(var) * top + 128 * eps * top**2 + var
  else:
    spread = top**2
  return eps * grow * top + data.TINY, eps * grow * spread + data.TINY, count


def _assert_statistic(got: Any, want: Any, error: Any, what: str) -> None:
  """Checks a statistic; where it would be infinite, it may be NaN."""
  lost = np.isinf(want)
  got = np.asarray(got)
  given = got.astype(np.float64)
  assert not (lost & np.isfinite(given)).any(), f"{what}: {got} is not {want}"
  data.assert_near(got, np.where(lost, given, want), error, what)


def update(rng: np.random.Generator) -> worker.Case:
  """A program of `update`."""
  problem = _Problem(rng)
  momentum_kind = pick(rng, float, "array")

  def call(x, mean, var, momentum, mask):
    return batch_stat.update(
      x, mean, var, momentum, mask=mask, **problem.options()
    )

  compiled = jax.jit(call, donate_argnums=pick(rng, (), (1, 2)))
  static = float(rng.random())

  def case(rng: np.random.Generator) -> None:
    drawn = problem.draw(rng)
    x, mask, size = drawn["x"], drawn["mask"], drawn["size"]
    stat = data.dtype_of(problem.stat_dtype)
    mean = _per_channel(rng, problem.channels, stat) * stat.type(size)
    var = np.abs(_per_channel(rng, problem.channels, stat))
    momentum = static
    if momentum_kind == "array":
      momentum = np.float32(pick(rng, 0.0, 1.0, rng.random()))
    with data.some_level(rng):
      given = jax.device_put((x, mean, var))
      got = jax.block_until_ready(compiled(*given, momentum, mask))
    want = oracles.batch_norm(x, feature_axis=problem.axis, mask=mask)
    mean_error, var_error, count = _errors(problem, x, mask)
    _assert_statistic(got.batch_mean, want.mean, mean_error, "batch_mean")
    _assert_statistic(got.batch_var, want.var, var_error, "batch_var")
    eps = 2.0**-52 if problem.wide else 2.0**-23
    weight = np.float64(momentum)
    for name, new, old, of, error in (
      ("mean", got.mean, mean, want.mean, mean_error),
      ("var", got.var, var, want.var, var_error),
    ):
      old = old.astype(np.float64)
      _assert_statistic(
        new, weight * old + (1 - weight) * of,
        error + 3 * eps * (np.abs(old) + np.abs(of)), name,
      )  # fmt: skip

  return _wide(problem, case)


def _wide(problem, case):
  def run(rng: np.random.Generator) -> None:
    with jax.enable_x64(problem.wide):
      case(rng)

  return run


def norm(rng: np.random.Generator) -> worker.Case:
  """A program of `batch_norm` and its gradients."""
  problem = _Problem(rng)
  relu, inference = chance(rng, 0.4), chance(rng, 0.2)
  epsilon = pick(rng, 1e-5, 1e-3, 0.1)
  out_dtype = pick(rng, None, None, None, problem.compute)
  with_scale, with_bias = chance(rng, 0.8), chance(rng, 0.8)
  gradient = chance(rng, 0.7)

  def forward(x, scale, bias, mean, var, mask):
    return batch_stat.batch_norm(
      x, scale, bias, mean, var, 0.9, epsilon=epsilon, mask=mask,
      activation="relu" if relu else None, dtype=out_dtype,
      use_running_average=inference, **problem.options(),
    )  # fmt: skip

  def both(x, scale, bias, mean, var, mask, dy):
    def y(x, scale, bias):
      out = forward(x, scale, bias, mean, var, mask)
      return out.y, out

    _, pull, out = jax.vjp(y, x, scale, bias, has_aux=True)
    return out, pull(dy)

  forward_only = jax.jit(forward)
  compiled = jax.jit(both)

  def case(rng: np.random.Generator) -> None:
    drawn = problem.draw(rng)
    x, mask, size = drawn["x"], drawn["mask"], drawn["size"]
    compute = np.dtype(problem.compute)
    c = problem.channels
    scale = 1 + _per_channel(rng, c, compute) if with_scale else None
    bias = _per_channel(rng, c, compute) if with_bias else None
    mean = _per_channel(rng, c, compute) * compute.type(size)
    var = np.abs(_per_channel(rng, c, compute)) * compute.type(size) ** 2
    wide = np.moveaxis(x.astype(np.float64), problem.axis, -1)
    mean_error, var_error, count = _errors(problem, x, mask)
    if inference:
      centre, spread = mean.astype(np.float64), var.astype(np.float64)
      mean_error, var_error = 0.0, 0.0
    else:
      found = oracles.batch_norm(x, feature_axis=problem.axis, mask=mask)
      centre, spread = found.mean, found.var
      if not (count > 0).all():
        return  # NaN, as `update` checks
    eps = 2.0**-52 if problem.wide else 2.0**-23
    rstd = 1 / np.sqrt(spread + epsilon)
    gamma = 1.0 if scale is None else scale.astype(np.float64)
    beta = 0.0 if bias is None else bias.astype(np.float64)
    hat = (wide - centre) * rstd
    y = hat * gamma + beta
    # How far rstd is off, relatively, and the centre.
    off = 0.5 * var_error * rstd**2 + 4 * eps
    error = np.abs(gamma) * (
      np.abs(hat) * off + rstd * (mean_error + eps * np.abs(centre) * 2)
      + eps * rstd * np.abs(wide) * 2
    ) + 4 * eps * np.abs(y)  # fmt: skip
    error = error + 4 * eps * np.abs(beta) + data.TINY
    dy = np.moveaxis(
      data.normal(rng, x.shape, "float32"), problem.axis, -1
    ).astype(np.float64)
    if relu:
      dy = np.where(np.abs(y) < 4 * error + 1e-4, 0, dy)
    dy_of = data.dtype_of(out_dtype or problem.dtype)
    dy = dy.astype(dy_of)
    given_dy = np.ascontiguousarray(np.moveaxis(dy, -1, problem.axis))
    with data.some_level(rng):
      if gradient:
        out, grads = compiled(x, scale, bias, mean, var, mask, given_dy)
      else:
        out, grads = forward_only(x, scale, bias, mean, var, mask), None
      jax.block_until_ready((out, grads))
    want_y = np.maximum(y, 0) if relu else y
    data.assert_near(
      np.moveaxis(np.asarray(out.y), problem.axis, -1), want_y, error, "y"
    )
    assert out.y.dtype == dy_of, f"y is {out.y.dtype}, not {dy_of}"
    if grads is None:
      return
    g = dy.astype(np.float64)
    if relu:
      g = np.where(y > 0, g, 0)
    axes = tuple(range(wide.ndim - 1))
    keep = np.ones(wide.shape, bool)
    if mask is not None:
      keep = np.moveaxis(np.broadcast_to(mask, x.shape), problem.axis, -1)
    grow = 6 + 2 * np.sqrt(wide[..., 0].size)
    hat_error = np.abs(hat) * off + rstd * (
      mean_error + 3 * eps * (np.abs(wide) + np.abs(centre))
    )
    dbias, dscale = g.sum(axes), (g * hat).sum(axes)
    sums = np.abs(g).sum(axes)
    dbias_error = eps * grow * sums + data.TINY
    dscale_error = (
      eps * grow * (np.abs(g * hat)).sum(axes)
      + (np.abs(g) * hat_error).sum(axes)
      + data.TINY
    )
    if inference:
      dx = gamma * rstd * g
      dx_error = np.abs(dx) * (off + 6 * eps)
    else:
      dx = gamma * rstd * (g - keep * (dbias + hat * dscale) / count)
      dx_error = np.abs(gamma) * rstd * (
        (off + 8 * eps) * (
          np.abs(g) + (np.abs(dbias) + np.abs(hat * dscale)) / count
        )
        + (dbias_error + np.abs(hat) * dscale_error
           + hat_error * np.abs(dscale)) / count
      )  # fmt: skip
    data.assert_near(
      np.moveaxis(np.asarray(grads[0]), problem.axis, -1), dx,
      dx_error + data.TINY, "dx",
    )  # fmt: skip
    if scale is not None:
      data.assert_near(grads[1], dscale, dscale_error, "dscale")
    if bias is not None:
      data.assert_near(grads[2], dbias, dbias_error, "dbias")

  return _wide(problem, case)


FAMILIES = {"statistics": update, "norm": norm}
