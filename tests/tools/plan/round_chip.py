"""A device whose numbers are round, so that times can be had by hand."""

import dataclasses

from tools.plan import chips, fabric

TERA = 1e12


def rate(promised: float) -> chips.Rate:
  return chips.Rate(promised, 1.0, "made up")


def link(bandwidth: float = 1e11, hop: float = 0.0, start: float = 0.0):
  return fabric.Link(bandwidth, hop, start, "made up")


CHIP = chips.Chip(
  name="round",
  memory=1e15,
  products={"bfloat16": rate(100 * TERA), "float32": rate(10 * TERA)},
  attention=rate(50 * TERA),
  copy=rate(1 * TERA),
  weights=rate(1 * TERA),
  cache={"bfloat16": rate(0.5 * TERA), "int8": rate(0.25 * TERA)},
  norms=rate(2 * TERA),
  kernel=0.0,
  training_host=0.0,
  calling_host=0.0,
  queued=True,
  fabric=fabric.Switched(8, link(), link(1e10)),
)


def change(**fields) -> chips.Chip:
  return dataclasses.replace(CHIP, **fields)
