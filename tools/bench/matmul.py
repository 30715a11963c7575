"""Suite `matmul`: a few rows of activations times the weights of a decoder.

The shapes are those of matrices of SmolLM2-135M and of decoders of 1 and 8
billion parameters. Baselines are `jnp.matmul` in the dtype of the weights and
in float32, and PyTorch's where it is installed; for packed weights, unpacking
and multiplying in one jitted function. Rows `transposed` multiply with tables
of embeddings as they lie, as for logits.
"""

from collections.abc import Callable, Sequence
import functools
import importlib.util
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp
import numpy as np

import kernels
from kernels.matmul import arg_specs
from tools.bench import choice, compare, harness

NAME = "matmul"
_ROWS = (1, 4, 8, 32)
_FLOATS = ("float32", "bfloat16", "float16")
_PACKED: dict[str, dict[str, Any]] = {
  "int8": {"bits": 8},
  "int4": {"bits": 4},
  "float8_e4m3fn": {"dtype": "float8_e4m3fn"},
}
_QUICK_SHAPES = ((576, 192),)

# The sides round x, w and the result to half precision, or do not.
_TOLERANCE = compare.NormTolerance(1e-2)


def _side(
  name: str, product: Callable[..., Any], *operands: Any
) -> harness.Side:
  """Makes a side of a jitted product."""
  compiled = jax.jit(product)
  return harness.Side(
    name=name,
    fresh=lambda: operands,
    call=lambda state: compiled(*state),
    observe=lambda state, result: result.astype(jnp.float32),
  )


def _torch_side(x: jax.Array, w: jax.Array) -> harness.Side:
  """Makes a side that multiplies with PyTorch, which keeps w transposed."""
  import torch  # pyright: ignore[reportMissingImports]

  def to_torch(array: jax.Array) -> Any:
    values = torch.from_numpy(np.array(array, np.float32))
    return values.to(getattr(torch, array.dtype.name))

  operands = (to_torch(x), to_torch(w.T).contiguous())

  def product(state: Any) -> Any:
    with torch.inference_mode():
      return torch.nn.functional.linear(*state)

  return harness.Side(
    name="torch linear",
    fresh=lambda: operands,
    call=product,
    observe=lambda state, result: jnp.asarray(result.float().numpy()),
  )


def _build(rows: int, shape: tuple[int, int], dtype: str) -> harness.Comparison:
  """Builds the row of some rows, a matrix and its dtype."""
  random = np.random.default_rng(0)
  k, n = shape
  x = jnp.asarray(random.standard_normal((rows, k), np.float32))
  w: Any = jnp.asarray(random.standard_normal(shape, np.float32) / k**0.5)
  if dtype in _PACKED:
    x = x.astype("bfloat16")
    w = kernels.matmul.quantize(w, **_PACKED[dtype])
    wide = kernels.matmul.dequantize(w)
    unpack = functools.partial(kernels.matmul, implementation="xla")
    baselines = [_side("unpack and jnp.matmul, jit", unpack, x, w)]
  else:
    x, w = x.astype(dtype), w.astype(dtype)
    wide = w.astype("float32")
    baselines = [_side(f"jnp.matmul, {dtype}", jnp.matmul, x, w)]
    if importlib.util.find_spec("torch") is not None:
      baselines.append(_torch_side(x, w))
  if dtype != "float32":
    baselines.append(
      _side("jnp.matmul, float32", jnp.matmul, x.astype("float32"), wide)
    )
  return harness.Comparison(
    ours=_side("kernels.matmul", kernels.matmul, x, w),
    baselines=baselines,
    floor_traffic=harness.Traffic(read=w.nbytes, written=0),
    floor_name="one read of the weights at memory bandwidth",
    tolerance=_TOLERANCE,
    details=choice.chosen(kernels.matmul, x, w),
  )


def _build_transposed(
  rows: int, shape: tuple[int, int], dtype: str
) -> harness.Comparison:
  """Builds the row of some rows and a table of embeddings, as for logits."""
  random = np.random.default_rng(0)
  n, k = shape
  x = jnp.asarray(random.standard_normal((rows, k), np.float32), dtype)
  w = jnp.asarray(random.standard_normal((n, k), np.float32) / k**0.5, dtype)
  ours = functools.partial(kernels.matmul, transposed=True)
  return harness.Comparison(
    ours=_side("kernels.matmul, transposed", ours, x, w),
    # Of one row in half precision XLA finds a quick program for the first of
    # these, and for the second, as layers write it, none.
    baselines=[
      _side(f"jnp.matmul, {dtype}", lambda x, w: jnp.matmul(x, w.T), x, w),
      _side(
        f"lax.dot_general, {dtype}",
        lambda x, w: lax.dot_general(x, w, (((1,), (1,)), ((), ()))),
        x,
        w,
      ),
    ],
    floor_traffic=harness.Traffic(read=w.nbytes, written=0),
    floor_name="one read of the weights at memory bandwidth",
    tolerance=_TOLERANCE,
    details=choice.chosen(ours, x, w),
  )


def cases(settings: harness.Settings) -> Sequence[harness.Case]:
  """Returns the rows: every matrix, dtype and number of rows."""
  shapes = _QUICK_SHAPES if settings.quick else arg_specs.BENCH_SHAPES
  tables = _QUICK_SHAPES if settings.quick else arg_specs.TABLES
  products = [
    harness.Case(
      suite=NAME,
      op="product",
      case=f"{rows}x{k}x{n}",
      dtype=dtype,
      build=functools.partial(_build, rows, (k, n), dtype),
    )
    for k, n in shapes
    for dtype in (*_FLOATS, *_PACKED)
    for rows in _ROWS
  ]
  return products + [
    harness.Case(
      suite=NAME,
      op="transposed",
      case=f"{rows}x{k}x{n}",
      dtype=dtype,
      build=functools.partial(_build_transposed, rows, (n, k), dtype),
    )
    for n, k in tables
    for dtype in _FLOATS
    for rows in _ROWS
  ]
