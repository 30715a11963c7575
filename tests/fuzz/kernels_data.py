"""What the kernels' fuzzers draw from, and what they compare with."""

from collections.abc import Iterator, Sequence
import contextlib
from typing import Any

import ml_dtypes
import numpy as np

from kernels.batch_stat import ffi as batch_stat_ffi
from kernels.decode_attention import ffi as attention_ffi
from kernels.kv_cache import ffi as cache_ffi
from kernels.matmul import ffi as matmul_ffi
from tests.testing import tolerances

FLOATS = ("float32", "bfloat16", "float16")
QUANTIZED = ("int8", "float8_e4m3fn", "float8_e5m2")
INT32 = np.iinfo(np.int32)
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "auto")

# Below this, float32 arithmetic on the CPU may count as zero.
TINY = 2.0**-126

_LIBRARIES = (
  cache_ffi.LIBRARY,
  attention_ffi.LIBRARY,
  batch_stat_ffi.CPU_LIBRARY,
  matmul_ffi.LIBRARY,
)


def pick(rng: np.random.Generator, *choices: Any) -> Any:
  """Returns one of the choices."""
  return choices[rng.integers(len(choices))]


def chance(rng: np.random.Generator, probability: float = 0.5) -> bool:
  """Returns True so often."""
  return bool(rng.random() < probability)


@contextlib.contextmanager
def some_level(rng: np.random.Generator) -> Iterator[str]:
  """Runs the CPU's kernels with some instruction set that the machine has."""
  level = pick(rng, *LEVELS)
  modules = [library.load() for library in _LIBRARIES]
  try:
    for module in modules:
      try:
        module.set_simd_level(level)
      except ValueError:
        level = "auto"
    yield level
  finally:
    for module in modules:
      module.set_simd_level("auto")


def dtype_of(name: str) -> np.dtype:
  """Returns a NumPy dtype, those of ml_dtypes included."""
  return np.dtype(getattr(ml_dtypes, name, name))


def normal(
  rng: np.random.Generator, shape: Any, dtype: str, size: float = 1.0
) -> np.ndarray:
  """Returns normal numbers of about `size`; int8 of about 40."""
  x = rng.standard_normal(shape, np.float32)
  if dtype == "int8":
    return np.clip(np.rint(x * 40), -128, 127).astype(np.int8)
  return (x * np.float32(size)).astype(dtype_of(dtype))


# Sizes of numbers, subnormal ones of half precision among them.
def some_size(rng: np.random.Generator, dtype: str) -> float:
  """Returns how large numbers of `dtype` shall be."""
  if dtype == "float16":
    return pick(rng, 1.0, 1.0, 2.0**-10, 2.0**-15, 2.0**-18, 2.0**-22, 2.0**8)
  if dtype in ("float32", "bfloat16"):
    return pick(rng, 1.0, 1.0, 1.0, 2.0**-40, 2.0**-110, 2.0**30)
  return 1.0


def any_bits(rng: np.random.Generator, shape: Any, dtype: str) -> np.ndarray:
  """Returns numbers of any bits, infinities and NaN among them."""
  of = dtype_of(dtype)
  count = int(np.prod(shape)) * of.itemsize
  return np.frombuffer(rng.bytes(count), of).reshape(shape)


def bits(array: Any) -> bytes:
  """Returns the exact contents of an array."""
  return np.asarray(array).tobytes()


def assert_same(
  got: Any, want: Any, what: str = "result", others: Sequence[Any] = ()
) -> None:
  """Checks that arrays are equal to the bit, but for the kinds of NaN.

  Args:
    got: The result.
    want: The oracle's.
    what: Named in the failure.
    others: Like `want`: each number may be that of one of these instead.
  """
  got, want = np.asarray(got), np.asarray(want)
  assert got.dtype == want.dtype, f"{what}: {got.dtype} is not {want.dtype}"
  assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
  if got.tobytes() == want.tobytes():
    return
  unsigned = np.dtype(f"u{got.dtype.itemsize}")
  wrong = got.view(unsigned) != want.view(unsigned)
  for other in others:
    wrong &= got.view(unsigned) != other.view(unsigned)
  if got.dtype != np.int8:
    wrong &= ~(np.isnan(got) & np.isnan(want))
  if wrong.any():
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    raise AssertionError(
      f"{what}: {int(wrong.sum())} of {wrong.size} differ; at {at} there is"
      f" {got[at]!r}, and should be {want[at]!r}"
    )


def assert_near(got: Any, want: Any, error: Any, what: str = "result") -> None:
  """Checks that no number is farther than `error` from the float64 one.

  Infinities and NaN must be where they are wanted.

  Args:
    got: The result.
    want: The oracle's.
    error: Broadcasts to them; the rounding to the result's dtype is added.
    what: Named in the failure.
  """
  got = np.asarray(got)
  want = np.asarray(want, np.float64)
  assert got.shape == want.shape, f"{what}: {got.shape} is not {want.shape}"
  info = ml_dtypes.finfo(got.dtype)
  # Half of the spacing, which is that of subnormal numbers at least.
  rounding = np.maximum(
    np.abs(want) * tolerances.eps(got.dtype) * 0.51,
    float(info.smallest_subnormal) * 0.51,
  )
  given = got.astype(np.float64)
  with np.errstate(invalid="ignore", over="ignore"):
    near = np.abs(given - want) <= error + rounding
    large = float(info.max)
    overflow = (np.abs(want) + error > large * (1 - 2.0**-9)) & (
      np.abs(given) >= large * (1 - 2.0**-6)
    )
  overflow &= np.sign(given) == np.sign(want)
  right = near | (given == want) | (np.isnan(given) & np.isnan(want)) | overflow
  if not right.all():
    wrong = np.argwhere(~right)
    at = tuple(int(i) for i in wrong[0])
    limit = np.broadcast_to(error + rounding, want.shape)[at]
    raise AssertionError(
      f"{what}: {len(wrong)} of {want.size} are wrong; at {at} there is"
      f" {given[at]!r}, and should be {want[at]!r} within {limit!r}"
    )


def shaped(layout: str, b: Any, s: Any, n: Any, h: Any) -> tuple[Any, ...]:
  """Returns the shape of a cache or of rows in a layout."""
  return (b, s, n, h) if layout == "bsnh" else (b, n, s, h)
