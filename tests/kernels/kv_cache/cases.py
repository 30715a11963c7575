"""Arguments of `kv_cache.update` for tests of its implementations."""

import functools

from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np

from kernels import kv_cache
from kernels.cache import layouts
from kernels.kv_cache import primitive
from tests.kernels.kv_cache import oracle

FLOATS, QUANTIZED, random = oracle.FLOATS, oracle.QUANTIZED, oracle.random


def bits(x):
  return np.asarray(x).view(np.uint8)


def jitted(implementation, **kwargs):
  return jax.jit(
    functools.partial(kv_cache.update, implementation=implementation, **kwargs)
  )


def arguments(seed=0, b=3, s=8, t=1, n=2, h=20, dtype="float32", layout="bsnh"):
  rng = np.random.default_rng(seed)
  cache = (b, s, n, h) if layout == "bsnh" else (b, n, s, h)
  new = (b, t, n, h) if layout == "bsnh" else (b, n, t, h)
  new_dtype = "float32" if dtype in QUANTIZED else dtype
  return tuple(
    random(rng, shape, kind)
    for shape, kind in ((cache, dtype),) * 2 + ((new, new_dtype),) * 2
  )


def assert_same(got, want):
  for g, w in zip(got, want, strict=True):
    assert g.dtype == w.dtype and g.shape == w.shape
    np.testing.assert_array_equal(bits(g), bits(w))


def check_parts(args, implementation, layout="bsnh", ring=False):
  """Updates the halves of a cache of 3 rows that is split along its length.

  A part has slots from `first_slot` on, and leaves the others alone.
  """
  axis = layout.index("s")
  slots, tokens = args[0].shape[axis], args[2].shape[axis]
  index = [2, slots // 2 - 1, slots - (1 if ring else tokens)]
  index = np.asarray(index, np.int32)
  ones = np.ones(3, np.int32)

  @jax.jit
  def update(first, *args):
    return primitive.UPDATE(
      *args, index, tokens * ones, 0 * ones,
      np.arange(3, dtype=np.int32)[:, None], first,
      layout=layouts.Layout(layout), ring=slots if ring else 0, aligned=True,
      uniform=(), implementation=implementation,
    )  # fmt: skip

  parts = []
  for first in (0, slots // 2):
    part = np.arange(first, first + slots // 2)
    caches = (jnp.take(cache, part, axis) for cache in args[:2])
    parts.append(update(np.int32(first), *caches, *args[2:]))
  got = [np.concatenate(halves, axis) for halves in zip(*parts)]
  assert_same(got, oracle.update(*args, index, layout=layout, ring=ring))


@st.composite
def problems(draw):
  """Any combination of features that makes sense."""
  layout = draw(st.sampled_from(("bsnh", "bnsh")))
  dtype = draw(st.sampled_from(FLOATS + QUANTIZED))
  b = draw(st.integers(0, 4))
  s, t, n, h = (draw(st.integers(1, top)) for top in (9, 6, 3, 37))
  h_v = draw(st.sampled_from((h, 5)))
  addressing = draw(st.sampled_from(("aligned", "rows", "paged")))
  layers = draw(st.sampled_from((None, 1, 3)))
  rng = np.random.default_rng(draw(st.integers(0, 2**31)))
  rows = b if addressing == "aligned" else b * 3 + 1
  kwargs = {"layout": layout, "ring": draw(st.booleans())}
  if addressing == "rows":
    kwargs["cache_batch_index"] = rng.permutation(rows)[:b].astype(np.int32)
  elif addressing == "paged":
    table = rng.permutation(rows)[: b * 3].reshape(b, 3).astype(np.int32)
    kwargs["block_table"] = np.where(rng.random((b, 3)) < 0.2, -1, table)
  if layers is not None:
    kwargs["layer"] = draw(st.integers(0, layers - 1))
  if draw(st.booleans()):
    kwargs["lengths"] = rng.integers(0, t + 1, b).astype(np.int32)
  if dtype in QUANTIZED:
    shape = draw(st.sampled_from(((), (n,), (b, n))))
    for name in ("k_scale", "v_scale"):
      kwargs[name] = np.exp(rng.normal(size=shape) - 4).astype(np.float32)
  lead = () if layers is None else (layers,)
  caches, new = [], []
  for dim in (h, h_v):
    cache = (rows, s, n, dim) if layout == "bsnh" else (rows, n, s, dim)
    row = (b, t, n, dim) if layout == "bsnh" else (b, n, t, dim)
    caches.append(random(rng, lead + cache, dtype))
    new.append(
      random(
        rng,
        row,
        dtype if dtype in FLOATS else draw(st.sampled_from(FLOATS)),
      )
    )
  new[1] = new[1].astype(new[0].dtype)
  # Some positions lie outside: they must write nothing.
  index = rng.integers(0 if kwargs["ring"] else -3, 3 * s + 3, b)
  return (*caches, *new, index.astype(np.int32)), kwargs
