"""Initializers: compiled where that changes no bit, and only there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.nn import initializers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(2, 3), (64, 128), (3, 3, 16, 32), (1, 1)])
@pytest.mark.parametrize(
  "init",
  [
    initializers.default_kernel_init,
    initializers.default_lora_init,
    initializers.zeros,
    initializers.ones,
  ],
)
def test_compiled_initializers_give_the_same_bits(init, shape, dtype):
  key = jax.random.key(len(shape))
  got = initializers.initialize(init, key, shape, dtype)
  want = init(key, shape, dtype)
  assert got.dtype == want.dtype
  assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


@pytest.mark.parametrize("shape", [(2, 3), (64, 64), (40, 7)])
def test_the_orthogonal_initializer_gives_the_same_bits(shape):
  init, key = initializers.default_recurrent_init, jax.random.key(0)
  got = initializers.initialize(init, key, shape, jnp.float32)
  want = init(key, shape, jnp.float32)
  assert np.asarray(got).tobytes() == np.asarray(want).tobytes()


def test_other_initializers_run_as_they_are():
  calls = []

  def init(*args):
    calls.append(args)
    return 5

  assert initializers.initialize(init, 1, [2], 3) == 5
  assert calls == [(1, [2], 3)]


def test_metadata_comes_through():
  init = nnx.with_partitioning(initializers.default_kernel_init, ("a", "b"))
  layer = nnx.Linear(2, 3, kernel_init=init, rngs=nnx.Rngs(0))
  assert layer.kernel.out_sharding == ("a", "b")
