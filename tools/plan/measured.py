"""What the kept results of the benchmark say of kernels and of the host."""

from __future__ import annotations

from collections.abc import Mapping
import functools
import json
import pathlib
from typing import Any

_RESULTS = pathlib.Path(__file__).parent.parent / "bench" / "results"


@functools.cache
def _rows(file: str) -> Mapping[str, Mapping[str, Any]]:
  found = json.loads((_RESULTS / file).read_text(encoding="utf-8"))
  if isinstance(found, dict):
    return {row["row"]: row for row in found["bench"]}
  return {
    "/".join(row[key] for key in ("suite", "op", "case", "dtype")): row
    for row in found
  }


def kernel_bandwidth(row: str) -> float:
  """Returns the bytes a second of one of our kernels on an H200.

  >>> round(kernel_bandwidth("decode/B8_S32768_N8_G4_H128/bfloat16") / 1e12, 2)
  4.18
  """
  return _rows("gpu/h200.json")[row]["gigabytes_per_second"] * 1e9


def copy_bandwidth() -> float:
  """Returns the bytes a second of a plain copy on an H200."""
  rows = _rows("gpu/h200.json").values()
  return max(row["copy_gigabytes_per_second"] for row in rows) * 1e9


def kernel_seconds() -> float:
  """Returns how long a kernel on an H200 takes that has nearly nothing to do.

  That is one of many in a program: the update of a cache by one token.
  """
  row = _rows("gpu/h200.json")[
    "kv_cache.update/token_B8_S32768_N8_H128/bfloat16"
  ]
  return row["ms"]["ours"] / 1e3


def host_seconds(training: bool) -> float:
  """Returns the host's seconds for each Variable of a step.

  They are those of `nnx.jit` on one core: of a step with gradients and Adam,
  whose 25 blocks have six Parameters and twelve moments each, or of a call that
  takes a model of 1000 Variables.
  """
  if training:
    return _rows("train_step.json")["train_step/step/25_blocks/"]["ours_ms"] / (
      1e3 * 25 * 18
    )
  return _rows("graph.json")["graph/jit_noop/1000/"]["ours_ms"] / 1e6
