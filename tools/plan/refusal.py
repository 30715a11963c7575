"""Why a plan cannot be: what does not divide, and what does not fit."""

from __future__ import annotations


class Refused(ValueError):
  """Says in words why a plan cannot be."""


def check_sizes(owner: object, *names: str) -> None:
  """Raises if an attribute that counts something is less than 1."""
  for name in names:
    if getattr(owner, name) < 1:
      raise Refused(
        f"`{name}` must be at least 1, but got {getattr(owner, name)}."
      )


def check_shares(owner: object, *names: str) -> None:
  """Raises if an attribute that is a share of something is none."""
  for name in names:
    if not 0 <= getattr(owner, name) <= 1:
      raise Refused(
        f"`{name}` must lie in [0, 1], but got {getattr(owner, name)}."
      )


def check_divides(part: str, size: int, whole: str, total: int) -> None:
  """Raises if `size` does not divide `total`; the names say what they are.

  >>> check_divides("tensor", 2, "heads", 8)
  """
  if total % size:
    raise Refused(
      f"`{whole}`={total} must be a multiple of `{part}`={size}, but is not."
    )
