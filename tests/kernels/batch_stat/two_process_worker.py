"""What each of the two processes of two_process_test does."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from kernels import batch_stat
from kernels.batch_stat import ffi
from tests.testing import devices, hlo, oracles, two_processes

SHAPE = (8, 5, 5, 16)


def work() -> None:
  """Trains one layer on a batch of which this process has a half."""
  mesh = devices.auto_mesh((4,), ("batch",))
  split = NamedSharding(mesh, P("batch"))
  rng = np.random.default_rng(0)  # the same in both processes
  x = rng.normal(size=SHAPE).astype(np.float32) + 3
  dy = rng.normal(size=SHAPE).astype(np.float32)
  scale = rng.normal(size=16).astype(np.float32)

  @jax.jit
  def step(x, dy):
    def loss(x):
      out = batch_stat.batch_norm(
        x,
        scale,
        None,
        jnp.zeros(16),
        jnp.ones(16),
        0.5,
        implementation="cpu",
      )
      return jnp.sum(out.y * dy), (out.mean, out.batch_var)

    return jax.grad(loss, has_aux=True)(x)

  parts = [
    jax.make_array_from_callback(SHAPE, split, lambda i, a=a: a[i])
    for a in (x, dy)
  ]
  text = step.lower(*parts).compile().as_text()
  assert hlo.custom_calls(text, ffi.TARGET_GRAD_INPUT) == 1
  assert not hlo.instructions(text, "all-gather")
  dx, (mean, var) = step(*parts)
  want = oracles.batch_norm(x)
  np.testing.assert_allclose(mean, want.mean / 2, rtol=1e-5)
  np.testing.assert_allclose(var, want.var, rtol=1e-5)
  want_dx = oracles.batch_norm_grad(x, dy, scale).dx
  for shard in dx.addressable_shards:
    np.testing.assert_allclose(
      shard.data, want_dx[shard.index], rtol=1e-4, atol=1e-5
    )


if __name__ == "__main__":
  two_processes.join(work)
