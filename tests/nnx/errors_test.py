"""Errors about traces name the attribute path, the line, and the way out."""

import gc
import inspect

from absl.testing import absltest, parameterized
import jax

import nnx


class Layer(nnx.Module):
  def __init__(self):
    self.kernel = nnx.Param(1)


class Model(nnx.Module):
  def __init__(self):
    self.layers = [Layer(), {"a": (Layer(), nnx.List([nnx.Param(2)]))}]


def line_of(function, text):
  lines, start = inspect.getsourcelines(function)
  [offset] = [i for i, line in enumerate(lines) if text in line]
  return start + offset


class PathTest(parameterized.TestCase):
  @parameterized.parameters(
    (lambda m: m.layers[0].kernel, ".layers[0].kernel"),
    (lambda m: m.layers[1]["a"][0].kernel, ".layers[1]['a'][0].kernel"),
    (lambda m: m.layers[1]["a"][1][0], ".layers[1]['a'][1][0]"),
    (lambda m: m.layers[0], ".layers[0]"),
  )
  def test_path(self, get, expected):
    model = Model()
    root, path = nnx.errors.attribute_path(get(model))
    self.assertIs(root, model)
    self.assertEqual(path, expected)

  def test_no_owner(self):
    self.assertIsNone(nnx.errors.attribute_path(nnx.Param(1)))
    self.assertIsNone(nnx.errors.attribute_path(Model()))

  def test_cycle(self):
    model = Model()
    model.me = model
    param = model.layers[0].kernel
    root, path = nnx.errors.attribute_path(param)
    self.assertIs(root, model)
    self.assertEqual(path, ".layers[0].kernel")
    del model.me, model
    gc.collect()

  def test_many_referrers(self):
    model = Model()
    others = [[model.layers[0].kernel] for _ in range(2000)]
    root, path = nnx.errors.attribute_path(model.layers[0].kernel)
    self.assertIs(root, model)
    self.assertEqual(path, ".layers[0].kernel")
    self.assertLen(others, 2000)


class MessageTest(parameterized.TestCase):
  def test_message(self):
    model = Model()

    @jax.jit
    def f():
      model.layers[0].kernel.value = 2

    with self.assertRaises(nnx.TraceContextError) as caught:
      f()
    text = str(caught.exception)
    line = line_of(Layer, "self.kernel =")
    self.assertIn("Cannot change `Param` from a different trace level.", text)
    self.assertIn("It is `layers[0].kernel` of a `Model`.", text)
    self.assertIn(f'It was made at "{__file__}", line {line}.', text)
    self.assertIn(
      "Pass the model as an argument of the jitted function (`nnx.jit`,"
      " `nnx.grad`, ...) instead of closing over it.",
      text,
    )

  @parameterized.parameters(
    lambda p: p.set_value(2),
    lambda p: p.set_metadata(a=1),
    lambda p: p.__setitem__(..., 2),
    lambda p: setattr(p, "raw_value", 2),
    lambda p: setattr(p, "a", 2),
    lambda p: delattr(p, "axis"),
    lambda p: p.copy_from(nnx.Param(3)),
    lambda p: p.update_from_state(nnx.Param(3)),
  )
  def test_every_way_of_writing(self, write):
    param = nnx.Param(1, axis=0)
    with self.assertRaises(nnx.TraceContextError):
      jax.jit(lambda: write(param))()
    self.assertEqual(param.value, 1)
    self.assertEqual(param.get_metadata(exclude_required=True), {"axis": 0})

  @parameterized.parameters(jax.grad, jax.vmap, jax.checkpoint)
  def test_other_transforms(self, transform):
    param = nnx.Param(1.0)

    def f(x):
      param.value = x
      return x

    with self.assertRaises(nnx.TraceContextError):
      x = jax.numpy.ones(1) if transform is jax.vmap else 1.0
      transform(f)(x)

  def test_reading_is_allowed(self):
    param = nnx.Param(2.0)
    self.assertEqual(jax.jit(lambda x: x * param)(3.0), 6.0)


if __name__ == "__main__":
  absltest.main()
