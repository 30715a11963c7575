"""What connects devices, and how long collectives take over it.

An axis of a mesh is made of tiers, the fastest first: eight GPUs behind one
switch, and such eights behind another. A collective over several tiers passes
through all of them at once, as one long message does, so the slowest decides;
the latencies add up.
"""

from __future__ import annotations

from collections.abc import Sequence
import dataclasses
import math
from typing import Protocol

from tools.plan import mesh as mesh_lib
from tools.plan import refusal


@dataclasses.dataclass(frozen=True)
class Link:
  """One way out of a device.

  Attributes:
    bandwidth: bytes a second in one direction, as collectives reach them.
    hop: seconds from one device to the next.
    start: seconds that a collective takes before anything moves.
    source: who says so.
  """

  bandwidth: float
  hop: float
  start: float
  source: str


@dataclasses.dataclass(frozen=True)
class Tier:
  """Devices that reach each other in one way.

  Attributes:
    size: how many.
    bandwidth: bytes a second that each of them sends, over all of its links.
    link: bytes a second over one link.
    hops: steps until the last one has heard of the first.
    hop: seconds of a step.
    start: seconds before the first.
    ring: whether messages pass through the devices between.
  """

  size: int
  bandwidth: float
  link: float
  hops: int
  hop: float
  start: float
  ring: bool = False

  @property
  def latency(self) -> float:
    """Seconds that no message of a collective goes below."""
    return self.start + self.hops * self.hop


Tiers = Sequence[Tier]


def gather_seconds(tiers: Tiers, size: float) -> float:
  """Returns the seconds of an all-gather, or of a reduce-scatter.

  Args:
    tiers: what the devices are behind, the fastest first.
    size: bytes of the whole, which each device has after a gather.
  """
  busy = latency = 0.0
  for tier in tiers:
    busy = max(busy, size * (tier.size - 1) / tier.size / tier.bandwidth)
    latency += tier.latency
    size /= tier.size
  return busy + latency


def reduce_seconds(tiers: Tiers, size: float) -> float:
  """Returns the seconds of an all-reduce of `size` bytes on each device."""
  return 2 * gather_seconds(tiers, size)


def exchange_seconds(tiers: Tiers, size: float) -> float:
  """Returns the seconds of an all-to-all of `size` bytes from each device.

  In a ring a message passes a quarter of all devices on its way.
  """
  busy = latency = 0.0
  inside = 1
  total = math.prod(tier.size for tier in tiers)
  for tier in tiers:
    leaving = size * (1 - inside / total)
    through = tier.size / 4 if tier.ring else 1.0
    busy = max(busy, leaving * max(1.0, through) / tier.bandwidth)
    latency += tier.latency
    inside *= tier.size
  return busy + latency


def shift_seconds(tiers: Tiers, size: float) -> float:
  """Returns the seconds in which each device sends `size` bytes to the next."""
  if not tiers:
    return 0.0
  return max(tier.start + tier.hop + size / tier.link for tier in tiers)


class Fabric(Protocol):
  """Knows the tiers of each axis of a mesh."""

  def tiers(self, mesh: mesh_lib.Mesh) -> dict[str, tuple[Tier, ...]]:
    """Returns the tiers of each axis; of one with one device none."""
    ...


@dataclasses.dataclass(frozen=True)
class Switched:
  """Devices behind a switch, and such groups behind others.

  Attributes:
    group: devices behind the first switch.
    inner: the link to it.
    outer: the link of each device to the others.
  """

  group: int
  inner: Link
  outer: Link

  def tiers(self, mesh: mesh_lib.Mesh) -> dict[str, tuple[Tier, ...]]:
    """Returns the tiers of each axis."""
    found = {}
    stride = 1
    for name, size in mesh.sizes.items():
      inside = math.gcd(size, max(1, self.group // stride))
      found[name] = _switch(inside, self.inner) + _switch(
        size // inside, self.outer
      )
      stride *= size
    return found


def _switch(size: int, link: Link) -> tuple[Tier, ...]:
  if size == 1:
    return ()
  return (
    Tier(size, link.bandwidth, link.bandwidth, size - 1, link.hop, link.start),
  )


@dataclasses.dataclass(frozen=True)
class Torus:
  """Devices in a grid, each connected to its neighbours.

  Attributes:
    shape: of the largest grid.
    wraps: the last and the first of a row are neighbours where the row is a
      multiple of so many.
    link: to a neighbour.
    outer: the link of each device out of the grid.
  """

  shape: tuple[int, ...]
  wraps: int
  link: Link
  outer: Link

  def grid(self, devices: int) -> tuple[int, ...]:
    """Returns the grid of so many devices, as square as it can be.

    >>> from tools.plan import chips
    >>> chips.CHIPS["v5e"].fabric.grid(64)
    (8, 8)
    """
    sides = [1] * len(self.shape)
    left = devices
    factor = 2
    while left > 1:
      while left % factor:
        factor += 1
      free = [
        n for n, side in enumerate(sides) if side * factor <= self.shape[n]
      ]
      if not free:
        raise refusal.Refused(
          f"{devices} devices make no grid inside of"
          f" {'x'.join(map(str, self.shape))}."
        )
      sides[min(free, key=lambda n: sides[n])] *= factor
      left //= factor
    return tuple(sides)

  def tiers(self, mesh: mesh_lib.Mesh) -> dict[str, tuple[Tier, ...]]:
    """Returns the tiers of each axis."""
    grids = max(1, -(-mesh.devices // math.prod(self.shape)))
    refusal.check_divides("grids", grids, "data", mesh.data)
    sides = self.grid(mesh.devices // grids)
    free = list(sides)
    found: dict[str, tuple[Tier, ...]] = {}
    for name, size in mesh.sizes.items():
      if name == "data":
        size //= grids
      links = hops = 0
      left = size
      for n, side in enumerate(sides):
        part = math.gcd(left, free[n])
        if part == 1:
          continue
        left //= part
        free[n] //= part
        ring = part == side and side % self.wraps == 0
        links += 2 if ring else 1
        hops += part // 2 if ring else part - 1
      link = self.link
      found[name] = (
        (
          Tier(
            size,
            links * link.bandwidth,
            link.bandwidth,
            hops,
            link.hop,
            link.start,
            ring=True,
          ),
        )
        if size > 1
        else ()
      )
    found["data"] += _switch(grids, self.outer)
    return found


@dataclasses.dataclass(frozen=True)
class Shared:
  """Devices that are parts of one machine, such as virtual ones of a CPU.

  They do not add memory bandwidth or cores: each has its share of both, also of
  what a collective moves.

  Attributes:
    link: what all of them together reach.
  """

  link: Link

  def tiers(self, mesh: mesh_lib.Mesh) -> dict[str, tuple[Tier, ...]]:
    """Returns the tiers of each axis."""
    share = dataclasses.replace(
      self.link, bandwidth=self.link.bandwidth / mesh.devices
    )
    # Threads of one process meet once, however many they are.
    return {
      name: tuple(
        dataclasses.replace(tier, hops=1) for tier in _switch(size, share)
      )
      for name, size in mesh.sizes.items()
    }
