"""Says on paper how long a step takes on a mesh, and what bounds it.

    python -m tools.plan.main train --model=llama2-70b --chip=h200 \
      --mesh=fsdp=64 --batch=128 --length=4096
    python -m tools.plan.main decode --model=llama2-70b --chip=v5e \
      --mesh=tensor=8,data=8 --batch=256 --context=2048 --weights=int8
    python -m tools.plan.main tables
    python -m tools.plan.main sources --chip=h200

What does not divide, or does not fit, is refused in words; the exit status is
then 1. `tables` prints those of docs/planning.md, published figures among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import inspect
import sys
import typing

from tools.plan import (
  chips,
  decoding,
  mesh,
  model,
  parts,
  refusal,
  report,
  tables,
  training,
)


def _add_fields(parser: argparse.ArgumentParser, kind: type) -> None:
  """Adds a flag for each field of a dataclass."""
  types = typing.get_type_hints(kind)
  for field in dataclasses.fields(kind):
    flag = "--" + field.name.replace("_", "-")
    wanted = next(
      t
      for t in (*typing.get_args(types[field.name]), types[field.name])
      if t is not type(None)
    )
    if wanted is bool:
      parser.add_argument(
        flag, action=argparse.BooleanOptionalAction, default=None
      )
    else:
      parser.add_argument(flag, type=wanted)


def _given(options: argparse.Namespace, kind: type) -> dict:
  """Returns the fields of a dataclass for which there is a flag."""
  names = (field.name for field in dataclasses.fields(kind))
  return {
    name: getattr(options, name)
    for name in names
    if getattr(options, name, None) is not None
  }


def _make(options: argparse.Namespace, kind: type, start=None):
  given = _given(options, kind)
  if start is not None:
    return dataclasses.replace(start, **given)
  missing = [
    "--" + field.name.replace("_", "-")
    for field in dataclasses.fields(kind)
    if field.default is dataclasses.MISSING and field.name not in given
  ]
  if missing:
    raise refusal.Refused(f"Wanted as well: {', '.join(missing)}.")
  return kind(**given)


_PLANS: dict[str, tuple[type, Callable[..., parts.Plan]]] = {
  "train": (training.Job, training.plan),
  "decode": (decoding.Job, decoding.plan),
}


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="plan",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(dest="command", required=True)
  for name, (job, _) in _PLANS.items():
    command = commands.add_parser(
      name,
      description="\n\n".join(
        inspect.cleandoc(str(kind.__doc__)) for kind in (job, model.Model)
      ),
      formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument(
      "--model",
      choices=sorted(model.MODELS),
      help="sizes to start from; the flags below replace them",
    )
    command.add_argument("--chip", choices=sorted(chips.CHIPS), required=True)
    command.add_argument(
      "--mesh",
      default="",
      metavar="AXIS=N,...",
      help=f"axes: {', '.join(mesh.AXES)}",
    )
    command.add_argument(
      "--change",
      default="",
      metavar="NAME=NUMBER,...",
      help="other numbers of the chip: attention=0.3 (the fraction reached),"
      " kernel=2e-6, inner.bandwidth=4e11",
    )
    _add_fields(command, model.Model)
    _add_fields(command, job)
  commands.add_parser("tables")
  command = commands.add_parser("sources")
  command.add_argument("--chip", choices=sorted(chips.CHIPS), required=True)
  return parser


def main(arguments: Sequence[str] | None = None) -> int:
  """Prints a plan and returns the exit status."""
  options = _parser().parse_args(arguments)
  if options.command == "tables":
    print(tables.text())
    return 0
  chip = chips.CHIPS[options.chip]
  if options.command == "sources":
    print(report.table(("what", "how much", "source"), chips.sources(chip)))
    return 0
  job, plan = _PLANS[options.command]
  try:
    found = plan(
      _make(options, model.Model, model.MODELS.get(options.model)),
      chips.change(chip, options.change),
      mesh.parse(options.mesh),
      _make(options, job),
    )
  except refusal.Refused as error:
    print(f"refused: {error}", file=sys.stderr)
    return 1
  print(report.text(found))
  return 0


if __name__ == "__main__":
  sys.exit(main())
