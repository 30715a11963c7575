"""The tables of docs/planning.md, which a test holds against that page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import json
import pathlib
from typing import Any

from tools.plan import (
  chips,
  decoding,
  mesh,
  model,
  parts,
  published,
  refusal,
  report,
  training,
)

_CHECKED = pathlib.Path(__file__).parent / "checked.json"
_MODEL = model.MODELS["llama2-70b"]


def _trained(length: int = 4096, **options: Any) -> training.Job:
  return training.Job(length=length, gradients="bfloat16", **options)


# A 70B model on 64 devices: what each kind can hold.
TRAINING: tuple[tuple[str, str, training.Job], ...] = (
  ("h200", "fsdp=64", _trained(batch=256, microbatches=4)),
  (
    "h200",
    "fsdp=64",
    _trained(batch=256, microbatches=4, recompute="elementwise"),
  ),
  (
    "h200",
    "fsdp=8,tensor=8",
    _trained(
      batch=256,
      microbatches=4,
      recompute="elementwise",
      split_residual=True,
    ),
  ),
  (
    "h200",
    "fsdp=2,tensor=8,pipeline=4",
    _trained(
      batch=256,
      microbatches=32,
      interleave=5,
      recompute="elementwise",
      split_residual=True,
      keep_gathered=True,
    ),
  ),
  (
    "h200",
    "fsdp=8,sequence=8",
    _trained(batch=32, length=32768),
  ),
  ("v5e", "fsdp=64", _trained(batch=64)),
  (
    "v5e",
    "fsdp=32,tensor=2",
    _trained(batch=32, moments="bfloat16", split_residual=True),
  ),
  (
    "v5e",
    "fsdp=8,tensor=8",
    _trained(batch=64, microbatches=8, split_residual=True),
  ),
  ("v6e", "fsdp=64", _trained(batch=256, microbatches=2)),
  (
    "v6e",
    "fsdp=32,tensor=2",
    _trained(batch=256, microbatches=8, recompute="mlp", split_residual=True),
  ),
  (
    "v6e",
    "fsdp=8,tensor=8",
    _trained(batch=256, microbatches=8, recompute="mlp", split_residual=True),
  ),
)

DECODING: tuple[tuple[str, str, decoding.Job], ...] = (
  ("h200", "tensor=8,data=8", decoding.Job(64, 8192)),
  ("h200", "tensor=8,data=8", decoding.Job(1024, 8192)),
  ("h200", "tensor=4,data=16", decoding.Job(1024, 8192)),
  (
    "h200",
    "tensor=4,data=16",
    decoding.Job(2048, 8192, weights="float8", cache="float8"),
  ),
  (
    "h200",
    "tensor=8,pipeline=8",
    decoding.Job(1024, 8192),
  ),
  ("v5e", "tensor=8,data=8", decoding.Job(64, 8192)),
  ("v5e", "tensor=16,data=4", decoding.Job(64, 2048)),
  (
    "v5e",
    "tensor=8,data=8",
    decoding.Job(256, 2048, weights="int8", cache="int8"),
  ),
  (
    "v5e",
    "tensor=8,sequence=8",
    decoding.Job(32, 8192, weights="int8", cache="int8"),
  ),
  ("v6e", "tensor=8,data=8", decoding.Job(64, 8192)),
  ("v6e", "tensor=8,data=8", decoding.Job(256, 8192)),
  (
    "v6e",
    "tensor=8,data=8",
    decoding.Job(512, 8192, weights="int8", cache="int8"),
  ),
)


def _outcome(plan: parts.Plan) -> list[str]:
  bound = plan.bound
  return [
    report.seconds(plan.seconds),
    f"{plan.tokens_per_second:,.0f}",
    f"{plan.tokens_per_second / plan.devices:,.0f}",
    f"{plan.utilisation:.0%}",
    f"{plan.used / 1e9:.0f} of {plan.capacity / 1e9:.0f}",
    f"{bound.name}, {bound.seconds / plan.seconds:.0%} ({bound.bound})",
  ]


_OUTCOMES = ("step", "tokens/s", "a device", "MFU", "GB", "bound by")


def _planned(
  jobs: Sequence[tuple[str, str, Any]],
  plan: Callable[..., parts.Plan],
  words: Mapping[str, Callable[[Any], str]],
) -> str:
  """Returns a table of plans.

  Args:
    jobs: each with its device and mesh.
    plan: plans one.
    words: columns that say what a job is.
  """
  rows = []
  for chip, axes, job in jobs:
    try:
      found = _outcome(plan(_MODEL, chips.CHIPS[chip], mesh.parse(axes), job))
    except refusal.Refused as error:
      found = ["refused", *[""] * (len(_OUTCOMES) - 2), str(error)]
    rows.append([chip, axes, *(word(job) for word in words.values()), *found])
  return report.table(("device", "mesh", *words, *_OUTCOMES), rows)


def training_table() -> str:
  """Returns the table of training 70B on 64 devices."""
  return _planned(
    TRAINING,
    training.plan,
    {
      "batch": lambda job: f"{job.batch} x {job.length}",
      "micro": lambda job: str(job.microbatches),
      "again": lambda job: job.recompute,
    },
  )


def decoding_table() -> str:
  """Returns the table of decoding with 70B on 64 devices."""
  return _planned(
    DECODING,
    decoding.plan,
    {
      "batch": lambda job: f"{job.batch} x {job.context}",
      "weights, cache": lambda job: f"{job.weights}, {job.cache}",
    },
  )


def published_table(figures: Sequence[published.Figure]) -> str:
  """Returns published tokens a second of a device beside those on paper."""
  rows = [
    (
      figure.system,
      f"{figure.published:,.0f}",
      f"{figure.predicted:,.0f}",
      f"{figure.predicted / figure.published:.2f}",
      figure.source,
    )
    for figure in figures
  ]
  return report.table(
    ("system", "published", "on paper", "ratio", "source"), rows
  )


def checked() -> list[dict[str, Any]]:
  """Returns what `check` kept: a row for each job and mesh."""
  return json.loads(_CHECKED.read_text(encoding="utf-8"))["rows"]


def checked_table() -> str:
  """Returns what virtual devices took, beside what was said before."""
  rows = [
    (
      row["job"],
      row["mesh"],
      report.seconds(row["measured"]),
      report.seconds(row["predicted"]),
      f"{row['predicted'] / row['measured']:.2f}",
    )
    for row in checked()
  ]
  return report.table(("job", "mesh", "measured", "on paper", "ratio"), rows)


def all_tables() -> dict[str, str]:
  """Returns each table by its name."""
  return {
    "training": training_table(),
    "decoding": decoding_table(),
    "virtual devices": checked_table(),
    "published, training": published_table(published.TRAINING),
    "published, decoding": published_table(published.DECODING),
  }


def text() -> str:
  """Returns all tables, each below its name."""
  return "\n\n".join(
    f"{name}\n\n{table}" for name, table in all_tables().items()
  )
