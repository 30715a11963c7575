"""What each of the two processes of two_process_test does."""

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from kernels import decode_attention as da
from kernels import kv_cache
from kernels.decode_attention import ffi
from tests.kernels.decode_attention import oracle
from tests.kernels.kv_cache import oracle as cache_oracle
from tests.testing import devices, hlo, two_processes

CACHE, NEW, QUERY = (2, 16, 2, 8), (2, 1, 2, 8), (2, 1, 4, 8)
INDEX = np.int32([7, 12])


def work() -> None:
  """Decodes over a cache of which this process has half the length."""
  mesh = devices.auto_mesh((4,), ("length",))
  split = NamedSharding(mesh, P(None, "length"))
  whole = NamedSharding(mesh, P())
  rng = np.random.default_rng(0)  # the same in both processes
  k, v, q, new_k, new_v = (
    rng.normal(size=shape).astype(np.float32)
    for shape in (CACHE, CACHE, QUERY, NEW, NEW)
  )

  def place(x, sharding):
    return jax.make_array_from_callback(x.shape, sharding, lambda i: x[i])

  def step(k, v, q, new_k, new_v, index):
    k, v, out = da.decode_attention(k, v, q, new_k, new_v, index)
    k, v = kv_cache.update(k, v, new_k, new_v, index + 1)
    return k, v, out

  args = [place(k, split), place(v, split)] + [
    place(x, whole) for x in (q, new_k, new_v, INDEX)
  ]
  compiled = jax.jit(step, donate_argnums=(0, 1))
  text = hlo.compiled(compiled.lower(*args)).as_text()
  assert hlo.custom_calls(text, ffi.APPEND_TARGET) == 1
  assert not hlo.instructions(text, "all-gather")
  got = compiled(*args)
  want = cache_oracle.update(k, v, new_k, new_v, INDEX)
  out, *_ = oracle.attend(*want, q, INDEX, [1, 1])
  want = cache_oracle.update(*want, new_k, new_v, INDEX + 1)
  for g, w in zip(got, (*want, out)):
    for shard in g.addressable_shards:
      np.testing.assert_allclose(
        shard.data, w[shard.index], rtol=1e-5, atol=1e-6
      )


if __name__ == "__main__":
  two_processes.join(work)
