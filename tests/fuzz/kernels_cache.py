"""A fuzzer of `kv_cache.update`: against the oracle, to the bit."""

from typing import Any

import jax
import numpy as np

from kernels import kv_cache
from tests.fuzz import kernels_data as data
from tests.fuzz import worker
from tests.kernels.kv_cache import oracle

pick, chance = data.pick, data.chance


def draw_address(
  rng: np.random.Generator, b: int, addressing: str, rows: int, m: int
) -> dict[str, np.ndarray]:
  """Draws which rows or blocks sequences have; some of none."""
  if addressing == "rows":
    table = rng.permutation(rows)[:b].astype(np.int32)
    return {"cache_batch_index": _some_outside(rng, table, rows)}
  if addressing == "paged":
    table = rng.permutation(rows)[: b * m].reshape(b, m).astype(np.int32)
    return {"block_table": _some_outside(rng, table, rows)}
  return {}


def _some_outside(rng, table, rows):
  if chance(rng, 0.6):
    return table
  outside = np.int32(pick(rng, -1, rows, data.INT32.min, data.INT32.max))
  return np.where(rng.random(table.shape) < 0.3, outside, table)


def draw_scales(
  rng: np.random.Generator, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
  """Draws the scales of a quantised cache."""
  return {
    name: np.exp(rng.normal(size=shape) - 4).astype(np.float32)
    for name in ("k_scale", "v_scale")
  }


def _positions(rng, b, t, capacity, ring, wide):
  """Draws positions; some where the cache has no slot."""
  kind = rng.integers(6)
  if kind < 3:
    index = rng.integers(0, max(capacity - t, 0) + 1, b)
  elif kind == 3:
    index = rng.integers(-t - 2, 3 * capacity + 3, b)
  elif kind == 4:
    index = rng.integers(0, 2**31 - t - 1, b)
  else:
    far = (-(2**31), 2**31 - 1) if not wide else (-(2**63), 2**63 - 1)
    index = rng.choice(
      [*far, far[0] + 1, far[1] - t + 1, far[1] - t, *([2**32 + 1] * wide)], b
    )
    if ring:
      # Where a ring's positions end is for the implementations to agree on.
      index = np.abs(index) % (2**31 - t - 1)
  return index.astype(np.int64 if wide else np.int32)


# XLA divides by multiplying with the inverse, which is rounded.
_INVERSE = np.float32(2.0**-22)


def _scaled(kwargs, factor):
  return {
    name: np.float32(kwargs[name] * factor) for name in ("k_scale", "v_scale")
  }


def update(rng: np.random.Generator) -> worker.Case:
  """A program of `update`, of one shape, for many positions and numbers."""
  layout, ring = pick(rng, "bsnh", "bnsh"), chance(rng, 0.3)
  dtype = pick(rng, *data.FLOATS, *data.QUANTIZED)
  kind = pick(rng, *data.FLOATS) if dtype in data.QUANTIZED else dtype
  b, n = int(rng.integers(0, 5)), int(rng.integers(1, 4))
  s, t = int(rng.integers(1, 20)), int(pick(rng, 1, 1, 2, 3, 7))
  h = int(pick(rng, 1, 2, 7, 16, 33, 64, 130, rng.integers(1, 140)))
  h_v = int(pick(rng, h, h, 5, rng.integers(1, 70)))
  addressing = pick(rng, "aligned", "aligned", "rows", "paged")
  m = int(rng.integers(1, 4))
  layers = pick(rng, None, None, 1, 3)
  scale_shape = pick(rng, (), (n,), (b, n))
  lengths = pick(rng, None, "scalar", "all")
  scalar_index = chance(rng, 0.2)
  implementation = pick(rng, "cpu", "cpu", "cpu", "auto", "xla")
  wide, eager = chance(rng, 0.15), chance(rng, 0.1)
  rows = b if addressing == "aligned" else b * m + int(rng.integers(1, 3))
  capacity = s * m if addressing == "paged" else s
  lead = () if layers is None else (layers,)

  def call(caches, new, index, kwargs):
    return kv_cache.update(
      *caches, *new, index, layout=layout, ring=ring,
      implementation=implementation, **kwargs,
    )  # fmt: skip

  def wanted(args, index, kwargs):
    if layers is not None and not 0 <= kwargs["layer"] < layers:
      return args[:2]
    return oracle.update(*args, index, layout=layout, ring=ring, **kwargs)

  compiled = jax.jit(call, donate_argnums=(0,) * chance(rng))

  def case(rng: np.random.Generator) -> None:
    draw = pick(rng, data.normal, data.normal, data.any_bits)
    args: list[Any] = [
      draw(rng, (*lead, *data.shaped(layout, rows, s, n, dim)), dtype)
      for dim in (h, h_v)
    ]
    for dim in (h, h_v):
      shape = data.shaped(layout, b, t, n, dim)
      if draw is data.any_bits and dtype not in data.QUANTIZED:
        args.append(data.any_bits(rng, shape, kind))
      else:
        size = data.some_size(rng, kind)
        args.append(data.normal(rng, shape, kind, size))
    index = _positions(rng, b, t, capacity, ring, wide)
    if eager:
      index = index.clip(0, max(capacity - t, 0))
    if scalar_index:
      index = index.dtype.type(index[0] if b else 0)
    kwargs: dict[str, Any] = draw_address(rng, b, addressing, rows, m)
    if eager:
      kwargs = {k: v.clip(0, rows - 1) for k, v in kwargs.items()}
      if t > capacity and not ring:
        return
    if layers is not None:
      kwargs["layer"] = np.int32(
        pick(rng, *range(layers), *((-1, layers, 2**31 - 1) * (not eager)))
      )
    if lengths == "scalar":
      kwargs["lengths"] = np.int32(rng.integers(0, t + 1))
    elif lengths:
      kwargs["lengths"] = rng.integers(0, t + 1, b).astype(np.int32)
    if dtype in data.QUANTIZED:
      kwargs |= draw_scales(rng, scale_shape)
      if chance(rng, 0.2):
        # So that what is stored is of the size of the new rows' numbers.
        size = np.float32(np.abs(args[2].astype(np.float32)).max(initial=0))
        kwargs["k_scale"] = np.full(scale_shape, size / 100 + 1e-30, "f4")
    wants = [wanted(args, index, kwargs)]
    if implementation == "xla" and dtype in data.QUANTIZED:
      wants += [
        wanted(args, index, kwargs | _scaled(kwargs, 1 + sign * _INVERSE))
        for sign in (-1, 1)
      ]
    given = jax.device_put((args[:2], args[2:], index, kwargs))
    with data.some_level(rng):
      got = (call if eager else compiled)(*given)
      jax.block_until_ready(got)
    for name, a, w, *others in zip(("cache_k", "cache_v"), got, *wants):
      data.assert_same(a, w, name, others)

  def wide_case(rng: np.random.Generator) -> None:
    with jax.enable_x64(wide):
      case(rng)

  return wide_case


FAMILIES = {"update": update}
