"""nnx.shard_map with PartitionSpec and StateSharding."""

from absl.testing import absltest, parameterized
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
import numpy as np

import nnx
from tests.nnx.transforms import both

X = jnp.arange(24.0).reshape(8, 3)


def make_mesh(*names):
  shape = (4, 2) if len(names) == 2 else (8,)
  return Mesh(np.array(jax.devices()[:8]).reshape(shape), names)


def make_mlp(lib):
  class MLP(lib.Module):
    def __init__(self):
      self.up = lib.Param(jnp.arange(48.0).reshape(3, 16) / 48)
      self.down = lib.Param(jnp.arange(32.0).reshape(16, 2) / 32)
      self.total = lib.Variable(jnp.zeros(()))

    def __call__(self, x):
      return jax.nn.relu(x @ self.up[...]) @ self.down[...]

  return MLP()


class SameAsFlaxTest(parameterized.TestCase):
  def test_data_parallel(self):
    def program(lib):
      model = make_mlp(lib)

      @lib.shard_map(
        mesh=make_mesh("data"), in_specs=(P(), P("data")), out_specs=P("data")
      )
      def f(model, x):
        y = model(x)
        model.total[...] = jax.lax.psum(y.sum(), "data")
        return y

      return f(model, X), model

    both.same(program)

  @parameterized.parameters(True, False)
  def test_tensor_parallel_by_state_sharding(self, by_state):
    def program(lib):
      model = make_mlp(lib)
      if by_state:
        specs = lib.State(
          {"up": P(None, "model"), "down": P("model", None), "total": P()}
        )
        specs = lib.StateSharding(specs)
      else:
        specs = lib.StateSharding(
          {
            lib.PathContains("up"): P(None, "model"),
            lib.PathContains("down"): P("model"),
            ...: P(),
          }
        )

      @lib.shard_map(
        mesh=make_mesh("model"), in_specs=(specs, P()), out_specs=P()
      )
      def f(model, x):
        y = jax.lax.psum(model(x), "model")
        model.down[...] = model.down[...] * 2
        return y

      return f(model, X), model

    both.same(program)


class SeenOutsideTest(parameterized.TestCase):
  def test_written_state_keeps_its_spec_and_new_state_gets_one(self):
    model = make_mlp(nnx)
    specs = nnx.StateSharding(
      {
        nnx.Intermediate: P("data"),
        nnx.PathContains("up"): P("data"),
        ...: None,
      }
    )
    model.up.value = jnp.ones((8, 3))
    mesh = make_mesh("data")

    @nnx.jit
    @nnx.shard_map(mesh=mesh, in_specs=(specs, P("data")), out_specs=None)
    def f(model, x):
      model.up[...] = model.up * x
      model.seen = nnx.Intermediate(x)

    f(model, X)
    np.testing.assert_array_equal(model.up.value, X)
    np.testing.assert_array_equal(model.seen.value, X)
    self.assertEqual(model.up.value.sharding.spec, P("data"))

  def test_options(self):
    mesh = make_mesh("a", "b")
    v = nnx.Param(X)

    @nnx.shard_map(
      mesh=mesh,
      in_specs=P("a"),
      out_specs=P("a"),
      axis_names={"a"},
      check_vma=False,
    )
    def f(v, *, scale=2.0):
      return v * scale

    np.testing.assert_array_equal(jax.jit(lambda: f(v))(), 2 * X)

  def test_gradient(self):
    model = make_mlp(nnx)
    mesh = make_mesh("data")

    def loss(model, x):
      @nnx.shard_map(mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
      def f(model, x):
        return jax.lax.psum((model(x) ** 2).sum(), "data")

      return f(model, x)

    grads = nnx.jit(nnx.grad(loss))(model, X)
    expected = nnx.grad(lambda m, x: (m(x) ** 2).sum())(model, X)
    np.testing.assert_allclose(grads.up.value, expected.up.value, rtol=1e-5)


class ErrorTest(parameterized.TestCase):
  def test_errors(self):
    mesh = make_mesh("data")
    with self.assertRaisesRegex(
      TypeError, "`in_specs` must hold `PartitionSpec`s, `None`, `nnx.State"
    ):
      nnx.shard_map(jnp.sin, mesh=mesh, in_specs=(0,), out_specs=P())
    f = nnx.shard_map(
      lambda a, b: a, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
    )
    model = make_mlp(nnx)
    with self.assertRaisesRegex(
      ValueError,
      r"`in_specs` must give a shared node one entry, but the Param at"
      r" `args\[0\].down` and `args\[1\].down` has both P",
    ):
      f(model, model)
    with self.assertRaisesRegex(ValueError, "must have one entry for each"):
      f(model)


if __name__ == "__main__":
  absltest.main()
