"""How far a result may be from a float64 oracle, by dtype."""

import math
from typing import Any

import numpy as np

# Spacing of numbers near 1.
_EPS = {
  "float64": 2.0**-52,
  "float32": 2.0**-23,
  "bfloat16": 2.0**-7,
  "float16": 2.0**-10,
  "float8_e4m3fn": 2.0**-3,
  "float8_e5m2": 2.0**-2,
}


def eps(dtype: Any) -> float:
  """Returns the spacing of `dtype`'s numbers near 1."""
  return _EPS[np.dtype(dtype).name]


def rtol(dtype: Any, *, reduced: int = 1, factor: float = 4.0) -> float:
  """Returns the relative tolerance of a result.

  Args:
    dtype: The dtype that it was computed or stored in, the coarser of the two.
    reduced: How many numbers were summed up; errors grow with its square root.
    factor: How many roundings one term goes through.
  """
  return factor * eps(dtype) * math.sqrt(max(reduced, 1))


def assert_close(
  got: Any,
  want: Any,
  dtype: Any,
  *,
  reduced: int = 1,
  factor: float = 4.0,
  scale: float | None = None,
  what: str = "result",
) -> None:
  """Checks a result against its oracle.

  Args:
    got: The result.
    want: The float64 oracle.
    dtype: As in `rtol`.
    reduced: As in `rtol`.
    factor: As in `rtol`.
    scale: Size of the numbers that went into the result, for the absolute
      tolerance. The largest finite magnitude of `want`, if None.
    what: Named in the failure.
  """
  got = np.asarray(got, np.float64)
  want = np.asarray(want, np.float64)
  tolerance = rtol(dtype, reduced=reduced, factor=factor)
  if scale is None:
    finite = np.abs(want[np.isfinite(want)])
    scale = float(finite.max()) if finite.size else 1.0
  np.testing.assert_allclose(
    got, want, rtol=tolerance, atol=tolerance * scale, err_msg=what
  )
