"""Lists what is measured on a GPU: the three ops, at sizes that fill one.

Every row says how many bytes must move. What is over sooner than a program
starts is called for several layers in one program, as a model does, each with
arrays of its own.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
from jax import numpy as jnp
import numpy as np

from kernels import batch_stat, decode_attention, kv_cache

Arrays = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Row:
  """What to measure.

  Attributes:
    name: `op/case/dtype`.
    moved: bytes that must be read or written.
    arguments: makes the arrays, for an implementation.
    call: `call(implementation, *arrays) -> arrays`, the donated ones first.
    donated: which arrays it donates.
    layers: how many of it one program has; times are those of one.
    steps: how often `call` does it, one after the other; times are those of
      one.
    baselines: further ways to do the same, as `call` without its first
      argument; left out where they do not run.
    others: the same of what computes something else.
    torch: makes what PyTorch does of so many layers, by name.
  """

  name: str
  moved: int
  arguments: Callable[[str], Arrays]
  call: Callable[..., Arrays]
  donated: tuple[int, ...] = ()
  layers: int = 1
  steps: int = 1
  baselines: dict[str, Callable[..., Arrays]] = dataclasses.field(
    default_factory=dict
  )
  others: dict[str, Callable[..., Arrays]] = dataclasses.field(
    default_factory=dict
  )
  torch: Callable[[int], dict[str, Callable[[], Any]]] | None = None


def _normal(shape: Sequence[int], dtype: str, seed: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), tuple(shape), dtype)


_BATCHES: tuple[tuple[tuple[int, ...], str, int, bool], ...] = (
  # Shape, dtype, feature axis, whether with a residual as well.
  ((256, 56, 56, 256), "bfloat16", -1, True),
  ((128, 112, 112, 64), "float32", -1, True),
  ((64, 56, 56, 256), "float16", -1, False),
  ((128, 256, 56, 56), "float32", 1, False),
  ((128, 256, 56, 56), "bfloat16", 1, True),
  ((65536, 1024), "float32", -1, False),
  ((32, 28, 28, 512), "float32", -1, True),
  ((32, 7, 7, 2048), "bfloat16", -1, True),
)


def _update(axis, implementation, mean, var, x):
  return batch_stat.update(
    x, mean, var, 0.9, feature_axis=axis, implementation=implementation
  )


def _forward(axis, implementation, mean, var, x, scale, bias):
  return batch_stat.batch_norm(
    x, scale, bias, mean, var, 0.9,
    feature_axis=axis, activation="relu", implementation=implementation,
  )[:3]  # fmt: skip


def _residual(axis, implementation, mean, var, x, scale, bias, residual):
  """Runs a layer at the end of a residual block."""
  *averages, y = batch_stat.batch_norm(
    x, scale, bias, mean, var, 0.9,
    feature_axis=axis, implementation=implementation,
  )[:3]  # fmt: skip
  return *averages, jax.nn.relu(y + residual)


def _pull(implementation, pull, dy):
  del implementation
  return pull(dy)


def _batch_rows(tiny: bool) -> Iterator[Row]:
  for shape, dtype, axis, with_residual in _BATCHES:
    name = (
      f"{'x'.join(map(str, shape))}{'' if axis == -1 else '_first'}/{dtype}"
    )
    if tiny:
      shape = tuple(min(size, 8) for size in shape)
    channels = shape[axis]
    itemsize = jnp.dtype(dtype).itemsize
    size = int(np.prod(shape)) * itemsize

    def arguments(
      count, implementation, shape=shape, dtype=dtype, channels=channels
    ):
      del implementation
      stat = jnp.zeros(channels), jnp.ones(channels)
      affine = jnp.linspace(0.5, 1.5, channels), jnp.linspace(-1, 1, channels)
      x, residual = (_normal(shape, dtype, seed) for seed in (0, 2))
      return (*stat, x, *affine, residual)[:count]

    def gradient_of(layer, count, implementation, arguments=arguments):
      mean, var, *inputs = arguments(count, implementation)

      def run(*inputs):
        return layer(implementation, mean, var, *inputs)[2]

      # As a program of its own: a model's gradient comes from what follows.
      y, pull = jax.jit(functools.partial(jax.vjp, run))(*inputs)
      return pull, _normal(y.shape, y.dtype, 1)

    update = functools.partial(_update, axis)
    forward = functools.partial(_forward, axis)
    residual = functools.partial(_residual, axis)
    ops: list[tuple[str, Callable[..., Arrays], float, Callable[..., Arrays]]]
    ops = [
      ("update", update, 1, functools.partial(arguments, 3)),
      # x for the statistics, x again and y.
      ("batch_norm", forward, 3, functools.partial(arguments, 5)),
      # x and dy for the sums, x, dy and dx.
      (
        "batch_norm_grad", _pull, 5,
        functools.partial(gradient_of, forward, 5),
      ),
    ]  # fmt: skip
    if with_residual:
      ops += [
        # The residual as well.
        ("batch_norm_residual", residual, 4, functools.partial(arguments, 6)),
        # x, dy and the gate's bytes for the sums; the gradient behind the gate,
        # which is the residual's, written and read; x again and dx.
        (
          "batch_norm_residual_grad", _pull, 6 + 1 / itemsize,
          functools.partial(gradient_of, residual, 6),
        ),
      ]  # fmt: skip
    for op, call, passes, make in ops:
      yield Row(
        f"{op}/{name}",
        round(passes * size),
        make,
        call,
        donated=() if call is _pull else (0, 1),
        layers=16 if size < 2**26 else 4,
        # "auto" takes XLA for some.
        baselines={"cuda": functools.partial(call, "cuda")},
      )


def _cache_rows(tiny: bool) -> Iterator[Row]:
  for kind, batch, length, dtype, new_dtype in (
    ("prefill", 8, 32768, "bfloat16", "bfloat16"),
    ("prefill", 8, 16384, "float32", "float32"),
    ("prefill", 8, 32768, "int8", "bfloat16"),
    ("token", 64, 4096, "bfloat16", "bfloat16"),
    ("token", 8, 32768, "bfloat16", "bfloat16"),
  ):
    name = f"{kind}_B{batch}_S{length}_N8_H128"
    if tiny:
      batch, length = 2, max(8, length // 1024)
    tokens = length if kind == "prefill" else 1
    # One update is over before a program starts.
    steps = 8 if kind == "token" else 1
    cache, new = (batch, length, 8, 128), (batch, tokens, 8, 128)

    def arguments(
      implementation,
      cache=cache,
      new=new,
      dtype=dtype,
      new_dtype=new_dtype,
      batch=batch,
    ):
      index = jnp.zeros(batch, jnp.int32)
      rows = (_normal(new, new_dtype, seed) for seed in (0, 1))
      return jnp.zeros(cache, dtype), jnp.zeros(cache, dtype), *rows, index

    def call(implementation, *args, dtype=dtype, steps=steps):
      scale = jnp.float32(1 / 32) if dtype == "int8" else None
      cache_k, cache_v, new_k, new_v, index = args
      for step in range(steps):
        cache_k, cache_v = kv_cache.update(
          cache_k, cache_v, new_k, new_v, index + step,
          k_scale=scale, v_scale=scale, implementation=implementation,
        )  # fmt: skip
      return cache_k, cache_v

    each = jnp.dtype(dtype).itemsize + jnp.dtype(new_dtype).itemsize
    yield Row(
      f"kv_cache.update/{name}/{dtype}",
      2 * int(np.prod(new)) * each,
      arguments,
      call,
      donated=(0, 1),
      layers=16 if kind == "token" else 1,
      steps=steps,
    )


def _torch_attention(batch, length, heads, group, dtype, layers):
  """Returns what runs PyTorch's attention, on the valid slice alone.

  By name: a step with the backend that it chooses, and with its own flash
  attention, after a copy of the new row into the cache; and attending alone.
  """
  import torch  # pyright: ignore[reportMissingImports]

  kind = getattr(torch, dtype)
  q = torch.randn(batch, heads * group, 1, 128, dtype=kind, device="cuda")
  caches = [
    [
      torch.randn(batch, heads, length, 128, dtype=kind, device="cuda")
      for _ in range(2)
    ]
    for _ in range(layers)
  ]

  new = torch.randn(batch, heads, 1, 128, dtype=kind, device="cuda")

  def attend():
    with torch.inference_mode():
      for k, v in caches:
        torch.nn.functional.scaled_dot_product_attention(
          q, k, v, enable_gqa=True
        )

  def step():
    with torch.inference_mode():
      for k, v in caches:
        k[:, :, -1:] = new
        v[:, :, -1:] = new
        torch.nn.functional.scaled_dot_product_attention(
          q, k, v, enable_gqa=True
        )

  def flash():
    from torch.nn import attention  # pyright: ignore[reportMissingImports]

    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
      step()

  return {"torch": step, "torch_flash": flash, "torch_alone": attend}


def _cudnn(cache_k, cache_v, q, new_k, new_v, index):
  """Attends with cuDNN, as jax offers it, after an update in place."""
  cache_k, cache_v = kv_cache.update(cache_k, cache_v, new_k, new_v, index)
  out = jax.nn.dot_product_attention(
    q, cache_k, cache_v,
    key_value_seq_lengths=index + 1, implementation="cudnn",
  )  # fmt: skip
  return cache_k, cache_v, out


def _attend_alone(scale, cache_k, cache_v, q, new_k, new_v, index):
  """Attends to all keys but the last, without an update."""
  del new_k, new_v
  out = decode_attention.attend(
    cache_k, cache_v, q, index, k_scale=scale, v_scale=scale
  )
  return cache_k, cache_v, out


def _decode_rows(tiny: bool) -> Iterator[Row]:
  for batch, length, heads, group, dtype, layers in (
    (8, 32768, 8, 4, "bfloat16", 1),
    (8, 32768, 8, 4, "float16", 1),
    (4, 32768, 8, 4, "float32", 1),
    (8, 32768, 8, 4, "int8", 1),
    (8, 32768, 8, 4, "float8_e4m3fn", 1),
    (1, 32768, 8, 4, "bfloat16", 8),
    (8, 32768, 8, 1, "bfloat16", 1),
    (64, 2048, 8, 4, "bfloat16", 4),
    (128, 256, 8, 8, "bfloat16", 8),
    # What tensor parallelism over eight leaves to each: one head.
    (8, 32768, 1, 8, "bfloat16", 4),
    (8, 32768, 1, 8, "int8", 4),
    (1, 32768, 1, 8, "bfloat16", 16),
    (64, 2048, 1, 8, "bfloat16", 8),
  ):
    name = f"decode/B{batch}_S{length}_N{heads}_G{group}_H128/{dtype}"
    if tiny:
      batch, length = 2, max(8, length // 1024)
    quantised = dtype in ("int8", "float8_e4m3fn")
    small = "bfloat16" if quantised else dtype
    cache = (batch, length, heads, 128)

    def arguments(
      implementation,
      cache=cache,
      dtype=dtype,
      small=small,
      heads=heads,
      group=group,
    ):
      batch, length = cache[:2]
      keys = (
        jnp.round(_normal(cache, "float32", seed) * 8).astype(dtype)
        if dtype == "int8"
        else _normal(cache, "bfloat16", seed).astype(dtype)
        for seed in (0, 1)
      )
      q = _normal((batch, 1, heads * group, 128), small, 2)
      new = (_normal((batch, 1, heads, 128), small, seed) for seed in (3, 4))
      return *keys, q, *new, jnp.full(batch, length - 1, jnp.int32)

    def call(implementation, *args, quantised=quantised):
      scale = jnp.float32(1 / 8) if quantised else None
      return decode_attention(
        *args, k_scale=scale, v_scale=scale, implementation=implementation
      )

    spec = (batch, length, heads, group, dtype)
    alone = functools.partial(
      _attend_alone, np.float32(1 / 8) if quantised else None
    )
    yield Row(
      name,
      2 * int(np.prod(cache)) * jnp.dtype(dtype).itemsize,
      arguments,
      call,
      donated=(0, 1),
      layers=layers,
      baselines=({"cudnn": _cudnn} if dtype in ("bfloat16", "float16") else {}),
      others={"attend": alone},
      torch=None if quantised else functools.partial(_torch_attention, *spec),
    )


def rows(tiny: bool = False) -> Iterator[Row]:
  """Yields everything that there is to measure.

  Args:
    tiny: whether at sizes that are over at once, for a rehearsal. Names say
      the real ones.
  """
  for row in itertools.chain(
    _cache_rows(tiny), _decode_rows(tiny), _batch_rows(tiny)
  ):
    layers = min(row.layers, 2) if tiny else row.layers
    yield dataclasses.replace(row, layers=layers)
