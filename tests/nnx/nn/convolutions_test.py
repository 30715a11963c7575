"""Convolutions where XLA would exchange image and kernel, on the CPU."""

import itertools
from typing import Any

import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np
import pytest

import nnx
from nnx.nn import convolutions
from tests.nnx.nn import comparison
from tests.nnx.nn.comparison import array
from tests.testing import interception

pytestmark = pytest.mark.skipif(
  jax.default_backend() != "cpu", reason="layers do so on the CPU"
)

# The kernel's sizes, those of the image, and options.
SMALL: dict[str, tuple[Any, Any, dict[str, Any]]] = {
  "same, 1x1": ((3, 3), (1, 1), {}),
  "same, 2x2": ((3, 3), (2, 2), {}),
  "same, wide kernel": ((5, 7), (2, 3), {}),
  "same, one side": ((3, 3), (1, 4), {}),
  "even kernel": ((4, 2), (2, 2), {"padding": "SAME_LOWER"}),
  "strides": ((3, 3), (3, 4), {"strides": 2}),
  "strides beyond": ((3, 3), (4, 4), {"strides": (3, 5), "padding": 1}),
  "valid": ((3, 3), (4, 3), {"padding": "VALID"}),
  "to one": ((3, 2), (3, 2), {"padding": "VALID"}),
  "uneven": ((3, 3), (2, 2), {"padding": ((0, 3), (2, 0))}),
  "far zeros": ((3, 3), (1, 2), {"padding": ((4, 5), (3, 3))}),
  "dilated kernel": ((3, 3), (3, 3), {"kernel_dilation": (2, 4)}),
  "dilated beyond": ((3,), (5,), {"kernel_dilation": 6, "padding": 6}),
  "dilated image": ((5,), (2,), {"input_dilation": 3, "padding": ((1, 2),)}),
  "one axis": ((5,), (3,), {}),
  "three axes": ((3, 1, 3), (2, 2, 1), {}),
  "patches": ((8, 8), (16, 16), {"strides": 8, "padding": "VALID"}),
}
# Where the result has more places than the image.
LARGE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
  "padding": ((3, 3), (4, 4), {"padding": 2}),
  "kernel of 2": ((2, 2), (5, 4), {"padding": 1}),
  "image dilated": ((3,), (6,), {"input_dilation": 2, "padding": 1}),
}
# Where a product of matrices is all that there is to do.
ONE_PLACE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
  "1x1": ((1, 1), (4, 3), {}),
  "1x1, strides": ((1, 1), (5, 4), {"strides": (2, 3)}),
  "1x1, padding": ((1, 1), (4, 3), {"strides": 2, "padding": ((1, 2), (0, 1))}),
  "1x1, dilations": (
    (1, 1),
    (3, 2),
    {"input_dilation": 2, "kernel_dilation": 3, "padding": ((0, 1), (1, 0))},
  ),
  "1, one axis": ((1,), (7,), {"padding": "VALID"}),
}
CASES = SMALL | LARGE | ONE_PLACE


def layer_and_input(kernel, image, options, dtype="float32"):
  """The layer, of 6 and 5 channels, and an input for it."""
  options = {"padding": "SAME"} | options
  pair = comparison.pair(
    "Conv", 6, 5, kernel, dtype=jnp.dtype(dtype), **options
  )
  return pair, array(3, *image, 6)


def oracle(x, w, bias, dy, layer):
  """The convolution and its gradients in float64, tap by tap."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  taps = w.shape[:-2]

  def each(value):
    return (value,) * len(taps) if isinstance(value, int) else value

  strides, spread, gaps = map(
    each, (layer.strides, layer.kernel_dilation, layer.input_dilation)
  )
  pads = layer.padding
  if isinstance(pads, str):
    reach = [(k - 1) * d + 1 for k, d in zip(taps, spread)]
    pads = lax.padtype_to_pads(x.shape[1:-1], reach, strides, pads)
  else:
    pads = [(p, p) if isinstance(p, int) else p for p in each(pads)]
  place = [slice(None)]
  sizes = [len(x)]
  for n, (low, high), gap in zip(x.shape[1:-1], pads, gaps):
    sizes.append(low + (n - 1) * gap + 1 + high)
    place.append(slice(low, low + (n - 1) * gap + 1, gap))
  wide = np.zeros((*sizes, x.shape[-1]))
  wide[tuple(place)] = x
  y, dw, dwide = np.zeros(dy.shape), np.zeros_like(w), np.zeros_like(wide)
  for tap in itertools.product(*map(range, taps)):
    seen = (slice(None),) + tuple(
      slice(j * d, j * d + (n - 1) * s + 1, s)
      for j, d, n, s in zip(tap, spread, dy.shape[1:-1], strides)
    )
    y += wide[seen] @ w[tap]
    dw[tap] = np.tensordot(wide[seen], dy, (tuple(range(x.ndim - 1)),) * 2)
    dwide[seen] += dy @ w[tap].T
  return y + np.asarray(bias, np.float64), dwide[tuple(place)], dw


def program(layer):
  """The layer as a function of the inputs and the kernel."""
  graphdef, state = nnx.split(layer)

  def function(x, kernel):
    model = nnx.merge(graphdef, state)
    model.kernel.value = kernel
    return model(x)

  return function


def with_gradients(function):
  """The result, a gradient of it, and those of the inputs and the kernel."""

  def run(x, kernel):
    y, vjp = jax.vjp(function, x, kernel)
    dy = jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    dy = dy.astype(y.dtype)
    return y, dy, *vjp(dy)

  return run


def test_a_kernel_of_many_slices_is_not_cut():
  layer, x = nnx.Conv(6, 5, (70,), rngs=nnx.Rngs(0)), array(3, 60, 6)
  function, kernel = program(layer), layer.kernel.value
  y = comparison.jit(function)(x, kernel)
  want, *_ = oracle(x, kernel, layer.bias.value, y, layer)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
  assert is_plain(layer, x)


def rounded(x, dtype):
  return x.astype(dtype).astype(jnp.float32)


def is_exchanged(compiled):
  """Whether XLA has made the image the kernel somewhere."""
  return "rhs_reversal" in compiled.as_text()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_and_gradients_are_those_in_float64(case, dtype):
  (layer, _), x = layer_and_input(*case, dtype)
  x, kernel = (rounded(a, dtype) for a in (x, layer.kernel.value))
  run = jax.jit(with_gradients(program(layer))).lower(x, kernel).compile()
  assert not is_exchanged(run)
  y, dy, dx, dw = run(x, kernel)
  rtol = {"float32": 2e-6, "bfloat16": 1e-2}[dtype]
  want = oracle(x, kernel, layer.bias.value, dy, layer)
  for a, b in zip((y, dx, dw), want, strict=True):
    size = max(1, np.abs(b).max())
    np.testing.assert_allclose(a, b, rtol=rtol, atol=2 * rtol * size)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
  "name", ["strides", "uneven", "image dilated", "1x1, padding"]
)
def test_computes_what_flax_does(name, dtype):
  (ours, theirs), x = layer_and_input(*CASES[name], dtype)
  rtol = {"float32": 2e-5, "float16": 4e-3}[dtype]
  comparison.assert_same(ours, theirs, x, rtol=rtol)


@pytest.mark.parametrize("name", ["same, 2x2", "padding"])
def test_convolutions_of_jax_are_exchanged(name):
  kernel, image, options = CASES[name]
  layer = nnx.Conv(
    6,
    5,
    kernel,
    conv_general_dilated=lambda *a, **k: lax.conv_general_dilated(*a, **k),
    rngs=nnx.Rngs(0),
    **options,
  )
  x = array(3, *image, 6)
  run = jax.jit(with_gradients(program(layer)))
  assert is_exchanged(run.lower(x, layer.kernel.value).compile())


def is_plain(layer, x):
  text = str(jax.make_jaxpr(program(layer))(x, layer.kernel.value))
  return "conv_general_dilated" in text


def conv(*args, **kwargs):
  return nnx.Conv(6, 4, *args, **kwargs, rngs=nnx.Rngs(0))


def doubled(*args, **kwargs):
  return 2 * lax.conv_general_dilated(*args, **kwargs)


def test_a_program_that_would_tell_keeps_its_convolution():
  small = array(2, 2, 2, 6)
  assert not is_plain(conv((3, 3)), small)
  assert not is_plain(conv((1, 1)), array(2, 9, 9, 6))
  assert is_plain(conv((3, 3)), array(2, 3, 3, 6))
  assert is_plain(conv((3, 3), conv_general_dilated=doubled), small)
  assert is_plain(conv((3, 3), feature_group_count=2), small)
  assert is_plain(conv((3, 3), dtype=jnp.float8_e4m3fn), small)


@pytest.mark.parametrize("by", ["attribute", "code"])
def test_a_function_that_replaces_the_convolution_is_called(by):
  layer, x = conv((3, 3), use_bias=False), array(2, 2, 2, 6)
  want = layer(x)

  def twice(name, original, *args, **kwargs):
    return 2 * original(*args, **kwargs)

  with interception.replaced(["jax.lax.conv_general_dilated"], twice, by):
    got = layer(x), jax.jit(lambda x: layer(x))(x)
  for y in got:
    np.testing.assert_allclose(y, 2 * want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["same, 2x2", "padding", "1x1, strides"])
def test_transforms_go_through(name):
  (layer, _), x = layer_and_input(*CASES[name])
  function, kernel = program(layer), layer.kernel.value
  y = layer(x)
  many = jnp.stack([x, 2 * x])
  got = jax.vmap(function, in_axes=(0, None))(many, kernel)
  np.testing.assert_allclose(got[0], y, rtol=1e-5, atol=1e-5)
  bias = layer.bias.value
  _, tangent = jax.jvp(lambda x: function(x, kernel), (x,), (x,))
  np.testing.assert_allclose(tangent, y - bias, rtol=1e-5, atol=1e-5)
  linear = lambda x: function(x, kernel) - bias  # noqa: E731
  (back,) = jax.linear_transpose(linear, x)(y)
  _, vjp = jax.vjp(lambda x: function(x, kernel), x)
  np.testing.assert_allclose(back, vjp(y)[0], rtol=1e-5, atol=1e-5)
  loss = lambda k: jnp.sum(jnp.sin(function(x, k)))  # noqa: E731
  product = jax.jvp(jax.grad(loss), (kernel,), (kernel,))[1]
  assert np.isfinite(product).all()


def test_an_exported_program_is_plain_jax():
  layer, x = conv((3, 3)), array(2, 2, 2, 6)
  function, kernel = program(layer), layer.kernel.value
  exported = export.export(jax.jit(function))(x, kernel)
  assert "custom_call" not in exported.mlir_module()
  restored = export.deserialize(exported.serialize())
  np.testing.assert_allclose(restored.call(x, kernel), layer(x), 1e-5, 1e-5)
  (rows,) = export.symbolic_shape("b")
  shape = jax.ShapeDtypeStruct((rows, 2, 2, 6), x.dtype)
  exported = export.export(jax.jit(function))(shape, kernel)
  np.testing.assert_allclose(exported.call(x, kernel), layer(x), 1e-5, 1e-5)


def test_refusals_are_those_of_the_convolution():
  layer = conv((3, 3))
  with pytest.raises(ValueError, match="The last axis of `inputs` must be 6"):
    layer(array(2, 2, 2, 5))
  with pytest.raises(ValueError, match="`inputs` must have at least 3 axes"):
    layer(array(2, 6))
  assert layer(array(0, 2, 2, 6)).shape == (0, 2, 2, 4)
  assert convolutions.convolve(
    array(1, 2, 6),
    array(5, 6, 4),
    (1,),
    "VALID",
    input_dilation=(1,),
    kernel_dilation=(1,),
  ).shape == (1, 0, 4)
