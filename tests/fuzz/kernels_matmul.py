"""A fuzzer of `kernels.matmul`, gradients included."""

from typing import Any

import jax
import numpy as np

import kernels
from tests.fuzz import kernels_data as data
from tests.fuzz import worker

pick, chance = data.pick, data.chance


def matmul(rng: np.random.Generator) -> worker.Case:
  """A program of a product."""
  rows = tuple(
    int(size)
    for size in rng.integers(1, pick(rng, 3, 5, 40), rng.integers(0, 3))
  )
  k = int(rng.integers(1, pick(rng, 8, 70, 600)))
  n = int(rng.integers(1, pick(rng, 8, 70, 3000)))
  dtypes = [pick(rng, *data.FLOATS) for _ in range(3)]
  biased, gradient = chance(rng), chance(rng, 0.3)
  transposed = chance(rng)
  options = {
    "preferred_element_type": pick(rng, None, None, *data.FLOATS),
    "implementation": pick(rng, "cpu", "cpu", "cpu", "auto"),
  }

  def call(x, w, bias):
    w = w.T if transposed else w
    return kernels.matmul(x, w, bias, transposed=transposed, **options)

  def grads(x, w, bias, dy):
    out, pull = jax.vjp(call, x, w, bias)
    return out, pull(dy)

  compiled, both = jax.jit(call), jax.jit(grads)

  def case(rng: np.random.Generator) -> None:
    size = data.some_size(rng, dtypes[0]) if not gradient else 1.0
    if options["implementation"] == "auto" and not 2.0**-15 < size < 2.0**9:
      # XLA takes subnormal numbers for zero, and rounds the product before it
      # adds the bias: infinite ones of both signs make NaN.
      size = 1.0
    x = data.normal(rng, (*rows, k), dtypes[0], size)
    w = data.normal(rng, (k, n), dtypes[1])
    bias = data.normal(rng, (n,), dtypes[2], size) if biased else None
    x64, w64 = x.astype(np.float64), w.astype(np.float64)
    want = x64 @ w64
    most = np.abs(x64) @ np.abs(w64)
    if bias is not None:
      want = want + bias.astype(np.float64)
      most = most + np.abs(bias.astype(np.float64))
    error = 2.0**-24 * (2 + k**0.5) * 2 * most + 2.0**-149 * k
    with data.some_level(rng):
      got = jax.block_until_ready(compiled(x, w, bias))
      if options["implementation"] == "auto":
        # XLA rounds the product before it adds the bias.
        error = error + most * 2 * data.tolerances.eps(got.dtype)
      data.assert_near(got, want, error)
      if not gradient:
        return
      dy = data.normal(rng, want.shape, "float32").astype(got.dtype)
      _, (dx, dw, dbias) = both(x, w, bias, dy)
    dy64 = dy.astype(np.float64)
    flat, dflat = x64.reshape(-1, k), dy64.reshape(-1, n)
    for name, one, of, scale, summed in (
      ("dx", dx, dy64 @ w64.T, np.abs(dy64) @ np.abs(w64.T), n),
      ("dw", dw, flat.T @ dflat, np.abs(flat.T) @ np.abs(dflat), len(flat)),
    ):
      # XLA may round both factors and the product.
      eps = max(data.tolerances.eps(a.dtype) for a in (x, w, got))
      data.assert_near(one, of, scale * eps * (2 + summed**0.5), name)
    if dbias is not None:
      eps = max(data.tolerances.eps(a.dtype) for a in (bias, got))
      each = np.abs(dflat).sum(0) * eps * (2 + len(dflat) ** 0.5)
      data.assert_near(dbias, dflat.sum(0), each, "dbias")

  return case


def packed(rng: np.random.Generator) -> worker.Case:
  """A program of a product with packed weights."""
  kind: dict[str, Any] = {
    "bits": pick(rng, 8, 4), "group": pick(rng, None, 32, 64, 128),
  }  # fmt: skip
  if kind["bits"] == 8 and chance(rng, 0.3):
    kind["dtype"] = "float8_e4m3fn"
  unit = kind["group"] or 8
  k, n = unit * int(rng.integers(1, 6)), int(rng.integers(1, pick(rng, 9, 900)))
  rows = int(rng.integers(1, pick(rng, 3, 40)))
  dtype = pick(rng, *data.FLOATS)
  biased = chance(rng)
  compiled = jax.jit(lambda *args: kernels.matmul(*args, implementation="cpu"))

  def case(rng: np.random.Generator) -> None:
    x = data.normal(rng, (rows, k), dtype)
    w = kernels.matmul.quantize(
      data.normal(rng, (k, n), "float32", pick(rng, 1.0, 2.0**-20, 2.0**9)),
      **kind,
    )
    bias = data.normal(rng, (n,), dtype) if biased else None
    x64 = x.astype(np.float64)
    w64 = np.asarray(kernels.matmul.dequantize(w), np.float64)
    want = x64 @ w64 + (0 if bias is None else bias.astype(np.float64))
    # What is added to a number of 4 bits to read it is as large as the number.
    step = np.repeat(np.asarray(w.scale, np.float64), w.group, 0)
    most = np.abs(x64) @ (np.abs(w64) + 48 * step * (w.bits == 4))
    most += np.abs(want)
    with data.some_level(rng):
      got = jax.block_until_ready(compiled(x, w, bias))
    data.assert_near(got, want, 2.0**-24 * (4 + k**0.5) * 2 * most)

  return case


FAMILIES = {"matmul": matmul, "packed_matmul": packed}
