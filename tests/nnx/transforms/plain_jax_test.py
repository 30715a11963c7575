"""jax's own transforms on Modules as pytrees: nothing is written back."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from tests.nnx.transforms import both

X = jnp.arange(3.0)


def same_program(lib):
  model = both.models(lib).Dense()
  del model.calls

  def forward(model, x):
    return jnp.tanh(x @ model.kernel[...] + model.bias[...])

  def loss(model, x):
    return forward(model, x).sum()

  return model, forward, loss


class PlainJaxTest(parameterized.TestCase):
  def test_jit(self):
    def program(lib):
      model, forward, _ = same_program(lib)
      return jax.jit(forward)(model, X)

    both.same(program)

  def test_grad_gives_a_module(self):
    def program(lib):
      model, _, loss = same_program(lib)
      grads = jax.grad(loss)(model, X)
      assert isinstance(grads, type(model))
      return grads

    both.same(program)

  def test_vmap(self):
    def program(lib):
      stack = both.models(lib).Stack()
      del stack.calls

      def f(stack, x):
        return x @ stack.w[...] + stack.mean[...]

      return jax.vmap(f, in_axes=(0, None))(stack, X)

    both.same(program)

  def test_scan(self):
    def program(lib):
      stack = both.models(lib).Stack()
      del stack.calls
      return jax.lax.scan(lambda x, s: (x @ s.w[...], s.mean[...]), X, stack)

    both.same(program)

  def test_models_returned_are_new_and_the_argument_is_as_it_was(self):
    model = both.models(nnx).Dense()

    @jax.jit
    def f(model, x):
      model(x)
      return model

    new = f(model, X)
    self.assertIsNot(new, model)
    self.assertEqual(int(new.calls.value), 1)
    self.assertEqual(int(model.calls.value), 0)

  def test_inside_of_our_transforms(self):
    model = both.models(nnx).Dense()

    @nnx.jit
    def f(model, x):
      grads = jax.grad(lambda b: (b * x).sum())(model.bias.value)
      model.bias.value = model.bias + grads
      return jax.vmap(lambda a: a * 2)(model.bias.value)

    y = f(model, X)
    np.testing.assert_allclose(y, 2 * (jnp.linspace(0, 1, 3) + X), rtol=1e-6)
    np.testing.assert_allclose(2 * model.bias.value, y)


if __name__ == "__main__":
  absltest.main()
