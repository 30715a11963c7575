"""Why a plan cannot be: what does not divide, and what does not fit."""

from __future__ import annotations


class Refused(ValueError):
  """Says in words why a plan cannot be."""


def check_divides(part: str, size: int, whole: str, total: int) -> None:
  """Raises if `size` does not divide `total`; the names say what they are.

  >>> check_divides("tensor", 2, "heads", 8)
  """
  if total % size:
    raise Refused(
      f"`{whole}`={total} must be a multiple of `{part}`={size}, but is not."
    )
