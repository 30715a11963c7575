"""Embed, against flax.nnx."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import array

HALF = jnp.bfloat16


def in_float32(args, /, *, dtype=None, inexact=True):
  del dtype, inexact
  return tuple(x if x is None else jnp.asarray(x, jnp.float32) for x in args)


OPTIONS = {
  "plain": {},
  "dtype": {"dtype": HALF},
  "param_dtype": {"param_dtype": HALF},
  "promote_dtype": {"dtype": HALF, "promote_dtype": in_float32},
  "embedding_init": {"embedding_init": jax.nn.initializers.ones},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("count", [1, 5])
def test_embed(options, count):
  pair = comparison.pair("Embed", count, 3, **options)
  indices = jnp.array([[0, 1, 2], [-1, -2, 4]])
  comparison.assert_same(*pair, indices, rtol=1e-2)
  if not options:
    comparison.assert_same(*pair, indices.astype(jnp.uint8) % 5, rtol=1e-2)
  comparison.assert_same(
    *pair, array(2, 3), rtol=2e-2, call=lambda layer, x: layer.attend(x)
  )


def test_indices_outside_give_nan():
  layer = nnx.Embed(5, 3, rngs=nnx.Rngs(0))
  assert np.isnan(layer(jnp.array([5]))).all()


def test_other_indices_are_refused():
  layer = nnx.Embed(5, 3, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="must be integers, but got `float32`"):
    layer(jnp.ones(2))


def test_metadata_reaches_the_table():
  layer = nnx.Embed(5, 3, embedding_metadata={"tag": 1}, rngs=nnx.Rngs(0))
  assert layer.embedding.tag == 1
