"""Asks the kernels which implementation a row will get."""

from collections.abc import Callable
from typing import Any

import kernels


def chosen(function: Callable[..., Any], *arguments: Any) -> dict[str, str]:
  """Returns the `details` of a row that calls kernels.

  Args:
    function: what the row calls.
    *arguments: arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    `implementation`, several names joined if the function uses several, and
    `reason`.
  """
  choices = kernels.explain(function, *arguments)
  return {
    "implementation": "+".join(
      dict.fromkeys(choice.implementation for choice in choices)
    ),
    "reason": " ".join(dict.fromkeys(choice.reason for choice in choices)),
  }
