"""Wrappers that normalise the weights of a layer before each call of it."""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from nnx import filterlib
from nnx.graphlib import functional
from nnx.module import Module
from nnx.nn import checks, dtypes, initializers
from nnx.nn.initializers import Initializer, initialize
from nnx.pytreelib import data
from nnx.rnglib import Rngs
from nnx.statelib import to_flat_state
from nnx.variablelib import BatchStat, Param, Variable

Path = tuple[Any, ...]


def _parameters(layer: Module) -> Iterator[tuple[Path, Variable[Any]]]:
  return iter(to_flat_state(functional.state(layer, Param, graph=True)))


def _l2_normalize(
  x: jax.Array, axis: Any = None, epsilon: float = 1e-12
) -> jax.Array:
  norm = jnp.sum(x * x, axis=axis, keepdims=True) + epsilon
  return x * lax.rsqrt(norm)


def _changed(path: Path) -> RuntimeError:
  return RuntimeError(
    "The parameters of the wrapped layer must stay those that it had when it"
    f" was wrapped, but one at `{'/'.join(map(str, path))}` is new. Wrap the"
    " layer again."
  )


class WeightNorm(Module):
  """Normalises weights to norm 1, times a scale, before each call of a layer.

      kernel = scale * kernel / jnp.linalg.norm(kernel, axis=other_axes)

  Source: Salimans and Kingma 2016, "Weight normalization".

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> rngs = nnx.Rngs(0)
    >>> layer = nnx.WeightNorm(nnx.Linear(8, 2, rngs=rngs), rngs=rngs)
    >>> y = layer(jnp.ones((5, 8)))
    >>> jnp.linalg.norm(layer.layer_instance.kernel.value, axis=0).round(3)
    Array([1., 1.], dtype=float32)

  Args:
    layer_instance: The layer. Its parameters hold the normalised weights after
      a call.
    feature_axes: The axes of a weight along which each index has its own norm;
      None, for one norm of the whole weight.
    use_scale: Whether to multiply by scales.
    scale_init: `(key, shape, dtype) -> scale`.
    epsilon: Added to the square of the norm.
    dtype: The dtype of the weights; that of weight and scale, if None.
    param_dtype: The dtype of the scales.
    variable_filter: Which parameters are normalised.
    promote_dtype: `((weight, scale), dtype=dtype)`; returns those two in the
      dtype to multiply in.
    rngs: The stream `params` gives the keys of scales, unless they are ones.

  Attributes:
    scales: `Param`s of the sizes of `feature_axes`, by the paths of the
      parameters; None without scales. Arrays in objects from Flax up to 0.12.8,
      whose optimizers left them alone.
  """

  layer_instance: Any  # a Module with a `__call__`

  def __init__(
    self,
    layer_instance: Module,
    *,
    feature_axes: int | Sequence[int] | None = -1,
    use_scale: bool = True,
    scale_init: Initializer = initializers.ones,
    epsilon: float = 1e-12,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    variable_filter: filterlib.Filter = filterlib.PathContains("kernel"),  # noqa: B008
    promote_dtype: dtypes.PromoteDtypeFn = dtypes.promote_dtype,
    rngs: Rngs,
  ):
    checks.small("epsilon", epsilon)
    self.layer_instance = layer_instance
    self.feature_axes = () if feature_axes is None else feature_axes
    self.use_scale = use_scale
    self.scale_init = scale_init
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.variable_filter = filterlib.to_predicate(variable_filter)
    self.promote_dtype = promote_dtype
    self.scales = None
    if use_scale:
      # Ones need no key, and flax.nnx takes none.
      constant = scale_init is initializers.ones
      scales = {}
      for path, param in _parameters(layer_instance):
        if self.variable_filter(path, param):
          shape = tuple(param.shape[axis] for axis in self._axes(param.ndim))
          key = None if constant else checks.key(rngs)
          scales[path] = Param(scale_init(key, shape, param_dtype))
      self.scales = data(scales)

  def _axes(self, rank: int) -> tuple[int, ...]:
    axes = self.feature_axes
    if not isinstance(axes, collections.abc.Iterable):
      axes = (axes,)
    return tuple(sorted({axis % rank for axis in axes}))

  def __call__(self, x: jax.Array, *args: Any, **kwargs: Any) -> Any:
    """Normalises the weights and calls the layer.

    Args:
      x: The input of the layer.
      *args: Further arguments of the layer.
      **kwargs: Keywords of the layer.

    Returns:
      The result of the layer.

    Raises:
      RuntimeError: If the layer has new parameters.
    """
    for path, param in _parameters(self.layer_instance):
      if self.variable_filter(path, param):
        self._normalize(path, param)
    return self.layer_instance(x, *args, **kwargs)

  def _normalize(self, path: Path, param: Variable[Any]) -> None:
    weight, scale = param.value, None
    kept = self._axes(weight.ndim)
    if self.use_scale:
      scales = self.scales or {}
      if path not in scales:
        raise _changed(path)
      scale = scales[path]
      scale = scale.value if isinstance(scale, Variable) else scale
      scale = scale.reshape(
        [size if i in kept else 1 for i, size in enumerate(weight.shape)]
      )
    others = tuple(i for i in range(weight.ndim) if i not in kept)
    value = _l2_normalize(weight, others, self.epsilon)
    wide = self.dtype  # the product is rounded to `dtype` once
    if wide is not None and scale is not None:
      wide = jnp.result_type(wide, value, scale)
    value, scale = self.promote_dtype((value, scale), dtype=wide)
    value = value if scale is None else value * scale
    param.value = value if self.dtype is None else value.astype(self.dtype)


class SpectralNorm(Module):
  """Divides weights by their largest singular values before each call.

  Power iteration estimates the singular values, from where the last call
  stopped: each training call improves the estimate; after `eval()` it is kept.
  A weight of more than two axes is a matrix whose columns are its last axis.

  Source: Miyato et al. 2018, "Spectral normalization for generative adversarial
  networks".

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> rngs = nnx.Rngs(0)
    >>> layer = nnx.SpectralNorm(
    ...   nnx.Linear(4, 5, rngs=rngs), n_steps=100, rngs=rngs
    ... )
    >>> y = layer(jnp.ones((3, 4)))
    >>> jnp.linalg.norm(layer.layer_instance.kernel.value, ord=2).round(3)
    Array(1., dtype=float32)

  Args:
    layer_instance: The layer. Its parameters hold the normalised weights after
      a call.
    n_steps: Steps of power iteration for each call; without any, nothing is
      done.
    epsilon: Added to the squares of norms.
    dtype: What weights are rounded to; that of weights and vectors, if None.
    param_dtype: The dtype of the vectors.
    error_on_non_matrix: Whether to refuse weights of more than two axes.
    update_stats: Whether to keep the vectors; `train()` and `eval()` set it.
    rngs: The stream `params` gives the keys of the vectors.

  Attributes:
    batch_stats: `BatchStat`s `u`, `[1, columns]`, and `sigma`, `[]`, by the
      paths of the parameters and these names.

  Raises:
    ValueError: If a weight is refused.
  """

  layer_instance: Any  # a Module with a `__call__`

  def __init__(
    self,
    layer_instance: Module,
    *,
    n_steps: int = 1,
    epsilon: float = 1e-12,
    dtype: dtypes.Dtype | None = None,
    param_dtype: dtypes.Dtype = jnp.float32,
    error_on_non_matrix: bool = False,
    update_stats: bool = True,
    rngs: Rngs,
  ):
    checks.whole("n_steps", n_steps)
    checks.small("epsilon", epsilon)
    self.layer_instance = layer_instance
    self.n_steps = n_steps
    self.epsilon = epsilon
    self.dtype = dtype
    self.param_dtype = param_dtype
    self.error_on_non_matrix = error_on_non_matrix
    self.use_running_average = not update_stats  # what `train` and `eval` set
    normal = initializers.normal()
    stats = {}
    for path, param in _parameters(layer_instance):
      if self._applies(path, param):
        key = checks.key(rngs)
        columns = (1, param.shape[-1])
        stats[*path, "u"] = BatchStat(normal(key, columns, param_dtype))
        stats[*path, "sigma"] = BatchStat(
          initialize(initializers.ones, key, (), param_dtype)
        )
    self.batch_stats = data(stats)

  def _applies(self, path: Path, param: Variable[Any]) -> bool:
    if param.ndim <= 1 or self.n_steps < 1:
      return False
    if param.ndim > 2 and self.error_on_non_matrix:
      raise ValueError(
        "Weights must be matrices with `error_on_non_matrix=True`, but"
        f" `{'/'.join(map(str, path))}` has the shape {param.shape}."
      )
    return True

  def __call__(self, x: jax.Array, update_stats: bool | None = None) -> Any:
    """Normalises the weights and calls the layer.

    Args:
      x: The input of the layer.
      update_stats: Overrides that of the layer, if not None.

    Returns:
      The result of the layer.

    Raises:
      RuntimeError: If the layer has new parameters.
      ValueError: If a weight is refused.
    """
    if update_stats is None:
      update_stats = not self.use_running_average
    for path, param in _parameters(self.layer_instance):
      if self._applies(path, param):
        self._normalize(path, param, update_stats)
    return self.layer_instance(x)

  def _normalize(
    self, path: Path, param: Variable[Any], update_stats: bool
  ) -> None:
    if (*path, "u") not in self.batch_stats:
      raise _changed(path)
    weight = param.value
    matrix = weight.reshape((-1, weight.shape[-1]))
    kept_u = self.batch_stats[*path, "u"]
    kept_sigma = self.batch_stats[*path, "sigma"]
    u = kept_u.value
    for _ in range(self.n_steps):
      v = _l2_normalize(u @ matrix.T, epsilon=self.epsilon)
      u = _l2_normalize(v @ matrix, epsilon=self.epsilon)
    u, v = lax.stop_gradient((u, v))
    sigma = (v @ matrix @ u.T)[0, 0]
    matrix = matrix / jnp.where(sigma != 0, sigma, 1)
    if update_stats:
      kept_u.value = u.astype(kept_u.dtype)
      kept_sigma.value = sigma.astype(kept_sigma.dtype)
    dtype = dtypes.canonicalize_dtype(matrix, u, v, sigma, dtype=self.dtype)
    # Rounded to `dtype`; the parameter keeps its own dtype.
    param[...] = matrix.reshape(weight.shape).astype(dtype)
