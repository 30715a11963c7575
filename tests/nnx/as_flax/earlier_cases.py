"""The transforms that Flax 0.10 had before its own: axes of state by filter.

A program of its own, which `names_test` runs: `nnx.as_flax` is for a process.
"""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx
from nnx.as_flax import earlier

WIDTH = 64  # of which dropout leaves different ones


class Block(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(3, WIDTH, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, deterministic=False, rngs=rngs)
    self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

  def __call__(self, x):
    self.calls[...] += 1
    return self.dropout(nnx.relu(self.linear(x)))


def apply(module, x):
  return module(x)


class MappedTest(parameterized.TestCase):
  @parameterized.product(
    transform=[earlier.vmap, earlier.pmap], state_axes=[{nnx.Param: 0}, None]
  )
  def test_made_and_called(self, transform, state_axes):
    size = 5 if transform is earlier.vmap else jax.device_count()
    axes = {} if state_axes is None else {"state_axes": state_axes}
    rngs = nnx.Rngs(0)
    key = rngs.default.key[...]
    module = transform(Block, axis_size=size, **axes)(rngs)
    self.assertEqual(rngs.default.key[...], key)
    self.assertEqual(module.linear.kernel.shape, (size, 3, WIDTH))
    self.assertEqual(module.calls.shape, () if state_axes else (size,))
    kernel = np.asarray(module.linear.kernel[...])
    self.assertLen({k.tobytes() for k in kernel}, size)
    x = jnp.ones((size, 1, 3))
    mapped = transform(axis_size=size, **axes)(apply)
    y = mapped(module, x)
    self.assertEqual(y.shape, (size, 1, WIDTH))
    np.testing.assert_array_equal(module.calls[...], 1)
    self.assertFalse(np.array_equal(y, mapped(module, x)))

  def test_replicated(self):
    module = Block(nnx.Rngs(0))
    y = earlier.vmap(apply, state_axes={}, split_rngs=True)(
      module, jnp.ones((4, 1, 3))
    )
    self.assertFalse(np.array_equal(y[0], y[1]))
    y = earlier.vmap(apply, state_axes={}, split_rngs=False)(
      module, jnp.ones((4, 1, 3))
    )
    np.testing.assert_array_equal(y[0], y[1])
    self.assertEqual(module.calls[...], 2)

  @parameterized.parameters(earlier.vmap, earlier.pmap)
  def test_modules_among_the_outputs(self, transform):
    size = 4 if transform is earlier.vmap else jax.device_count()

    def make(x, rngs):
      block = Block(rngs)
      return {"block": block, "again": block, "x": (x, None)}

    mapped = transform(
      make,
      in_axes=(0, None),
      out_axes=1 if transform is earlier.vmap else 0,
      state_axes={nnx.Param: 0},
      axis_size=size,
    )
    out = mapped(jnp.ones((size, 2)), nnx.Rngs(0))
    self.assertIs(out["block"], out["again"])
    self.assertEqual(out["block"].linear.kernel.shape, (size, 3, WIDTH))
    shape = (2, size) if transform is earlier.vmap else (size, 2)
    self.assertEqual(out["x"][0].shape, shape)
    self.assertIsNone(out["x"][1])

  def test_the_module_that_came_in(self):
    module = Block(nnx.Rngs(0))
    out = earlier.vmap(lambda m: m, state_axes={}, axis_size=2)(module)
    self.assertIs(out, module)

  @parameterized.parameters(
    {"static_broadcasted_argnums": (0,)},
    {"donate_argnums": (0,)},
    {"global_arg_shapes": ((1,),)},
  )
  def test_pmap_refuses(self, **options):
    with self.assertRaisesRegex(ValueError, "must be left out"):
      earlier.pmap(apply, **options)


class ScanTest(parameterized.TestCase):
  def layers(self):
    make = earlier.vmap(lambda rngs: nnx.Linear(3, 3, rngs=rngs), axis_size=4)
    return make(nnx.Rngs(0))

  def expected(self, layers, x):
    for kernel, bias in zip(layers.kernel[...], layers.bias[...]):
      x = x @ kernel + bias
    return x

  def test_layers_one_after_another(self):
    layers, x = self.layers(), jnp.ones((2, 3))
    scanned = earlier.scan(scan_output=False)(lambda x, layer: layer(x))
    np.testing.assert_allclose(
      scanned(x, layers), self.expected(layers, x), rtol=1e-6
    )

  def test_carry_elsewhere_and_outputs(self):
    layers, x = self.layers(), jnp.ones((2, 3))

    def step(layer, x, t):
      return layer(x), t * x.sum()

    scanned = earlier.scan(step, carry_argnum=1, length=4)
    y, sums = scanned(layers, x, jnp.arange(4.0))
    np.testing.assert_allclose(y, self.expected(layers, x), rtol=1e-6)
    self.assertEqual((sums.shape, sums[0]), ((4,), 0))


class GradTest(parameterized.TestCase):
  def loss(self, model, x):
    return model.a[...] * model.b[...] * x

  def model(self):
    return nnx.Dict(a=nnx.Param(2.0), b=nnx.BatchStat(3.0))

  @parameterized.parameters((nnx.Param, {"a": 15}), (nnx.BatchStat, {"b": 10}))
  def test_by_a_filter(self, wrt, expected):
    grads = earlier.grad(self.loss, wrt=wrt)(self.model(), 5.0)
    self.assertEqual(nnx.to_pure_dict(grads), expected)

  def test_arrays_beside(self):
    value, (grads, x) = earlier.value_and_grad(self.loss, (0, 1))(
      self.model(), 5.0
    )
    self.assertEqual((value, x, nnx.to_pure_dict(grads)), (30, 6, {"a": 15}))


if __name__ == "__main__":
  absltest.main()
