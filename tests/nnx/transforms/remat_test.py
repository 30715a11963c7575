"""nnx.remat: values, options, and what is kept."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.transforms import both

X = jnp.arange(3.0)


class RematTest(parameterized.TestCase):
  def test_same_as_flax(self):
    def program(lib):
      model = both.models(lib).Tied()
      forward = lib.remat(lambda model, x: model(x))

      @lib.value_and_grad
      def loss(model, x):
        return forward(model, x).sum()

      return loss(model, X), model

    both.same(program)

  def test_method_and_static_arguments(self):
    def program(lib):
      class Model(lib.Module):
        def __init__(self):
          self.w = lib.Param(X)

        @lib.remat(static_argnums=(2,), prevent_cse=False)
        def __call__(self, x, power):
          assert isinstance(power, int)
          self.w[...] = self.w[...] * 2
          return jnp.sin(self.w[...] * x) ** power

      model = Model()

      def loss(model, x):
        return model(x, 3).sum()

      return lib.grad(loss)(model, X), model

    both.same(program)

  def residuals(self, **options):
    w = nnx.Param(jnp.ones((3, 3)))

    @nnx.remat(**options)
    def f(w, x):
      return jnp.sin(jnp.sin(x @ w)).sum()

    text = str(nnx.make_jaxpr(nnx.grad(f))(w, X))
    return text.count("= sin ") + text.count("= cos "), text

  def test_intermediates_are_computed_again_unless_the_policy_keeps_them(self):
    again, text = self.residuals()
    everything, _ = self.residuals(
      policy=jax.checkpoint_policies.everything_saveable
    )
    self.assertGreater(again, everything)
    self.assertIn("prevent_cse=True", text)
    self.assertIn("prevent_cse=False", self.residuals(prevent_cse=False)[1])

  def test_new_state_appears_outside(self):
    model = both.models(nnx).Dense()

    @nnx.remat
    def f(model, x):
      model.seen = nnx.Intermediate(x)
      model.size = 8
      return model(x).sum()

    nnx.grad(f)(model, X)
    np.testing.assert_array_equal(model.seen.value, X)
    self.assertEqual((model.size, int(model.calls.value)), (8, 1))

  def test_errors(self):
    with self.assertRaisesRegex(
      ValueError,
      "`static_argnums` must name positional arguments, of which there are 1 in"
      " this call, but got 3",
    ):
      nnx.remat(jnp.sin, static_argnums=3)(X)
    model = both.models(nnx).Dense()
    with self.assertRaisesRegex(
      nnx.TraceContextError, "It is `mean` of a `Dense`"
    ):
      nnx.remat(lambda x: model(x))(X)


if __name__ == "__main__":
  absltest.main()
