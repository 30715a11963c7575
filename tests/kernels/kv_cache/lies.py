"""What the handlers of the cache update are lied to about."""

import functools

import jax.numpy as jnp
import numpy as np

from kernels import kv_cache
from kernels.kv_cache import reference
from tests.kernels.kv_cache import cases
from tests.testing import lies

OPERANDS = reference.OPERANDS
RESULTS = ("out_k", "out_v")
# A ring of 8 slots has no fewer; with the axes exchanged nothing fits.
VALUES = {"ring": (-1, 1, 7), "heads_first": (True,)}


def fits(dtype: str, name: str, wrong: lies.Type) -> bool:
  """Whether an array may have this type beside the one that it has."""
  if name == "table" and wrong.dtype == jnp.int32:
    # The width of a table is its own; without one, sequence i is row i.
    return wrong.shape[:1] == (3,) and len(wrong.shape) == 2
  scales = name in ("k_scale", "v_scale") and dtype in cases.QUANTIZED
  if scales and wrong.dtype == jnp.float32:
    # One for all sequences, or heads.
    return wrong.shape in ((3, 2), (3, 1), (1, 2), (1, 1))
  return name in ("index", "count", "layer") and wrong.shape == (1,)


def check(implementation: str, dtype: str, layout: str, paged: bool) -> int:
  """Lies about a call, in each way that there is; returns how often."""
  scales = {"k_scale": jnp.ones((3, 2)), "v_scale": 1.0}
  args = cases.arguments(b=3, s=8, t=5, n=2, h=20, dtype=dtype, layout=layout)
  update = functools.partial(
    kv_cache.update,
    layout=layout,
    implementation=implementation,
    lengths=jnp.array([1, 2, 0]),
    ring=not paged,
    block_table=jnp.zeros((3, 1), jnp.int32) if paged else None,
    **(scales if dtype in cases.QUANTIZED else {}),
  )
  [call] = lies.recorded(update, *args, jnp.zeros((3,), jnp.int32))
  heads_first = layout == "bnsh"
  values = VALUES | {"heads_first": (not heads_first,)}
  if paged:
    values["ring"] = (-1, np.iinfo(np.int64).min)
  return lies.check(
    call,
    operands=OPERANDS,
    results=RESULTS,
    values=values,
    fits=functools.partial(fits, dtype),
  )
