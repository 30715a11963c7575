"""What the primitives of batch_stat take and give, by name and kind."""

from collections.abc import Mapping, Sequence
import dataclasses
import enum
from typing import Any


class Kind(enum.Enum):
  """Of which shape an operand or a result is.

  Attributes:
    BATCH: That of x.
    STATISTIC: A number for each channel, `[batch axes..., c]`.
    MOMENTUM: A number for each batch, `[batch axes..., 1]`.
    MASK: That of x, or with 1 in place of c. It comes last, or not at all.
  """

  BATCH = enum.auto()
  STATISTIC = enum.auto()
  MOMENTUM = enum.auto()
  MASK = enum.auto()


@dataclasses.dataclass(frozen=True)
class Signature:
  """Operands and results of a primitive.

  Attributes:
    operands: Kinds of the operands by name, in order.
    results: Kinds of the results.
  """

  operands: Mapping[str, Kind]
  results: Sequence[Kind]

  def named(self, operands: Sequence[Any]) -> dict[str, Any]:
    """Returns the operands, or what belongs to them, by name."""
    return dict(zip(self.operands, operands))


_X = {"x": Kind.BATCH}
_X_DY = {"x": Kind.BATCH, "dy": Kind.BATCH}
_MASK = {"mask": Kind.MASK}


def _statistics(*names: str) -> dict[str, Kind]:
  return dict.fromkeys(names, Kind.STATISTIC)


_AVERAGES = _statistics("mean", "var") | {"momentum": Kind.MOMENTUM}
_AFFINE = _statistics("mean", "mul", "bias")

UPDATE = Signature(_AVERAGES | _X | _MASK, [Kind.STATISTIC] * 4)
TRAIN = Signature(
  _AVERAGES | _statistics("scale") | _X | _MASK, [Kind.STATISTIC] * 7
)
MOMENTS = Signature(_X | _MASK, [Kind.STATISTIC] * 3)
NORMALIZE = Signature(_X | _AFFINE, [Kind.BATCH])
GRAD_SUMS = Signature(
  _X_DY | _AFFINE | _statistics("rstd", "count"), [Kind.STATISTIC] * 4
)
GRAD_INPUT = Signature(
  _X_DY | _AFFINE | _statistics("c0", "c1") | _MASK, [Kind.BATCH]
)
