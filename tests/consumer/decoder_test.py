import decoder
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bridge
import nnx


def test_append_writes_in_order():
  keys = decoder.Keys(length=4, heads=2, head_dim=8)
  for value in (1.0, 2.0):
    keys.append(jnp.full((1, 1, 2, 8), value))
  np.testing.assert_array_equal(keys.k[0, :, 0, 0], [2, 4, 0, 0])
  np.testing.assert_array_equal(keys.v[0, :, 1, 7], [1, 2, 0, 0])


def test_split_and_merge_keep_the_cache():
  keys = decoder.Keys(length=4, heads=2, head_dim=8)
  keys.append(jnp.ones((1, 1, 2, 8)))
  graphdef, state = nnx.split(keys)
  np.testing.assert_array_equal(nnx.merge(graphdef, state).k[...], keys.k[...])


def test_jit_updates_the_module():
  keys = decoder.Keys(length=4, heads=2, head_dim=8)

  @nnx.jit
  def step(keys, row):
    keys.append(row)

  step(keys, jnp.ones((1, 1, 2, 8)))
  step(keys, jnp.ones((1, 1, 2, 8)))
  assert keys.index[...] == 2
  np.testing.assert_array_equal(keys.k[0, :, 0, 0], [2, 2, 0, 0])


def test_linen_variables_become_ours():
  variables = nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 2)))
  attributes = bridge.linen_vars_to_nnx_attrs(variables)
  assert isinstance(attributes["kernel"], nnx.Param)
  assert attributes["kernel"].shape == (2, 3)
