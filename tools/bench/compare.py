"""Decides whether two sides of a benchmark row computed the same thing."""

import dataclasses
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np


class MismatchError(AssertionError):
  """Two sides of a row differ by more than the tolerance of their dtype."""


@dataclasses.dataclass(frozen=True)
class Tolerance:
  """Allows each element a difference that is the sum of three parts.

  Attributes:
    relative: times the element's own magnitude.
    absolute: as it is.
    of_largest: times the largest magnitude in the array, for results that are
      what is left of larger terms, each rounded.
  """

  relative: float
  absolute: float
  of_largest: float = 0.0

  def __str__(self) -> str:
    return (
      f"{self.relative:g} relative + {self.absolute:g} absolute + "
      f"{self.of_largest:g} of the largest"
    )

  def compare(self, ours: jax.Array, theirs: jax.Array) -> tuple[bool, float]:
    """Returns whether all values agree, and the largest difference."""
    same, largest = _by_element(ours, theirs, *dataclasses.astuple(self))
    return bool(same), float(largest)


@dataclasses.dataclass(frozen=True)
class NormTolerance:
  """Allows each array a difference whose norm is a part of the array's own.

  One element may say nothing: where it is within rounding of 0, relu's gate may
  be open on one side alone, and the gradient is all there or not at all.

  Attributes:
    relative: how large a part. NaN and infinity are within no tolerance.
  """

  relative: float

  def __str__(self) -> str:
    return f"{self.relative:g} of the norm"

  def compare(self, ours: jax.Array, theirs: jax.Array) -> tuple[bool, float]:
    """Returns whether the arrays agree, and the difference of the norms."""
    part = float(_by_norm(ours, theirs))
    return part <= self.relative, part


# A few units in the last place of each format: the sides add the same numbers
# in different orders. Integers and booleans must be equal.
_BY_DTYPE = {
  "float64": Tolerance(1e-12, 1e-12),
  "float32": Tolerance(5e-5, 1e-5),
  "bfloat16": Tolerance(2e-2, 1e-2),
  "float16": Tolerance(4e-3, 2e-3),
  "float8_e4m3fn": Tolerance(0.13, 0.01),
  "float8_e5m2": Tolerance(0.25, 0.01),
}


def tolerance_of(dtype: Any) -> Tolerance:
  """Returns the default tolerance of `dtype`.

  >>> tolerance_of("int8")
  Tolerance(relative=0.0, absolute=0.0, of_largest=0.0)
  """
  return _BY_DTYPE.get(np.dtype(dtype).name, Tolerance(0.0, 0.0))


@jax.jit
def _by_element(ours, theirs, relative, absolute, of_largest):
  """Returns whether all values agree, and the largest difference."""
  equal = ours == theirs
  # Fewer than 64 bits are compared in float32, which holds all their values
  # but large integers, and those must be equal anyway.
  wide = ours.dtype if ours.dtype == jnp.float64 else jnp.float32
  ours, theirs = ours.astype(wide), theirs.astype(wide)
  difference = jnp.abs(ours - theirs)
  # Infinity allows any difference relative to itself, so it must be equal.
  finite = jnp.isfinite(theirs)
  size = jnp.where(finite, jnp.abs(theirs), 0)
  largest = jnp.max(size, initial=0.0)
  near = difference <= absolute + relative * size + of_largest * largest
  near &= finite & (relative + absolute > 0)
  return jnp.all(near | equal), jnp.max(difference, initial=0.0)


@jax.jit
def _by_norm(ours, theirs):
  """Returns the norm of the difference as a part of the norm of `theirs`.

  Of a difference from zeros alone, the norm itself; NaN where anything is NaN
  or infinite.
  """
  ours, theirs = (jnp.ravel(x).astype(jnp.float32) for x in (ours, theirs))
  size = jnp.linalg.norm(theirs)
  return jnp.linalg.norm(ours - theirs) / jnp.where(size == 0, 1.0, size)


def _leaves(tree: Any) -> dict[str, Any]:
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


def check_same(
  ours: Any,
  theirs: Any,
  *,
  label: str,
  tolerance: Tolerance | NormTolerance | None = None,
) -> float:
  """Checks that two pytrees hold the same values.

  Args:
    ours: pytree of arrays, numbers or strings.
    theirs: pytree with the same paths, shapes and dtypes.
    label: names the comparison in the message.
    tolerance: instead of the default of each array's dtype.

  Returns:
    The largest difference of two leaves, as the tolerance measures it.

  Raises:
    MismatchError: if paths, shapes, dtypes or values differ.

  Example:
    >>> check_same({"y": jnp.ones(2)}, {"y": jnp.ones(2)}, label="ones")
    0.0
  """
  ours, theirs = _leaves(ours), _leaves(theirs)
  if ours.keys() != theirs.keys():
    only = sorted(ours.keys() ^ theirs.keys())[:5]
    raise MismatchError(
      f"{label}: both sides must return the same structure, but {only} "
      "exist on one side only. The row is not timed."
    )
  differences = [0.0]
  for path, left in ours.items():
    right = theirs[path]
    if isinstance(left, str) or isinstance(right, str):
      if left != right:
        raise MismatchError(
          f"{label}: leaf `{path}` must be equal, but got {left!r} and "
          f"{right!r}. The row is not timed."
        )
      continue
    left, right = jnp.asarray(left), jnp.asarray(right)
    if left.shape != right.shape or left.dtype != right.dtype:
      raise MismatchError(
        f"{label}: leaf `{path}` must have one shape and dtype, but got "
        f"{left.dtype}{list(left.shape)} and {right.dtype}{list(right.shape)}."
        " The row is not timed."
      )
    allowed = tolerance or tolerance_of(left.dtype)
    same, difference = allowed.compare(left, right)
    if not same:
      raise MismatchError(
        f"{label}: leaf `{path}` must agree within {allowed} ({left.dtype}), "
        f"but the largest difference is {difference:g}. The row is not timed."
      )
    differences.append(difference)
  return max(differences)
