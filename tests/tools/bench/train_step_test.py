"""Tests of the rows and programs of suite `train_step`."""

from absl.testing import absltest
import jax
from jax import numpy as jnp
import numpy as np
import optax

from tools.bench import harness, train_step


class PlainTest(absltest.TestCase):
  """What is written by hand is the same program: it is the floor."""

  def test_model(self):
    comparison = train_step._build_step(2)
    (model, _), (params, *_) = (
      comparison.ours.fresh(),
      comparison.floor_side.fresh(),
    )
    x, _ = train_step._batch()
    np.testing.assert_allclose(
      train_step.plain_blocks(params, x), model(x), rtol=1e-5, atol=1e-6
    )

  def test_step(self):
    comparison = train_step._build_step(2)
    ours, floor = comparison.ours, comparison.floor_side
    state, plain = ours.fresh(), floor.fresh()
    for _ in range(2):
      loss = ours.call(state)
      result = floor.call(plain)
      plain = floor.advance(plain, result)
    np.testing.assert_allclose(result[1], loss, rtol=1e-5)
    params = ours.observe(state, loss)[1].values()
    for a, b in zip(plain[0], params, strict=True):
      np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)

  def test_adam(self):
    params = (jnp.array([1.0, -2.0]), jnp.array(3.0))
    zeros = tuple(map(jnp.zeros_like, params))
    grads = (jnp.array([0.5, -1.0]), jnp.array(0.25))
    tx = optax.adam(train_step._RATE)
    opt_state, want = tx.init(params), params
    state = (params, zeros, zeros, jnp.int32(0))
    for _ in range(3):
      updates, opt_state = tx.update(grads, opt_state)
      want = optax.apply_updates(want, updates)
      state = train_step.plain_adam(state, grads)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), state[0], want
    )


class CasesTest(absltest.TestCase):
  def test_rows_have_the_promised_names(self):
    rows = {
      (case.op, case.case)
      for case in train_step.cases(harness.Settings.for_run(quick=False))
    }
    self.assertEqual(
      rows,
      {
        ("step", "5_blocks"),
        ("step", "25_blocks"),
        ("trace", "50_layers"),
        ("compile_scan", "24_layers"),
      },
    )


if __name__ == "__main__":
  absltest.main()
