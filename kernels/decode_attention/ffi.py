"""The handlers of decode attention, and how they are called."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..cache import addressing
from ..common import arrays, libraries
from . import reference

APPEND_TARGET = "fused_nnx_decode_attention_append_1"
ATTEND_TARGET = "fused_nnx_decode_attention_attend_1"

HANDLERS = {
  APPEND_TARGET: "append_and_attend",
  ATTEND_TARGET: "attend",
  # What artifacts call them that were exported before names had versions.
  "decode_attention_append_and_attend": "append_and_attend",
  "decode_attention_attend": "attend",
}
LIBRARY = libraries.Library(
  f"{__package__}.cpu._decode_attention_cpu", HANDLERS
)
CUDA_LIBRARY = libraries.Library(
  f"{__package__}.cuda._decode_attention_cuda", HANDLERS, platform="CUDA"
)

# Of the CUDA kernels; see cuda/decode.h. Rows of a head are read 16
# bytes at a time where they are multiples of that, else element by element.
_MAX_ROW_BYTES = 2048
_MAX_ODD_DIM = 512
_LEAST_KEYS = 128  # of a worker
_WHOLE_KEYS = 256  # of a sequence that is not divided
# Blocks that a large GPU runs at a time, twice as many where it takes few rows
# of float32; and those that occupy it at all.
_FEW_ROWS = 8
_BLOCKS = 296
_BUSY_BLOCKS = 96
_WORKERS_OF_UNKNOWN = 16  # where sizes of the queries are symbolic

# Every operand after the caches and the new rows, in the handlers' order, with
# the rank and dtype of the empty array that stands for one that is not given.
OPERANDS: dict[str, tuple[int, Any]] = {
  "q": (5, None),
  "index": (1, jnp.int32),
  "count": (1, jnp.int32),
  "layer": (1, jnp.int32),
  "table": (2, jnp.int32),
  "first_slot": (0, jnp.int32),
  "k_scale": (2, jnp.float32),
  "v_scale": (2, jnp.float32),
  "rope_cos": (2, jnp.float32),
  "rope_sin": (2, jnp.float32),
  "rope_positions": (2, jnp.int32),
  "left_padding": (1, jnp.int32),
  "alibi_slopes": (3, jnp.float32),
  "sinks": (2, jnp.float32),
  "bias": (5, jnp.float32),
  "mask": (5, jnp.bool_),
  "qv": (5, jnp.float32),
}


def _call(operands, options, targets, workspace):
  """Calls a handler; `workspace` are types of results that it also wants."""
  x = options.named(operands)
  results = reference.results(operands, options)
  caches = [x["cache_k"], x["cache_v"]]
  new = [x["new_k"], x["new_v"]] if options.appends else []
  x = addressing.once(x, options)
  rest = [
    x[name] if name in x else jnp.zeros((0,) * rank, dtype)
    for name, (rank, dtype) in OPERANDS.items()
  ]
  call = jax.ffi.ffi_call(
    targets[0] if options.appends else targets[1],
    (*results, *workspace),
    input_output_aliases={0: 0, 1: 1} if options.appends else {},
  )
  out = call(
    *caches,
    *new,
    *rest,
    ring=np.int64(options.ring),
    window_left=np.int64(options.window_left),
    window_right=np.int64(options.window_right),
    chunk=np.int64(options.chunk),
    scale=np.float32(options.scale),
    softcap=np.float32(options.softcap),
    heads_first=np.bool_(options.layout.heads_first),
    causal=np.bool_(options.causal),
    interleaved=np.bool_(options.interleaved),
    rotate_keys=np.bool_(options.rotate_keys),
  )
  return out[: len(results)]


def cpu(
  *operands: jax.Array, options: reference.Options
) -> Sequence[jax.Array]:
  """Calls the handlers for the CPU; see the reference."""
  return _call(operands, options, (APPEND_TARGET, ATTEND_TARGET), ())


def cuda(
  *operands: jax.Array,
  options: reference.Options,
  targets: tuple[str, str] = (APPEND_TARGET, ATTEND_TARGET),
) -> Sequence[jax.Array]:
  """Calls the handlers for CUDA, which need room for the results of parts.

  Args:
    *operands: As of the reference.
    options: As of the reference.
    targets: Names that the handlers are registered under: the one that appends
      and the one that only attends.

  Returns:
    What the reference returns.
  """
  return _call(
    operands, options, targets, (_cuda_workspace(operands, options),)
  )


def _cuda_workspace(operands, options):
  """Returns the type of the CUDA workspace: parts, and what each has."""
  x = options.named(operands)
  b, n, g, t = reference.Sizes.of(x["q"], options.layout)
  s = x["cache_k"].shape[options.layout.slots_axis]
  rows, v_dim = t * g, x["cache_v"].shape[-1]
  workers = _most_workers(
    b, n, rows, x["table"].shape[1] * s, x["cache_k"].dtype
  )
  floats = n * rows * (v_dim + 3) if workers else 0
  return jax.ShapeDtypeStruct((2 * workers, (floats + 3) // 4 * 4), jnp.float32)


def _most_workers(b, n, rows, capacity, dtype):
  """Returns among how many the keys of all sequences are divided, at most.

  The kernels take as many as the device keeps busy. 0, if no sequence is.
  """
  if arrays.static_size((n, rows)) is None:
    return _WORKERS_OF_UNKNOWN
  # A block takes up to 64 rows; more rows, more blocks without any splitting.
  blocks = max(1, n * -(-rows // 64))
  twice = rows <= _FEW_ROWS and dtype == jnp.float32
  workers = -(-_BLOCKS * (2 if twice else 1) // blocks)
  if arrays.static_size((b, capacity)) is not None:
    if capacity <= _WHOLE_KEYS or (rows > 64 and b * blocks >= _BUSY_BLOCKS):
      return 0
    keys = b * capacity
    # What parts write should be little compared with the keys that they read,
    # unless the device would be idle.
    workers = min(
      workers,
      -(-keys // _LEAST_KEYS),
      max(-(-keys // max(1, 16 * rows)), -(-_BUSY_BLOCKS // blocks)),
    )
  return workers if workers > 1 else 0


def unsupported_on_cuda(
  avals: Sequence[Any], *, options: reference.Options
) -> str | None:
  """Returns why the CUDA kernels cannot handle these operands, or None."""
  x = options.named(avals)
  dims = (x["cache_k"].shape[-1], x["cache_v"].shape[-1])
  if arrays.static_size(dims) is None:
    return "`head_dim` is not known"
  if max(dims) <= _MAX_ODD_DIM:
    return None
  sizes = [dim * x["cache_k"].dtype.itemsize for dim in dims]
  if options.rotate_keys:
    return (
      f"`rope_cached_keys` is written for `head_dim` up to {_MAX_ODD_DIM}, and"
      f" here it is {max(dims)}"
    )
  if any(size % 16 or size > _MAX_ROW_BYTES for size in sizes):
    return (
      f"a head's row must be a multiple of 16 bytes and at most"
      f" {_MAX_ROW_BYTES}, or have at most {_MAX_ODD_DIM} elements, and here"
      f" `head_dim` is {max(dims)}"
    )
  return None
