"""What a plan is made of: the parts of a step, and of a device's memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
import dataclasses

from tools.plan import refusal


@dataclasses.dataclass(frozen=True)
class Part:
  """Something that takes time in a step.

  Attributes:
    name: what it is.
    busy: seconds that it takes.
    seconds: those of them in which nothing else goes on; they add up to the
      step's.
    bound: what it waits for: arithmetic, memory, network or host.
  """

  name: str
  busy: float
  seconds: float
  bound: str


def roofline(
  name: str, flops: float, rate: float, moved: float, bandwidth: float
) -> Part:
  """Returns a part that calculates and moves at the same time."""
  arithmetic, memory = flops / rate, moved / bandwidth
  seconds = max(arithmetic, memory)
  bound = "arithmetic" if arithmetic >= memory else "memory"
  return Part(name, seconds, seconds, bound)


def network(name: str, busy: float, hidden: float = 0.0) -> Part:
  """Returns a collective, of which `hidden` seconds pass behind others."""
  return Part(name, busy, max(0.0, busy - hidden), "network")


def host(busy: float, device: Sequence[Part], queued: bool) -> Part:
  """Returns the host's part.

  Args:
    busy: seconds that it takes.
    device: all other parts.
    queued: whether it works while the device does, so that only what it takes
      longer shows.
  """
  hidden = sum(part.seconds for part in device) if queued else 0.0
  return Part("host", busy, max(0.0, busy - hidden), "host")


@dataclasses.dataclass(frozen=True)
class Plan:
  """A step on paper.

  Attributes:
    parts: what takes time.
    memory: bytes of a device, by what they are for.
    capacity: bytes that a device has.
    tokens: that a step trains on, or makes.
    devices: how many there are.
    flops: operations that the model needs for a step, however it is computed;
      of the attention those below the diagonal.
    peak: operations a second that a device promises.
  """

  parts: tuple[Part, ...]
  memory: Mapping[str, float]
  capacity: float
  tokens: int
  devices: int
  flops: float
  peak: float

  @property
  def seconds(self) -> float:
    """Seconds of a step."""
    return sum(part.seconds for part in self.parts)

  @property
  def tokens_per_second(self) -> float:
    """Tokens a second, of all devices together."""
    return self.tokens / self.seconds

  @property
  def utilisation(self) -> float:
    """Share of the promised arithmetic that the model gets."""
    return self.flops / self.seconds / (self.devices * self.peak)

  @property
  def bound(self) -> Part:
    """The part that takes most of the step."""
    return max(self.parts, key=lambda part: part.seconds)

  @property
  def used(self) -> float:
    """Bytes of a device in use."""
    return sum(self.memory.values())


def check_fits(memory: Mapping[str, float], capacity: float) -> None:
  """Raises if a device has less memory than is wanted of it."""
  used = sum(memory.values())
  if used > capacity:
    items = ", ".join(
      f"{name} {size / 1e9:.1f}" for name, size in memory.items() if size
    )
    raise refusal.Refused(
      f"A device has {capacity / 1e9:.1f} GB, but {used / 1e9:.1f} GB are"
      f" needed: {items}."
    )
