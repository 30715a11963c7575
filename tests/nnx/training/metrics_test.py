"""Metrics compute what those of flax.nnx compute, in and out of jit."""

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx

RANDOM = np.random.RandomState(0)
VALUES = [RANDOM.normal(size=(3, 4)).astype(np.float32) for _ in range(3)]
LOGITS = [RANDOM.normal(size=(6, 3)).astype(np.float32) for _ in range(3)]
LABELS = [RANDOM.randint(0, 3, size=6).astype(np.int32) for _ in range(3)]
MASK = np.array([1, 0, 1, 1, 0, 1], bool)


def leaves(value):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(value)]


def follow(library, metric, updates, jitted):
  """What a metric computes after each of some updates and after a reset."""

  def update(metric, kwargs):
    metric.update(**kwargs)

  if jitted:
    update = library.jit(update)
  results = []
  for kwargs in updates:
    update(metric, kwargs)
    results.append(leaves(metric.compute()))
  metric.reset()
  return [*results, leaves(metric.compute())]


CASES = {
  "average": (
    lambda library: library.metrics.Average(),
    [{"values": jnp.asarray(v)} for v in VALUES],
  ),
  "average_named": (
    lambda library: library.metrics.Average("loss"),
    [{"loss": jnp.arange(3), "other": jnp.ones(2)}],
  ),
  "average_masked": (
    lambda library: library.metrics.Average(),
    [{"values": jnp.asarray(v), "mask": jnp.asarray(v > 0)} for v in VALUES],
  ),
  "welford": (
    lambda library: library.metrics.Welford(),
    [{"values": jnp.asarray(v)} for v in VALUES],
  ),
  "accuracy": (
    lambda library: library.metrics.Accuracy(),
    [
      {"logits": jnp.asarray(x), "labels": jnp.asarray(y)}
      for x, y in zip(LOGITS, LABELS)
    ],
  ),
  "accuracy_masked": (
    lambda library: library.metrics.Accuracy(),
    [
      {
        "logits": jnp.asarray(x),
        "labels": jnp.asarray(y),
        "mask": jnp.asarray(MASK),
      }
      for x, y in zip(LOGITS, LABELS)
    ],
  ),
  "accuracy_binary": (
    lambda library: library.metrics.Accuracy(threshold=0.5),
    [
      {"logits": jnp.asarray(x[:, 0]), "labels": jnp.asarray(y % 2)}
      for x, y in zip(LOGITS, LABELS)
    ],
  ),
  "multi": (
    lambda library: library.MultiMetric(
      accuracy=library.metrics.Accuracy(),
      loss=library.metrics.Average("loss"),
    ),
    [
      {
        "logits": jnp.asarray(x),
        "labels": jnp.asarray(y),
        "loss": jnp.asarray(v),
        "mask": {"accuracy": jnp.asarray(MASK)},
      }
      for x, y, v in zip(LOGITS, LABELS, VALUES)
    ],
  ),
}


class OracleTest(parameterized.TestCase):
  @parameterized.product(name=list(CASES), jitted=(False, True))
  def test_values_are_those_of_flax(self, name, jitted):
    make, updates = CASES[name]
    ours = follow(nnx, make(nnx), updates, jitted)
    theirs = follow(flax_nnx, make(flax_nnx), updates, jitted)
    for step, (a, b) in enumerate(zip(ours, theirs, strict=True)):
      for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, err_msg=str(step))
        self.assertEqual(x.dtype, y.dtype)

  @parameterized.parameters("Average", "Welford")
  def test_numbers(self, name):
    results = []
    for library in (nnx, flax_nnx):
      metric = getattr(library.metrics, name)()
      for value in (1, 2.5, 4):
        metric.update(values=value)
      results.append(leaves(metric.compute()))
    np.testing.assert_allclose(*results, rtol=1e-6)

  def test_states_have_the_paths_and_types_of_flax(self):
    layouts = []
    for library in (nnx, flax_nnx):
      state = library.state(CASES["multi"][0](library))
      layouts.append(
        {
          path: (type(leaf).__name__, leaf.dtype)
          for path, leaf in library.to_flat_state(state)
        }
      )
    self.assertEqual(*layouts)


class MetricsTest(absltest.TestCase):
  def test_welford_is_the_deviation_of_all_values(self):
    metric = nnx.metrics.Welford()
    for value in VALUES:
      metric.update(values=jnp.asarray(value))
    found = metric.compute()
    everything = np.stack(VALUES)
    np.testing.assert_allclose(found.mean, everything.mean(), rtol=1e-5)
    np.testing.assert_allclose(
      found.standard_deviation, everything.std(), rtol=1e-5
    )
    np.testing.assert_allclose(
      found.standard_error_of_mean,
      everything.std() / everything.size**0.5,
      rtol=1e-5,
    )

  def test_a_mask_is_broadcast_to_the_values(self):
    metric = nnx.metrics.Average()
    values = jnp.arange(6.0).reshape(2, 3)
    metric.update(values=values, mask=jnp.array([[True], [False]]))
    self.assertEqual(float(metric.compute()), 1.0)

  def test_a_mask_may_count_values_more_than_once(self):
    metric = nnx.metrics.Accuracy(threshold=0.5)
    metric.update(
      logits=jnp.array([1.0, 1.0, 0.0]),
      labels=jnp.array([1, 1, 1]),
      mask=jnp.array([2.0, 1.0, 1.0]),
    )
    self.assertEqual(float(metric.compute()), 0.75)
    self.assertEqual(int(metric.count[...]), 4)
    metric = nnx.metrics.Average()
    metric.update(values=jnp.array([200], jnp.uint8), mask=jnp.array([2]))
    self.assertEqual(float(metric.compute()), 200)

  def test_a_mask_of_fractions_is_not_counted(self):
    values, mask = jnp.ones(2), jnp.array([0.5, 0.2])
    metric = nnx.metrics.Average()
    with self.assertRaisesRegex(
      ValueError, "`mask` must be made of whole numbers, but got "
    ):
      metric.update(values=values, mask=mask)
    self.assertEqual(int(metric.count[...]), 0)
    nnx.jit(lambda m, x, k: m.update(values=x, mask=k))(metric, values, mask)
    self.assertTrue(jnp.isnan(metric.compute()))

  def test_a_mask_of_negative_numbers_is_not_counted(self):
    for mask in (jnp.array([-1, 2]), jnp.array([1.0, jnp.inf])):
      metric = nnx.metrics.Average()
      with self.assertRaisesRegex(ValueError, "`mask` must be made of whole"):
        metric.update(values=jnp.ones(2), mask=mask)
      nnx.jit(lambda m, k: m.update(values=jnp.ones(2), mask=k))(metric, mask)
      self.assertTrue(jnp.isnan(metric.compute()))

  def test_what_a_mask_leaves_out_may_be_anything(self):
    metric = nnx.metrics.Average()
    values = jnp.array([1.0, jnp.nan, jnp.inf])
    metric.update(values=values, mask=jnp.array([True, False, False]))
    metric.update(values=values, mask=jnp.array([2, 0, 0]))
    self.assertEqual(float(metric.compute()), 1.0)

  def test_sums_of_integers_may_exceed_their_type(self):
    for values in (
      jnp.full((4,), 2**30, jnp.int32),
      jnp.full((4,), 2**31, jnp.uint32),
      jnp.full((300_000,), 30_000, jnp.int16),
      np.full((4,), 2**40),
    ):
      want = float(values[0])
      for mask in ({}, {"mask": jnp.ones(values.shape, bool)}):
        metric = nnx.metrics.Average()
        metric.update(values=values, **mask)
        np.testing.assert_allclose(metric.compute(), want, rtol=1e-5)
      welford = nnx.metrics.Welford()
      welford.update(values=values)
      np.testing.assert_allclose(welford.compute().mean, want, rtol=1e-5)

  def test_a_count_beyond_int32_is_nan(self):
    average, welford = nnx.metrics.Average(), nnx.metrics.Welford()
    for metric in (average, welford):
      metric.update(values=jnp.ones(2))
      metric.count[...] = jnp.int32(2**31 - 4)
      metric.update(values=jnp.ones(3))
    self.assertFalse(jnp.isnan(average.compute()))
    self.assertEqual(float(welford.compute().mean), 1.0)
    for metric in (average, welford):
      nnx.jit(lambda m: m.update(values=jnp.ones(2)))(metric)
      metric.update(values=1.0)
    self.assertTrue(jnp.isnan(average.compute()))
    self.assertTrue(jnp.isnan(welford.compute().mean))
    self.assertTrue(jnp.isnan(welford.compute().standard_deviation))

  def test_an_empty_batch_changes_nothing(self):
    for metric in (nnx.metrics.Average(), nnx.metrics.Welford()):
      metric.update(values=jnp.zeros((0, 3)))
      metric.update(values=jnp.array([1.0, 3.0]))
      metric.update(values=jnp.zeros(0))
      self.assertEqual(float(jnp.asarray(metric.compute()).ravel()[0]), 2.0)

  def test_complex_values_are_refused(self):
    for metric in (nnx.metrics.Average("z"), nnx.metrics.Welford("z")):
      name = type(metric).__name__
      with self.assertRaisesRegex(
        TypeError, f"`z` must be real for this `{name}`, but got `complex64`"
      ):
        metric.update(z=jnp.array([1j]))

  def test_small_floats_are_summed_in_float32(self):
    values = jnp.asarray(100 + np.arange(1000) % 7, jnp.float16)
    average, masked = nnx.metrics.Average(), nnx.metrics.Average()
    welford = nnx.metrics.Welford()
    average.update(values=values)
    masked.update(values=values, mask=jnp.ones(1000, jnp.float16))
    for _ in range(2):
      welford.update(values=values)
    exact, found = np.asarray(values, np.float64), welford.compute()
    for mean in (average.compute(), masked.compute(), found.mean):
      np.testing.assert_allclose(mean, exact.mean(), rtol=1e-6)
    np.testing.assert_allclose(found.standard_deviation, exact.std(), rtol=1e-5)

  def test_values_may_be_variables_and_lists(self):
    metric = nnx.metrics.Average()
    metric.update(values=nnx.Variable(jnp.array([1.0, 3.0])))
    metric.update(values=[5.0])
    self.assertEqual(float(metric.compute()), 3.0)

  def test_labels_may_be_small_integers(self):
    metric = nnx.metrics.Accuracy()
    metric.update(logits=LOGITS[0], labels=LABELS[0].astype(np.uint8))
    expected = (LOGITS[0].argmax(-1) == LABELS[0]).mean()
    self.assertAlmostEqual(float(metric.compute()), expected, places=6)

  def test_accuracy_under_another_name(self):
    metric = nnx.metrics.Accuracy(None, "hits")
    metric.update(logits=LOGITS[0], labels=LABELS[0])
    self.assertEqual(int(metric.count.value), 6)

  def test_display(self):
    text = str(nnx.MultiMetric(loss=nnx.metrics.Average()))
    self.assertIn("MultiMetric( # MetricState: 2 (8 B)", text)
    self.assertIn("argname='values'", text)


class ErrorsTest(absltest.TestCase):
  def test_base(self):
    class Empty(nnx.Metric):
      pass

    class Started(nnx.Metric):
      def __init__(self):
        pass

    with self.assertRaisesRegex(
      NotImplementedError, "must define `__init__`, but `Empty` does not"
    ):
      Empty()
    for method in ("reset", "update", "compute"):
      with self.assertRaisesRegex(NotImplementedError, f"`{method}`"):
        getattr(Started(), method)()

  def test_missing_values(self):
    for metric in (nnx.metrics.Average("loss"), nnx.metrics.Welford("loss")):
      with self.assertRaisesRegex(
        TypeError, r"must be given `loss=...`, but got \['values'\]"
      ):
        metric.update(values=1.0)

  def test_misspelt_keyword_of_multi_metric(self):
    metrics = nnx.MultiMetric(
      accuracy=nnx.metrics.Accuracy(), loss=nnx.metrics.Average("loss")
    )
    labels = jnp.array([1])
    with self.assertRaisesRegex(
      TypeError,
      r"keywords that a metric takes, but got \['los'\]; the metrics take"
      r" \['labels', 'logits', 'loss', 'mask'\]",
    ):
      metrics.update(logits=jnp.ones((1, 2)), labels=labels, loss=1.0, los=2.0)
    with self.assertRaisesRegex(
      TypeError, r"`mask` must name metrics of these, but got \['acuracy'\]"
    ):
      metrics.update(
        logits=jnp.ones((1, 2)),
        labels=labels,
        loss=1.0,
        mask={"acuracy": jnp.ones(1)},
      )
    np.testing.assert_array_equal(metrics.loss.count[...], 0)

  def test_keywords_that_a_metric_gathers_are_taken(self):
    class Last(nnx.Metric):
      def __init__(self):
        self.last = nnx.metrics.MetricState(jnp.float32(0))

      def reset(self):
        self.last[...] = 0.0

      def update(self, **kwargs):
        self.last[...] = kwargs["any"]

      def compute(self):
        return self.last[...]

    metrics = nnx.MultiMetric(last=Last(), loss=nnx.metrics.Average("loss"))
    metrics.update(loss=1.0, any=2.0)
    self.assertEqual(float(metrics.compute()["last"]), 2.0)

  def test_labels_that_do_not_fit(self):
    for logits, labels, threshold in (
      ((4, 2), (3,), None),
      ((4, 2), (1,), None),  # which would broadcast
      ((4,), (1,), 0.5),
    ):
      accuracy = nnx.metrics.Accuracy(threshold)
      with self.assertRaisesRegex(
        ValueError,
        rf"`labels` must have the shape \(4,\) for `logits` of the shape"
        rf" {logits}, but got \({labels[0]},\)".replace(
          "(4, 2)", r"\(4, 2\)"
        ).replace("shape (4,)", r"shape \(4,\)"),
      ):
        accuracy.update(logits=jnp.ones(logits), labels=jnp.ones(labels, int))

  def test_masks_that_do_not_fit(self):
    with self.assertRaisesRegex(
      ValueError,
      r"`mask` must broadcast to the shape \(3,\) of `values`, but got \(2,\)",
    ):
      nnx.metrics.Average().update(values=jnp.ones(3), mask=jnp.ones(2))
    with self.assertRaisesRegex(
      TypeError, "`Welford` must be updated without a `mask`"
    ):
      nnx.metrics.Welford().update(values=jnp.ones(3), mask=jnp.ones(3))

  def test_mask_with_a_number(self):
    with self.assertRaisesRegex(
      ValueError, "With a `mask`, `values` must be an array, but got 1.0"
    ):
      nnx.metrics.Average().update(values=1.0, mask=jnp.ones(1))

  def test_threshold(self):
    with self.assertRaisesRegex(
      TypeError, "`threshold` must be a float or None, but got 1 of type `int`"
    ):
      nnx.metrics.Accuracy(threshold=1)
    with self.assertRaisesRegex(ValueError, "must be a number, but got nan"):
      nnx.metrics.Accuracy(threshold=float("nan"))

  def test_numbers_of_axes(self):
    with self.assertRaisesRegex(
      ValueError, r"`logits.ndim == labels.ndim \+ 1`, but got 1 and 1 axes"
    ):
      nnx.metrics.Accuracy().update(logits=LABELS[0], labels=LABELS[0])
    with self.assertRaisesRegex(
      ValueError, "`logits.ndim == labels.ndim`, but got 2 and 1 axes"
    ):
      metric = nnx.metrics.Accuracy(threshold=0.5)
      metric.update(logits=LOGITS[0], labels=LABELS[0])

  def test_labels_that_are_no_integers(self):
    with self.assertRaisesRegex(
      ValueError, "`labels` must be integers, but got `float32`"
    ):
      nnx.metrics.Accuracy().update(logits=LOGITS[0], labels=LOGITS[0][:, 0])

  def test_names_of_methods(self):
    with self.assertRaisesRegex(
      ValueError, "must not have the name of a method, but got `update`"
    ):
      nnx.MultiMetric(update=nnx.metrics.Average())


if __name__ == "__main__":
  absltest.main()
