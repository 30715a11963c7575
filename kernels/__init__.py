"""Fused kernels: arrays in, arrays out, usable from any JAX program."""

from kernels import batch_stat, decode_attention, kv_cache
from kernels.common.dispatch import (
  Choice,
  implementations,
  xla_only,
)
from kernels.common.explain import explain
from kernels.common.libraries import register

__all__ = [
  "Choice",
  "batch_stat",
  "decode_attention",
  "explain",
  "implementations",
  "kv_cache",
  "register",
  "xla_only",
]
