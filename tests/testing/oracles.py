"""Independent float64 NumPy results to compare kernels with."""

from typing import Any, NamedTuple

import numpy as np


class BatchNormOracle(NamedTuple):
  """What batch normalisation should give.

  Attributes:
    mean: `[c]`, batch mean.
    var: `[c]`, biased batch variance.
    y: Normalised x.
  """

  mean: np.ndarray
  var: np.ndarray
  y: np.ndarray


def batch_norm(
  x: Any,
  scale: Any = None,
  bias: Any = None,
  *,
  feature_axis: int = -1,
  mask: Any = None,
  epsilon: float = 1e-5,
  relu: bool = False,
) -> BatchNormOracle:
  """Normalises x over every axis but one.

  Args:
    x: `[..., c, ...]`.
    scale: `[c]` or None.
    bias: `[c]` or None.
    feature_axis: The axis of c.
    mask: Broadcasts to x; only True positions make the statistics.
    epsilon: Added to the variance.
    relu: Whether negative results become 0.
  """
  x = np.moveaxis(np.asarray(x, np.float64), feature_axis, -1)
  keep = np.ones(x.shape, bool)
  if mask is not None:
    full = np.broadcast_to(
      np.asarray(mask, bool), np.moveaxis(x, -1, feature_axis).shape
    )
    keep = np.moveaxis(full, feature_axis, -1)
  axes = tuple(range(x.ndim - 1))
  with np.errstate(invalid="ignore", divide="ignore"):
    count = keep.sum(axes)
    mean = np.where(keep, x, 0).sum(axes) / count
    var = np.where(keep, (x - mean) ** 2, 0).sum(axes) / count
    y = (x - mean) / np.sqrt(var + epsilon)
  if scale is not None:
    y = y * np.asarray(scale, np.float64)
  if bias is not None:
    y = y + np.asarray(bias, np.float64)
  if relu:
    y = np.maximum(y, 0)
  return BatchNormOracle(mean, var, np.moveaxis(y, -1, feature_axis))


class BatchNormGradOracle(NamedTuple):
  """Gradients of batch normalisation.

  Attributes:
    dx: Like x.
    dscale: `[c]`.
    dbias: `[c]`.
  """

  dx: np.ndarray
  dscale: np.ndarray
  dbias: np.ndarray


def batch_norm_grad(
  x: Any,
  dy: Any,
  scale: Any = None,
  bias: Any = None,
  *,
  feature_axis: int = -1,
  mask: Any = None,
  epsilon: float = 1e-5,
  relu: bool = False,
) -> BatchNormGradOracle:
  """Differentiates `sum(dy * batch_norm(x).y)`; arguments as there."""
  forward = batch_norm(
    x,
    scale,
    bias,
    feature_axis=feature_axis,
    mask=mask,
    epsilon=epsilon,
    relu=relu,
  )
  last = np.moveaxis(np.asarray(x, np.float64), feature_axis, -1)
  grad = np.moveaxis(np.asarray(dy, np.float64), feature_axis, -1)
  keep = np.moveaxis(
    np.broadcast_to(
      True if mask is None else np.asarray(mask, bool), np.shape(x)
    ),
    feature_axis,
    -1,
  )
  if relu:
    grad = np.where(np.moveaxis(forward.y, feature_axis, -1) > 0, grad, 0)
  axes = tuple(range(last.ndim - 1))
  rstd = 1 / np.sqrt(forward.var + epsilon)
  hat = (last - forward.mean) * rstd
  dbias = grad.sum(axes)
  dscale = (grad * hat).sum(axes)
  gamma = 1.0 if scale is None else np.asarray(scale, np.float64)
  count = keep.sum(axes)
  dx = gamma * rstd * (grad - keep * (dbias + hat * dscale) / count)
  return BatchNormGradOracle(np.moveaxis(dx, -1, feature_axis), dscale, dbias)
