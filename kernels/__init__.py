"""Fused kernels: arrays in, arrays out, usable from any JAX program."""

from kernels.common.dispatch import Choice, explain, implementations, register

__all__ = ["Choice", "explain", "implementations", "register"]
