"""How devices are counted along the axes of a mesh."""

from __future__ import annotations

import dataclasses
import math

from tools.plan import refusal

# Neighbours first: what is said most often is said over the fastest links.
AXES = ("tensor", "sequence", "pipeline", "expert", "fsdp", "data")


@dataclasses.dataclass(frozen=True)
class Mesh:
  """Devices along each axis.

  Example:
    >>> Mesh(tensor=8, fsdp=8).devices
    64

  Attributes:
    tensor: heads, hidden features and the vocabulary are split over it.
    sequence: the tokens of a sequence are, and a cache by its length.
    pipeline: layers are.
    expert: experts are, and the batch.
    fsdp: every parameter is, and the batch; parameters are gathered for use.
    data: the batch is, and nothing else.
  """

  tensor: int = 1
  sequence: int = 1
  pipeline: int = 1
  expert: int = 1
  fsdp: int = 1
  data: int = 1

  def __post_init__(self):
    refusal.check_sizes(self, *AXES)

  @property
  def sizes(self) -> dict[str, int]:
    """Devices along each axis, neighbours first."""
    return {name: getattr(self, name) for name in AXES}

  @property
  def devices(self) -> int:
    """All devices."""
    return math.prod(self.sizes.values())

  @property
  def batch(self) -> int:
    """Parts into which a batch is split."""
    return self.data * self.fsdp * self.expert


def parse(text: str) -> Mesh:
  """Returns the mesh that a flag names.

  >>> parse("fsdp=8,tensor=8")
  Mesh(tensor=8, sequence=1, pipeline=1, expert=1, fsdp=8, data=1)
  """
  sizes: dict[str, int] = {}
  for item in filter(None, text.split(",")):
    name, _, size = item.partition("=")
    if name not in AXES or not size.isdecimal() or name in sizes:
      raise refusal.Refused(
        f"A mesh is written as fsdp=8,tensor=8, with axes of {', '.join(AXES)},"
        f" each once, but got `{text}`."
      )
    sizes[name] = int(size)
  return Mesh(**sizes)
