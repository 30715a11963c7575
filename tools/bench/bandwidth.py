"""Memory bandwidth of the machine, measured in the run that uses it.

A floor is only honest if it is measured where the row ran and at the row's own
size: what fits into a cache moves several times faster than what does not.
"""

import bisect
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
import dataclasses
import math
import mmap
import os
import time

import jax
from jax import numpy as jnp
import numpy as np

_MIB = 2**20
FULL_SIZES = tuple(size * _MIB for size in (1, 4, 16, 64, 256, 512))
QUICK_SIZES = tuple(size * _MIB for size in (1, 16, 128))


def _best_seconds(work: Callable[[], object], repeats: int) -> float:
  work()
  best = math.inf
  for _ in range(repeats):
    start = time.perf_counter()
    work()
    best = min(best, time.perf_counter() - start)
  return best


def _page_backed(count: int) -> np.ndarray:
  """Returns float32 ones in memory such as XLA gets for its buffers.

  NumPy asks the kernel for huge pages, XLA does not: on a machine that gives
  them on request only, NumPy's arrays move a fifth faster than any JAX program
  could.
  """
  memory = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  array = np.frombuffer(memory, np.float32)
  array[:] = 1
  return array


def _host_rates(size: int, repeats: int) -> tuple[float, float]:
  """Returns read and copy bytes per second over `size` bytes, all cores.

  NumPy releases the interpreter lock in both operations, so that one Python
  thread a core is enough.
  """
  cores = len(os.sched_getaffinity(0))
  part = max(size // cores // 4, 1)
  # Small buffers are gone through several times, or starting the threads shows.
  passes = max(1, (64 * _MIB) // size)
  # The copy has half of its bytes on each side, so that its working set is
  # `size` too.
  sources = [_page_backed(part) for _ in range(cores)]
  targets = [_page_backed(part // 2 or 1) for _ in range(cores)]

  def read(core: int) -> None:
    for _ in range(passes):
      sources[core].max()

  def copy(core: int) -> None:
    source, target = sources[core][: targets[core].size], targets[core]
    for _ in range(passes):
      np.copyto(target, source)

  with futures.ThreadPoolExecutor(cores) as pool:
    read_s = _best_seconds(lambda: list(pool.map(read, range(cores))), repeats)
    copy_s = _best_seconds(lambda: list(pool.map(copy, range(cores))), repeats)
  read_bytes = cores * passes * sources[0].nbytes
  copy_bytes = cores * passes * 2 * targets[0].nbytes
  return read_bytes / read_s, copy_bytes / copy_s


def _device_rates(size: int, repeats: int) -> tuple[float, float]:
  """The same on an accelerator, through XLA."""
  x = jnp.ones(max(size // 4, 1), jnp.float32)
  total = jax.jit(jnp.max)
  half = x[: max(x.size // 2, 1)]
  negate = jax.jit(jnp.negative)
  read_s = _best_seconds(lambda: total(x).block_until_ready(), repeats)
  copy_s = _best_seconds(lambda: negate(half).block_until_ready(), repeats)
  return x.nbytes / read_s, 2 * half.nbytes / copy_s


@dataclasses.dataclass(frozen=True)
class Bandwidth:
  """Bytes per second by working-set size.

  Attributes:
    read: bytes read per second, by the bytes gone through.
    copy: bytes read plus bytes written per second, by their sum.

  Example:
    >>> table = Bandwidth(read={1000: 1e6, 4000: 5e5}, copy={1000: 1e6})
    >>> table.seconds(read=4000, written=0)
    0.008
    >>> table.seconds(read=500, written=500)
    0.001
  """

  read: Mapping[int, float]
  copy: Mapping[int, float]

  @classmethod
  def measure(cls, *, quick: bool = False) -> "Bandwidth":
    """Measures this machine: 1 to 2 s, or a fraction of it if `quick`."""
    rates = _host_rates if jax.default_backend() == "cpu" else _device_rates
    sizes: Sequence[int] = QUICK_SIZES if quick else FULL_SIZES
    measured = {size: rates(size, 3 if quick else 7) for size in sizes}
    return cls(
      read={size: pair[0] for size, pair in measured.items()},
      copy={size: pair[1] for size, pair in measured.items()},
    )

  def seconds(self, *, read: int, written: int) -> float:
    """Returns the time that reading and writing so many bytes must take.

    Every byte written is paired with one byte read, at the rate of a copy; the
    rest is read, or written, at the rate of a read.
    """
    total = read + written
    paired = 2 * min(read, written)
    return paired / _rate(self.copy, total) + (total - paired) / _rate(
      self.read, total
    )


def _rate(table: Mapping[int, float], size: int) -> float:
  """Interpolates between the measured sizes on a logarithmic scale."""
  sizes = sorted(table)
  right = bisect.bisect_left(sizes, size)
  if right == 0:
    return table[sizes[0]]
  if right == len(sizes):
    return table[sizes[-1]]
  low, high = sizes[right - 1], sizes[right]
  weight = math.log(size / low) / math.log(high / low)
  return table[low] ** (1 - weight) * table[high] ** weight
