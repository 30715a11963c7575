"""LoRA, against flax.nnx."""

from flax import nnx as flax_nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import Own, array

HALF = jnp.bfloat16


def in_float32(args, /, *, dtype=None, inexact=True):
  del dtype, inexact
  return tuple(x if x is None else jnp.asarray(x, jnp.float32) for x in args)


OPTIONS = {
  "plain": {},
  "base": {"base_module": Own(lambda lib: lib.Linear(4, 3, rngs=lib.Rngs(5)))},
  "dtype": {"dtype": HALF},
  "param_dtype": {"param_dtype": HALF},
  "promote_dtype": {"dtype": HALF, "promote_dtype": in_float32},
  "initializers": {
    "a_initializer": jax.nn.initializers.normal(),
    "b_initializer": jax.nn.initializers.normal(),
  },
  "type": {"lora_param_type": Own(lambda library: library.Param)},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_lora(options):
  pair = comparison.pair("LoRA", 4, 2, 3, **options)
  rtol = 2e-2 if HALF in options.values() else 2e-5
  comparison.assert_same(*pair, array(5, 4), rtol=rtol)


@pytest.mark.parametrize(
  "options",
  [
    {},
    {"use_bias": False, "dtype": HALF},
    {"lora_dtype": HALF},
    {"lora_param_dtype": HALF},
    {"lora_dtype": HALF, "lora_promote_dtype": in_float32},
    {"a_initializer": jax.nn.initializers.ones},
    {"b_initializer": jax.nn.initializers.ones},
    {"lora_param_type": Own(lambda library: library.Param)},
  ],
)
def test_lora_linear(options):
  pair = comparison.pair("LoRALinear", 4, 3, lora_rank=2, **options)
  rtol = 2e-2 if HALF in options.values() else 2e-5
  comparison.assert_same(*pair, array(5, 4), rtol=rtol)


def test_filters_tell_its_parameters_from_others():
  layer = nnx.LoRALinear(
    4,
    3,
    lora_rank=2,
    a_metadata={"tag": 1},
    b_metadata={"tag": 2},
    rngs=nnx.Rngs(0),
  )
  assert list(nnx.state(layer, nnx.LoRAParam)) == ["lora"]
  assert (layer.lora.lora_a.tag, layer.lora.lora_b.tag) == (1, 2)
  assert issubclass(nnx.LoRAParam, nnx.Param)


def test_one_initializer_for_both_matrices_as_in_flax_0_10():
  init = jax.nn.initializers.lecun_normal()
  lora = nnx.LoRA(4, 2, 3, kernel_init=init, rngs=nnx.Rngs(7))
  linear = nnx.LoRALinear(
    4,
    3,
    lora_rank=2,
    kernel_init=jax.nn.initializers.ones,
    lora_kernel_init=init,
    rngs=nnx.Rngs(7),
  )
  assert (linear.kernel.value == 1).all()
  for layer, keys_before in ((lora, 0), (linear.lora, 2)):
    keys = flax_nnx.Rngs(7)
    for _ in range(keys_before):
      keys.params()
    a, b = init(keys.params(), (4, 2)), init(keys.params(), (2, 3))
    np.testing.assert_array_equal(layer.lora_a.value, a)
    np.testing.assert_array_equal(layer.lora_b.value, b)


def test_keywords_go_to_the_base():
  class Base(nnx.Module):
    def __call__(self, x, factor=1.0):
      return factor * x

  layer = nnx.LoRA(3, 2, 3, base_module=Base(), rngs=nnx.Rngs(0))
  x = array(2, 3)
  assert (layer(x, factor=2.0) == 2 * x).all()


def test_a_base_that_cannot_be_called_is_refused():
  layer = nnx.LoRA(3, 2, 3, base_module=nnx.Module(), rngs=nnx.Rngs(0))
  with pytest.raises(
    ValueError, match="must be callable, but it is a `Module`"
  ):
    layer(array(2, 3))
  theirs = flax_nnx.LoRA(
    3, 2, 3, base_module=flax_nnx.Module(), rngs=flax_nnx.Rngs(0)
  )
  with pytest.raises(ValueError):
    theirs(array(2, 3))
