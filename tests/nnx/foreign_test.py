"""Objects of flax.nnx where ours must be: refused, with the path to them."""

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bridge
import nnx

_WAYS_OUT = (
  r".*Make it with `nnx`, which has the same names, or convert it:"
  r" `nnx.bridge.from_flax_nnx\(...\)`\. `import nnx.as_flax`, first in a"
  r" program, puts `nnx` in the place of `flax.nnx`\."
)


def theirs():
  return flax_nnx.Linear(2, 3, rngs=flax_nnx.Rngs(0))


class OfTheirs(flax_nnx.Module):
  def __init__(self):
    self.w = flax_nnx.Param(jnp.ones(2))

  def __call__(self, x):
    return x * self.w


OBJECTS = {
  "module": theirs,
  "subclass": OfTheirs,
  "variable": lambda: flax_nnx.Param(jnp.ones(2)),
  "state": lambda: flax_nnx.state(theirs()),
  "rngs": lambda: flax_nnx.Rngs(0),
  "graphdef": lambda: flax_nnx.graphdef(theirs()),
  "list": lambda: flax_nnx.List([flax_nnx.Param(1)]),
  "optimizer": lambda: flax_nnx.Optimizer(
    theirs(), optax.sgd(0.1), wrt=flax_nnx.Param
  ),
  "metric": flax_nnx.metrics.Average,
}


class Model(nnx.Module):
  def __init__(self, layer):
    self.w = nnx.Param(jnp.ones(2))
    self.layers = [layer]


class ForeignTest(parameterized.TestCase):
  def check(self, function, *args, path=r".*layers\[0\]"):
    with self.assertRaisesRegex(
      TypeError,
      r"Objects of `flax.nnx` are no part of a graph of `nnx`, but got its"
      rf" `\w+`( at `{path}`)?\.{_WAYS_OUT}",
    ) as raised:
      function(*args)
    return str(raised.exception)

  @parameterized.parameters(*OBJECTS)
  def test_attribute(self, name):
    model = Model(OBJECTS[name]())
    for function in (
      nnx.state,
      nnx.split,
      nnx.graphdef,
      nnx.clone,
      lambda m: nnx.pop(m, nnx.Param),
      lambda m: list(nnx.iter_graph(m)),
      lambda m: list(nnx.iter_modules(m)),
      lambda m: nnx.Optimizer(m, optax.sgd(0.1), wrt=nnx.Param),
      nnx.jit(lambda m: None),
      nnx.remat(lambda m: None),
      nnx.grad(lambda m: m.w.sum()),
      nnx.vmap(lambda m: None, in_axes=0, axis_size=2),
      nnx.scan(lambda m: m, in_axes=nnx.Carry, out_axes=nnx.Carry, length=2),
      lambda m: nnx.cond(True, lambda m: None, lambda m: None, m),
      lambda m: nnx.eval_shape(lambda m: None, m),
    ):
      self.check(function, model)
    self.assertIn("layers[0]`", self.check(nnx.state, model))
    self.assertIn("layers[0]`", self.check(nnx.jit(lambda m: None), model))

  @parameterized.parameters(*OBJECTS)
  def test_argument(self, name):
    value = OBJECTS[name]()
    for function in (
      nnx.state,
      nnx.split,
      nnx.clone,
      nnx.jit(lambda m: None),
      nnx.grad(lambda m: 1.0),
      nnx.vmap(lambda m: None, axis_size=2),
      lambda m: nnx.Optimizer(m, optax.sgd(0.1), wrt=nnx.Param),
      lambda m: nnx.jit(lambda x, m: None)(1.0, {"a": (m,)}),
    ):
      self.check(function, value, path=".*")

  @parameterized.parameters(
    lambda x: [x], lambda x: {"a": [x]}, lambda x: (1, (x,)),
    lambda x: nnx.List([x]), lambda x: nnx.data(x), nnx.Variable,
    lambda x: optax.TraceState(x),
  )  # fmt: skip
  def test_nested(self, wrap):
    model = nnx.Module()
    model.a = wrap(theirs())
    for function in (nnx.state, nnx.split, nnx.jit(lambda m: None)):
      self.check(function, model, path="a.*|.*a.*")

  def test_result_of_a_transform(self):
    self.check(nnx.jit(lambda: theirs()), path=".*")

  def test_states(self):
    model = Model(nnx.Param(1.0))
    for state in (
      flax_nnx.state(OfTheirs()), {"w": flax_nnx.Param(jnp.ones(2))},
    ):  # fmt: skip
      self.check(nnx.update, model, state, path=".*")
      only = nnx.Dict(w=nnx.Param(jnp.ones(2)))
      self.check(nnx.merge, nnx.graphdef(only), state, path=".*")
      np.testing.assert_array_equal(model.w[...], [1, 1])
    self.check(
      nnx.merge, flax_nnx.graphdef(OfTheirs()), nnx.state(model), path=".*"
    )

  def test_function(self):
    model = OfTheirs()
    for transform in (nnx.jit, nnx.grad, nnx.vmap, nnx.remat, nnx.eval_shape):
      for function in (model, model.__call__):
        with self.assertRaisesRegex(
          TypeError,
          f"`nnx.{transform.__name__}` must be given a function of objects of"
          f" `nnx`, but got a `OfTheirs` of `flax.nnx`.{_WAYS_OUT}",
        ):
          transform(function)

  def test_the_way_out(self):
    model = Model(bridge.from_flax_nnx(theirs()))
    self.assertLen(nnx.to_flat_state(nnx.state(model, nnx.Param)), 3)

  def test_plain_jax_sees_through(self):
    model = Model(theirs())
    self.assertLen(jax.tree.leaves(model), 3)

  def test_registered_types_are_leaves(self):
    @nnx.register_data_type
    class Known(flax_nnx.Module):
      pass

    model = Model(Known())
    self.assertIs(nnx.state(model)["layers"][0], model.layers[0])

  def test_other_objects_of_flax_are_static(self):
    model = nnx.Module()
    model.filter = flax_nnx.filterlib.OfType(flax_nnx.Param)
    model.kind = flax_nnx.Param
    self.assertEmpty(nnx.to_flat_state(nnx.state(model)))


if __name__ == "__main__":
  absltest.main()
