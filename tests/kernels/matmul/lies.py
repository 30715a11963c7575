"""What the handlers of matmul are lied to about."""

import jax.numpy as jnp

import kernels
from tests.testing import lies


def _fits(name: str, wrong: lies.Type) -> bool:
  """Whether an array may have this type beside the one that it has."""
  return wrong.dtype == jnp.float32 and wrong.shape == _SHAPES[name]


def _fits_packed(name: str, wrong: lies.Type) -> bool:
  shapes = _SHAPES | {"x": (3, 2, 64)}
  if name in ("values", "scale", "minimum"):
    return name == "scale" and wrong == lies.Type((1, 4), jnp.bfloat16)
  return wrong.dtype == jnp.float32 and wrong.shape == shapes[name]


def _fits_transposed(name: str, wrong: lies.Type) -> bool:
  shapes = _SHAPES | {"w": (4, 5)}
  return wrong.dtype == jnp.float32 and wrong.shape == shapes[name]


_SHAPES = {"x": (3, 2, 5), "w": (5, 4), "bias": (4,), "y": (3, 2, 4)}


def check(implementation: str, dtype: str) -> int:
  """Lies about each handler, in each way that there is; returns how often.

  Args:
    implementation: Which one.
    dtype: Of all arrays.
  """
  x, w, bias = (jnp.ones(_SHAPES[name], dtype) for name in ("x", "w", "bias"))
  told = _check(implementation, ("x", "w", "bias"), _fits, x, w, bias)
  told += _check(
    implementation,
    ("x", "w", "bias"),
    _fits_transposed,
    x,
    w.T,
    bias,
    transposed=True,
  )
  x = jnp.ones((3, 2, 64), dtype)
  for kind in ({"bits": 8}, {"bits": 4}, {"dtype": "float8_e4m3fn"}):
    packed = kernels.matmul.quantize(jnp.ones((64, 4)), group=32, **kind)
    names = ["x", "values", "scale"]
    names += ["minimum"] * (packed.minimum is not None)
    told += _check(
      implementation, (*names, "bias"), _fits_packed, x, packed, bias
    )
  return told


def _check(implementation, names, fits, *arrays, **options):
  (call,) = lies.recorded(
    lambda *args: kernels.matmul(
      *args, implementation=implementation, **options
    ),
    *arrays,
  )
  return lies.check(
    call,
    operands=names,
    results=("y",),
    values={"batch_axes": (-1, 1, 3, 99, 2**62)},
    fits=fits,
    optional=1,
  )
