import jax
import jax.numpy as jnp
import numpy as np

from kernels import batch_stat


def test_running_averages():
  x = jnp.arange(12.0).reshape(6, 2)
  got = jax.jit(batch_stat.update, static_argnums=3)(
    x, jnp.zeros(2), jnp.ones(2), 0.9
  )
  np.testing.assert_allclose(got.mean, 0.1 * x.mean(0), rtol=1e-6)
  np.testing.assert_allclose(got.var, 0.9 + 0.1 * x.var(0), rtol=1e-6)
