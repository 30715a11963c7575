"""What the handlers of decode attention are lied to about."""

import functools

import jax.numpy as jnp

from kernels import decode_attention as da
from kernels.decode_attention import ffi
from tests.kernels.decode_attention import cases
from tests.testing import lies

_NAN, _INF = float("nan"), float("inf")
_TOO_LARGE = 2**31
VALUES = {
  "ring": (-1, 1),
  "window_left": (-2, _TOO_LARGE),
  "window_right": (-2, _TOO_LARGE),
  "chunk": (-1, _TOO_LARGE),
  "scale": (_NAN, _INF),
  "softcap": (-1.0, _NAN, _INF),
  "heads_first": (),
  "causal": (),
  "interleaved": (),
  "rotate_keys": (),
}
_FLOATS = tuple(map(jnp.dtype, cases.FLOATS))

# Sizes that are all different, where they can be.
_B, _S, _N, _T, _G, _H = 3, 9, 5, 6, 4, 16
_FULL = (_B, _N, _G, _T, _S)


def _fits(dtype: str, name: str, wrong: lies.Type) -> bool:
  """Whether an array may have this type beside the one that it has."""
  shape = wrong.shape
  if name == "out":
    return len(shape) == 5 and shape[-1] == _H and wrong.dtype in _FLOATS
  if name == "table":
    # The width of a table is its own where nothing goes over the slots.
    return shape[:1] == (_B,) and len(shape) == 2 and wrong.dtype == jnp.int32
  if name in ("k_scale", "v_scale"):
    fits = dtype in cases.QUANTIZED and shape in ((_B, 1), (1, _N), (1, 1))
    return fits and wrong.dtype == jnp.float32
  if name == "workspace":
    return len(shape) == 2 and (shape[0] == 0 or shape[1] > 2000)
  # What may be left out; and what there may be one of.
  return (name == "left_padding" and shape == (0,)) or (
    name in ("index", "count", "layer") and shape == (1,)
  )


def _options(dtype: str, many: bool) -> dict:
  """With `many`, each operand that there is but the table."""
  scales = {"k_scale": jnp.ones((_B, _N)), "v_scale": jnp.ones((_B, _N))}
  options = dict(scales) if dtype in cases.QUANTIZED else {}
  if not many:
    return options | {"block_table": jnp.zeros((_B, 2), jnp.int32)}
  cos, sin = da.rope_tables(11, _H)
  return options | {
    "lengths": jnp.ones((_B,), jnp.int32),
    "left_padding": jnp.zeros((_B,), jnp.int32),
    "alibi_slopes": jnp.ones((_B, _N * _G)),
    "sinks": jnp.ones((_N * _G,)),
    "bias": jnp.zeros((_B, _N * _G, _T, _S)),
    "mask": jnp.ones((_B, 1, _T, 1), bool),
    "rope_cos": cos,
    "rope_sin": sin,
    "rope_positions": jnp.zeros((_B, _T), jnp.int32),
    "window": (3, 2),
    "chunk": 4,
    "softcap": 2.0,
  }


def check(
  implementation: str, dtype: str, layout: str, many: bool, appends: bool
) -> int:
  """Lies about a call, in each way that there is; returns how often.

  Args:
    implementation: Which one.
    dtype: Of the cache.
    layout: "bsnh" or "bnsh".
    many: Whether to give every operand that may be left out, or none.
    appends: Whether the call appends.
  """
  *caches, q, new_k, new_v = cases.arguments(
    b=_B, s=_S, t=_T, n=_N, g=_G, h=_H, dtype=dtype, layout=layout
  )
  options = {
    "layout": layout, "implementation": implementation, "return_lse": True,
    **_options(dtype, many),
  }  # fmt: skip
  if many:
    shape = (_B, _N * _G, _T, _H) if layout == "bnsh" else q.shape
    options["qv"] = jnp.ones(shape, q.dtype)
  index = jnp.zeros((_B,), jnp.int32)
  if appends:
    fn = functools.partial(da.decode_attention, **options)
    [call] = lies.recorded(fn, *caches, q, new_k, new_v, index)
  else:
    fn = functools.partial(da.attend, **options)
    [call] = lies.recorded(fn, *caches, q, index)
  new = ("new_k", "new_v") if appends else ()
  results = (("out_k", "out_v") if appends else ()) + ("out", "lse")
  if len(call.results) > len(results):
    results += ("workspace",)
  values = VALUES | {"heads_first": (layout != "bnsh",)}
  if not many:  # without rotary embedding, and in 18 slots
    values |= {"interleaved": (True,), "rotate_keys": (True,), "ring": (-1, 17)}
  return lies.check(
    call,
    operands=("cache_k", "cache_v", *new, *ffi.OPERANDS),
    results=results,
    values=values,
    fits=functools.partial(_fits, dtype),
  )
