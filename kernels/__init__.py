"""Fused kernels: arrays in, arrays out, usable from any JAX program."""

from kernels import batch_stat
from kernels.common.dispatch import Choice, explain, implementations, register

__all__ = [
  "Choice",
  "batch_stat",
  "explain",
  "implementations",
  "register",
]
