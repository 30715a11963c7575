"""Modules of transformed methods, against the same computed layer by layer."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
import numpy as np

import nnx


class Block(nnx.Module):
  def __init__(self, size, *, rngs, rate=0.0):
    self.linear = nnx.Linear(size, size, rngs=rngs)
    self.dropout = nnx.Dropout(rate, deterministic=False, rngs=rngs)
    self.calls = nnx.Variable(jnp.array(0))

  def __call__(self, x, *, scale=1.0):
    self.calls.value += 1
    return self.dropout(jnp.tanh(self.linear(x))) * scale

  def with_output(self, x, y):
    return self(x) + y, x

  def double(self, x):
    return 2 * self(x)


def layers_of(module):
  """The layers by themselves: kernel and bias of each."""
  return zip(module.linear.kernel.value, module.linear.bias.value)


def one(x, kernel, bias):
  return np.tanh(np.asarray(x) @ np.asarray(kernel) + np.asarray(bias))


class JitAndRematTest(absltest.TestCase):
  def test_jit_compiles_each_method_once(self):
    traces = []

    class Counted(Block):
      def __call__(self, x, **kwargs):
        traces.append(1)
        return super().__call__(x, **kwargs)

    module = nnx.Jit.constructor(Counted)(3, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 3))
    y = module(x)
    np.testing.assert_allclose(module(x), y)
    self.assertLen(traces, 1)
    np.testing.assert_allclose(module.call.double(x), 2 * y, rtol=1e-6)
    module.call.double(x)
    self.assertLen(traces, 2)
    self.assertEqual(module.jit_module.calls.value, 4)

  def test_jit_takes_its_options(self):
    module = nnx.Jit.constructor(
      lambda *, rngs: Block(3, rngs=rngs), static_argnames="scale"
    )(rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module(jnp.ones((1, 3)), scale=0), 0)

  def test_call_reaches_what_is_below(self):
    traces = []

    class Counted(Block):
      def __call__(self, x, **kwargs):
        traces.append(1)
        return super().__call__(x, **kwargs)

    class Outer(nnx.Module):
      def __init__(self):
        self.blocks = nnx.List([Counted(3, rngs=nnx.Rngs(0))])

    module = nnx.Jit.constructor(Outer)()
    module.call.blocks[0](jnp.ones((1, 3)))
    y = module.call.blocks[0](jnp.ones((1, 3)))
    self.assertLen(traces, 1)
    np.testing.assert_allclose(
      y, module.jit_module.blocks[0](jnp.ones((1, 3))), rtol=1e-6
    )

  def test_remat_has_the_gradients(self):
    block = Block(3, rngs=nnx.Rngs(0))
    module = nnx.Remat(module_constructor=lambda: block)
    x = jnp.ones((2, 3))

    def loss(module):
      return module(x).sum()

    expected = nnx.grad(loss)(block)
    grads = nnx.grad(loss)(module)["remat_module"]
    jax.tree.map(np.testing.assert_allclose, grads, expected)
    text = str(nnx.make_jaxpr(nnx.grad(loss))(module))
    self.assertRegex(text, "remat|checkpoint")

  def test_graph_functions(self):
    module = nnx.Jit.constructor(Block)(3, rngs=nnx.Rngs(0))
    merged = nnx.merge(*nnx.split(module))
    x = jnp.ones((1, 3))
    np.testing.assert_allclose(merged(x), module(x))


class VmapTest(parameterized.TestCase):
  def test_elements(self):
    size = 4
    constructor = nnx.Vmap.constructor(
      Block, state_axes={nnx.Param: 0}, axis_size=size, in_axes_kwargs=None
    )
    rngs = nnx.Rngs(0)
    lifted = constructor(3, rngs=rngs)
    module = lifted.vmap_module
    self.assertEqual(module.linear.kernel.shape, (size, 3, 3))
    self.assertEqual(module.calls.shape, ())
    self.assertEqual(rngs.default.key.shape, ())
    self.assertLen({float(k[0, 0]) for k in module.linear.kernel.value}, size)
    x = jax.random.normal(jax.random.key(0), (size, 2, 3))
    expected = [one(x[i], *layer) for i, layer in enumerate(layers_of(module))]
    y = lifted(x, scale=2.0)
    np.testing.assert_allclose(y, 2 * np.stack(expected), rtol=1e-6)
    self.assertEqual(module.calls.value, 1)

  def test_axes(self):
    lifted = nnx.Vmap(
      Block,
      module_init_args=(3,),
      module_init_kwargs={"rngs": nnx.Rngs(0)},
      in_axes=(None, 1),
      out_axes=2,
      axis_size=4,
      state_axes={nnx.Param: 1},
    )
    module = lifted.vmap_module
    self.assertEqual(module.linear.kernel.shape, (3, 4, 3))
    x = jax.random.normal(jax.random.key(0), (2, 4, 3))
    y = lifted(x)
    self.assertEqual(y.shape, (2, 3, 4))
    kernel = module.linear.kernel.value[:, 1]
    expected = one(x[:, 1], kernel, module.linear.bias.value[:, 1])
    np.testing.assert_allclose(y[..., 1], expected, rtol=1e-6)

  def test_streams(self):
    x = jnp.ones((3, 1, 64))

    def make(split_rngs):
      lifted = nnx.Vmap.constructor(
        Block,
        state_axes={nnx.Param: None},
        split_rngs=split_rngs,
        axis_size=3,
      )(64, rngs=nnx.Rngs(params=0, dropout=1), rate=0.5)
      return lifted, lifted(x)

    lifted, y = make("dropout")
    self.assertFalse(np.array_equal(y[0], y[1]))
    self.assertFalse(np.array_equal(y, lifted(x)))
    lifted, y = make(False)
    np.testing.assert_array_equal(y[0], y[1])
    self.assertFalse(np.array_equal(y, lifted(x)))

  def test_arguments_must_have_axes(self):
    lifted = nnx.Vmap(
      Block,
      module_init_args=(3,),
      module_init_kwargs={"rngs": nnx.Rngs(0)},
      in_axes=(0, 0),
      axis_size=2,
    )
    with self.assertRaisesRegex(
      ValueError, "has 2 for the Module and 2 arguments"
    ):
      lifted(jnp.ones((2, 3)), jnp.ones((2, 3)))

  def test_size_must_be_known(self):
    with self.assertRaisesRegex(
      ValueError, "The size of the mapped axis must be known, .* `length`."
    ):
      nnx.Vmap.constructor(Block)(3, rngs=nnx.Rngs(0))


class ScanTest(absltest.TestCase):
  def make(self, constructor=Block, **options):
    options = {"state_axes": {nnx.Param: 0}, "length": 4, **options}
    return nnx.Scan.constructor(constructor, **options)(3, rngs=nnx.Rngs(0))

  def test_layers_one_after_another(self):
    lifted = self.make(scan_output=False)
    module = lifted.scan_module
    self.assertEqual(module.linear.kernel.shape, (4, 3, 3))
    expected = x = jax.random.normal(jax.random.key(0), (2, 3))
    for layer in layers_of(module):
      expected = one(expected, *layer)
    np.testing.assert_allclose(lifted(x), expected, rtol=1e-5)
    self.assertEqual(module.calls.value, 4)
    np.testing.assert_allclose(lifted(x), expected, rtol=1e-5)
    self.assertEqual(module.calls.value, 8)

  def test_outputs_of_a_method(self):
    lifted = self.make()
    x = jax.random.normal(jax.random.key(0), (2, 3))
    ys = jax.random.normal(jax.random.key(1), (4, 2, 3))
    carry, outputs = lifted.call.with_output(x, ys)
    for i, layer in enumerate(layers_of(lifted.scan_module)):
      np.testing.assert_allclose(outputs[i], x, rtol=1e-5)
      x = one(x, *layer) + ys[i]
    np.testing.assert_allclose(carry, x, rtol=1e-5)

  def test_of_remat(self):
    lifted = self.make(nnx.Remat.constructor(Block), scan_output=False)
    module = lifted.scan_module.remat_module
    x = jnp.ones((1, 3))
    expected = x
    for layer in layers_of(module):
      expected = one(expected, *layer)
    np.testing.assert_allclose(lifted(x), expected, rtol=1e-5)
    expected = x
    for layer in layers_of(module):
      expected = 2 * one(expected, *layer)
    np.testing.assert_allclose(lifted.call.double(x), expected, rtol=1e-5)
    grads = nnx.grad(lambda m: m(x).sum())(lifted)
    self.assertEqual(
      grads["scan_module"]["remat_module"]["linear"]["kernel"].shape, (4, 3, 3)
    )

  def test_streams_of_a_call(self):
    class Noise(nnx.Module):
      def __init__(self, size, *, rngs):
        del size, rngs

      def __call__(self, x, *, rngs):
        return x, rngs.noise()

    lifted = self.make(Noise)
    rngs = nnx.Rngs(noise=1)
    _, keys = lifted(jnp.ones(3), rngs=rngs)
    self.assertLen(set(map(str, jax.random.key_data(keys))), 4)
    self.assertEqual(rngs.noise.key.shape, ())
    self.assertEqual(rngs.noise.count.value, 1)

  def test_carry_is_needed(self):
    with self.assertRaisesRegex(
      TypeError, "The carry must be argument 1, .* got 0 positional arguments"
    ):
      self.make()()


if __name__ == "__main__":
  absltest.main()
