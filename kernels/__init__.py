"""Fused kernels: arrays in, arrays out, usable from any JAX program."""

import typing as _typing

from . import batch_stat, kv_cache
from .common.dispatch import (
  Choice,
  implementations,
  xla_only,
)
from .common.explain import explain
from .common.libraries import register

if _typing.TYPE_CHECKING:
  # To a type checker a package is a module, which cannot be called.
  from .decode_attention import _CallablePackage as _DecodeAttention
  from .matmul import _CallablePackage as _Matmul

  decode_attention: _DecodeAttention
  matmul: _Matmul
else:
  from . import decode_attention, matmul

__all__ = [
  "Choice",
  "batch_stat",
  "decode_attention",
  "explain",
  "implementations",
  "kv_cache",
  "matmul",
  "register",
  "xla_only",
]
