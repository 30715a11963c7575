from absl.testing import absltest
import jax.numpy as jnp

import nnx


class PlainTest(absltest.TestCase):
  def test_a_variable(self):
    self.assertEqual(nnx.Param(jnp.ones(3)).shape, (3,))


if __name__ == "__main__":
  absltest.main()
