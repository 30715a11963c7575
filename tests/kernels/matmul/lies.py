"""What the handlers of matmul are lied to about."""

import jax.numpy as jnp

import kernels
from tests.testing import lies


def _fits(name: str, wrong: lies.Type) -> bool:
  """Whether an array may have this type beside the one that it has."""
  return wrong.dtype == jnp.float32 and wrong.shape == _SHAPES[name]


_SHAPES = {"x": (3, 2, 5), "w": (5, 4), "bias": (4,), "y": (3, 2, 4)}


def check(implementation: str, dtype: str) -> int:
  """Lies about each handler, in each way that there is; returns how often.

  Args:
    implementation: Which one.
    dtype: Of all arrays.
  """
  arrays = [jnp.ones(_SHAPES[name], dtype) for name in ("x", "w", "bias")]
  told = 0
  for call in lies.recorded(
    lambda *args: kernels.matmul(*args, implementation=implementation), *arrays
  ):
    told += lies.check(
      call,
      operands=("x", "w", "bias"),
      results=("y",),
      values={"batch_axes": (-1, 1, 3, 99, 2**62)},
      fits=_fits,
      optional=1,
    )
  return told
