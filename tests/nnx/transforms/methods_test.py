"""Modules, and methods bound to Modules, as the functions of transforms."""

import functools

from absl.testing import absltest, parameterized
from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

import nnx

X = jnp.arange(12.0).reshape(4, 3) / 10


def make(lib):
  class Model(lib.Module):
    def __init__(self):
      self.w = lib.Param(jnp.array([1.0, -2.0, 3.0]))
      self.calls = lib.Variable(jnp.array(0))

    def __call__(self, x):
      self.calls[...] += 1
      return jnp.sin(x * self.w[...])

    def loss(self, x):
      return self(x).sum()

  return Model()


def run(transform, f):
  """Applies a transform to a function of an array of three numbers."""
  mesh = jax.sharding.Mesh(jax.devices()[:1], ("data",))
  whole = PartitionSpec()
  runs = {
    "jit": lambda: nnx.jit(f)(X[0]),
    "remat": lambda: nnx.remat(f)(X[0]),
    "vmap": lambda: nnx.vmap(f)(X),
    "pmap": lambda: nnx.pmap(f)(X[:1]),
    "scan": lambda: nnx.scan(f, in_axes=0, out_axes=0)(X),
    "checkify": lambda: nnx.checkify(f)(X[0])[1],
    "cond": lambda: nnx.cond(True, f, jnp.sin, X[0]),
    "switch": lambda: nnx.switch(1, [jnp.sin, f], X[0]),
    "vjp": lambda: nnx.vjp(f, X[0])[0],
    "jvp": lambda: nnx.jvp(f, (X[0],), (X[0],))[0],
    "shard_map": lambda: nnx.shard_map(
      f, mesh=mesh, in_specs=whole, out_specs=whole
    )(X[0]),
  }
  return runs[transform]()


class MethodTest(parameterized.TestCase):
  @parameterized.product(
    transform=(
      "jit",
      "remat",
      "vmap",
      "pmap",
      "scan",
      "checkify",
      "cond",
      "switch",
      "vjp",
      "jvp",
      "shard_map",
    ),
    form=("module", "method", "partial"),
  )
  def test_state_is_an_argument(self, transform, form):
    model = make(nnx)
    f = {
      "module": model,
      "method": model.__call__,
      "partial": functools.partial(model),
    }[form]
    y = np.asarray(run(transform, f))
    x = {"vmap": X, "pmap": X[:1], "scan": X}.get(transform, X[0])
    np.testing.assert_allclose(y, make(flax_nnx)(x), rtol=1e-6)
    self.assertEqual(
      int(model.calls[...]), len(X) if transform == "scan" else 1
    )

  def test_later_values_are_seen(self):
    model = make(nnx)
    jitted = nnx.jit(model)
    jitted(X[0])
    model.w[...] = jnp.zeros(3)
    np.testing.assert_array_equal(jitted(X[0]), jnp.zeros(3))

  def test_shapes_and_jaxprs(self):
    model = make(nnx)
    self.assertEqual(nnx.eval_shape(model, X[0]).shape, (3,))
    self.assertLen(nnx.make_jaxpr(model)(X[0]).in_avals, 3)
    self.assertEqual(int(model.calls[...]), 0)

  def test_gradients_are_of_the_arguments(self):
    model, other = make(nnx), make(flax_nnx)
    expected = flax_nnx.grad(lambda x, model: model.loss(x))(X[0], other)
    np.testing.assert_allclose(nnx.grad(model.loss)(X[0]), expected, rtol=1e-6)
    value, gradient = nnx.value_and_grad(model.loss)(X[0])
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    np.testing.assert_allclose(value, other.loss(X[0]), rtol=1e-6)
    (pulled,) = nnx.vjp(model.loss, X[0])[1](jnp.array(1.0))
    np.testing.assert_allclose(pulled, expected, rtol=1e-6)
    self.assertEqual(int(model.calls[...]), 3)

  def test_loops(self):
    model = make(nnx)
    nnx.while_loop(lambda x: x.sum() > 100.0, model, X[0] + 100)
    self.assertEqual(int(model.calls[...]), 1)

  def test_errors(self):
    model = make(nnx)
    with self.assertRaisesRegex(
      TypeError, "must not be given `self`, as it is bound to a `Model` already"
    ):
      nnx.remat(model)(X[0], self=model)
    with self.assertRaisesRegex(
      ValueError,
      "`nnx.custom_vjp` must be given a function that takes its Module as an"
      " argument, as its rule must, but got `.*Model.loss`, which is bound to"
      " one",
    ):
      nnx.custom_vjp(model.loss)
    with self.assertRaisesRegex(TypeError, "must be given a function, but got"):
      nnx.remat(nnx.Dict())


if __name__ == "__main__":
  absltest.main()
