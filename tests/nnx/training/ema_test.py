"""Averages of parameters move as those of flax.nnx do."""

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np

import nnx


def values(library, state):
  return {
    path: np.asarray(leaf[...]) for path, leaf in library.to_flat_state(state)
  }


class OracleTest(parameterized.TestCase):
  @parameterized.parameters(False, True)
  def test_values_are_those_of_flax(self, jitted):
    results = []
    for library in (nnx, flax_nnx):
      model = library.BatchNorm(3, rngs=library.Rngs(0))
      ema = library.EMA(model, 0.75, only=library.Param)
      averaged = ema.apply_to(model)

      def step(ema, model, library=library):
        model.scale[...] = 3.0 * model.scale[...] + 1.0
        model.mean[...] = model.mean[...] - 1.0
        ema.update(model)

      if jitted:
        step = library.jit(step)
      for _ in range(3):
        step(ema, model)
      results.append(
        (
          values(library, ema.params),
          values(library, library.state(averaged)),
        )
      )
    for ours, theirs in zip(*results):
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), ours, theirs
      )


class EmaTest(absltest.TestCase):
  def test_variables_of_the_average(self):
    model = nnx.Linear(
      2, 2, kernel_metadata={"sharding": ("a", None)}, rngs=nnx.Rngs(0)
    )
    ema = nnx.EMA(model, 0.5)
    self.assertIs(type(ema.params.kernel), nnx.Param)
    self.assertEqual(ema.params.kernel.sharding_names, ("a", None))
    self.assertIsNot(ema.params.kernel, model.kernel)
    self.assertIsNot(ema.params.kernel.value, model.kernel.value)
    averaged = ema.apply_to(model)
    self.assertIs(averaged.kernel, ema.params.kernel)
    self.assertIsNot(averaged, model)

  def test_counts_and_keys_are_the_newest(self):
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    ema = nnx.EMA(model, 0.5)
    model(jnp.ones(3))
    ema.update(model)
    self.assertEqual(int(ema.params.rngs.count.value), 1)
    self.assertTrue((ema.params.rngs.key.value == model.rngs.key.value).all())

  def test_dtype_and_bounds(self):
    model = nnx.Dict(w=nnx.Param(jnp.ones(2, jnp.bfloat16)))
    for decay, expected in ((0, 3.0), (1, 1.0)):
      ema = nnx.EMA(model, decay)
      ema.update(nnx.Dict(w=nnx.Param(jnp.full(2, 3.0))))
      self.assertEqual(ema.params.w.dtype, jnp.bfloat16)
      self.assertEqual(ema.params.w.value[0], expected)

  def test_hooks_do_not_enter_the_average(self):
    model = nnx.Dict(w=nnx.Param(1.0, on_get_value=lambda v, x: 10 * x))
    ema = nnx.EMA(model, 0.5)
    model.w.raw_value = 2.0
    ema.update(model)
    self.assertEqual(ema.params.w.raw_value, 1.5)
    self.assertEqual(ema.apply_to(model).w.value, 15.0)

  def test_mutable_arrays(self):
    model = nnx.Dict(w=nnx.Param(jnp.ones(2), ref=True))
    ema = nnx.EMA(model, 0.5)
    model.w[...] = jnp.full(2, 3.0)
    ema.update(model)
    self.assertTrue(ema.params.w.ref)
    np.testing.assert_array_equal(ema.params.w.value, 2.0)

  def test_a_single_variable(self):
    w = nnx.Param(jnp.ones(2))
    ema = nnx.EMA(w, 0.5)
    w.value = jnp.full(2, 3.0)
    ema.update(w)
    np.testing.assert_array_equal(ema.apply_to(w).value, 2.0)

  def test_errors(self):
    with self.assertRaisesRegex(
      ValueError, r"`decay` must lie in \[0, 1\], but got 1.5"
    ):
      nnx.EMA(nnx.Dict(), 1.5)
    with self.assertRaisesRegex(
      TypeError, "averages Variables, but at `x` there is a `.*Array.*only="
    ):
      nnx.EMA(nnx.Dict(x=jnp.ones(1)), 0.5)
    ema = nnx.EMA(nnx.Dict(a=nnx.Param(1.0), b=nnx.Param(1.0)), 0.5)
    with self.assertRaisesRegex(
      ValueError, r"must have all Variables .* but lacks \['b'\]"
    ):
      ema.update(nnx.Dict(a=nnx.Param(1.0)))


if __name__ == "__main__":
  absltest.main()
