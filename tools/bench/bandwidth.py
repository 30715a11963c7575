"""The time that bytes take to move, measured where and when a row runs.

A floor is only honest if it is measured on the machine and at the size of its
row: what fits into a cache moves several times faster than what does not. And
on a shared machine it must be measured at the same time: memory bandwidth there
changes by a factor of two within a minute. So moving a row's bytes is a side of
its own, which takes its turn among the others.
"""

from collections.abc import Callable
from concurrent import futures
import dataclasses
import functools
import mmap
import os
import time

import jax
from jax import numpy as jnp
import numpy as np

# A sample goes through its buffers until it has moved about this much, or
# starting the threads or programs would show; but not for ever where they are
# tiny.
_HOST_SAMPLE_BYTES = 2**28
_DEVICE_SAMPLE_BYTES = 2**35
_MAX_PASSES = 2**12

# What a device copies: much more than its caches hold.
_COPY_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Bytes that must move between memory and the cores.

  Attributes:
    read: bytes read.
    written: bytes written.
  """

  read: int
  written: int

  @property
  def total(self) -> int:
    """Bytes moved in both directions.

    >>> Traffic(read=3, written=1).total
    4
    """
    return self.read + self.written


def _page_backed(size: int) -> np.ndarray:
  """Returns `size` bytes of memory such as XLA gets for its buffers.

  NumPy asks the kernel for huge pages, XLA does not: on a machine that gives
  them on request only, NumPy's arrays move a fifth faster than any JAX program
  could.
  """
  count = max(1, size // 4)
  memory = mmap.mmap(-1, 4 * count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
  array = np.frombuffer(memory, np.float32)
  array[:] = 1
  return array


def _host_pass(traffic: Traffic) -> Callable[[int], None]:
  """Returns `passes -> None`, which moves the bytes so often, with all cores.

  Every byte written is paired with one byte read, as in a copy; what is left
  is only read, or only written. NumPy releases the interpreter lock in all
  three, so that one Python thread a core is enough.
  """
  cores = len(os.sched_getaffinity(0))
  copied = min(traffic.read, traffic.written) // cores
  read = (traffic.read // cores) - copied
  written = (traffic.written // cores) - copied

  works: list[list[Callable[[], object]]] = []
  for _ in range(cores):
    work: list[Callable[[], object]] = []
    if copied:
      source, target = _page_backed(copied), _page_backed(copied)
      work.append(functools.partial(np.copyto, target, source))
    if read > 0:
      work.append(_page_backed(read).max)
    if written > 0:
      work.append(functools.partial(_page_backed(written).fill, 1))
    works.append(work)
  pool = futures.ThreadPoolExecutor(cores)

  def repeat(work: list[Callable[[], object]], passes: int) -> None:
    for _ in range(passes):
      for part in work:
        part()

  def go(passes: int) -> None:
    for _ in pool.map(repeat, works, [passes] * cores):
      pass

  return go


def _device_copy() -> Callable[[int], None]:
  """Returns `passes -> None`, which queues so many copies on a device."""
  copy = jax.jit(jnp.negative)
  source = jnp.ones(_COPY_BYTES // 4, jnp.float32)

  def go(passes: int) -> None:
    for _ in range(passes):
      target = copy(source)
    jax.block_until_ready(target)

  return go


class Mover:
  """Moves some bytes between memory and the cores, and says how long it took.

  On the CPU these very bytes move, in buffers of their size: what fits into a
  cache stays there. A device makes plain copies of 1 GiB, and the time is what
  the bytes would take at that bandwidth.

  Args:
    traffic: how many bytes.

  Example:
    >>> mover = Mover(Traffic(read=2**20, written=2**19))
    >>> mover.seconds() > 0
    True
  """

  def __init__(self, traffic: Traffic):
    wanted = max(1, traffic.total)
    if jax.default_backend() == "cpu":
      self._move = _host_pass(traffic)
      moved, sample = wanted, _HOST_SAMPLE_BYTES
    else:
      self._move = _device_copy()
      moved, sample = 2 * _COPY_BYTES, _DEVICE_SAMPLE_BYTES
    self._passes = min(max(1, sample // moved), _MAX_PASSES)
    self._passes_wanted = wanted / moved
    self._move(1)

  def seconds(self) -> float:
    """Returns the seconds that the bytes take, measured now.

    A pass that is not timed comes first: what fits into a cache is then there,
    as it is for a row whose calls are repeated.
    """
    self._move(1)
    start = time.perf_counter()
    self._move(self._passes)
    each = (time.perf_counter() - start) / self._passes
    return each * self._passes_wanted
