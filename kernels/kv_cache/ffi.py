"""The handlers of the cache update, and how they are called."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..cache import addressing
from ..common import libraries
from . import reference

TARGET = "fused_nnx_kv_cache_update_1"

HANDLERS = {
  TARGET: "kv_cache_update",
  # What artifacts call it that were exported before names had versions.
  "kv_cache_update": "kv_cache_update",
}
LIBRARY = libraries.Library(f"{__package__}.cpu._kv_cache_cpu", HANDLERS)
CUDA_LIBRARY = libraries.Library(
  f"{__package__}.cuda._kv_cache_cuda", HANDLERS, platform="CUDA"
)


def update(
  *operands: jax.Array, target: str = TARGET, **params: Any
) -> Sequence[jax.Array]:
  """Calls the handler that is registered as `target`; see the reference."""
  at = addressing.Addressing(**params)
  x = reference.named(operands)
  if "k_scale" not in x:
    x["k_scale"] = x["v_scale"] = jnp.zeros((0, 0), jnp.float32)
  call = jax.ffi.ffi_call(
    target,
    tuple(
      jax.ShapeDtypeStruct(x[name].shape, x[name].dtype)
      for name in ("cache_k", "cache_v")
    ),
    input_output_aliases={0: 0, 1: 1},
  )
  return call(
    *addressing.once(x, at).values(),
    ring=np.int64(at.ring),
    heads_first=np.bool_(at.layout.heads_first),
  )
