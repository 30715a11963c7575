"""Buffers and programs are those of the same computation in plain jax."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp

import nnx
from tests.testing import hlo

LAYERS, SIZE = 24, 32


class Block(nnx.Module):
  def __init__(self, *leading):
    self.w = nnx.Param(jnp.ones((*leading, SIZE, SIZE)))
    self.b = nnx.Param(jnp.zeros((*leading, SIZE)))
    self.mean = nnx.BatchStat(jnp.zeros((*leading, SIZE)))

  def __call__(self, x):
    y = jnp.tanh(x @ self.w[...] + self.b[...])
    self.mean[...] = 0.9 * self.mean[...] + 0.1 * y.mean(0)
    return jnp.sin(x + y)


def block(params, mean, x):
  w, b = params
  y = jnp.tanh(x @ w + b)
  return 0.9 * mean + 0.1 * y.mean(0), jnp.sin(x + y)


def arrays(model):
  return (model.w.value, model.b.value), model.mean.value


class MemoryTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.x = jnp.ones((16, SIZE))

  def assert_same_memory(self, ours, plain):
    """Compares compiled programs.

    The order of arguments and results differs, and with it the schedule, which
    may keep a few activations of one layer longer.
    """
    one, two = ours.memory_analysis(), plain.memory_analysis()
    for name in (
      "temp_size_in_bytes",
      "argument_size_in_bytes",
      "output_size_in_bytes",
    ):
      a, b = getattr(one, name), getattr(two, name)
      self.assertLessEqual(a, 1.01 * b + 2 * self.x.nbytes, name)

  @parameterized.parameters(False, True)
  def test_train_step_of_separate_layers(self, remat):
    layers = [Block() for _ in range(5)]
    state = [arrays(layer) for layer in layers]
    call = nnx.remat(Block.__call__) if remat else Block.__call__
    pure_call = jax.checkpoint(block) if remat else block

    @nnx.jit
    def step(model, x):
      @nnx.value_and_grad
      def loss(model, x):
        for layer in model:
          x = call(layer, x)
        return (x**2).mean()

      value, grads = loss(model, x)
      params = nnx.state(model, nnx.Param)
      nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads))
      return value

    @jax.jit
    def pure_step(state, x):
      params, means = zip(*state)

      def loss(params, x):
        new = []
        for p, mean in zip(params, means):
          mean, x = pure_call(p, mean, x)
          new.append(mean)
        return (x**2).mean(), new

      (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params, x)
      params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
      return value, list(zip(params, new))

    model = nnx.List(layers)
    self.assert_same_memory(
      hlo.compiled(step.lower(model, self.x)),
      hlo.compiled(pure_step.lower(state, self.x)),
    )
    value = step(model, self.x)
    expected, new = pure_step(state, self.x)
    self.assertAlmostEqual(float(value), float(expected), places=5)
    del new

  def scans(self, remat):
    model = Block(LAYERS)
    params, means = arrays(model)
    call = nnx.remat(Block.__call__) if remat else Block.__call__
    pure_call = jax.checkpoint(block) if remat else block

    @nnx.jit
    def step(model, x):
      @nnx.value_and_grad
      def loss(model, x):
        forward = nnx.scan(
          lambda x, layer: call(layer, x),
          in_axes=(nnx.Carry, 0),
          out_axes=nnx.Carry,
        )
        return (forward(x, model) ** 2).mean()

      return loss(model, x)

    @jax.jit
    def pure_step(params, means, x):
      def loss(params, x):
        def body(x, layer):
          mean, x = pure_call(*layer, x)
          return x, mean

        x, new = jax.lax.scan(body, x, (params, means))
        return (x**2).mean(), new

      return jax.value_and_grad(loss, has_aux=True)(params, x)

    return step.lower(model, self.x), pure_step.lower(params, means, self.x)

  @parameterized.parameters(False, True)
  def test_scan_over_stacked_layers(self, remat):
    ours, plain = self.scans(remat)
    one, two = hlo.compiled(ours), hlo.compiled(plain)
    self.assert_same_memory(one, two)
    for operation in (" while(", " dot(", "tanh("):
      self.assertEqual(
        one.as_text().count(operation), two.as_text().count(operation)
      )

  def test_state_that_is_not_written_keeps_its_buffer(self):
    model = Block()
    w, b = model.w.value, model.b.value
    nnx.value_and_grad(lambda model, x: model(x).sum())(model, self.x)
    nnx.vmap(lambda model, x: model.w.sum() * x, in_axes=(None, 0))(
      model, self.x
    )
    nnx.remat(lambda model, x: model(x))(model, self.x)
    self.assertIs(model.w.value, w)
    self.assertIs(model.b.value, b)


if __name__ == "__main__":
  absltest.main()
