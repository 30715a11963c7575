"""Arguments of `decode_attention`, and what must come of them."""

from hypothesis import strategies as st
import numpy as np

from kernels import decode_attention as da
from tests.kernels.decode_attention import oracle
from tests.kernels.kv_cache import oracle as cache_oracle
from tests.testing import tolerances

FLOATS, QUANTIZED = cache_oracle.FLOATS, cache_oracle.QUANTIZED
random = cache_oracle.random

# What goes to the update, and what only attention takes.
UPDATE_OPTIONS = (
  "lengths", "layer", "layout", "ring", "k_scale", "v_scale", "block_table",
  "cache_batch_index",
)  # fmt: skip


def check(got, cache_k, cache_v, q, new_k, new_v, index, **kwargs):
  """Compares caches, result and logarithms of a call with the oracles."""
  layout = kwargs.get("layout", "bsnh")
  batch, tokens = q.shape[0], q.shape[2 if layout == "bnsh" else 1]
  index = np.broadcast_to(index, (batch,))
  counts = np.broadcast_to(kwargs.pop("lengths", tokens), (batch,))
  options = {k: v for k, v in kwargs.items() if k in UPDATE_OPTIONS}
  store_k = new_k
  rope = kwargs.get("rope_cos") is not None
  if rope:
    where = kwargs.get("rope_positions")
    if where is None:
      where = index
    if np.ndim(where) == 1:
      where = np.asarray(where)[:, None] + np.arange(tokens)
    kwargs["rope_positions"] = where
    if not kwargs.get("rope_cached_keys"):
      names = ("rope_cos", "rope_sin", "rope_interleaved", "layout")
      store_k = oracle.rotate_tokens(
        new_k, where, **{k: kwargs[k] for k in names if k in kwargs}
      )
      if cache_k.dtype.name in FLOATS:
        store_k = store_k.astype(cache_k.dtype)
  want = cache_oracle.update(
    cache_k, cache_v, store_k, new_v, index, lengths=counts, **options
  )
  for cache, expected in zip(got[:2], want):
    assert cache.dtype == expected.dtype
    # The rotation is done in float32, and XLA divides by a constant scale by
    # multiplying: the last bit may round differently.
    close = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3, "int8": 1.1}
    tolerance = close.get(cache.dtype.name, 0.3)
    if not rope and cache.dtype.name in FLOATS:
      tolerance = 0.0
    np.testing.assert_allclose(
      np.asarray(cache, np.float32), np.asarray(expected, np.float32),
      rtol=tolerance, atol=tolerance,
    )  # fmt: skip
  out, lse, *_ = oracle.attend(
    *(np.asarray(c).astype(np.float32) for c in got[:2]), q, index, counts,
    **{k: v for k, v in kwargs.items() if k != "lengths"},
  )  # fmt: skip
  assert got[2].dtype == q.dtype
  tolerances.assert_close(got[2], out, q.dtype, reduced=4, what="out")
  if len(got) > 3:
    finite = np.isfinite(lse)
    np.testing.assert_array_equal(np.isfinite(got[3]), finite)
    tolerances.assert_close(
      np.asarray(got[3])[finite], lse[finite], "float32", reduced=64,
      scale=10.0, what="lse",
    )  # fmt: skip


def arguments(
  seed=0, b=3, s=24, t=1, n=2, g=2, h=20, dtype="float32", layout="bsnh"
):
  rng = np.random.default_rng(seed)
  order = (lambda x, y: (x, y)) if layout == "bsnh" else (lambda x, y: (y, x))
  kind = "float32" if dtype in QUANTIZED else dtype
  return tuple(
    random(rng, (b, *order(length, heads), h), of)
    for length, heads, of in (
      (s, n, dtype), (s, n, dtype), (t, n * g, kind), (t, n, kind), (t, n, kind)
    )
  )  # fmt: skip


@st.composite
def problems(draw):
  """Any combination of features that makes sense."""
  layout = draw(st.sampled_from(("bsnh", "bnsh")))
  dtype = draw(st.sampled_from(FLOATS + QUANTIZED))
  kind = draw(st.sampled_from(FLOATS)) if dtype in QUANTIZED else dtype
  b, n, g = (draw(st.integers(1, top)) for top in (3, 3, 9))
  t = draw(st.sampled_from((1, 1, 2, 5)))
  s = draw(st.integers(t, 70))
  h, h_v = draw(st.sampled_from(((64, 64), (20, 20), (33, 7), (16, 40))))
  addressing = draw(st.sampled_from(("aligned", "rows", "paged")))
  layers = draw(st.sampled_from((None, 3)))
  rng = np.random.default_rng(draw(st.integers(0, 2**31)))
  flags = {
    name: draw(st.booleans())
    for name in (
      "ring", "lengths", "left_padding", "window", "chunk", "softcap",
      "alibi_slopes", "bias", "mask", "sinks", "qv", "rope", "not_causal",
    )
  }  # fmt: skip
  rows = b if addressing == "aligned" else b * 3 + 1
  kwargs = {"layout": layout}
  capacity = s
  if addressing == "rows":
    kwargs["cache_batch_index"] = rng.permutation(rows)[:b].astype(np.int32)
  elif addressing == "paged":
    kwargs["block_table"] = (
      rng.permutation(rows)[: b * 3].reshape(b, 3).astype(np.int32)
    )
    capacity = 3 * s
  if layers is not None:
    kwargs["layer"] = draw(st.integers(0, layers - 1))
  if flags["not_causal"] and not flags["ring"]:
    kwargs["causal"] = False
  if flags["window"]:
    kwargs["window"] = draw(st.sampled_from((1, 7, (3, 2), (-1, 1))))
  if flags["ring"]:
    if t == 1 or capacity - t + 1 >= 1:
      kwargs["ring"] = True
      kwargs["window"] = draw(st.integers(1, max(1, capacity - t + 1)))
  index = rng.integers(
    0, (4 * capacity if "ring" in kwargs else capacity - t) + 1, b
  )
  if flags["lengths"]:
    kwargs["lengths"] = rng.integers(0, t + 1, b).astype(np.int32)
  if flags["left_padding"]:
    kwargs["left_padding"] = rng.integers(0, 5, b).astype(np.int32)
  if flags["chunk"]:
    kwargs["chunk"] = draw(st.integers(1, 20))
  if flags["softcap"]:
    kwargs["softcap"] = 2.0
  if flags["alibi_slopes"]:
    shape = draw(st.sampled_from(((n * g,), (b, n * g))))
    kwargs["alibi_slopes"] = rng.uniform(0, 0.5, shape).astype(np.float32)
  full = (b, n * g, t, capacity)
  for name in ("bias", "mask"):
    if flags[name]:
      shape = [size if draw(st.booleans()) else 1 for size in full]
      value = rng.normal(size=shape).astype(np.float32)
      kwargs[name] = value > -0.5 if name == "mask" else value
  if flags["sinks"]:
    kwargs["sinks"] = rng.normal(size=n * g).astype(np.float32)
  if flags["rope"]:
    pairs = draw(st.sampled_from((h // 2, max(1, h // 4))))
    cos, sin = da.rope_tables(5 * capacity + 8, 2 * pairs)
    kwargs |= {"rope_cos": np.asarray(cos), "rope_sin": np.asarray(sin)}
    kwargs["rope_interleaved"] = draw(st.booleans())
    kwargs["rope_cached_keys"] = draw(st.booleans())
    if draw(st.booleans()):
      kwargs["rope_positions"] = rng.integers(0, 9, (b, t)).astype(np.int32)
  if dtype in QUANTIZED:
    shape = draw(st.sampled_from(((), (n,), (b, n))))
    for name in ("k_scale", "v_scale"):
      kwargs[name] = rng.uniform(0.01, 0.05, shape).astype(np.float32)
  lead = () if layers is None else (layers,)
  order = (lambda x, y: (x, y)) if layout == "bsnh" else (lambda x, y: (y, x))
  args = [
    random(rng, (*lead, rows, *order(s, n), dim), dtype) for dim in (h, h_v)
  ] + [
    random(rng, (b, *order(t, heads), dim), kind)
    for heads, dim in ((n * g, h), (n, h), (n, h_v))
  ]
  if flags["qv"]:
    kwargs["qv"] = random(rng, (b, *order(t, n * g), h_v), kind)
  return args, index.astype(np.int32), kwargs
