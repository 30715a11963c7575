"""A fuzzer of `decode_attention` and `attend`, with all their options."""

from typing import Any, NamedTuple

import jax
import numpy as np

from kernels import decode_attention as da
from tests.fuzz import kernels_cache, worker
from tests.fuzz import kernels_data as data
from tests.kernels.decode_attention import oracle
from tests.kernels.kv_cache import oracle as cache_oracle

pick, chance = data.pick, data.chance

# What goes to the update, and what only attention takes.
UPDATE_OPTIONS = (
  "layer", "layout", "ring", "k_scale", "v_scale", "block_table",
  "cache_batch_index",
)  # fmt: skip


class Problem(NamedTuple):
  """What a program is compiled for.

  Attributes:
    appends: Whether it is `decode_attention`, else `attend`.
    dtype: Of the caches.
    kind: Of queries and new rows.
    b: Sequences.
    s: Slots of a row or block.
    t: Query tokens.
    n: Heads of the caches.
    g: Query heads of each.
    h: Of keys.
    h_v: Of values.
    addressing: "aligned", "rows" or "paged".
    m: Blocks of a sequence.
    rows: Rows or blocks of the cache.
    layers: Or None.
    static: Options that are not arrays.
    operands: Names of those that are.
    shapes: Of some of those.
  """

  appends: bool
  dtype: str
  kind: str
  b: int
  s: int
  t: int
  n: int
  g: int
  h: int
  h_v: int
  addressing: str
  m: int
  rows: int
  layers: int | None
  static: dict[str, Any]
  operands: tuple[str, ...]
  shapes: dict[str, tuple[int, ...]]

  @property
  def capacity(self) -> int:
    return self.s * (self.m if self.addressing == "paged" else 1)

  @property
  def layout(self) -> str:
    return self.static["layout"]


def draw_problem(rng: np.random.Generator) -> Problem:
  """Draws any combination of options that makes sense."""
  dtype = pick(rng, *data.FLOATS, *data.FLOATS, *data.QUANTIZED)
  kind = pick(rng, *data.FLOATS) if dtype in data.QUANTIZED else dtype
  appends = chance(rng, 0.7)
  b, n = int(rng.integers(1, 4)), int(rng.integers(1, 4))
  g = int(pick(rng, 1, 1, 2, 4, 5, 8, 9))
  t = int(pick(rng, 1, 1, 1, 2, 5, 17))
  s = int(pick(rng, rng.integers(1, 20), rng.integers(1, 80), 64, 200))
  h = int(pick(rng, 1, 7, 16, 20, 33, 64, 64, 128, rng.integers(1, 140)))
  h_v = int(pick(rng, h, h, h, 7, 40, rng.integers(1, 140)))
  addressing = pick(rng, "aligned", "aligned", "rows", "paged")
  m = int(rng.integers(1, 5))
  layers = pick(rng, None, None, 3)
  if b * n * g * t * s * (h + h_v) > 2**18 and chance(rng, 0.9):
    b, n, g, t = 1, int(pick(rng, 1, 2)), int(pick(rng, 1, 4, 5)), min(t, 5)
    m = min(m, 2)
  rows = b if addressing == "aligned" else b * m + int(rng.integers(1, 3))
  capacity = s * m if addressing == "paged" else s
  static: dict[str, Any] = {"layout": pick(rng, "bsnh", "bnsh")}
  ring = chance(rng, 0.25)
  if appends and t > capacity:
    t = 1
  if chance(rng, 0.4):
    static["window"] = pick(
      rng, 1, 3, 7, 30, (3, 2), (-1, 1), (0, 0), (5, -1), (-1, -1)
    )
  if ring:
    static["ring"] = True
    if t > 1 and appends:
      static["window"] = int(rng.integers(1, capacity - t + 2))
  if not ring and chance(rng, 0.3):
    static["causal"] = False
  if chance(rng, 0.2):
    static["chunk"] = int(rng.integers(1, 40))
  if chance(rng, 0.25):
    static["softcap"] = pick(rng, 0.5, 2.0, 30.0)
  if chance(rng, 0.25):
    static["scale"] = pick(rng, 0.0, 1.0, -0.3, 0.05)
  static["out_dtype"] = pick(rng, None, None, *data.FLOATS)
  operands = [
    name
    for name in (
      "lengths", "left_padding", "alibi_slopes", "bias", "mask", "sinks", "qv",
      "rope",
    )
    if chance(rng, 0.25)
  ]  # fmt: skip
  full = (b, n * g, t, capacity)
  shapes = {
    name: tuple(size if chance(rng) else 1 for size in full)
    for name in ("bias", "mask")
  }
  shapes["alibi_slopes"] = pick(rng, (n * g,), (b, n * g))
  shapes["scales"] = pick(rng, (), (n,), (b, n))
  if "rope" in operands:
    pairs = pick(rng, h // 2, max(h // 4, 0))
    if pairs < 1:
      operands.remove("rope")
    shapes["rope"] = (int(pick(rng, 5 * capacity + 20, 3)), pairs)
    static["rope_interleaved"] = chance(rng)
    static["rope_cached_keys"] = chance(rng, 0.4)
    if chance(rng):
      operands.append("rope_positions")
      shapes["rope_positions"] = pick(rng, (b,), (b, t))
  if "rope" not in operands:
    for name in ("rope_interleaved", "rope_cached_keys"):
      static.pop(name, None)
    operands = [name for name in operands if name != "rope_positions"]
  return Problem(
    appends, dtype, kind, b, s, t, n, g, h, h_v, addressing, m, rows, layers,
    static, tuple(operands), shapes,
  )  # fmt: skip


def draw_arrays(
  rng: np.random.Generator, problem: Problem, known: bool = False
) -> tuple[list[np.ndarray], np.ndarray, dict[str, Any]]:
  """Draws operands: the arrays, `index`, and the keywords.

  Args:
    rng: Draws them.
    problem: Their shapes.
    known: Whether positions must lie in the cache, as where they are known.
  """
  p, b, t, capacity = problem, problem.b, problem.t, problem.capacity
  lead = () if p.layers is None else (p.layers,)
  sizes = [pick(rng, 1.0, 1.0, 0.1, 4.0), data.some_size(rng, p.kind)]
  if sizes[1] > 2.0**20:
    sizes[1] = 2.0**8
  # Keys of a common size, values of any: no sum overflows.
  args = [
    data.normal(
      rng,
      (*lead, *data.shaped(p.layout, p.rows, p.s, p.n, dim)),
      p.dtype,
      1.0 if p.dtype in data.QUANTIZED else size,
    )
    for dim, size in ((p.h, sizes[0]), (p.h_v, sizes[1]))
  ]
  args.append(
    data.normal(rng, data.shaped(p.layout, b, t, p.n * p.g, p.h), p.kind)
  )
  if p.appends:
    args += [
      data.normal(rng, data.shaped(p.layout, b, t, p.n, dim), p.kind, size)
      for dim, size in ((p.h, sizes[0]), (p.h_v, sizes[1]))
    ]
  first = 0 if p.appends else t
  last = capacity - t if p.appends else capacity
  index = rng.integers(min(first, last), max(last, first) + 1, b)
  if "ring" in p.static:
    index = rng.integers(first, 4 * capacity + first + 1, b)
  elif not known and chance(rng, 0.2):
    index = rng.integers(-t - 2, capacity + t + 3, b)
  elif not p.appends and chance(rng, 0.2):
    index = rng.integers(0, capacity + 1, b)
  if known and not p.appends:
    index = np.minimum(index, capacity)
  kwargs = kernels_cache.draw_address(rng, b, p.addressing, p.rows, p.m)
  if known:
    kwargs = {k: v.clip(0, p.rows - 1) for k, v in kwargs.items()}
  if p.layers is not None:
    kwargs["layer"] = np.int32(rng.integers(0, p.layers))
  if p.dtype in data.QUANTIZED:
    kwargs |= {
      name: rng.uniform(0.01, 0.05, p.shapes["scales"]).astype(np.float32)
      for name in ("k_scale", "v_scale")
    }
  heads = p.n * p.g
  draws = {
    "lengths": lambda: rng.integers(0, t + 1, b).astype(np.int32),
    "left_padding": lambda: rng.integers(0, 9, b).astype(np.int32),
    "alibi_slopes": lambda: np.float32(
      rng.uniform(0, 0.5, p.shapes["alibi_slopes"])
    ),
    "bias": lambda: _bias(rng, p.shapes["bias"]),
    "mask": lambda: rng.random(p.shapes["mask"]) < pick(rng, 0.1, 0.7, 1.0),
    "sinks": lambda: data.normal(rng, (heads,), "float32"),
    "qv": lambda: data.normal(
      rng, data.shaped(p.layout, b, t, heads, p.h_v), p.kind
    ),
    "rope_positions": lambda: rng.integers(
      0, p.shapes["rope"][0], p.shapes["rope_positions"]
    ).astype(np.int32),
  }
  for name in p.operands:
    if name == "rope":
      angles = rng.uniform(-4, 4, p.shapes["rope"])
      kwargs["rope_cos"] = np.cos(angles).astype(np.float32)
      kwargs["rope_sin"] = np.sin(angles).astype(np.float32)
    else:
      kwargs[name] = draws[name]()
  return args, index.astype(np.int32), kwargs


def _bias(rng, shape):
  bias = data.normal(rng, shape, "float32")
  if chance(rng, 0.3):
    bias[rng.random(shape) < 0.5] = -np.inf  # as good as a mask
  return bias


def _rotation(problem, index, counts, kwargs):
  """Says at which rows of the tables the tokens are, `[b, t]`."""
  first = index if problem.appends else index - counts
  where = kwargs.pop("rope_positions", first)
  if where.ndim == 1:
    where = where[:, None] + np.arange(problem.t)
  return where.clip(0, len(kwargs["rope_cos"]) - 1)


def _check_caches(problem, args, got, index, counts, kwargs):
  cache_k, cache_v, _, new_k, new_v = args
  p = problem
  rope = "rope_cos" in kwargs and not p.static.get("rope_cached_keys")
  if rope:
    where = kwargs["rope_positions"]
    axis = 1 if p.layout == "bnsh" else 2
    new_k = oracle.rotate(
      new_k,
      *(
        np.expand_dims(np.float64(kwargs[name])[where], axis)
        for name in ("rope_cos", "rope_sin")
      ),
      p.static["rope_interleaved"],
    )
    if p.dtype in data.FLOATS:
      new_k = new_k.astype(cache_k.dtype)
  options = {
    name: value
    for name, value in (p.static | kwargs).items()
    if name in UPDATE_OPTIONS
  }
  want = cache_oracle.update(
    cache_k, cache_v, new_k, new_v, index, lengths=counts, **options
  )
  for name, cache, expected in zip(("cache_k", "cache_v"), got, want):
    cache = np.asarray(cache)
    if name == "cache_v" or not rope:
      if p.dtype in data.FLOATS:
        data.assert_same(cache, expected, name)
        continue
    # What is rotated, or multiplied with an inverse, may round differently.
    steps = {"float32": 4e-7, "bfloat16": 8e-3, "float16": 1e-3, "int8": 0.0}
    relative = steps.get(p.dtype, 0.26)
    floor = {"int8": 1.1, "float8_e4m3fn": 2.0**-9, "float8_e5m2": 2.0**-16}
    largest = np.abs(np.asarray(new_k, np.float64)).max(initial=0)
    data.assert_near(
      cache.astype(np.float32),
      np.asarray(expected).astype(np.float64),
      np.abs(np.asarray(expected).astype(np.float64)) * relative
      + floor.get(p.dtype, 4e-7 * largest),
      name,
    )


def check(
  problem: Problem,
  args: list[np.ndarray],
  index: np.ndarray,
  kwargs: dict[str, Any],
  got: Any,
) -> None:
  """Compares a call's results with the oracles."""
  p, kwargs = problem, dict(kwargs)
  counts = kwargs.pop("lengths", np.full(p.b, p.t, np.int32))
  if "rope_cos" in kwargs:
    kwargs["rope_positions"] = _rotation(p, index, counts, kwargs)
  caches, (out, lse) = list(args[:2]), got[-2:]
  if p.appends:
    _check_caches(p, args, got[:2], index, counts, kwargs)
    caches = [np.asarray(cache) for cache in got[:2]]
  static = {k: v for k, v in p.static.items() if k != "out_dtype"}
  want = oracle.attend(
    *caches, args[2], index if p.appends else index - counts, counts,
    **static, **kwargs,
  )  # fmt: skip
  expected = p.static["out_dtype"] or p.kind
  assert out.dtype == data.dtype_of(expected), f"{out.dtype} is not {expected}"
  # Of a logit: each of its products is rounded, and so are their sums.
  logit = 2.0**-23 * (want.size * (4 + p.h**0.5) + 4) + data.TINY
  data.assert_near(
    out, want.out,
    want.largest * (2.5 * logit + 2.0**-23 * (8 + p.capacity**0.5)) + data.TINY,
    "out",
  )  # fmt: skip
  finite = np.isfinite(want.lse)
  lse = np.asarray(lse)
  assert (np.isfinite(lse) == finite).all(), f"lse {lse} is not {want.lse}"
  assert np.isneginf(lse[~finite]).all(), f"lse {lse} is not {want.lse}"
  data.assert_near(
    lse[finite], want.lse[finite],
    logit + 2.0**-20 * (1 + np.abs(want.lse[finite])), "lse",
  )  # fmt: skip


def _hide(rng, problem, args, index, kwargs):
  """Fills with NaN what no query may see: slots past the last token."""
  p = problem
  if p.addressing == "paged" or p.dtype == "int8" or "ring" in p.static:
    return
  used = int(np.max(index)) + (p.t if p.appends else 0)
  axis = -3 if p.layout == "bsnh" else -2
  for cache in args[:2]:
    part = np.moveaxis(cache, axis, 0)
    part[max(used, 0) :] = np.nan


def attention(rng: np.random.Generator) -> worker.Case:
  """A program with some of the options, for many positions and numbers."""
  problem = draw_problem(rng)
  implementation = pick(rng, "cpu", "cpu", "cpu", "auto", "xla")
  function = da.decode_attention if problem.appends else da.attend
  known = chance(rng, 0.1)

  def call(args, index, kwargs):
    return function(
      *args, index, return_lse=True, implementation=implementation,
      **problem.static, **kwargs,
    )  # fmt: skip

  compiled = call if known else jax.jit(call)

  def case(rng: np.random.Generator) -> None:
    args, index, kwargs = draw_arrays(rng, problem, known)
    if known and "rope_cos" in kwargs:
      kwargs["rope_positions"] = np.zeros((problem.b, problem.t), np.int32)
    if chance(rng, 0.3):
      _hide(rng, problem, args, index, kwargs)
    given = jax.device_put((args, index, kwargs))
    with data.some_level(rng):
      got = jax.block_until_ready(compiled(*given))
    check(problem, args, index, kwargs, got)

  return case


FAMILIES = {"attention": attention}
