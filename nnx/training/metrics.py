"""Metrics: running statistics of what a model puts out, kept in Variables."""

from __future__ import annotations

import inspect
import math
from typing import Any, NamedTuple

import jax
from jax.core import Tracer
import jax.numpy as jnp

from nnx.filterlib import Filter
from nnx.graphlib import functional
from nnx.pytreelib import Pytree
from nnx.variablelib import Variable


class MetricState(Variable):
  """What a metric has seen so far.

  Example:

    >>> import nnx
    >>> nnx.state(nnx.metrics.Average(), nnx.metrics.MetricState).count.value
    Array(0, dtype=int32)
  """

  __slots__ = ()


class Metric(Pytree):
  """The base of metrics, which define the constructor and three methods.

  Like a Module, a metric is an object of Variables: `nnx.jit` and the other
  transforms take it and propagate what happens to it.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> class Largest(nnx.Metric):
    ...   def __init__(self):
    ...     self.largest = nnx.metrics.MetricState(jnp.float32(-jnp.inf))
    ...
    ...   def reset(self):
    ...     self.largest[...] = -jnp.inf
    ...
    ...   def update(self, *, values, **_):
    ...     self.largest[...] = jnp.maximum(self.largest, values.max())
    ...
    ...   def compute(self):
    ...     return self.largest[...]
    >>> largest = Largest()
    >>> nnx.jit(lambda m, x: m.update(values=x))(largest, jnp.arange(3.0))
    >>> largest.compute()
    Array(2., dtype=float32)
  """

  def __init__(self):
    raise _must_define(self, "__init__")

  def reset(self) -> None:
    """Forgets all values."""
    raise _must_define(self, "reset")

  def update(self, **kwargs: Any) -> None:
    """Adds new values."""
    raise _must_define(self, "update")

  def compute(self) -> Any:
    """Returns the value of the metric."""
    raise _must_define(self, "compute")

  def split(self, *filters: Filter) -> tuple[Any, ...]:
    """Splits the metric, as `nnx.split(self, *filters)`.

    Example:

      >>> import nnx
      >>> graphdef, state = nnx.metrics.Average().split()
      >>> list(state)
      ['count', 'total']
    """
    return functional.split(self, *filters)

  def _keywords(self) -> frozenset[str] | None:
    """Returns the keywords that `update` uses; None, if it may use any.

    Keywords gathered under a name such as `_` or `_others` are not used.
    """
    names = set()
    for name, parameter in inspect.signature(self.update).parameters.items():
      if parameter.kind is not inspect.Parameter.VAR_KEYWORD:
        names.add(name)
      elif not name.startswith("_"):
        return None
    return frozenset(names)


def _must_define(metric: Metric, method: str) -> NotImplementedError:
  return NotImplementedError(
    f"A class derived from `Metric` must define `{method}`, but"
    f" `{type(metric).__name__}` does not."
  )


def _taken(kwargs: dict[str, Any], name: str, metric: Metric) -> Any:
  if name not in kwargs:
    raise TypeError(
      f"`update` of this `{type(metric).__name__}` must be given `{name}=...`,"
      f" but got {sorted(kwargs)}."
    )
  value = kwargs[name]
  if isinstance(value, (Variable, list, tuple)):
    value = jnp.asarray(value)
  if jnp.iscomplexobj(value):
    raise TypeError(
      f"`{name}` must be real for this `{type(metric).__name__}`, but got"
      f" `{jnp.result_type(value).name}`. Update one metric with the real parts"
      " and one with the imaginary ones."
    )
  return value


def _as_weights(mask: Any, values: Any, name: str) -> jax.Array:
  """Returns how often each value counts; under a trace NaN for no number."""
  mask = jnp.asarray(mask)
  shape = jnp.shape(values)
  try:
    weights = jnp.broadcast_to(mask, shape)
  except ValueError:
    raise ValueError(
      f"`mask` must broadcast to the shape {shape} of `{name}`, but got"
      f" {mask.shape}."
    ) from None
  if not jnp.issubdtype(mask.dtype, jnp.floating) and not jnp.issubdtype(
    mask.dtype, jnp.signedinteger
  ):
    return weights
  # The count is an integer and would lose fractions.
  fits = ((mask == jnp.round(mask)) & (mask >= 0) & (mask < jnp.inf)).all()
  if not isinstance(fits, Tracer) and not fits:
    raise ValueError(
      f"`mask` must be made of whole numbers, but got {mask}. How often a value"
      " counts is 0, 1, 2 and so on; for an average with other weights divide"
      f" that of `{name} * weights` by that of the weights."
    )
  return jnp.where(fits, weights, jnp.nan)


def _widened(values: Any) -> Any:
  """Returns values as they are summed, in float32 or wider.

  Sums of whole numbers, and those in half precision, may exceed their type.
  """
  dtype = jnp.promote_types(jnp.result_type(values), jnp.float32)
  return values.astype(dtype)


def _is_number(value: Any) -> bool:
  return isinstance(value, (int, float))


class Average(Metric):
  """The mean of all values seen.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> mean = nnx.metrics.Average("loss")
    >>> mean.update(loss=jnp.array([1, 2, 3, 4]))
    >>> mean.update(loss=6.0)
    >>> mean.compute()
    Array(3.2, dtype=float32)
    >>> mean.update(loss=jnp.array([7, 8]), mask=jnp.array([False, True]))
    >>> mean.compute()
    Array(4., dtype=float32)
    >>> mean.reset()
    >>> mean.compute()
    Array(nan, dtype=float32)

  Args:
    argname: The keyword by which `update` takes the values.

  Attributes:
    total: The sum of the values, a scalar float32; NaN, once there were more
      values than `count` can tell.
    count: Their number, a scalar int32.
  """

  def __init__(self, argname: str = "values"):
    self.argname = argname
    self.total = MetricState(jnp.array(0, dtype=jnp.float32))
    self.count = MetricState(jnp.array(0, dtype=jnp.int32))

  def reset(self) -> None:
    """Forgets all values."""
    self.total[...] = jnp.array(0, dtype=jnp.float32)
    self.count[...] = jnp.array(0, dtype=jnp.int32)

  def update(self, mask: jax.Array | None = None, **kwargs: Any) -> None:
    """Adds values.

    Args:
      mask: How often each value counts, 0, 1, 2 and so on, or whether it does:
        broadcast to them. Under a trace, the mean is NaN with other numbers.
        What does not count may be NaN.
      **kwargs: The values under the metric's name for them, an array `[...]`
        or a number; other keywords are left to other metrics.

    Raises:
      TypeError: If the values are missing or complex.
      ValueError: If a mask comes with a number, does not broadcast, or is not
        made of whole numbers of at least 0.
    """
    values = _taken(kwargs, self.argname, self)
    total: Any
    count: Any
    if _is_number(values):
      if mask is not None:
        raise ValueError(
          f"With a `mask`, `{self.argname}` must be an array, but got"
          f" {values!r}."
        )
      total, count = float(values), 1
    elif mask is None:
      if jnp.result_type(values) == jnp.bool_:
        values = values.astype(jnp.int32)  # whose sum is exact
      else:
        values = _widened(values)
      total, count = values.sum(), values.size
    else:
      weights = _as_weights(mask, values, self.argname)
      total = jnp.where(weights != 0, _widened(values) * weights, 0).sum()
      count = weights.astype(jnp.int32).sum()
    before = self.count[...]
    self.count[...] += count
    wraps = self.count[...] < before
    self.total[...] += jnp.where(wraps, jnp.nan, total)

  def compute(self) -> jax.Array:
    """Returns the mean, a scalar float32; NaN if there were no values."""
    return self.total / self.count

  def _keywords(self) -> frozenset[str] | None:
    if type(self).update is Average.update:
      return frozenset([self.argname, "mask"])
    return super()._keywords()


class Statistics(NamedTuple):
  """What `Welford.compute` returns.

  Example:

    >>> import nnx
    >>> welford = nnx.metrics.Welford()
    >>> welford.update(values=2.0)
    >>> type(welford.compute()).__name__
    'Statistics'

  Attributes:
    mean: Of the values.
    standard_error_of_mean: The standard deviation over the square root of the
      number of values.
    standard_deviation: That of the values, as of a whole population.
  """

  mean: jax.Array
  standard_error_of_mean: jax.Array
  standard_deviation: jax.Array

  def replace(self, **changes: Any) -> Statistics:
    """Returns a copy with some fields changed.

    Example:

      >>> from nnx import metrics
      >>> metrics.Statistics(1, 2, 3).replace(mean=4).mean
      4
    """
    return self._replace(**changes)


class Welford(Metric):
  """Mean and standard deviation of all values seen, by Welford's algorithm.

  Batches are joined without keeping the values: with the count `n` and mean `m`
  so far, those of the batch `k` and `b`, and `d = b - m`,

      mean = m + d * k / (n + k)
      m2 = m2 + k * var(batch) + d ** 2 * k * n / (n + k)

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> welford = nnx.metrics.Welford()
    >>> welford.update(values=jnp.array([1, 2, 3, 4]))
    >>> welford.update(values=jnp.array([3, 2, 1, 0]))
    >>> statistics = welford.compute()
    >>> float(statistics.mean), round(float(statistics.standard_deviation), 5)
    (2.0, 1.22474)

  Args:
    argname: The keyword by which `update` takes the values.

  Attributes:
    count: The number of values, a scalar int32.
    mean: Their mean, a scalar float32; NaN, once there were more values than
      `count` can tell.
    m2: The sum of their squared distances from the mean, a scalar float32.

  Source: T. Chan, G. Golub, R. LeVeque, Updating Formulae and a Pairwise
  Algorithm for Computing Sample Variances, 1979.
  """

  def __init__(self, argname: str = "values"):
    self.argname = argname
    self.count = MetricState(jnp.array(0, dtype=jnp.int32))
    self.mean = MetricState(jnp.array(0, dtype=jnp.float32))
    self.m2 = MetricState(jnp.array(0, dtype=jnp.float32))

  def reset(self) -> None:
    """Forgets all values."""
    self.count[...] = jnp.array(0, dtype=jnp.int32)
    self.mean[...] = jnp.array(0, dtype=jnp.float32)
    self.m2[...] = jnp.array(0, dtype=jnp.float32)

  def update(self, mask: jax.Array | None = None, **kwargs: Any) -> None:
    """Adds values.

    Args:
      mask: Not possible here; None.
      **kwargs: The values under the metric's name for them, an array `[...]`
        or a number; other keywords are left to other metrics.

    Raises:
      TypeError: If the values are missing or complex, or there is a mask.
    """
    if mask is not None:
      raise TypeError(
        "`Welford` must be updated without a `mask`, but got one. Select the"
        " values first, or give a `MultiMetric` a dict of masks by metric."
      )
    values = _taken(kwargs, self.argname, self)
    mean: Any
    if _is_number(values):
      count, mean, m2 = 1, float(values), 0.0
    elif not jnp.size(values):
      return  # An empty batch has no mean.
    else:
      values = _widened(values)
      count, mean = values.size, values.mean()
      m2 = values.var() * count
    before = self.count[...]
    self.count[...] += count
    mean = jnp.where(self.count[...] < before, jnp.nan, mean)
    delta = mean - self.mean
    self.mean[...] += delta * count / self.count
    self.m2[...] += m2 + delta * delta * count * before / self.count

  def compute(self) -> Statistics:
    """Returns the `Statistics` of the values; scalars, float32."""
    variance = self.m2 / self.count
    deviation = variance**0.5
    return Statistics(
      mean=self.mean[...],
      standard_error_of_mean=deviation / self.count**0.5,
      standard_deviation=deviation,
    )

  def _keywords(self) -> frozenset[str] | None:
    if type(self).update is Welford.update:
      return frozenset([self.argname])
    return super()._keywords()


class Accuracy(Average):
  """The share of predictions that are right.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> accuracy = nnx.metrics.Accuracy()
    >>> logits = jnp.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    >>> accuracy.update(logits=logits, labels=jnp.array([1, 0, 1, 1]))
    >>> accuracy.compute()
    Array(0.75, dtype=float32)
    >>> binary = nnx.metrics.Accuracy(threshold=0.5)
    >>> binary.update(logits=jnp.array([0.7, 0.2]), labels=jnp.array([1, 1]))
    >>> binary.compute()
    Array(0.5, dtype=float32)

  Args:
    threshold: The logit from which on an element is of class 1, for two classes
      told apart by one logit. None, if there is a logit for each class.
    *args: Those of `Average`.
    **kwargs: The same.

  Raises:
    TypeError: If `threshold` is not a float.
    ValueError: If it is NaN.
  """

  def __init__(self, threshold: float | None = None, *args: Any, **kwargs: Any):
    if threshold is not None and not isinstance(threshold, float):
      raise TypeError(
        f"`threshold` must be a float or None, but got {threshold!r} of type"
        f" `{type(threshold).__name__}`."
      )
    if threshold is not None and math.isnan(threshold):
      raise ValueError("`threshold` must be a number, but got nan.")
    self.threshold = threshold
    super().__init__(*args, **kwargs)

  def update(  # type: ignore[override]
    self,
    *,
    logits: jax.Array,
    labels: jax.Array,
    mask: jax.Array | None = None,
    **_: Any,
  ) -> None:
    """Adds predictions.

    Args:
      logits: `[..., c]` for `c` classes, `[...]` with a threshold.
      labels: `[...]`, integers: the right classes.
      mask: How often each prediction counts, or whether it does: broadcast to
        the labels.

    Raises:
      ValueError: If the labels are not integers, or do not have the shape that
        fits the logits.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    if self.threshold is not None:
      kind, expected = "With a `threshold`", "`logits.ndim == labels.ndim`"
      fits = logits.ndim == labels.ndim
    else:
      kind, expected = "Without", "`logits.ndim == labels.ndim + 1`"
      kind += " a `threshold`"
      fits = logits.ndim == labels.ndim + 1
    if not fits:
      raise ValueError(
        f"{kind} it must hold that {expected}, but got {logits.ndim} and"
        f" {labels.ndim} axes."
      )
    expected_shape = logits.shape[: labels.ndim]
    if labels.shape != expected_shape:
      raise ValueError(
        f"`labels` must have the shape {expected_shape} for `logits` of the"
        f" shape {logits.shape}, but got {labels.shape}."
      )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
      raise ValueError(
        f"`labels` must be integers, but got `{labels.dtype}`. Convert them:"
        " `labels.astype(int)`."
      )
    if self.threshold is not None:
      right = (logits >= self.threshold) == (labels > 0)
    else:
      right = logits.argmax(axis=-1) == labels
    super().update(mask=mask, **{self.argname: right})


class MultiMetric(Metric):
  """Several metrics that are updated by one call.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> metrics = nnx.MultiMetric(
    ...   accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss")
    ... )
    >>> logits = jnp.array([[0.1, 0.9], [0.8, 0.2]])
    >>> metrics.update(logits=logits, labels=jnp.array([1, 1]), loss=0.25)
    >>> metrics.compute()
    {'accuracy': Array(0.5, dtype=float32), 'loss': Array(0.25, dtype=float32)}
    >>> metrics.reset()
    >>> metrics.loss.compute()
    Array(nan, dtype=float32)

  Args:
    **metrics: The metrics; each becomes an attribute of its name.

  Raises:
    ValueError: If a name is that of a method.
  """

  def __init__(self, **metrics: Metric):
    for name in metrics:
      if hasattr(type(self), name):
        raise ValueError(
          f"A metric must not have the name of a method, but got `{name}`."
          " Give it another one."
        )
    self._metric_names = tuple(metrics)
    for name, metric in metrics.items():
      setattr(self, name, metric)

  def reset(self) -> None:
    """Resets each metric."""
    for name in self._metric_names:
      getattr(self, name).reset()

  def update(self, **updates: Any) -> None:
    """Updates each metric, with everything given.

    Args:
      **updates: Arguments of the metrics. A `mask` that is a dict has one for
        each metric named in it, and none for the others.

    Raises:
      TypeError: If no metric takes a keyword, or a mask is for none of them.
    """
    self._check(updates)
    mask = updates.pop("mask", None)
    if isinstance(mask, dict) and not mask.keys() <= set(self._metric_names):
      raise TypeError(
        "`mask` must name metrics of these, but got"
        f" {sorted(mask.keys() - set(self._metric_names))}; they are"
        f" {list(self._metric_names)}."
      )
    for name in self._metric_names:
      own = mask.get(name) if isinstance(mask, dict) else mask
      extra = {} if own is None else {"mask": own}
      getattr(self, name).update(**updates, **extra)

  def _check(self, updates: dict[str, Any]) -> None:
    """Refuses keywords that no metric uses."""
    taken = self._keywords()
    if taken is None:
      return
    unknown = sorted(updates.keys() - taken - {"mask"})
    if unknown:
      raise TypeError(
        f"`update` must get keywords that a metric takes, but got {unknown};"
        f" the metrics take {sorted(taken)}."
      )

  def _keywords(self) -> frozenset[str] | None:
    names: set[str] = set()
    for name in self._metric_names:
      metric = getattr(self, name)
      own = metric._keywords() if isinstance(metric, Metric) else None
      if own is None:
        return None
      names |= own
    return frozenset(names)

  def compute(self) -> dict[str, Any]:
    """Returns the value of each metric, by name."""
    return {name: getattr(self, name).compute() for name in self._metric_names}
