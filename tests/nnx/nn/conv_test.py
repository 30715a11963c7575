"""Convolutions, against flax.nnx."""

import types

from flax import nnx as flax_nnx
import jax
from jax import lax
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


def mask_of(*shape):
  return (array(*shape) > 0).astype(jnp.float32)


CONV = {
  "one axis": ((3, 4, 3), {}, (2, 8, 3)),
  "two axes": ((3, 4, (3, 2)), {}, (2, 6, 5, 3)),
  "three axes": ((2, 3, (2, 1, 3)), {}, (1, 4, 3, 4, 2)),
  "no batch": ((3, 4, (3,)), {}, (8, 3)),
  "batch axes": ((3, 4, [3]), {}, (2, 3, 8, 3)),
  "strides": ((3, 4, (3, 3), 2), {}, (2, 6, 5, 3)),
  "each stride": ((3, 4, (3, 3), (1, 2)), {"padding": "VALID"}, (2, 6, 5, 3)),
  "no strides": ((3, 4, (3,), None), {}, (2, 8, 3)),
  "padding": ((3, 4, (3, 3)), {"padding": 2}, (2, 6, 5, 3)),
  "paddings": ((3, 4, (3, 3)), {"padding": [1, (0, 2)]}, (2, 6, 5, 3)),
  "small letters": ((3, 4, (3, 3)), {"padding": "same"}, (2, 6, 5, 3)),
  "circular": ((3, 4, (3, 2)), {"padding": "CIRCULAR"}, (2, 6, 5, 3)),
  "circular, dilated": (
    (3, 4, (2, 3), 2),
    {"padding": "CIRCULAR", "kernel_dilation": (3, 2)},
    (2, 6, 5, 3),
  ),
  "reflect": ((3, 4, (3, 4)), {"padding": "REFLECT"}, (2, 6, 5, 3)),
  "causal": ((3, 4, 3), {"padding": "CAUSAL", "kernel_dilation": 2}, (2, 8, 3)),
  "dilation": (
    (3, 4, (3, 3)),
    {"input_dilation": 2, "kernel_dilation": (1, 2), "padding": 1},
    (2, 6, 5, 3),
  ),
  "groups": ((4, 6, 3), {"feature_group_count": 2}, (2, 8, 4)),
  "no bias": ((3, 4, 3), {"use_bias": False}, (2, 8, 3)),
  "mask": ((3, 4, 3), {"mask": mask_of(3, 3, 4)}, (2, 8, 3)),
  "dtype": ((3, 4, 3), {"dtype": HALF}, (2, 8, 3)),
  "param_dtype": ((3, 4, 3), {"param_dtype": HALF}, (2, 8, 3)),
  "promote_dtype": (
    (3, 4, 3),
    {"dtype": HALF, "promote_dtype": in_float32},
    (2, 8, 3),
  ),
  "precision": (
    (3, 4, 3),
    {"precision": "highest", "preferred_element_type": jnp.float32},
    (2, 8, 3),
  ),
  "function": (
    (3, 4, 3),
    {
      "conv_general_dilated": lambda *a, **k: (
        2 * lax.conv_general_dilated(*a, **k)
      )
    },
    (2, 8, 3),
  ),
  "initializers": (
    (3, 4, 3),
    {
      "kernel_init": jax.nn.initializers.he_normal(),
      "bias_init": jax.nn.initializers.ones,
    },
    (2, 8, 3),
  ),
}


@pytest.mark.parametrize(("args", "options", "shape"), CONV.values(), ids=CONV)
def test_conv(args, options, shape):
  pair = comparison.pair("Conv", *args, **options)
  rtol = 3e-2 if HALF in list(options.values()) else 5e-5
  comparison.assert_same(*pair, array(*shape), rtol=rtol)


TRANSPOSE = {
  "one axis": ((3, 4, 3), {}, (2, 8, 3)),
  "two axes": ((3, 4, (3, 2), (2, 1)), {}, (2, 6, 5, 3)),
  "no batch": ((3, 4, (3,), 2), {}, (8, 3)),
  "batch axes": ((3, 4, [3]), {}, (2, 3, 8, 3)),
  "valid": ((3, 4, 3), {"padding": "VALID"}, (2, 8, 3)),
  "paddings": ((3, 4, (3, 3), 2), {"padding": [1, (0, 2)]}, (2, 6, 5, 3)),
  "dilation": ((3, 4, 3), {"kernel_dilation": 2}, (2, 8, 3)),
  "circular": ((3, 4, (3, 4), (2, 1)), {"padding": "CIRCULAR"}, (2, 6, 5, 3)),
  "circular, wide": ((2, 3, 7, (2,)), {"padding": "CIRCULAR"}, (2, 3, 2)),
  "circular, transposed": (
    (3, 4, (6, 5), (2, 2)),
    {"padding": "CIRCULAR", "transpose_kernel": True},
    (1, 5, 4, 3),
  ),
  "transposed": ((3, 4, 3, 2), {"transpose_kernel": True}, (2, 8, 3)),
  "no bias": ((3, 4, 3), {"use_bias": False}, (2, 8, 3)),
  "mask": ((3, 4, 3), {"mask": mask_of(3, 3, 4)}, (2, 8, 3)),
  "dtype": ((3, 4, 3), {"dtype": HALF}, (2, 8, 3)),
  "param_dtype": ((3, 4, 3), {"param_dtype": HALF}, (2, 8, 3)),
  "promote_dtype": (
    (3, 4, 3),
    {"dtype": HALF, "promote_dtype": in_float32},
    (2, 8, 3),
  ),
  "precision": (
    (3, 4, 3),
    {"precision": "highest", "preferred_element_type": jnp.float32},
    (2, 8, 3),
  ),
  "initializers": (
    (3, 4, 3),
    {
      "kernel_init": jax.nn.initializers.he_normal(),
      "bias_init": jax.nn.initializers.ones,
    },
    (2, 8, 3),
  ),
}


@pytest.mark.parametrize(
  ("args", "options", "shape"), TRANSPOSE.values(), ids=TRANSPOSE
)
def test_conv_transpose(args, options, shape):
  pair = comparison.pair("ConvTranspose", *args, **options)
  rtol = 3e-2 if HALF in list(options.values()) else 5e-5
  comparison.assert_same(*pair, array(*shape), rtol=rtol)


@pytest.mark.parametrize("name", ["Conv", "ConvTranspose"])
def test_metadata_reaches_the_parameters(name):
  layer = getattr(nnx, name)(
    3,
    4,
    3,
    kernel_metadata={"tag": 1},
    bias_metadata={"tag": 2},
    rngs=nnx.Rngs(0),
  )
  assert (layer.kernel.tag, layer.bias.tag) == (1, 2)


@pytest.mark.parametrize("library", [nnx, flax_nnx])
def test_a_stand_in_with_another_kernel(library):
  names = (
    "bias", "conv_general_dilated", "dtype", "feature_group_count",
    "in_features", "input_dilation", "kernel_dilation", "mask", "padding",
    "precision", "preferred_element_type", "promote_dtype", "strides",
    "use_bias",
  )  # fmt: skip
  layer = library.Conv(3, 4, (5,), rngs=library.Rngs(0))
  cropped = types.SimpleNamespace(
    kernel_size=(3,),
    kernel=library.Param(layer.kernel[1:4]),
    **{name: getattr(layer, name) for name in names},
  )
  x = jnp.asarray(array(2, 8, 3))
  smaller = library.Conv(3, 4, (3,), rngs=library.Rngs(0))
  smaller.kernel = cropped.kernel
  np.testing.assert_allclose(library.Conv.__call__(cropped, x), smaller(x))


@pytest.mark.parametrize("name", ["Conv", "ConvTranspose"])
def test_refusals(name):
  make = getattr(nnx, name)
  x = array(2, 8, 3)
  layer = make(3, 4, 3, mask=mask_of(3, 4), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="`mask` must have the shape of the ker"):
    layer(x)
  for padding in ((1, 1), ((1, 2, 3),), ("a",)):
    layer = make(3, 4, 3, padding=padding, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="`padding` must be a string, an int"):
      layer(x)


def test_refusals_of_conv():
  with pytest.raises(ValueError, match="`feature_group_count` must divide"):
    nnx.Conv(3, 4, 3, feature_group_count=2, rngs=nnx.Rngs(0))
  layer = nnx.Conv(3, 4, (3, 3), padding="CAUSAL", rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="needs exactly one spatial axis"):
    layer(array(2, 8, 8, 3))


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CAUSAL", "CIRCULAR"])
@pytest.mark.parametrize("size", [2, 20])
def test_names_of_paddings_of_a_dilated_input_are_refused(padding, size):
  layer = nnx.Conv(1, 1, 3, input_dilation=2, padding=padding, rngs=nnx.Rngs(0))
  with pytest.raises(
    ValueError,
    match="`padding` must be numbers where `input_dilation` is more than 1, but"
    f" got '{padding}' and `input_dilation=2`",
  ):
    layer(array(1, size, 1))
