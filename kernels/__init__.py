"""Fused kernels: arrays in, arrays out, usable from any JAX program."""

import typing as _typing

from kernels import batch_stat, kv_cache
from kernels.common.dispatch import (
  Choice,
  implementations,
  register,
  xla_only,
)
from kernels.common.explain import explain

if _typing.TYPE_CHECKING:
  # To a type checker a package is a module, which cannot be called.
  from kernels.decode_attention import _CallablePackage

  decode_attention: _CallablePackage
else:
  from kernels import decode_attention

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
