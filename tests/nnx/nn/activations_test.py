"""PReLU, against flax.nnx; the other activations are jax's own."""

import jax.numpy as jnp
import pytest

import nnx
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import array


def in_float32(args, /, *, dtype=None, inexact=True):
  del dtype, inexact
  return tuple(x if x is None else jnp.asarray(x, jnp.float32) for x in args)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"negative_slope_init": 0.3},
    {"param_dtype": jnp.bfloat16},
    {"dtype": jnp.bfloat16},
    {"dtype": jnp.bfloat16, "promote_dtype": in_float32},
  ],
)
def test_prelu(options, dtype):
  pair = comparison.pair("PReLU", rngs=None, **options)
  comparison.assert_same(*pair, array(3, 4, dtype=dtype), rtol=2e-2)


def test_metadata_reaches_the_slope():
  layer = nnx.PReLU(negative_slope_metadata={"tag": 1})
  assert layer.negative_slope.tag == 1
